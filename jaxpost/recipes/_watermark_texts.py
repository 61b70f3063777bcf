"""Texts to be tested for a watermark: read, tokenised, and given their entropies."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxpost import data, generation, models
from jaxpost.generation import watermark

SMALLEST_BUCKET = 64
_INCOMPLETE = "\ufffd"  # what an unfinished character decodes to
_CONTEXT = 8  # tokens decoded with each one to find its own text


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as tokens.

    Fields:
        name: where it came from, for messages.
        ids: prompt and text, int32 `[T]`.
        prompt_length: tokens that are not tested, at least 1.
        entropies: given ones, float32 `[T]`, or None.
        record: what the text says of its watermark, or None.
        notes: what may make the test wrong, in words.
    """

    name: str
    ids: np.ndarray
    prompt_length: int
    entropies: np.ndarray | None = None
    record: Any = None
    notes: tuple[str, ...] = ()


def read_documents(
    source: str,
    words: data.Tokenizer,
    *,
    prompt: str | None = None,
    use_prompts: bool = True,
    retokenize: bool = False,
    entropies: str | None = None,
    limit: int | None = None,
) -> list[Document]:
    """Texts of a file, ready to be tested.

    Args:
        source: JSONL (also gzipped) of rows with `completion` or `text`, and perhaps
            `prompt`, `prompt_ids`, `completion_ids` and `watermark`; any other file is
            one text; else the name of a data set.
        words: the tokenizer that the texts were marked with.
        prompt: in front of a file that is one text.
        use_prompts: False tests each text as if its prompt were not known.
        retokenize: encode texts even where the rows have their ids.
        entropies: JSON file with a list of entropies per text (a single list for a file
            that is one text), nats, one for each of its tokens without the prompt's.
        limit: texts to read at most.

    Raises:
        ValueError: a row has no text, or ids that are not; the entropies are no lists
            of numbers, not as many as texts, or one has another length than its text.
        FileNotFoundError: there is no such file or data set.
    """
    found = []
    for name, row in _rows(source, prompt):
        if limit is not None and len(found) >= limit:
            break
        found.append(_document(name, row, words, use_prompts, retokenize))
    if not found:
        raise ValueError(f"{source}: no text in it.")
    if entropies is None:
        return found
    return _with_entropies(found, entropies)


def _rows(source: str, prompt: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    path = pathlib.Path(source)
    if path.is_file() and not path.name.endswith((".jsonl", ".jsonl.gz")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 text ({error}).") from error
        yield source, {"prompt": prompt, "completion": text}
        return
    if prompt is not None:
        raise ValueError(
            "--prompt goes with a file that is one text; rows have a column 'prompt'."
        )
    rows = data.read_jsonl(path) if path.is_file() else data.load_rows(source)
    for row in rows:
        yield f"{row.source}, row {row.number}", row.columns


def _document(
    name: str,
    row: dict[str, Any],
    words: data.Tokenizer,
    use_prompts: bool,
    retokenize: bool,
) -> Document:
    text = row.get("completion", row.get("text"))
    if not isinstance(text, str):
        raise ValueError(
            f"{name}: needs a text in its column 'completion' or 'text', got "
            f"{text!r:.40}."
        )
    prompt = (row.get("prompt") or "") if use_prompts else ""
    if not isinstance(prompt, str):
        raise ValueError(f"{name}: its prompt must be text, got {prompt!r:.40}.")
    ids, prompt_length, notes = encode_text(words, text, prompt)
    stored = row.get("completion_ids")
    if stored is not None:
        kept = _ids(name, "completion_ids", stored, words.vocab_size)
        differs = _first_difference(ids[prompt_length:], kept)
        if differs is not None:
            used = "re-tokenised ones" if retokenize else "stored ones"
            notes.append(
                "encoding the text again gives other tokens than were generated, from "
                f"token {differs} of the text on; the {used} are tested, and whoever "
                "has the text alone sees a weaker mark"
            )
        if not retokenize:
            before = ids[:prompt_length]
            if use_prompts and row.get("prompt_ids") is not None:
                before = _ids(name, "prompt_ids", row["prompt_ids"], words.vocab_size)
            elif not use_prompts:
                before = _begin(words)
            ids, prompt_length = [*before, *kept], max(1, len(before))
    return Document(
        name,
        np.asarray(ids, np.int32),
        prompt_length,
        record=row.get("watermark"),
        notes=tuple(notes),
    )


def encode_text(
    words: data.Tokenizer, text: str, prompt: str = ""
) -> tuple[list[int], int, list[str]]:
    """Ids of prompt and text in one piece, how many are not tested, and warnings.

    A token that holds the end of the prompt and the beginning of the text is counted
    with the prompt.
    """
    begin = _begin(words)
    ids, offsets = words.encode_with_offsets(prompt + text)
    first = next(
        (n for n, (start, _) in enumerate(offsets) if start >= len(prompt)), len(ids)
    )
    notes = []
    if first and offsets[first - 1][1] > len(prompt):
        notes.append("a token holds the end of the prompt and the text's beginning")
    if words.decode(ids).strip() != (prompt + text).strip():
        notes.append(
            "decoding the tokens does not give the text back: the tokenizer loses "
            "something, and the tokens may not be those that were generated"
        )
    return [*begin, *ids], max(1, len(begin) + first), notes


def _begin(words: data.Tokenizer) -> list[int]:
    return [words.bos_id] if words.adds_bos and words.bos_id is not None else []


def _ids(name: str, column: str, value: Any, vocab_size: int) -> list[int]:
    whole = isinstance(value, list) and all(type(i) is int for i in value)
    if not whole or not all(0 <= i < vocab_size for i in value):
        raise ValueError(
            f"{name}: {column} must be a list of ids below {vocab_size}, got "
            f"{value!r:.60}."
        )
    return value


def _first_difference(encoded: Sequence[int], stored: Sequence[int]) -> int | None:
    """Where stored ids differ; stop tokens that they have at their end do not count."""
    for place, (one, other) in enumerate(zip(encoded, stored, strict=False)):
        if one != other:
            return place
    return len(stored) if len(encoded) > len(stored) else None


def _with_entropies(documents: list[Document], path: str) -> list[Document]:
    content = _read_entropies(path)
    if len(content) != len(documents):
        raise ValueError(
            f"{path} has entropies of {len(content)} texts, not of {len(documents)}."
        )
    out = []
    for document, values in zip(documents, content, strict=True):
        length = len(document.ids) - document.prompt_length
        if len(values) != length:
            raise ValueError(
                f"{path}: {len(values)} entropies for the {length} tokens of "
                f"{document.name}; they must be of its own tokens, without the "
                "prompt's."
            )
        whole = np.zeros(len(document.ids), np.float32)
        whole[document.prompt_length :] = values
        out.append(dataclasses.replace(document, entropies=whole))
    return out


def _read_entropies(path: str) -> list[list[float]]:
    """A list of numbers per text; a single list is one text's."""
    wanted = f"{path} must be a JSON list of entropies, or a list of such lists, one "
    wanted += "per text (finite numbers, nats)"
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wanted}, but is not JSON ({error}).") from error
    if not isinstance(content, list):
        raise ValueError(f"{wanted}, got {content!r:.40}.")
    if not any(isinstance(values, list) for values in content):
        content = [content]
    for number, values in enumerate(content, start=1):
        if not isinstance(values, list):
            raise ValueError(f"{wanted}; text {number} has {values!r:.40} instead.")
        for place, value in enumerate(values):
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if not plain or not -math.inf < value < math.inf:
                raise ValueError(
                    f"{wanted}; token {place} of text {number} has {value!r:.40}."
                )
    return content


def add_entropies(
    documents: Sequence[Document], model: models.Model, *, batch_tokens: int = 8192
) -> list[Document]:
    """The documents with the entropies that a model sees in them.

    A document longer than the model's positions is read in pieces that overlap by half
    of them, so that each token still has at least that many before it.

    Args:
        documents: texts.
        model: the one that generated them, or a surrogate with the same tokenizer.
        batch_tokens: tokens read together, padding included; at least one piece's.
    """
    room = model.config.max_positions
    pieces = []
    for number, document in enumerate(documents):
        length = len(document.ids)
        pieces.append((number, 0, min(length, room), document.prompt_length))
        for start in range(room, length, max(room // 2, 1)):
            end = min(start + max(room // 2, 1), length)
            pieces.append((number, end - room, end, start))
    by_bucket: dict[int, list[tuple[int, int, int, int]]] = {}
    for piece in pieces:
        if piece[3] < piece[2]:
            bucket = generation.bucket_length(
                piece[2] - piece[1], minimum=SMALLEST_BUCKET
            )
            by_bucket.setdefault(min(bucket, room), []).append(piece)
    values = [np.zeros(len(document.ids), np.float32) for document in documents]
    for bucket, members in sorted(by_bucket.items()):
        rows = max(batch_tokens // bucket, 1)
        for first in range(0, len(members), rows):
            part = members[first : first + rows]
            _read_pieces(part, bucket, rows, documents, model, values)
    return [
        dataclasses.replace(document, entropies=found)
        for document, found in zip(documents, values, strict=True)
    ]


def _read_pieces(
    pieces: Sequence[tuple[int, int, int, int]],
    bucket: int,
    rows: int,
    documents: Sequence[Document],
    model: models.Model,
    values: list[np.ndarray],
) -> None:
    """Entropies of pieces `(document, begin, end, first asked)` into `values`."""
    tokens = np.zeros((rows, bucket), np.int32)
    mask = np.zeros((rows, bucket), np.bool_)
    for row, (number, begin, end, asked) in enumerate(pieces):
        tokens[row, : end - begin] = documents[number].ids[begin:end]
        mask[row, asked - begin : end - begin] = True
    found = np.asarray(watermark.token_entropies(model, model.params, tokens, mask))
    for row, (number, begin, end, asked) in enumerate(pieces):
        values[number][asked:end] = found[row, asked - begin : end - begin]


def token_pieces(words: data.Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; they join to the whole.

    A character of several tokens is the last one's.
    """
    pieces = []
    for place in range(len(ids)):
        begin = max(0, place - _CONTEXT)
        before = words.decode(ids[begin:place]).rstrip(_INCOMPLETE)
        after = words.decode(ids[begin : place + 1])
        last = place == len(ids) - 1
        whole = last or not after.endswith(_INCOMPLETE)
        pieces.append(after[len(before) :] if whole else "")
    return pieces


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """A folder for results, made if it does not exist."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
