"""A base in 8 or 4 bits under adapters; by qwix, the extra `quant`."""

import sys

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import models, ops, parallel, training
from jaxpost.recipes import sft

LORA = models.LoraConfig(rank=2, alpha=4.0)


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="needs the extra `quant`")


def adapted(name="llama"):
    base = families.build(families.CONFIGS[name])
    model = models.add_lora(base, LORA, jax.random.key(1))
    adapters, frozen = models.split_lora(model.params)
    draw = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), x.dtype), adapters
    )
    return model.replace(params=ops.join_trees(frozen, adapters))


def batch_of(config, rows=4, length=12):
    draw = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": draw.integers(0, config.vocab_size, (rows, length), np.int32),
        "positions": positions,
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_mask": positions > 0,
    }


def hidden(model):
    batch = batch_of(model.config)
    output = model.apply(model.params, batch["tokens"], batch["positions"])
    return np.asarray(output.hidden)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("int8", "qwen3"), ("nf4", "llama")])
def test_the_scan_computes_with_the_widened_kernels(qwix, kind, name):
    quantized = models.quantize_base(adapted(name), kind)

    def widened(leaf):
        return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf

    is_array = lambda leaf: isinstance(leaf, qwix.QArray)  # noqa: E731
    plain = jax.tree.map(widened, quantized.params, is_leaf=is_array)
    expected = hidden(quantized.replace(params=plain))
    gap = np.abs(hidden(quantized) - expected).max()
    assert gap <= 1e-5 * np.abs(expected).max()
    merged = hidden(models.merge_lora(quantized))
    assert np.abs(merged - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(hidden(adapted(name)) - expected).max() > 1e-3  # it is narrower


@pytest.mark.parametrize(
    ("kind", "dtype", "worst"), [("int8", "int8", 0.5 / 127), ("nf4", "uint4", 0.16)]
)
def test_values_are_near_and_narrow(qwix, kind, dtype, worst):
    """Half a step of the largest value that shares a scale, per output and block."""
    model = adapted()
    quantized = models.quantize_base(model, kind)
    for block, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            wide = np.asarray(model.params["layers"][block][name]["kernel"])
            narrow = quantized.params["layers"][block][name]["kernel"]
            assert narrow.qvalue.dtype == dtype
            inputs = (1, 2) if name == "o" else (1,)
            largest = np.abs(wide).max(inputs, keepdims=True)
            gap = np.abs(np.asarray(qwix.dequantize(narrow)) - wide)
            assert np.all(gap <= 1.01 * worst * largest)
            assert narrow.scale.shape[0] == wide.shape[0]
    assert quantized.param_count() == model.param_count()
    for name in ("embed", "final_norm", "head"):
        for one, two in zip(
            jax.tree.leaves(quantized.params[name]),
            jax.tree.leaves(model.params[name]),
            strict=True,
        ):
            assert one is two


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_train_on_it_and_resume(qwix, kind, tmp_path):
    model = models.quantize_base(adapted(), kind)
    adapters, frozen = models.split_lora(model.params)
    tx, batch = optax.adam(1e-2), batch_of(model.config)
    loss_fn = sft.sft_loss(model, dtype=jnp.bfloat16)
    state = training.init_state(adapters, tx, jax.random.key(0), frozen=frozen)
    step = training.compile_step(training.make_train_step(loss_fn, tx))
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert state.frozen is frozen
    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state)
        restored = checkpoints.restore(state).state
        jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
        kernel = frozen["layers"]["mlp"]["up"]["kernel"]
        other = kernel.replace(scale=kernel.scale * 1.01)
        frozen["layers"]["mlp"]["up"]["kernel"] = other
        with pytest.raises(training.CheckpointError, match=r"up/kernel/scale: other"):
            checkpoints.restore(state)


@pytest.mark.slow
def test_kernels_are_widened_one_layer_at_a_time(qwix):
    """The compiled step has no room for the whole wide base."""
    config = families.config(
        hidden_size=128, intermediate_size=1024, num_layers=12, lora=LORA
    )
    model = models.quantize_base(models.build(config, jax.random.key(0)), "int8")
    adapters, frozen = models.split_lora(model.params)
    tx = optax.sgd(0.1)
    state = training.init_state(adapters, tx, jax.random.key(0), frozen=frozen)
    step = training.compile_step(training.make_train_step(sft.sft_loss(model), tx))
    batch = batch_of(config, rows=1, length=8)
    temporary = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    layer = 4 * 3 * 128 * 1024  # float32 bytes of one layer's feed-forward kernels
    assert temporary < 5 * layer


def test_decoding_widens_one_layer_at_a_time_too(qwix):
    """Answers are those of the widened kernels, and a loop never holds all of them."""
    config = families.config(
        hidden_size=32, intermediate_size=2048, num_layers=8, lora=LORA
    )
    model = models.quantize_base(models.build(config, jax.random.key(0)), "int8")
    batch = batch_of(config, rows=2, length=6)
    full = model.apply(model.params, batch["tokens"], batch["positions"]).hidden

    @jax.jit
    def decode(params, tokens):
        params = model.for_decoding(params)

        def step(at, carry):
            found, cache = carry
            one = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
            out = model.apply(params, one, jnp.full((2, 1), at), None, cache)
            return found.at[:, at].set(out.hidden[:, 0]), out.cache

        start = (jnp.zeros(full.shape), model.init_cache(2, 6))
        return jax.lax.fori_loop(0, 6, step, start)[0]

    found = decode(model.params, batch["tokens"])
    np.testing.assert_allclose(found, full, atol=1e-5)
    compiled = decode.lower(model.params, batch["tokens"]).compile()
    layer = 4 * 3 * 32 * 2048  # float32 bytes of its feed-forward kernels
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 3 * layer


def test_values_lie_as_the_kernels_did(qwix):
    config = families.config(hidden_size=32, intermediate_size=64, num_heads=8)
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    alone = models.build(config, jax.random.key(0))
    spread = models.build(config, jax.random.key(0), mesh=mesh)
    one, two = models.quantize_base(alone, "nf4"), models.quantize_base(spread, "nf4")
    kernel = spread.params["layers"]["mlp"]["up"]["kernel"]
    narrow = two.params["layers"]["mlp"]["up"]["kernel"]
    assert narrow.qvalue.sharding.is_equivalent_to(kernel.sharding, 3)
    assert narrow.scale.sharding.shard_shape(narrow.scale.shape)[2] == 32
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_unknown_kinds_and_a_missing_library_are_refused(monkeypatch):
    model = adapted()
    with pytest.raises(ValueError, match="one of int8, nf4, got 'int3'"):
        models.quantize_base(model, "int3")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"jaxpost\[quant\]"):
        models.quantize_base(model, "int8")
