"""`jaxpost verify-resume`: kill a run at a random moment, resume it, compare all.

The runs are child processes, since nothing else dies like a process that is killed.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost import training
from jaxpost.recipes import load_config
from jaxpost.recipes._config import ConfigError

TIMINGS = ("tokens/s", "step_time", "compile/seconds", "mfu", "tflops/device")
LOSS_TOLERANCE = 1e-5


class Verdict(NamedTuple):
    """What was compared.

    Fields:
        killed_after_s: seconds from the run's first logged line to SIGKILL.
        resumed_from: steps of the checkpoint that the run went on from; 0 if none was
            complete.
        problems: what differs, a line each; empty if the two runs are the same.
    """

    killed_after_s: float
    resumed_from: int
    problems: list[str]


def verify_resume(
    config_path: str,
    flags: Sequence[str] = (),
    *,
    kills: int = 1,
    seed: int | None = None,
    devices: Sequence[int] = (),
    say: Any = print,
) -> list[Verdict]:
    """Trains once in peace, then `kills` times with a SIGKILL and a resume.

    Compared bit for bit: every array of the last checkpoint (parameters, moments, keys,
    step, method state), the place in the data, and every logged number but timings.

    Args:
        config_path, flags: as for `jaxpost train`; `train.save_every` must be set.
        kills: how often, each at another random moment.
        seed: of the moments; None draws one.
        devices: also resume from the middle on so many devices each; the next losses
            must agree to 1e-5.
        say: gets a line for each thing done.

    Returns:
        A verdict for each kill, and one for each entry of `devices`.

    Raises:
        ConfigError: the config saves no checkpoint on the way.
        RuntimeError: a run that was not killed failed; has its output.
    """
    config: Any = load_config(
        config_path, list(flags), prog="jaxpost verify-resume CONFIG"
    )
    if not hasattr(config, "train"):
        raise ConfigError(f"recipe {config.recipe} saves no checkpoints to resume.")
    if not config.train.save_every:
        raise ConfigError(
            "train.save_every is 0: without a checkpoint on the way there is nothing "
            "to resume; set --train.save-every."
        )
    draw = random.Random(seed)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="jaxpost-verify-") as folder:
        runs = _Runs(config_path, [*flags, "--export.enabled", "False"], folder)
        seconds = runs.finish("whole")
        wanted = _contents(runs.path("whole"))
        say(f"uninterrupted: step {wanted.step}, {seconds:.2f} s after its first line")
        for number in range(kills):
            name = f"cut-{number}"
            moment = draw.uniform(0.0, seconds)
            runs.kill(name, moment)
            before = _last_step(runs.path(name))
            runs.finish(name, resume=(runs.path(name) / "config.yaml").is_file())
            problems = _differences(wanted, _contents(runs.path(name)))
            verdicts.append(Verdict(moment, before, problems))
            say(
                f"killed {moment:.2f} s after its first line, "
                f"resumed from step {before}: "
                + ("the same run" if not problems else "; ".join(problems))
            )
        for count in devices:
            verdicts.append(_on_fewer(runs, wanted, count))
            say(
                f"resumed from step {verdicts[-1].resumed_from} on {count} devices: "
                + ("; ".join(verdicts[-1].problems) or "the same losses")
            )
    return verdicts


class _Runs:
    """Starts, kills and waits for training runs in one folder."""

    def __init__(self, config: str, flags: Sequence[str], folder: str) -> None:
        self.root = pathlib.Path(folder)
        self._command = [sys.executable, "-m", "jaxpost.cli", "train", config, *flags]

    def path(self, name: str) -> pathlib.Path:
        return self.root / name

    def start(self, name: str, *extra: str) -> subprocess.Popen[str]:
        log = (self.root / f"{name}.log").open("a")
        with log:
            return subprocess.Popen(
                [*self._command, "--run-root", str(self.root), "--name", name, *extra],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "JAXPOST_TRACEBACK": "1"},
            )

    def finish(self, name: str, *extra: str, resume: bool = False) -> float:
        """Runs to the end; returns the seconds since its first logged line."""
        process = self.start(name, *extra, *(("--resume",) if resume else ()))
        start = self._logs(name, process)
        if process.wait():
            output = (self.root / f"{name}.log").read_text()[-2000:]
            raise RuntimeError(f"the run {name!r} failed by itself:\n{output}")
        return time.monotonic() - start

    def kill(self, name: str, moment: float) -> None:
        """Kills it `moment` seconds after its first logged line."""
        process = self.start(name)
        self._logs(name, process)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _logs(self, name: str, process: subprocess.Popen[str]) -> float:
        """When the run has logged something, or ended."""
        lines = self.path(name) / "metrics.jsonl"
        while process.poll() is None:
            if lines.is_file() and lines.stat().st_size:
                break
            time.sleep(0.01)
        return time.monotonic()


class _Contents(NamedTuple):
    step: int
    arrays: dict[str, str]
    data: Any
    lines: list[dict[str, Any]]


def _contents(run: pathlib.Path) -> _Contents:
    """Hashes of the last checkpoint's arrays, its cursor, and what was logged."""
    step = _last_step(run)
    arrays, data = training.checkpoint_hashes(run / "checkpoints", step)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    untimed = [{k: v for k, v in x.items() if k not in TIMINGS} for x in lines]
    return _Contents(step, arrays, data, untimed)


def _last_step(run: pathlib.Path) -> int:
    if not (run / "checkpoints").is_dir():
        return 0
    with training.Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.latest() or 0


def _differences(wanted: _Contents, found: _Contents) -> list[str]:
    problems = []
    if found.step != wanted.step:
        problems.append(f"ended at step {found.step}, not {wanted.step}")
    for name in sorted(wanted.arrays.keys() | found.arrays.keys()):
        if wanted.arrays.get(name) != found.arrays.get(name):
            problems.append(f"{name} differs")
    if found.data != wanted.data:
        problems.append(f"place in the data is {found.data}, not {wanted.data}")
    if len(found.lines) != len(wanted.lines):
        problems.append(f"{len(found.lines)} log lines, not {len(wanted.lines)}")
    for old, new in zip(wanted.lines, found.lines, strict=False):
        names = [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
        if names:
            problems.append(f"step {old.get('step')} logged another {sorted(names)}")
    return problems


def _on_fewer(runs: _Runs, wanted: _Contents, count: int) -> Verdict:
    """The first half on all devices, the rest on `count`."""
    name, half = f"devices-{count}", max(1, wanted.step // 2)
    # Cut by a kill: a shorter run would have another schedule.
    process = runs.start(name)
    while _last_step(runs.path(name)) < half and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _last_step(runs.path(name))
    runs.finish(name, "--mesh.devices", str(count), resume=True)
    found = _contents(runs.path(name))
    problems = []
    for old, new in zip(wanted.lines, found.lines, strict=True):
        for key in ("loss", "eval_loss"):
            if key in old and not np.isclose(
                old[key], new.get(key, np.nan), rtol=LOSS_TOLERANCE, atol=0
            ):
                problems.append(f"step {old['step']}: {key} {new.get(key)}, {old[key]}")
    return Verdict(0.0, before, problems)
