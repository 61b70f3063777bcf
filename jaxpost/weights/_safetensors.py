"""Reading and writing the safetensors format, one block of rows at a time.

A file is 8 bytes of header length (little endian), a JSON header naming each tensor's
dtype, shape and byte range, then the raw little-endian values. Everything a header says
is checked before a value is read, so a truncated or forged file ends in a clear error.
Blocks are read with `pread` rather than through a memory map: pages of a map count as
this process's memory until the kernel drops them. Knows no model and no JAX.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxpost.weights._errors import WeightsError, listed

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# Bits of the exponent: all set means infinite or not a number.
_EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
# Bytes of an element of the other dtypes of the format: their byte ranges are checked
# too, but a model's weight in one of them is refused.
_OTHER_BYTES = {
    **dict.fromkeys(("I64", "U64", "C64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# The reference implementation's own bound on the header.
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo(NamedTuple):
    """Where a tensor lies: dtype name of the format, shape, first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """One open safetensors file; a context manager.

    Args:
        path: the file.

    Raises:
        WeightsError: the file is not safetensors, is truncated, has trailing bytes, or
            its header contradicts itself.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self.tensors = _read_header(self._fd, self.path)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def dtype(self, name: str) -> np.dtype:
        """NumPy dtype of a tensor.

        Raises:
            WeightsError: it is none of the floating-point ones that jaxpost reads.
        """
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise WeightsError(
                f"{self.path}: tensor {name} has dtype {stored}; weights must be one "
                f"of {', '.join(DTYPES)} (quantised weights are not supported)."
            )
        return DTYPES[stored]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first axis, in the stored dtype.

        Args:
            name: a key of `tensors`.
            start: first row.
            stop: row after the last.

        Returns:
            A new array `[stop - start, ...]`.

        Raises:
            WeightsError: as `dtype`, or the file became shorter since it was opened.
        """
        info, dtype = self.tensors[name], self.dtype(name)
        rest = info.shape[1:]
        row_bytes = math.prod(rest) * dtype.itemsize
        block = np.empty((stop - start, *rest), dtype)
        target = block.reshape(-1).view(np.uint8).data
        position, done = info.offset + start * row_bytes, 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done:]], position + done)
            if count == 0:
                raise WeightsError(
                    f"{self.path}: ended while reading tensor {name}; the file changed "
                    "after it was opened."
                )
            done += count
        return block


def is_finite(values: np.ndarray) -> bool:
    """Whether all are, in a dtype of `DTYPES`; `np.isfinite` is slow in bfloat16."""
    unsigned, exponent = _EXPONENTS[NAMES[values.dtype]]
    mask = unsigned(exponent)
    bits = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    step = 2**20  # small blocks: the comparison's temporaries stay in the cache
    return not any(
        np.any((bits[start : start + step] & mask) == mask)
        for start in range(0, bits.size, step)
    )


def _read_header(fd: int, path: pathlib.Path) -> dict[str, TensorInfo]:
    size = os.fstat(fd).st_size
    if size < 8:
        raise WeightsError(
            f"{path}: {size} bytes is too short for a safetensors file; it is empty or "
            "was cut off. Copy or download it again."
        )
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > _MAX_HEADER_BYTES or 8 + length > size:
        raise WeightsError(
            f"{path}: the header claims {length} bytes in a file of {size}; it is "
            "truncated or not safetensors. Copy or download it again."
        )
    try:
        header = json.loads(os.pread(fd, length, 8).decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise WeightsError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is not a JSON object.")
    header.pop("__metadata__", None)
    ranges = []
    tensors = {}
    for name, entry in header.items():
        info, start, stop = _check_entry(path, name, entry, 8 + length)
        tensors[name] = info
        ranges.append((start, stop, name))
    position = 0
    for start, stop, name in sorted(ranges):
        if start != position:
            raise WeightsError(
                f"{path}: tensor {name} starts at byte {start} of the data, expected "
                f"{position}: tensors overlap or leave a hole."
            )
        position = stop
    if 8 + length + position != size:
        raise WeightsError(
            f"{path}: the header describes {8 + length + position} bytes, the file has "
            f"{size}; it is truncated or has bytes to spare. Copy or download it again."
        )
    return tensors


def _check_entry(
    path: pathlib.Path, name: str, entry: Any, data_start: int
) -> tuple[TensorInfo, int, int]:
    """The tensor's place, and its byte range within the data."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(
            f"{path}: header entry of {name} lacks dtype, shape or data_offsets."
        ) from error
    whole = [*shape, start, stop]
    if any(type(number) is not int or number < 0 for number in whole):
        raise WeightsError(
            f"{path}: tensor {name} has shape {shape} and offsets {start}, {stop}; all "
            "must be whole numbers from 0 up."
        )
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    width = known.itemsize if known is not None else _OTHER_BYTES.get(str(dtype))
    if width is None:
        raise WeightsError(f"{path}: tensor {name} has unknown dtype {dtype!r}.")
    expected = math.prod(shape) * width
    if stop - start != expected:
        raise WeightsError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} needs "
            f"{expected} bytes, its offsets give {stop - start}."
        )
    return TensorInfo(dtype, shape, data_start + start), start, stop


class PlannedTensor(NamedTuple):
    """A tensor to be written: name, NumPy dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike[str],
    plan: list[PlannedTensor],
    blocks: Iterable[np.ndarray],
) -> int:
    """Write one file, holding one block in memory at a time.

    Args:
        path: the new file.
        plan: what the file holds, in order.
        blocks: the values in the order of `plan`; one tensor may come as several
            blocks, in any shapes, that follow one another.

    Returns:
        Size of the file, bytes.

    Raises:
        WeightsError: a dtype has no name in the format, or the blocks do not fill the
            plan exactly.
        OSError: the disk is full or cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in plan:
        if tensor.dtype not in NAMES:
            raise WeightsError(
                f"cannot write {tensor.name} as {tensor.dtype}; choose one of "
                f"{listed([str(dtype) for dtype in NAMES])}."
            )
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight bytes
    with open(path, "xb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        written = 0
        for block in blocks:
            flat = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            _write_all(file, flat.data)
            written += flat.size
        if written != position:
            raise WeightsError(
                f"{path}: wrote {written} bytes of values, {position} were planned."
            )
    return 8 + len(text) + position


def _write_all(file: Any, data: bytes | memoryview) -> None:
    """Unbuffered writes may be short; a full disk then fails on the next one."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
