"""What a file of scores says: numbers, a table, a summary file and a figure."""

import dataclasses
import importlib.util
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost import evaluation

Line = Mapping[str, Any]


def summarise(lines: Sequence[Line], layout: str, *, seed: int) -> dict[str, Any]:
    """Accuracies with intervals, calibration and deciles of scored items.

    Args:
        lines: of the file that `run_score` writes, each item once.
        layout: `pairs`, `rewardbench` or `rm-bench`. Of the last, all nine comparisons
            of an item count, and intervals resample whole items.
        seed: of the intervals.

    Returns:
        JSON-like values; accuracies in [0, 1].
    """
    chosen = np.asarray([line["chosen"] for line in lines], np.float64)
    rejected = np.asarray([line["rejected"] for line in lines], np.float64)
    margins = chosen[:, :, None] - rejected[:, None, :]  # [N, S, S]
    right = evaluation.verdicts(margins)
    by_item = right.mean(axis=(1, 2))
    calibration = evaluation.calibration(margins)
    lengths = np.asarray([line["tokens"] for line in lines])
    styles = chosen.shape[1]
    longer = lengths[:, :styles, None] - lengths[:, None, styles:]
    summary: dict[str, Any] = {
        "layout": layout,
        "items": len(lines),
        "comparisons": int(margins.size),
        "ties": int(np.sum(margins == 0.0)),
        "accuracy": _interval(by_item, seed),
        "margin": _interval(margins.mean(axis=(1, 2)), seed),
        "calibration_error": calibration.error,
        "calibration_bins": {
            "edges": calibration.edges.tolist(),
            "counts": calibration.counts.tolist(),
            "accuracies": _known(calibration.accuracies),
            "confidences": _known(calibration.confidences),
        },
        "margin_deciles": [
            dataclasses.asdict(group)
            for group in evaluation.accuracy_by_margin(margins)
        ],
        "mean_tokens": {
            "chosen": float(lengths[:, :styles].mean()),
            "rejected": float(lengths[:, styles:].mean()),
        },
        "accuracy_by_length": {
            name: {"comparisons": int(where.sum()), "accuracy": _mean(right[where])}
            for name, where in (
                ("chosen is longer", longer > 0),
                ("same length", longer == 0),
                ("chosen is shorter", longer < 0),
            )
        },
    }
    if layout == "rewardbench":
        found = evaluation.reward_bench(
            margins[:, 0, 0], [line["group"] for line in lines]
        )
        summary["reward_bench"] = dataclasses.asdict(found)
    if layout == "rm-bench":
        summary["rm_bench"] = _rm_bench(chosen, rejected, right, lines, seed)
    return summary


def _rm_bench(chosen, rejected, right, lines, seed: int) -> dict[str, Any]:
    styles = np.arange(chosen.shape[1])
    fancier = styles[None, :] - styles[:, None]  # of the rejected answer
    groups = {"hard": fancier > 0, "normal": fancier == 0, "easy": fancier < 0}
    found = evaluation.rm_bench(chosen, rejected)
    values: dict[str, Any] = {
        name: _interval(right[:, where].mean(axis=1), seed)
        for name, where in groups.items()
    }
    values |= {"average": found.average, "matrix": found.matrix.tolist()}
    domains = [line["group"] or "all" for line in lines]
    values["domains"] = {
        str(name): {
            part: getattr(of_domain, part)
            for part in ("hard", "normal", "easy", "average")
        }
        for name, of_domain in evaluation.rm_bench_by_domain(
            chosen, rejected, domains
        ).items()
    }
    return values


def write(summary: Mapping[str, Any], scores: pathlib.Path) -> None:
    """Writes the summary and, with matplotlib, the figure beside `scores`; prints."""
    place = scores.with_name(scores.stem + ".summary.json")
    text = json.dumps(summary, indent=1, allow_nan=False)
    place.write_text(text + "\n", encoding="utf-8")
    written = [str(scores), str(place)]
    if importlib.util.find_spec("matplotlib") is not None:
        figure = scores.with_name(scores.stem + ".margins.svg")
        draw_deciles(summary, figure)
        written.append(str(figure))
    _print(summary, written)


def _print(summary: Mapping[str, Any], written: Sequence[str]) -> None:
    import rich.console
    import rich.table

    console = rich.console.Console()
    table = rich.table.Table(title=f"{summary['model']} on {summary['data']}")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    for name, value in _rows(summary):
        if isinstance(value, Mapping):
            shown = f"{value['value']:.4f}"
            table.add_row(name, shown, f"{value['low']:.4f} to {value['high']:.4f}")
        else:
            table.add_row(name, f"{value:.4f}", "")
    console.print(table)
    counts = f"{summary['items']} items, {summary['comparisons']} comparisons"
    counts += f", {summary['ties']} ties (counted half)"
    if summary["skipped"]:
        reasons = ", ".join(f"{n} {why}" for why, n in summary["skipped"].items())
        counts += f"; {sum(summary['skipped'].values())} rows skipped ({reasons})"
    for name in ("duplicates", "truncated"):
        if summary[name]:
            counts += f"; {summary[name]} {name}"
    console.print(counts, highlight=False)
    bench = summary.get("reward_bench")
    if bench and bench["missing"]:
        console.print(
            f"{len(bench['missing'])} of RewardBench's subsets are missing: the score "
            "is not comparable with published ones.",
            highlight=False,
        )
    console.print("wrote " + ", ".join(written), highlight=False, soft_wrap=True)


def _rows(summary: Mapping[str, Any]):
    yield "accuracy", summary["accuracy"]
    if "reward_bench" in summary:
        for name, value in summary["reward_bench"]["sections"].items():
            yield f"RewardBench {name}", value
        yield "RewardBench score", summary["reward_bench"]["score"]
    if "rm_bench" in summary:
        for name in ("hard", "normal", "easy", "average"):
            yield f"RM-Bench {name}", summary["rm_bench"][name]
    yield "mean margin", summary["margin"]
    yield "calibration error", summary["calibration_error"]
    for name, part in summary["accuracy_by_length"].items():
        if part["comparisons"]:
            yield f"accuracy where {name}", part["accuracy"]


def draw_deciles(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Accuracy by decile of `|margin|`, beside the confidence that it should equal."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    groups = summary["margin_deciles"]
    places = np.arange(1, len(groups) + 1)
    settings: Any = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        axes.bar(places, [g["accuracy"] for g in groups], color="#56B4E9", width=0.8)
        axes.plot(places, [g["confidence"] for g in groups], "o-", color="#D55E00")
        axes.axhline(0.5, color="#999999", linewidth=0.8)
        labels = [f"{g['high']:.2g}" for g in groups]
        axes.set_xticks(places, labels, rotation=45)
        axes.set(
            xlabel="largest |margin| of the group",
            ylabel="accuracy (bars), confidence (line)",
            ylim=(0.0, 1.0),
        )
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    return dataclasses.asdict(evaluation.bootstrap_interval(values, seed=seed))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _known(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(x) else float(x) for x in values]
