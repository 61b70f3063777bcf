"""Text in, text out: batches by length, stop strings, progress.

Knows no tokenizer: it takes the functions `encode` and `decode`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._config import SamplingConfig
from jaxpost.generation._generate import Rollout, start
from jaxpost.generation._processors import Processor
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
    """Answer prompts, longest first, in batches of similar length.

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
        batch_size: most prompts at a time.
        check_every: tokens between two looks for stop strings; a look costs a pause
            of the device.
        processors: see `generate`.
        sequence_ids: one per prompt, default `0, 1, ...`; an answer depends on its id,
            not on the other prompts.
        progress: called after each batch with the sums so far.

    Returns:
        Completions in the order of `prompts`, and statistics.

    Raises:
        ValueError: a prompt encodes to nothing, an empty stop string, or what
            `generate` refuses.
    """
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
    stats = TextStats(0, len(prompts), 0, 0, 0, 0.0)
    completions: list[Completion | None] = [None] * len(prompts)
    began = time.perf_counter()
    for chosen in _batches_by_length(encoded, batch_size):
        batch = _answer_batch(
            fns,
            params,
            decode,
            [encoded[i] for i in chosen],
            [sequence_ids[i] for i in chosen],
            config=config,
            key=key,
            stop_strings=tuple(stop_strings),
            check_every=check_every,
            processors=processors,
        )
        for index, completion in zip(chosen, batch, strict=True):
            completions[index] = completion
        stats = _add(stats, batch, time.perf_counter() - began)
        if progress is not None:
            progress(stats)
    return TextResult([c for c in completions if c is not None], stats)


def _batches_by_length(
    encoded: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Indices in batches; longest first, so that memory runs out early if at all."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def _add(stats: TextStats, batch: Sequence[Completion], seconds: float) -> TextStats:
    return TextStats(
        done=stats.done + len(batch),
        total=stats.total,
        prompt_tokens=stats.prompt_tokens + sum(c.prompt_tokens for c in batch),
        new_tokens=stats.new_tokens + sum(len(c.tokens) for c in batch),
        finished=stats.finished + sum(c.finish_reason != "length" for c in batch),
        seconds=seconds,
    )


def _answer_batch(
    fns: DecodeFns,
    params: Params,
    decode: Decode,
    prompts: list[list[int]],
    sequence_ids: list[int],
    *,
    config: SamplingConfig,
    key: jax.Array,
    stop_strings: tuple[str, ...],
    check_every: int,
    processors: Sequence[Processor],
) -> list[Completion]:
    """Answers of one batch, in its order."""
    width = max(len(ids) for ids in prompts)
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    session = start(
        fns,
        params,
        tokens,
        mask,
        config=config,
        processors=processors,
        key=key,
        sequence_ids=np.asarray(sequence_ids),
    )
    room = config.max_new_tokens
    # Per row, the length of the answer that completes a stop string, once it has one.
    cuts: dict[int, int] = {}
    strip = frozenset(config.stop_ids)
    for until in range(check_every if stop_strings else room, room, check_every):
        session = session.advance(until)
        lengths = np.asarray(session.state.lengths)
        written = np.asarray(session.state.tokens)
        idle = np.array(session.state.idle)
        for row in np.flatnonzero(~idle[: len(prompts)]).tolist():
            ids = written[row, : lengths[row]].tolist()
            if (cut := _first_stop(ids, decode, stop_strings)) is not None:
                cuts[row], idle[row] = cut, True
        if idle.all():
            break
        state = session.state._replace(idle=jnp.asarray(idle))
        session = session._replace(state=state)
    else:
        session = session.advance(room)
    rollout = jax.device_get(session.rollout(len(prompts), room))
    return [
        _finish(
            rollout, row, len(prompts[row]), cuts.get(row), decode, stop_strings, strip
        )
        for row in range(len(prompts))
    ]


def _finish(
    rollout: Rollout,
    row: int,
    prompt_tokens: int,
    cut: int | None,
    decode: Decode,
    stop_strings: tuple[str, ...],
    stop_ids: frozenset[int],
) -> Completion:
    """The completion of one row, cut at its stop token or stop string."""
    length = int(rollout.lengths[row])
    ids = rollout.tokens[row, :length].tolist()
    ended = bool(rollout.finished[row])
    body = ids[:-1] if ended and ids[-1] in stop_ids else ids
    if cut is None and stop_strings:
        cut = _first_stop(body, decode, stop_strings)
    text = decode(body)
    reason = "stop" if ended else "length"
    if cut is not None:
        ids, reason = ids[:cut], "stop_string"
        text = decode(ids)
        text = text[: _find_first(text, stop_strings)]
    logps, sampling_logps = (
        values[row, : len(ids)].tolist()
        for values in (rollout.logps, rollout.sampling_logps)
    )
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
