"""The file of negatives, its settings and its summary; where a stopped one goes on."""

import collections
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from jaxpost import data, generation, models
from jaxpost.recipes import _fingerprints
from jaxpost.recipes._fingerprints import digest
from jaxpost.recipes._negatives_draw import Fault, faults_of
from jaxpost.recipes._negatives_rows import Item

MEND = "name another --out, or move the file away"


class NegativesFile:
    """A JSONL file in windows of rows, beside the settings that it was sampled with.

    Args:
        path: of the file.
        settings: of the sampler, JSON values.
        fingerprint: of model, tokenizer, template and data, a digest each.
        sources: names to remember, which are not compared.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        settings: Mapping[str, Any],
        fingerprint: Mapping[str, str],
        sources: Mapping[str, str],
    ):
        self.path = path
        self._settings = generation.SettingsFile(
            path, made="sampled", holds="negatives", mend=MEND
        )
        self._about = {
            "settings": dict(settings),
            "fingerprint": dict(fingerprint),
            "sources": dict(sources),
        }

    def open(self, items: Sequence[Item], window: int) -> int:
        """Checks what is there, cuts off a window that is not whole, and writes the
        settings of a new file.

        Args:
            items: all rows.
            window: rows written together.

        Returns:
            Rows that the file has.

        Raises:
            ValueError: settings or fingerprints differ (names the first), the settings
                are missing or damaged, or a line is not of the row at its place.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._settings.write({**self._about, "versions": _versions()})
            return 0
        self._check_settings()
        text = self.path.read_bytes()
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        whole = (
            len(lines) if len(lines) == len(items) else len(lines) // window * window
        )
        for number, line in enumerate(lines[:whole], start=1):
            if number > len(items) or _id_of(line) != items[number - 1].id:
                raise ValueError(
                    f"{self.path}:{number} is not a line of negatives of row {number}; "
                    f"{MEND}."
                )
        size = sum(map(len, lines[:whole]))
        if size < len(text):
            os.truncate(self.path, size)
        return whole

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes a window of lines."""
        text = "".join(
            json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
            for line in lines
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `NAME.summary.json`."""
        _write(self.path.with_name(f"{self.path.stem}.summary.json"), summary)

    def _check_settings(self) -> None:
        found = self._settings.read()
        try:
            settings, digests = dict(found["settings"]), dict(found["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._settings.damaged(error) from error
        self._settings.compare(settings, self._about["settings"])
        for name, now in self._about["fingerprint"].items():
            if digests.get(name) != now:
                raise ValueError(
                    f"{self.path} was sampled with another {name} (fingerprint "
                    f"{str(digests.get(name))[:12]}, now {now[:12]}); {MEND}."
                )


def fingerprint(
    model: models.Model, tokenizer: data.Tokenizer, items: Sequence[Item]
) -> dict[str, str]:
    """Digests of what negatives depend on: model, tokenizer, chat template, data."""
    ids = json.dumps([item.id for item in items])
    special = [
        tokenizer.bos_id,
        tokenizer.eos_ids,
        tokenizer.pad_id,
        tokenizer.adds_bos,
    ]
    return {
        "model": _fingerprints.of_model(model),
        "tokenizer": digest(tokenizer.backend.to_str(), json.dumps(special)),
        "chat template": digest(tokenizer.chat_template or ""),
        "data": digest(ids),
    }


def summarise(path: pathlib.Path, tokenizer: data.Tokenizer) -> dict[str, Any]:
    """Counts over a whole file of negatives.

    Returns:
        `rows`, `columns` (negatives per row), `negatives`; `redrawn` (negatives that
        took more than one draw) and `redraws`; kept at fault: `empty`, `duplicate`,
        `positive`; `unfinished`; `mean_logp`, nats.
    """
    counts: collections.Counter[str] = collections.Counter()
    columns, logps = 0, 0.0
    for row in data.read_jsonl(path):
        line = row.columns
        counts["rows"] += 1
        columns = len(line["negatives"])
        for faults in faults_of(line["negatives"], line["completion"], tokenizer):
            counts.update(faults)
        counts["redrawn"] += sum(draws > 1 for draws in line["negative_draws"])
        counts["redraws"] += sum(draws - 1 for draws in line["negative_draws"])
        counts["unfinished"] += line["negative_finished"].count(False)
        logps += sum(line["negative_logps"])
    total = counts["rows"] * columns
    names = ("redrawn", "redraws", *get_args(Fault), "unfinished")
    return {
        "rows": counts["rows"],
        "columns": columns,
        "negatives": total,
        **{name: counts[name] for name in names},
        "mean_logp": logps / total,
    }


def _versions() -> dict[str, str]:
    import jaxpost

    return {"jaxpost": jaxpost.__version__, "jax": jax.__version__}


def _id_of(line: bytes) -> Any:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """As JSON, replaced whole."""
    part = path.with_name(f"{path.name}.part")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    part.write_text(text, encoding="utf-8")
    part.replace(path)
