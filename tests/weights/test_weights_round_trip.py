"""Save, load and compare bit for bit: families, shards, dtypes, placement."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_families import CONFIGS, assert_same_params, build

from jaxpost import models, weights


@pytest.mark.parametrize("name", CONFIGS)
def test_each_family_returns_bit_for_bit(name, tmp_path):
    model = build(CONFIGS[name])
    weights.save(model, tmp_path / "out")
    back = weights.load(tmp_path / "out")
    assert_same_params(model.params, back.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_its_file(name):
    config = CONFIGS[name]
    fields = json.loads(json.dumps(weights.to_hf_config(config)))
    back = weights.from_hf_config(fields)
    same = config.replace(query_scale=None, layer_windows=None)
    assert back.replace(query_scale=None, layer_windows=None) == same
    for layer in range(config.num_layers):
        assert back.window_of(layer) == config.window_of(layer)
    if config.query_scale is not None:
        assert back.query_scale == pytest.approx(config.query_scale, rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_shards_hold_what_one_file_holds(name, tmp_path):
    model = build(CONFIGS[name])
    weights.save(model, tmp_path / "one")
    weights.save(model, tmp_path / "many", max_shard_bytes=5000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    one = safetensors.numpy.load_file(tmp_path / "one/model.safetensors")
    many = {}
    for file in files:
        part = safetensors.numpy.load_file(file)
        assert sum(x.nbytes for x in part.values()) <= 5000 or len(part) == 1
        assert all(index["weight_map"][key] == file.name for key in part)
        many |= part
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    for key, value in one.items():
        np.testing.assert_array_equal(value, many[key])
    assert_same_params(model.params, weights.load(tmp_path / "many").params)


def test_tied_head_is_not_written_and_untied_is(tmp_path):
    for name, written in (("qwen2", False), ("llama", True)):
        weights.save(build(CONFIGS[name]), tmp_path / name)
        file = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        assert ("lm_head.weight" in file) is written
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is not written


def test_phi3_fuses_rows_in_order(tmp_path):
    model = build(CONFIGS["phi3"])
    weights.save(model, tmp_path / "out")
    file = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    fused = file["model.layers.1.self_attn.qkv_proj.weight"]
    attention = model.params["layers"]["attention"]
    rows = [np.asarray(attention[key]["kernel"][1]).reshape(16, -1).T for key in "qkv"]
    np.testing.assert_array_equal(fused, np.concatenate(rows))
    gate_up = file["model.layers.1.mlp.gate_up_proj.weight"]
    mlp = model.params["layers"]["mlp"]
    rows = [np.asarray(mlp[key]["kernel"][1]).T for key in ("gate", "up")]
    np.testing.assert_array_equal(gate_up, np.concatenate(rows))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", None])
def test_dtypes_convert_both_ways(stored, wanted, tmp_path):
    model = build(CONFIGS["qwen2"])
    weights.save(model, tmp_path / "out", dtype=stored)
    back = weights.load(tmp_path / "out", dtype=wanted)
    narrow, wide = jnp.dtype(stored), jnp.dtype(wanted or stored)
    expected = jax.tree.map(
        lambda x: np.asarray(x).astype(narrow).astype(wide), model.params
    )
    assert_same_params(expected, back.params)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == stored


def test_float64_file_is_read_as_float32_without_x64(tmp_path):
    model = build(CONFIGS["llama"])
    weights.save(model, tmp_path / "out", dtype="float64")
    assert_same_params(model.params, weights.load(tmp_path / "out").params)


def test_hf_tensors_are_what_save_writes(tmp_path):
    model = build(CONFIGS["phi3"])
    weights.save(model, tmp_path / "out")
    file = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    found = dict(weights.hf_tensors(model.config, model.params))
    assert found.keys() == file.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, file[name])


def test_bfloat16_bits_agree_with_the_reference_library(tmp_path):
    model = build(CONFIGS["llama"], jnp.bfloat16)
    weights.save(model, tmp_path / "out")
    file = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    scale = file["model.norm.weight"]
    assert scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scale, model.params["final_norm"]["scale"])


@pytest.mark.parametrize("axes", [(8, 1), (2, 4)])
def test_parameters_are_placed_by_the_rules(axes, tmp_path):
    config = CONFIGS["llama"].replace(
        hidden_size=24, intermediate_size=32, vocab_size=64, head_dim=4
    )
    model = build(config)
    weights.save(model, tmp_path / "out")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(axes, ("fsdp", "tensor"), axis_types=kinds)
    rules = {"head_dim": "tensor", "heads": None, "kv_heads": None}
    back = weights.load(tmp_path / "out", mesh=mesh, rules=rules)
    wanted = models.build(config, mesh=mesh, rules=rules, abstract=True)
    assert_same_params(model.params, back.params)
    for (path, leaf), abstract in zip(
        jax.tree.leaves_with_path(back.params),
        jax.tree.leaves(wanted.params),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim), path
    gate = back.params["layers"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (3, 24 // axes[0], 32 // axes[1])
    query = back.params["layers"]["attention"]["q"]["kernel"]
    local = (3, 24 // axes[0], 4, 4 // axes[1])
    assert query.sharding.shard_shape(query.shape) == local
    weights.save(back, tmp_path / "again")
    first = (tmp_path / "out/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == first
