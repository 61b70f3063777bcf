"""What the control recipe found: a table, a figure, sentences. Numbers in, text out."""

import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.recipes._control_preferences import Noise

PLAIN = "bradley_terry"
SOLVED = -300.0
"""Return of a policy that swings up and holds: seeds do so or fail, few in between."""
SHOWN = {
    "bradley_terry": "Bradley–Terry",
    "robust_dpo": "robust DPO",
    "hinge": "hinge",
    "ipo": "IPO",
    "r3m": "R³M",
    "adaptive_scaling": "adaptive",
}
# Okabe and Ito's colours, told apart by most readers.
_STYLES = {
    "bradley_terry": ("#000000", "o"),
    "r3m": ("#0072B2", "s"),
    "adaptive_scaling": ("#CC79A7", "^"),
    "robust_dpo": ("#D55E00", "v"),
    "hinge": ("#009E73", "D"),
    "ipo": ("#E69F00", "P"),
}


class Cell(NamedTuple):
    """One noise and one loss; lists have a number per seed.

    Fields:
        noise: how the labels were made.
        loss: its name.
        settings: those chosen on the noisy validation pairs.
        flipped: share of training labels that are not the true ones.
        accuracy: on clean test pairs.
        correlation: Pearson's, of learned and true returns of the test segments.
        returns: true return of the policy trained on the learned reward.
    """

    noise: Noise
    loss: str
    settings: dict[str, Any]
    flipped: list[float]
    accuracy: list[float]
    correlation: list[float]
    returns: list[float]


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as plain values, with the noise's name and rate."""
    return [
        {**cell._asdict(), "noise": cell.noise.name, "rate": cell.noise.rate}
        for cell in cells
    ]


def spread(
    values: Sequence[float] | np.ndarray, digits: int = 0, scale: float = 1.0
) -> str:
    """`mean ± std`, the latter with `n - 1`, where there is more than one."""
    scaled = scale * np.asarray(values, float)
    text = f"{scaled.mean():.{digits}f}"
    return text + (f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else "")


def table(cells: Sequence[Cell]) -> str:
    """Markdown."""
    lines = [
        "| noise | labels wrong, % | loss | chosen | accuracy, % | correlation | "
        f"true return | above {SOLVED:.0f} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        chosen = ", ".join(f"{k} {v:g}" for k, v in cell.settings.items())
        columns = [
            str(cell.noise),
            f"{100 * np.mean(cell.flipped):.0f}",
            SHOWN[cell.loss],
            chosen,
            spread(cell.accuracy, 1, 100.0),
            spread(cell.correlation, 3),
            spread(cell.returns),
            f"{np.sum(np.array(cell.returns) > SOLVED)} of {len(cell.returns)}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def sentences(cells: Sequence[Cell]) -> list[str]:
    """Each loss against Bradley-Terry under each noise, paired by seed; the claims."""
    found = []
    names = [n for n in dict.fromkeys(cell.loss for cell in cells) if n != PLAIN]
    kinds = dict.fromkeys(cell.noise.name for cell in cells)
    for name, kind in itertools.product(names, kinds):
        mine, plain = _against_plain(cells, name, kind)
        found.append(
            f"{SHOWN[name]} against Bradley–Terry, {kind} labels: return "
            f"{_compared(mine, plain, 'returns')}; clean accuracy "
            f"{_compared(mine, plain, 'accuracy')}."
        )
    if "r3m" in names:
        found += _claim_of_r3m(cells)
    if "adaptive_scaling" in names and "clean" in kinds:
        mine, plain = _against_plain(cells, "adaptive_scaling", "clean")
        found.append(
            "Claim of arXiv 2406.02764 (adaptive scaling: higher return at about the "
            f"same accuracy, no noise added): {_held(mine, plain, 'returns')}."
        )
    return found


def _claim_of_r3m(cells: Sequence[Cell]) -> list[str]:
    mine, plain = [], []
    shown = []
    for kind in ("stochastic", "myopic", "irrational"):
        here = _against_plain(cells, "r3m", kind)
        if here[0] and paired(*here, "returns")[1] > 0.0:
            shown.append(kind)
        mine, plain = mine + here[0], plain + here[1]
    return [
        "Claim of arXiv 2406.15568 (R³M above the plain loss under all three noises, "
        f"but for irrational 1/3): mean return is higher in {_wins(mine, plain)} of "
        f"{len(mine)} noisy cells; beyond the spread of the seeds under "
        f"{' and '.join(shown) or 'none of them'}."
    ] * bool(mine)


def _against_plain(
    cells: Sequence[Cell], name: str, kind: str
) -> tuple[list[Cell], list[Cell]]:
    """The cells of one loss and noise, and Bradley-Terry's at the same rates."""
    of = {(cell.loss, cell.noise): cell for cell in cells}
    mine = [c for c in cells if c.loss == name and c.noise.name == kind]
    return mine, [of[PLAIN, cell.noise] for cell in mine]


def _wins(mine: Sequence[Cell], plain: Sequence[Cell], field: str = "returns") -> int:
    pairs = zip(mine, plain, strict=True)
    return sum(
        bool(np.mean(getattr(a, field)) > np.mean(getattr(b, field))) for a, b in pairs
    )


def _held(mine: Sequence[Cell], plain: Sequence[Cell], field: str) -> str:
    """The verdict of one comparison."""
    _, low, high = paired(mine, plain, field)
    if np.isnan(low):
        return "one seed shows nothing"
    if low > 0.0:
        return "higher"
    return "lower" if high < 0.0 else "no difference shown"


def _compared(mine: Sequence[Cell], plain: Sequence[Cell], field: str) -> str:
    mean, low, high = paired(mine, plain, field)
    scale, digits = (100.0, 1) if field == "accuracy" else (1.0, 0)
    mean, low, high = (f"{scale * x:+.{digits}f}" for x in (mean, low, high))
    return (
        f"{_held(mine, plain, field)} ({mean}, 95% interval {low} to {high}; "
        f"higher on average at {_wins(mine, plain, field)} of {len(mine)} rates)"
    )


def paired(
    mine: Sequence[Cell], plain: Sequence[Cell], field: str
) -> tuple[float, float, float]:
    """Mean difference over rates and seeds, and its 95% interval over seeds (t)."""
    from scipy import stats

    rows = [
        np.subtract(getattr(a, field), getattr(b, field))
        for a, b in zip(mine, plain, strict=True)
    ]
    seeds = np.mean(rows, axis=0)  # rates share their seed's segments
    mean = float(seeds.mean())
    if len(seeds) < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std(ddof=1) / len(seeds) ** 0.5
    return mean, mean - float(half), mean + float(half)


def need_matplotlib() -> None:
    """Before minutes of work rather than after.

    Raises:
        ImportError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the figure needs matplotlib: pip install 'jaxpost[report]'.")


def draw_figure(cells: Sequence[Cell], best: Sequence[float], path: pathlib.Path):
    """True return and clean accuracy against the rate, one column per noise.

    Dots are seeds, lines their means.

    Args:
        cells: what was found.
        best: returns of training on the true reward, drawn as a line.
        path: SVG file to write.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    kinds = [k for k in dict.fromkeys(c.noise.name for c in cells) if k != "clean"]
    labels = {"stochastic": "temperature", "myopic": "discount", "irrational": "power"}
    settings: Any = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(
            2,
            max(len(kinds), 1),
            figsize=(9, 5),
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for column, kind in enumerate(kinds):
            _draw_kind(axes[:, column], [c for c in cells if c.noise.name == kind])
            axes[0, column].axhline(
                np.mean(best), color="#999999", linestyle="--", label="true reward"
            )
            axes[0, column].set_title(kind)
            axes[1, column].set_xlabel(labels[kind])
        axes[0, 0].set_ylabel("true return")
        axes[1, 0].set_ylabel("accuracy on clean pairs, %")
        axes[0, -1].legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    path.write_bytes(buffer.getvalue())


def _draw_kind(axes: Any, cells: Sequence[Cell]) -> None:
    names = list(dict.fromkeys(cell.loss for cell in cells))
    for index, name in enumerate(names):
        mine = [cell for cell in cells if cell.loss == name]
        rates = np.array([cell.noise.rate for cell in mine])
        step = 0.03 * (np.ptp(rates) or 1.0)
        colour, marker = _STYLES[name]
        places = rates + step * (index - (len(names) - 1) / 2)  # beside one another
        for row, field, scale in ((0, "returns", 1.0), (1, "accuracy", 100.0)):
            values = scale * np.array([getattr(cell, field) for cell in mine])
            axes[row].plot(places, values, ".", color=colour, alpha=0.4, markersize=4)
            axes[row].plot(
                places,
                values.mean(axis=1),
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.0,
                label=SHOWN[name],
            )
            axes[row].grid(color="#dddddd", linewidth=0.6)
            axes[row].set_xticks(rates, [f"{rate:.2g}" for rate in rates])
