"""The training loop: steps, evaluation, checkpoints, logs, and an early clear failure.

Takes functions and iterators; knows no method, model or file format.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.training._callbacks import Callback
from jaxpost.training._checkpoint import Checkpoints
from jaxpost.training._compile import CompiledStep, compile_step
from jaxpost.training._performance import Performance
from jaxpost.training._preemption import PreemptedError, StopRequest
from jaxpost.training._progress import Mode, make_progress
from jaxpost.training._run_folder import RunFolder
from jaxpost.training._state import TrainState
from jaxpost.training._step import StepFn, describe_nonfinite, leaf_name
from jaxpost.typing import Batch


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite.

    Attributes:
        step: the optimizer step that failed, counted from 1.
        tensor: what was not finite.
        state: the state when this was noticed: that before the step, or, as steps are
            dispatched ahead, one good step later; None if raised elsewhere.
    """

    def __init__(
        self, step: int, tensor: str, advice: str, state: TrainState | None = None
    ) -> None:
        super().__init__(
            f"Step {step}: {tensor} is not finite, so training stopped before this "
            f"update. {advice}"
        )
        self.step = step
        self.tensor = tensor
        self.state = state

    def add_detail(self, words: str) -> None:
        """Puts a sentence behind the message."""
        self.args = (f"{self.args[0]} {words}",)


def count_tokens(batch: Batch) -> int:
    """Tokens of a host batch that are not padding, over all processes.

    Counts `segment_ids != 0`, or else all of `tokens`, or else rows.
    """
    if "segment_ids" in batch:
        count = int(np.count_nonzero(np.asarray(batch["segment_ids"])))
    elif "tokens" in batch:
        count = int(np.size(batch["tokens"]))
    else:
        count = len(next(iter(batch.values())))
    return count * jax.process_count()


def train(
    step: StepFn | CompiledStep,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    total_steps: int,
    prepare: Callable[[int, TrainState, Batch], Batch] | None = None,
    place: Callable[[Batch], Batch] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    eval_fn: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    eval_at_start: bool = True,
    save_every: int | None = None,
    log_every: int = 1,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    run: RunFolder | None = None,
    callbacks: Sequence[Callback] = (),
    count: Callable[[Batch], int] = count_tokens,
    performance: Performance | None = None,
    host_rng: np.random.Generator | None = None,
    user: Callable[[], Any] | None = None,
    progress: Mode = "auto",
    title: str = "train",
) -> TrainState:
    """Trains from `state.step` to `total_steps`.

    The device is never waited for more than one step behind: numbers of step `n` are
    fetched while step `n + 1` runs. Evaluations and saves wait for their own step.

    Args:
        step: from `compile_step`, or a pure step, which is then compiled with donation.
        state: where to start; donated, so use the returned one.
        batches: iterator of host batches. With `state()` (JSON values) and `restore()`
            its place is saved and restored, with `arrays()` (NumPy arrays by name) also
            what it holds, which `restore` is then given as well; with `epoch` (a float)
            it is logged, and so are `numbers` (floats by name) of its own.
        total_steps: optimizer steps at the end, counted from the run's first.
        prepare: from the number of a step (from 1), the state before it and its host
            batch to the one that is trained on, such as with answers sampled for its
            prompts; a pure function, or a resumed run differs. None takes it as it is.
        place: puts a host batch on devices, such as `parallel.place`; None leaves
            it to `jit`.
        schedule: from steps taken to learning rate, for the log; traceable.
        eval_fn: returns numbers to log; `eval_loss` chooses the best checkpoint.
        eval_every: steps between evaluations; None is only at the end.
        eval_at_start: also evaluate before the first step.
        save_every: steps between checkpoints; None is only at the end. A new best
            `eval_loss` is saved too.
        log_every: steps between logged lines.
        checkpoints: where to save; None saves nothing.
        resume: go on from the newest complete checkpoint, if there is one.
        run: where `metrics.jsonl` goes.
        callbacks: told of logs, evaluations and the end, first process only.
        count: tokens in a host batch.
        performance: adds utilisation to the log and MaxText's line to the output.
        host_rng: NumPy generator whose state is saved and restored with the rest.
        user: JSON value to save in each checkpoint.
        progress: `auto`, `rich`, `plain` or `none`.
        title: shown before the progress.

    Returns:
        The state after `total_steps`.

    Raises:
        ValueError: an interval below 1, or `batches` ended early.
        NonFiniteError: a loss term or gradient was not finite; names the step and the
            first such tensor. Nothing is saved then; earlier checkpoints stay.
        PreemptedError: SIGTERM came; raised after the step under way is saved.
    """
    _check_intervals(log_every=log_every, eval_every=eval_every, save_every=save_every)
    if not isinstance(step, CompiledStep):
        step = compile_step(step)
    batches = iter(batches)
    num_tokens = 0
    if resume and checkpoints is not None and checkpoints.latest() is not None:
        state, num_tokens = _restore(checkpoints, state, batches, host_rng)
    start = int(state.step)
    if run is not None:
        run.truncate(start or -1)  # step 0's evaluation is made anew as well
    loop = _Loop(
        step=step,
        total_steps=total_steps,
        start=start,
        num_tokens=num_tokens,
        rates=_rates(schedule, start, total_steps),
        log_every=log_every,
        run=run,
        checkpoints=checkpoints,
        callbacks=callbacks,
        performance=performance,
        progress=progress,
        title=title,
    )
    try:
        if eval_fn is not None and eval_at_start and start == 0:
            loop.evaluate(0, eval_fn, state)
        state = _run_steps(
            loop,
            state,
            batches,
            prepare=prepare or (lambda number, state, batch: batch),
            place=place or dict,
            count=count,
            eval_fn=eval_fn,
            due=lambda number: (_due(eval_every, number), _due(save_every, number)),
            aside=lambda: _aside(batches, host_rng, user),
        )
        loop.finish(state)
    finally:
        loop.progress.close()
        if checkpoints is not None:
            checkpoints.wait()  # whatever happened, what was begun is finished
    return state


def _run_steps(
    loop: "_Loop", state, batches, *, prepare, place, count, eval_fn, due, aside
) -> TrainState:
    """The steps that are left, each with what falls due after it."""
    total = loop.total_steps
    with StopRequest() as stop:
        for number in range(loop.start + 1, total + 1):
            batch = prepare(number, state, _next(batches, number, total))
            state, metrics = loop.step(state, place(batch))
            extra = dict(getattr(batches, "numbers", {}))
            if (epoch := getattr(batches, "epoch", None)) is not None:
                extra["epoch"] = epoch
            loop.push(number, metrics, count(batch), extra, state)
            evaluates, saves = (True, True) if number == total else due(number)
            asked = number < total and stop.asked(number)
            loop.milestone(
                number, state, eval_fn if evaluates else None, saves or asked, aside
            )
            if asked:
                loop.finish(state)
                raise PreemptedError(number, saved=loop.checkpoints is not None)
    return state


def _check_intervals(**intervals: int | None) -> None:
    for name, interval in intervals.items():
        if interval is not None and interval < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {interval}.")


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def _next(batches: Iterator[Batch], number: int, total_steps: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"batches ended after step {number - 1} of {total_steps}: give more data "
            "or epochs, or fewer steps."
        ) from None


class _Loop:
    """The host's side of a run: what is pending, timed, logged and saved."""

    def __init__(
        self,
        *,
        step,
        total_steps,
        start,
        num_tokens,
        rates,
        log_every,
        run,
        checkpoints,
        callbacks,
        performance,
        progress,
        title,
    ):
        first_process = jax.process_index() == 0
        self.step = step
        self.total_steps = total_steps
        self.start = start
        self.num_tokens = num_tokens
        self.rates = rates
        self.log_every = log_every
        self.run = run
        self.checkpoints = checkpoints
        self.callbacks = callbacks if first_process else ()
        self.performance = performance
        self.progress = make_progress(
            progress if first_process else "none",
            title=title,
            start=start,
            total=total_steps,
        )
        self.best = checkpoints.best_metric() if checkpoints is not None else None
        self.line: dict[str, Any] | None = None  # logged, not yet written
        self.pending = None
        self.eval_metrics: dict[str, float] = {}
        self.eval_step = -1
        self.idle_s = 0.0  # spent since the last log on anything but steps
        self.compile_s = step.compile_s
        self.window_tokens = 0
        self.window_start = time.perf_counter()
        self.window_step = start

    def push(self, number, metrics, tokens, extra, state) -> None:
        """Takes step `number`'s numbers; checks and logs those of the step before."""
        logged = number % self.log_every == 0 or number == self.total_steps
        fetched = metrics if logged else {"nonfinite": metrics["nonfinite"]}
        for value in fetched.values():
            value.copy_to_host_async()
        previous = self.pending
        self.pending = (number, fetched, tokens, extra, tuple(metrics), logged)
        if previous is not None:
            self._finish(previous, state)

    def settle(self, state) -> None:
        """Waits for the newest step's numbers."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._finish(pending, state)

    def _finish(self, pending, state) -> None:
        number, fetched, tokens, extra, names, logged = pending
        values = {name: float(value) for name, value in jax.device_get(fetched).items()}
        if values.pop("nonfinite"):
            self._fail(number, float(fetched["nonfinite"]), names, state)
        self.num_tokens += tokens
        self.window_tokens += tokens
        if not logged:
            return
        self.flush()
        now = time.perf_counter()
        compiling = self.step.compile_s - self.compile_s
        spent = max(now - self.window_start - self.idle_s - compiling, 1e-9)
        steps = number - self.window_step
        tokens_per_s = self.window_tokens / spent
        line = {"step": number, **values}
        if self.rates is not None:
            line["learning_rate"] = float(self.rates[number - 1 - self.start])
        line |= {name: float(value) for name, value in extra.items()}
        line["num_tokens"] = self.num_tokens
        line["tokens/s"] = tokens_per_s
        line["step_time"] = spent / steps
        line["compile/traces"] = self.step.traces
        line["compile/seconds"] = self.step.compile_s
        if self.performance is not None:
            line.update(self.performance.metrics(tokens_per_s))
            if self.performance.print_line:
                tokens_per_step = self.window_tokens / steps
                self.progress.note(self.performance.line(line, tokens_per_step))
        self.line = line
        self.window_tokens, self.idle_s = 0, 0.0
        self.compile_s = self.step.compile_s
        self.window_start, self.window_step = now, number
        self.progress.update(number, {**line, **self.eval_metrics})

    def evaluate(self, number, eval_fn, state) -> bool:
        """Evaluates; True if `eval_loss` is the best so far."""
        start = time.perf_counter()
        values = {name: float(value) for name, value in eval_fn(state).items()}
        self.idle_s += time.perf_counter() - start
        self.eval_metrics, self.eval_step = values, number
        if self.line is None or self.line["step"] != number:
            self.flush()
            self.line = {"step": number, "num_tokens": self.num_tokens}
        self.line |= values
        self.progress.update(number, self.line)
        for callback in self.callbacks:
            callback.on_eval(number, values)
        loss = values.get("eval_loss")
        if loss is None or not np.isfinite(loss):
            return False
        improved = number > 0 and (self.best is None or loss < self.best)
        if improved:
            self.best = loss
        return improved

    def milestone(self, number, state, eval_fn, saving, aside) -> None:
        """Evaluates and saves, if this is the step for it.

        Args:
            number: the step just dispatched.
            state: the state after it.
            eval_fn: what to evaluate with now, or None.
            saving: whether a checkpoint is due; a new best is saved anyhow.
            aside: gives what goes into the checkpoint beside the state.
        """
        saving = saving and self.checkpoints is not None
        if eval_fn is None and not saving:
            return
        self.settle(state)  # nothing unchecked is evaluated or saved
        improved = eval_fn is not None and self.evaluate(number, eval_fn, state)
        if self.checkpoints is None or not (saving or improved):
            return
        start = time.perf_counter()
        self.flush()  # a resumed run expects the lines of every step it skips
        held = aside()
        self.checkpoints.save(
            number,
            state,
            data=held.place,
            arrays=held.arrays,
            host_rng=held.host_rng,
            user={"num_tokens": self.num_tokens, "user": held.user},
            metrics=self.eval_metrics if self.eval_step == number else {},
        )
        self.idle_s += time.perf_counter() - start

    def finish(self, state) -> None:
        """Checks, logs and writes what is left, and tells the callbacks."""
        self.settle(state)
        self.flush()
        for callback in self.callbacks:
            callback.on_end(self.total_steps)

    def flush(self) -> None:
        """Writes the last line; late, so that an evaluation of its step joins it."""
        if self.line is None:
            return
        line, self.line = self.line, None
        if self.run is not None:
            self.run.log_metrics(line)
        if "loss" in line:
            for callback in self.callbacks:
                callback.on_log(line["step"], line)

    def _fail(self, number, code, names, state) -> None:
        parts = {"parameter": state.params, "frozen parameter": state.frozen}
        for kind, path, leaf in (
            (kind, path, leaf)
            for kind, tree in parts.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ):
            if not bool(jnp.all(jnp.isfinite(leaf))):
                tensor = f"{kind} {leaf_name(path)!r}"
                break
        else:
            terms = [name[5:] for name in names if name.startswith("loss/")]
            tensor = describe_nonfinite(code, state.params, terms)
        self.flush()
        advice = "Check the data and weights, or lower the learning rate."
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
            if latest is not None:
                place = self.checkpoints.path(latest)
                advice += f" The last good checkpoint is step {latest}: {place}"
        raise NonFiniteError(number, tensor or "the loss", advice, state)


def _rates(schedule, start: int, total_steps: int) -> np.ndarray | None:
    """Learning rates to come, at once: asking one by one would wait on the device."""
    if schedule is None or total_steps <= start:
        return None
    counts = jnp.arange(start, total_steps)
    return np.broadcast_to(np.asarray(jax.vmap(schedule)(counts)), counts.shape)


class _Aside(NamedTuple):
    """What a checkpoint holds beside the state; see `Checkpoints.save`."""

    place: Any
    arrays: Mapping[str, np.ndarray] | None
    host_rng: np.random.Generator | None
    user: Any


def _aside(batches, host_rng, user) -> _Aside:
    return _Aside(
        batches.state() if hasattr(batches, "state") else None,
        batches.arrays() if hasattr(batches, "arrays") else None,
        host_rng,
        user() if user is not None else None,
    )


def _restore(
    checkpoints: Checkpoints,
    state: TrainState,
    batches: Iterator[Batch],
    host_rng: np.random.Generator | None,
) -> tuple[TrainState, int]:
    restored = checkpoints.restore(state)
    if restored.data is not None:
        if not hasattr(batches, "restore"):
            raise ValueError(
                "The checkpoint holds a place in the data; batches has no restore()."
            )
        arrays = (restored.arrays,) if hasattr(batches, "arrays") else ()
        batches.restore(restored.data, *arrays)  # pyright: ignore[reportAttributeAccessIssue]
    if host_rng is not None and restored.host_rng is not None:
        host_rng.bit_generator.state = restored.host_rng
    info = restored.user or {}
    return restored.state, int(info.get("num_tokens", 0))
