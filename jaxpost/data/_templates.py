"""Conversations and continuations to tokens, with exact borders between the turns.

The tokens before a border are those the tokenizer gives for the text before it alone,
which is what the model is fed when it is asked for an answer. Knows no rows or losses.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.data._tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


class TemplateError(ValueError):
    """A conversation cannot be masked exactly under this chat template.

    Fields:
        reason: a short name to count by.
        advice: what to do.
    """

    def __init__(self, reason: str, what: str, advice: str):
        super().__init__(what)
        self.reason = reason
        self.advice = advice


@dataclasses.dataclass(frozen=True)
class Spans:
    """Tokens of a text and where its borders fall.

    Fields:
        ids: token ids.
        offsets: characters `[start, end)` of each token.
        borders: for each border asked for, the index of the first token after it.
        merged: whether tokenising in one go would have put one token across a border,
            or other tokens before it, so that the pieces were tokenised apart.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    borders: list[int]
    merged: bool


def encode_spans(tokenizer: Tokenizer, text: str, borders: Sequence[int]) -> Spans:
    """Tokenises `text` so that no token crosses a border.

    In one go where that leaves the tokens before every border as they are without what
    follows; piece by piece otherwise.

    Args:
        tokenizer: the tokenizer.
        text: the whole text.
        borders: ascending character positions in `text`.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    indices = [_token_at(offsets, border) for border in borders]
    clean = all(
        index is not None and tokenizer.encode(text[:border]) == ids[:index]
        for index, border in zip(indices, borders, strict=True)
    )
    if clean:
        return Spans(ids, offsets, [i for i in indices if i is not None], False)
    return _encode_apart(tokenizer, text, borders)


def _token_at(offsets: Sequence[tuple[int, int]], border: int) -> int | None:
    """Index of the first token after `border`, None where one lies across."""
    for index, (start, end) in enumerate(offsets):
        if start >= border:
            return index
        if end > border:
            return None
    return len(offsets)


def _encode_apart(tokenizer: Tokenizer, text: str, borders: Sequence[int]) -> Spans:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    starts = []
    edges = [0, *borders, len(text)]
    for left, right in itertools.pairwise(edges):
        if left:
            starts.append(len(ids))
        piece = text[left:right]
        encode = _encode_continuation if left else Tokenizer.encode_with_offsets
        piece_ids, piece_offsets = encode(tokenizer, piece) if piece else ([], [])
        ids += piece_ids
        offsets += [(left + start, left + end) for start, end in piece_offsets]
    starts = [0] * (len(borders) - len(starts)) + starts  # borders at character 0
    return Spans(ids, offsets, starts, True)


def _encode_continuation(
    tokenizer: Tokenizer, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of `text` as the continuation of something, without a dummy prefix.

    SentencePiece tokenizers put a blank before every text; after a prompt it would be
    one blank too many. Behind an anchor that does not merge with it there is none.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    if text.startswith(" ") or not tokenizer.token_text(ids[0]).startswith("\u2581"):
        return ids, offsets
    for anchor in ("\n", ":", "a"):
        before = tokenizer.encode(anchor)
        joint, spans = tokenizer.encode_with_offsets(anchor + text)
        count, width = len(before), len(anchor)
        if joint[:count] == before and _token_at(spans, width) == count:
            return joint[count:], [(a - width, b - width) for a, b in spans[count:]]
    return ids, offsets


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation in tokens.

    Fields:
        spans: tokens and offsets of the whole rendering.
        turns: for each supervised assistant turn, its tokens `[start, end)`, the end
            token included.
    """

    spans: Spans
    turns: list[tuple[int, int]]


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, supervised: Sequence[int]
) -> Chat:
    """Renders and tokenises a conversation and finds its assistant turns.

    A turn begins where the rendering of what comes before it, with the generation
    prompt, ends. It runs through the first end-of-sequence token after its words; the
    last turn, where there is none, to the end of the rendering, an earlier one through
    the first special token, else as far as the rendering without later turns agrees.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        supervised: ascending indices of the assistant messages to find.

    Raises:
        TemplateError: reasons `template_error`, `template_rewrites`.
    """
    text = _render(tokenizer, messages)
    starts = []
    for index in supervised:
        before = _render(tokenizer, messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise TemplateError(
                "template_rewrites",
                f"the chat template renders what precedes message {index} differently "
                "once it is answered, so the border of the answer is not defined",
                "supervise the last turn only (loss_on: last), or choose another "
                "chat template",
            )
        starts.append(len(before))
    spans = encode_spans(tokenizer, text, starts)
    turns = []
    for k, index in enumerate(supervised):
        limit = starts[k + 1] if k + 1 < len(starts) else len(text)
        words_end = _words_end(messages[index], text, starts[k], limit, index)
        last = index == len(messages) - 1
        end = _turn_end(tokenizer, spans, words_end, limit, last)
        if end is None:
            shorter = _render(tokenizer, messages[: index + 1])
            end = _agreement(spans, text, shorter, words_end, index)
        turns.append((spans.borders[k], end))
    return Chat(spans, turns)


def _render(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False
) -> str:
    if not messages:
        raise TemplateError(
            "template_error",
            "the conversation begins with the assistant",
            "put a user message before it",
        )
    if tokenizer.chat_template is None:
        return tokenizer.render(messages)  # raises: a setting is missing, not a row
    try:
        return tokenizer.render(messages, add_generation_prompt)
    except (ValueError, TypeError) as error:
        raise TemplateError(
            "template_error", str(error), "correct the row's messages"
        ) from error


def _words_end(
    message: Mapping[str, Any], text: str, start: int, limit: int, index: int
) -> int:
    words = (message.get("content") or "").strip()
    place = text.find(words, start, limit)
    if place < 0:
        raise TemplateError(
            "template_rewrites",
            f"the chat template changes the words of message {index}",
            "supervise the last turn only (loss_on: last), or choose another template",
        )
    return place + len(words)


def _turn_end(
    tokenizer: Tokenizer, spans: Spans, words_end: int, limit: int, last: bool
) -> int | None:
    """Index after the token that ends a turn, None where only the text can tell."""
    after = [
        index
        for index, (start, end) in enumerate(spans.offsets)
        if words_end <= start < limit and end > start
    ]
    for ends in (frozenset(tokenizer.eos_ids), tokenizer.special_ids):
        for index in after:
            if spans.ids[index] in ends:
                return index + 1
        if last:
            return len(spans.ids)
    return None


def _agreement(
    spans: Spans, text: str, shorter: str, words_end: int, index: int
) -> int:
    same = next(
        (k for k, (a, b) in enumerate(zip(text, shorter, strict=False)) if a != b),
        min(len(text), len(shorter)),
    )
    if same < words_end:
        raise TemplateError(
            "template_rewrites",
            f"the chat template renders message {index} differently once answered",
            "supervise the last turn only (loss_on: last), or choose another template",
        )
    return sum(end <= same for _, end in spans.offsets)
