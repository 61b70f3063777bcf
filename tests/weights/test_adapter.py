"""Adapters in PEFT's layout: exact round trips, other people's files, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_families
from safetensors.numpy import load_file, save_file

from jaxpost import models, ops, parallel, weights

FAMILIES = ("llama", "qwen3", "phi3", "gemma2")


def adapted(name, **settings):
    """A random model with random adapters."""
    lora = models.LoraConfig(**{"rank": 3, "alpha": 5.0, **settings})
    base = tiny_families.build(tiny_families.CONFIGS[name])
    model = models.add_lora(base, lora, jax.random.key(0))
    adapters, frozen = models.split_lora(model.params)
    draw = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(draw.standard_normal(x.shape), x.dtype), adapters
    )
    return model.replace(params=ops.join_trees(frozen, adapters)), base


def logits(model):
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, (2, 7))
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    output = model.apply(model.params, jnp.asarray(tokens, jnp.int32), positions)
    return np.asarray(ops.logits(output.hidden, model.unembed(model.params)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", [("all-linear",), ("q", "v", "up")], ids=str)
def test_round_trip_is_exact(name, targets, tmp_path):
    model, base = adapted(name, targets=targets)
    weights.save_adapter(model, tmp_path / "a", base_name="some/base")
    again = weights.load_adapter(base, tmp_path / "a")
    assert again.config == model.config
    tiny_families.assert_same_params(again.params, model.params)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/base"
    assert (fields["r"], fields["lora_alpha"]) == (3, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_our_own_file_the_function_is_the_same(name, tmp_path):
    """As another program would have written it: Phi-3's blocks are one matrix."""
    model, base = adapted(name)
    weights.save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "jaxpost_lora.json").unlink()
    again = weights.load_adapter(base, tmp_path / "a")
    assert again.config.lora.rank == (9 if name == "phi3" else 3)
    expected = logits(model)
    gap = np.abs(logits(again) - expected).max()
    assert gap <= 1e-5 * np.abs(expected).max()
    assert np.abs(logits(base) - expected).max() > 0.1 * np.abs(expected).max()


def test_the_files_hold_what_peft_names(tmp_path):
    model, _ = adapted("phi3", targets=("q", "v", "down"))
    weights.save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["qkv_proj", "down_proj"]
    assert fields["rank_pattern"] == {"qkv_proj": 6}
    assert fields["alpha_pattern"] == {"qkv_proj": 10}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.qkv_proj"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    query, value = (model.params["layers"]["attention"][key] for key in "qv")
    np.testing.assert_array_equal(a[:3], query["lora_a"][1].T)
    np.testing.assert_array_equal(a[3:], value["lora_a"][1].T)
    width = model.config.head_dim
    rows = model.config.num_heads * width
    np.testing.assert_array_equal(b[:rows, :3], query["lora_b"][1].reshape(3, -1).T)
    assert not b[:rows, 3:].any()
    keys = model.config.num_kv_heads * width
    assert not b[rows : rows + keys].any()  # the key has no adapter
    assert not b[rows + keys :, :3].any()
    assert len(tensors) == 2 * 2 * model.config.num_layers


def test_unlike_ranks_and_factors_are_brought_together(tmp_path):
    """Rank-stabilised factor, a pattern of its own for one module."""
    model, base = adapted("llama", targets=("q", "down"))
    weights.save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "jaxpost_lora.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "q_proj" in name:  # the last rank is left out: rank 2
            tensors[name] = (
                tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
            )
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    config = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields |= {"use_rslora": True, "alpha_pattern": {"mlp.down_proj": 4.0}}
    config.write_text(json.dumps(fields))
    again = models.merge_lora(weights.load_adapter(base, tmp_path / "a"))

    def delta(block, target):
        pair = model.params["layers"][block][target]
        a, b = np.float64(pair["lora_a"]), np.float64(pair["lora_b"])
        layers, rank = a.shape[0], 3 if target == "down" else 2
        a, b = a.reshape(layers, -1, 3)[..., :rank], b.reshape(layers, 3, -1)[:, :rank]
        factor = 4.0 / 3**0.5 if target == "down" else 5.0 / 2**0.5
        plain = np.asarray(pair["kernel"])
        return plain + (factor * a @ b).reshape(plain.shape)

    for block, target in (("attention", "q"), ("mlp", "down")):
        found = again.params["layers"][block][target]["kernel"]
        np.testing.assert_allclose(found, delta(block, target), rtol=1e-5, atol=1e-5)


def test_loading_onto_a_mesh(tmp_path):
    model, _ = adapted("llama")
    weights.save_adapter(model, tmp_path / "a")
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    base = weights.save(models.without_lora(model), tmp_path / "base")
    again = weights.load_adapter(
        weights.load(base, mesh=mesh), tmp_path / "a", mesh=mesh
    )
    tiny_families.assert_same_params(again.params, model.params)
    pair = again.params["layers"]["mlp"]["gate"]
    assert pair["lora_a"].sharding.shard_shape((3, 20, 3)) == (3, 5, 3)
    assert pair["lora_b"].sharding.shard_shape((3, 3, 28)) == (3, 3, 14)


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path):
    model, base = adapted("llama")
    with pytest.raises(weights.WeightsError, match="merge_lora"):
        weights.save(model, tmp_path / "m")
    with pytest.raises(weights.WeightsError, match="has no adapters; use save"):
        weights.save_adapter(base, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_files_are_not_replaced(tmp_path):
    model, _ = adapted("llama")
    weights.save_adapter(model, tmp_path / "a")
    weights.save_adapter(model, tmp_path / "a")  # an adapter is
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        weights.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
    ],
)
def test_adapters_that_do_something_else_are_refused(fields, words, tmp_path):
    model, base = adapted("llama", targets=("q",))
    weights.save_adapter(model, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(weights.WeightsError, match=words):
        weights.load_adapter(base, tmp_path / "a")


def edited(tmp_path, change):
    model, base = adapted("llama", targets=("q",))
    weights.save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return base, tmp_path / "a"


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != NAME}, "1 missing: .*layers.1"),
        (lambda t: t | {"lm_head.lora_A.weight": t[NAME]}, "1 not expected: lm_head"),
        (
            lambda t: t | {NAME: t[NAME][:, :4].copy()},
            r"is \[3, 4\], expected \[3, 20\]",
        ),
        (lambda t: t | {NAME: t[NAME] * np.float32(np.nan)}, "not finite"),
        (lambda t: {}, "It has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    base, folder = edited(tmp_path, change)
    with pytest.raises(weights.WeightsError, match=words):
        weights.load_adapter(base, folder)


def test_pickles_second_adapters_and_missing_folders_are_refused(tmp_path):
    model, base = adapted("llama", targets=("q",))
    weights.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="has adapters already"):
        weights.load_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(weights.WeightsError, match="pickled adapters are not opened"):
        weights.load_adapter(base, tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        weights.load_adapter(base, tmp_path / "nowhere")
