"""Generalised advantage estimation over the steps inside a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import advantages

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, T = 4, 9
coefficients = st.sampled_from([0.0, 0.3, 0.95, 1.0])
seeds = st.integers(0, 10**6)


def some_batch(seed):
    draw = np.random.default_rng(seed)
    mask = draw.random((B, T)) < 0.6
    mask[0] = True
    mask[1] = False
    return {
        "rewards": draw.normal(size=(B, T)),
        "values": draw.normal(size=(B, T)),
        "mask": mask,
        "terminals": draw.random((B, T)) < 0.2,
        "bootstrap": draw.normal(size=B),
    }


def as_arrays(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


def gae(batch, **settings):
    """With arguments in the order of the signature; the rest by name."""
    batch = dict(batch)
    first = [batch.pop(name) for name in ("rewards", "values", "mask")]
    return advantages.gae(*first, **batch, **settings)


@settings(max_examples=25, deadline=None)
@given(seeds, coefficients, coefficients)
def test_equals_the_loop_of_the_paper(seed, gamma, gae_lambda):
    batch = some_batch(seed)
    with jax.enable_x64(True):
        found = gae(as_arrays(batch), gamma=gamma, gae_lambda=gae_lambda)
    wanted = oracle.gae(**batch, gamma=gamma, gae_lambda=gae_lambda)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == "float64"
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@settings(max_examples=10, deadline=None)
@given(seeds, coefficients)
def test_at_lambda_one_they_are_monte_carlo_returns_minus_values(seed, gamma):
    """Returns summed directly: no value but the bootstrap enters them."""
    batch = some_batch(seed)
    with jax.enable_x64(True):
        found, returns = gae(as_arrays(batch), gamma=gamma, gae_lambda=1.0)
    for b in range(B):
        total = batch["bootstrap"][b]
        for t in reversed(range(T)):
            if not batch["mask"][b, t]:
                continue
            after = 0.0 if batch["terminals"][b, t] else total
            total = batch["rewards"][b, t] + gamma * after
            np.testing.assert_allclose(returns[b, t], total, atol=1e-12)
            np.testing.assert_allclose(
                found[b, t], total - batch["values"][b, t], atol=1e-12
            )


@settings(max_examples=10, deadline=None)
@given(seeds, coefficients)
def test_at_lambda_zero_they_are_one_step_errors(seed, gamma):
    batch = some_batch(seed)
    batch["mask"][:] = True
    values = np.hstack([batch["values"], batch["bootstrap"][:, None]])
    after = np.where(batch["terminals"], 0.0, values[:, 1:])
    with jax.enable_x64(True):
        found, _ = gae(as_arrays(batch), gamma=gamma, gae_lambda=0.0)
    wanted = batch["rewards"] + gamma * after - batch["values"]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "gae_lambda", "wanted"),
    [
        (0.0, 1.0, [1.2, 1.2, 1.2, 1.2]),
        (0.0, 0.95, [1.02885, 1.083, 1.14, 1.2]),
        (0.5, 0.95, [0.60016, 0.63175, 0.665, 0.7]),
    ],
)
def test_a_reward_at_the_end_of_an_answer(values, gae_lambda, wanted):
    """By hand: `delta` is 0 but at the end, where it is `1.2 - values`.

    `wanted[t] = (1.2 - values) * gae_lambda ** (3 - t)`.
    """
    by_hand = [(1.2 - values) * gae_lambda ** (3 - t) for t in range(4)]
    found, _ = advantages.gae(
        jnp.array([[0.0, 0.0, 0.0, 1.2]]),
        jnp.full((1, 4), values),
        jnp.ones((1, 4), bool),
        gamma=1.0,
        gae_lambda=gae_lambda,
    )
    np.testing.assert_allclose(found[0], by_hand, rtol=1e-6)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e30])
def test_masked_positions_change_nothing(rubbish):
    clean = some_batch(3)
    dirty = {name: value.copy() for name, value in clean.items()}
    for name in ("rewards", "values"):
        clean[name][~clean["mask"]] = 0.0
        dirty[name][~dirty["mask"]] = rubbish
    dirty["terminals"][~dirty["mask"]] ^= True
    settings = {"gamma": 0.9, "gae_lambda": 0.8}
    for one, other in zip(
        gae(as_arrays(clean), **settings),
        gae(as_arrays(dirty), **settings),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[~clean["mask"]], 0.0)


def test_masked_positions_are_skipped_not_taken_as_steps():
    """The same steps with gaps between them and without have the same advantages."""
    batch = some_batch(4)
    batch["mask"][:] = True
    spread = {name: np.full((B, 3 * T), np.nan) for name in ("rewards", "values")}
    spread |= {name: np.zeros((B, 3 * T), bool) for name in ("mask", "terminals")}
    at = np.sort(np.random.default_rng(0).permutation(3 * T)[:T])
    for name, value in spread.items():
        value[:, at] = batch[name]
    spread["bootstrap"] = batch["bootstrap"]
    settings = {"gamma": 0.9, "gae_lambda": 0.8}
    for one, other in zip(
        gae(as_arrays(batch), **settings),
        gae(as_arrays(spread), **settings),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other[:, at])


def test_a_bootstrap_after_a_terminal_step_is_not_read():
    batch = some_batch(5)
    batch["mask"][:], batch["terminals"][:, -1] = True, True
    batch["bootstrap"][:] = np.nan
    found, returns = gae(as_arrays(batch), gamma=0.9, gae_lambda=0.9)
    assert np.isfinite(found).all()
    assert np.isfinite(returns).all()


def test_jit_equals_eager_and_no_gradient_flows():
    batch = as_arrays(some_batch(6))
    settings = {"gamma": 0.9, "gae_lambda": 0.8}
    eager = gae(batch, **settings)
    compiled = jax.jit(lambda batch: gae(batch, **settings))(batch)
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def total(values):
        return sum(jnp.sum(x) for x in gae({**batch, "values": values}, **settings))

    np.testing.assert_array_equal(jax.grad(total)(batch["values"]), 0.0)


def test_half_precision_is_summed_in_float32():
    batch = some_batch(7)
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in batch.items()}
    half |= {k: jnp.asarray(batch[k]) for k in ("mask", "terminals")}
    whole = {
        k: v.astype(jnp.float32) if v.dtype == "bfloat16" else v
        for k, v in half.items()
    }
    settings = {"gamma": 1.0, "gae_lambda": 0.9}
    for one, other in zip(gae(half, **settings), gae(whole, **settings), strict=True):
        assert one.dtype == "float32"
        np.testing.assert_array_equal(one, other)


def test_equals_rlax():
    rlax = pytest.importorskip("rlax", reason="rlax is not installed")
    batch = some_batch(8)
    gamma, gae_lambda = 0.97, 0.9
    values = np.hstack([batch["values"], batch["bootstrap"][:, None]])
    batch["mask"][:] = True
    discounts = np.where(batch["terminals"], 0.0, gamma)
    found, _ = gae(as_arrays(batch), gamma=gamma, gae_lambda=gae_lambda)
    for b in range(B):
        with jax.numpy_dtype_promotion("standard"):
            wanted = rlax.truncated_generalized_advantage_estimation(
                jnp.asarray(batch["rewards"][b], jnp.float32),
                jnp.asarray(discounts[b], jnp.float32),
                gae_lambda,
                jnp.asarray(values[b], jnp.float32),
            )
        np.testing.assert_allclose(found[b], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "error", "words"),
    [
        ({}, {"gamma": 1.1}, ValueError, r"gamma must lie in \[0, 1\], got 1.1"),
        ({}, {"gae_lambda": -0.1}, ValueError, r"gae_lambda must lie in \[0, 1\]"),
        ({}, {"gamma": float("nan")}, ValueError, "gamma must lie in"),
        ({"mask": jnp.ones((B, T))}, {}, AssertionError, "bool"),
        ({"terminals": jnp.zeros((B, T))}, {}, AssertionError, "bool"),
        ({"values": jnp.zeros((B, T + 1))}, {}, AssertionError, "shape"),
        ({"bootstrap": jnp.zeros((B, 1))}, {}, AssertionError, "shape"),
    ],
)
def test_wrong_arguments_are_refused(change, settings, error, words):
    batch = as_arrays(some_batch(0)) | change
    with pytest.raises(error, match=words):
        gae(batch, **{"gamma": 0.9, "gae_lambda": 0.9, **settings})
