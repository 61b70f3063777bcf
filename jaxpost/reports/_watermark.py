"""One document of a watermark test as an HTML page: its tokens coloured, the verdict.

Takes pieces of text and rows; knows no key and no model. Nothing on the page runs or is
fetched.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jaxpost.reports._page import page, text_of

TokenKind = Literal["green", "red", "unscored", "prompt"]

_STYLE = """
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6;
  border: 1px solid #ddd; border-radius: 4px; padding: .8rem 1rem; }
pre span { border-radius: 2px; }
.green { background: #b7efc5; } .red { background: #f8c0c0; }
.unscored { color: #777; } .prompt { color: #aaa; font-style: italic; }
.verdict { font-size: 1.15rem; font-weight: 600; margin: .6rem 0; }
svg { width: 100%; max-width: 60rem; height: 9rem; }
"""


class ShownToken(NamedTuple):
    """A token as the page shows it.

    Fields:
        text: what it adds to the document.
        kind: its colour.
        columns: its row of the table, by heading.
    """

    text: str
    kind: TokenKind
    columns: Mapping[str, str]


def write_watermark_page(
    path: pathlib.Path,
    *,
    title: str,
    verdict: str,
    facts: Mapping[str, str],
    tokens: Sequence[ShownToken],
    notes: Sequence[str] = (),
    sliding: Sequence[float] = (),
    threshold: float | None = None,
) -> pathlib.Path:
    """Write one document's page.

    Args:
        path: the file.
        title: names the document.
        verdict: the test's, in words.
        facts: settings and statistics by name.
        tokens: of the document, in order.
        notes: warnings.
        sliding: z of the window that ends at each token, NaN where there is none; drawn
            if any is finite.
        threshold: a line in that drawing.

    Returns:
        `path`.
    """
    counts = {kind: 0 for kind in ("green", "red", "unscored")}
    for token in tokens:
        if token.kind in counts:
            counts[token.kind] += 1
    legend = ", ".join(
        f'<span class="{kind}">{count} {kind}</span>' for kind, count in counts.items()
    )
    body = [
        f"<h1>{text_of(title)}</h1>",
        f'<p class="verdict">{text_of(verdict)}</p>',
        *(f'<p class="notes">{text_of(note)}</p>' for note in notes),
        _table(["", ""], [[name, value] for name, value in facts.items()]),
        f"<p>{legend}</p>",
        "<pre>" + "".join(map(_span, tokens)) + "</pre>",
        _drawing(sliding, threshold),
        "<details><summary>Token by token</summary>",
        _token_table(tokens),
        "</details>",
    ]
    part = path.with_name(f"{path.name}.part")
    part.write_text(page(title, body, extra_style=_STYLE), encoding="utf-8")
    part.replace(path)
    return path


def _span(token: ShownToken) -> str:
    hover = ", ".join(f"{name} {value}" for name, value in token.columns.items())
    return (
        f'<span class="{token.kind}" title="{text_of(hover)}">'
        f"{text_of(token.text)}</span>"
    )


def _token_table(tokens: Sequence[ShownToken]) -> str:
    headings = ["token", "kind", *(tokens[0].columns if tokens else ())]
    rows = [[repr(t.text), t.kind, *t.columns.values()] for t in tokens]
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{text_of(name)}</th>" for name in headings)
    lines = [
        "<tr>" + "".join(f"<td>{text_of(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return f'<table class="metrics"><tr>{head}</tr>' + "\n".join(lines) + "</table>"


def _drawing(values: Sequence[float], threshold: float | None) -> str:
    """z over the document as a line, `""` if there is none."""
    places = [n for n, value in enumerate(values) if math.isfinite(value)]
    if not places:
        return ""
    shown = [values[n] for n in places] + ([] if threshold is None else [threshold])
    low, high = min(0.0, *shown), max(0.0, *shown)
    width, height = max(len(values), 2), max(high - low, 1e-9)

    def y(value: float) -> float:
        return 100.0 * (high - value) / height

    line = " ".join(f"{n},{y(values[n]):.2f}" for n in places)
    levels = [(0.0, "#bbb")]
    if threshold is not None:
        levels.append((threshold, "#c33"))
    rules = "".join(
        f'<line x1="0" x2="{width}" y1="{y(v):.2f}" y2="{y(v):.2f}" stroke="{colour}" '
        'vector-effect="non-scaling-stroke"/>'
        for v, colour in levels
    )
    return (
        "<h2>z of the window that ends at each token</h2>"
        f'<svg viewBox="0 0 {width} 100" preserveAspectRatio="none">{rules}'
        f'<polyline points="{line}" fill="none" stroke="#1a6" stroke-width="2" '
        'vector-effect="non-scaling-stroke"/></svg>'
        f"<p>from {low:.1f} to {high:.1f}</p>"
    )
