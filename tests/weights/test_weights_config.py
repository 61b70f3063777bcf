"""`config.json` as published models have it, and what is refused."""

import json

import pytest
from tiny_families import CONFIGS

from jaxpost import models, weights

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_dropout": 0.1,
    "pretraining_tp": 1,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_llama_3_1_8b():
    config = weights.from_hf_config(LLAMA)
    assert config == models.DecoderConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=models.RopeScaling(
            kind="llama3",
            factor=8.0,
            original_max_positions=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    )
    assert models.build(config, abstract=True).param_count() == 8_030_261_248


def test_both_rope_layouts_say_the_same():
    new = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    new["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA["rope_scaling"]}
    assert weights.from_hf_config(new) == weights.from_hf_config(LLAMA)
    nested = dict(new)
    nested["rope_parameters"] = {"full_attention": new["rope_parameters"]}
    assert weights.from_hf_config(nested) == weights.from_hf_config(LLAMA)
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert weights.from_hf_config(plain).rope_scaling is None
    assert weights.from_hf_config(plain).rope_theta == 7.0
    old = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert weights.from_hf_config(old).rope_scaling == models.RopeScaling(
        kind="linear", factor=2.0
    )


def test_defaults_are_those_of_transformers():
    gemma = weights.from_hf_config({"model_type": "gemma2", **SIZES})
    assert gemma.tie_embeddings
    assert (gemma.head_dim, gemma.sliding_window) == (256, 4096)
    assert gemma.layer_windows == (True, False, True, False)
    assert (gemma.attention_softcap, gemma.final_softcap) == (50.0, 30.0)
    assert gemma.query_scale == 256**-0.5
    mistral = weights.from_hf_config({"model_type": "mistral", **SIZES})
    assert mistral.sliding_window == 4096
    qwen = weights.from_hf_config({"model_type": "qwen2", **SIZES})
    assert qwen.sliding_window is None
    assert qwen.attention_bias
    assert not qwen.attention_out_bias


def test_sliding_layers_of_qwen():
    fields = {"model_type": "qwen3", **SIZES, "use_sliding_window": True}
    fields |= {"sliding_window": 8, "max_window_layers": 3}
    assert weights.from_hf_config(fields).layer_windows == (False, False, False, True)
    fields["layer_types"] = ["sliding_attention", "full_attention"] * 2
    assert weights.from_hf_config(fields).layer_windows == (True, False, True, False)
    fields["layer_types"] = ["chunked_attention"] * 4
    with pytest.raises(weights.WeightsError, match="layer_types"):
        weights.from_hf_config(fields)


def test_phi3_longrope_takes_its_context_from_beside():
    factors = [1.0] * 4
    rope = {"type": "su", "short_factor": factors, "long_factor": factors}
    fields = {"model_type": "phi3", **SIZES, "rope_scaling": rope}
    fields |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    scaling = weights.from_hf_config(fields).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.original_max_positions) == ("longrope", 16)
    partial = {**fields, "rope_scaling": None, "partial_rotary_factor": 0.75}
    assert weights.from_hf_config(partial).rotary_dim == 6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama, mis"),
        ({"model_type": None}, "None is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"clever_new_trick": 3}, "clever_new_trick=3 is not known"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            "mrope_section",
        ),
        ({"num_key_value_heads": 5}, "num_heads"),
        ({"vocab_size": None}, "missing vocab_size"),
        ({"layer_types": ["sliding_attention"] * 32}, "must all be full_attention"),
    ],
)
def test_what_is_not_implemented_is_named(change, match):
    with pytest.raises(weights.WeightsError, match=match):
        weights.from_hf_config({**LLAMA, **change})


def test_an_unknown_field_can_be_ignored_by_name():
    fields = {**LLAMA, "clever_new_trick": 3}
    weights.from_hf_config(fields, ignore_fields=("clever_new_trick",))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("llama", {"sliding_window": 4}, "cannot express sliding_window"),
        ("mistral", {"layer_windows": (True, False, True)}, "sliding_window"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("llama", {"head_bias": True}, "head_bias=True"),
        ("gemma2", {"embed_scale": 1.0}, "embed_scale=1.0"),
        ("llama", {"family": "mixtral"}, "'mixtral' cannot be exported"),
    ],
)
def test_what_a_layout_cannot_say_is_not_written(name, change, match):
    with pytest.raises(weights.WeightsError, match=match):
        weights.to_hf_config(CONFIGS[name].replace(**change))


def test_special_ids_prefer_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1})
    )
    assert weights.special_ids(tmp_path) == weights.SpecialIds(1, (2,), None)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "pad_token_id": 0})
    )
    assert weights.special_ids(tmp_path) == weights.SpecialIds(1, (7, 8), 0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(weights.WeightsError, match="eos_token_id must be whole"):
        weights.special_ids(tmp_path)
    assert weights.special_ids(tmp_path / "nowhere") == weights.SpecialIds()
