"""Completions of prompts by a model in Hugging Face layout: `jaxpost generate`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import data, generation, models, weights
from jaxpost.recipes import _fingerprints


def run_generate(
    model: str,
    *,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    output: str | None = None,
    tokenizer: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "float32",
    processors: Sequence[generation.Processor] = (),
    columns: Mapping[str, Any] | None = None,
    with_ids: bool = False,
) -> generation.TextStats:
    """Completes prompts, to the terminal or to a JSONL file that can be continued.

    Args:
        model: folder or hub name.
        prompt: texts.
        prompts: file of rows with `prompt` (text or messages) or `messages`.
        output: JSONL file; None prints.
        tokenizer: folder or hub name, if not `model`.
        chat: send plain texts through the chat template as a user's turn.
        max_new_tokens: longest completion, tokens.
        temperature, top_k, top_p, min_p: see `generation.SamplingConfig`.
        stop: strings that end a completion.
        batch_size: answers decoded at a time; a free slot takes the next prompt.
        seed: of the sampler.
        dtype: of the weights and the cache.
        processors: change the logits before the draw.
        columns: put into every line of the file; a file is continued with the same
            ones only, so they are to tell other processors.
        with_ids: put the tokens' ids into the lines too.

    Returns:
        Counts and time.

    Raises:
        ValueError: neither prompts nor a file are given, a prompt cannot be used, or
            `output` has answers of another model, to other prompts or with other
            settings (names what differs).
    """
    if not prompt and prompts is None:
        raise ValueError("give --prompt TEXT or --prompts FILE.")
    loaded = weights.load(model, dtype=jnp.dtype(dtype))
    words = data.load_tokenizer(
        tokenizer or model, vocab_limit=loaded.config.vocab_size
    )
    rows = _rows(prompt, prompts)
    texts = [prompt_text(row, words, chat=chat) for row in rows]
    encode = _encoder(words, texts)
    _check_lengths(rows, texts, encode, max_new_tokens, loaded.config.max_positions)
    config = generation.SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_ids=words.eos_ids,
        pad_id=words.pad_id,
    )
    common = {
        "config": config,
        "key": jax.random.key(seed),
        "stop_strings": stop,
        "batch_size": batch_size,
        "processors": processors,
    }
    model_words = (loaded, loaded.params, encode, words.decode)
    with _Progress(len(rows)) as progress:
        if output is None:
            asked = [text for text, _ in texts]
            completions, stats = generation.generate_text(
                *model_words, asked, progress=progress, **common
            )
            _print(progress.console, asked, completions)
        else:
            more = dict(columns or {})
            stats = generation.write_completions(
                output,
                [
                    {**row.columns, **more, "prompt": text}
                    for row, (text, _) in zip(rows, texts, strict=True)
                ],
                *model_words,
                with_ids=with_ids,
                settings=more
                | _identity(loaded, words)
                | {"dtype": dtype, "chat": chat, "seed": seed},
                progress=progress,
                **common,
            )
    _print_sums(progress.console, stats)
    return stats


def _rows(prompt: Sequence[str], prompts: str | None) -> list[data.Row]:
    """Prompts of the command line, then those of the file."""
    rows = [
        data.Row({"prompt": text}, "--prompt", number)
        for number, text in enumerate(prompt, start=1)
    ]
    return rows if prompts is None else [*rows, *data.load_rows(prompts)]


def _identity(model: models.Model, words: data.Tokenizer) -> dict[str, str]:
    """What tells a model and a tokenizer from others, by name, wherever they lie."""
    return {
        "model fingerprint": _fingerprints.of_model(model)[:16],
        "tokenizer fingerprint": words.fingerprint()[:16],
    }


def _print_sums(console: Any, stats: generation.TextStats) -> None:
    console.print(
        f"{stats.done} of {stats.total} prompts, {stats.new_tokens} new tokens, "
        f"{stats.tokens_per_s:.0f} tokens/s"
    )


def _print(
    console: Any, prompts: Sequence[str], completions: Sequence[generation.Completion]
) -> None:
    """Each prompt, dimmed, with what goes on from it."""
    import rich.markup

    for text, completion in zip(prompts, completions, strict=True):
        console.print(
            f"[dim]{rich.markup.escape(text)}[/]{rich.markup.escape(completion.text)}",
            highlight=False,
            soft_wrap=True,
        )


def _encoder(
    tokenizer: data.Tokenizer, texts: Sequence[tuple[str, bool]]
) -> Callable[[str], list[int]]:
    """From text to ids; only plain text gets the tokenizer's first token, since a chat
    template writes its own."""
    rendered = {text for text, from_template in texts if from_template}

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        if tokenizer.bos_id is None or not tokenizer.adds_bos or text in rendered:
            return ids
        return [tokenizer.bos_id, *ids]

    return encode


def _check_lengths(
    rows: Sequence[data.Row],
    texts: Sequence[tuple[str, bool]],
    encode: Callable[[str], list[int]],
    max_new_tokens: int,
    max_positions: int,
) -> None:
    """Every prompt and its completion must fit the model's positions."""
    for row, (text, _) in zip(rows, texts, strict=True):
        length = len(encode(text))
        if length + max_new_tokens > max_positions:
            raise row.bad(
                "too_long",
                f"{length} tokens and {max_new_tokens} new ones are more than the "
                f"model's {max_positions} positions",
                "shorten the prompt or lower --max-new-tokens",
            )


def prompt_text(
    row: data.Row, tokenizer: data.Tokenizer, *, chat: bool
) -> tuple[str, bool]:
    """The text to continue, and whether a chat template wrote it.

    Raises:
        BadRow: the row has no prompt.
    """
    value = row.columns.get("prompt", row.columns.get("messages"))
    if value is None:
        value = row.columns.get("text")
    if value is None:
        raise row.bad(
            "wrong_column",
            f"no prompt among the columns {', '.join(row.columns)}",
            "name the column prompt, messages or text",
        )
    if isinstance(value, str) and not chat:
        return value, False
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return tokenizer.render(messages, add_generation_prompt=True), True


class _Progress:
    """A bar with prompts done, tokens/s and time left; called with the sums so far."""

    def __init__(self, total: int):
        import rich.console
        import rich.progress

        self.console = rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("generate"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("generate", total=total, rate="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stats: generation.TextStats) -> None:
        rate = f"{stats.tokens_per_s:.0f} tokens/s"
        self._bar.update(self._task, completed=stats.done, rate=rate)
