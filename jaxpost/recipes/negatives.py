"""Negatives of a base model for discriminative fine-tuning: `jaxpost negatives`.

For each prompt with a right answer, several answers that the base model gives, with the
sampler's own log-probability of each; recipe `discriminative` trains on the file.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
from tyro.conf import Positional

from jaxpost import data, generation, training, weights
from jaxpost.recipes import _negatives_file
from jaxpost.recipes._negatives_draw import Draw, Fault, Sampler
from jaxpost.recipes._negatives_rows import Item, read_items

WINDOW_BATCHES = 4
"""Batches of prompts drawn and written together: what a kill can cost at most."""


@dataclasses.dataclass(frozen=True)
class NegativesConfig:
    """Sample negatives of a base model, for discriminative fine-tuning.

    Attributes:
        model: Folder or hub name of the base model.
        data: File, hub name or built-in of rows with a prompt and a right answer (of
            a preference, the chosen one).
        out: JSONL file to write; one that was stopped is continued.
        samples_per_prompt: Negatives that a training step takes per prompt.
        epochs: Epochs of training, each with negatives of its own; the file gets
            samples-per-prompt times epochs per row.
        system_message: Put before the prompt when sampling, and not written: as the
            conversation's system message (in place of its own), or before plain text.
        temperature: Divides the logits.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the smallest set of tokens with this probability; None keeps all.
        max_new_tokens: Longest negative, tokens.
        seed: Of the first column; each further column takes the next number.
        seeds: Of every column, instead.
        strip_leading: Remove white space at the start of negatives: in conversations,
            where templates write their own; always; or never.
        redraw: Negatives to draw again: empty ones, duplicates of another column's,
            those that equal the right answer.
        max_redraws: How often at most; what is still at fault then is kept and counted.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        chat_template: Name or file of a template, if not the tokenizer's own.
        split: Split of a hub or built-in data set.
        columns: Names of columns, ours to the data's, such as `prompt question`.
        format: Layout of the rows: TRL's, Alpaca's or ShareGPT's.
        prompt_suffix: Put behind prompts that are plain text; it is written with them.
        chat: Write plain prompts as a user's turn, for the chat template.
        on_bad_row: Stop at a row that cannot be used, or skip and count it.
        limit: Rows to read at most.
        batch_size: Sequences decoded together.
        dtype: Data type of the weights and the cache.
        progress: A bar, plain lines, or nothing.

    Raises:
        ValueError: a setting is out of range; there are not as many seeds as columns.
    """

    model: Positional[str]
    data: str
    out: str = "negatives.jsonl"
    samples_per_prompt: int = 2
    epochs: int = 2
    system_message: str | None = None
    temperature: float = 0.7
    top_k: int | None = 50
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int = 0
    seeds: tuple[int, ...] = ()
    strip_leading: Literal["chat", "always", "never"] = "chat"
    redraw: tuple[Fault, ...] = ("empty",)
    max_redraws: int = 4
    tokenizer: str | None = None
    chat_template: str | None = None
    split: str | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: Literal["trl", "alpaca", "sharegpt"] = "trl"
    prompt_suffix: str = ""
    chat: bool = False
    on_bad_row: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    progress: Literal["auto", "rich", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.max_redraws < 0:
            raise ValueError(
                f"max_redraws must not be negative, got {self.max_redraws}."
            )
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: greedy answers "
                "to a prompt would all be the same."
            )
        unknown = set(self.redraw) - set(get_args(Fault))
        if unknown:
            raise ValueError(
                f"redraw must be some of {', '.join(get_args(Fault))}, got "
                f"{', '.join(sorted(unknown))}."
            )
        if self.seeds and len(self.seeds) != self.column_count:
            raise ValueError(
                f"{len(self.seeds)} seeds for {self.samples_per_prompt} samples per "
                f"prompt x {self.epochs} epochs = {self.column_count} columns: give as "
                "many, or --seed alone."
            )
        if min(self.column_seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {self.column_seeds}.")
        if not self.out.endswith(".jsonl"):
            raise ValueError(f"out must be the name of a .jsonl file, got {self.out}.")

    @property
    def column_count(self) -> int:
        """Negatives per row."""
        return self.samples_per_prompt * self.epochs

    @property
    def column_seeds(self) -> tuple[int, ...]:
        """One seed per column."""
        return self.seeds or tuple(range(self.seed, self.seed + self.column_count))


def run_negatives(config: NegativesConfig) -> dict[str, Any]:
    """Draws the negatives that `config.out` lacks, and summarises the file.

    A line holds `prompt` (text or messages, without `system_message`), `completion`
    (the right answer, text), `negatives` (texts, one per column, without end token),
    `negative_logps` (of each, under the distribution that it was drawn from: the sum
    over its tokens, the end token included, nats), `negative_finished` (whether it
    ended by itself rather than at the length limit), `negative_draws` (how many draws
    it took) and `id` (that of `data.encode_row` for this prompt and completion). Lines
    stand in the order of the rows, each prompt with its answer once.

    The column of a seed holds what `jaxpost generate` draws with that seed. Beside the
    file come `NAME.settings.json`, written before the first line, and
    `NAME.summary.json`. A stopped run goes on where its last whole window of prompts
    ends, and leaves the same bytes as an uninterrupted one.

    Args:
        config: the settings.

    Returns:
        The summary.

    Raises:
        BadRow: a row has no prompt with a right answer, or is too long, and
            `config.on_bad_row` is `"stop"`.
        ValueError: the file was sampled with other settings (the message names the
            first that differs), or is none of this command's.
        FloatingPointError: a log-probability is not finite; the message names the row.
    """
    model = weights.load(config.model, dtype=jnp.dtype(config.dtype))
    words = data.load_tokenizer(
        config.tokenizer or config.model,
        chat_template=config.chat_template,
        vocab_limit=model.config.vocab_size,
    )
    report = data.BadRows()
    items, repeated = read_items(
        config.data,
        words,
        room=model.config.max_positions - config.max_new_tokens,
        system_message=config.system_message,
        chat=config.chat,
        on_bad_row=config.on_bad_row,
        report=report,
        split=config.split,
        columns=config.columns,
        format=config.format,
        prompt_suffix=config.prompt_suffix,
        limit=config.limit,
    )
    window = WINDOW_BATCHES * config.batch_size
    file = _negatives_file.NegativesFile(
        pathlib.Path(config.out),
        settings=_settings(config, window),
        fingerprint=_negatives_file.fingerprint(model, words, items),
        sources={"model": config.model, "data": config.data},
    )
    sampler = Sampler(
        model,
        words,
        generation.SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_ids=words.eos_ids,
            pad_id=words.pad_id,
        ),
        seeds=config.column_seeds,
        redraw=frozenset(config.redraw),
        max_redraws=config.max_redraws,
        strip_leading=config.strip_leading,
        batch_size=config.batch_size,
    )
    _draw_missing(file, items, sampler, window=window, progress=config.progress)
    summary = _negatives_file.summarise(file.path, words)
    summary |= {"repeated_rows": repeated, "skipped": dict(report.counts)}
    file.write_summary(summary)
    _print(summary, file.path)
    return summary


def _settings(config: NegativesConfig, window: int) -> dict[str, Any]:
    """What the bytes of the file depend on, and no fingerprint tells."""
    names = (
        "samples_per_prompt",
        "epochs",
        "system_message",
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "strip_leading",
        "max_redraws",
        "batch_size",
        "dtype",
    )
    return {name: getattr(config, name) for name in names} | {
        "redraw": sorted(config.redraw),
        "seeds": list(config.column_seeds),
        "window": window,
    }


def _draw_missing(
    file: _negatives_file.NegativesFile,
    items: list[Item],
    sampler: Sampler,
    *,
    window: int,
    progress: Literal["auto", "rich", "plain", "none"],
) -> None:
    """Draws and appends windows of rows until the file has them all."""
    start = file.open(items, window)
    columns = len(sampler.seeds)
    shown = training.make_progress(
        progress,
        title="negatives",
        start=start * columns,
        total=len(items) * columns,
        plain_interval_s=10.0,
    )
    if start:
        shown.note(f"{file.path} already has {start} of {len(items)} rows")
    count = _Counter(start * columns, shown)
    try:
        for first in range(start, len(items), window):
            part = items[first : first + window]
            draws = sampler.draw(part, first, progress=count)
            file.append(
                [_line(item, row) for item, row in zip(part, draws, strict=True)]
            )
    finally:
        shown.close()


class _Counter:
    """Adds up the progress of columns, each of which counts from zero.

    Args:
        done: negatives that were there before.
        shown: gets the sums.
    """

    def __init__(self, done: int, shown: training.Progress):
        self._done, self._shown = done, shown
        self._tokens, self._seconds = 0, 0.0
        self._column: generation.TextStats | None = None

    def __call__(self, stats: generation.TextStats) -> None:
        last = self._column
        if last is not None and stats.done <= last.done:
            self._done += last.done
            self._tokens += last.new_tokens
            self._seconds += last.seconds
        self._column = stats
        tokens = self._tokens + stats.new_tokens
        seconds = max(self._seconds + stats.seconds, 1e-9)
        self._shown.update(self._done + stats.done, {"tokens/s": tokens / seconds})


def _line(item: Item, draws: list[Draw]) -> Mapping[str, Any]:
    return {
        "id": item.id,
        "prompt": item.prompt,
        "completion": item.completion,
        "negatives": [draw.text for draw in draws],
        "negative_logps": [draw.logp for draw in draws],
        "negative_finished": [draw.finished for draw in draws],
        "negative_draws": [draw.draws for draw in draws],
    }


def _print(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    import rich.console

    say = rich.console.Console(highlight=False, soft_wrap=True, markup=False).print
    total = summary["negatives"]
    say(
        f"{summary['rows']} rows with {summary['columns']} negatives each; "
        f"{summary['redrawn']} of {total} drawn again, {summary['redraws']} redraws"
    )
    kept = ", ".join(f"{summary[fault]} {fault}" for fault in get_args(Fault))
    say(f"kept at fault: {kept}; {summary['unfinished']} cut at the length limit")
    if summary["repeated_rows"]:
        say(f"{summary['repeated_rows']} rows repeat an earlier one and were left out")
    if summary["skipped"]:
        reasons = ", ".join(f"{n} {why}" for why, n in summary["skipped"].items())
        say(f"{sum(summary['skipped'].values())} rows skipped ({reasons})")
    if summary["unfinished"]:
        say(
            "warning: training puts an end token behind negatives that were cut, which "
            "negative_logps lacks; raise --max-new-tokens, or train with p0 "
            "train_prompt"
        )
    if summary["empty"]:
        say("warning: recipe discriminative refuses rows with an empty negative")
    if summary["positive"]:
        say(
            "warning: a negative equal to the right answer pushes the right answer "
            "down; --redraw empty positive draws such ones again"
        )
    say(f"wrote {path}")
