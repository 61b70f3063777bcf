"""Rows out of JSONL and JSONL.gz files, one at a time, in bounded memory.

Strict: UTF-8 only, one JSON object per line, no duplicate keys, no NaN. Knows nothing
of columns or tokens.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from jaxpost.data._errors import (
    BadRow,
    BadRows,
    DataError,
    OnBadRow,
    check_on_bad_row,
    handle,
)

LINE_LIMIT_BYTES = 16 * 2**20
_SKIP_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One record of a source.

    Fields:
        columns: values by column name.
        source: file, hub name or built-in, as shown in messages.
        number: from 1; for JSONL the line number.
    """

    columns: dict[str, Any]
    source: str
    number: int

    def bad(self, reason: str, what: str, advice: str) -> BadRow:
        """The error for this row."""
        return BadRow(reason, self.source, self.number, what, advice)


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    on_bad_row: OnBadRow = "stop",
    report: BadRows | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> Iterator[Row]:
    """Reads a JSONL file, plain or gzipped (told apart by content, not by name).

    Args:
        path: the file.
        on_bad_row: `"stop"` raises at the first bad line, `"skip"` counts and goes on.
        report: where skipped rows are counted.
        line_limit_bytes: longest line accepted, bytes; never is more than about this
            much of a line in memory.

    Yields:
        One row per line; empty lines are passed over.

    Raises:
        BadRow: a line is no JSON object in UTF-8, or too long, and `on_bad_row` is
            `"stop"`.
        DataError: the file holds no line at all, or its gzip stream is cut or damaged.
        FileNotFoundError: there is no such file.
    """
    check_on_bad_row(on_bad_row)
    path = pathlib.Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {kind}; give the path of a .jsonl file.")
    lines = 0
    with _open(path) as stream:
        for number, line in _lines(stream, str(path), line_limit_bytes):
            if isinstance(line, bytes) and not line.strip():
                continue
            lines += 1
            if report is not None:
                report.rows += 1
            try:
                yield parse_line(line, str(path), number)
            except BadRow as problem:
                handle(problem, on_bad_row, report)
    if not lines:
        raise DataError(f"{path}: the file holds no rows; one JSON object per line.")


def _open(path: pathlib.Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if path.suffix == ".gz" and not zipped and path.stat().st_size:
        raise DataError(
            f"{path}: named .gz but not a gzip file; rename or compress it."
        )
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


class _TooLong(int):
    """Stands for a line over the limit; the value is the limit in bytes."""


def _lines(
    stream: BinaryIO, source: str, limit: int
) -> Iterator[tuple[int, bytes | _TooLong]]:
    number = 0
    try:
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) <= limit or line.endswith(b"\n"):
                yield number, line
                continue
            del line
            yield number, _TooLong(limit)
            # Only read on when the caller skips: the rest may be gigabytes.
            while rest := stream.readline(_SKIP_BYTES):
                if rest.endswith(b"\n"):
                    break
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{source}, after row {number}: the gzip stream is cut off or damaged "
            f"({error}); fetch or compress the file again."
        ) from error


def parse_line(line: bytes | _TooLong, source: str, number: int) -> Row:
    """One line of a JSONL file as a row.

    Args:
        line: the bytes, line end included or not.
        source: file name for messages.
        number: line number, from 1.

    Raises:
        BadRow: reasons `line_too_long`, `byte_order_mark`, `not_utf8`, `not_json`,
            `duplicate_key`, `not_object`, `bad_unicode`.
    """
    if isinstance(line, _TooLong):
        raise BadRow(
            "line_too_long",
            source,
            number,
            f"the line is longer than {int(line)} bytes",
            "split the row, or check that the file has one JSON object per line",
        )
    text = _decode(line, source, number)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except _Duplicate as error:
        raise BadRow(
            "duplicate_key",
            source,
            number,
            f"the key {error.args[0]!r} occurs twice",
            "keep one of them",
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadRow(
            "not_json",
            source,
            number,
            f"not valid JSON ({_describe(error)})",
            "write one JSON object per line",
        ) from None
    if not isinstance(value, dict):
        raise BadRow(
            "not_object",
            source,
            number,
            f"a JSON {_json_type(value)} where an object is expected",
            'write one object of columns per line, such as {"text": "..."}',
        )
    if b"\\u" in line and (key := _surrogate(value)) is not None:
        raise BadRow(
            "bad_unicode",
            source,
            number,
            f"column {key!r} holds half of a surrogate pair, which is no character",
            "repair the text where it was written",
        )
    return Row(value, source, number)


def _decode(line: bytes, source: str, number: int) -> str:
    if line.startswith(b"\xef\xbb\xbf"):
        raise BadRow(
            "byte_order_mark",
            source,
            number,
            "starts with a UTF-8 byte order mark",
            "save the file as UTF-8 without it",
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = line[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "utf-16" if utf16 else "latin1"
        raise BadRow(
            "not_utf8",
            source,
            number,
            f"byte {line[error.start]:#04x} at offset {error.start} is not UTF-8",
            f"convert the file with `iconv -f {encoding} -t utf-8`",
        ) from None


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Duplicate(counts.most_common(1)[0][0])
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _describe(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).split(";")[0]


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _surrogate(value: Any) -> str | None:
    """The first key whose text cannot be written as UTF-8, or None."""
    for key, item in value.items():
        try:
            json.dumps([key, item], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return key.encode("ascii", "replace").decode()
    return None
