"""Scores of preference data by a model: `jaxpost score`.

By the implicit reward of DPO, or by a reward head; into a JSONL file that can be
continued, a table, a summary and a figure.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from jaxpost import data, models, ops, training, weights
from jaxpost.recipes import _score_layouts, _score_report
from jaxpost.recipes._score_layouts import Item, Layout
from jaxpost.typing import Batch, Params

SMALLEST_BUCKET = 64
Scorer = Callable[[Batch], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Score preference data by DPO's implicit reward or by a reward model.

    Attributes:
        model: Folder or hub name of the model.
        data: File, hub name or built-in of the rows.
        layout: `pairs`; `rewardbench`: pairs with a `subset`; `rm-bench`: a prompt with
            three chosen and three rejected texts.
        kind: `implicit` log-ratio to the reference, or the `reward` of a scalar head.
        reference: Folder or hub name of the model that training began with.
        reference_free: Score by the log-probability alone.
        beta: Factor on the implicit reward.
        out: JSONL file of the scores; an existing one is continued.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        chat_template: Name or file of a template, if not the tokenizer's own.
        split: Split of a hub data set.
        columns: Names of columns, ours to the data's, such as `prompt question`.
        format: Layout of the rows: TRL's, Alpaca's or ShareGPT's.
        chat: Render texts as turns through the chat template.
        max_length: Most tokens of prompt and answer; the model's if not given.
        on_too_long: Refuse longer rows, or truncate their end.
        append_eos: Put an end token behind plain texts.
        on_bad_row: Stop at a row that cannot be used, or skip and count it.
        limit: Rows to read at most.
        batch_tokens: Tokens scored together, padding included; at least one item's.
        dtype: Data type of the weights.
        seed: Of the bootstrap intervals.
        progress: A bar, plain lines, or nothing.

    Raises:
        ValueError: settings that contradict each other.
    """

    model: Positional[str]
    data: str
    layout: Layout = "pairs"
    kind: Literal["implicit", "reward"] = "implicit"
    reference: str | None = None
    reference_free: bool = False
    beta: float = 0.1
    out: str = "results.jsonl"
    tokenizer: str | None = None
    chat_template: str | None = None
    split: str | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: Literal["trl", "alpaca", "sharegpt"] = "trl"
    chat: bool = False
    max_length: int | None = None
    on_too_long: Literal["refuse", "truncate"] = "refuse"
    append_eos: bool = True
    on_bad_row: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    batch_tokens: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    progress: Literal["auto", "rich", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ("implicit", "reward"):
            raise ValueError(f"kind must be implicit or reward, got {self.kind!r}.")
        if self.kind == "reward" and (self.reference or self.reference_free):
            raise ValueError("--kind reward has no reference; leave --reference out.")
        if self.kind == "implicit" and bool(self.reference) == self.reference_free:
            raise ValueError(
                "--kind implicit needs either --reference MODEL, the model that "
                "training began with, or --reference-free."
            )
        if not 0.0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}.")
        if self.batch_tokens < 1:
            raise ValueError(
                f"batch_tokens must be at least 1, got {self.batch_tokens}."
            )


def run_score(config: ScoreConfig) -> dict[str, Any]:
    """Scores every answer of a data set, appends to a file, and summarises it.

    Items that `config.out` already has are not scored again. A line of it holds `id`,
    `row`, `group`, `chosen` and `rejected` (scores, one or three each), `tokens` (of
    each answer, chosen first), `scored_by` and, of the implicit kind, `logps` and
    `ref_logps` of the answers (nats). Beside it come `NAME.summary.json` and, where
    matplotlib is installed, `NAME.margins.svg`.

    Args:
        config: the settings.

    Returns:
        The summary.

    Raises:
        ValueError: the file holds scores of other models or settings; the model has no
            head for `config.kind`; a row does not fit (see `read_items`).
        FloatingPointError: a score is not finite; the message names the row.
    """
    make_scorer, facts, limits = _open_scorer(config)
    words = data.load_tokenizer(
        config.tokenizer or config.model,
        chat_template=config.chat_template,
        vocab_limit=limits["vocab_size"],
    )
    report = data.BadRows()
    max_length = min(config.max_length or limits["positions"], limits["positions"])
    items = _score_layouts.read_items(
        config.data,
        words,
        config.layout,
        split=config.split,
        columns=config.columns,
        format=config.format,
        chat=config.chat,
        max_length=max_length,
        on_too_long=config.on_too_long,
        append_eos=config.append_eos,
        on_bad_row=config.on_bad_row,
        report=report,
        limit=config.limit,
    )
    facts |= {
        "layout": config.layout,
        "tokenizer": words.fingerprint(),
        "max_length": max_length,
        "on_too_long": config.on_too_long,
        "append_eos": config.append_eos,
    }
    scored_by, path = _digest(facts), pathlib.Path(config.out)
    scorer = make_scorer(words.pad_id)
    lines = _score_missing(path, items, scorer, scored_by, words.pad_id, config)
    unique = dict.fromkeys(item.id for item in items)
    summary = _score_report.summarise(
        [lines[i] for i in unique], config.layout, seed=config.seed
    )
    summary |= {
        "model": config.model,
        "data": config.data,
        "rows": len(items) + report.total,
        "skipped": dict(report.counts),
        "duplicates": len(items) - len(unique),
        "truncated": sum(any(e.truncated for e in item.answers) for item in items),
        "scored_by": scored_by,
        "settings": facts,
    }
    _score_report.write(summary, path)
    return summary


def _open_scorer(
    config: ScoreConfig,
) -> tuple[Callable[[int], Scorer], dict[str, Any], dict[str, int]]:
    """The scorer of a padding id, what tells its scores from others', and what it can
    take."""
    dtype, kind = jnp.dtype(config.dtype), config.kind
    policy = weights.load(config.model, dtype=dtype)
    found = "reward" if policy.config.head == "score" else "implicit"
    if found != kind:
        what = "a scalar head" if found == "reward" else "no scalar head"
        raise ValueError(f"{config.model} has {what}; score it with --kind {found}.")
    opened = [policy]
    if config.reference is not None:
        opened.append(weights.load(config.reference, dtype=dtype))
    facts = {
        "kind": kind,
        "beta": config.beta,
        "dtype": config.dtype,
        "weights": [training.fingerprint_params(m.params) for m in opened],
        "models": [str(m.config) for m in opened],
    }
    limits = {
        "vocab_size": min(m.config.vocab_size for m in opened),
        "positions": min(m.config.max_positions for m in opened),
    }
    if kind == "reward":
        del facts["beta"]  # it is not read
        return lambda pad_id: reward_scorer(policy, pad_id=pad_id), facts, limits
    scorer = implicit_scorer(*opened, beta=config.beta)
    return lambda pad_id: scorer, facts, limits


def implicit_scorer(
    policy: models.Model, reference: models.Model | None = None, *, beta: float
) -> Scorer:
    """DPO's implicit reward of answers, `beta (log p - log p_ref)`, without logits.

    Args:
        policy: gives `p`.
        reference: gives `p_ref`; None takes 1.
        beta: factor.

    Returns:
        A function from a batch of answers `[B, T]` to `scores`, `logps` and
        `ref_logps` (zero without a reference), float32 or wider `[B]`, nats.
    """

    def both(params: tuple[Params, ...], batch: Batch) -> dict[str, jax.Array]:
        opened = [m for m in (policy, reference) if m is not None]
        found = [answer_logps(m, p, batch) for m, p in zip(opened, params, strict=True)]
        logps = found[0]
        ref_logps = found[1] if len(found) > 1 else jnp.zeros_like(logps)
        scores = beta * (logps - ref_logps)
        return {"scores": scores, "logps": logps, "ref_logps": ref_logps}

    compiled = jax.jit(both)
    params = tuple(m.params for m in (policy, reference) if m is not None)
    return lambda batch: jax.device_get(compiled(params, dict(batch)))


def reward_scorer(model: models.Model, *, pad_id: int) -> Scorer:
    """The score of each text at its last token, float32 or wider `[B]`.

    Tokens of the padding id do not count, as in transformers and recipe `reward`: a
    tokenizer may pad with its end token.

    Args:
        model: with a score head.
        pad_id: the tokenizer's.

    Returns:
        A function from a batch `[B, T]` to `scores`.
    """

    def score(params: Params, batch: Batch) -> dict[str, jax.Array]:
        hidden = model.apply(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        ).hidden
        seen = (batch["segment_ids"] > 0) & (batch["tokens"] != pad_id)
        last = ops.last_token(hidden, seen)
        return {"scores": models.scores(params, last)}

    compiled = jax.jit(score)
    return lambda batch: jax.device_get(compiled(model.params, dict(batch)))


def answer_logps(model: models.Model, params: Params, batch: Batch) -> jax.Array:
    """Log-probability of each answer, summed over its tokens, `[B]`, nats."""
    hidden = model.apply(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    ).hidden
    targets, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
    stats = ops.linear_token_logps(hidden, model.unembed(params), targets, mask=mask)
    return jnp.sum(stats.logps, axis=-1)


def _score_missing(
    path: pathlib.Path,
    items: Sequence[Item],
    scorer: Scorer,
    scored_by: str,
    pad_id: int,
    config: ScoreConfig,
) -> dict[int, dict[str, Any]]:
    """All lines of `path` by id, after scoring and appending those it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_scores(path, scored_by)
    todo = list({i.id: i for i in items if i.id not in lines}.values())
    shown = training.make_progress(
        config.progress, title="score", start=0, total=len(todo), plain_interval_s=10.0
    )
    if len(todo) < len(items):
        shown.note(f"{path} already has {len(items) - len(todo)} of {len(items)} items")
    done = 0
    try:
        with path.open("a", encoding="utf-8") as file:
            for part, length, rows in batches(todo, config.batch_tokens):
                batch = _padded(
                    [e for i in part for e in i.answers], length, rows, pad_id
                )
                found = scorer(batch)
                for line in _lines(part, found, scored_by):
                    file.write(json.dumps(line) + "\n")
                    lines[line["id"]] = line
                file.flush()
                done += len(part)
                shown.update(done, {})
    finally:
        shown.close()
    return lines


def batches(
    items: Sequence[Item], batch_tokens: int
) -> Iterator[tuple[list[Item], int, int]]:
    """Items of similar length together.

    Lengths are rounded up to powers of two and their three-halves, so that few programs
    are compiled, each for one number of rows.

    Yields:
        Items, the length to pad their answers to, and the rows to fill up to.
    """
    by_bucket: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        key = bucket_length(item.length), len(item.answers)
        by_bucket.setdefault(key, []).append(item)
    for (length, answers), members in sorted(by_bucket.items()):
        count = max(batch_tokens // (length * answers), 1)
        for first in range(0, len(members), count):
            yield members[first : first + count], length, count * answers


def bucket_length(length: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that is at least `length`."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def _padded(
    examples: Sequence[data.Example], length: int, rows: int, pad_id: int
) -> dict[str, np.ndarray]:
    """A batch of `rows` rows; those over repeat the last example and are not read."""
    filled = [*examples, *[examples[-1]] * (rows - len(examples))]
    return data.pad_batch(filled, length, pad_id=pad_id)


def _lines(
    items: Sequence[Item], found: Mapping[str, np.ndarray], scored_by: str
) -> Iterator[dict[str, Any]]:
    start = 0
    for item in items:
        rows = slice(start, start + len(item.answers))
        start = rows.stop
        scores = [float(x) for x in found["scores"][rows]]
        if not np.isfinite(scores).all():
            raise FloatingPointError(
                f"row {item.row} (id {item.id}): its scores are {scores}; check the "
                "weights, or score with --dtype float32."
            )
        others = {
            name: [float(x) for x in values[rows]]
            for name, values in found.items()
            if name != "scores"
        }
        yield {
            "id": item.id,
            "row": item.row,
            "group": item.group,
            "chosen": scores[: len(item.chosen)],
            "rejected": scores[len(item.chosen) :],
            "tokens": [int(e.loss_mask.sum()) for e in item.answers],
            **others,
            "scored_by": scored_by,
        }


def read_scores(path: pathlib.Path, scored_by: str) -> dict[int, dict[str, Any]]:
    """Lines of a file of scores by id, after removing a torn last line.

    Raises:
        ValueError: a line is none of this command's, or of other models or settings.
    """
    if not path.exists():
        return {}
    lines: dict[int, dict[str, Any]] = {}
    whole = 0  # bytes of complete lines
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                break  # the process was stopped while writing
            try:
                line = json.loads(text)
                other = line["scored_by"]
                lines[line["id"]] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a line of scores ({error!r}); name "
                    "another --out, or move this file away."
                ) from error
            if other != scored_by:
                raise ValueError(
                    f"{path}:{number} was scored by other weights or settings "
                    f"({other}, now {scored_by}); name another --out, or move this "
                    "file away."
                )
            whole += len(text)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return lines


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
