"""Rows to token examples: what is given, what is trained on.

Refuses, with one clear line, rows that would train on nothing or on a damaged text.
Knows no batches.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxpost.data._columns import Kind, row_kind, split_preference
from jaxpost.data._records import Row
from jaxpost.data._templates import TemplateError, encode_chat, encode_spans
from jaxpost.data._tokenizer import Tokenizer

LossOn = Literal["auto", "all", "completion", "assistant", "last"]
OnTooLong = Literal["refuse", "truncate"]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One text in tokens.

    Fields:
        tokens: ids, int32 `[n]`.
        loss_mask: True where trained on, bool `[n]`; never at index 0.
        id: a hash of the row's texts, the same in every run, in `[0, 2**63)`.
        source: where the row came from.
        number: the row's number there.
        merged: whether prompt and answer would share a token if tokenised in one go,
            and so were tokenised apart.
        truncated: whether tokens were cut off at the end.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    id: int = 0
    source: str = ""
    number: int = 0
    merged: bool = False
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A preference in tokens: the same prompt with two answers.

    Fields:
        chosen: prompt and preferred answer, the answer in `loss_mask`.
        rejected: prompt and other answer.
        id: a hash of the three texts.
    """

    chosen: Example
    rejected: Example
    id: int

    @property
    def texts(self) -> tuple[Example, ...]:
        """The better answer, then the other."""
        return (self.chosen, self.rejected)


def encode_row(
    row: Row,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "auto",
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
) -> Example:
    """One row in tokens.

    `text` is trained on whole; of `prompt` and `completion` the completion; of
    `messages` the assistant's turns. Plain strings get the tokenizer's BOS, if it puts
    one itself, and an end token; conversations get what the chat template writes.

    Args:
        row: with TRL's columns (see `normalize_row`).
        tokenizer: the tokenizer.
        max_length: most tokens, or None.
        loss_on: `"auto"` as above; `"all"` everything; `"completion"` or `"assistant"`
            as above, refusing other kinds of row; `"last"` the last assistant turn.
        on_too_long: `"refuse"` the row, or `"truncate"` its end (and with it the stop
            token).
        append_eos: put the first end id behind plain texts that lack one, and demand
            that the last assistant turn of a conversation ends in one.

    Raises:
        BadRow: reasons `wrong_column`, `nothing_supervised`, `too_long`, `double_bos`,
            `no_stop_token`, `template_error`, `template_rewrites`.
        ValueError: a setting is unknown, or data are conversations and the tokenizer
            has no chat template.
    """
    check_settings(loss_on, on_too_long)
    kind = row_kind(row)
    _check_kind(row, kind, loss_on)
    columns = row.columns
    if kind == "text":
        example = _encode_plain(
            row, tokenizer, "", columns["text"], loss_on, append_eos
        )
    elif kind == "messages":
        example = _encode_messages(
            row, tokenizer, columns["messages"], 0, loss_on, append_eos
        )
    else:
        example = encode_answer(
            row,
            tokenizer,
            columns["prompt"],
            columns["completion"],
            loss_on,
            append_eos,
        )
    return finish_example(row, example, tokenizer, max_length, on_too_long)


def encode_pair(
    row: Row,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_too_long: OnTooLong = "refuse",
    append_eos: bool = True,
) -> Pair:
    """A preference row in tokens; arguments and errors as `encode_row`.

    Raises:
        BadRow: also `wrong_column` where there is no `chosen` and `rejected`, and
            `equal_pair` where both are the same, in words or, once encoded and
            truncated, in tokens.
    """
    check_settings("auto", on_too_long)
    prompt, chosen, rejected = split_preference(row)
    sides = []
    for answer in (chosen, rejected):
        example = encode_answer(
            row, tokenizer, prompt, answer, "completion", append_eos
        )
        sides.append(finish_example(row, example, tokenizer, max_length, on_too_long))
    if np.array_equal(sides[0].tokens, sides[1].tokens):
        cut = sides[0].truncated or sides[1].truncated
        raise row.bad(
            "equal_pair",
            "chosen and rejected have the same tokens" + " once truncated" * cut,
            "raise --data.max-length" if cut else "remove the row",
        )
    return Pair(sides[0], sides[1], example_id([prompt, chosen, rejected]))


def encode_prompt(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The ids to feed a model that is to answer: exactly those trained with.

    Args:
        row: with `prompt`; or `messages`, whose last turn is left out if the
            assistant's; or `text`, which is continued.
        tokenizer: the tokenizer.

    Raises:
        BadRow: reasons `wrong_column`, `template_error`, `double_bos`.
    """
    kind = row_kind(row)
    if kind == "implicit_preference":
        prompt = split_preference(row)[0]
    else:
        prompt = row.columns["prompt" if "prompt" in row.columns else kind]
    if isinstance(prompt, str):
        return _with_bos(row, tokenizer, tokenizer.encode(prompt))
    if kind == "messages" and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    try:
        text = tokenizer.render(prompt, add_generation_prompt=True)
    except ValueError as error:
        if tokenizer.chat_template is None:
            raise
        raise row.bad("template_error", str(error), "correct the messages") from error
    ids = tokenizer.encode(text)
    _check_bos(row, tokenizer, ids)
    return ids


def example_id(content: Any) -> int:
    """A hash of JSON-like content in `[0, 2**63)`, the same in every process."""
    text = json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_settings(loss_on: str, on_too_long: str) -> None:
    """ValueError for settings that are not known."""
    if loss_on not in get_args(LossOn):
        raise ValueError(
            f"loss_on must be one of {', '.join(get_args(LossOn))}, got {loss_on!r}."
        )
    if on_too_long not in get_args(OnTooLong):
        raise ValueError(
            f"on_too_long must be 'refuse' or 'truncate', got {on_too_long!r}."
        )


def _check_kind(row: Row, kind: Kind, loss_on: str) -> None:
    if kind in ("preference", "implicit_preference", "prompt"):
        lacks = "has no answer" if kind == "prompt" else "is a pair of answers"
        raise row.bad(
            "wrong_column",
            f"the row {lacks} where one text to train on is expected",
            "give text, messages, or prompt and completion (map them with `columns`)",
        )
    fits = {
        "completion": ("prompt_completion", "unpaired"),
        "assistant": ("messages", "prompt_completion", "unpaired"),
        "last": ("messages", "prompt_completion", "unpaired"),
    }
    if kind not in fits.get(loss_on, (kind,)):
        raise row.bad(
            "wrong_column",
            f"loss_on is {loss_on!r}, but the row is of the kind {kind}",
            "set loss_on to 'auto'",
        )


def encode_answer(
    row: Row,
    tokenizer: Tokenizer,
    prompt: Any,
    completion: Any,
    loss_on: str,
    append_eos: bool,
) -> Example:
    """Prompt and answer in tokens, strings or messages; `finish_example` is next."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _encode_plain(row, tokenizer, prompt, completion, loss_on, append_eos)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = [*prompt, *completion]
    return _encode_messages(row, tokenizer, messages, len(prompt), loss_on, append_eos)


def _encode_plain(
    row: Row,
    tokenizer: Tokenizer,
    prompt: str,
    text: str,
    loss_on: str,
    append_eos: bool,
) -> Example:
    if not text.strip():
        raise _nothing(row, "the text to train on is empty")
    spans = encode_spans(tokenizer, prompt + text, [len(prompt)] if prompt else [])
    ids = _with_bos(row, tokenizer, spans.ids)
    start = len(ids) - len(spans.ids) + (spans.borders[0] if prompt else 0)
    if append_eos and (not ids or ids[-1] not in tokenizer.eos_ids):
        ids = [*ids, tokenizer.eos_ids[0]]
    mask = np.zeros(len(ids), bool)
    mask[0 if loss_on == "all" else start :] = True
    return Example(np.asarray(ids, np.int32), mask, merged=spans.merged)


def _encode_messages(
    row: Row,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    first: int,
    loss_on: str,
    append_eos: bool,
) -> Example:
    turns = [
        index
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "assistant"
    ]
    if not turns:
        raise _nothing(row, "no message of the assistant to train on")
    if all(not _says_something(messages[index]) for index in turns):
        raise _nothing(row, "the assistant's messages are empty")
    if loss_on == "last":
        turns = turns[-1:]
    try:
        chat = encode_chat(tokenizer, messages, turns)
    except TemplateError as error:
        raise row.bad(error.reason, str(error), error.advice) from error
    ids = chat.spans.ids
    _check_bos(row, tokenizer, ids)
    if append_eos and not set(ids[slice(*chat.turns[-1])]) & set(tokenizer.eos_ids):
        raise row.bad(
            "no_stop_token",
            "the chat template ends the assistant's turn without an end-of-sequence "
            f"token, so the model would never stop (ids {list(tokenizer.eos_ids)})",
            "name the token that ends a turn with --data.eos-tokens, or choose another "
            "--data.chat-template",
        )
    mask = np.zeros(len(ids), bool)
    for start, end in chat.turns:
        mask[start:end] = True
    if loss_on == "all":
        mask[:] = True
    return Example(np.asarray(ids, np.int32), mask, merged=chat.spans.merged)


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def _with_bos(row: Row, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    _check_bos(row, tokenizer, ids)
    return ids


def _check_bos(row: Row, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    if tokenizer.bos_id is not None and list(ids[:2]) == [tokenizer.bos_id] * 2:
        raise row.bad(
            "double_bos",
            "the tokens begin with the beginning-of-sequence token twice",
            f"remove {tokenizer.token_text(tokenizer.bos_id)!r} from the text or from "
            "the chat template",
        )


def _nothing(row: Row, what: str):
    return row.bad("nothing_supervised", what, "remove the row, or fill in the answer")


def finish_example(
    row: Row,
    example: Example,
    tokenizer: Tokenizer,
    max_length: int | None,
    on_too_long: OnTooLong,
) -> Example:
    """The example with its place in the data, within `max_length`, and checked."""
    tokens, mask = example.tokens, example.loss_mask
    mask[:1] = False  # nothing predicts the first token
    truncated = max_length is not None and len(tokens) > max_length
    if truncated and on_too_long == "refuse":
        raise row.bad(
            "too_long",
            f"{len(tokens)} tokens where at most {max_length} fit",
            "raise --data.max-length, cut the row, or set on_too_long: truncate",
        )
    if truncated:
        tokens, mask = tokens[:max_length], mask[:max_length]
    if not mask.any():
        cut = " once it is truncated" if truncated else ""
        raise _nothing(row, f"no token to train on{cut}")
    columns = {name: row.columns[name] for name in _id_columns(row)}
    return dataclasses.replace(
        example,
        tokens=tokens,
        loss_mask=mask,
        id=example_id(columns),
        source=row.source,
        number=row.number,
        truncated=truncated,
    )


def _id_columns(row: Row) -> Iterator[str]:
    names = ("text", "messages", "prompt", "completion", "chosen", "rejected")
    return (name for name in names if name in row.columns)
