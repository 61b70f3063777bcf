"""Generated and human answers as detection sees them: tokens and their entropies."""

import ast
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpost import data, generation, models
from jaxpost.generation import watermark

ROWS = 32
"""Texts per pass of the model."""


class Texts(NamedTuple):
    """Prompts with answers, padded to common widths.

    Fields:
        tokens: int32 `[N, T]`.
        entropies: of the distribution that each was drawn from, float32 `[N, T]`, nats.
        mask: True on the answers' tokens, bool `[N, T]`.
    """

    tokens: np.ndarray
    entropies: np.ndarray
    mask: np.ndarray


class Answers(NamedTuple):
    """What a model answered, one entry per prompt and sample.

    Fields:
        tokens: ids, without the end token.
        texts: decoded.
        complete: whether it ended by itself.
    """

    tokens: list[list[int]]
    texts: list[str]
    complete: list[bool]


def answer(
    model: models.Model,
    tokenizer: data.Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    config: generation.SamplingConfig,
    key: jax.Array,
    processors: Sequence[generation.Processor] = (),
    samples: int = 1,
    stop_strings: Sequence[str] = (),
    batch_size: int = 32,
) -> Answers:
    """Answers to prompts, `samples` each, those of one prompt side by side."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    result = generation.generate_text(
        model,
        model.params,
        list,
        lambda ids: tokenizer.decode(ids, skip_special=True),
        repeated,
        config=config,
        key=key,
        processors=processors,
        stop_strings=stop_strings,
        batch_size=batch_size,
    )
    special = tokenizer.special_ids
    return Answers(
        tokens=[
            list(c.tokens[:-1] if c.tokens and c.tokens[-1] in special else c.tokens)
            for c in result.completions
        ],
        texts=[c.text for c in result.completions],
        complete=[c.finish_reason != "length" for c in result.completions],
    )


def read_texts(
    model: models.Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Texts:
    """Entropies of answers under a model, by one pass over each text.

    Args:
        model: that generated them, or a surrogate.
        pairs: ids of a prompt and of its answer, neither empty.
    """
    width = max((len(p) + len(a) for p, a in pairs), default=1)
    width = -(-width // 64) * 64
    count = -(-max(1, len(pairs)) // ROWS) * ROWS  # whole passes: one program
    tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for row, (prompt, ids) in enumerate(pairs):
        whole = [*prompt, *ids]
        tokens[row, : len(whole)] = whole
        mask[row, len(prompt) : len(whole)] = True
    lengths = np.maximum(1, width - np.argmax(mask[:, ::-1], axis=1))
    entropies = np.concatenate(
        [
            watermark.token_entropies(
                model,
                model.params,
                tokens[at : at + ROWS],
                mask[at : at + ROWS],
                lengths=lengths[at : at + ROWS],
            )
            for at in range(0, count, ROWS)
        ]
    )
    kept = slice(len(pairs))
    return Texts(tokens[kept], entropies[kept], mask[kept])


def z_scores(
    texts: Texts,
    key: watermark.WatermarkKey,
    *,
    gamma: float,
    tau: float,
    unique: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """z and the number of scored tokens of each text, `[N]` each."""
    marks = watermark.mark_tokens(*texts, key, gamma=gamma, tau=tau, unique=unique)
    scored = np.asarray(marks.scored).sum(axis=1)
    green = np.asarray(marks.scored & marks.green).sum(axis=1)
    return watermark.z_scores(green, scored, gamma=gamma), scored


def parses(source: str, *, complete: bool) -> bool:
    """Whether a program is Python; its last line may be unfinished if it was cut."""
    lines = source.splitlines(keepends=True)
    try:
        ast.parse(source if complete else "".join(lines[:-1]))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
