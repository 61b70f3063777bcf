"""Rotary settings of `config.json` to and from `RopeScaling`.

Read in both layouts: `rope_theta` with `rope_scaling` (transformers 4 and before) and
`rope_parameters` (transformers 5); written in the former, which version 5 reads too.
"""

from collections.abc import Mapping
from typing import Any

from jaxpost import models
from jaxpost.weights._errors import WeightsError

_CONTEXT = {"original_max_position_embeddings": "original_max_positions"}
_ROPE_FIELDS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        **_CONTEXT,
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        **_CONTEXT,
        "factor": "factor",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {
        **_CONTEXT,
        "factor": "factor",
        "attention_factor": "attention_factor",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
}


def read_rope(
    full: Mapping[str, Any], family: str
) -> tuple[models.RopeScaling | None, float, float]:
    """Rotary settings of a decoder.

    Args:
        full: `config.json`, defaults filled in.
        family: its model type.

    Returns:
        Scaling or None, base, and the fraction of each head that is rotated.

    Raises:
        WeightsError: a kind or a number that is not implemented; the message names it.
    """
    rope = dict(full.get("rope_scaling") or full.get("rope_parameters") or {})
    per_type = [value for value in rope.values() if isinstance(value, Mapping)]
    if per_type:
        if any(value != per_type[0] for value in per_type):
            raise WeightsError(
                "config.json: rope_parameters that differ by layer type are not "
                f"implemented, got {sorted(rope)}."
            )
        rope = dict(per_type[0])
    theta = rope.pop("rope_theta", None) or full.get("rope_theta") or 10000.0
    fraction = rope.pop("partial_rotary_factor", None)
    fraction = fraction or full.get("partial_rotary_factor") or 1.0
    if fraction != 1.0 and family != "phi3":
        raise WeightsError(
            f"config.json: partial_rotary_factor={fraction} is not implemented for "
            f"model_type {family!r}."
        )
    legacy = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or legacy or "default"
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # early names of the same method
    if kind == "default":
        return None, float(theta), float(fraction)
    if kind not in _ROPE_FIELDS:
        raise WeightsError(
            f"config.json: rope type {kind!r} is not implemented; implemented are "
            f"default, {', '.join(_ROPE_FIELDS)}."
        )
    context = full.get("original_max_position_embeddings")
    if kind != "linear":
        context = context or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = (
            context or full["max_position_embeddings"]
        )
    names = _ROPE_FIELDS[kind]
    given = {key: value for key, value in rope.items() if value is not None}
    unknown = sorted(set(given) - set(names) - {"original_max_position_embeddings"})
    if unknown:
        raise WeightsError(
            f"config.json: rope type {kind!r} has fields that are not known: "
            f"{', '.join(unknown)}."
        )
    values = {
        names[key]: _frozen(value) for key, value in given.items() if key in names
    }
    try:
        scaling = models.RopeScaling(kind=kind, **values)
    except ValueError as error:
        raise WeightsError(f"config.json: {error}") from error
    return scaling, float(theta), float(fraction)


def write_rope(config: models.DecoderConfig) -> dict[str, Any]:
    """Rotary fields of `config.json`."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.family == "phi3" or config.rotary_fraction != 1.0:
        fields["partial_rotary_factor"] = config.rotary_fraction
    scaling = config.rope_scaling
    if config.family == "phi3":
        context = scaling.original_max_positions if scaling is not None else None
        # transformers takes 4096, not the maximum, where this is left out
        fields["original_max_position_embeddings"] = context or config.max_positions
    if scaling is None:
        return fields
    # transformers 4 accepts for Phi-3 these three fields and no more.
    phi3 = config.family == "phi3"
    rope: dict[str, Any] = {"type" if phi3 else "rope_type": scaling.kind}
    for theirs, ours in _ROPE_FIELDS[scaling.kind].items():
        if phi3 and ours == "original_max_positions":
            continue  # written beside, above
        value = getattr(scaling, ours)
        if value is not None:
            rope[theirs] = list(value) if isinstance(value, tuple) else value
    fields["rope_scaling"] = rope
    return fields


def _frozen(value: Any) -> Any:
    return tuple(float(x) for x in value) if isinstance(value, list) else value
