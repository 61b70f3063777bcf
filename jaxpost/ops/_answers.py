"""Between the tokens of joined rows and the answers they belong to.

A row holds a prompt and several answers to it (`data.join_samples`). Which answer a
token belongs to is its id: `branch_numbers(segment_ids) - 1` where it is trained on, -1
elsewhere. Each of the two functions is the other's transpose, so either's gradient is
the other's value, and neither stores `[B, W, A]`.
"""

import chex
import jax
import jax.numpy as jnp

from jaxpost.ops._dtypes import at_least_float32


def answer_sums(values: jax.Array, ids: jax.Array, answers: int) -> jax.Array:
    """Sum of each answer's tokens.

    Args:
        values: one per token, float `[B, W]`; anything, even NaN, where `ids` is -1.
        ids: which answer a token belongs to, int `[B, W]`, 0 to `answers - 1`, or -1
            for none. An id of `answers` or more belongs to none either.
        answers: how many answers A a row may have.

    Returns:
        float32 or wider, `[B, A]`; zero for an answer without tokens. Its mean is
        `ratio(answer_sums(values, ...), answer_sums(jnp.ones_like(values), ...))`.

    Raises:
        ValueError: `answers` is not positive.
        AssertionError: `values` and `ids` are not both `[B, W]`, or `ids` no integers.
    """
    if answers < 1:
        raise ValueError(f"answers must be at least 1, got {answers}.")
    chex.assert_rank([values, ids], 2)
    chex.assert_equal_shape([values, ids])
    chex.assert_type(ids, int)
    (values,) = at_least_float32(values)
    there = ids >= 0
    # Set aside before the sum, so that the gradient does not see them either.
    kept = jnp.where(there, values, jnp.zeros((), values.dtype))
    place = jnp.where(there, ids, answers)  # a negative index would count from the end

    def row_sums(place: jax.Array, kept: jax.Array) -> jax.Array:
        return jnp.zeros(answers, kept.dtype).at[place].add(kept, mode="drop")

    return jax.vmap(row_sums)(place, kept)


def per_answer(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Each token its answer's value.

    Args:
        values: one per answer, float `[B, A]`; anything, even NaN, for an answer that
            no token belongs to.
        ids: which answer a token belongs to, int `[B, W]`, -1 for none.

    Returns:
        float32 or wider, `[B, W]`; zero, with zero gradient, where `ids` is -1.

    Raises:
        AssertionError: `values` and `ids` are not `[B, A]` and `[B, W]`, or `ids` no
            integers.
    """
    chex.assert_rank([values, ids], 2)
    chex.assert_equal_shape_prefix([values, ids], 1)
    chex.assert_type(ids, int)
    (values,) = at_least_float32(values)
    there = (ids >= 0) & (ids < values.shape[1])
    found = jnp.take_along_axis(values, jnp.where(there, ids, 0), axis=1)
    return jnp.where(there, found, jnp.zeros((), values.dtype))
