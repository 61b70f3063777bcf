"""Tables, figure and verdicts of the noise lab, from its report alone."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

PLAIN = "bradley_terry"
ROWS = {
    "policy": {
        PLAIN: "DPO",
        "robust_dpo": "robust DPO",
        "r3m": "R³M-DPO",
        "adaptive_scaling": "adaptive DPO",
    },
    "reward": {
        PLAIN: "Bradley–Terry",
        "robust_dpo": "robust reward",
        "r3m": "R³M reward",
        "adaptive_scaling": "adaptive reward",
    },
}
# Okabe and Ito's colours, told apart by most readers.
COLOURS = dict(
    zip(ROWS["policy"], ("#000000", "#D55E00", "#0072B2", "#CC79A7"), strict=True)
)


def names_of(report: dict[str, Any]) -> list[str]:
    return [s["name"] for s in report["lab"]["scenarios"]]


def numbers(report, model: str, method: str, scenario: str, what: str) -> np.ndarray:
    """One number per seed, float64 `[R]`."""
    place = names_of(report).index(scenario)
    rows = report["models"][model]["methods"][method]
    return np.asarray(rows[place][what], np.float64)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean difference over seeds with its 95% interval (Student's t, paired)."""
    difference = a - b
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return mean, -math.inf, math.inf
    error = float(difference.std(ddof=1)) / math.sqrt(count)
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    return mean, mean - half, mean + half


def gain(report, model: str, method: str, scenario: str, what: str = "accuracy"):
    """`paired` of a method against the plain loss."""
    return paired(
        numbers(report, model, method, scenario, what),
        numbers(report, model, PLAIN, scenario, what),
    )


def print_tables(report: dict[str, Any]) -> None:
    import rich.console
    import rich.table

    console = rich.console.Console(width=200)
    seeds = len(report["lab"]["seeds"])
    for model, rows in ROWS.items():
        count = report["models"][model]["parameters"]
        table = rich.table.Table(
            title=f"{model}, {count} parameters: accuracy on clean held-out pairs, %, "
            f"mean ± std of {seeds} seeds"
        )
        table.add_column("labels")
        for title in rows.values():
            table.add_column(title, justify="right")
        for title in list(rows.values())[1:]:
            table.add_column(f"{title} − plain", justify="right")
        for scenario in names_of(report):
            cells = []
            for method in rows:
                found = 100 * numbers(report, model, method, scenario, "accuracy")
                cells.append(f"{found.mean():.2f} ± {found.std(ddof=1):.2f}")
            for method in list(rows)[1:]:
                cells.append(points(gain(report, model, method, scenario)))
            table.add_row(scenario, *cells)
        console.print(table)
    for model in ROWS:
        table = rich.table.Table(title=f"{model}: outliers by R³M's delta, means")
        columns = [
            f"{what}, {where}"
            for where in ("fitted", "held out")
            for what in ("auroc", "auroc of -margin", "flagged", "precision", "recall")
        ]
        table.add_column("labels")
        for title in columns:
            table.add_column(title, justify="right")
        for scenario in names_of(report):
            cells = [numbers(report, model, "r3m", scenario, what) for what in columns]
            table.add_row(scenario, *(f"{c.mean():.3f}" for c in cells))
        console.print(table)


def markdown_table(report: dict[str, Any], model: str) -> str:
    """Accuracy of the plain loss and what the others add: of docs/preferences.md."""
    rows = ROWS[model]
    others = list(rows)[1:]
    titles = ["labels", f"{rows[PLAIN]}, %", *(f"{rows[m]}, points" for m in others)]
    lines = [titles, ["---"] * len(titles)]
    for scenario in names_of(report):
        found = 100 * numbers(report, model, PLAIN, scenario, "accuracy")
        gains = [points(gain(report, model, method, scenario)) for method in others]
        plain = f"{found.mean():.2f} ± {found.std(ddof=1):.2f}"
        lines.append([scenario, plain, *gains])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(interval: Sequence[float]) -> str:
    """A difference of shares, in points."""
    mean, low, high = (100 * x for x in interval)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdict(interval: Sequence[float]) -> str:
    if interval[1] > 0:
        return "reproduced"
    if interval[2] < 0:
        return "not reproduced, the opposite"
    return "not reproduced, no difference that the seeds can tell"


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """One honest sentence per claim and model."""
    names = names_of(report)
    lines = []
    for model, rows in ROWS.items():
        plain = rows[PLAIN]
        head = f"{model} model:"
        main = "flip 30%"
        found = gain(report, model, "r3m", main)
        lines.append(
            f"{head} R³M beats {plain} on clean pairs at 30% flipped labels: "
            f"{verdict(found)} ({points(found)} points)."
        )
        lines.append(f"{head} {_outlier_line(report, model, main)}")
        lines.append(f"{head} {_sweep_line(report, model)}")
        if "clearest 10%" in names:
            found = gain(report, model, "r3m", "clearest 10%")
            lines.append(
                f"{head} R³M beats {plain} where the clearest 10% of labels are "
                f"flipped: {verdict(found)} ({points(found)} points)."
            )
        found = gain(report, model, "robust_dpo", main)
        lines.append(
            f"{head} {rows['robust_dpo']} beats {plain} at 30% flipped labels: "
            f"{verdict(found)} ({points(found)} points)."
        )
        lines.append(f"{head} {_adaptive_line(report, model)}")
        shorter = "accuracy, better is shorter"
        best = {
            rows[method]: gain(report, model, method, "length 30%", shorter)
            for method in list(rows)[1:]
        }
        told = "; ".join(f"{name} {points(found)}" for name, found in best.items())
        lines.append(
            f"{head} with 30% of labels decided by length, on pairs whose better "
            f"answer is shorter, points over {plain}: {told}."
        )
    offered = ", ".join(f"{x:g}" for x in report["lab"]["l2"])
    lines.append(
        f"Every loss could take a weight penalty of {offered}; what is left of R³M's "
        "gains where both may take larger ones: --penalties."
    )
    return lines


def penalty_lines(report: dict[str, Any]) -> list[str]:
    """What is left of R³M's gain when both may take a larger penalty."""
    lines = []
    for model, rows in ROWS.items():
        for place, scenario in enumerate(names_of(report)):
            methods = report["models"][model]["methods"]
            plain, robust = (methods[m][place]["setting"] for m in (PLAIN, "r3m"))
            found = gain(report, model, "r3m", scenario)
            lines.append(
                f"{model} model, {scenario}: {rows['r3m']} ({robust}) minus "
                f"{rows[PLAIN]} ({plain}): {points(found)} points."
            )
    return lines


def _outlier_line(report, model: str, scenario: str) -> str:
    def mean(what: str, method: str = "r3m") -> float:
        return float(numbers(report, model, method, scenario, what).mean())

    plain = ROWS[model][PLAIN]
    fitted, held = mean("auroc, fitted"), mean("auroc, held out")
    word = "reproduced" if min(fitted, held) >= 0.9 else "not reproduced"
    return (
        f"R³M's delta names the flipped pairs at 30% flipped labels (AUROC of at least "
        f"0.9): {word} (AUROC {fitted:.3f} fitted, {held:.3f} held out; precision "
        f"{mean('precision, fitted'):.2f}, recall {mean('recall, fitted'):.2f} of "
        f"delta > 0, fitted). Sorting by {plain}'s own margin gives "
        f"{mean('auroc of -margin, fitted', PLAIN):.3f} and "
        f"{mean('auroc of -margin, held out', PLAIN):.3f}."
    )


def sweep(report) -> list[tuple[int, str]]:
    """Pairs per parameter and scenario of 30% flips, ascending."""
    return sorted(
        (s["pairs_per_parameter"], s["name"])
        for s in report["lab"]["scenarios"]
        if s["kind"] == "flips" and abs(s["rate"] - 0.3) < 1e-9
    )


def _sweep_line(report, model: str) -> str:
    cells, holds = [], []
    for count, scenario in sweep(report):
        found = gain(report, model, "r3m", scenario)
        auroc = float(numbers(report, model, "r3m", scenario, "auroc, fitted").mean())
        cells.append(f"{count}: {points(found)}, AUROC {auroc:.2f}")
        if found[1] > 0:
            holds.append(str(count))
    where = ", ".join(holds) or "none of them"
    return (
        "R³M minus plain by pairs per parameter at 30% flipped labels: "
        f"{'; '.join(cells)}. The gain holds at {where}."
    )


def _adaptive_line(report, model: str) -> str:
    accuracy = gain(report, model, "adaptive_scaling", "strength")
    what = "reward correlation"
    correlation = gain(report, model, "adaptive_scaling", "strength", what)
    mean, low, high = correlation
    return (
        f"adaptive scaling beats {ROWS[model][PLAIN]} where preferences differ in "
        f"strength: accuracy {verdict(accuracy)} ({points(accuracy)} points); "
        f"correlation with the true reward {verdict(correlation)} ({mean:+.4f} "
        f"[{low:+.4f}, {high:+.4f}])."
    )


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy by flip rate, R³M's gain and its AUROC by pairs per parameter."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    flips = sorted(
        (s["rate"], s["name"])
        for s in report["lab"]["scenarios"]
        if s["kind"] == "flips" and "," not in s["name"]
    )
    settings = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, grid = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
        for (model, rows), axes in zip(ROWS.items(), grid, strict=True):
            for method, title in rows.items():
                found = [
                    100 * numbers(report, model, method, s, "accuracy")
                    for _, s in flips
                ]
                axes[0].errorbar(
                    [100 * rate for rate, _ in flips],
                    [x.mean() for x in found],
                    [x.std(ddof=1) for x in found],
                    color=COLOURS[method],
                    label=title,
                    capsize=2,
                    linewidth=1.2,
                )
            _draw_sweep(report, model, axes)
            axes[0].set(
                xlabel="flipped labels, %", ylabel=f"{model}: clean accuracy, %"
            )
            axes[0].legend(frameon=False, fontsize=8)
        for axes in grid.flat:
            axes.grid(color="#dddddd", linewidth=0.6)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _draw_sweep(report, model: str, axes) -> None:
    counts = [count for count, _ in sweep(report)]
    for method in list(ROWS[model])[1:]:
        found = [gain(report, model, method, name) for _, name in sweep(report)]
        means, lows, highs = 100 * np.asarray(found).T
        axes[1].plot(counts, means, "o-", color=COLOURS[method], markersize=3)
        axes[1].fill_between(counts, lows, highs, color=COLOURS[method], alpha=0.15)
    axes[1].axhline(0.0, color="#999999", linewidth=0.8)
    axes[1].set(xlabel="pairs per parameter, 30% flipped", ylabel="points over plain")
    lines = (("r3m", "auroc, {}", "-"), (PLAIN, "auroc of -margin, {}", "--"))
    for method, name, line in lines:
        for where, marker in (("fitted", "o"), ("held out", "s")):
            found = [
                numbers(report, model, method, s, name.format(where)).mean()
                for _, s in sweep(report)
            ]
            label = "R³M delta" if method == "r3m" else "plain margin"
            axes[2].plot(
                counts,
                found,
                f"{marker}{line}",
                color=COLOURS[method],
                markersize=3,
                label=f"{label}, {where}",
            )
    axes[2].set(xlabel="pairs per parameter, 30% flipped", ylabel="AUROC of flips")
    axes[2].legend(frameon=False, fontsize=8)
    for ax in axes[1:]:
        ax.set_xscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_xticks([], minor=True)
