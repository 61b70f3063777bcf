"""From a source's name to token examples in memory: read, name columns, encode.

The three steps in one, with bad rows handled in one place.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from jaxpost.data._columns import Format, normalize_row
from jaxpost.data._encode import (
    Example,
    LossOn,
    OnTooLong,
    Pair,
    encode_pair,
    encode_row,
)
from jaxpost.data._errors import BadRow, BadRows, DataError, OnBadRow, handle
from jaxpost.data._records import LINE_LIMIT_BYTES, Row
from jaxpost.data._sources import read_rows
from jaxpost.data._tokenizer import Tokenizer

Encoded = TypeVar("Encoded")


def load_rows(
    path_or_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    limit: int | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> Iterator[Row]:
    """Rows of a source under TRL's column names.

    Args:
        path_or_name: as in `read_rows`; so are `split`, `on_bad_row`, `report` and
            `line_limit_bytes`.
        columns: as in `normalize_row`; so are `format` and `prompt_suffix`.
        limit: rows to give at most.

    Raises:
        BadRow, DataError, FileNotFoundError: as `read_rows` and `normalize_row`.
    """
    rows = read_rows(
        path_or_name,
        split=split,
        on_bad_row=on_bad_row,
        report=report,
        line_limit_bytes=line_limit_bytes,
    )
    given = 0
    for row in rows:
        if limit is not None and given >= limit:
            return
        try:
            normal = normalize_row(
                row, columns=columns, format=format, prompt_suffix=prompt_suffix
            )
        except BadRow as problem:
            handle(problem, on_bad_row, report)
            continue
        given += 1
        yield normal


def load_examples(
    path_or_name: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
    loss_on: LossOn = "auto",
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    limit: int | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> list[Example]:
    """All examples of a source; arguments as in `load_rows` and `encode_row`.

    Raises:
        BadRow: a row is bad and `on_bad_row` is `"stop"`.
        DataError: the source is empty or damaged, or no row of it could be used.
        FileNotFoundError: there is no such file.
    """

    def encode(row: Row) -> Example:
        return encode_row(
            row,
            tokenizer,
            max_length=max_length,
            loss_on=loss_on,
            on_too_long=on_too_long,
            append_eos=append_eos,
        )

    return load_encoded(
        path_or_name,
        encode,
        split=split,
        columns=columns,
        format=format,
        prompt_suffix=prompt_suffix,
        on_bad_row=on_bad_row,
        report=report,
        limit=limit,
        line_limit_bytes=line_limit_bytes,
    )


def load_pairs(
    path_or_name: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: Format = "trl",
    prompt_suffix: str = "",
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    limit: int | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> list[Pair]:
    """All preference pairs of a source; arguments and errors as `load_examples`."""

    def encode(row: Row) -> Pair:
        return encode_pair(
            row,
            tokenizer,
            max_length=max_length,
            on_too_long=on_too_long,
            append_eos=append_eos,
        )

    return load_encoded(
        path_or_name,
        encode,
        split=split,
        columns=columns,
        format=format,
        prompt_suffix=prompt_suffix,
        on_bad_row=on_bad_row,
        report=report,
        limit=limit,
        line_limit_bytes=line_limit_bytes,
    )


def load_encoded(
    path_or_name: str | os.PathLike[str],
    encode: Callable[[Row], Encoded],
    *,
    on_bad_row: OnBadRow,
    report: BadRows | None,
    **reading: Any,
) -> list[Encoded]:
    """What `encode` makes of each row of a source; see `load_examples`."""
    report = BadRows() if report is None else report
    encoded = []
    for row in load_rows(path_or_name, on_bad_row=on_bad_row, report=report, **reading):
        try:
            encoded.append(encode(row))
        except BadRow as problem:
            handle(problem, on_bad_row, report)
    if not encoded:
        raise DataError(
            f"{os.fspath(path_or_name)}: no row can be used ({report.summary()}); "
            f"{report.lines[0] if report.lines else 'the source is empty.'}"
        )
    return encoded
