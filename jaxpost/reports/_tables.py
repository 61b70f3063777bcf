"""Tables of runs as plain rows: settings and their differences, metrics by run.

Rows are lists of strings; `to_markdown` and `to_csv` write them, `_page` makes HTML.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxpost.reports._run import Run

ABSENT = "—"

Row = list[str]


def flatten(mapping: Mapping[str, Any] | None, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with values as text; lists stay whole."""
    flat: dict[str, str] = {}
    for key, value in (mapping or {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = show(value)
    return flat


def show(value: Any) -> str:
    """A value as short text: numbers to 5 digits, the rest as JSON or as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return format_number(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def format_number(value: float) -> str:
    """A number to 5 significant digits; whole ones below 10⁹ in full."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.5g}"


def differences(mappings: Sequence[Mapping[str, Any] | None]) -> list[tuple[Row, bool]]:
    """Dotted keys with one column per mapping, and whether the columns differ.

    Keys come in order of appearance; what a mapping lacks is shown as a dash.
    """
    flats = [flatten(mapping) for mapping in mappings]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = []
    for key in keys:
        values = [flat.get(key, ABSENT) for flat in flats]
        rows.append(([key, *values], len(set(values)) > 1))
    return rows


def summary_rows(runs: Sequence[Run]) -> tuple[Row, list[Row]]:
    """Header and rows: every metric's last value by run, with its range.

    One run: columns first, last, smallest, largest. Several: one column each, the last
    value and, in brackets, smallest to largest.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    if len(runs) == 1:
        header = ["metric", "first", "last", "smallest", "largest", "last step"]
    else:
        header = ["metric", *(run.name for run in runs)]
    rows = []
    for name in names:
        if len(runs) == 1:
            steps, values = runs[0].series(name)
            low, high = _range(values)
            numbers = [values[0], values[-1], low, high]
            rows.append([name, *map(format_number, numbers), str(steps[-1])])
        else:
            rows.append([name, *(_cell(run.series(name)[1]) for run in runs)])
    return header, rows


def summary_table(
    runs: Sequence[Run], *, style: Literal["markdown", "csv"] = "markdown"
) -> str:
    """`summary_rows` as text, for a pull request or a spreadsheet.

    Raises:
        ValueError: unknown `style`.
    """
    writers = {"markdown": to_markdown, "csv": to_csv}
    if style not in writers:
        raise ValueError(f"style must be one of {', '.join(writers)}, got {style!r}.")
    return writers[style](*summary_rows(runs))


def to_markdown(header: Row, rows: Sequence[Row]) -> str:
    """A GitHub table; bars and line breaks in cells are escaped."""

    def line(cells: Row) -> str:
        safe = (" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells)
        return f"| {' | '.join(safe)} |\n"

    return "".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def to_csv(header: Row, rows: Sequence[Row]) -> str:
    """Comma-separated values with one header line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    return min(finite), max(finite)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ABSENT
    last = format_number(values[-1])
    if len(values) == 1:
        return last
    low, high = map(format_number, _range(values))
    return f"{last} ({low} to {high})"
