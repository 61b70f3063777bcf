"""The report as one HTML file: no script, nothing loaded from elsewhere.

Everything read from a run folder passes through `text_of` before it becomes HTML.
"""

import base64
import html
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxpost.reports import _curves, _pairs, _tables
from jaxpost.reports._run import ReportError, Run, read_runs

MAX_SAMPLES = 200
REPORT = "report.html"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.runs { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .6rem 0; }
.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px;
  vertical-align: -2px; margin-right: .35rem; }
.notes { background: #fff6dd; border-left: 4px solid #e0a800; padding: .5rem 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr));
  gap: 1rem; }
img { max-width: 100%; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0;
  border-bottom: 1px solid #eee; }
th { white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 34rem; }
td:first-child { font-family: ui-monospace, monospace; }
.metrics td { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; margin: .6rem 0; }
"""


def write_report(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None
) -> pathlib.Path:
    """Write one page about one or more run folders: `jaxpost report RUN [RUN ...]`.

    Curves of all runs share their axes; settings are compared by key; samples, metrics
    and environments follow. A run that was killed, or is still running, is reported as
    far as it got; lines that cannot be read are named at the top of the page.

    Args:
        runs: run folders, as `jaxpost train` writes them.
        out: file to write, or an existing folder; `report.html` in the last run folder
            if None. Replaced only once the page is complete.

    Returns:
        The file's path.

    Raises:
        ValueError: no run is given.
        ReportError: a folder or its `metrics.jsonl` is missing or cannot be read, or
            the folder of `out` does not exist.
        ImportError: matplotlib is not installed.
    """
    read = read_runs(runs)
    path = read[-1].folder / REPORT if out is None else pathlib.Path(out)
    if path.is_dir():
        path = path / REPORT
    if not path.parent.is_dir():
        raise ReportError(f"{path}: the folder {path.parent} does not exist; make it.")
    part = path.with_name(f"{path.name}.part")
    part.write_text(render(read), encoding="utf-8")
    part.replace(path)
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as text; see `write_report`."""
    title = "Run report: " + ", ".join(run.name for run in runs)
    body = [
        f"<h1>{text_of(title)}</h1>",
        _run_list(runs),
        _notes(runs),
        _panels(runs),
        _section("Metrics", *_metrics(runs)),
        _section("Samples", *_samples(runs)),
        *_pair_sections(runs),
        _section("Configuration", *_settings(runs, [run.config for run in runs])),
        _section("Environment", *_settings(runs, [run.environment for run in runs])),
    ]
    return page(title, body)


def page(title: str, body: Iterable[str], *, extra_style: str = "") -> str:
    """A whole HTML page of parts; empty ones are left out."""
    # The policy makes it certain that nothing in a sample can run or be fetched.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text_of(title)}</title>\n<style>{_STYLE}{extra_style}</style></head>"
        "\n<body>\n" + "\n".join(part for part in body if part) + "\n</body></html>\n"
    )


def text_of(value: str) -> str:
    """Text for an element or a quoted attribute; lone surrogates become `?`."""
    return html.escape(value.encode("utf-8", "replace").decode("utf-8"))


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{text_of(title)}</h2>", *parts])


def _run_list(runs: Sequence[Run]) -> str:
    items = []
    for index, run in enumerate(runs):
        last = max(line["step"] for line in run.metrics)
        color = _curves.color_of(index)
        items.append(
            f'<span title="{text_of(str(run.folder))}">'
            f'<span class="swatch" style="background:{color}"></span>'
            f"{text_of(f'{run.name} (to step {last})')}</span>"
        )
    return f'<div class="runs">{"".join(items)}</div>'


def _notes(runs: Sequence[Run]) -> str:
    items = [f"<li>{text_of(note)}</li>" for run in runs for note in run.notes]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _panels(runs: Sequence[Run]) -> str:
    panels = _curves.collect(runs)
    if not panels:
        return _section("Curves", "<p>Each metric was logged once: no curves.</p>")
    figures = [
        f"<figure><figcaption>{text_of(title)}</figcaption>"
        f"{_curves.draw(curves, identity=title)}</figure>"
        for title, curves in panels.items()
    ]
    legend = (
        "<p>By optimizer step; dashed with dots: held-out (<code>eval_</code>).</p>"
    )
    grid = f'<div class="panels">{"".join(figures)}</div>'
    return _section("Curves", legend, grid)


def _metrics(runs: Sequence[Run]) -> list[str]:
    table = _table(*_tables.summary_rows(runs), kind="metrics")
    legend = "<p>Last value, in brackets the smallest and largest.</p>"
    return [legend, table] if len(runs) > 1 else [table]


def _samples(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in runs:
        if not run.samples:
            parts.append(f"<p>{text_of(run.name)}: none.</p>")
            continue
        shown = run.samples[-MAX_SAMPLES:]
        keys = list(dict.fromkeys(key for sample in shown for key in sample))
        rows = [
            [_tables.show(sample[key]) if key in sample else "" for key in keys]
            for sample in shown
        ]
        count = f"{len(shown)} of {len(run.samples)}"
        if len(shown) == len(run.samples):
            count = str(len(shown))
        opened = " open" if len(runs) == 1 else ""
        parts.append(
            f"<details{opened}><summary>{text_of(run.name)}: {count} samples</summary>"
            f"{_table(keys, rows)}</details>"
        )
    return parts


def _pair_sections(runs: Sequence[Run]) -> list[str]:
    """What `write_pairs` left in run folders: the plot, and all tables but the full."""
    parts = []
    for run in runs:
        found = _pairs.read_pairs(run.folder)
        if not found.tables:
            continue
        body = []
        if found.plot is not None:
            data = base64.b64encode(found.plot).decode("ascii")
            body.append(f'<img alt="Histograms" src="data:image/png;base64,{data}">')
        for title, (header, rows) in found.tables.items():
            body += [f"<h3>{text_of(title)}</h3>", _table(header, rows)]
        parts.append(_section(f"Pairs: {run.name}", *body))
    return parts


def _settings(
    runs: Sequence[Run], mappings: Sequence[dict[str, Any] | None]
) -> list[str]:
    """One run: its settings. Several: what differs, and the rest folded away."""
    rows = _tables.differences(mappings)
    if not rows:
        return ["<p>None found.</p>"]
    header = ["key", *(run.name for run in runs)]
    if len(runs) == 1:
        return [_table(header, [row for row, _ in rows])]
    apart = [row for row, differs in rows if differs]
    alike = [row[:2] for row, differs in rows if not differs]
    parts = ["<p>No difference.</p>"]
    if apart:
        parts = [_table(header, apart)]
    if alike:
        parts.append(
            f"<details><summary>{len(alike)} keys are the same in all runs</summary>"
            f"{_table(['key', 'value'], alike)}</details>"
        )
    return parts


def _table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    kind: str = "",
) -> str:
    head = "".join(f"<th>{text_of(cell)}</th>" for cell in header)
    lines = [
        f"<tr>{''.join(f'<td>{text_of(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
