"""Solvers compared over problems: performance profiles, and curves of convergence.

Takes numbers by name; knows no solver. Figures need matplotlib (extra `report`).
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.reports._curves import COLORS


class Profile(NamedTuple):
    """Shares of problems solved within a factor of the best solver.

    Fields:
        factors: where a share changes, ascending from 1, float64 `[K]`.
        shares: by solver, in [0, 1], float64 `[K]`: of problems at most `factors[k]`
            times as costly as for the best; a step function, continuous from the right.
    """

    factors: np.ndarray
    shares: dict[str, np.ndarray]


def performance_profile(costs: Mapping[str, Sequence[float]]) -> Profile:
    """How often each solver is within a factor of the best one.

    Args:
        costs: by solver, one positive number per problem in the same order, such as
            seconds; `inf` where it was not solved.

    Returns:
        The profile. A problem that nobody solves counts among the problems.

    Raises:
        ValueError: no solver or no problem, lists of unlike length, or a cost that is
            not positive.

    Source: Dolan & More (2002), "Benchmarking optimization software with performance
        profiles".
    """
    if not costs or not all(map(len, costs.values())):
        raise ValueError("costs must hold a solver and a problem at least.")
    lengths = {name: len(column) for name, column in costs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"costs must be of the same problems, got {lengths} of them.")
    table = np.asarray(list(costs.values()), np.float64)  # [solvers, problems]
    if not np.all(table > 0.0):
        raise ValueError("costs must be positive, inf where a problem is not solved.")
    best = table.min(axis=0)
    ratios = np.full_like(table, np.inf)
    np.divide(table, best, out=ratios, where=np.isfinite(table))
    factors = np.unique(np.append(ratios[np.isfinite(ratios)], 1.0))
    shares = (ratios[:, :, None] <= factors).mean(axis=1)
    return Profile(factors, dict(zip(costs, shares, strict=True)))


def draw_profiles(
    costs: Mapping[str, Mapping[str, Sequence[float]]], path: pathlib.Path
) -> None:
    """Draws a performance profile for each measure of cost into an SVG file.

    Args:
        costs: by what is measured (the title of a panel), what `performance_profile`
            takes.
        path: of the file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    profiles = {title: performance_profile(table) for title, table in costs.items()}

    def fill(panels: Sequence[Any]) -> None:
        for axes, (title, profile) in zip(panels, profiles.items(), strict=True):
            last = 2.0 ** math.ceil(math.log2(max(profile.factors[-1], 2.0)))
            for index, (name, shares) in enumerate(profile.shares.items()):
                axes.step(
                    [*profile.factors, last],
                    [*shares, shares[-1]],
                    where="post",
                    color=COLORS[index % len(COLORS)],
                    label=name,
                )
            axes.set_xscale("log", base=2)
            axes.set(title=title, xlim=(1.0, last), ylim=(0.0, 1.02))
            axes.set(xlabel="factor of the best", ylabel="share of problems solved")
        panels[-1].legend(fontsize=7, loc="lower right")

    _save(path, len(profiles), fill)


def draw_convergence(
    residuals: Mapping[str, Sequence[Sequence[float]]], path: pathlib.Path
) -> None:
    """Draws the KKT residual over the iterations, a panel for each solver.

    Args:
        residuals: by solver, one list per problem, from the start to the end.
        path: of the SVG file.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def fill(panels: Sequence[Any]) -> None:
        for index, (name, curves) in enumerate(residuals.items()):
            axes = panels[index]
            for curve in curves:
                shown = np.asarray(curve, np.float64)
                shown = np.where(shown > 0.0, shown, np.nan)  # log axis
                color = COLORS[index % len(COLORS)]
                axes.plot(shown, color=color, linewidth=0.9, alpha=0.7)
            axes.set_yscale("log")
            axes.set(title=name, xlabel="iteration", ylabel="KKT residual")

    _save(path, len(residuals), fill)


def _save(path: pathlib.Path, panels: int, fill: Any) -> None:
    """A row of panels, filled and written; the same bytes for the same content."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures are drawn with matplotlib, which is not installed: "
            "pip install 'jaxpost[report]' (or pip install matplotlib)."
        ) from error
    settings: dict[Any, Any] = {
        "svg.hashsalt": "jaxpost",
        "svg.fonttype": "none",
        "font.size": 9.0,
    }
    with matplotlib.rc_context(settings):
        columns = min(panels, 3)
        rows = math.ceil(panels / columns)
        figure = Figure(figsize=(3.8 * columns, 3.0 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        fill(grid[:panels])
        for axes in grid:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
        for axes in grid[panels:]:
            axes.set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
