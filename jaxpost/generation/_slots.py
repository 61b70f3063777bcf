"""The compiled programs of `generate_stream`: admit prompts, serve slots, collect.

Sequences wait in a queue on the device, their prompts already read. The decoding loop
itself puts the next one into a slot as soon as one is free, so the host looks in only
now and then. What a sequence yields is written into a record of its own, which stays
until the host has read it, whoever has the slot by then.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops
from jaxpost.generation._cache_rows import CacheAxes, copy_row, put_rows
from jaxpost.generation._config import SamplerPlan, SamplerValues
from jaxpost.generation._decode import TRACES, Functions, step_keys, step_uniforms
from jaxpost.generation._processors import (
    Processor,
    ProcessorPlan,
    ProcessorState,
    run_processors,
)
from jaxpost.generation._sampling import sample
from jaxpost.generation._slot_state import (
    FULL,
    STOPPED,
    WAITING,
    Admission,
    Orders,
    Records,
    Report,
    Slots,
    State,
    Waiting,
    place,
)
from jaxpost.typing import Params


@functools.partial(
    jax.jit,
    static_argnames=("functions", "axes", "cache_dtype", "placement"),
    donate_argnames=("state",),
)
def admit(
    functions: Functions,
    params: Params,
    state: State,
    group: Admission,
    key: jax.Array,
    *,
    axes: CacheAxes,
    cache_dtype: Any,
    placement: Any,
) -> State:
    """Read a group of prompts once, and queue the sequences to start from them."""
    TRACES["admit"] += 1
    fns = functions.restore()
    count, width = group.tokens.shape
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(columns, group.tokens.shape)
    segments = (columns < group.lengths[:, None]).astype(jnp.int32)
    cache = fns.init_cache(count, width, cache_dtype)
    out = fns.apply(params, group.tokens, positions, segments, cache)
    last = jnp.maximum(group.lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, group.ids)

    def put(array: jax.Array, where: jax.Array, values: Any) -> jax.Array:
        return array.at[where].set(values, mode="drop")

    waiting, records = state.waiting, state.records
    prompts = waiting.prompts
    if prompts.shape[1]:
        prompts = prompts.at[group.rows, :width].set(group.tokens, mode="drop")
    room = records.tokens.shape[1]
    waiting = waiting._replace(
        prompts=prompts,
        lengths=put(waiting.lengths, group.rows, group.lengths),
        hidden=put(waiting.hidden, group.rows, hidden),
        cache=put_rows(waiting.cache, out.cache, group.rows, axes),
        row=put(waiting.row, group.places, group.row),
        record=put(waiting.record, group.places, group.record),
        limit=put(waiting.limit, group.places, group.limit),
    )
    records = records._replace(
        keys=put(records.keys, group.record, keys),
        uniforms=put(
            records.uniforms, group.record, step_uniforms(keys, room).swapaxes(0, 1)
        ),
        lengths=put(records.lengths, group.record, 0),
        near=put(records.near, group.record, 0),
        status=put(records.status, group.record, WAITING),
    )
    return place(State(state.slots, waiting, records), placement)


class _Loop(NamedTuple):
    """What the loops of `serve` change."""

    slots: Slots
    records: Records
    head: jax.Array
    steps: jax.Array
    busy: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=(
        "functions",
        "plan",
        "processing",
        "axes",
        "watched",
        "placement",
    ),
    donate_argnames=("state",),
)
def serve(
    functions: Functions,
    params: Params,
    state: State,
    orders: Orders,
    values: SamplerValues,
    arrays: tuple[Any, ...],
    *,
    plan: SamplerPlan,
    processing: ProcessorPlan,
    axes: CacheAxes,
    watched: bool,
    placement: Any,
) -> tuple[State, Report]:
    """Decode for some steps, filling free slots from the queue.

    `params` are those of `decoding_params`; `processing` and `arrays` are what
    `ProcessorPlan.of` makes of the processors.
    """
    TRACES["serve"] += 1
    fns = functions.restore()
    processors = processing.restore(arrays)
    head = fns.unembed(params)
    waiting = state.waiting
    slots = state.slots
    dropped = orders.dropped.at[slots.record].get(mode="fill", fill_value=False)
    slots = slots._replace(idle=slots.idle | dropped)
    zero = jnp.zeros((), jnp.int32)
    loop = _Loop(slots, state.records, waiting.head, zero, zero)

    def queued(loop: _Loop) -> jax.Array:
        return loop.head < orders.tail

    def may_go_on(loop: _Loop) -> jax.Array:
        idle = jnp.sum(loop.slots.idle, dtype=jnp.int32)
        starved = orders.more & ~queued(loop) & (4 * idle >= loop.slots.idle.shape[0])
        return (loop.steps < orders.steps) & ~starved

    def has_work(loop: _Loop) -> jax.Array:
        return may_go_on(loop) & (queued(loop) | ~jnp.all(loop.slots.idle))

    def needs_no_refill(loop: _Loop) -> jax.Array:
        idle = loop.slots.idle
        return may_go_on(loop) & ~jnp.all(idle) & ~(queued(loop) & jnp.any(idle))

    def advance(loop: _Loop) -> _Loop:
        return _advance(fns.apply, params, head, loop, values, plan, processors)

    def round_(loop: _Loop) -> _Loop:
        loop = _refill(loop, waiting, orders.tail, axes)
        return jax.lax.while_loop(needs_no_refill, advance, loop)

    loop = jax.lax.while_loop(has_work, round_, loop)
    records = loop.records
    report = Report(
        status=records.status,
        lengths=records.lengths,
        head=loop.head,
        steps=loop.steps,
        busy=loop.busy,
        tokens=records.tokens if watched else records.tokens[:, :0],
    )
    state = State(loop.slots, waiting._replace(head=loop.head), records)
    return place((state, report), placement)


def _refill(loop: _Loop, waiting: Waiting, tail: jax.Array, axes: CacheAxes) -> _Loop:
    """Put the next sequences of the ring into the idle slots."""
    slots = loop.slots
    free = jnp.argsort(~slots.idle, stable=True).astype(jnp.int32)
    count = jnp.sum(slots.idle, dtype=jnp.int32)
    count = jnp.minimum(count, tail - loop.head)

    def put(number: jax.Array, slots: Slots) -> Slots:
        slot = free[number]
        place = (loop.head + number) % waiting.row.shape[0]
        row = waiting.row[place]
        context = slots.context
        if context.shape[1]:
            prompt = waiting.prompts[row][None]
            context = jax.lax.dynamic_update_slice(context, prompt, (slot, 0))
        return Slots(
            record=slots.record.at[slot].set(waiting.record[place]),
            idle=slots.idle.at[slot].set(False),
            step=slots.step.at[slot].set(0),
            limit=slots.limit.at[slot].set(waiting.limit[place]),
            prompt_lengths=slots.prompt_lengths.at[slot].set(waiting.lengths[row]),
            hidden=slots.hidden.at[slot].set(waiting.hidden[row]),
            # Positions past the prompt keep what the last sequence left there: nobody
            # sees them before they are written.
            cache=copy_row(waiting.cache, row, slots.cache, slot, axes),
            context=context,
        )

    slots = jax.lax.fori_loop(0, count, put, slots)
    return loop._replace(slots=slots, head=loop.head + count)


def _advance(
    apply: Any,
    params: Params,
    head: Any,
    loop: _Loop,
    values: SamplerValues,
    plan: SamplerPlan,
    processors: tuple[Processor, ...],
) -> _Loop:
    """One token for every slot that is not idle."""
    slots, records = loop.slots, loop.records
    active, positions = ~slots.idle, slots.prompt_lengths + slots.step
    raw = ops.logits(slots.hidden, head).astype(jnp.float32)
    processed, context = raw, slots.context
    if processors:
        keys = records.keys.at[slots.record].get(mode="clip")
        _, keys = step_keys(keys, slots.step)
        known = ProcessorState(context, positions, keys)
        processed = run_processors(processors, raw, known)
    where = (slots.record, slots.step)
    uniforms = records.uniforms.at[where].get(mode="clip")
    drawn = sample(raw, processed, uniforms, plan, values)
    tokens = jnp.where(active, drawn.tokens, values.pad_id)
    stopped = active & jnp.any(
        tokens[:, None] == values.stop_ids[None].astype(jnp.int32), axis=1
    )
    step = slots.step + active.astype(jnp.int32)
    ended = stopped | (active & (step >= slots.limit))
    out = apply(
        params,
        tokens[:, None],
        positions[:, None],
        active.astype(jnp.int32)[:, None],
        slots.cache,
    )
    if processors:
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        context = context.at[rows, positions].set(tokens, mode="drop")
    nowhere = records.status.shape[0]
    record = jnp.where(active, slots.record, nowhere)
    numbers = jnp.stack([drawn.logps, drawn.sampling_logps, drawn.entropies], axis=-1)
    outcome = jnp.where(stopped, STOPPED, FULL)
    near = drawn.near.astype(jnp.int32)

    def put(array: jax.Array, where: Any, new: jax.Array) -> jax.Array:
        return array.at[where].set(new, mode="drop")

    records = records._replace(
        tokens=put(records.tokens, (record, slots.step), tokens),
        numbers=put(records.numbers, (record, slots.step), numbers),
        lengths=put(records.lengths, record, step),
        near=records.near.at[record].add(near, mode="drop"),
        status=put(records.status, jnp.where(ended, record, nowhere), outcome),
    )
    slots = slots._replace(
        idle=slots.idle | ended,
        step=step,
        hidden=out.hidden[:, 0],
        cache=out.cache,
        context=context,
    )
    busy = loop.busy + jnp.sum(active, dtype=jnp.int32)
    return _Loop(slots, records, loop.head, loop.steps + 1, busy)


@jax.jit
def collect(
    records: Records, rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, numbers and near draws of some records, `[c, N]`, `[c, N, 3]`, `[c]`."""
    TRACES["collect"] += 1
    return records.tokens[rows], records.numbers[rows], records.near[rows]
