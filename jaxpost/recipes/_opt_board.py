"""What `jaxpost opt` shows: a live table by method, plain lines elsewhere."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Line = Mapping[str, Any]
Mode = Literal["auto", "rich", "plain", "none"]

RECENT = 8  # solves shown below the table


class Board(Protocol):
    """Shows how far a run is."""

    def note(self, text: str) -> None: ...

    def begin(self, name: str, method: str) -> None: ...

    def add(self, line: Line) -> None: ...

    def close(self) -> None: ...


def make_board(
    mode: Mode, methods: Sequence[str], total: int, done: Sequence[Line]
) -> Board:
    """A board for `total` solves, some of which an earlier run has made.

    Args:
        mode: `rich` draws tables; `plain` prints lines; `auto` is `rich` on a terminal
            and `plain` elsewhere; `none` is silent.
        methods: rows of the table.
        total: solves of the whole run.
        done: what is known already, in any order.
    """
    if mode == "auto":
        mode = "rich" if sys.stdout.isatty() else "plain"
    if mode == "rich":
        return _Live(methods, total, done)
    return _Lines(total, len(done), quiet=mode == "none")


class _Lines:
    def __init__(self, total: int, done: int, quiet: bool):
        self._total, self._first, self._done, self._quiet = total, done, done, quiet
        self._began = time.monotonic()

    def note(self, text):
        if not self._quiet:
            print(text, flush=True)

    def begin(self, name, method):
        pass

    def add(self, line):
        self._done += 1
        spent = time.monotonic() - self._began
        left = spent / (self._done - self._first) * (self._total - self._done)
        cells = "  ".join(recent_cells(line))
        self.note(f"{self._done}/{self._total}  {cells}  left {left:.0f} s")

    def close(self):
        pass


class _Live:
    """A table of methods, the last solves, and a bar with the time left."""

    def __init__(self, methods: Sequence[str], total: int, done: Sequence[Line]):
        import rich.live
        import rich.progress as bars

        self._lines: dict[str, list[Line]] = {name: [] for name in methods}
        for line in done:
            self._lines[line["method"]].append(line)
        self._recent: list[Line] = []
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._task = self._bar.add_task("solving", total=total, completed=len(done))
        self._live = rich.live.Live(self._draw(), refresh_per_second=4)
        self._live.start()

    def note(self, text):
        self._live.console.print(text, markup=False, highlight=False)

    def begin(self, name, method):
        self._bar.update(self._task, description=f"{name} by {method}")

    def add(self, line):
        self._lines[line["method"]].append(line)
        self._recent = [*self._recent, line][-RECENT:]
        self._bar.advance(self._task)
        self._live.update(self._draw())

    def close(self):
        self._live.stop()

    def _draw(self):
        import rich.console
        import rich.table

        recent = rich.table.Table(box=None, show_header=False)
        for line in self._recent:
            recent.add_row(*recent_cells(line))
        return rich.console.Group(summary_table(self._lines), recent, self._bar)


def recent_cells(line: Line) -> list[str]:
    """A solve in a few words."""
    if "iterations" not in line:
        return [line["problem"], line["method"], line["status"], line["explained"]]
    return [
        line["problem"],
        line["method"],
        line["status"],
        f"{line['iterations']} its",
        f"KKT {number(line['kkt_residual'], '.1e')}",
        f"f {number(line['objective'], '.8g')}",
        f"{1e3 * line['solve_s']:.3g} ms",
    ]


def summary_table(lines: Mapping[str, Sequence[Line]]) -> Any:
    """Solved, iterations, evaluations and time of each method, a rich table.

    Medians are over the solved problems; times, in seconds, are summed over all.
    """
    import rich.table

    # Without lines, and close together: nine columns fit into 80 characters.
    table = rich.table.Table(box=None, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    headings = ("solved", "iters", "evals", "grads", "inner", "KKT", "time", "compile")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for method, found in lines.items():
        ran = [line for line in found if "iterations" in line]
        solved = [line for line in ran if line["status"] == "converged"]
        table.add_row(
            method,
            f"{len(solved)}/{len(ran)}",
            _median(solved, "iterations", ".3g"),
            _median(solved, "objective_evaluations", ".3g"),
            _median(solved, "gradient_evaluations", ".3g"),
            _median(solved, "inner_steps", ".3g"),
            _median(solved, "kkt_residual", ".0e"),
            f"{sum(line['solve_s'] for line in ran):.3g} s",
            f"{sum(line['compile_s'] for line in ran):.0f} s",
        )
    return table


def number(value: float | None, form: str) -> str:
    """`format(value, form)`, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def _median(lines: Sequence[Line], name: str, form: str) -> str:
    values = [line[name] for line in lines]
    return format(statistics.median(values), form) if values else "-"
