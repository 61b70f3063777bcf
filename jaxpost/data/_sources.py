"""A source's name to its rows: files, hub names, built-ins; and its fingerprint.

Knows where rows come from; not what their columns mean.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxpost.data._errors import BadRows, DataError, OnBadRow, check_on_bad_row
from jaxpost.data._records import LINE_LIMIT_BYTES, Row, read_jsonl

BUILTIN_PREFIX = "builtin:"
_BUILTINS = {
    "arithmetic": ("jaxpost.data._arithmetic", "arithmetic_rows"),
    "arithmetic_negatives": (
        "jaxpost.data._arithmetic_pairs",
        "arithmetic_negative_rows",
    ),
    "arithmetic_pairs": ("jaxpost.data._arithmetic_pairs", "arithmetic_pair_rows"),
    "python-stdlib": ("jaxpost.data._stdlib", "stdlib_rows"),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz")


def read_rows(
    path_or_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> Iterator[Row]:
    """Rows of a file, a hub data set or a built-in one.

    Args:
        path_or_name: a `.jsonl`, `.jsonl.gz` or `.parquet` file; `builtin:NAME`, with
            options as in `builtin:arithmetic?grades=1,2&count=1000&seed=3`; or a hub
            name `owner/name`.
        split: of built-in and hub data; None is `train`. A file has only one.
        on_bad_row: `"stop"` raises at the first bad row, `"skip"` counts and goes on.
        report: where skipped rows are counted.
        line_limit_bytes: longest JSONL line accepted, bytes.

    Returns:
        An iterator of rows; what cannot be opened raises here, not at the first row.

    Raises:
        BadRow: a row is bad and `on_bad_row` is `"stop"` (while iterating).
        DataError: the source is empty, damaged or unknown.
        FileNotFoundError: there is no such file.
    """
    check_on_bad_row(on_bad_row)
    source = os.fspath(path_or_name)
    if source.startswith(BUILTIN_PREFIX):
        return _rows_of(builtin_records(source, split=split), source, report)
    path = pathlib.Path(source)
    if path.suffix == ".parquet" and path.is_file():
        return _rows_of(_parquet_records(path), source, report)
    if path.is_file():
        if not source.endswith(_JSONL_SUFFIXES):
            raise DataError(
                f"{source}: unknown kind of file; expected one of "
                f"{', '.join([*_JSONL_SUFFIXES, '.parquet'])}."
            )
        return read_jsonl(
            path,
            on_bad_row=on_bad_row,
            report=report,
            line_limit_bytes=line_limit_bytes,
        )
    if is_hub_name(source):
        return _rows_of(_hub_records(source, split), source, report)
    kind = "a folder" if path.is_dir() else "no such file"
    raise FileNotFoundError(
        f"{source}: {kind}; give a .jsonl, .jsonl.gz or .parquet file, builtin:NAME "
        f"({', '.join(_BUILTINS)}) or a hub name owner/name."
    )


def is_hub_name(source: str) -> bool:
    """Whether `source` is written like `owner/name` and names no kind of file."""
    suffixes = (*_JSONL_SUFFIXES, ".parquet", ".gz")
    return bool(_HUB_NAME.fullmatch(source)) and not source.endswith(suffixes)


def _rows_of(
    records: Iterable[Mapping[str, Any]], source: str, report: BadRows | None
) -> Iterator[Row]:
    number = 0
    for number, record in enumerate(records, start=1):
        if report is not None:
            report.rows += 1
        yield Row(dict(record), source, number)
    if not number:
        raise DataError(f"{source}: the source holds no rows.")


def builtin_records(
    source: str, *, split: str | None = None
) -> Iterable[Mapping[str, Any]]:
    """Rows of a built-in data set.

    Args:
        source: `builtin:NAME` or `builtin:NAME?option=value&option=value`; commas make
            a list, digits a whole number.
        split: `train` (also for None) or `test`.

    Raises:
        DataError: no such built-in, option (the message names the nearest), or value.
    """
    name, _, query = source.removeprefix(BUILTIN_PREFIX).partition("?")
    if name not in _BUILTINS:
        known = ", ".join(BUILTIN_PREFIX + key for key in _BUILTINS)
        raise DataError(
            f"{source}: no built-in data set {name!r}{nearest(name, _BUILTINS)}; "
            f"there are {known}."
        )
    module, function_name = _BUILTINS[name]
    function: Callable[..., Iterable[Mapping[str, Any]]]
    function = getattr(importlib.import_module(module), function_name)
    options = _query_options(source, query)
    known_options = list(inspect.signature(function).parameters)[1:]
    for option in options:
        if option not in known_options:
            raise DataError(
                f"{source}: no option {option!r}{nearest(option, known_options)}; "
                f"builtin:{name} takes {', '.join(known_options)}."
            )
    try:
        return function(split or "train", **options)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: {error}") from error


def _query_options(source: str, query: str) -> dict[str, Any]:
    try:
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query)
        )
    except ValueError:
        raise DataError(
            f"{source}: cannot read the options {query!r}; write them as "
            "option=value&option=value."
        ) from None
    return {key: _option_value(value) for key, value in pairs}


def _option_value(text: str) -> Any:
    if "," in text:
        return tuple(_option_value(part) for part in text.split(",") if part)
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _parquet_records(path: pathlib.Path) -> Iterable[Mapping[str, Any]]:
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        return datasets.Dataset.from_parquet(  # type: ignore[return-value]
            str(path), keep_in_memory=True
        )
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error.__cause__ or error}); write "
            "it again, or convert it to JSONL."
        ) from error


def _hub_records(name: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        # Never with trust_remote_code: data sets that need code are refused.
        return datasets.load_dataset(name, split=split or "train")  # type: ignore[return-value]
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: no local file of that name, and the hub data set cannot be "
            f"loaded ({str(error).splitlines()[0]}); check the name and the split "
            f"{split or 'train'!r}, or give a local file."
        ) from error


def fingerprint(
    path_or_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """A hash that changes when the data does: sha256, hexadecimal.

    Args:
        path_or_name: as in `read_rows`. A file is hashed by its bytes, a built-in or
            hub data set by its rows.
        split: as in `read_rows`.
        settings: further settings that change what is read (JSON values), hashed too.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: as `read_rows`.
    """
    digest = hashlib.sha256()
    if settings:
        digest.update(_canonical(settings))
    source = os.fspath(path_or_name)
    if pathlib.Path(source).is_file():
        with open(source, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    for row in read_rows(source, split=split):
        digest.update(_canonical(row.columns))
    return digest.hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"
