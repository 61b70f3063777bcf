"""Token-level generation: checks at the door, buckets, one call to each program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._config import (
    SamplerPlan,
    SamplerValues,
    SamplingConfig,
    split_config,
)
from jaxpost.generation._decode import DecodeState, Functions, decode, prefill
from jaxpost.generation._processors import Processor, ProcessorPlan
from jaxpost.typing import DecodeFns, Params


class Rollout(NamedTuple):
    """Answers and their statistics. `N` is `config.max_new_tokens`.

    Fields:
        tokens: int32 `[B, N]`, the stop token included, `config.pad_id` after it.
        lengths: tokens of each answer, the stop token included, int32 `[B]`.
        logps: log-probability of each token under raw logits / temperature (at
            temperature 0: under raw logits), what a trainer computes for it; nats,
            float32 `[B, N]`, 0 after the end.
        sampling_logps: under the distribution it was drawn from, after processors and
            filters (at temperature 0: 0); nats, float32 `[B, N]`, 0 after the end.
        entropies: of the distribution of `logps`, nats, float32 `[B, N]`, 0 after the
            end.
        finished: True where the answer ends in a stop token rather than at the length
            limit, bool `[B]`.
    """

    tokens: jax.Array
    lengths: jax.Array
    logps: jax.Array
    sampling_logps: jax.Array
    entropies: jax.Array
    finished: jax.Array


class Session(NamedTuple):
    """A batch being decoded: what `advance` needs, and the state it consumes."""

    functions: Functions
    params: Params
    plan: SamplerPlan
    values: SamplerValues
    processing: ProcessorPlan
    arrays: tuple[Any, ...]
    state: DecodeState

    def advance(self, until: int) -> "Session":
        """Decode up to column `until`; the old session must not be used again."""
        state = decode(
            self.functions,
            self.params,
            self.state,
            np.int32(until),
            self.values,
            self.arrays,
            plan=self.plan,
            processing=self.processing,
        )
        return self._replace(state=state)

    def rollout(self, batch: int, room: int) -> Rollout:
        """The answers of the first `batch` rows, cut to `room` columns."""
        state = self.state

        def cut(array: jax.Array) -> jax.Array:
            array = array if array.shape[0] == batch else array[:batch]
            if array.ndim == 2 and array.shape[1] != room:
                array = array[:, :room]
            return array

        return Rollout(
            tokens=cut(state.tokens),
            lengths=cut(state.lengths),
            logps=cut(state.logps),
            sampling_logps=cut(state.sampling_logps),
            entropies=cut(state.entropies),
            finished=cut(state.finished),
        )


def generate(
    fns: DecodeFns,
    params: Params,
    prompts: Any,
    prompt_mask: Any,
    *,
    config: SamplingConfig,
    processors: Sequence[Processor] = (),
    key: jax.Array,
    sequence_ids: Any = None,
) -> Rollout:
    """Continue prompts, a token at a time, with a key/value cache.

    The answer of a sequence depends on its prompt, `key` and its id only (up to
    floating-point rounding), not on the batch around it or on its padding.

    Batch, prompt length and `max_new_tokens` are rounded up to buckets
    (`bucket_length`), and one program is compiled per combination, plan of filters and
    tuple of processors; a second call in the same buckets compiles nothing.

    Args:
        fns: `apply`, `unembed` and `init_cache`, as a `models.Model` has them. Programs
            are kept by the identity of the functions, or by the static fields of a
            pytree such as `Model`.
        params: the parameters to use.
        prompts: token ids, integer `[B, P]`; any value where masked. Read on the host,
            so not under `jit`.
        prompt_mask: True on prompt tokens, bool `[B, P]`: a run at the left or at the
            right end (or in the middle) of each row, without holes.
        config: how to sample, and when to stop.
        processors: change the logits before the draw; see `Processor`.
        key: PRNG key; sequence `i` uses `fold_in(key, sequence_ids[i])`.
        sequence_ids: integer `[B]`, default `0 ... B - 1`.

    Returns:
        A `Rollout`.

    Raises:
        ValueError: shapes or dtypes do not fit, a prompt is empty, a mask has a hole, a
            token or stop id is outside the vocabulary.
    """
    batch = len(prompts)
    session = start(
        fns,
        params,
        prompts,
        prompt_mask,
        config=config,
        processors=processors,
        key=key,
        sequence_ids=sequence_ids,
    )
    room = config.max_new_tokens
    return session.advance(room).rollout(batch, room)


def start(
    fns: DecodeFns,
    params: Params,
    prompts: Any,
    prompt_mask: Any,
    *,
    config: SamplingConfig,
    processors: Sequence[Processor],
    key: jax.Array,
    sequence_ids: Any,
) -> Session:
    """Check the arguments of `generate` and read the prompts into a cache."""
    head = jax.eval_shape(fns.unembed, params)
    vocab_size = head.weight.shape[1]
    plan, values = split_config(config, vocab_size, processed=bool(processors))
    prompts, lengths = _right_padded(prompts, prompt_mask, vocab_size)
    batch = len(lengths)
    if sequence_ids is None:
        sequence_ids = np.arange(batch)
    sequence_ids = np.asarray(sequence_ids)
    if sequence_ids.shape != (batch,) or sequence_ids.dtype.kind not in "iu":
        raise ValueError(
            f"sequence_ids must be integer [B] = ({batch},), got "
            f"{sequence_ids.dtype} {sequence_ids.shape}."
        )
    rows = bucket_length(batch, minimum=1) - batch
    functions = Functions.of(fns)
    dtype = None if config.cache_dtype is None else jnp.dtype(config.cache_dtype)
    state = prefill(
        functions,
        params,
        np.pad(prompts, ((0, rows), (0, 0))),
        np.pad(lengths, (0, rows)),
        np.pad(sequence_ids.astype(np.uint32), (0, rows)),
        key,
        values.pad_id,
        room=bucket_length(config.max_new_tokens),
        cache_dtype=dtype,
    )
    processing, arrays = ProcessorPlan.of(processors)
    return Session(functions, params, plan, values, processing, arrays, state)


def bucket_length(length: int, *, minimum: int = 16) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `length`.

    Powers of two and one and a half times those: at most a third is padding.
    """
    size = 1
    while size < max(length, minimum):
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else _next(size)
    return size


def _next(size: int) -> int:
    """The power of two after `size`."""
    return 1 << size.bit_length()


def _right_padded(
    prompts: Any, prompt_mask: Any, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts moved to column 0 in a bucket of columns, and their lengths."""
    prompts, mask = np.asarray(prompts), np.asarray(prompt_mask)
    if prompts.ndim != 2 or prompts.dtype.kind not in "iu" or not prompts.size:
        raise ValueError(
            "prompts must be token ids [B, P] with at least one row and column, got "
            f"{prompts.dtype} {prompts.shape}."
        )
    if mask.shape != prompts.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"prompt_mask must be bool {prompts.shape} like prompts, got {mask.dtype} "
            f"{mask.shape}."
        )
    lengths = mask.sum(axis=1, dtype=np.int32)
    if not lengths.all():
        rows = np.flatnonzero(lengths == 0).tolist()
        raise ValueError(
            f"prompts in rows {rows[:8]} are empty: prompt_mask is False everywhere. "
            "Start them with at least one token (the tokenizer's BOS)."
        )
    first = mask.argmax(axis=1)
    columns = np.arange(mask.shape[1])[None]
    run = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    if (run != mask).any():
        row = int(np.flatnonzero((run != mask).any(axis=1))[0])
        raise ValueError(
            f"prompt_mask has a hole in row {row}: the tokens of a prompt must be one "
            "run, padded on the left or on the right."
        )
    wrong = mask & ((prompts < 0) | (prompts >= vocab_size))
    if wrong.any():
        row, column = (int(index[0]) for index in np.nonzero(wrong))
        raise ValueError(
            f"prompts[{row}, {column}] is {prompts[row, column]}, outside the model's "
            f"vocabulary of {vocab_size}: do tokenizer and model belong together?"
        )
    width = int(lengths.max())
    out = np.zeros((len(lengths), bucket_length(width)), np.int32)
    for row, (begin, length) in enumerate(zip(first, lengths, strict=True)):
        out[row, :length] = prompts[row, begin : begin + length]
    return out, lengths
