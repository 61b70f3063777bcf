"""What the lines of a file depend on, in a file beside it: other lines stay out."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpost.generation._config import SamplingConfig


class SettingsFile:
    """`NAME.settings.json` beside `NAME.jsonl`.

    Args:
        path: of the lines.
        made: how they came to be, for messages: `sampled`.
        holds: what they are: `negatives`.
        mend: what to do where they are others.
    """

    def __init__(self, path: pathlib.Path, *, made: str, holds: str, mend: str):
        self.path = path.with_name(f"{path.stem}.settings.json")
        self._lines, self._made, self._holds, self._mend = path, made, holds, mend

    def write(self, content: Mapping[str, Any]) -> None:
        """Replaces what is there, whole; JSON values by name."""
        part = self.path.with_name(f"{self.path.name}.part")
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)

    def read(self) -> dict[str, Any]:
        """What was written.

        Raises:
            ValueError: there is no such file, or it holds no JSON object.
        """
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(
                f"{self._lines} is there, but not {self.path.name}, which says what it "
                f"was {self._made} with; {self._mend}."
            ) from None
        except (ValueError, TypeError) as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> ValueError:
        """What to raise where the content is not what was written."""
        return ValueError(
            f"{self.path} does not hold settings of {self._holds} ({error!r}); "
            f"{self._mend}."
        )

    def compare(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raises a ValueError that names the first setting that differs."""
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"{self._lines} was {self._made} with {name} {was.get(name)!r}, "
                    f"not {now.get(name)!r}; give that again, {self._mend}."
                )


class AnswerSettings:
    """The settings of a file of answers, and which rows it is of.

    Args:
        path: of the answers.
        settings: by name, JSON values.
        rows: all rows that are to be answered.
    """

    MEND = "name another output file, or move this one away"

    def __init__(
        self,
        path: pathlib.Path,
        settings: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
    ):
        self._path = path
        self._file = SettingsFile(
            path, made="answered", holds="answers", mend=self.MEND
        )
        self._settings = json.loads(json.dumps(settings))
        self._rows = rows

    def write(self) -> None:
        """Replaces what is there."""
        self._file.write(
            {
                "settings": self._settings,
                "rows": len(self._rows),
                "rows_sha256": _digest(self._rows),
            }
        )

    def check(self) -> None:
        """Raises a ValueError, which names what differs, unless the file was written
        with these settings, for these rows or the first of them."""
        found = self._file.read()
        try:
            settings, count = dict(found["settings"]), int(found["rows"])
            digest = found["rows_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._file.damaged(error) from error
        self._file.compare(settings, self._settings)
        if count > len(self._rows) or digest != _digest(self._rows[:count]):
            raise ValueError(
                f"{self._path} is of {count} rows, and the {len(self._rows)} given do "
                "not begin with them (order, id, prompt or another column differs); "
                f"give those again (more may follow), {self.MEND}."
            )


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
