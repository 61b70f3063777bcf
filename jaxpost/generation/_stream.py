"""Continuous batching: a stream of prompts through a fixed number of slots."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._cache_rows import cache_axes
from jaxpost.generation._config import SamplingConfig, check_count, split_config
from jaxpost.generation._decode import Functions
from jaxpost.generation._generate import Rollout, bucket_length
from jaxpost.generation._processors import Processor
from jaxpost.generation._server import (
    Ask,
    Finished,
    Programs,
    Server,
    Stop,
    StreamStats,
)
from jaxpost.generation._slot_state import Sizes
from jaxpost.typing import DecodeFns, Params


class Stream(Iterator[Finished]):
    """Answers as they finish; `stats` has the sums over those taken."""

    def __init__(self, answers: Iterator[Finished], stats: StreamStats):
        self._answers = answers
        self.stats = stats

    def __next__(self) -> Finished:
        answer = next(self._answers)
        self.stats.sequences += 1
        self.stats.new_tokens += len(answer.tokens)
        self.stats.near += answer.near
        return answer


def generate_stream(
    fns: DecodeFns,
    params: Params,
    prompts: Sequence[Any],
    *,
    config: SamplingConfig,
    slots: int = 16,
    samples_per_prompt: int = 1,
    processors: Sequence[Processor] = (),
    key: jax.Array,
    sequence_ids: Any = None,
    limits: Any = None,
    stop: Stop | None = None,
    max_prompt_length: int | None = None,
    context_length: int | None = None,
    refill_every: int = 16,
) -> Stream:
    """Answer prompts in a fixed number of slots; a free slot takes the next sequence.

    Answers are those of `generate` for the same ids, whatever the slots and the order:
    they depend on prompt, key and id only, up to rounding. Rounding may tip a draw that
    falls within 1e-5 of a border between two tokens; `Finished.near` counts those.

    One program reads groups of prompts (per bucket of their longest, `bucket_length`),
    one decodes, and one hands answers over; a second call of the same sizes compiles
    nothing. A prompt is read once for all its samples. The host looks in every
    `refill_every` steps while the next steps run; in between free slots are filled
    from a queue on the device of as many sequences as there are slots.

    Every slot keeps room for the longest prompt and the longest answer. With parameters
    on a mesh each device decodes all slots with its part of the parameters, and each
    process must take all answers.

    Args:
        fns, params: the model, as in `generate`.
        prompts: token ids, one integer sequence per prompt, not empty.
        config: how to sample; as in `generate`.
        slots: sequences decoded at a time.
        samples_per_prompt: answers to each prompt, `G`.
        processors: see `generate`.
        key: PRNG key; sample `g` of prompt `i` uses `fold_in(key, sequence_ids[i, g])`.
        sequence_ids: integer `[prompts, G]` (or `[prompts]` if `G` is 1); default
            `i G + g`.
        limits: most tokens of the answers to each prompt, integer `[prompts]`, from 1
            to `config.max_new_tokens`, the default.
        stop: called with the tokens of every answer so far, each time the host looks
            in, and when it has finished; returns how many to keep, or None. The answer
            is cut there and decoded no further. The device pauses meanwhile.
        max_prompt_length: tokens of the longest prompt; None takes that of `prompts`. A
            constant keeps calls with other prompts from compiling anew.
        context_length: positions that the model has. An answer ends where they do.
        refill_every: decoding steps between two looks, at least 1.

    Returns:
        An iterator of answers in the order in which they finish, with `stats`. Work
        begins when the first is asked for.

    Raises:
        ValueError: a prompt is empty, not integers, outside the vocabulary, longer than
            `max_prompt_length` or without room in `context_length`; another argument
            does not fit.
    """
    for name, count in (
        ("slots", slots),
        ("samples_per_prompt", samples_per_prompt),
        ("refill_every", refill_every),
    ):
        check_count(name, count)
    head = jax.eval_shape(fns.unembed, params)
    vocab_size = head.weight.shape[1]
    plan, values = split_config(config, vocab_size, processed=bool(processors))
    ids = _checked_prompts(prompts, vocab_size, max_prompt_length, context_length)
    ask = Ask(
        prompts=ids,
        limits=_checked_limits(limits, ids, config.max_new_tokens, context_length),
        ids=_checked_ids(sequence_ids, len(ids), samples_per_prompt),
        samples=samples_per_prompt,
    )
    stats = StreamStats(slots=slots)
    if not ids:
        return Stream(iter(()), stats)
    dtype = head.weight.dtype if config.cache_dtype is None else config.cache_dtype
    longest = max_prompt_length or max(len(prompt) for prompt in ids)
    sizes = _sizes(
        slots, samples_per_prompt, longest, config.max_new_tokens, context_length
    )
    programs = Programs(
        functions=Functions.of(fns),
        params=params,
        plan=plan,
        values=values,
        processors=tuple(processors),
        sizes=sizes,
        axes=cache_axes(fns, jnp.dtype(dtype)),
        cache_dtype=jnp.dtype(dtype),
        key=key,
        placement=_placement(params),
    )
    return Stream(Server(programs, ask, refill_every, stop, stats).run(), stats)


def as_rollout(
    answers: Sequence[Finished], *, max_new_tokens: int, pad_id: int = 0
) -> Rollout:
    """Answers by prompt and sample as one `Rollout` of NumPy arrays `[B, N]`.

    An answer that was cut counts as finished.

    Args:
        answers: in any order.
        max_new_tokens: columns `N`, at least the longest answer's length.
        pad_id: fills `tokens` after the end.

    Raises:
        ValueError: an answer is longer than `max_new_tokens`.
    """
    answers = sorted(answers, key=lambda answer: (answer.prompt, answer.sample))
    lengths = np.array([len(answer.tokens) for answer in answers], np.int32)
    if len(lengths) and lengths.max() > max_new_tokens:
        raise ValueError(
            f"an answer has {lengths.max()} tokens, more than max_new_tokens="
            f"{max_new_tokens}."
        )

    def table(name: str, fill: int, dtype: Any) -> Any:
        out = np.full((len(answers), max_new_tokens), fill, dtype)
        for row, answer in enumerate(answers):
            out[row, : lengths[row]] = getattr(answer, name)
        return out

    return Rollout(
        tokens=table("tokens", pad_id, np.int32),
        lengths=lengths,  # pyright: ignore[reportArgumentType]
        logps=table("logps", 0, np.float32),
        sampling_logps=table("sampling_logps", 0, np.float32),
        entropies=table("entropies", 0, np.float32),
        finished=np.array([a.finish_reason != "length" for a in answers], np.bool_),  # pyright: ignore[reportArgumentType]
    )


def _checked_prompts(
    prompts: Sequence[Any],
    vocab_size: int,
    max_prompt_length: int | None,
    context_length: int | None,
) -> list[np.ndarray]:
    """Prompts as int32 arrays."""
    out = []
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if not ids.size:
            raise ValueError(
                f"prompt {number} is empty: start it with at least one token (the "
                "tokenizer's BOS)."
            )
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"prompt {number} must be a sequence of token ids, got {ids.dtype} "
                f"{ids.shape}."
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            raise ValueError(
                f"token {place} of prompt {number} is {ids[place]}, outside the "
                f"model's vocabulary of {vocab_size}: do tokenizer and model belong "
                "together?"
            )
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, more than max_prompt_length="
                f"{max_prompt_length}."
            )
        if context_length is not None and len(ids) >= context_length:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, which leaves no room for an "
                f"answer in context_length={context_length}: shorten it."
            )
        out.append(ids.astype(np.int32))
    return out


def _checked_limits(
    limits: Any,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    context_length: int | None,
) -> np.ndarray:
    """Most tokens of the answers to each prompt, int32 `[prompts]`."""
    count = len(prompts)
    out = np.full((count,), max_new_tokens, np.int32)
    if limits is not None:
        out = np.asarray(limits)
        whole = out.shape == (count,) and (out.dtype.kind in "iu" or not count)
        if not whole or (out < 1).any() or (out > max_new_tokens).any():
            raise ValueError(
                f"limits must be one integer from 1 to max_new_tokens={max_new_tokens} "
                f"for each of {count} prompts, got {limits!r}."
            )
        out = out.astype(np.int32)
    if context_length is not None and count:
        left = context_length - np.array([len(prompt) for prompt in prompts])
        out = np.minimum(out, left).astype(np.int32)
    return out


def _checked_ids(sequence_ids: Any, count: int, samples: int) -> np.ndarray:
    """Ids of the sequences, uint32 `[prompts, G]`."""
    if sequence_ids is None:
        sequence_ids = np.arange(count * samples).reshape(count, samples)
    ids = np.asarray(sequence_ids)
    if ids.shape == (count,) and samples == 1:
        ids = ids[:, None]
    if ids.shape != (count, samples) or (ids.dtype.kind not in "iu" and count):
        raise ValueError(
            "sequence_ids must be integer [prompts, samples_per_prompt] = "
            f"({count}, {samples}), got {ids.dtype} {ids.shape}."
        )
    return ids.astype(np.uint32)


def _sizes(
    slots: int, samples: int, longest: int, room: int, context_length: int | None
) -> Sizes:
    """Shapes in buckets; nothing depends on how many prompts there are."""
    room = bucket_length(room)
    width = bucket_length(longest)
    length = width + room
    if context_length is not None:
        width, length = min(width, context_length), min(length, context_length)
    # As many sequences wait as there are slots, in two groups of prompts.
    rows = 2 * -(-slots // (2 * samples))
    entries = rows * samples
    # Those of two looks ago may not have been read yet.
    return Sizes(slots, rows, entries, entries + 2 * slots, width, length, room)


def _placement(params: Params) -> Any:
    """Where the state lives: with each device of the parameters, if they are many."""
    for leaf in jax.tree.leaves(params):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, jax.sharding.NamedSharding) and where.mesh.size > 1:
            whole = jax.sharding.PartitionSpec()
            return jax.sharding.NamedSharding(where.mesh, whole)
    return None
