"""The watchdog: sees how much memory and how many processes there are, and the time.

Knows processes by a descriptor of a `/proc` folder, its own namespace's or the whole
machine's. Standard library only.
"""

import os
import select
import signal
import time
from typing import Any, NamedTuple

TICK_S = 0.02
MIB = 2**20


class Seen(NamedTuple):
    """What stands in `/proc` of one process.

    Fields:
        parent: its parent's number.
        threads: how many.
        memory_kb: resident pages that are not files, KiB.
    """

    parent: int
    threads: int
    memory_kb: int


def supervise(
    limits: dict[str, Any], program: int, view: int, *, isolated: bool
) -> dict[str, Any]:
    """Waits for a program to end or to go over a limit.

    Args:
        limits: fields of `Limits`.
        program: the child to wait for.
        view: descriptor of a `/proc` folder.
        isolated: whether the folder shows this program's namespace only; else what
            descends from this process is watched, and ended at the end.

    Returns:
        `over`, the limit gone over or None; `status`, the wait status or None;
        `seconds`, `cpu_seconds`, `peak_memory_mb`, `peak_processes`.
    """
    start = time.monotonic()
    deadline = start + limits["wall_s"]
    over, memory_kb, processes = None, 0, 0
    waiting = select.poll()
    waiting.register(os.pidfd_open(program), select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        ended = bool(waiting.poll(1000 * max(0.0, min(TICK_S, left))))
        members = _members(view, isolated=isolated)
        memory_kb = max(memory_kb, sum(one.memory_kb for one in members.values()))
        processes = max(processes, sum(one.threads for one in members.values()))
        if ended:
            break
        if memory_kb > limits["memory_mb"] * 1024:
            over = "memory"
        elif processes > limits["processes"]:
            over = "processes"
        elif left <= 0.0:
            over = "timeout"
        if over:
            os.kill(program, signal.SIGKILL)
            break
        _reap(program)
    _, status, usage = os.wait4(program, 0)
    seconds = time.monotonic() - start
    if not isolated:
        _end_all(view)
    return {
        "over": over,
        "status": None if over else status,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mb": memory_kb / 1024,
        "peak_processes": processes,
    }


def _reap(program: int) -> None:
    """Buries orphans, which are this process's to bury, but not the program."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == program:
            return
        os.waitpid(found.si_pid, 0)


def _members(view: int, *, isolated: bool) -> dict[int, Seen]:
    """The program and what it started, by number."""
    found = {}
    for name in os.listdir(view):
        if name.isdigit():
            seen = _look(view, int(name))
            if seen is not None:
                found[int(name)] = seen
    me = os.getpid()
    if isolated:
        found.pop(me, None)
        return found
    below = {me}
    while True:
        more = {n for n, one in found.items() if one.parent in below} - below
        if not more:
            return {number: found[number] for number in below - {me}}
        below |= more


def _look(view: int, number: int) -> Seen | None:
    """One process, or None if it is gone."""
    try:
        handle = os.open(f"{number}/status", os.O_RDONLY, dir_fd=view)
    except OSError:
        return None
    try:
        text = os.read(handle, 8192)
    except OSError:
        return None
    finally:
        os.close(handle)
    fields = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)

    def number_of(name: bytes) -> int:
        words = fields.get(name, b"0").split()
        return int(words[0]) if words else 0

    memory = number_of(b"RssAnon") + number_of(b"RssShmem")
    return Seen(number_of(b"PPid"), number_of(b"Threads"), memory)


def _end_all(view: int) -> None:
    """Kills what descends from this process until nothing is left."""
    while True:
        members = _members(view, isolated=False)
        if not members:
            return
        for number in members:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        time.sleep(0.002)
