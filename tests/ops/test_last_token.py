"""The last token of each row, from either padding side."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "none and holes": [[1, 1, 1, 1], [0, 1, 0, 1]],
    "empty": [[0, 0, 0, 0], [0, 0, 1, 0]],
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3)])
def test_equals_a_loop(name, shape):
    mask = np.array(MASKS[name], bool)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.zeros((2, *shape[2:]), np.float32)
    for row in range(2):
        for t in range(4):
            if mask[row, t]:
                expected[row] = values[row, t]
    found = ops.last_token(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_array_equal(found, expected)
    jitted = jax.jit(ops.last_token)(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_array_equal(jitted, expected)


def test_nothing_else_counts_even_nan():
    mask = jnp.array([[True, True, False], [False, False, False]])
    values = jnp.array([[jnp.nan, 2.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    np.testing.assert_array_equal(ops.last_token(values, mask), [2.0, 0.0])
    grad = jax.grad(lambda v: jnp.sum(jnp.square(ops.last_token(v, mask))))(values)
    np.testing.assert_array_equal(grad, [[0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])


def test_gradient_and_dtype():
    mask = jnp.array(MASKS["left"], bool)
    values = jax.random.normal(jax.random.key(0), (2, 4, 3))
    chex.assert_numerical_grads(
        lambda v: jnp.sum(jnp.sin(ops.last_token(v, mask))), (values,), 1, atol=1e-2
    )
    narrow = ops.last_token(values.astype(jnp.bfloat16), mask)
    assert narrow.dtype == jnp.bfloat16


def test_wrong_masks_are_refused():
    values = jnp.zeros((2, 4))
    with pytest.raises(AssertionError):
        ops.last_token(values, jnp.zeros((2, 3), bool))
    with pytest.raises(AssertionError):
        ops.last_token(values, jnp.zeros((2, 4), jnp.int32))
