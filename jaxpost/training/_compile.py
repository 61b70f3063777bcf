"""Jitting a step: donation, a trace counter that can refuse, the compilation cache."""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxpost import parallel
from jaxpost.training._state import split_frozen
from jaxpost.training._step import leaf_name


class RetraceError(RuntimeError):
    """A step was traced for more shapes than allowed."""


class CompiledStep:
    """A jitted step that counts its traces; made by `compile_step`.

    Attributes:
        traces: how often the step has been traced (logged as `compile/traces`).
        compile_s: seconds spent in calls that traced: tracing, compiling or loading
            from the compilation cache, and dispatch.
    """

    def __init__(
        self, step: Callable, *, donate: bool, max_traces: int, state_shardings: Any
    ) -> None:
        if max_traces < 1:
            raise ValueError(f"max_traces must be at least 1, got {max_traces}.")
        self.traces = 0
        self.compile_s = 0.0
        self._max_traces = max_traces
        self._signatures: list[dict[str, str]] = []

        def counted(state, frozen, batch):
            # Runs only while tracing; compiled calls never come here.
            if frozen is not None:
                state = state._replace(frozen=frozen)
            self._count({"state": state, "batch": dict(batch)})
            state, metrics = step(state, batch)
            # Neither donated nor returned: what is frozen stays where it is.
            return split_frozen(state)[0], metrics

        self._jitted = jax.jit(
            counted,
            donate_argnums=(0,) if donate else (),
            out_shardings=(split_frozen(state_shardings)[0], None),
        )
        self._together = parallel.compile_together(self._jitted)

    def __call__(self, state: Any, batch: Any) -> Any:
        before, start = self.traces, time.perf_counter()
        state, frozen = split_frozen(state)
        state, metrics = self._together(state, frozen, batch)
        if self.traces != before:
            self.compile_s += time.perf_counter() - start
        if frozen is not None:
            state = state._replace(frozen=frozen)
        return state, metrics

    def lower(self, state: Any, batch: Any) -> Any:
        """As `jax.jit(...).lower`; arguments may be abstract."""
        return self._jitted.lower(*split_frozen(state), batch)

    def _count(self, arguments: dict[str, Any]) -> None:
        signature = {
            leaf_name(path): jax.typeof(leaf).str_short(True)
            + (" (weak)" if jax.typeof(leaf).weak_type else "")
            for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        }
        if self.traces >= self._max_traces:
            raise RetraceError(self._message(signature))
        self._signatures.append(signature)
        self.traces += 1

    def _message(self, new: dict[str, str]) -> str:
        old = self._signatures[-1]
        changed = [
            f"  {name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        return (
            f"The step would be traced {self.traces + 1} times, allowed: "
            f"{self._max_traces}. Changed since the last trace:\n"
            + "\n".join(changed or ["  nothing in shapes or dtypes (tree structure?)"])
            + "\nPad batches to fixed lengths, or raise max_traces to the number of "
            "length buckets."
        )


def compile_step(
    step: Callable,
    *,
    donate: bool = True,
    max_traces: int = 1,
    state_shardings: Any = None,
) -> CompiledStep:
    """Jits `step(state, batch)`.

    Args:
        step: a pure step, as `make_train_step` returns.
        donate: let the new state reuse the old one's memory; the caller's `state` is
            unusable after the call, except for `state.frozen`.
        max_traces: number of length buckets; one more distinct set of shapes raises.
        state_shardings: of the new state, a tree like it (but for `frozen`), so that it
            comes back as it went in; None leaves them to the compiler.

    Returns:
        A callable with the step's signature.

    Raises:
        ValueError: `max_traces` is below 1.
        RetraceError: on the call that would trace too often; names what changed.
    """
    return CompiledStep(
        step, donate=donate, max_traces=max_traces, state_shardings=state_shardings
    )


def enable_compilation_cache(
    folder: str | os.PathLike, *, min_compile_s: float = 0.3
) -> pathlib.Path:
    """Keeps compiled programs in `folder` for later processes; changes global settings.

    Args:
        folder: made if missing.
        min_compile_s: programs that compile faster are not kept.

    Returns:
        The folder.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_s)
    return folder
