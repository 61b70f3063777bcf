"""NT-Xent in blocks against loops, and what happens to columns before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import contrastive as oracle

from jaxpost import losses
from jaxpost.losses._contrastive_blocks import blockwise_nt_xent, plan_blocks

# The worked example of the specification, four nodes of width two.
U = np.array([[1.0, 2], [3, 1], [2, 5], [0, 0]])
V = np.array([[1.0, 1], [2, 1], [3, 4], [0, 1]])

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def draw(seed: int, nodes: int, width: int, dtype=np.float32) -> tuple:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(nodes, width)), dtype) for _ in "ab")


def loss(z1, z2, **settings) -> float:
    return float(np.mean(losses.nt_xent(z1, z2, **{"temperature": 0.5} | settings)))


@jax.jit
def clnr(u, v):
    z1, z2 = losses.column_standardize(u), losses.column_standardize(v)
    return jnp.mean(losses.nt_xent(z1, z2, temperature=0.5))


@pytest.mark.parametrize("intra", [True, False])
@pytest.mark.parametrize(
    ("nodes", "chunk_size", "temperature"),
    [(7, 3, 0.5), (8, 4, 0.4), (5, None, 0.9), (9, 4, 0.01)],
    ids=["overlapping", "even", "one-block", "cold"],
)
def test_blocks_equal_loops_and_the_dense_gradient(
    nodes, chunk_size, temperature, intra
):
    with jax.enable_x64(True):
        z1, z2 = draw(0, nodes, 4, np.float64)
        weights = jnp.arange(1.0, nodes + 1)

        def total(implementation, z1, z2):
            values = losses.nt_xent(
                z1,
                z2,
                temperature=temperature,
                intra=intra,
                chunk_size=chunk_size,
                implementation=implementation,
            )
            return jnp.sum(values * weights), values

        (_, values), grads = jax.value_and_grad(
            lambda *z: total("blocks", *z), (0, 1), has_aux=True
        )(z1, z2)
        expected = jax.grad(lambda *z: total("dense", *z)[0], (0, 1))(z1, z2)
        np.testing.assert_allclose(
            values, oracle.nt_xent(z1, z2, temperature, intra), rtol=1e-11
        )
        assert values.dtype == jnp.float64
        for grad, wanted in zip(grads, expected, strict=True):
            np.testing.assert_allclose(
                grad, wanted, rtol=1e-9, atol=1e-10 / temperature
            )


def test_blocks_formed_again_equal_blocks_kept():
    z1, z2 = draw(1, 11, 4)

    def grads(keep_bytes):
        plan, _ = plan_blocks(11, 4, True, 4, keep_bytes)
        assert plan.keep == (keep_bytes > 0)
        return jax.grad(
            lambda *z: jnp.sum(blockwise_nt_xent(*z, 0.5, True, 4, keep_bytes)), (0, 1)
        )(z1, z2)

    for kept, again in zip(grads(2**20), grads(0), strict=True):
        np.testing.assert_allclose(kept, again, atol=1e-6)


def test_gradients_are_those_of_differences():
    with jax.enable_x64(True):
        z1, z2 = draw(2, 6, 3, np.float64)
        jax.test_util.check_grads(
            lambda *z: losses.nt_xent(*z, temperature=0.5, chunk_size=4),
            (z1, z2),
            order=1,
            modes=["rev"],
            rtol=1e-6,
        )


def test_worked_example():
    u, v = jnp.asarray(U, jnp.float32), jnp.asarray(V, jnp.float32)
    z1, z2 = losses.column_standardize(u), losses.column_standardize(v)
    np.testing.assert_allclose(
        z1,
        [
            [-0.38729833, 0],
            [1.161895, -0.46291005],
            [0.38729833, 1.38873015],
            [-1.161895, -0.9258201],
        ],
        atol=1e-6,
    )
    assert loss(z1, z2) == pytest.approx(0.9027696085, abs=2e-6)
    population = [losses.column_standardize(x, ddof=0) for x in (u, v)]
    assert loss(*population) == pytest.approx(0.9027696085, abs=2e-6)
    assert loss(u, v) == pytest.approx(1.8699618805, abs=2e-6)
    assert abs(loss(z1, z2, intra=False) - 0.9027696085) > 0.1
    np.testing.assert_allclose(
        np.mean(losses.alignment(z1, z2)), 0.3177028641, atol=1e-6
    )
    both = (losses.uniformity(z1) + losses.uniformity(z2)) / 2
    np.testing.assert_allclose(both, -2.4018365379, atol=2e-6)
    terms = losses.cca_ssg(z1, z2)
    total = jnp.mean(terms.values) + 1e-3 * terms.decorrelation
    np.testing.assert_allclose(total, -1.2932954320, atol=2e-6)
    np.testing.assert_allclose(
        losses.scalar_whiten(u),
        [
            [-0.48038348, 0.16012783],
            [0.80063913, -0.48038348],
            [0.16012783, 2.08166173],
            [-1.12089478, -1.12089478],
        ],
        atol=1e-6,
    )


def test_one_way_values_of_the_worked_example():
    forward = [1.53452896, 0.52745552, 0.31212663, 1.08536022]
    back = [1.70138297, 0.5883363, 0.3953774, 1.07758887]
    z1, z2 = oracle.standardize(U), oracle.standardize(V)
    values = losses.nt_xent(
        jnp.asarray(z1, jnp.float32), jnp.asarray(z2, jnp.float32), temperature=0.5
    )
    np.testing.assert_allclose(values, (np.array(forward) + back) / 2, atol=2e-6)


def test_closed_forms():
    identity = jnp.eye(5)
    expected = np.log((np.e**2 + 8) / np.e**2)  # 0.7336566139
    assert loss(identity, identity) == pytest.approx(expected, abs=1e-6)
    collapsed = jnp.ones((6, 3))
    assert loss(collapsed, collapsed) == pytest.approx(np.log(11), abs=1e-6)


def test_columns_and_measures_equal_loops():
    z1, z2 = draw(3, 9, 4)
    np.testing.assert_allclose(
        losses.column_standardize(z1), oracle.standardize(z1), rtol=1e-5, atol=1e-6
    )
    s1, s2 = (np.asarray(oracle.standardize(z), np.float32) for z in (z1, z2))
    terms = losses.cca_ssg(jnp.asarray(s1), jnp.asarray(s2))
    total = jnp.mean(terms.values) + 0.1 * terms.decorrelation
    np.testing.assert_allclose(total, oracle.cca(s1, s2, 0.1), rtol=1e-5)
    wide = np.asarray(z1, np.float64), np.asarray(z2, np.float64)
    found = np.mean(losses.alignment(z1, z2))
    np.testing.assert_allclose(found, oracle.alignment(*wide), rtol=1e-5)
    found = losses.uniformity(z1, chunk_size=4)
    np.testing.assert_allclose(found, oracle.uniformity(wide[0]), rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_invariances(seed):
    with jax.numpy_dtype_promotion("strict"):
        u, v = draw(seed, 6, 3)
        rng = np.random.default_rng(seed)
        scale = jnp.asarray(rng.uniform(0.5, 2.0, (1, 3)), jnp.float32)
        shift = jnp.asarray(rng.normal(size=(1, 3)), jnp.float32)

        plain = float(clnr(u, v))
        assert clnr(v, u) == pytest.approx(plain, abs=1e-5)
        order = rng.permutation(6)
        assert clnr(u[order], v[order]) == pytest.approx(plain, abs=1e-5)
        # An affine map of columns; 1e-4 since the shift may cancel digits of u.
        assert clnr(u * scale + shift, v) == pytest.approx(plain, abs=1e-4)
        z = losses.column_standardize(u)
        np.testing.assert_allclose(np.mean(z, axis=0), 0.0, atol=1e-6)
        np.testing.assert_allclose(np.std(z, axis=0, ddof=1), 1.0, atol=1e-5)
        np.testing.assert_allclose(losses.alignment(u, u), 0.0, atol=1e-12)


def test_zca_decorrelates_and_scalar_whitening_does_not():
    rng = np.random.default_rng(4)
    u = jnp.asarray(rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)), jnp.float32)
    white = losses.zca_whiten(u, eps=1e-7)
    np.testing.assert_allclose(np.cov(white, rowvar=False), np.eye(3), atol=1e-4)
    scalar = np.cov(losses.scalar_whiten(u), rowvar=False)
    assert np.abs(scalar - np.eye(3)).max() > 0.1


def test_zca_gradient_where_eigenvalues_meet():
    # Columns that are orthogonal and of one variance: eigh's own gradient is NaN.
    u = jnp.asarray([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    grad = jax.grad(lambda u: jnp.sum(losses.zca_whiten(u) ** 3 * u))(u)
    assert np.isfinite(grad).all()
    with jax.enable_x64(True):
        u, _ = draw(5, 7, 3, np.float64)
        jax.test_util.check_grads(
            losses.zca_whiten, (u,), order=1, modes=["rev"], rtol=1e-5
        )


def test_constant_columns_and_rows_of_zeros_stay_finite():
    u, v = draw(6, 6, 3)
    u = u.at[:, 1].set(0.1)
    assert losses.constant_columns(u).tolist() == [False, True, False]

    def total(u, v):
        z1, z2 = losses.column_standardize(u), losses.column_standardize(v)
        return jnp.sum(losses.nt_xent(z1, z2, temperature=0.5))

    value, grad = jax.value_and_grad(total)(u, v)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert (grad[:, 1] == 0.0).all()
    z1, z2 = draw(7, 5, 3)
    z1 = z1.at[2].set(0.0)
    for implementation in ("blocks", "dense"):
        value, grad = jax.value_and_grad(
            lambda z, name=implementation: jnp.sum(
                losses.nt_xent(z, z2, temperature=0.5, implementation=name)
            )
        )(z1)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
        assert (grad[2] == 0.0).all()


def test_memory_grows_with_n_not_with_its_square():
    def needed(nodes: int, width: int) -> int:
        shape = jax.ShapeDtypeStruct((nodes, width), jnp.float32)
        grad = jax.grad(
            lambda *z: jnp.mean(losses.nt_xent(*z, temperature=0.5)), (0, 1)
        )
        found = jax.jit(grad).lower(shape, shape).compile().memory_analysis()
        return found.temp_size_in_bytes

    blocks = 40 * 1024**2 * 4  # of what a step of the sweep holds, generously
    assert needed(60_000, 8) < blocks < 60_000**2 * 4 / 50
    one_gradient = 40_000 * 512 * 4  # results are not temporaries
    assert needed(40_000, 512) < one_gradient / 2


def test_low_precision_inputs_give_float32():
    z1, z2 = draw(8, 6, 4)
    low = losses.nt_xent(
        z1.astype(jnp.bfloat16), z2.astype(jnp.bfloat16), temperature=0.5
    )
    assert low.dtype == jnp.float32
    # bfloat16 keeps 8 bits of each coordinate.
    np.testing.assert_allclose(low, losses.nt_xent(z1, z2, temperature=0.5), atol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"implementation": "fast"}, "implementation must be .* got 'fast'"),
    ],
)
def test_refused_settings(settings, message):
    z1, z2 = draw(9, 4, 2)
    with pytest.raises(ValueError, match=message):
        loss(z1, z2, **settings)


def test_refused_shapes():
    z1, _ = draw(10, 4, 2)
    with pytest.raises(ValueError, match="two views of the same nodes"):
        loss(z1, z1[:3])
    with pytest.raises(ValueError, match="at least 2 nodes, got 1"):
        loss(z1[:1], z1[:1])
    with pytest.raises(ValueError, match=r"ddof must lie in \[0, 4\), got 4"):
        losses.column_standardize(z1, ddof=4)
    with pytest.raises(ValueError, match="eps must not be negative"):
        losses.column_standardize(z1, eps=-1.0)
    with pytest.raises(ValueError, match="eps must be positive"):
        losses.zca_whiten(z1, eps=0.0)
    with pytest.raises(ValueError, match=r"must both be \[N, D\]"):
        losses.cca_ssg(z1, z1[:3])
