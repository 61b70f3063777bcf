"""Text in, text out: stop strings, progress.

Knows no tokenizer: it takes the functions `encode` and `decode`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import numpy as np

from jaxpost.generation._config import SamplingConfig
from jaxpost.generation._generate import bucket_length
from jaxpost.generation._processors import Processor
from jaxpost.generation._stream import Finished, generate_stream
from jaxpost.typing import DecodeFns, Params

Prompt = TypeVar("Prompt")
Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


class Completion(NamedTuple):
    """One answer.

    Fields:
        text: decoded answer, without stop token and stop string.
        tokens: ids of the answer, the stop token included; with a stop string, up to
            and including the token that completes it.
        logps: log-probability of each token, as `Rollout.logps`, nats.
        sampling_logps: the same under the distribution drawn from, as
            `Rollout.sampling_logps`, nats.
        finish_reason: `"stop"` (stop token), `"stop_string"` or `"length"`.
        prompt_tokens: length of the prompt.
    """

    text: str
    tokens: list[int]
    logps: list[float]
    sampling_logps: list[float]
    finish_reason: Literal["stop", "stop_string", "length"]
    prompt_tokens: int


class TextStats(NamedTuple):
    """Sums over the prompts done so far.

    Fields:
        done, total: prompts.
        prompt_tokens, new_tokens: tokens read and kept.
        finished: answers that ended before the length limit.
        seconds: wall time, compilation included.
    """

    done: int
    total: int
    prompt_tokens: int
    new_tokens: int
    finished: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of wall time."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


class TextResult(NamedTuple):
    """Answers in the order of the prompts, and their statistics."""

    completions: list[Completion]
    stats: TextStats


Progress = Callable[[TextStats], None]


def generate_text(
    fns: DecodeFns,
    params: Params,
    encode: Callable[[Prompt], Sequence[int]],
    decode: Decode,
    prompts: Sequence[Prompt],
    *,
    config: SamplingConfig,
    key: jax.Array,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    check_every: int = 16,
    processors: Sequence[Processor] = (),
    sequence_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TextResult:
    """Answer prompts, `batch_size` at a time: see `generate_stream`.

    Stop strings are looked for in the decoded text, since one string has many
    tokenisations: decoding pauses every `check_every` tokens, and an answer that
    contains a stop string is cut at its first occurrence and decoded no further.

    Args:
        fns, params: the model, as in `generate`.
        encode: text to ids, with whatever special tokens the model wants in front.
        decode: ids to text.
        prompts: texts, or whatever else `encode` takes.
        config: how to sample; `max_new_tokens` counts before the cut.
        key: PRNG key; see `generate`.
        stop_strings: texts that end an answer; they are not part of `Completion.text`.
        batch_size: most answers decoded at a time.
        check_every: tokens between two looks for stop strings; a look costs a pause
            of the device.
        processors: see `generate`.
        sequence_ids: one per prompt, default `0, 1, ...`; an answer depends on its id,
            not on the other prompts.
        progress: called after each answer with the sums so far.

    Returns:
        Completions in the order of `prompts`, and statistics.

    Raises:
        ValueError: a prompt encodes to nothing, an empty stop string, or what
            `generate` refuses.
    """
    stats = TextStats(0, len(prompts), 0, 0, 0, 0.0)
    completions: list[Completion | None] = [None] * len(prompts)
    began = time.perf_counter()
    for index, completion in stream_text(
        fns,
        params,
        encode,
        decode,
        prompts,
        config=config,
        key=key,
        stop_strings=stop_strings,
        batch_size=batch_size,
        check_every=check_every,
        processors=processors,
        sequence_ids=sequence_ids,
    ):
        completions[index] = completion
        stats = add_answer(stats, completion, time.perf_counter() - began)
        if progress is not None:
            progress(stats)
    return TextResult([c for c in completions if c is not None], stats)


def stream_text(
    fns: DecodeFns,
    params: Params,
    encode: Callable[[Prompt], Sequence[int]],
    decode: Decode,
    prompts: Sequence[Prompt],
    *,
    config: SamplingConfig,
    key: jax.Array,
    stop_strings: Sequence[str],
    batch_size: int,
    check_every: int,
    processors: Sequence[Processor],
    sequence_ids: Sequence[int] | None,
) -> Iterator[tuple[int, Completion]]:
    """Which prompt, and its answer, as they finish; arguments as in `generate_text`."""
    if batch_size < 1 or check_every < 1:
        raise ValueError(
            "batch_size and check_every must be at least 1, got "
            f"{batch_size} and {check_every}."
        )
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ValueError(
            f"stop_strings must be a list of non-empty texts, got {stop_strings!r}."
        )
    if sequence_ids is None:
        sequence_ids = range(len(prompts))
    if len(sequence_ids) != len(prompts):
        raise ValueError(
            f"sequence_ids has {len(sequence_ids)} entries for {len(prompts)} prompts."
        )
    encoded = [list(encode(prompt)) for prompt in prompts]
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(
                f"prompt {number} ({prompts[number]!r}) encodes to no tokens: let "
                "encode put the tokenizer's BOS in front."
            )
    stops, stop_ids = tuple(stop_strings), frozenset(config.stop_ids)

    def stop(ids: list[int]) -> int | None:
        return _first_stop(ids[:-1] if ids[-1] in stop_ids else ids, decode, stops)

    answers = generate_stream(
        fns,
        params,
        encoded,
        config=config,
        slots=min(batch_size, bucket_length(len(prompts), minimum=1)),
        processors=processors,
        key=key,
        sequence_ids=np.asarray(sequence_ids, np.uint32),
        stop=stop if stops else None,
        refill_every=check_every,
    )
    for answer in answers:
        prompt_tokens = len(encoded[answer.prompt])
        yield answer.prompt, _completion(answer, prompt_tokens, decode, stops)


def add_answer(stats: TextStats, answer: Completion, seconds: float) -> TextStats:
    """The sums with one more answer; `seconds` in all."""
    return TextStats(
        done=stats.done + 1,
        total=stats.total,
        prompt_tokens=stats.prompt_tokens + answer.prompt_tokens,
        new_tokens=stats.new_tokens + len(answer.tokens),
        finished=stats.finished + (answer.finish_reason != "length"),
        seconds=seconds,
    )


def _completion(
    answer: Finished, prompt_tokens: int, decode: Decode, stop_strings: tuple[str, ...]
) -> Completion:
    """The text without its stop token or stop string."""
    ids = answer.tokens.tolist()
    text = decode(ids[:-1] if answer.finish_reason == "stop" else ids)
    reason = answer.finish_reason
    if reason == "cut":
        text, reason = text[: _find_first(text, stop_strings)], "stop_string"
    logps, sampling_logps = answer.logps.tolist(), answer.sampling_logps.tolist()
    return Completion(text, ids, logps, sampling_logps, reason, prompt_tokens)


def _first_stop(
    ids: Sequence[int], decode: Decode, stop_strings: tuple[str, ...]
) -> int | None:
    """Fewest leading tokens whose text has a stop string, or None."""
    if _find_first(decode(ids), stop_strings) is None:
        return None
    # The text of a prefix need not be a prefix of the text (a character may take
    # several tokens), so the search is over prefixes, not over characters.
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        if _find_first(decode(ids[:middle]), stop_strings) is None:
            low = middle
        else:
            high = middle
    return high


def _find_first(text: str, stop_strings: tuple[str, ...]) -> int | None:
    """Where the earliest stop string begins, or None."""
    places = [place for s in stop_strings if (place := text.find(s)) >= 0]
    return min(places, default=None)
