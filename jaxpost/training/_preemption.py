"""A polite request to stop: SIGTERM, which schedulers send before they kill."""

import signal
import threading
from typing import Any

import jax


class PreemptedError(RuntimeError):
    """SIGTERM came: the state is saved, and the run can be resumed.

    Attributes:
        step: optimizer steps taken.
        status: exit status of a program that SIGTERM ended.
    """

    status = 128 + signal.SIGTERM

    def __init__(self, step: int, saved: bool) -> None:
        self.step = step
        super().__init__(
            f"SIGTERM: stopped after step {step}; "
            + ("go on with --resume." if saved else "nothing was saved.")
        )


class StopRequest:
    """Context that turns SIGTERM into a question asked after each step.

    With several processes, JAX's runtime spreads the signal and picks a step that all
    of them reach. Outside the main thread, signals cannot be caught: never asked then.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._mine = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopRequest":
        if self._mine and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self._asked = True
