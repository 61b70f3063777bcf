"""Curves of metrics as inline SVG, by matplotlib (extra `report`), no display needed.

All words are left to the page: the SVG holds lines and tick numbers only.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpost.reports._run import Run

COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
)
MAX_POINTS = 1500
EVAL = "eval_"


class Curve(NamedTuple):
    """One line of a panel.

    Fields:
        run: index of the run, which gives the colour.
        held_out: whether it is an `eval_` metric, drawn dashed with dots.
        steps, values: its points; values that are not finite leave a gap.
    """

    run: int
    held_out: bool
    steps: list[int]
    values: list[float]


def color_of(run: int) -> str:
    """The colour of a run, the same in every panel."""
    return COLORS[run % len(COLORS)]


def collect(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """Curves by panel: all runs on the same axes, `eval_x` beside `x`.

    Metrics that were logged once, by every run that has them, get no panel.
    """
    panels: dict[str, list[Curve]] = {}
    for index, run in enumerate(runs):
        for name in run.metric_names():
            held_out = name.startswith(EVAL)
            curve = Curve(index, held_out, *run.series(name))
            panels.setdefault(name.removeprefix(EVAL), []).append(curve)
    return {
        title: curves
        for title, curves in panels.items()
        if any(len(curve.steps) > 1 for curve in curves)
    }


def draw(curves: Sequence[Curve], *, identity: str) -> str:
    """One panel as an `<svg>` element.

    Args:
        curves: what to draw.
        identity: seeds the element ids, which must differ within a page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "Reports draw their curves with matplotlib, which is not installed: "
            "pip install 'jaxpost[report]' (or pip install matplotlib)."
        ) from error
    settings: dict[Any, Any] = {
        "svg.hashsalt": identity,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.0,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            steps, values = _thin(curve.steps, curve.values)
            alone = len(steps) == 1
            axes.plot(
                steps,
                values,
                color=color_of(curve.run),
                linestyle="--" if curve.held_out else "-",
                marker="o" if curve.held_out or alone else None,
                markersize=3,
                linewidth=1.4,
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        text = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=empty)
    svg = text.getvalue()
    # Only the element: the XML prologue has no place inside a page.
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _thin(
    steps: Sequence[int], values: Sequence[float]
) -> tuple[list[int], list[float]]:
    """At most about `MAX_POINTS` points: means of equal runs of points, last kept."""
    shown = [value if math.isfinite(value) else math.nan for value in values]
    size = math.ceil(len(shown) / MAX_POINTS)
    if size <= 1:
        return list(steps), shown
    starts = range(0, len(shown), size)
    parts = [list(itertools.islice(shown, s, s + size)) for s in starts]
    ends = [steps[min(s + size, len(shown)) - 1] for s in starts]
    return ends, [sum(part) / len(part) for part in parts]
