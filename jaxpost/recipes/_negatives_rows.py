"""Rows with a prompt and a right answer, and the tokens to draw wrong ones from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpost import data


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt with its right answer.

    Fields:
        id: as `data.encode_row` gives it to the prompt with this completion.
        prompt: text, or messages.
        completion: the right answer, text.
        tokens: of the prompt that is sampled from, with the system message.
        source, number: where the row came from.
    """

    id: int
    prompt: str | list[dict[str, str]]
    completion: str
    tokens: list[int]
    source: str
    number: int


def read_items(
    source: str,
    tokenizer: data.Tokenizer,
    *,
    room: int,
    system_message: str | None,
    chat: bool,
    on_bad_row: data.OnBadRow,
    report: data.BadRows,
    **reading: Any,
) -> tuple[list[Item], int]:
    """All items of a source, each prompt and answer once.

    Args:
        source: as in `data.load_rows`; so are `on_bad_row`, `report` and `reading`.
        tokenizer: the tokenizer.
        room: most tokens of a prompt.
        system_message: see `sampling_prompt`; empty is None.
        chat: see `split_answer`.

    Returns:
        The items in the order of the rows; and how many rows repeat an earlier one.

    Raises:
        BadRow: a row does not fit and `on_bad_row` is `"stop"`.
        DataError: the source is empty or damaged, or no row of it could be used.
    """
    items: dict[int, Item] = {}
    count = 0
    rows = data.load_rows(source, on_bad_row=on_bad_row, report=report, **reading)
    for row in rows:
        try:
            item = _read_item(row, tokenizer, room, system_message, chat)
        except data.BadRow as problem:
            if on_bad_row == "stop":
                raise
            report.add(problem)
            continue
        count += 1
        items.setdefault(item.id, item)
    if not items:
        raise data.DataError(f"{source}: no row could be used. {report.summary()}")
    return list(items.values()), count - len(items)


def _read_item(
    row: data.Row,
    tokenizer: data.Tokenizer,
    room: int,
    system_message: str | None,
    chat: bool,
) -> Item:
    prompt, completion = split_answer(row, chat=chat)
    asked = sampling_prompt(prompt, system_message) if system_message else prompt
    tokens = data.encode_prompt(
        dataclasses.replace(row, columns={"prompt": asked}), tokenizer
    )
    if not tokens:
        raise row.bad(
            "empty_prompt",
            "the prompt has no tokens to continue",
            "remove the row, or use a tokenizer that begins texts with a token",
        )
    if len(tokens) > room:
        raise row.bad(
            "too_long",
            f"the prompt has {len(tokens)} tokens where at most {room} leave room for "
            "the new ones",
            "shorten the prompt, lower --max-new-tokens, or skip the row with "
            "--on-bad-row skip",
        )
    columns = {"prompt": prompt, "completion": completion}
    name = data.example_id(columns)
    return Item(name, prompt, completion, tokens, row.source, row.number)


def split_answer(row: data.Row, *, chat: bool) -> tuple[Any, str]:
    """The prompt of a row, text or messages, and its right answer as text.

    Args:
        row: prompt and completion, messages that end with the assistant's, or a
            preference, whose chosen answer is the right one.
        chat: make a user's turn of a prompt that is text.

    Raises:
        BadRow: there is no such answer, or it is more than one message.
    """
    kind = data.row_kind(row)
    if kind in ("preference", "implicit_preference"):
        prompt, completion, _ = data.split_preference(row)
    elif kind == "messages":
        prompt, completion = row.columns["messages"][:-1], row.columns["messages"][-1:]
    elif kind == "prompt_completion" or row.columns.get("label") is True:
        prompt, completion = row.columns["prompt"], row.columns["completion"]
    else:
        raise row.bad(
            "wrong_column",
            f"has no right answer, only {', '.join(sorted(row.columns))}",
            "give prompt and completion, messages, or chosen and rejected",
        )
    if isinstance(completion, list):
        completion = _only_message(row, completion)
        chat = True
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or not completion.strip():
        what = "prompt" if not prompt else "right answer"
        raise row.bad("nothing_supervised", f"the {what} is empty", "remove the row")
    return prompt, completion


def _only_message(row: data.Row, messages: Sequence[dict[str, Any]]) -> str:
    last = messages[-1]
    fits = len(messages) == 1 and last["role"] == "assistant"
    if not fits or not isinstance(last.get("content"), str):
        raise row.bad(
            "wrong_type",
            "the right answer is not one message in words of the assistant",
            "cut the conversation behind the assistant's answer",
        )
    return last["content"]


def sampling_prompt(prompt: Any, system_message: str) -> Any:
    """The prompt to sample negatives from: with a system message in front.

    Args:
        prompt: messages, where it takes the place of a system message that is there; or
            text, where it goes before, with an empty line between.
        system_message: text.
    """
    if isinstance(prompt, str):
        return f"{system_message}\n\n{prompt}"
    rest = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return [{"role": "system", "content": system_message}, *rest]
