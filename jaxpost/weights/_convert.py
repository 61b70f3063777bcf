"""One format to another: what `jaxpost convert` runs."""

import os
import pathlib
from typing import Any

from jaxpost import data, models
from jaxpost.weights._errors import WeightsError
from jaxpost.weights._llama2c import Llama2cFile
from jaxpost.weights._load import load, load_source
from jaxpost.weights._save import MAX_SHARD_BYTES, save
from jaxpost.weights._source import read_json, resolve
from jaxpost.weights._special import special_ids
from jaxpost.weights._verify import ExportReport, verify_export

# What llama2.c's own tokenizer writes around a text.
_LLAMA2C = {"bos_token_id": 1, "eos_token_id": 2}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Any = None,
) -> ExportReport:
    """Read a checkpoint, write it in Hugging Face layout, reload and compare.

    Args:
        source: a Hugging Face folder, a hub name, or a llama2.c `.bin` file.
        destination: folder to write; it must not be the source.
        dtype: of the stored values ("bfloat16", ...); None keeps each tensor's own.
        max_shard_bytes: most bytes of values in one file.
        tokenizer: what `data.load_tokenizer` returns, or a folder or hub name that has
            one; None takes `tokenizer.json` beside the source, if there is one.

    Returns:
        The report, also written as `export_report.json`.

    Raises:
        FileNotFoundError: no such source.
        WeightsError: the source cannot be read, or the result does not reload equal.
        FileExistsError: the destination holds files that no export writes.
    """
    place = pathlib.Path(source)
    if place.is_file():
        model, folder, fields = _load_llama2c(place, dtype), place.parent, _LLAMA2C
    else:
        folder = resolve(source)
        model, fields = load(folder, dtype=dtype), _generation(folder)
    if pathlib.Path(destination).resolve() == folder.resolve():
        raise WeightsError(
            f"{destination} is the folder of the source; choose another destination."
        )
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = folder
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = data.load_tokenizer(os.fspath(tokenizer))
    if tokenizer is not None:
        # A tokenizer has asked these files already, after its own.
        fields = {key: value for key, value in fields.items() if key not in _IDS}
    save(
        model,
        destination,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        generation_config=fields,
    )
    return verify_export(model, destination)


def _generation(folder: pathlib.Path) -> dict[str, Any]:
    """The source's own generation settings and special ids, made consistent."""
    fields: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        fields = read_json(folder / "generation_config.json")
    for key in ("transformers_version", "_from_model_config"):
        fields.pop(key, None)
    if not fields.get("do_sample"):
        # Without do_sample they play no part, and transformers refuses to save them.
        fields = {key: value for key, value in fields.items() if key not in _SAMPLING}
    ids = special_ids(folder)
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    return fields | {
        "bos_token_id": ids.bos,
        "eos_token_id": eos,
        "pad_token_id": ids.pad,
    }


def _load_llama2c(path: pathlib.Path, dtype: Any) -> models.Model:
    file = Llama2cFile(path)
    return load_source(
        file,
        file.config,
        dtype=dtype,
        mesh=None,
        rules=None,
        check_finite=True,
        where=path,
    )
