"""How the answers of a round are laid out in rows; the cheapest way is reckoned."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpost import data, ops

STEP = 64
"""Widths of rows are multiples of it, as blocks of attention are."""

Tokens = Sequence[int] | np.ndarray


class Plan(NamedTuple):
    """How answers are laid out in rows.

    Fields:
        answers: of a group that share a row.
        widths: columns that rows may have, rising.
        align: answers begin at multiples of it where that makes no wider row, and the
            row is a multiple too, so that blocks of attention end where they do.
    """

    answers: int
    widths: tuple[int, ...]
    align: int = 1

    def choose(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Sequence[Tokens]],
    ) -> tuple[int, int]:
        """The width for these prompts with their answers, and the `align` to use."""

        def needed(align: int) -> int:
            return max(
                data.joined_length(prompt, row, align=align)
                for prompt, row in zip(prompts, answers, strict=True)
            )

        width = next(width for width in self.widths if width >= needed(1))
        fits = width % self.align == 0 and needed(self.align) <= width
        return width, self.align if fits else 1


def plan_rows(
    *, samples: int, answers_per_row: int | None, prompt: int, answer: int, hidden: int
) -> Plan:
    """Chooses how many answers share a row with their prompt, and where they begin.

    More of them save prompt tokens but attend over longer rows: the products of a
    layer take about 24 D^2 operations a token, attention 4 D for each token it looks
    at, and its operations, between which scores are stored, take `_attention_weight`
    times as long. It goes through blocks of tokens and skips those of other answers.
    With answers that begin where blocks do, no block holds parts of two of them, at the
    price of columns left empty. On a GPU cuDNN skips nothing.

    Args:
        samples: G; a divisor of it is chosen.
        answers_per_row: the choice, if made already.
        prompt, answer: tokens of the longest.
        hidden: D.
    """
    block = ops.attention_block()

    def width_of(count: int, align: int) -> int:
        needed = data.joined_length(range(prompt), [range(answer)] * count, align=align)
        return math.ceil(needed / align) * align

    def cost(plan: tuple[int, int]) -> float:
        count, align = plan
        width = width_of(count, align)
        if jax.default_backend() == "gpu":
            pairs = width**2 / 2
        elif align == block:
            pairs = _aligned_pairs(count, prompt, answer, block)
        else:
            pairs = _dense_pairs(width, prompt, answer, block)
        attention = _attention_weight() * 4.0 * hidden * pairs
        return (24.0 * hidden**2 * width + attention) / count

    counts = [count for count in range(1, samples + 1) if samples % count == 0]
    if answers_per_row is not None:
        counts = [answers_per_row]
    chosen, align = min(
        ((count, align) for count in counts for align in (1, block)), key=cost
    )
    full = width_of(chosen, align)
    widths = {math.ceil(full * part / 4 / STEP) * STEP for part in (1, 2, 3, 4)}
    return Plan(chosen, tuple(sorted(widths)), align)


def _aligned_pairs(count: int, prompt: int, answer: int, block: int) -> float:
    """Pairs of tokens in the blocks looked at: the prompt's, and the own ones."""
    shared, own = math.ceil(prompt / block), math.ceil(answer / block)
    blocks = shared * (shared + 1) / 2 + count * (own * shared + own * (own + 1) / 2)
    return blocks * block**2


def _dense_pairs(width: int, prompt: int, answer: int, block: int) -> float:
    """The same without gaps, about: a block sees those of the prompt, of half an answer
    on average, and one that it shares with a neighbour."""
    blocks = math.ceil(width / block)
    size = width / blocks
    seen = math.ceil(prompt / size) + math.ceil(answer / (2 * size)) + 1
    return sum(min(i + 1, seen) for i in range(blocks)) * size**2


def _attention_weight() -> float:
    """Four on a CPU, where a layer (hidden size 256, answers of 128 tokens) took 24 us
    a token and attention 0.05 to 0.09 us a pair, forward and backward, on 2 cores: from
    a profile of `benchmarks/rivals/grpo_jaxpost.py --answers_per_row 1` (or 8)."""
    return 4.0 if jax.default_backend() == "cpu" else 1.0
