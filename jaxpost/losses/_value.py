"""The loss of a value function, one value per step."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops


def clipped_value(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Half the squared error, the larger of plain and clipped.

    `max((v - R)², (clip(v, v_old - clip, v_old + clip) - R)²) / 2`: no gradient once a
    value has moved by `clip` towards its return.

    Args:
        values: of the value function that is trained, float `[B, T]`.
        old_values: those at the time of sampling, same shape; no gradient flows into
            them.
        returns: what the values should be, same shape, taken as constants.
        mask: True where a step counts, bool, same shape; elsewhere anything, even NaN.
        clip: in the values' own units, positive, so it depends on how rewards are
            scaled; None for the plain squared error.

    Returns:
        Loss per step, float32 or wider, `[B, T]`, zero where masked; and its weights,
        one where a step counts, same dtype.

    Raises:
        ValueError: `clip` is not positive.
        AssertionError: shapes differ, or `mask` is not boolean.

    Source: as in the code of Schulman et al. (2017), arXiv 1707.06347; not in the
    paper. The half is the convention of most implementations.
    """
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be positive, or None for none, got {clip}.")
    chex.assert_rank(values, 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type(mask, bool)
    values, old_values, returns = ops.at_least_float32(values, old_values, returns)
    zero, one = jnp.zeros((), values.dtype), jnp.ones((), values.dtype)
    values, old_values, returns = (
        jnp.where(mask, x, zero) for x in (values, old_values, returns)
    )
    old_values, returns = map(jax.lax.stop_gradient, (old_values, returns))
    errors = jnp.square(values - returns)
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        errors = jnp.maximum(errors, jnp.square(near - returns))
    return 0.5 * errors, jnp.where(mask, one, zero)
