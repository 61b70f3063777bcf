"""Table, figure and verdicts of the discriminative claims, from their report alone."""

import pathlib
from typing import Any

import numpy as np
from _noise_lab_report import paired, points, verdict

ROWS: tuple[str, ...] = ("SFT", "SFT, same epochs", "DFT", "DFT2", "SFT→DPO")
# Okabe and Ito's colours, told apart by most readers.
COLOURS: dict[str, str] = dict(
    zip(ROWS, ("#000000", "#999999", "#D55E00", "#0072B2", "#CC79A7"), strict=True)
)
PAIRS = (
    ("DFT", "SFT", "on the same tokens"),
    ("DFT2", "SFT", "on the same tokens"),
    ("DFT", "SFT, same epochs", "after the same epochs, which take DFT more tokens"),
    ("DFT2", "SFT, same epochs", "after the same epochs, which take DFT2 more tokens"),
    ("DFT", "SFT→DPO", "on the same tokens"),
    ("DFT2", "SFT→DPO", "on the same tokens"),
)


def numbers(report: dict[str, Any], row: str, what: str) -> np.ndarray:
    """`exact match` `[seeds]`; `right` or `negatives`, log-probs `[looks, seeds]`."""
    return np.asarray(report["rows"][row][what], np.float64)


def change(report: dict[str, Any], row: str, what: str) -> tuple[float, float, float]:
    """End of training minus its start, mean over seeds with its 95% interval."""
    found = numbers(report, row, what)
    return paired(found[-1], found[0])


def cells(report: dict[str, Any], row: str) -> list[str]:
    """One row of the table."""
    match = 100 * numbers(report, row, "exact match")
    against = "" if row == "SFT" else points(paired(match / 100, sft(report) / 100))
    right, negatives = (numbers(report, row, n) for n in ("right", "negatives"))
    moved = [f"{x[0].mean():.2f} → {x[-1].mean():.2f}" for x in (right, negatives)]
    return [row, f"{match.mean():.1f} ± {match.std(ddof=1):.1f}", against, *moved]


def sft(report: dict[str, Any]) -> np.ndarray:
    """Exact match of SFT on the same tokens, %."""
    return 100 * numbers(report, "SFT", "exact match")


HEADINGS = (
    "",
    "exact match, %",
    "− SFT, points",
    "log-prob of right answers",
    "of negatives",
)


def print_table(report: dict[str, Any]) -> None:
    import rich.console
    import rich.table

    lab = report["lab"]
    table = rich.table.Table(
        title=f"{lab['steps']} steps of {lab['sizes']['sequences']} texts, mean ± std "
        f"of {len(lab['seeds'])} seeds; base model {100 * report['base']:.1f}%"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for row in ROWS:
        table.add_row(*cells(report, row))
    rich.console.Console(width=140).print(table)


def markdown_table(report: dict[str, Any]) -> str:
    """The table of the guide."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS)]
    lines += [cells(report, row) for row in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """One honest sentence per claim."""
    lines = []
    for row, other, how in PAIRS:
        found = paired(*(numbers(report, r, "exact match") for r in (row, other)))
        lines.append(
            f"{row} beats {other} on held-out problems {how}: {verdict(found)} "
            f"({points(found)} points)."
        )
    for row, word, sign in (
        ("SFT", "rises under SFT", 1),
        ("DFT", "falls under DFT", -1),
        ("DFT2", "falls under DFT2", -1),
    ):
        mean, low, high = change(report, row, "negatives")
        signed = (mean, low, high) if sign > 0 else (-mean, -high, -low)
        lines.append(
            f"The likelihood of negatives {word}: {verdict(signed)} (log-prob of an "
            f"answer {mean:+.2f} [{low:+.2f}, {high:+.2f}] nats)."
        )
    drop = paired(*(numbers(report, row, "negatives")[-1] for row in ("SFT", "DFT")))
    mean, low, high = drop
    lines.append(
        f"It ends lower under DFT than under SFT: {verdict(drop)} (by {mean:.2f} "
        f"[{low:.2f}, {high:.2f}] nats)."
    )
    return [*lines, rates_line(report)]


def rates_line(report: dict[str, Any]) -> str:
    """Which learning rates were chosen, and which of them might lie beyond the grid."""
    offered = report["lab"]["rates"]
    chosen = report["rates"]
    last = {row: np.atleast_1d(rates)[-1] for row, rates in chosen.items()}
    edge = [row for row, rate in last.items() if rate in (offered[0], offered[-1])]
    told = ", ".join(
        f"{row} {' then '.join(f'{r:g}' for r in np.atleast_1d(rates))}"
        for row, rates in chosen.items()
    )
    return (
        f"Learning rates, chosen in another world of {', '.join(map(str, offered))}: "
        f"{told}; at the edge of what was offered: {', '.join(edge) or 'none'}."
    )


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Likelihood of negatives and of right answers by tokens; exact match by row."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings: Any = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        for row in ROWS:
            for ax, what in zip(axes, ("negatives", "right"), strict=False):
                _draw_course(ax, report, row, what)
        axes[0].set_ylabel("log-prob of negatives, nats per answer")
        axes[1].set_ylabel("log-prob of right answers, nats per answer")
        for ax in axes[:2]:
            ax.set_xlabel("share of the tokens")
        axes[0].legend(frameon=False, fontsize=8)
        _draw_matches(axes[2], report)
        for ax in axes:
            ax.grid(color="#dddddd", linewidth=0.6)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _draw_course(ax, report, row: str, what: str) -> None:
    found = numbers(report, row, what)
    lab = report["lab"]
    share = 1.0
    if row == "SFT, same epochs":
        share = (lab["steps"] // (1 + lab["sizes"]["negatives"])) / lab["steps"]
    at = np.linspace(0.0, share, len(found))
    mean, std = found.mean(axis=1), found.std(axis=1, ddof=1)
    ax.plot(at, mean, color=COLOURS[row], label=row, linewidth=1.2)
    ax.fill_between(at, mean - std, mean + std, color=COLOURS[row], alpha=0.15)


def _draw_matches(ax, report) -> None:
    places = np.arange(len(ROWS))
    for place, row in enumerate(ROWS):
        match = 100 * numbers(report, row, "exact match")
        ax.bar(place, match.mean(), color=COLOURS[row], alpha=0.5, width=0.7)
        ax.plot(
            np.full(len(match), place), match, "o", color=COLOURS[row], markersize=3
        )
    ax.axhline(100 * report["base"], color="#555555", linewidth=0.8, linestyle="--")
    ax.set_xticks(places, ROWS, rotation=25, ha="right")
    ax.set_ylabel("exact match on held-out problems, %; dashed: base")
