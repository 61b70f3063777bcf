"""What the answers of a file depend on, in a file beside it: other answers stay out."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpost.generation._config import SamplingConfig

MEND = "name another output file, or move this one away"


class FileSettings:
    """The settings of a file `NAME.jsonl`, in `NAME.settings.json`.

    Args:
        path: of the answers.
        settings: by name, JSON values.
        rows: all rows that are to be answered.
    """

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
    ):
        self._answers = path
        self._path = path.with_name(f"{path.stem}.settings.json")
        self._settings = json.loads(json.dumps(settings))
        self._rows = rows

    def write(self) -> None:
        """Replaces what is there, whole."""
        content = {
            "settings": self._settings,
            "rows": len(self._rows),
            "rows_sha256": _digest(self._rows),
        }
        part = self._path.with_name(f"{self._path.name}.part")
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8")
        part.replace(self._path)

    def check(self) -> None:
        """Raises a ValueError, which names what differs, unless the file was written
        with these settings, for these rows or the first of them."""
        settings, count, digest = self._read()
        for name in dict.fromkeys([*self._settings, *settings]):
            was, now = settings.get(name), self._settings.get(name)
            if was != now:
                raise ValueError(
                    f"{self._answers} was answered with {name} {was!r}, not {now!r}; "
                    f"give that again, {MEND}."
                )
        if count > len(self._rows) or digest != _digest(self._rows[:count]):
            raise ValueError(
                f"{self._answers} is of {count} rows, and the {len(self._rows)} given "
                "do not begin with them (order, id, prompt or another column "
                f"differs); give those again (more may follow), {MEND}."
            )

    def _read(self) -> tuple[dict[str, Any], int, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return dict(found["settings"]), int(found["rows"]), found["rows_sha256"]
        except FileNotFoundError:
            raise ValueError(
                f"{self._answers} is there, but not {self._path.name}, which says what "
                f"it was answered with; {MEND}."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path} does not hold settings of answers ({error!r}); {MEND}."
            ) from error


def sampler_settings(
    config: SamplingConfig, key: jax.Array, stop_strings: Sequence[str]
) -> dict[str, Any]:
    """What the sampler was told, as JSON values."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    dtype = config.cache_dtype
    return fields | {
        "stop_ids": [int(i) for i in config.stop_ids],
        "cache_dtype": None if dtype is None else str(jax.numpy.dtype(dtype)),
        "key": jax.random.key_data(key).tolist(),
        "stop_strings": list(stop_strings),
    }


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps(list(rows), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
