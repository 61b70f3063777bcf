"""The public kit: it passes what is the same run on every mesh, and only that."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import models, ops, parallel, testing, training
from jaxpost.recipes import sft
from jaxpost.typing import LossOutput, Metric, Term

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=16,
    tie_embeddings=False,
)
FAST = tuple(testing.MESHES[i] for i in (0, 2))
TX = {"sgd": optax.sgd(0.1), "adam": optax.adam(1e-2)}


@functools.cache
def model():
    return models.build(CONFIG, jax.random.key(0))


def batch(rows=16, length=16):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, length + 1, rows)  # unequal, so that means of means show
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    real = positions < lengths[:, None]
    return {
        "tokens": np.where(real, rng.integers(3, 64, (rows, length)), 0).astype("i4"),
        "positions": positions,
        "segment_ids": real.astype(np.int32),
        "loss_mask": real & (positions > 0),
    }


def step_and_state(loss_fn, optimizer="sgd", accumulate=1):
    tx = optax.chain(testing.record_gradients(), TX[optimizer])
    step = training.make_train_step(loss_fn, tx, accumulate=accumulate)
    return step, training.init_state(model().params, tx, jax.random.key(1))


def check(step, state, meshes=FAST, **options):
    testing.assert_mesh_invariant(
        step, state, batch(), meshes, axes=models.param_axes(CONFIG), **options
    )


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_fine_tuning_step(accumulate):
    check(*step_and_state(sft.sft_loss(model()), accumulate=accumulate))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("shape", testing.MESHES, ids=str)
def test_fine_tuning_step_on_every_mesh(shape, optimizer):
    step, state = step_and_state(sft.sft_loss(model()), optimizer, 2)
    check(step, state, (shape,), adaptive=optimizer == "adam")


def with_split_vocabulary(shape):
    mesh = parallel.make_mesh(shape)
    return sft.sft_loss(
        model(), token_logps=parallel.split_vocabulary(ops.linear_token_logps, mesh)
    )


@pytest.mark.parametrize("shape", FAST[1:], ids=str)
@pytest.mark.slow
def test_split_vocabulary_is_the_same_step(shape):
    rows = batch()
    plain, state = step_and_state(sft.sft_loss(model()))
    split, _ = step_and_state(with_split_vocabulary(shape))
    mesh = parallel.make_mesh(shape)
    placement = parallel.shardings(models.param_axes(CONFIG), mesh)
    placed = parallel.place(
        state, parallel.shardings_like(state, state.params, placement)
    )
    wanted = jax.jit(plain)(state, rows)
    found = jax.jit(split)(placed, parallel.place(rows, parallel.batch_sharding(mesh)))
    for old, new in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = np.asarray(old), np.asarray(new)
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())


def test_unsplit_parameters_are_refused():
    step, state = step_and_state(sft.sft_loss(model()))
    everywhere = dict.fromkeys(parallel.RULES, None) | {"batch": ("data", "fsdp")}
    with pytest.raises(AssertionError, match=r"holds .* bytes of parameters"):
        check(step, state, FAST[1:], rules=everywhere)


@pytest.mark.slow
def test_another_loss_is_refused():
    traced = []

    def loss_fn(params, method_state, batch, key):
        traced.append(1)  # first for one device, then for the mesh
        output = sft.sft_loss(model())(params, method_state, batch, key)
        total, weight, coefficient = output.terms["nll"]
        wrong = Term(total * (1 + 1e-4 * len(traced)), weight, coefficient)
        return output._replace(terms={"nll": wrong})

    step, state = step_and_state(loss_fn)
    with pytest.raises(AssertionError, match=r"(?s)fsdp: 4, tensor: 2.*metrics loss"):
        check(step, state, FAST[1:])


def test_axes_are_guessed_where_none_are_given():
    def loss_fn(params, method_state, batch, key):
        error = jnp.square(batch["x"] @ params["w"] - batch["y"])
        return LossOutput(
            {"mse": Term(jnp.sum(error), jnp.float32(error.size))},
            {"worst": Metric(jnp.max(error), jnp.float32(1), "max")},
            method_state,
        )

    rng = np.random.default_rng(0)
    rows = {
        "x": rng.normal(size=(16, 32)).astype("f4"),
        "y": rng.normal(size=(16, 64)).astype("f4"),
    }
    tx = optax.sgd(0.1)
    params = {"w": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)}
    state = training.init_state(params, tx, jax.random.key(0))
    step = training.make_train_step(loss_fn, tx)
    testing.assert_mesh_invariant(step, state, rows, FAST)


def test_bad_arguments():
    step, state = step_and_state(sft.sft_loss(model()))
    with pytest.raises(ValueError, match="needs 64 devices"):
        check(step, state, ({"data": 64},))
    tx = optax.adam(1e-3)
    plain = training.init_state(model().params, tx, jax.random.key(1))
    with pytest.raises(ValueError, match="record_gradients"):
        check(training.make_train_step(sft.sft_loss(model()), tx), plain, adaptive=True)


def test_guide_examples_run():
    guide = pathlib.Path(__file__).parents[1] / "docs" / "meshes.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(guide), "exec"), {})
