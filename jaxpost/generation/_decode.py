"""The two compiled programs: prefill, and a loop that decodes until told to stop.

Both take functions, never a model. The cache lives in the state, which the decode
program is given for good (donated) and updates in place.
"""

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops
from jaxpost.generation._config import SamplerPlan, SamplerValues
from jaxpost.generation._processors import (
    Processor,
    ProcessorPlan,
    ProcessorState,
    is_array,
    run_processors,
)
from jaxpost.generation._sampling import sample
from jaxpost.typing import Cache, DecodeFns, Params

PROGRAMS = ("prefill", "decode", "admit", "serve", "collect")
"""Of `generate` the first two, of `generate_stream` the others."""

TRACES: collections.Counter[str] = collections.Counter()


def trace_counts() -> dict[str, int]:
    """How often each program was traced in this process, by name.

    A call whose numbers do not rise compiled nothing.
    """
    return {name: TRACES[name] for name in PROGRAMS}


class _Bare(NamedTuple):
    """Just the functions; bound methods of one object compare equal."""

    apply: Any
    unembed: Any
    init_cache: Any
    for_decoding: Any


class Functions(NamedTuple):
    """`DecodeFns` without their arrays: hashable, equal for equal models.

    A pytree such as `models.Model` is told apart by its static fields only, so trained
    parameters put into it recompile nothing, and old ones are not kept alive.

    Fields:
        structure: tree structure of the object, or of a `_Bare` if it is no pytree.
        leaves: what is left of its leaves, None where there was an array.
    """

    structure: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, fns: DecodeFns) -> "Functions":
        leaves, structure = jax.tree.flatten(fns)
        if jax.tree_util.treedef_is_leaf(structure):
            prepare = getattr(fns, "for_decoding", None)
            bare = _Bare(fns.apply, fns.unembed, fns.init_cache, prepare)
            leaves, structure = jax.tree.flatten(bare)
        return cls(structure, tuple(None if is_array(x) else x for x in leaves))

    def restore(self) -> DecodeFns:
        return jax.tree.unflatten(self.structure, self.leaves)


class DecodeState(NamedTuple):
    """Everything between two decoding steps.

    Fields:
        step: columns decided so far, int32 scalar; the same for all rows.
        hidden: state that predicts the next token, `[B, D]`.
        cache: keys and values.
        context: prompt and answer without a gap, int32 `[B, P + N]`; kept up to date
            only if there are processors.
        prompt_lengths: int32 `[B]`.
        keys: one PRNG key per sequence, `[B]`.
        tokens, logps, sampling_logps, entropies: the answer, `[B, N]`.
        lengths: tokens of the answer so far, int32 `[B]`.
        finished: the row has its stop token, bool `[B]`.
        idle: the row is not decoded (finished, or filling up the batch), bool `[B]`.
    """

    step: jax.Array
    hidden: jax.Array
    cache: Cache
    context: jax.Array
    prompt_lengths: jax.Array
    keys: jax.Array
    tokens: jax.Array
    logps: jax.Array
    sampling_logps: jax.Array
    entropies: jax.Array
    lengths: jax.Array
    finished: jax.Array
    idle: jax.Array


@functools.partial(jax.jit, static_argnames=("functions", "room", "cache_dtype"))
def prefill(
    functions: Functions,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    sequence_ids: jax.Array,
    key: jax.Array,
    pad_id: jax.Array,
    *,
    room: int,
    cache_dtype: Any,
) -> DecodeState:
    """Read the prompts into a new cache.

    Args:
        functions: the model's.
        params: parameters.
        prompts: int32 `[B, P]`, padded on the right.
        lengths: int32 `[B]`; 0 in rows that only fill up the batch.
        sequence_ids: int32 `[B]`, folded into `key`.
        key: one PRNG key.
        pad_id: int32 scalar.
        room: columns `N` for new tokens.
        cache_dtype: of the cache; None takes that of the head.
    """
    TRACES["prefill"] += 1
    fns = functions.restore()
    batch, width = prompts.shape
    if cache_dtype is None:
        cache_dtype = fns.unembed(params).weight.dtype
    cache = fns.init_cache(batch, width + room, cache_dtype)
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(columns, prompts.shape)
    segments = (columns < lengths[:, None]).astype(jnp.int32)
    out = fns.apply(params, prompts, positions, segments, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return DecodeState(
        step=jnp.zeros((), jnp.int32),
        hidden=jnp.take_along_axis(out.hidden, last, axis=1)[:, 0],
        cache=out.cache,
        context=jnp.pad(prompts, ((0, 0), (0, room))),
        prompt_lengths=lengths + 0,  # a buffer of its own, since it will be donated
        keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sequence_ids),
        tokens=jnp.full((batch, room), pad_id, jnp.int32),
        logps=jnp.zeros((batch, room), jnp.float32),
        sampling_logps=jnp.zeros((batch, room), jnp.float32),
        entropies=jnp.zeros((batch, room), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), jnp.bool_),
        idle=lengths == 0,
    )


@functools.partial(
    jax.jit,
    static_argnames=("functions", "plan", "processing"),
    donate_argnames=("state",),
)
def decode(
    functions: Functions,
    params: Params,
    state: DecodeState,
    until: jax.Array,
    values: SamplerValues,
    arrays: tuple[Any, ...],
    *,
    plan: SamplerPlan,
    processing: ProcessorPlan,
) -> DecodeState:
    """Decode until column `until` is reached or no row is left to decode.

    `processing` and `arrays` are what `ProcessorPlan.of` makes of the processors.
    """
    TRACES["decode"] += 1
    fns = functions.restore()
    processors = processing.restore(arrays)
    head = fns.unembed(params)
    decoding = decoding_params(fns, params)
    # All at once, because a hash per step costs more in launches than in arithmetic.
    uniforms = step_uniforms(state.keys, state.tokens.shape[1])

    def running(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.idle)

    def advance(state: DecodeState) -> DecodeState:
        raw = ops.logits(state.hidden, head).astype(jnp.float32)
        processed = _process(raw, state, processors) if processors else raw
        drawn = sample(raw, processed, uniforms[state.step], plan, values)
        active = ~state.idle
        tokens = jnp.where(active, drawn.tokens, values.pad_id)
        stopped = active & jnp.any(
            tokens[:, None] == values.stop_ids[None].astype(jnp.int32), axis=1
        )
        positions = state.prompt_lengths + state.step
        out = fns.apply(
            decoding,
            tokens[:, None],
            positions[:, None],
            active.astype(jnp.int32)[:, None],
            state.cache,
        )

        def write(buffer: jax.Array, column: jax.Array) -> jax.Array:
            if column.dtype == jnp.float32:
                column = jnp.where(active, column, 0.0)
            return jax.lax.dynamic_update_index_in_dim(buffer, column, state.step, 1)

        context = state.context
        if processors:
            rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
            context = context.at[rows, positions].set(tokens)
        return state._replace(
            step=state.step + 1,
            hidden=out.hidden[:, 0],
            cache=out.cache,
            context=context,
            tokens=write(state.tokens, tokens),
            logps=write(state.logps, drawn.logps),
            sampling_logps=write(state.sampling_logps, drawn.sampling_logps),
            entropies=write(state.entropies, drawn.entropies),
            lengths=state.lengths + active.astype(jnp.int32),
            finished=state.finished | stopped,
            idle=state.idle | stopped,
        )

    return jax.lax.while_loop(running, advance, state)


def decoding_params(fns: DecodeFns, params: Params) -> Params:
    """`params` in the form in which `fns` decodes single tokens, if it has one."""
    prepare = getattr(fns, "for_decoding", None)
    return params if prepare is None else prepare(params)


def step_keys(keys: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys for the draw and for the processors, `[B]` each, of steps `[B]`."""
    keys = jax.vmap(jax.random.fold_in)(keys, steps)
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def step_uniforms(keys: jax.Array, count: int) -> jax.Array:
    """Numbers in [0, 1) that draw the first `count` tokens, float32 `[count, B, 2]`.

    Those of a step do not depend on `count`.
    """

    def of_step(step: jax.Array) -> jax.Array:
        key_draw, _ = step_keys(keys, jnp.broadcast_to(step, keys.shape[:1]))
        return jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(
            key_draw
        )

    return jax.vmap(of_step)(jnp.arange(count, dtype=jnp.int32))


def _process(
    raw: jax.Array, state: DecodeState, processors: tuple[Processor, ...]
) -> jax.Array:
    batch = state.prompt_lengths.shape
    _, key_process = step_keys(state.keys, jnp.broadcast_to(state.step, batch))
    position = state.prompt_lengths + state.step
    known = ProcessorState(state.context, position, key_process)
    return run_processors(processors, raw, known)
