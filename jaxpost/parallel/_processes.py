"""Starting one program on several hosts: JAX's runtime, after a roll-call with names.

JAX's own start waits for all processes and, when one stays away, ends the program from
within C++ without saying which. So process 0 first calls the roll over plain sockets.
"""

import json
import socket
import time

import jax

_RETRY_S = 0.2
_LINE_BYTES = 4096


class MissingProcessError(TimeoutError):
    """Not all processes came before the deadline."""


def start_processes(
    coordinator: str,
    count: int,
    index: int,
    *,
    deadline_s: float = 60.0,
) -> None:
    """Joins this process to the others; call it before anything else uses JAX.

    Afterwards `jax.devices()` are those of all processes. On CPU, arrays travel between
    processes by gloo.

    Args:
        coordinator: `host:port` where process 0 can be reached; a free port there.
        count: number of processes.
        index: of this one, from 0.
        deadline_s: how long to wait for the others.

    Raises:
        MissingProcessError: names the processes that did not come, says that process 0
            cannot be reached, or that two have the same index or another count.
        ValueError: the address or a number cannot be right.
        OSError: process 0 cannot listen on the port.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"the coordinator must be host:port of process 0, got {coordinator!r}."
        )
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process index {index} of {count} processes: the index counts from 0 to "
            "one less than the number of processes."
        )
    if count > 1:
        until = time.monotonic() + deadline_s
        if index == 0:
            _call_roll(int(port), count, until, deadline_s)
        else:
            _answer_roll(host, int(port), count, index, until, deadline_s)
    jax.distributed.initialize(
        coordinator, count, index, initialization_timeout=max(int(deadline_s), 1)
    )


def _call_roll(port: int, count: int, until: float, deadline_s: float) -> None:
    """Process 0: wait for all others, then tell them all how it went."""
    present: set[int] = set()
    waiting: list[socket.socket] = []
    with socket.create_server(("", port), backlog=count) as server:
        problem = None
        while len(present) < count - 1 and problem is None:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(max(until - time.monotonic(), 0.01))
                index, claimed = json.loads(connection.recv(_LINE_BYTES))
            except TimeoutError:
                missing = sorted(set(range(1, count)) - present)
                problem = (
                    f"of {count} processes, these did not come within "
                    f"{deadline_s:.0f} s: {', '.join(map(str, missing))}. Start them, "
                    "or look at their output; every process needs the same coordinator "
                    "and count."
                )
            except (OSError, ValueError, TypeError):
                continue  # somebody else's connection
            else:
                if claimed != count:
                    problem = f"process {index} was told of {claimed} processes, "
                    problem += f"process 0 of {count}."
                elif index in present:
                    problem = f"two processes have the index {index}."
                waiting.append(connection)
                present.add(index)
        for connection in waiting:
            with connection:
                connection.sendall((problem or "go").encode())
    if problem is not None:
        raise MissingProcessError(problem)


def _answer_roll(
    host: str, port: int, count: int, index: int, until: float, deadline_s: float
) -> None:
    """Another process: report, then wait for the word of process 0."""
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise MissingProcessError(
                f"process 0 did not answer at {host}:{port} within {deadline_s:.0f} s: "
                "is it running, and is the port reachable from here?"
            )
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps([index, count]).encode())
                # A moment more than process 0 waits, so that its verdict arrives.
                connection.settimeout(left + 5)
                word = connection.recv(_LINE_BYTES).decode()
        except OSError:
            time.sleep(min(_RETRY_S, max(left, 0)))
            continue
        if word == "go":
            return
        if word:
            raise MissingProcessError(word)
        time.sleep(_RETRY_S)
