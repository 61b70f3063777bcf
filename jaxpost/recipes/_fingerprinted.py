"""Arrays in a file with a fingerprint of all that they were computed from.

What a model said of the data, such as a reference's log-probs, is computed once and
read by later runs; where something it depends on has changed, it is refused by name.
"""

import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxpost import parallel
from jaxpost.recipes._config import ConfigError

T = TypeVar("T")
KEY = "fingerprint"


def write_arrays(
    file: pathlib.Path, arrays: Mapping[str, np.ndarray], fingerprint: dict[str, str]
) -> None:
    """As a `.npz` without pickled objects, replaced whole."""
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    named = {**arrays, KEY: np.array(json.dumps(fingerprint))}
    with part.open("wb") as out:
        np.savez(out, allow_pickle=False, **named)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def read_together(
    file: pathlib.Path,
    wanted: dict[str, str],
    parse: Callable[[Mapping[str, np.ndarray]], T],
    *,
    what: str,
    stale: type[ConfigError],
) -> T | None:
    """What `write_arrays` wrote, if every process has the file; None if any lacks it.

    Args:
        file: each process's own path to it, which may be one file.
        wanted: the fingerprint as it would be now; parts that are not in it are not
            compared.
        parse: makes the result of the arrays.
        what: the file should be, for messages.
        stale: raised where the fingerprint differs.

    Raises:
        ConfigError: `stale`, which names what changed; or the file cannot be read, or
            `parse` refuses it. What is wrong with the file of one process is an error
            on all of them.
    """
    result, problem, state = None, None, 0
    try:
        result, state = _read(file, wanted, parse, what, stale), 1
    except FileNotFoundError:
        pass
    except ConfigError as error:
        problem, state = error, 2
    states = np.asarray(parallel.gather_to_hosts(np.array([state])))
    if states.max() == 2:
        raise problem or ConfigError(
            f"{file}: process {int(states.argmax())} cannot use its copy; see there."
        )
    return result if states.min() == 1 else None


def _read(
    file: pathlib.Path,
    wanted: dict[str, str],
    parse: Callable[[Mapping[str, np.ndarray]], T],
    what: str,
    stale: type[ConfigError],
) -> T:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            found: dict[str, Any] = json.loads(str(stored[KEY]))
            changed = [
                name for name, value in wanted.items() if found.get(name) != value
            ]
            if changed:
                raise stale(
                    f"{file}: stale, as it was computed with another "
                    f"{' and another '.join(changed)}; delete the file to compute it "
                    "anew."
                )
            return parse(stored)
    except ConfigError:  # it can be read, but does not fit
        raise
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{file}: not {what} ({error}); delete it to compute it anew."
        ) from error
