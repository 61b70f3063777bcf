"""Calls of reward functions that may raise or hang, each with a deadline.

Three places to call one, by what can be left behind when it hangs:

- here: nothing can, so only for functions that cannot hang;
- in a thread: it is no longer waited for, but runs on until the program ends; while it
  holds Python's lock (a regular expression does) the program waits with it;
- in a process of its own: it is killed with all that it started, whatever it does, and
  a fresh one takes the next call. What the function remembers is lost then.
"""

import contextlib
import multiprocessing
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, Protocol

from jaxpost.rewards import _worker
from jaxpost.rewards._worker import Batch, RewardError

START_S = 120.0
"""How long a process may take to import a reward's module, seconds."""


class Failure(NamedTuple):
    """A call without a result.

    Fields:
        kind: what it counts as.
        text: what happened.
    """

    kind: Literal["errors", "timeouts"]
    text: str


class Caller(Protocol):
    """Calls one function, one call at a time: `begin`, then `finish`."""

    def open(self) -> None:
        """Gets ready; nothing if it is. RewardError if it cannot be."""
        ...

    def begin(self, batch: Batch) -> None:
        """Starts a call and does not wait for it, where that is possible."""
        ...

    def finish(self) -> Any:
        """What the function returned, or a `Failure`. RewardError if it refuses."""
        ...

    def close(self) -> None:
        """Ends what was started; it may be opened again."""
        ...


class Here:
    """Calls a function that cannot hang, in `finish`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._batch: Batch | None = None

    def open(self) -> None:
        pass

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def finish(self) -> Any:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return _attempt(self._function, batch)

    def close(self) -> None:
        pass


def _attempt(function: Callable[..., Any], batch: Batch) -> Any:
    try:
        return _worker.call_function(function, batch)
    except RewardError:
        raise
    except Exception as error:  # whatever the user's function raises
        return Failure("errors", _worker.describe_error(error))


class InThread:
    """Calls a function in a thread, a new one each time."""

    def __init__(self, function: Callable[..., Any], deadline_s: float | None) -> None:
        self._function, self._deadline_s = function, deadline_s
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ends: float | None = None

    def open(self) -> None:
        pass

    def begin(self, batch: Batch) -> None:
        # Of this call alone: one that was left behind may still answer.
        results = self._results = queue.SimpleQueue()
        self._ends = _end_of(self._deadline_s)

        def call() -> None:
            try:
                results.put(_attempt(self._function, batch))
            except BaseException as error:  # RewardError, SystemExit: told by `finish`
                results.put(error)

        # A daemon, so that it does not keep the program from ending.
        threading.Thread(target=call, daemon=True).start()

    def finish(self) -> Any:
        try:
            result = self._results.get(timeout=_left(self._ends))
        except queue.Empty:
            return Failure(
                "timeouts", f"no answer within {self._deadline_s:g} s; left behind"
            )
        if isinstance(result, RewardError):
            raise result
        if isinstance(result, BaseException):
            return Failure("errors", _worker.describe_error(result))
        return result

    def close(self) -> None:
        pass


class InProcess:
    """Calls a function in a process of its own, the same for all calls.

    Args:
        name: built-in, or `package.module:function`.
        settings: of the function.
        deadline_s: for a call, seconds; None waits as long as it takes.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], deadline_s: float | None
    ) -> None:
        if os.name != "posix":
            raise NotImplementedError(
                f"reward {name!r} cannot have a process of its own on {os.name}; set "
                "isolate to thread."
            )
        self._name, self._settings = name, dict(settings)
        self._deadline_s = deadline_s
        self._ends: float | None = None
        self._pipe: Connection | None = None
        self._end: Callable[[], Any] = _nothing
        self._unsent: Failure | None = None

    def open(self) -> None:
        if self._pipe is not None:
            return
        pipe, other = multiprocessing.Pipe()
        process = subprocess.Popen(
            [
                # Safe path: the folder of the script is no place to import from.
                *(sys.executable, "-P", str(pathlib.Path(_worker.__file__))),
                str(other.fileno()),
            ],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # to be killed with all that it starts
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # the accelerator is taken
        )
        other.close()
        self._pipe = pipe
        self._end = weakref.finalize(self, _kill, process, pipe)
        pipe.send((sys.path, self._name, self._settings))
        reply = self._receive(time.monotonic() + START_S, START_S)
        if isinstance(reply, Failure):
            self.close()
            raise RewardError(
                f"reward {self._name!r} did not start its process: {reply.text}."
            )

    def begin(self, batch: Batch) -> None:
        self.open()
        assert self._pipe is not None
        self._ends, self._unsent = _end_of(self._deadline_s), None
        try:
            self._pipe.send(tuple(batch))
        except OSError:
            self._unsent = Failure("errors", "its process has ended")
            self.close()

    def finish(self) -> Any:
        if self._unsent is not None:
            return self._unsent
        return self._receive(self._ends, self._deadline_s)

    def _receive(self, ends: float | None, given_s: float | None) -> Any:
        """The process's answer, which has `given_s` in all, until `ends`."""
        assert self._pipe is not None
        try:
            if not self._pipe.poll(_left(ends)):
                self.close()
                return Failure("timeouts", f"no answer within {given_s:g} s; killed")
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            return Failure("errors", "its process has ended")
        if kind == "refused":
            self.close()
            raise RewardError(value)
        return Failure("errors", value) if kind == "error" else value

    def close(self) -> None:
        self._end()
        self._end, self._pipe = _nothing, None


def _nothing() -> None:
    pass


def _kill(process: subprocess.Popen, pipe: Connection) -> None:
    pipe.close()
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else time.monotonic() + deadline_s


def _left(ends: float | None) -> float | None:
    return None if ends is None else max(ends - time.monotonic(), 0.0)
