"""Entropies of the tokens of whole texts, by one pass of a model and without logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import ops
from jaxpost.generation._decode import Functions
from jaxpost.typing import DecodeFns, Params


def token_entropies(
    fns: DecodeFns, params: Params, tokens: Any, mask: Any, *, lengths: Any = None
) -> jax.Array:
    """Entropy of the raw distribution that each token was drawn from.

    Args:
        fns, params: the model that generated the texts, or a surrogate.
        tokens: prompts and texts without a gap, integer `[B, T]`; any valid id after
            the end.
        mask: tokens whose entropy is asked for, bool `[B, T]`. The others cost no
            product with the head; False in column 0, which nothing predicts.
        lengths: tokens of each row, integer `[B]`; None takes them to end where `mask`
            does.

    Returns:
        float32 or wider `[B, T]`, nats; `[:, t]` belongs to `tokens[:, t]`, and is 0
        where masked.

    Raises:
        ValueError: shapes differ, or the mask has column 0.
    """
    mask = np.asarray(mask)
    if mask.shape != np.shape(tokens) or mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(
            "mask must be bool [B, T] like tokens, got "
            f"{mask.dtype} {mask.shape} and {np.shape(tokens)}."
        )
    if mask[:, 0].any():
        raise ValueError(
            "mask is True in column 0: no model predicts the first token of a row."
        )
    if lengths is None:
        lengths = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    return _entropies(
        Functions.of(fns),
        params,
        jnp.asarray(tokens, jnp.int32),
        mask,
        np.asarray(lengths, np.int32),
    )


@functools.partial(jax.jit, static_argnames=("functions",))
def _entropies(
    functions: Functions,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    fns = functions.restore()
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(columns, tokens.shape)
    segments = (columns < lengths[:, None]).astype(jnp.int32)
    hidden = fns.apply(params, tokens, positions, segments).hidden
    targets, asked = ops.shift_targets(tokens, mask)
    stats = ops.linear_token_logps(
        hidden, fns.unembed(params), targets, mask=asked, with_entropy=True
    )
    assert stats.entropy is not None
    return jnp.pad(stats.entropy, ((0, 0), (1, 0)))[:, :-1]
