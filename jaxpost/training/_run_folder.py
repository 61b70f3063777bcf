"""The run folder: what was run, on what, and what came out, in plain files."""

import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import weakref
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from jaxpost import parallel

_PACKAGES = (
    "jaxpost",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "datasets",
    "grain",
)


class RunFolder:
    """`runs/<name>/`: writes only on the first process; made by `create_run`.

    Attributes:
        path: the folder.
        checkpoints: its folder for checkpoints.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._writes = jax.process_index() == 0
        self._open: dict[str, Any] = {}
        self._unlock: Any = None

    def lock(self) -> None:
        """Keeps other processes from writing here, until this one leaves or ends.

        Raises:
            FileExistsError: another run is writing here now.
        """
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        handle = os.open(self.path / "lock", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"{self.path} is being written by another run: wait for it, stop it, "
                "or choose another name."
            ) from None
        # Closing it gives the lock back, at the latest when nobody holds this object.
        self._unlock = weakref.finalize(self, os.close, handle)

    def log_metrics(self, line: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`; it must have `step`."""
        self._append("metrics.jsonl", line)

    def log_sample(self, line: Mapping[str, Any]) -> None:
        """Appends one line to `samples.jsonl`; it must have `step`."""
        self._append("samples.jsonl", line)

    def truncate(self, step: int) -> None:
        """Drops lines of steps after `step`, and a line cut off by a crash.

        A run that resumes at `step` writes those again.
        """
        if not self._writes:
            return
        self.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if file.exists():
                _keep_until(file, step)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
        if self._unlock is not None:
            self._unlock()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if "step" not in line:
            raise ValueError(f"a line of {name} needs a step; got keys {sorted(line)}.")
        if not self._writes:
            return
        if name not in self._open:
            # Line-buffered: a crash loses no finished line.
            self._open[name] = (self.path / name).open(
                "a", buffering=1, encoding="utf-8"
            )
        self._open[name].write(json.dumps(_plain(line), ensure_ascii=False) + "\n")


def create_run(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    seeds: Mapping[str, int] | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> RunFolder:
    """Makes the folder with `config.yaml` and `environment.json`.

    Args:
        path: the folder, such as `runs/sft-gsm8k`.
        config: the resolved configuration, plain values.
        seeds: by what they seed.
        data: fingerprints by data set.
        resume: the folder may exist and go on; its first environment is kept and the
            present one is appended to `resumes`; a config that differs from the one
            before leaves that as `config.before_resume_1.yaml` (2, 3, ...).

    Raises:
        FileExistsError: the folder has a run in it and `resume` is False, or another
            process is writing there now.
        OSError: the folder cannot be made or written.
    """
    run = RunFolder(path)

    def prepare() -> None:
        if (run.path / "config.yaml").exists() and not resume:
            raise FileExistsError(
                f"{run.path} already holds a run: choose another name, or resume it."
            )
        _write_head(run, config, seeds, data)

    parallel.on_first_process(f"opening {run.path}", prepare)
    return run


def _write_head(run: RunFolder, config: Any, seeds: Any, data: Any) -> None:
    """Locks the folder and writes what is there from the start."""
    import yaml

    config_file = run.path / "config.yaml"
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.lock()
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            f"{run.path} cannot be written ({error.strerror}): choose a folder that "
            "can, with run_root."
        ) from error
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
    if config_file.exists() and config_file.read_text("utf-8") != text:
        earlier = len(list(run.path.glob("config.before_resume_*.yaml")))
        config_file.replace(run.path / f"config.before_resume_{earlier + 1}.yaml")
    _write_whole(config_file, text)
    now = environment(seeds=seeds, data=data)
    file = run.path / "environment.json"
    if file.exists():
        first = json.loads(file.read_text(encoding="utf-8"))
        first.setdefault("resumes", []).append(now)
        now = first
    _write_whole(file, json.dumps(now, indent=2) + "\n")


def _write_whole(file: pathlib.Path, text: str) -> None:
    """All of it or nothing: a full disk or a kill leaves the old file."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def environment(
    *,
    seeds: Mapping[str, int] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Versions, commit, devices, flags, seeds and data fingerprints: JSON values."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _commit(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seeds": dict(seeds or {}),
        "data": _plain(data or {}),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, with `+changes`; None outside a checkout."""
    here = pathlib.Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _keep_until(file: pathlib.Path, step: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        if not line.endswith(b"\n"):
            break
        if json.loads(line)["step"] <= step:
            kept.append(line)
    if len(kept) == len(lines):
        return
    # Replaced in one move: a crash here must not lose the lines that count.
    short = file.with_suffix(".jsonl.tmp")
    short.write_bytes(b"".join(kept))
    short.replace(file)


def _plain(value: Any) -> Any:
    """JSON values; numbers that JSON has not (NaN, infinities) become null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON.")
