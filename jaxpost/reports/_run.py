"""Reads a run folder as `training` and the recipes write it.

Knows file names and JSON Lines; nothing of what the numbers mean. A run may have been
killed at any byte: a cut last line is expected, any other bad line is named in `notes`.
"""

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
CONFIG, ENVIRONMENT = "config.yaml", "environment.json"


class ReportError(ValueError):
    """A run folder that cannot be reported on; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Fields:
        name: what to call the run; the folder's name if that is unique.
        folder: where it was read from.
        metrics: lines of `metrics.jsonl` with an integer `step`, in the file's order.
        samples: lines of `samples.jsonl`.
        config, environment: contents of the two files; None if missing or unreadable.
        notes: what was missing or could not be read, one sentence each.
    """

    name: str
    folder: pathlib.Path
    metrics: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...] = ()
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, by step; a repeated step counts once.

        A resumed run logs again the steps after its checkpoint: the later line holds.
        """
        points = {
            line["step"]: float(line[name])
            for line in self.metrics
            if _is_number(line.get(name))
        }
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def metric_names(self) -> list[str]:
        """Names with at least one number, in order of appearance; not `step`."""
        names: dict[str, None] = {}
        for line in self.metrics:
            names.update((k, None) for k, v in line.items() if _is_number(v))
        names.pop("step", None)
        return list(names)


def read_runs(folders: Sequence[str | os.PathLike]) -> list[Run]:
    """Read several run folders; runs of equal names are called by their paths.

    Raises:
        ValueError: no folder is given.
        ReportError: see `read_run`; or one folder is given twice.
    """
    if not folders:
        raise ValueError("Give at least one run folder to report on.")
    paths = [pathlib.Path(folder) for folder in folders]
    places = [path.resolve() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ReportError(f"{paths[index]}: this run folder is given twice.")
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def read_run(folder: str | os.PathLike) -> Run:
    """Read one run folder; only `metrics.jsonl` is required.

    Args:
        folder: `runs/<name>` as `jaxpost train` writes it.

    Raises:
        ReportError: the folder or its `metrics.jsonl` is missing or empty, or no line
            of it can be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such run folder.{_nearest(folder)}")
    path = folder / METRICS
    if not path.is_file():
        raise ReportError(
            f"{folder}: holds no {METRICS}, so it is no run folder (or the run stopped "
            "before its first log line). `jaxpost train` writes them under runs/."
        )
    notes: list[str] = []
    lines = _read_lines(path, notes)
    metrics = []
    for number, line in lines:
        if isinstance(line.get("step"), int) and not isinstance(line["step"], bool):
            metrics.append(line)
        else:
            notes.append(f"{path}:{number}: no integer `step`; the line was left out.")
    if not metrics:
        detail = " ".join(notes) or "The file is empty."
        raise ReportError(f"{path}: no line can be read. {detail}")
    samples_path = folder / SAMPLES
    samples: list[tuple[int, dict[str, Any]]] = []
    if samples_path.is_file():
        samples = _read_lines(samples_path, notes)
    else:
        notes.append(f"{samples_path}: missing; no samples are shown.")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        metrics=tuple(metrics),
        samples=tuple(line for _, line in samples),
        config=_read_mapping(folder / CONFIG, notes),
        environment=_read_mapping(folder / ENVIRONMENT, notes),
        notes=tuple(notes),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(folder: pathlib.Path) -> str:
    parent = folder.parent
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, 1)
    return f" Did you mean {parent / near[0]}?" if near else ""


def _read_lines(
    path: pathlib.Path, notes: list[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and JSON objects; what is no object is named in `notes`."""
    raw = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(raw, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            # The writer ends each line with a newline: without one, it was cut off.
            if number == len(raw):
                notes.append(
                    f"{path}:{number}: the last line is cut off, as when a run is "
                    "killed; it was left out."
                )
            else:
                notes.append(
                    f"{path}:{number}: not valid JSON ({error}); the line was left out."
                )
            continue
        if isinstance(value, dict):
            found.append((number, value))
        else:
            notes.append(
                f"{path}:{number}: expected a JSON object, got "
                f"{type(value).__name__}; the line was left out."
            )
    return found


def _read_mapping(path: pathlib.Path, notes: list[str]) -> dict[str, Any] | None:
    """A YAML or JSON file that holds a mapping, else None and a note."""
    if not path.is_file():
        notes.append(f"{path}: missing.")
        return None
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else _parse_yaml(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{path}: cannot be read ({error}).")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path}: expected a mapping, got {type(value).__name__}.")
        return None
    return value


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
