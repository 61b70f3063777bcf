import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

VALUES = np.array([[1.0, -2.0, 4.0], [3.0, 0.5, 7.0]], np.float32)
MASK = np.array([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_numpy_on_kept_values(axis):
    mask = np.array([[True, True, True], [False, True, True]])
    kept = np.ma.masked_array(VALUES.astype(np.float64), ~mask)
    for found, wanted in (
        (ops.masked_sum(VALUES, mask, axis=axis), kept.sum(axis)),
        (ops.masked_mean(VALUES, mask, axis=axis), kept.mean(axis)),
        (ops.masked_variance(VALUES, mask, axis=axis), kept.var(axis)),
    ):
        np.testing.assert_allclose(found, np.ma.filled(wanted, 0.0), rtol=1e-6)


def test_unbiased_variance_of_few_values():
    mask = np.array([[True, True, True], [True, False, False]])
    found = ops.masked_variance(VALUES, mask, axis=1, ddof=1)
    np.testing.assert_allclose(found, [VALUES[0].var(ddof=1), 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    "reduce", [ops.masked_sum, ops.masked_mean, ops.masked_variance]
)
def test_nothing_kept_is_zero_and_nan_under_the_mask_is_nothing(reduce):
    dirty = jnp.where(MASK, VALUES, jnp.nan)
    np.testing.assert_array_equal(
        reduce(dirty, MASK, axis=1), reduce(jnp.asarray(VALUES), MASK, axis=1)
    )
    assert reduce(dirty, MASK, axis=1)[1] == 0.0
    gradient = jax.grad(lambda x: jnp.sum(reduce(x, MASK, axis=1)))(dirty)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    np.testing.assert_array_equal(gradient[~MASK], 0.0)


def test_variance_of_equal_values_has_zero_gradient():
    equal = jnp.full((1, 4), 3.0)
    mask = jnp.ones((1, 4), bool)
    gradient = jax.grad(lambda x: jnp.sum(ops.masked_variance(x, mask)))(equal)
    np.testing.assert_array_equal(gradient, 0.0)


def test_gradients_are_right():
    mask = np.array([[True, True, True], [False, True, True]])
    for reduce in (ops.masked_sum, ops.masked_mean, ops.masked_variance):
        chex.assert_numerical_grads(
            lambda x, reduce=reduce: reduce(x, mask, axis=1),
            (jnp.asarray(VALUES),),
            order=1,
            atol=1e-2,
            rtol=1e-2,
        )


def test_ratio_divides_once_and_zero_weight_is_zero():
    found = ops.ratio(jnp.array([6.0, 5.0, jnp.nan]), jnp.array([4.0, 0.0, 0.0]))
    np.testing.assert_array_equal(found, [1.5, 0.0, 0.0])
    gradient = jax.grad(lambda t, w: jnp.sum(ops.ratio(t, w)), (0, 1))(
        jnp.array([6.0, jnp.nan]), jnp.array([4.0, 0.0])
    )
    np.testing.assert_allclose(gradient[0], [0.25, 0.0])
    np.testing.assert_allclose(gradient[1], [-6.0 / 16.0, 0.0])
    assert ops.ratio(jnp.array(3, jnp.int32), jnp.array(2, jnp.int32)) == 1.5


def test_sums_are_float32_at_least():
    ones = jnp.ones((1, 4096), jnp.bfloat16)  # bfloat16 sums stop at 256
    mask = jnp.ones((1, 4096), bool)
    assert ops.masked_sum(ones, mask) == 4096.0
    assert ops.masked_sum(ones, mask).dtype == jnp.float32
    with jax.enable_x64(True):
        assert ops.masked_mean(jnp.ones((2, 2)), jnp.ones((2, 2), bool)).dtype == "f8"


def test_errors():
    with pytest.raises(AssertionError, match="shape"):
        ops.masked_sum(VALUES, MASK[:, :2])
    with pytest.raises(AssertionError, match="type"):
        ops.masked_mean(VALUES, MASK.astype(np.float32))
    with pytest.raises(ValueError, match="ddof must not be negative"):
        ops.masked_variance(VALUES, MASK, ddof=-1)
