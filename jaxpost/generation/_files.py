"""Answers as JSON lines: one per prompt, in the order of the prompts, resumable.

Knows neither weights nor tokenizers: whoever does says which ones they are.
"""

import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxpost.generation._config import SamplingConfig
from jaxpost.generation._processors import Processor
from jaxpost.generation._settings_file import AnswerSettings, sampler_settings
from jaxpost.generation._text import (
    Completion,
    Decode,
    Encode,
    Progress,
    TextStats,
    add_answer,
    stream_text,
)
from jaxpost.typing import DecodeFns, Params


def write_completions(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    fns: DecodeFns,
    params: Params,
    encode: Encode,
    decode: Decode,
    *,
    config: SamplingConfig,
    key: jax.Array,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    processors: Sequence[Processor] = (),
    with_ids: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TextStats:
    """Answer rows and append one JSON line for each to a file.

    Rows whose id the file already has are skipped, and a last line without an end (the
    process was killed while writing) is removed and answered again. The sequence id of
    a row is its place among all rows, so a resumed file has the answers that an
    uninterrupted one would have.

    What the answers depend on stands beside the file, in `NAME.settings.json`: sampler,
    key, stop strings, `with_ids`, `settings`, and a digest of the rows. A file of other
    settings or rows is not continued, but further rows may follow those it is of.

    Lines come in the order of the rows: an answer waits for those of the rows before
    it, so killing the process costs those that finished while the oldest one was still
    being decoded.

    A line is the row's own columns with `id`, `prompt`, `completion`, `finish_reason`,
    `prompt_tokens` and `completion_tokens` (counts), and `completion_logp` (sum, nats).

    Args:
        path: the output; made with its folders if it does not exist.
        rows: each with a text `prompt`; `id` (text or integer) defaults to the row's
            place; the other columns are copied and must be JSON.
        fns, params, encode, decode, config, key, stop_strings, batch_size, processors:
            as in `generate_text`.
        with_ids: also write `prompt_ids` and `completion_ids` (those of
            `Completion.tokens`).
        settings: what else answers depend on, JSON values by name: parameters and
            processors are not looked at, so put what tells them from others here.
        progress: called after each answer; skipped rows count as done.

    Returns:
        Sums over the rows answered now, with `total` and `done` over all rows.

    Raises:
        ValueError: two rows share an id, a prompt is missing or not text, or the file
            holds something else than such lines, or was written with other settings or
            for other rows (names what differs).
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = _with_ids(rows)
    facts = dict(settings or {}) | sampler_settings(config, key, stop_strings)
    facts |= {"with_ids": with_ids}
    done = _open(path, AnswerSettings(path, facts, numbered))
    todo = [(n, row) for n, row in enumerate(numbered) if row["id"] not in done]
    stats = TextStats(len(numbered) - len(todo), len(numbered), 0, 0, 0, 0.0)
    began = time.perf_counter()
    answers = stream_text(
        fns,
        params,
        encode,
        decode,
        [row["prompt"] for _, row in todo],
        config=config,
        key=key,
        stop_strings=stop_strings,
        batch_size=batch_size,
        check_every=16,
        processors=processors,
        sequence_ids=[number for number, _ in todo],
    )
    lines = _in_order(answers, [row for _, row in todo], encode if with_ids else None)
    with path.open("a", encoding="utf-8") as file:
        for answer, ready in lines:
            file.writelines(ready)
            file.flush()
            stats = add_answer(stats, answer, time.perf_counter() - began)
            if progress is not None:
                progress(stats)
    return stats


def _in_order(
    answers: Iterable[tuple[int, Completion]],
    rows: Sequence[Mapping[str, Any]],
    encode: Encode | None,
) -> Iterator[tuple[Completion, list[str]]]:
    """Each answer as it comes, with the lines that may be written now; ids of tokens
    are in the lines if `encode` is given."""
    held: dict[int, Completion] = {}
    written = 0
    for index, answer in answers:
        held[index] = answer
        ready = []
        while written in held:
            ready.append(_line(rows[written], held.pop(written), encode))
            written += 1
        yield answer, ready


def _line(row: Mapping[str, Any], answer: Completion, encode: Encode | None) -> str:
    ids = {}
    if encode is not None:
        ids["prompt_ids"] = [int(i) for i in encode(row["prompt"])]
        ids["completion_ids"] = [int(i) for i in answer.tokens]
    columns = {
        **row,
        **ids,
        "completion": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "completion_logp": sum(answer.logps),
    }
    return json.dumps(columns, ensure_ascii=False) + "\n"


def _with_ids(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as dictionaries that all have a prompt and an id of their own."""
    out: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(
                f"row {number} needs a text in its column 'prompt', got {prompt!r}."
            )
        name = row.get("id", number)
        if not isinstance(name, str | int):
            raise ValueError(f"row {number}: id must be text or integer, got {name!r}.")
        if name in seen:
            raise ValueError(f"rows {seen[name]} and {number} share the id {name!r}.")
        seen[name] = number
        out.append({**row, "id": name})
    return out


def _open(path: pathlib.Path, settings: AnswerSettings) -> set[Any]:
    """Ids in the file, after checking its settings and removing a torn last line."""
    if path.exists() and path.stat().st_size:
        done, whole = _read_ids(path)
        settings.check()
        if whole < path.stat().st_size:
            os.truncate(path, whole)
    else:
        done = set()
    settings.write()
    return done


def _read_ids(path: pathlib.Path) -> tuple[set[Any], int]:
    """Ids of the complete lines of a file, and their bytes."""
    done, whole = set(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a line of completions ({error}); name "
                    "another output file, or move this one away."
                ) from error
            whole += len(line)
    return done, whole
