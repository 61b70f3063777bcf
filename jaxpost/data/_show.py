"""Examples and findings for the eye: `rich` objects, to be printed by the caller.

Knows what the data doctor found; prints nothing itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxpost.data._check import DataCheck
from jaxpost.data._encode import Example
from jaxpost.data._packing import TokenRow, pad
from jaxpost.data._tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

IGNORED_LABEL = -100
_SEGMENT_COLOURS = ("cyan", "magenta", "yellow", "blue", "bright_red", "bright_cyan")
_SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclasses.dataclass(frozen=True)
class TokenView:
    """One token as a batch holds it.

    Fields:
        index: place in the row.
        id: token id.
        text: the vocabulary's spelling.
        mask: whether it is trained on.
        label: the id its hidden state is trained to predict (the next token's, if that
            is trained on), else -100.
        position: within its segment.
        segment: 0 where padded.
    """

    index: int
    id: int
    text: str
    mask: bool
    label: int
    position: int
    segment: int


def view_tokens(
    item: Example | TokenRow | Mapping[str, np.ndarray], tokenizer: Tokenizer
) -> list[TokenView]:
    """An example, or one packed or padded row, token by token."""
    from jaxpost import ops

    row = pad([item], max(2, len(item)))[0] if isinstance(item, Example) else item
    labels, label_mask = ops.shift_targets(row["tokens"], row["loss_mask"])
    labels = np.where(label_mask, labels, IGNORED_LABEL)
    return [
        TokenView(
            index=index,
            id=int(token),
            text=tokenizer.token_text(token),
            mask=bool(row["loss_mask"][index]),
            label=int(labels[index]),
            position=int(row["positions"][index]),
            segment=int(row["segment_ids"][index]),
        )
        for index, token in enumerate(row["tokens"])
    ]


def render_tokens(
    item: Example | TokenRow | Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    limit: int | None = 64,
) -> "Table":
    """A table of tokens: trained ones green, end tokens reversed, segments coloured.

    Args:
        item: an example, or one packed or padded row.
        tokenizer: the tokenizer.
        limit: rows of the table at most; the middle is left out. None shows all.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("#", "id", "token", "mask", "label", "position", "segment"):
        table.add_column(name, justify="left" if name == "token" else "right")
    views = view_tokens(item, tokenizer)
    for view in _shortened(views, limit):
        if view is None:
            table.add_row("…")
            continue
        table.add_row(
            str(view.index),
            str(view.id),
            Text(_visible(view.text), style=_token_style(view, tokenizer)),
            Text("yes" if view.mask else "no", "green" if view.mask else "dim"),
            Text(str(view.label), "dim" if view.label == IGNORED_LABEL else "green"),
            str(view.position),
            Text(str(view.segment), _segment_style(view.segment)),
        )
    return table


def render_text(
    item: Example | TokenRow | Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    limit: int | None = 400,
) -> "Text":
    """The text in one piece: given tokens dim, trained ones green, ends reversed."""
    from rich.text import Text

    text = Text()
    for view in _shortened(view_tokens(item, tokenizer), limit):
        if view is None:
            text.append(" … ", "dim")
        elif view.segment:
            shown = _visible(view.text).replace("\u2581", " ").replace("\u0120", " ")
            text.append(shown, _token_style(view, tokenizer))
    return text


def render_check(check: DataCheck, tokenizer: Tokenizer) -> "Group":
    """What `check_data` found: a summary, the problems, the kept examples."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = f"{check.source}: {check.rows} rows read"
    if check.lengths.size:
        quantiles = np.percentile(check.lengths, [50, 95, 100]).astype(int)
        summary += (
            f"; tokens per example: median {quantiles[0]}, 95% {quantiles[1]}, longest "
            f"{quantiles[2]}; {check.supervised:.0%} of the tokens are trained on"
        )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("problem", "rows", "what was found", "what to do", "where"):
        table.add_column(name, overflow="fold")
    for problem in check.problems:
        table.add_row(
            Text(problem.name, _SEVERITY_STYLES[problem.severity]),
            str(problem.count or ""),
            problem.what,
            problem.advice,
            "; ".join(problem.rows),
        )
    parts: list[Text | Table] = [Text(summary)]
    parts.append(table if check.problems else Text("no problems found", "green"))
    for example in check.examples:
        parts.append(Text(f"\n{example.source}, row {example.number}", "bold"))
        parts.append(render_tokens(example, tokenizer))
    return Group(*parts)


def _shortened(views: list[TokenView], limit: int | None) -> list[TokenView | None]:
    if limit is None or len(views) <= limit:
        return list(views)
    head = limit // 2
    return [*views[:head], None, *views[len(views) - (limit - head) :]]


def _visible(text: str) -> str:
    # Printable, so that a token cannot move the cursor or hide itself.
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown or "''"


def _token_style(view: TokenView, tokenizer: Tokenizer) -> str:
    if not view.segment:
        return "dim strike"
    style = "green" if view.mask else "dim"
    return f"{style} reverse" if view.id in tokenizer.eos_ids else style


def _segment_style(segment: int) -> str:
    if not segment:
        return "dim"
    return _SEGMENT_COLOURS[(segment - 1) % len(_SEGMENT_COLOURS)]
