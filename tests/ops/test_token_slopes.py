"""Gradients foreseen from slopes that depend on each token's own log-prob."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops
from jaxpost.ops import _linear_logps
from jaxpost.typing import Head

ROWS, LENGTH, WIDTH, VOCAB = 3, 11, 8, 40


def problem(dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    weight = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray(rng.random((ROWS, LENGTH)) < 0.7)
    old = jnp.asarray(rng.normal(size=(ROWS, LENGTH)) - 3.0, dtype)
    gains = jnp.where(mask, jnp.asarray(rng.normal(size=mask.shape), dtype), 0)
    return hidden, weight, targets, mask, old, gains


def token_losses(logps, old, gains):
    """A clipped ratio: the slope depends on the log-prob."""
    ratios = jnp.exp(logps - old)
    return -jnp.minimum(ratios * gains, jnp.clip(ratios, 0.8, 1.2) * gains)


def right(logps, old, gains):
    return jax.grad(lambda x: jnp.sum(token_losses(x, old, gains)))(logps)


def wrong(logps, old, gains):
    return jnp.ones_like(logps) + 0 * old * gains


def value_and_grads(function, dtype, implementation=None):
    hidden, weight, targets, mask, old, gains = problem(dtype)
    slopes = None if function is None else ops.TokenSlopes((old, gains), function)

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden,
            Head(weight),
            targets,
            mask=mask,
            grad_weights=slopes,
            chunk_size=5,
            implementation=implementation,
        )
        values = token_losses(stats.logps, old, gains)
        return jnp.sum(jnp.where(mask, values, 0)) / jnp.sum(mask, dtype=hidden.dtype)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, weight)


@pytest.mark.parametrize("function", [right, wrong], ids=["foreseen", "not foreseen"])
def test_equals_the_dense_form(function):
    with jax.enable_x64():
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
            value_and_grads(function, jnp.float64),
            value_and_grads(None, jnp.float64, "dense"),
        )


def test_what_is_foreseen_is_not_computed_again(monkeypatch):
    seen = []
    sweep = _linear_logps.scale_if_foreseen

    def spy(weights, trips, *rest):
        start, left = sweep(weights, trips, *rest)
        jax.debug.callback(lambda *x: seen.append([int(n) for n in x]), trips, left)
        return start, left

    monkeypatch.setattr(_linear_logps, "scale_if_foreseen", spy)
    for function in (right, wrong):
        jax.block_until_ready(value_and_grads(function, jnp.float32))
    jax.effects_barrier()
    (trips, left), (_, left_of_wrong) = seen
    assert trips == left_of_wrong > 0
    assert left == 0


def test_columns_of_another_shape():
    hidden, weight, targets, mask, old, _ = problem(jnp.float32)
    slopes = ops.TokenSlopes((old[:, 1:],), right)
    with pytest.raises(ValueError, match=r"grad_weights.columns\[0\]"):
        ops.linear_token_logps(hidden, weight, targets, mask=mask, grad_weights=slopes)
