"""Live progress in a terminal; plain lines where there is none."""

import sys
import time
from collections.abc import Mapping
from typing import Literal, Protocol

Mode = Literal["auto", "rich", "plain", "none"]


class Progress(Protocol):
    """What the loop shows its state on."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_progress(
    mode: Mode,
    *,
    title: str,
    start: int,
    total: int,
    plain_interval_s: float = 5.0,
) -> Progress:
    """Progress over steps `start` to `total`.

    Args:
        mode: `rich` draws a bar; `plain` prints lines; `auto` is `rich` on a terminal
            and `plain` elsewhere; `none` is silent.
        title: what is running.
        start: steps already taken.
        total: steps at the end.
        plain_interval_s: plain lines come at most this often, seconds (the last one
            always comes).

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "auto":
        mode = "rich" if sys.stdout.isatty() else "plain"
    if mode == "rich":
        return _Rich(title, start, total)
    if mode == "plain":
        return _Plain(title, start, total, plain_interval_s)
    if mode == "none":
        return _Silent()
    raise ValueError(f"progress must be auto, rich, plain or none; got {mode!r}.")


class _Silent:
    def update(self, step, metrics):
        del step, metrics

    def note(self, text):
        del text

    def close(self):
        pass


class _Plain:
    def __init__(self, title, start, total, interval_s):
        self._title, self._start, self._total = title, start, total
        self._interval_s = interval_s
        self._began = time.monotonic()
        self._last = float("-inf")

    def update(self, step, metrics):
        now = time.monotonic()
        if now - self._last < self._interval_s and step < self._total:
            return
        self._last = now
        done = max(step - self._start, 1)
        left = (now - self._began) / done * (self._total - step)
        shown = "  ".join(_shown(metrics))
        self.note(f"{self._title} {step}/{self._total}  {shown}  left {_clock(left)}")

    def note(self, text):
        print(text, flush=True)

    def close(self):
        pass


class _Rich:
    def __init__(self, title, start, total):
        import rich.progress as bars

        self._bar = bars.Progress(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[shown]}"),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._task = self._bar.add_task(title, total=total, completed=start, shown="")
        self._bar.start()

    def update(self, step, metrics):
        self._bar.update(self._task, completed=step, shown="  ".join(_shown(metrics)))

    def note(self, text):
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self):
        self._bar.stop()


def _shown(metrics: Mapping[str, float]) -> list[str]:
    parts = [
        f"{name} {metrics[name]:.4f}"
        for name in ("loss", "eval_loss")
        if name in metrics
    ]
    if "tokens/s" in metrics:
        parts.append(f"{metrics['tokens/s']:,.0f} tokens/s")
    return parts


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
