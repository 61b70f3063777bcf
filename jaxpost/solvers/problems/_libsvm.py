"""Data sets in LIBSVM's text format, plain or gzipped, read strictly."""

import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

LARGEST_BYTES = 16 * 2**30


class LibsvmData(NamedTuple):
    """A classification data set.

    Fields:
        features: float64 `[N, D]`, zeros where the file names no value.
        labels: float64 `[N]`.
    """

    features: np.ndarray
    labels: np.ndarray


def read_libsvm(
    path: str | os.PathLike[str],
    *,
    labels: Literal["signs", "raw"] = "signs",
    num_features: int | None = None,
) -> LibsvmData:
    """Reads `label index:value ...` lines; indices count from 1.

    Empty lines and what follows a `#` are passed over. Gzip is told by content, not by
    name.

    Args:
        path: the file.
        labels: `signs` maps the larger of the two labels to 1 and the smaller to -1;
            `raw` keeps them as they are.
        num_features: `D`; the largest index in the file if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of the format, holds an index above `num_features` or
            a number that is not finite (the message has file and line); the file has no
            rows or is a damaged gzip stream; `labels` is `signs` and there are not two;
            the dense array would exceed `LARGEST_BYTES`.
    """
    if labels not in ("signs", "raw"):
        raise ValueError(f"labels must be 'signs' or 'raw', got {labels!r}.")
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give a file in LIBSVM's format."
        )
    found: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for number, text in _lines(path):
        words = text.split()
        found.append(_number(words[0], "label", path, number))
        last = 0
        for word in words[1:]:
            last, value = _item(word, last, path, number)
            if num_features is not None and last > num_features:
                raise _bad(
                    path, number, f"index {last} exceeds {num_features} features"
                )
            rows.append(len(found) - 1)
            columns.append(last - 1)
            values.append(value)
    if not found:
        raise ValueError(f"{path}: the file holds no rows.")
    width = num_features or max(columns, default=-1) + 1
    features = _dense(path, len(found), width)
    features[rows, columns] = values
    targets = np.asarray(found)
    return LibsvmData(features, _signs(targets, path) if labels == "signs" else targets)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines that hold something."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("ascii")
                except UnicodeDecodeError as error:
                    raise _bad(path, number, f"is not ASCII text ({error})") from None
                text = text.split("#", 1)[0].strip()
                if text:
                    yield number, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}, after line {number}: the gzip stream is cut off or damaged "
            f"({error}); fetch or compress the file again."
        ) from error


def _open(path: pathlib.Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def _item(word: str, last: int, path: pathlib.Path, number: int) -> tuple[int, float]:
    index, colon, value = word.partition(":")
    if not colon or not index.isdigit():
        raise _bad(path, number, f"{word!r} is not index:value")
    if int(index) <= last:
        below = "indices count from 1" if int(index) < 1 else f"it follows {last}"
        raise _bad(path, number, f"index {index} is out of order ({below})")
    return int(index), _number(value, f"value of index {index}", path, number)


def _number(text: str, what: str, path: pathlib.Path, number: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad(path, number, f"{what} is {text!r}, not a finite number")
    return value


def _bad(path: pathlib.Path, number: int, what: str) -> ValueError:
    return ValueError(f"{path}:{number}: {what}; mend the line, or leave it out.")


def _dense(path: pathlib.Path, rows: int, columns: int) -> np.ndarray:
    size = rows * columns * 8
    if size > LARGEST_BYTES:
        raise ValueError(
            f"{path}: {rows} rows of {columns} features take {size / 2**30:.0f} GiB as "
            f"a dense array, more than {LARGEST_BYTES / 2**30:.0f}; check its largest "
            "index, or take fewer rows."
        )
    return np.zeros((rows, columns))


def _signs(labels: np.ndarray, path: pathlib.Path) -> np.ndarray:
    kinds = np.unique(labels)
    if kinds.size != 2:
        shown = [f"{kind:g}" for kind in kinds[:6]] + ["..."] * (kinds.size > 6)
        raise ValueError(
            f"{path} has {kinds.size} different labels ({', '.join(shown)}), not two; "
            "keep rows of two classes, or read it with labels='raw'."
        )
    return np.where(labels == kinds[1], 1.0, -1.0)
