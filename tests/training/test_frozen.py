"""Parameters beside the trained ones: read by the loss, left alone by all else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import parallel, training
from jaxpost.training._fingerprint import FrozenFingerprint
from jaxpost.typing import LossOutput, Term

TX = optax.adam(0.05)


def loss_fn(params, method_state, batch, key):
    """`y = (W + A B) x`; with a reference, also the distance to its `W`."""
    layer = params["layer"]
    predicted = batch["x"] @ (layer["kernel"] + layer["a"] @ layer["b"])
    noise = 1e-3 * jax.random.normal(key, predicted.shape)
    error = jnp.square(predicted + noise - batch["y"])
    weight = jnp.float32(error.size)
    terms = {"square": Term(jnp.sum(error), weight)}
    if "reference" in params:
        gap = layer["a"] @ layer["b"] - params["reference"]["layer"]["kernel"]
        terms["gap"] = Term(jnp.sum(jnp.square(gap)), jnp.float32(1.0), 0.1)
    return LossOutput(terms, {}, method_state)


def parts(seed=0, reference=False):
    draw = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    trained = {"layer": {"a": array(4, 2), "b": array(2, 3)}}
    frozen = {"layer": {"kernel": array(4, 3)}}
    if reference:
        frozen["reference"] = {"layer": {"kernel": array(4, 3)}}
    return trained, frozen


class Batches:
    """Endless, with a place that can be saved."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        draw = np.random.default_rng(self.number)
        self.number += 1
        return {
            "x": draw.standard_normal((8, 4)).astype(np.float32),
            "y": draw.standard_normal((8, 3)).astype(np.float32),
        }

    def state(self):
        return self.number

    def restore(self, number):
        self.number = number


def first_state(seed=0, **options):
    trained, frozen = parts(seed, **options)
    return training.init_state(trained, TX, jax.random.key(0), frozen=frozen, ema=True)


def run(state, steps, folder, *, resume=False, accumulate=1):
    step = training.make_train_step(loss_fn, TX, accumulate=accumulate, ema_decay=0.5)
    with training.Checkpoints(folder) as checkpoints:
        return training.train(
            step,
            state,
            Batches(),
            total_steps=steps,
            checkpoints=checkpoints,
            resume=resume,
            progress="none",
        )


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("reference", [False, True])
def test_the_gradient_is_that_of_the_trained_part(accumulate, reference):
    """Against a state in which everything is trained."""
    trained, frozen = parts(reference=reference)
    tx, batch = optax.sgd(1.0), next(Batches())
    step = training.make_train_step(loss_fn, tx, accumulate=accumulate)
    state = training.init_state(trained, tx, jax.random.key(0), frozen=frozen)
    whole = training.init_state(state.joined(), tx, jax.random.key(0))
    after, metrics = jax.jit(step)(state, batch)
    expected, whole_metrics = jax.jit(step)(whole, batch)
    for name in ("a", "b"):
        np.testing.assert_allclose(
            after.params["layer"][name], expected.params["layer"][name], atol=1e-6
        )
        assert np.any(after.params["layer"][name] != trained["layer"][name])
    assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-6)
    assert metrics["grad_norm"] < whole_metrics["grad_norm"]
    assert_same(after.frozen, frozen)


def test_moments_and_averages_have_the_trained_part_only():
    state = first_state()
    trained = jax.tree.structure(state.params)
    assert jax.tree.structure(state.opt_state[0].mu) == trained
    assert jax.tree.structure(state.ema) == trained
    assert set(state.joined()["layer"]) == {"a", "b", "kernel"}
    assert state.joined(use_ema=True)["layer"]["a"] is state.ema["layer"]["a"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_arrays_stay_the_callers_own(accumulate):
    """Neither donated nor copied: another holder reads them after the steps."""
    state = first_state()
    held, before = state.frozen, jax.tree.map(np.array, state.frozen)
    old = state.params["layer"]["a"]
    step = training.compile_step(
        training.make_train_step(loss_fn, TX, accumulate=accumulate, ema_decay=0.5)
    )
    batches = Batches()
    for _ in range(3):
        state, _ = step(state, next(batches))
    assert old.is_deleted()  # what is trained is donated
    assert state.frozen is held
    assert_same(held, before)
    assert step.traces == 1


def test_the_compiled_step_does_not_return_what_is_frozen():
    state = first_state()
    step = training.compile_step(training.make_train_step(loss_fn, TX, ema_decay=0.5))
    outputs = jax.tree.leaves(step.lower(state, next(Batches())).out_info)
    shapes = [leaf.shape for leaf in outputs]
    assert state.params["layer"]["a"].shape in shapes
    assert state.frozen["layer"]["kernel"].shape not in shapes


def test_a_leaf_cannot_be_trained_and_frozen():
    trained, frozen = parts()
    frozen["layer"]["a"] = trained["layer"]["a"]
    with pytest.raises(ValueError, match="'layer/a' is in both"):
        training.init_state(trained, TX, jax.random.key(0), frozen=frozen)


def test_evaluation_is_given_both(tmp_path):
    state = first_state(reference=True)
    values = training.make_eval_fn(loss_fn, lambda: [next(Batches())])(state)
    output = loss_fn(
        state.joined(), None, next(Batches()), jax.random.fold_in(state.key, 0)
    )
    term = output.terms["square"]
    assert values["eval_loss/square"] == pytest.approx(
        float(term.total / term.weight), rel=1e-5
    )
    assert values["eval_loss/gap"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_six_steps_are_three_and_three(tmp_path, accumulate):
    whole = run(first_state(), 6, tmp_path / "a", accumulate=accumulate)
    run(first_state(), 3, tmp_path / "b", accumulate=accumulate)
    state = first_state()._replace(params=parts(seed=9)[0])  # is read from the disk
    again = run(state, 6, tmp_path / "b", resume=True, accumulate=accumulate)
    assert_same(whole, again)
    hashes, _ = training.checkpoint_hashes(tmp_path / "b", 6)
    assert "params/layer/a" in hashes
    assert not any("kernel" in name or "frozen" in name for name in hashes)


def test_another_base_is_refused_by_name(tmp_path):
    run(first_state(reference=True), 2, tmp_path)
    trained, frozen = parts(reference=True)
    kernel = frozen["reference"]["layer"]["kernel"]

    def refused(frozen, words):
        state = training.init_state(
            trained, TX, jax.random.key(0), frozen=frozen, ema=True
        )
        with pytest.raises(training.CheckpointError, match=words):
            run(state, 4, tmp_path, resume=True)

    other = {"layer": {"kernel": kernel.at[1, 2].add(1e-6)}}
    refused(frozen | {"reference": other}, r"reference/layer/kernel: other values")
    swapped = {"layer": {"kernel": kernel[::-1]}}
    refused(frozen | {"reference": swapped}, r"reference/layer/kernel: other values")
    narrow = {"layer": {"kernel": kernel.astype(jnp.bfloat16)}}
    refused(frozen | {"reference": narrow}, r"was float32\[4, 3\], given bfloat16")
    refused({"layer": frozen["layer"]}, r"reference/layer/kernel: not given")
    more = frozen | {"teacher": kernel}
    refused(more, r"teacher: not there when the checkpoint was saved")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint4", "bool"])
def test_a_fingerprint_is_the_same_on_every_mesh_and_sees_one_bit(dtype):
    values = np.random.default_rng(0).integers(0, 2, (16, 8))
    array = jnp.asarray(values).astype(dtype)
    alone = FrozenFingerprint()({"x": array})
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    placement = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    assert FrozenFingerprint()({"x": jax.device_put(array, placement)}) == alone
    values[3, 5] = 1 - values[3, 5]
    assert FrozenFingerprint()({"x": jnp.asarray(values).astype(dtype)}) != alone


def test_a_fingerprint_is_not_computed_twice(monkeypatch):
    from jaxpost.training import _fingerprint

    calls = []
    real = _fingerprint._digest
    monkeypatch.setattr(_fingerprint, "_digest", lambda x: calls.append(1) or real(x))
    fingerprint, (_, frozen) = FrozenFingerprint(), parts()
    first = fingerprint(frozen)
    assert fingerprint({**frozen}) == first
    assert len(calls) == 1
    fingerprint(parts(seed=1)[1])
    assert len(calls) == 2


def test_a_bad_frozen_value_is_named():
    state = first_state()
    frozen = {"layer": {"kernel": state.frozen["layer"]["kernel"].at[0, 0].set(np.nan)}}
    step = training.make_train_step(loss_fn, TX)
    with pytest.raises(
        training.NonFiniteError, match="frozen parameter 'layer/kernel'"
    ):
        training.train(
            step,
            state._replace(frozen=frozen),
            Batches(),
            total_steps=2,
            progress="none",
        )
