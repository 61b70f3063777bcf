"""Optimizers by name, and schedules against their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import training
from jaxpost.training import OptimizerConfig

TOTAL = 20


def closed_form(name, step, *, peak, warmup, decay, final):
    """Rate of optimizer step `step + 1`, straight from the definitions."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "constant":
        return peak
    if name == "wsd":
        begin = TOTAL - decay
        progress = max(0.0, (step - begin) / decay)
    else:
        progress = (step - warmup) / (TOTAL - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    shape = cosine if name == "cosine" else 1 - progress
    return peak * (final + (1 - final) * shape)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedule_is_its_closed_form(name, warmup):
    config = OptimizerConfig(
        learning_rate=0.5,
        schedule=name,
        warmup_steps=warmup,
        decay_fraction=0.3,
        final_fraction=0.1,
    )
    schedule = training.build_schedule(config, TOTAL)
    rates = [float(schedule(step)) for step in range(TOTAL)]
    expected = [
        closed_form(name, s, peak=0.5, warmup=warmup, decay=6, final=0.1)
        for s in range(TOTAL)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert min(rates) > 0.0


def test_warmup_fraction_is_a_share_of_all_steps():
    by_steps = OptimizerConfig(warmup_steps=4)
    by_share = OptimizerConfig(warmup_fraction=0.2)
    rates = [
        [float(training.build_schedule(c, TOTAL)(s)) for s in range(TOTAL)]
        for c in (by_steps, by_share)
    ]
    assert rates[0] == rates[1]


def model_params():
    key = jax.random.key(0)
    return {
        "embed": {"embedding": jax.random.normal(key, (8, 4))},
        "layers": {
            "input_norm": {"scale": jnp.ones((2, 4))},
            "attention": {
                "q": {"kernel": jax.random.normal(key, (2, 4, 2, 3))},
                "o": {"kernel": jax.random.normal(key, (2, 2, 3, 4))},
            },
            "mlp": {
                "up": {
                    "kernel": jax.random.normal(key, (2, 4, 6)),
                    "bias": jnp.ones((2, 6)),
                }
            },
        },
        "head": {"kernel": jax.random.normal(key, (4, 8))},
    }


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "lion", "muon"])
def test_every_optimizer_descends(name):
    decay = 0.0 if name == "adam" else 0.01
    config = OptimizerConfig(
        name=name, learning_rate=0.02, weight_decay=decay, schedule="constant"
    )
    tx, _ = training.build_optimizer(config, TOTAL)
    params = model_params()
    opt_state = tx.init(params)

    def loss(params):
        return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    first = float(loss(params))
    for _ in range(5):
        params, opt_state = step(params, opt_state)
    assert float(loss(params)) < first


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_decay_is_decoupled_and_leaves_norms_and_biases_alone(name):
    config = OptimizerConfig(
        name=name,
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
        decay_embeddings=False,
    )
    tx, _ = training.build_optimizer(config, TOTAL)
    params = model_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    decayed = jax.tree.map(lambda u, p: u / p, updates, params)
    for tree, expected in (
        (decayed["layers"]["mlp"]["up"]["kernel"], -0.05),
        (decayed["layers"]["attention"], -0.05),
        (decayed["head"], -0.05),
        (decayed["embed"], 0.0),
        (decayed["layers"]["input_norm"], 0.0),
        (decayed["layers"]["mlp"]["up"]["bias"], 0.0),
    ):
        for leaf in jax.tree.leaves(tree):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-8)


def test_muon_orthogonalizes_each_layers_matrices():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", clip_norm=None
    )
    tx, _ = training.build_optimizer(config, TOTAL)
    params = model_params()
    grads = jax.tree.map(lambda p: p**3 + 0.1, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    # Newton-Schulz brings singular values near each other, layer by layer; the output
    # projection [N, H, D] is a matrix of N * H rows.
    attention = updates["layers"]["attention"]
    for matrix in (
        attention["q"]["kernel"][1].reshape(4, 6),
        attention["o"]["kernel"][0].reshape(6, 4),
        updates["layers"]["mlp"]["up"]["kernel"][0],
    ):
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert singular.max() / singular.min() < 2.5


def test_clipping_bounds_the_update_and_moments_take_their_dtype():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, schedule="constant", b1=0.0, clip_norm=0.5
    )
    tx, _ = training.build_optimizer(config, TOTAL)
    grads = {"a": jnp.full((4,), 10.0)}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)

    tx, _ = training.build_optimizer(OptimizerConfig(mu_dtype="bfloat16"), TOTAL)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(tx.init(grads))}
    assert dtypes == {"int32", "bfloat16", "float32"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamW"}, "name must be one of adamw, adam.*got 'adamW'"),
        ({"schedule": "step"}, "schedule must be one of constant, linear"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"warmup_steps": 1, "warmup_fraction": 0.1}, "not both"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must lie in \[0, 1\)"),
        ({"b1": 1.0}, r"b1 must lie in \[0, 1\)"),
        ({"final_fraction": 1.5}, r"final_fraction must lie in \[0, 1\]"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight decay"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None"),
        ({"mu_dtype": "int8"}, "mu_dtype must be float32, bfloat16"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "total", "message"),
    [
        ({}, 0, "total_steps must be at least 1, got 0"),
        ({"warmup_steps": 5}, 5, "warm-up of 5 steps leaves nothing of 5"),
        (
            {"schedule": "wsd", "warmup_steps": 5, "decay_fraction": 0.6},
            10,
            "do not fit in 10",
        ),
    ],
)
def test_schedule_must_fit(fields, total, message):
    with pytest.raises(ValueError, match=message):
        training.build_optimizer(OptimizerConfig(**fields), total)
