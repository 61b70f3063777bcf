"""Special token ids in the files beside the weights.

A folder's tokenizer says more and is asked first (in `data`); these are the ids that
models like stories260K state nowhere else.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpost.weights._errors import WeightsError
from jaxpost.weights._source import read_json


class SpecialIds(NamedTuple):
    """Ids of special tokens.

    Fields:
        bos: first token of a text, or None.
        eos: tokens that end one, possibly several, empty if none is known.
        pad: filler, or None.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def special_ids(folder: str | os.PathLike[str]) -> SpecialIds:
    """Special ids from `generation_config.json`, then from `config.json`.

    Each id is taken from the first file that states it.

    Args:
        folder: a checkpoint; either file may be missing.

    Returns:
        What the files state.

    Raises:
        WeightsError: a file is not a JSON object, or an id is not a whole number.
    """
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(folder) / name
        if not path.is_file():
            continue
        fields = read_json(path)
        bos = _one(path, fields, "bos_token_id") if bos is None else bos
        eos = eos or _ids(path, fields, "eos_token_id")
        pad = _one(path, fields, "pad_token_id") if pad is None else pad
    return SpecialIds(bos, eos, pad)


def _one(path: pathlib.Path, fields: Mapping[str, Any], key: str) -> int | None:
    ids = _ids(path, fields, key)
    return ids[0] if ids else None


def _ids(path: pathlib.Path, fields: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = fields.get(key)
    if value is None or value == -1:  # old configurations write -1 for none
        return ()
    values = value if isinstance(value, list) else [value]
    if any(type(number) is not int or number < 0 for number in values):
        raise WeightsError(f"{path}: {key} must be whole numbers, got {value!r}.")
    return tuple(values)


def generation_fields(
    ids: SpecialIds, extra: Mapping[str, Any] | None, vocab_size: int
) -> dict[str, Any]:
    """A valid `generation_config.json`.

    Args:
        ids: special ids of the tokenizer or of the model; `extra` overrides them.
        extra: fields in Hugging Face's words; `temperature` 0 means greedy.
        vocab_size: every id must lie below it.

    Returns:
        The fields, with `do_sample` agreeing with the sampling settings: transformers
        refuses to save a configuration where it does not.

    Raises:
        WeightsError: an id outside the vocabulary, or sampling settings with
            `do_sample` False.
    """
    fields: dict[str, Any] = {}
    if ids.bos is not None:
        fields["bos_token_id"] = ids.bos
    if ids.eos:
        fields["eos_token_id"] = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos)
    if ids.pad is not None:
        fields["pad_token_id"] = ids.pad
    for key, value in (extra or {}).items():
        if value is None:
            continue
        fields[key] = list(value) if isinstance(value, tuple) else value
    if fields.get("temperature") == 0:
        if fields.get("do_sample"):
            raise WeightsError("generation_config: do_sample with temperature 0.")
        del fields["temperature"]
        fields["do_sample"] = False
    sampling = [
        key
        for key in ("temperature", "top_k", "top_p", "min_p", "typical_p")
        if key in fields
    ]
    if fields.get("do_sample") is False and sampling:
        raise WeightsError(
            f"generation_config: do_sample is False but {', '.join(sampling)} are set; "
            "leave one or the other out."
        )
    if sampling:
        fields["do_sample"] = True
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values: Sequence[int] = _ids(pathlib.Path("generation_config"), fields, key)
        if any(number >= vocab_size for number in values):
            raise WeightsError(
                f"generation_config: {key}={fields[key]} lies outside the model's "
                f"vocabulary of {vocab_size}; the tokenizer belongs to another model."
            )
    return fields
