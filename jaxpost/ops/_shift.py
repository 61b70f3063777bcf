"""The only shift between inputs and targets in the library."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


def shift_targets(tokens: ArrayT, mask: ArrayT) -> tuple[ArrayT, ArrayT]:
    """Align tokens with the positions that predict them.

    `targets[:, t] = tokens[:, t + 1]` is the token that `hidden[:, t]` predicts;
    `target_mask[:, t] = mask[:, t + 1]`. Nothing follows the last position: its target
    is 0 and its mask False. Example: tokens `[[5, 6, 7]]` with mask `[[F, T, T]]` give
    `[[6, 7, 0]]` and `[[T, T, F]]`.

    Args:
        tokens: token ids, integer `[..., T]`, NumPy or JAX.
        mask: True on tokens that are trained on, bool `[..., T]`; never on the first
            token of a segment, which no token of its own segment predicts.

    Returns:
        `(targets, target_mask)`, same shapes, dtypes and kind (NumPy stays NumPy).

    Raises:
        ValueError: shapes differ, or a dtype is not integer and boolean respectively.
    """
    if tokens.shape != mask.shape or tokens.ndim == 0:
        raise ValueError(
            "tokens and mask must both be [..., T], got shapes "
            f"{tuple(tokens.shape)} and {tuple(mask.shape)}."
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}.")
    if mask.dtype != np.bool_:
        raise ValueError(f"mask must be boolean, got dtype {mask.dtype}.")
    is_numpy = isinstance(tokens, np.ndarray) and isinstance(mask, np.ndarray)
    xp: Any = np if is_numpy else jnp

    def advance(x: ArrayT) -> ArrayT:
        return xp.concatenate([x[..., 1:], xp.zeros_like(x[..., :1])], axis=-1)

    return advance(tokens), advance(mask)
