"""What `generate_stream` keeps on the device, and what host and device tell each other.

Sequences wait in a queue on the device, their prompts already read; slots are what is
being decoded; what a sequence yields goes into a record of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.generation._decode import Functions
from jaxpost.typing import Cache, Params

WAITING, STOPPED, FULL = 0, 1, 2
"""What became of a record: nothing yet, a stop token, its limit."""


class Sizes(NamedTuple):
    """What the shapes of a `State` follow from; static.

    Fields:
        slots: sequences decoded at a time, `B`.
        rows: prompts that wait, `W`.
        entries: sequences that wait, `E`.
        records: sequences under way or not yet read by the host, `R`.
        width: columns for prompts, `P`.
        length: positions of a slot's cache, `S`.
        room: tokens of the longest answer, `N`.
    """

    slots: int
    rows: int
    entries: int
    records: int
    width: int
    length: int
    room: int


class Slots(NamedTuple):
    """The sequences being decoded.

    Fields:
        record: which record a slot writes, int32 `[B]`; `R` before the first.
        idle: nothing to decode, bool `[B]`.
        step: tokens of the answer so far, int32 `[B]`.
        limit: tokens after which it ends, int32 `[B]`.
        prompt_lengths: int32 `[B]`.
        hidden: state that predicts the next token, `[B, D]`.
        cache: `B` rows of `S` positions.
        context: prompt and answer without a gap, int32 `[B, S]`; `[B, 0]` without
            processors.
    """

    record: jax.Array
    idle: jax.Array
    step: jax.Array
    limit: jax.Array
    prompt_lengths: jax.Array
    hidden: jax.Array
    cache: Cache
    context: jax.Array


class Waiting(NamedTuple):
    """Prompts that are read, and the ring of sequences to start from them.

    Fields:
        prompts: int32 `[W, P]`; `[W, 0]` without processors.
        lengths: int32 `[W]`.
        hidden: state after the last token, `[W, D]`.
        cache: `W` rows of `P` positions.
        row, record, limit: of each sequence, int32 `[E]`.
        head: sequences taken from the ring so far, int32 scalar; the next one is at
            `head % E`.
    """

    prompts: jax.Array
    lengths: jax.Array
    hidden: jax.Array
    cache: Cache
    row: jax.Array
    record: jax.Array
    limit: jax.Array
    head: jax.Array


class Records(NamedTuple):
    """What sequences yield.

    Fields:
        keys: `[R]`.
        uniforms: numbers that draw each token, float32 `[R, N, 2]`.
        tokens: int32 `[R, N]`.
        numbers: `logps`, `sampling_logps`, `entropies`, float32 `[R, N, 3]`.
        lengths: int32 `[R]`.
        near: draws within `NEAR` of another token, int32 `[R]`.
        status: int32 `[R]`.
    """

    keys: jax.Array
    uniforms: jax.Array
    tokens: jax.Array
    numbers: jax.Array
    lengths: jax.Array
    near: jax.Array
    status: jax.Array


class State(NamedTuple):
    """Everything on the device; each program is given it for good (donated)."""

    slots: Slots
    waiting: Waiting
    records: Records


class Admission(NamedTuple):
    """A group of prompts to read, and the sequences to start from each.

    Fields:
        tokens: int32 `[m, w]`, padded on the right.
        lengths: int32 `[m]`; 0 in rows that only fill up the group.
        rows: where they wait, int32 `[m]`; `W` for the rows that fill up.
        places: places in the ring, int32 `[m G]`; `E` for none.
        row, record, limit: of each sequence, int32 `[m G]`; a record `R` for none.
        ids: folded into the key, uint32 `[m G]`.
    """

    tokens: Any
    lengths: Any
    rows: Any
    places: Any
    row: Any
    record: Any
    limit: Any
    ids: Any


class Orders(NamedTuple):
    """What the host wants of one call of `serve`.

    Fields:
        steps: most decoding steps, int32 scalar.
        tail: sequences put into the ring so far, int32 scalar.
        more: the host has prompts that were not admitted, bool scalar: return once a
            quarter of the slots have nothing to do, instead of going on.
        dropped: records whose sequence is to be decoded no further, bool `[R]`.
    """

    steps: Any
    tail: Any
    more: Any
    dropped: Any


class Report(NamedTuple):
    """What the host learns from one call of `serve`.

    Fields:
        status, lengths: of each record, int32 `[R]`.
        head: sequences taken from the ring so far, int32 scalar.
        steps: decoding steps of this call, int32 scalar.
        busy: slots that decoded, summed over those steps, int32 scalar.
        tokens: answers so far, int32 `[R, N]`; `[R, 0]` if not watched.
    """

    status: jax.Array
    lengths: jax.Array
    head: jax.Array
    steps: jax.Array
    busy: jax.Array
    tokens: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("functions", "sizes", "cache_dtype", "with_context", "placement"),
)
def open_slots(
    functions: Functions,
    params: Params,
    key: jax.Array,
    *,
    sizes: Sizes,
    cache_dtype: Any,
    with_context: bool,
    placement: Any,
) -> State:
    """A state without sequences; `key` gives the kind of keys only."""
    fns = functions.restore()
    one = jnp.zeros((1, 1), jnp.int32)
    hidden = jax.eval_shape(fns.apply, params, one, one, one).hidden
    slots, rows, entries, records, width, length, room = sizes

    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    state = State(
        Slots(
            record=jnp.full((slots,), records, jnp.int32),
            idle=jnp.ones((slots,), jnp.bool_),
            step=zeros(slots),
            limit=zeros(slots),
            prompt_lengths=zeros(slots),
            hidden=zeros(slots, hidden.shape[-1], dtype=hidden.dtype),
            cache=fns.init_cache(slots, length, cache_dtype),
            context=zeros(slots, length if with_context else 0),
        ),
        Waiting(
            prompts=zeros(rows, width if with_context else 0),
            lengths=zeros(rows),
            hidden=zeros(rows, hidden.shape[-1], dtype=hidden.dtype),
            cache=fns.init_cache(rows, width, cache_dtype),
            row=zeros(entries),
            record=zeros(entries),
            limit=zeros(entries),
            head=zeros(),
        ),
        Records(
            keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
                key, jnp.arange(records, dtype=jnp.uint32)
            ),
            uniforms=zeros(records, room, 2, dtype=jnp.float32),
            tokens=zeros(records, room),
            numbers=zeros(records, room, 3, dtype=jnp.float32),
            lengths=zeros(records),
            near=zeros(records),
            status=zeros(records),
        ),
    )
    return place(state, placement)


def place(tree: Any, placement: Any) -> Any:
    """Kept where it is between calls: an array placed anew would be compiled anew."""
    return (
        tree if placement is None else jax.lax.with_sharding_constraint(tree, placement)
    )
