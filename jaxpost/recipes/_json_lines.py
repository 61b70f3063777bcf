"""JSONL files that a stopped run left: whole lines, the torn end cut off."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


def read(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Numbers, from 1, and values of the whole lines of a file; none without a file.

    A last line without an end, which a process left that was stopped while writing, is
    cut off the file once all others are read.

    Raises:
        ValueError: a line is not JSON.
    """
    if not path.exists():
        return
    whole = 0  # bytes of complete lines
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                break
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number} is not JSON ({error}); name another --out, or "
                    "move this file away."
                ) from error
            whole += len(text)
            yield number, value
    if whole < path.stat().st_size:
        os.truncate(path, whole)
