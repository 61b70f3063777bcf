"""Runs programs in sandboxes: one, or many at a time."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from jaxpost.sandbox._result import Limits, SandboxResult

_HERE = pathlib.Path(__file__).resolve().parent
# The launcher's process loads the launcher only: this file and what it imports would
# take longer than most programs run.
_START = """
import sys, types
for name, folder in zip(("jaxpost", "jaxpost.sandbox"), sys.argv[1:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from jaxpost.sandbox._launcher import main
main()
"""
_DEFAULT = Limits()
_MARGIN_S = 10.0  # over the program's time, for a launcher that does not answer
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")


def run(
    program: str,
    *,
    limits: Limits = _DEFAULT,
    stdin: str = "",
    unsafe: bool = False,
    must_finish: bool = True,
) -> SandboxResult:
    """Runs a Python program where it can do no harm, and says how it ended.

    On Linux it runs as an unprivileged user in namespaces of its own: it sees the
    Python library and the system's programs, read-only, and an empty folder in memory,
    its current one; no other file, process or network. All that it started ends with
    it. It can import the standard library only.

    Args:
        program: source text.
        limits: what it may use.
        stdin: what it can read from its standard input.
        unsafe: where the kernel refuses this, run it with limits on time and memory
            only: it can then do whatever you can.
        must_finish: a program that leaves before its last line with exit status 0
            (`sys.exit()`, `os._exit(0)`) has failed. Without, it has passed.

    Returns:
        How it ended; `refused` if it was not run.

    Example:
        >>> from jaxpost import sandbox
        >>> sandbox.run("assert 1 + 1 == 3", unsafe=True).status
        'failed'
    """
    result = _run(program, limits, stdin, must_finish, isolate=True)
    if result.status == "refused" and unsafe:
        return _run(program, limits, stdin, must_finish, isolate=False)
    return result


@functools.cache
def refusal() -> str | None:
    """Why programs cannot be contained here, or None if they can; tried once."""
    result = _run("", Limits(), "", True, isolate=True)
    if result.status in ("passed", "refused"):
        return result.detail if result.status == "refused" else None
    return f"an empty program ended as {result.status}: {result.detail}"


def run_many(
    programs: Sequence[str],
    *,
    limits: Limits = _DEFAULT,
    workers: int | None = None,
    unsafe: bool = False,
    must_finish: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[SandboxResult]:
    """Runs programs, several at a time.

    Args:
        programs: source texts.
        limits, unsafe, must_finish: as in `run`, of each.
        workers: how many at a time; None takes one per processor. Time that a program
            waits for a processor counts against its `wall_s`.
        progress: called with (done, total) after each.

    Returns:
        In the order of `programs`.

    Raises:
        ValueError: fewer workers than one.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    one = functools.partial(run, limits=limits, unsafe=unsafe, must_finish=must_finish)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(one, program) for program in programs]
        try:
            for done, _ in enumerate(concurrent.futures.as_completed(waiting), start=1):
                if progress is not None:
                    progress(done, len(waiting))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a stop does not wait for all the rest
            raise
        return [future.result() for future in waiting]


def _run(
    program: str, limits: Limits, stdin: str, must_finish: bool, *, isolate: bool
) -> SandboxResult:
    if sys.platform != "linux":
        where = f"there are no namespaces on {sys.platform}"
        if isolate:
            return _refused(where)
        raise NotImplementedError(f"{where}, and the limits used here are Linux's.")
    mark = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(
        prefix="jaxpost-sandbox-", ignore_cleanup_errors=True
    ) as folder:
        task = {
            "isolate": isolate,
            "limits": dataclasses.asdict(limits),
            "folder": folder,
            "paths": _paths(),
            "python": os.path.realpath(sys.executable),
            "mark": mark,
            "program.py": _encodable(program),
            "input": _encodable(stdin),
            "driver.py": _driver(),
        }
        if not isolate:
            _fill(folder, task)
        report, error = _launch(task, limits.wall_s + _MARGIN_S)
    if report is None:
        detail = f"the launcher did not answer: {error}"
        return SandboxResult("killed", detail, ran=False)
    if "refused" in report:
        return _refused(report["refused"])
    return _judge(report, mark, limits, must_finish, isolate=isolate)


def _encodable(text: str) -> str:
    """Text that UTF-8 can hold: what half a character decodes to cannot be written."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _refused(reason: str) -> SandboxResult:
    return SandboxResult(
        "refused",
        f"untrusted code is not run: {reason}. Use a Linux machine that allows "
        "unprivileged namespaces, or run it uncontained (unsafe=True, "
        "--unsafe-sandbox) where losing everything would not matter.",
        ran=False,
    )


def _launch(task: dict[str, Any], timeout_s: float) -> tuple[Any, str]:
    """The launcher's report, or None and why there is none."""
    command = [sys.executable, "-I", "-S", "-B", "-c", _START]
    command += [str(_HERE.parent), str(_HERE)]
    launcher = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        text=True,
        encoding="utf-8",
    )
    try:
        out, err = launcher.communicate(json.dumps(task), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None, f"nothing for {timeout_s:.0f} s"
    finally:
        if launcher.poll() is None:  # all others die with it
            with contextlib.suppress(ProcessLookupError):
                launcher.send_signal(signal.SIGKILL)
            launcher.communicate()
    if launcher.returncode or not out:
        last = err.strip().splitlines()[-1:] or [f"status {launcher.returncode}"]
        return None, last[0]
    return json.loads(out), ""


def _judge(
    report: dict[str, Any],
    mark: str,
    limits: Limits,
    must_finish: bool,
    *,
    isolate: bool,
) -> SandboxResult:
    """The launcher's report as a result."""
    status, over = report.get("status"), report.get("over")
    said = [
        line.removeprefix(mark).strip()
        for line in report.get("said", "").splitlines()
        if line.startswith(mark)
    ]
    code = None if status is None else os.waitstatus_to_exitcode(status)
    finished = "end" in said or not must_finish
    if over:
        verdict, detail = over, _over(over, limits)
    elif code is None:
        verdict, detail = "killed", "the supervisor ended without a report"
    elif code == -signal.SIGXCPU or (
        code == -signal.SIGKILL and report["cpu_seconds"] >= limits.cpu_s
    ):
        verdict, detail = "timeout", f"more than {limits.cpu_s} s of CPU time"
    elif code < 0:
        verdict, detail = "killed", f"by {signal.Signals(-code).name}"
    elif "memory" in said:
        verdict, detail = "memory", _over("memory", limits)
    elif code == 0 and finished:
        verdict, detail = "passed", ""
    elif code == 0:
        verdict, detail = "failed", "left with exit status 0 before its last line"
    else:
        lines = report.get("stderr", "").strip().splitlines()
        verdict, detail = "failed", lines[-1] if lines else f"exit status {code}"
    return SandboxResult(
        status=verdict,
        detail=detail,
        exit_code=code if code is not None and code >= 0 else None,
        isolated=isolate,
        ran=bool(over) or (code is not None and "start" in said),
        **{
            name: report[name]
            for name in (
                *("stdout", "stderr", "seconds", "cpu_seconds"),
                *("peak_memory_mb", "peak_processes"),
            )
            if name in report
        },
    )


def _over(name: str, limits: Limits) -> str:
    return {
        "timeout": f"more than {limits.wall_s:g} s",
        "memory": f"more than {limits.memory_mb} MiB",
        "processes": f"more than {limits.processes} processes and threads",
        "output": f"more than {limits.output_mb} MiB of output",
    }[name]


@functools.cache
def _driver() -> str:
    return (_HERE / "_driver.py").read_text(encoding="utf-8")


@functools.cache
def _paths() -> list[str]:
    """What a program sees of this machine: the system's programs and Python's own."""
    shown = [path for path in _SYSTEM if os.path.lexists(path)]
    real = os.path.realpath(sys.executable)
    for path in (os.path.realpath(sys.base_prefix), real):
        if not any(path == p or path.startswith(f"{p}/") for p in shown):
            shown.append(path)
    return shown


def _fill(folder: str, task: dict[str, Any]) -> None:
    """Writes a program that is not contained into a folder of its own."""
    for name in ("program.py", "input", "driver.py"):
        (pathlib.Path(folder) / name).write_text(task[name], encoding="utf-8")
    (pathlib.Path(folder) / "tmp").mkdir()
