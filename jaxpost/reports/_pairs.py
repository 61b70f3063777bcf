"""Preference pairs one by one: which look wrong, and how strong each preference is.

Takes columns and a function that gives texts; knows no model and no loss.
"""

import csv
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.reports._tables import Row, format_number, to_csv, to_markdown

FOLDER = "pairs"
BINS = 20
SHOWN_CHARS = 300

_TITLES = {
    "summary": "All of them",
    "tau_histogram": "How strong preferences are (tau)",
    "outliers": "Pairs to look at",
}
_BAR = 40  # characters of the longest bar of a histogram in the Markdown file


def write_pairs(
    folder: pathlib.Path,
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    *,
    texts: Callable[[int], Mapping[str, str]],
    outliers: int = 20,
    bounds: Mapping[str, np.ndarray] | None = None,
) -> list[pathlib.Path]:
    """Write tables and, with matplotlib, a plot of pairs into `folder/pairs/`.

    - `pairs.csv`: every pair with every column.
    - `outliers.csv`: the pairs to look at, with their texts: those of the largest
      positive `delta`, where there is such a column, else those of the most negative
      `margin`.
    - `summary.csv`: pairs, accuracy and means by `part`.
    - `tau_histogram.csv`, where there is a column `tau`: shares at each bound and in
      `BINS` bins between.
    - `report.md`: all of that but the first; `plot.png`: histograms.

    Args:
        folder: the run folder.
        columns: lists of one length by name: `example_id`, `part`, `margin`, any
            others; `delta` and `tau` as above.
        texts: a pair's texts by name, given its row.
        outliers: how many at most.
        bounds: where `tau` lies at a bound, bool `[n]` by the bound's name.

    Returns:
        The files.

    Raises:
        ValueError: columns of unlike length, or a needed one is missing.
    """
    _check(columns)
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    tables = {"summary": _summary(columns, bounds or {})}
    if "tau" in columns:
        tables["tau_histogram"] = _tau_histogram(columns, bounds or {})
    chosen = _outlier_rows(columns, outliers)
    tables["outliers"] = _outlier_table(columns, chosen, texts)
    everything = (
        list(columns),
        [list(map(_show, row)) for row in zip(*columns.values(), strict=True)],
    )
    files = []
    for name, table in {"pairs": everything, **tables}.items():
        files.append(place / f"{name}.csv")
        files[-1].write_text(to_csv(*table), encoding="utf-8")
    files.append(place / "report.md")
    files[-1].write_text(_markdown(tables), encoding="utf-8")
    if (plot := _plot(place / "plot.png", columns)) is not None:
        files.append(plot)
    return files


class Pairs(NamedTuple):
    """What `write_pairs` wrote, as a page shows it.

    Fields:
        tables: header and rows by title; empty if there are none.
        plot: PNG bytes, or None.
    """

    tables: dict[str, tuple[Row, list[Row]]]
    plot: bytes | None


def read_pairs(folder: pathlib.Path) -> Pairs:
    """Reads back the shorter tables and the plot of a run folder; what is not there is
    left out, cells are cut to `SHOWN_CHARS`."""
    tables = {}
    for name, title in _TITLES.items():
        path = folder / FOLDER / f"{name}.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            lines = [[_shorten(cell) for cell in line] for line in csv.reader(file)]
        if len(lines) > 1:
            tables[title] = (lines[0], lines[1:])
    plot = folder / FOLDER / "plot.png"
    return Pairs(tables, plot.read_bytes() if plot.is_file() else None)


def _check(columns: Mapping[str, Any]) -> None:
    missing = [n for n in ("example_id", "part", "margin") if n not in columns]
    if missing:
        raise ValueError(f"columns lack {', '.join(missing)}.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one length, got {lengths}.")


def _show(value: Any) -> str:
    """Ids in full, other numbers in the digits of float32."""
    if isinstance(value, str | int | np.integer | bool | np.bool_):
        return str(value)
    return f"{float(value):.7g}"


def _summary(
    columns: Mapping[str, Any], bounds: Mapping[str, np.ndarray]
) -> tuple[Row, list[Row]]:
    """One row per part; the margin 0 counts as wrong."""
    parts = np.asarray(columns["part"])
    margins = np.asarray(columns["margin"])
    shown: dict[str, np.ndarray] = {
        "accuracy": margins > 0,
        "mean margin": margins,
    }
    if "delta" in columns:
        delta = np.asarray(columns["delta"])
        shown |= {"share of delta > 0": delta > 0, "mean delta": delta}
    if "tau" in columns:
        shown["mean tau"] = np.asarray(columns["tau"])
        shown |= {f"tau at its {name}": inside for name, inside in bounds.items()}
    rows = []
    for part in dict.fromkeys(parts.tolist()):
        inside = parts == part
        means = [format_number(float(np.mean(v[inside]))) for v in shown.values()]
        rows.append([str(part), str(int(inside.sum())), *means])
    return ["part", "pairs", *shown], rows


def _tau_histogram(
    columns: Mapping[str, Any], bounds: Mapping[str, np.ndarray]
) -> tuple[Row, list[Row]]:
    """Shares at the bounds, and of the rest by equal bins."""
    tau = np.asarray(columns["tau"], np.float64)
    rows, inner = [], np.ones(len(tau), bool)
    for name, inside in bounds.items():
        inside = np.asarray(inside)
        rows.append([f"at the {name}", *_share(int(inside.sum()), len(tau))])
        inner &= ~inside
    if inner.any():
        counts, edges = np.histogram(tau[inner], bins=BINS)
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            label = f"{format_number(float(low))} to {format_number(float(high))}"
            rows.append([label, *_share(int(count), len(tau))])
    return ["tau", "pairs", "share"], rows


def _share(count: int, of: int) -> Row:
    return [str(count), f"{count / of:.4f}"]


def _outlier_rows(columns: Mapping[str, Any], limit: int) -> list[int]:
    if "delta" in columns:
        badness = np.asarray(columns["delta"])
    else:
        badness = -np.asarray(columns["margin"])
    order = np.argsort(-badness, kind="stable")[:limit]
    return [int(row) for row in order if badness[row] > 0]


def _outlier_table(
    columns: Mapping[str, Any],
    chosen: Sequence[int],
    texts: Callable[[int], Mapping[str, str]],
) -> tuple[Row, list[Row]]:
    found = [dict(texts(row)) for row in chosen]
    names = list(found[0]) if found else []
    rows = [
        [
            *(_show(column[row]) for column in columns.values()),
            *(text[name] for name in names),
        ]
        for row, text in zip(chosen, found, strict=True)
    ]
    return [*columns, *names], rows


def _markdown(tables: Mapping[str, tuple[Row, list[Row]]]) -> str:
    parts = []
    for name, (header, rows) in tables.items():
        if name == "tau_histogram":
            most = max((float(row[2]) for row in rows), default=0.0) or 1.0
            header = [*header, ""]
            rows = [[*row, "█" * round(_BAR * float(row[2]) / most)] for row in rows]
        short = [[_shorten(cell) for cell in row] for row in rows]
        body = to_markdown(header, short) if rows else "None.\n"
        parts.append(f"## {_TITLES[name]}\n\n{body}")
    return "\n".join(parts)


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"


def _plot(path: pathlib.Path, columns: Mapping[str, Any]) -> pathlib.Path | None:
    """Histograms of the margins and of delta or tau; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    names = ["margin", *(name for name in ("delta", "tau") if name in columns)]
    figure = Figure(figsize=(5 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts = np.asarray(columns["part"])
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        values = np.asarray(columns[name], np.float64)
        finite = values[np.isfinite(values)]
        edges = np.histogram_bin_edges(finite, bins=2 * BINS).tolist()
        for part in dict.fromkeys(parts.tolist()):
            mine = values[parts == part]
            weights = np.full(len(mine), 1 / max(len(mine), 1))
            axes.hist(
                mine, bins=edges, weights=weights, histtype="step", label=str(part)
            )
        axes.set_xlabel(name)
        axes.set_ylabel("share of pairs")
        if name == "margin":
            axes.axvline(0.0, color="0.6", linewidth=0.8)
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
