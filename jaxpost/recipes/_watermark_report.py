"""What `watermark eval` found, as a table, a file and a figure."""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

TPR = "tpr@0.05"
_ABSENT = "-"


def write(folder: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes `results.json`, `table.md` and `pareto.svg`; prints the tables."""
    text = json.dumps(result, indent=2) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    quality = quality_of(result["settings"])
    against = against_of(result["settings"])
    tables = {
        "Settings": setting_rows(result["settings"], quality, against),
        "After edits": robustness_rows(result["robustness"]),
    }
    parts = [f"## {name}\n\n{to_markdown(rows)}\n" for name, rows in tables.items()]
    (folder / "table.md").write_text("\n".join(parts), encoding="utf-8")
    for name, rows in tables.items():
        _print(name, rows)
    if importlib.util.find_spec("matplotlib"):
        draw(folder / "pareto.svg", result["settings"], quality, against)


def quality_of(settings: Sequence[dict[str, Any]]) -> str:
    """What measures quality: pass@k of the smallest k, else whether answers parse."""
    ks = [int(name[5:]) for name in settings[0] if name.startswith("pass@")]
    return f"pass@{min(ks)}" if ks else "parse_rate"


def against_of(settings: Sequence[dict[str, Any]]) -> str:
    """Suffix of the detection against people's answers, or against the model's own."""
    return "" if any("auroc" in line for line in settings) else "_unmarked"


def setting_rows(
    settings: Sequence[dict[str, Any]], quality: str, against: str
) -> list[list[str]]:
    """A head, and a row for each setting: its quality and how well it is detected."""
    names = ["method", "gamma", "delta", "tau", quality]
    names += ["parse_rate", "statuses"] if quality != "parse_rate" else []
    detected = ["auroc", "tpr@0", "tpr@0.01", TPR]
    names += [f"{name}{against}" for name in detected] + ["mean_z", "scored", "tokens"]
    rows = [[_shown(line.get(name)) for name in names] for line in settings]
    return [names, *rows]


def robustness_rows(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A head, and a row for each method and edit: how well it is still detected."""
    names = ["method", "edit", "answers", "mean_z", "auroc", TPR]
    return [names, *([_shown(line.get(name)) for name in names] for line in lines)]


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (more is better in both), those that none other beats, by the first."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found[::-1]


def draw(
    path: pathlib.Path, settings: Sequence[dict[str, Any]], quality: str, against: str
) -> None:
    """Quality against detection, the best of each method joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    auroc = f"auroc{against}"
    gammas = sorted({line["gamma"] for line in settings if line["gamma"]})
    markers = dict(zip(gammas, "osD^vP*X", strict=False))
    for method, colour in (("sweet", "tab:green"), ("wllm", "tab:orange")):
        lines = [s for s in settings if s["method"] == method and auroc in s]
        best = frontier([(line[auroc], line[quality]) for line in lines])
        if best:
            axes.step(*np.array(best).T, where="pre", color=colour, alpha=0.5)
        for line in lines:
            point = (line[auroc], line[quality])
            first = line["delta"] == min(s["delta"] for s in lines)
            axes.scatter(
                *point,
                color=colour,
                marker=markers.get(line["gamma"], "o"),
                s=24,
                label=f"{method.upper()}, γ = {line['gamma']:g}" if first else None,
            )
            axes.annotate(
                f"{line['delta']:g}",
                point,
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
    plain = settings[0]
    axes.axhline(plain[quality], color="grey", linestyle=":", label="unmarked")
    axes.set_xlabel("AUROC of detection")
    axes.set_ylabel(quality.replace("parse_rate", "share of answers that parse"))
    axes.set_title("Numbers are δ; lines join what no other strength beats", fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path)


def _shown(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print(title: str, rows: Sequence[Sequence[str]]) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    rich.console.Console().print(table)
