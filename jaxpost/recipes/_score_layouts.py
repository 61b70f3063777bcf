"""Rows of a preference benchmark as answers in tokens: pairs, RewardBench, RM-Bench."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from jaxpost import data

Layout = Literal["pairs", "rewardbench", "rm-bench"]
STYLES = 3


@dataclasses.dataclass(frozen=True)
class Item:
    """The answers to one prompt, to be scored and compared.

    Fields:
        id: a hash of the texts (and of the subset), the same in every run.
        row: number of the row in its source.
        group: RewardBench's subset or RM-Bench's domain; None where there is none.
        chosen, rejected: as many of one as of the other: three styles in RM-Bench, else
            one.
    """

    id: int
    row: int
    group: str | None
    chosen: tuple[data.Example, ...]
    rejected: tuple[data.Example, ...]

    @property
    def answers(self) -> tuple[data.Example, ...]:
        """All answers, the chosen ones first."""
        return (*self.chosen, *self.rejected)

    @property
    def length(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(len(example) for example in self.answers)


def read_items(
    source: str,
    tokenizer: data.Tokenizer,
    layout: Layout,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    format: data.Format = "trl",
    chat: bool = False,
    max_length: int | None = None,
    on_too_long: data.OnTooLong = "refuse",
    append_eos: bool = True,
    on_bad_row: data.OnBadRow = "stop",
    report: data.BadRows,
    limit: int | None = None,
) -> list[Item]:
    """All items of a source.

    Args:
        source: as in `data.read_rows`; so are `split`, `on_bad_row` and `report`.
        tokenizer: the tokenizer.
        layout: `pairs`, any rows that `data.encode_pair` takes; `rewardbench`, such
            rows with a `subset`; `rm-bench`, rows with a `prompt` and three `chosen`
            and three `rejected` texts, and perhaps a `domain` or `subset`.
        columns, format: as in `data.normalize_row`; not of `rm-bench`.
        chat: put texts into the chat template as a user's and an assistant's turn.
        max_length, on_too_long, append_eos: as in `data.encode_pair`.
        limit: rows to read at most.

    Raises:
        BadRow: a row does not fit the layout and `on_bad_row` is `"stop"`.
        DataError: the source is empty or damaged, or no row of it could be used.
        ValueError: the layout is unknown.
    """
    if layout not in get_args(Layout):
        raise ValueError(
            f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}."
        )

    def encode(row: data.Row) -> data.Pair:
        return data.encode_pair(
            _in_chat(row) if chat else row,
            tokenizer,
            max_length=max_length,
            on_too_long=on_too_long,
            append_eos=append_eos,
        )

    reading: dict[str, Any] = {"on_bad_row": on_bad_row, "report": report}
    reading["split"] = split
    if layout == "rm-bench":
        rows = itertools.islice(data.read_rows(source, **reading), limit)
        read = _rm_bench_item
    else:
        rows = data.load_rows(
            source, columns=columns, format=format, limit=limit, **reading
        )
        read = _pair_item if layout == "pairs" else _reward_bench_item
    found = []
    for row in rows:
        try:
            found.append(read(row, encode))
        except data.BadRow as problem:
            if on_bad_row == "stop":
                raise
            report.add(problem)
    if not found:
        raise data.DataError(
            f"{source}: no row could be scored. {report.summary()}".strip()
        )
    return found


Encode = Callable[[data.Row], data.Pair]


def _pair_item(row: data.Row, encode: Encode) -> Item:
    pair = encode(row)
    return Item(pair.id, row.number, None, (pair.chosen,), (pair.rejected,))


def _reward_bench_item(row: data.Row, encode: Encode) -> Item:
    subset = row.columns.get("subset")
    if not isinstance(subset, str):
        raise row.bad(
            "wrong_column",
            f"has no text in the column 'subset', only {sorted(row.columns)}",
            "the layout rewardbench needs it; score with --layout pairs otherwise",
        )
    pair = encode(row)
    name = data.example_id([pair.id, subset])
    return Item(name, row.number, subset, (pair.chosen,), (pair.rejected,))


def _rm_bench_item(row: data.Row, encode: Encode) -> Item:
    columns = row.columns
    if not isinstance(columns.get("prompt"), str):
        raise row.bad("wrong_column", "has no text in 'prompt'", "add the prompt")
    chosen, rejected = _styles(row, "chosen"), _styles(row, "rejected")
    pairs = [
        encode(
            dataclasses.replace(
                row,
                columns={"prompt": columns["prompt"], "chosen": c, "rejected": r},
            )
        )
        for c, r in zip(chosen, rejected, strict=True)
    ]
    return Item(
        id=data.example_id([columns["prompt"], chosen, rejected]),
        row=row.number,
        group=columns.get("domain") or columns.get("subset"),
        chosen=tuple(pair.chosen for pair in pairs),
        rejected=tuple(pair.rejected for pair in pairs),
    )


def _styles(row: data.Row, name: str) -> list[str]:
    texts = row.columns.get(name)
    if (
        not isinstance(texts, list)
        or len(texts) != STYLES
        or not all(isinstance(text, str) for text in texts)
    ):
        raise row.bad(
            "wrong_type",
            f"{name!r} is not a list of {STYLES} texts",
            "the layout rm-bench has the styles concise, detailed, markdown",
        )
    return texts


def _in_chat(row: data.Row) -> data.Row:
    """The row with its texts as messages; what is messages already stays."""
    columns = dict(row.columns)
    prompt, chosen, rejected = data.split_preference(row)
    columns |= {
        "prompt": _turn("user", prompt),
        "chosen": _turn("assistant", chosen),
        "rejected": _turn("assistant", rejected),
    }
    return dataclasses.replace(row, columns=columns)


def _turn(role: str, value: Any) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
