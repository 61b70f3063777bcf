"""Sums and means over masks, with defined values and gradients when nothing is left.

Values under the mask are selected away before any arithmetic, so even NaN there changes
neither the result nor its gradient.
"""

import chex
import jax
import jax.numpy as jnp

from jaxpost.ops._dtypes import at_least_float32, compute_dtype

Axis = int | tuple[int, ...] | None


def masked_sum(values: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Sum where `mask` is True.

    Args:
        values: float or integer `[...]`; anything, even NaN, where masked.
        mask: bool, same shape.
        axis: axes to sum over; None for all.

    Returns:
        The sum, float32 or wider, `axis` removed.

    Raises:
        AssertionError: shapes differ, or `mask` is not boolean.
    """
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    dtype = compute_dtype(values)
    kept = jnp.where(mask, values.astype(dtype), jnp.zeros((), dtype))
    return jnp.sum(kept, axis=axis)


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total / weight`, zero (with zero gradients) where `weight` is zero.

    The one division of the library: sum totals and weights over microbatches and
    devices first, then divide once.

    Args:
        total: float `[...]`.
        weight: float or integer of the same shape (or a scalar), not negative.

    Returns:
        Quotients, float32 or wider, shape of `total`.
    """
    total, weight = at_least_float32(total, weight)
    has_weight = weight != 0
    safe = jnp.where(has_weight, weight, jnp.ones((), weight.dtype))
    # total is selected too: an empty sum that is NaN must not pass through.
    return jnp.where(has_weight, total, jnp.zeros((), total.dtype)) / safe


def masked_mean(values: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Mean where `mask` is True; zero where it is True nowhere.

    For values to report or normalise by. A loss is summed and divided in the training
    step instead, or microbatches would average averages.

    Args:
        values: float or integer `[...]`; anything, even NaN, where masked.
        mask: bool, same shape.
        axis: axes to average over; None for all.

    Returns:
        The mean, float32 or wider, `axis` removed.

    Raises:
        AssertionError: shapes differ, or `mask` is not boolean.
    """
    total = masked_sum(values, mask, axis=axis)
    return ratio(total, jnp.sum(mask, axis=axis, dtype=total.dtype))


def masked_variance(
    values: jax.Array, mask: jax.Array, *, axis: Axis = None, ddof: int = 0
) -> jax.Array:
    """Variance where `mask` is True; zero where no more than `ddof` values are left.

    Differentiable everywhere, equal values included. Its square root is not (infinite
    slope at zero): add the epsilon inside the root.

    Args:
        values: float or integer `[...]`; anything, even NaN, where masked.
        mask: bool, same shape.
        axis: axes to reduce; None for all.
        ddof: what is subtracted from the count in the denominator (1: unbiased).

    Returns:
        The variance, float32 or wider, `axis` removed.

    Raises:
        ValueError: `ddof` is negative.
        AssertionError: shapes differ, or `mask` is not boolean.
    """
    if ddof < 0:
        raise ValueError(f"ddof must not be negative, got {ddof}.")
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    dtype = compute_dtype(values)
    kept = jnp.where(mask, values.astype(dtype), jnp.zeros((), dtype))
    count = jnp.sum(mask, axis=axis, dtype=dtype, keepdims=True)
    mean = ratio(jnp.sum(kept, axis=axis, keepdims=True), count)
    centred = jnp.where(mask, kept - mean, jnp.zeros((), dtype))
    squares = jnp.sum(jnp.square(centred), axis=axis)
    freedom = jnp.sum(mask, axis=axis, dtype=dtype) - ddof
    return ratio(squares, jnp.maximum(freedom, 0))


def last_token(values: jax.Array, mask: jax.Array) -> jax.Array:
    """What stands at the last place of each row where `mask` is True.

    The rightmost such place, so rows may be padded at either side.

    Args:
        values: `[B, T, ...]`, such as hidden states or token scores; anything, even
            NaN, elsewhere.
        mask: bool `[B, T]`.

    Returns:
        `[B, ...]` in the dtype of `values`; zeros, with zero gradients, for rows
        without a place.

    Raises:
        AssertionError: shapes differ, or `mask` is not boolean.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape_prefix([values, mask], 2)
    chex.assert_type(mask, bool)
    length = mask.shape[1]
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    index = last.reshape(-1, *(1,) * (values.ndim - 1))
    kept = jnp.take_along_axis(values, index, axis=1)[:, 0]
    some = jnp.any(mask, axis=1).reshape(-1, *(1,) * (kept.ndim - 1))
    return jnp.where(some, kept, jnp.zeros((), kept.dtype))
