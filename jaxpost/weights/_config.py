"""`config.json` of Hugging Face checkpoints to and from `DecoderConfig`.

A field that would change the computation and is not implemented is refused by name; so
is one that nobody here knows. Rotary settings are in `_config_rope`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from jaxpost import models
from jaxpost.weights._config_rope import read_rope, write_rope
from jaxpost.weights._errors import WeightsError, listed

# What transformers takes where config.json leaves a field out.
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048, "attention_bias": False},
    "mistral": {
        **_COMMON,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "phi3": {
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "gemma2": {
        **_COMMON,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "tie_word_embeddings": True,
    },
}
_CLASSIFIER = "SequenceClassification"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
FAMILIES = tuple(_ARCHITECTURES)
# transformers has this class of every family above; its head is one `score.weight`.
_SCORED = {
    name: name.replace("CausalLM", _CLASSIFIER) for name in _ARCHITECTURES.values()
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = {
    *_SIZES,
    *(key for defaults in _DEFAULTS.values() for key in defaults),
    *("model_type", "num_key_value_heads", "head_dim", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    "original_max_position_embeddings",
}
# Fields that leave the forward pass as it is: bookkeeping, training, generation.
_HARMLESS = {
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "name"),
    *("torch_dtype", "dtype", "use_cache", "cache_implementation", "is_decoder"),
    *("initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sep_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "tokenizer_class", "prefix", "task_specific_params"),
    *("problem_type", "id2label", "label2id", "num_labels", "finetuning_task"),
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *(
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "gradient_checkpointing",
    ),
    *("pretraining_tp", "chunk_size_feed_forward", "use_bfloat16", "tf_legacy_loss"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("unsloth_version", "unsloth_fixed"),
}
# Fields with the one meaning that is implemented; anything else is refused.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}


def from_hf_config(
    hf: Mapping[str, Any], *, ignore_fields: Collection[str] = ()
) -> models.DecoderConfig:
    """The decoder that a `config.json` describes.

    Args:
        hf: contents of `config.json`.
        ignore_fields: unknown fields that the caller knows not to matter.

    Returns:
        The configuration, `remat` at its default; `head="score"` of a sequence
        classifier with one label.

    Raises:
        WeightsError: the model type is not supported, a size is missing, a field is
            not implemented or not known, or a classifier has several labels; the
            message names it.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise WeightsError(
            f"config.json: model_type {family!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    missing = [key for key in _SIZES if hf.get(key) is None]
    if missing:
        raise WeightsError(f"config.json: missing {', '.join(missing)}.")
    _refuse_unknown(hf, family, ignore_fields)
    full = {**_DEFAULTS[family], **hf}
    heads = full["num_attention_heads"]
    head_dim = full.get("head_dim")
    scaling, theta, fraction = read_rope(full, family)
    window, layer_windows = _read_windows(full, family)
    try:
        return models.DecoderConfig(
            family=family,
            vocab_size=full["vocab_size"],
            hidden_size=full["hidden_size"],
            intermediate_size=full["intermediate_size"],
            num_layers=full["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=full.get("num_key_value_heads") or heads,
            head_dim=full["hidden_size"] // heads if head_dim is None else head_dim,
            max_positions=full["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_fraction=fraction,
            norm_eps=full["rms_norm_eps"],
            sliding_window=window,
            layer_windows=layer_windows,
            tie_embeddings=bool(full["tie_word_embeddings"]),
            head=_read_head(hf),
            **_family_fields(full, family),
        )
    except ValueError as error:  # sizes that contradict each other
        raise WeightsError(f"config.json: {error}") from error


def to_hf_config(config: models.DecoderConfig) -> dict[str, Any]:
    """`config.json` of a decoder, in the layout of transformers 4 that 5 reads too.

    Args:
        config: a decoder of one of the supported families.

    Returns:
        The fields, without data types and special ids.

    Raises:
        WeightsError: the family has no such layout, or cannot express a setting; the
            message names each.
    """
    if config.family not in FAMILIES:
        raise WeightsError(
            f"family {config.family!r} cannot be exported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    hf: dict[str, Any] = {
        **_write_head(config),
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        **write_rope(config),
        **_write_windows(config),
        **_write_family(config),
    }
    _check_expressible(config, hf)
    return hf


def _check_expressible(config: models.DecoderConfig, hf: Mapping[str, Any]) -> None:
    """Read back what would be written: whatever differs the layout cannot say."""
    back, wanted = _comparable(from_hf_config(hf)), _comparable(config)
    differing = [
        f"{name}={wanted[name]!r} (would be read back as {back[name]!r})"
        for name in wanted
        if back[name] != wanted[name]
    ]
    if differing:
        raise WeightsError(
            f"a config.json of family {config.family!r} cannot express "
            f"{listed(differing)}; choose a family that can, or change the setting."
        )


def _comparable(config: models.DecoderConfig) -> dict[str, Any]:
    """Fields that shape the computation, with equivalent spellings made equal."""
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    del fields["remat"], fields["attention_implementation"]
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    del fields["layer_windows"]
    fields["sliding_window"] = windows  # per layer
    scale = config.query_scale
    scale = config.head_dim**-0.5 if scale is None else scale
    # Files hold the inverse square, so the last bits may differ.
    fields["query_scale"] = float(f"{scale:.9g}")
    fields["embed_scale"] = float(f"{config.embed_scale:.9g}")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        # Nothing but the factor plays a part.
        fields["rope_scaling"] = models.RopeScaling(
            kind="linear", factor=scaling.factor
        )
    return fields


def _refuse_unknown(
    hf: Mapping[str, Any], family: str, ignore_fields: Collection[str]
) -> None:
    problems = []
    for key, value in hf.items():
        if value is None or key in _HARMLESS or key in ignore_fields:
            continue
        if key in _FIXED:
            if value not in _FIXED[key]:
                problems.append(f"{key}={value!r} is not implemented")
        elif key not in _READ:
            problems.append(f"{key}={value!r} is not known")
    activation = "hidden_activation" if family == "gemma2" else "hidden_act"
    wanted = _DEFAULTS[family][activation]
    if (given := hf.get(activation)) is not None and given != wanted:
        problems.append(
            f"{activation}={given!r} is not implemented (only {wanted!r} is)"
        )
    if hf.get("attention_bias") and "attention_bias" not in _DEFAULTS[family]:
        problems.append(f"attention_bias is no field of family {family}")
    if problems:
        raise WeightsError(
            f"config.json of model_type {family!r}: {listed(problems)}. If an unknown "
            "field leaves the forward pass as it is, name it in ignore_fields."
        )


def _family_fields(full: Mapping[str, Any], family: str) -> dict[str, Any]:
    bias = bool(full.get("attention_bias"))
    fields: dict[str, Any] = {"attention_bias": bias, "attention_out_bias": bias}
    if family == "qwen2":
        fields = {"attention_bias": True, "attention_out_bias": False}
    if family == "qwen3":
        fields["qk_norm"] = True
    if family == "gemma2":
        fields |= {
            "activation": "gelu_tanh",
            "norm_offset": 1.0,
            "post_norms": True,
            "embed_scale": math.sqrt(full["hidden_size"]),
            "query_scale": full["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": full["attn_logit_softcapping"],
            "final_softcap": full["final_logit_softcapping"],
        }
    return fields


def _write_family(config: models.DecoderConfig) -> dict[str, Any]:
    family = config.family
    fields: dict[str, Any] = {"hidden_act": "silu"}
    if family in ("llama", "qwen3", "gemma2"):
        fields["attention_bias"] = config.attention_bias
    if family == "llama":
        fields["mlp_bias"] = False
    if family == "gemma2":
        scale = config.query_scale
        squared = config.head_dim if scale is None else scale**-2
        fields |= {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(squared),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    return fields


def _read_head(hf: Mapping[str, Any]) -> Literal["vocabulary", "score"]:
    """What the architecture puts on the last states."""
    names: list[str] = hf.get("architectures") or []
    if not any(name.endswith(f"For{_CLASSIFIER}") for name in names):
        return "vocabulary"
    # As transformers counts: it takes two where neither is given.
    labels = len(hf.get("id2label") or ()) or hf.get("num_labels") or 2
    if labels != 1:
        raise WeightsError(
            f"config.json: {names[0]} with {labels} labels (num_labels, id2label) is "
            "no reward model; only one label, a score, is supported."
        )
    return "score"


def _write_head(config: models.DecoderConfig) -> dict[str, Any]:
    name = _ARCHITECTURES[config.family]
    if config.head == "vocabulary":
        return {"architectures": [name]}
    return {
        "architectures": [_SCORED[name]],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # Labels, if transformers is given any, are ratings.
        "problem_type": "regression",
    }


def _read_windows(
    full: Mapping[str, Any], family: str
) -> tuple[int | None, tuple[bool, ...] | None]:
    """Window in tokens and which layers have it."""
    window = None if family == "llama" else full.get("sliding_window")
    layers = full["num_hidden_layers"]
    types = full.get("layer_types")
    if family in ("llama", "mistral", "phi3"):
        alike = "full_attention" if window is None else "sliding_attention"
        if types is not None and set(types) != {alike}:
            raise WeightsError(
                f"config.json: layer_types of model_type {family!r} with "
                f"sliding_window={window} must all be {alike}, got {types!r}."
            )
        return window, None
    if window is None:
        return None, None
    if family in ("qwen2", "qwen3"):
        if not full["use_sliding_window"]:
            return None, None
        from_layer = full["max_window_layers"]
        slides = [layer >= from_layer for layer in range(layers)]
    else:
        slides = [layer % 2 == 0 for layer in range(layers)]
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if len(types) != layers or not set(types) <= set(known):
            raise WeightsError(
                f"config.json: layer_types must name {layers} layers as "
                f"{' or '.join(known)}, got {types!r}."
            )
        slides = [known[kind] for kind in types]
    if not any(slides):
        return None, None
    return window, None if all(slides) else tuple(slides)


def _write_windows(config: models.DecoderConfig) -> dict[str, Any]:
    family, window = config.family, config.sliding_window
    if family == "llama":
        return {}
    if family in ("mistral", "phi3"):
        return {"sliding_window": window}
    slides = [config.window_of(i) is not None for i in range(config.num_layers)]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    fields = {"sliding_window": window, "layer_types": types}
    if family != "gemma2":
        first = slides.index(True) if any(slides) else config.num_layers
        fields |= {"use_sliding_window": any(slides), "max_window_layers": first}
    return fields
