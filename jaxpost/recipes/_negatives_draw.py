"""Draws of wrong answers: several per prompt, some again where they are at fault."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

from jaxpost import data, generation, models
from jaxpost.recipes._negatives_rows import Item

Fault = Literal["empty", "duplicate", "positive"]


@dataclasses.dataclass(frozen=True)
class Draw:
    """One negative.

    Fields:
        text: without the end token.
        logp: sum over its tokens, the end token included, under the distribution drawn
            from, nats.
        finished: whether it ended by itself.
        draws: how many draws it took.
    """

    text: str
    logp: float
    finished: bool
    draws: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What negatives are drawn with.

    Fields:
        model: the base model.
        tokenizer: for the texts.
        config: how to sample.
        seeds: of each column.
        redraw: which faults to draw again.
        max_redraws: how often.
        strip_leading: where to remove white space at the start of a text.
        batch_size: sequences decoded together.
    """

    model: models.Model
    tokenizer: data.Tokenizer
    config: generation.SamplingConfig
    seeds: tuple[int, ...]
    redraw: frozenset[Fault]
    max_redraws: int
    strip_leading: Literal["chat", "always", "never"]
    batch_size: int

    def draw(
        self,
        items: Sequence[Item],
        first: int,
        *,
        progress: generation.Progress | None = None,
    ) -> list[list[Draw]]:
        """Negatives of items, one per column.

        The first draw of a column uses `fold_in(key(seed), row)`, as `generate` does,
        its redraw number `n` uses `fold_in(fold_in(key(seed), n), row)`.

        Args:
            items: consecutive ones.
            first: place of the first one among all.
            progress: called during the first draws, with the sums of a column.
        """
        columns = range(len(self.seeds))
        todo = {column: list(range(len(items))) for column in columns}
        found: dict[tuple[int, int], Draw] = {}
        for attempt in range(self.max_redraws + 1):
            for column, rows in todo.items():
                drawn = self._draw_once(items, first, rows, column, attempt, progress)
                places = [(row, column) for row in rows]
                found.update(zip(places, drawn, strict=True))
            progress = None  # of the first draws only
            todo = self._at_fault(items, found)
            if not todo:
                break
        return [[found[row, column] for column in columns] for row in range(len(items))]

    def _at_fault(
        self, items: Sequence[Item], found: Mapping[tuple[int, int], Draw]
    ) -> dict[int, list[int]]:
        """Rows to draw again, by column."""
        todo: dict[int, list[int]] = {}
        for row, item in enumerate(items):
            texts = [found[row, column].text for column in range(len(self.seeds))]
            for column, faults in enumerate(
                faults_of(texts, item.completion, self.tokenizer)
            ):
                if faults & self.redraw:
                    todo.setdefault(column, []).append(row)
        return todo

    def _strips(self, item: Item) -> bool:
        if self.strip_leading == "chat":
            return not isinstance(item.prompt, str)
        return self.strip_leading == "always"

    def _draw_once(
        self,
        items: Sequence[Item],
        first: int,
        rows: Sequence[int],
        column: int,
        attempt: int,
        progress: generation.Progress | None,
    ) -> list[Draw]:
        key = jax.random.key(self.seeds[column])
        if attempt:
            key = jax.random.fold_in(key, attempt)
        result = generation.generate_text(
            self.model,
            self.model.params,
            lambda item: item.tokens,
            self.tokenizer.decode,
            [items[row] for row in rows],
            config=self.config,
            key=key,
            batch_size=self.batch_size,
            sequence_ids=[first + row for row in rows],
            progress=progress,
        )
        return [
            self._draw_of(items[row], answer, attempt)
            for row, answer in zip(rows, result.completions, strict=True)
        ]

    def _draw_of(self, item: Item, answer: generation.Completion, attempt: int) -> Draw:
        logp = math.fsum(answer.sampling_logps)
        if not math.isfinite(logp):
            raise FloatingPointError(
                f"{item.source}, row {item.number}: a negative's log-probability is "
                f"{logp}; check the weights, or sample with --dtype float32."
            )
        text = answer.text.lstrip() if self._strips(item) else answer.text
        return Draw(text, logp, answer.finish_reason == "stop", attempt + 1)


def faults_of(
    negatives: Sequence[str], positive: str, tokenizer: data.Tokenizer
) -> list[set[Fault]]:
    """What is wrong with each of a row's negatives; white space around does not count.

    Args:
        negatives: by column; of equal ones the first is no duplicate.
        positive: the right answer. A negative equals it also if only its way through
            the tokenizer and back differs.
        tokenizer: the tokenizer.
    """
    right = {positive.strip(), tokenizer.decode(tokenizer.encode(positive)).strip()}
    seen: set[str] = set()
    found: list[set[Fault]] = []
    for text in (negative.strip() for negative in negatives):
        faults: set[Fault] = set()
        if not text:
            faults.add("empty")
        if text in seen:
            faults.add("duplicate")
        if text in right:
            faults.add("positive")
        seen.add(text)
        found.append(faults)
    return found
