"""Log-probabilities of whole sequences, straight from hidden states.

A loss of sequences (a preference loss, say) multiplies every token's log-probability
with a factor that is known once its row is: the row's margin decides it. So a chunk
that holds whole rows can form gradients from the logits that it just read, where
`linear_token_logps`, to which tokens are all alike, would build them again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpost.ops._chunks import default_chunk_size
from jaxpost.ops._dtypes import compute_dtype
from jaxpost.ops._linear_chunk import (
    Grads,
    Inputs,
    Settings,
    Stats,
    chunk_grads,
    chunk_logps,
    gradient_sweep,
    scale_if_foreseen,
    zero_grads,
)
from jaxpost.ops._linear_logps import linear_token_logps
from jaxpost.ops._logits import as_head
from jaxpost.typing import Head, TokenStats

Foresee = Callable[..., jax.Array]

MOST_ROW = 3
"""A chunk may be so many times the usual one, to hold a whole row: memory for speed."""
SIZE_STEP = 64
"""Tokens by which sizes of chunks differ, of chunks between 512 and 1024 tokens."""


def linear_sequence_logps(
    hidden: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    sequence_ids: jax.Array,
    count: int,
    *,
    foresee: Foresee | None = None,
    operands: Any = (),
    chunk_size: int | None = None,
    token_logps: Callable[..., TokenStats] = linear_token_logps,
) -> jax.Array:
    """Summed log-probability of each sequence, `count` of them to a row.

    With `foresee` the gradients are formed in the forward pass, in three products of
    the size of the logits' instead of four, if there is one device and a chunk holds a
    row. Reverse mode only.

    Args:
        hidden: states after the last norm, float `[B, T, D]`.
        head: a `Head`, or its bare weight `[D, V]`.
        targets: what `hidden[:, t]` predicts, integer `[B, T]`, in `[0, V)`.
        sequence_ids: to which sequence of its row a target belongs, integer `[B, T]`
            in `[0, count)`; -1 where it is not scored.
        count: sequences in a row.
        foresee: what the loss will multiply the result with, up to one factor common to
            all: a pure function `(logps [B, count], *operands) -> [B, count]` of each
            row by itself, such as `jax.grad` of the sum of the rows' losses. Only a
            hint for speed: should the cotangent turn out different, the backward pass
            computes the gradients anew.
        operands: arrays that `foresee` needs, a tuple; no gradient reaches them, and it
            must not close over traced arrays.
        chunk_size: tokens per chunk; None chooses as `linear_token_logps` does, but up
            to `MOST_ROW` times as many where rows would not fit otherwise.
        token_logps: what computes the log-probs where the gradients are not foreseen;
            on a mesh, from `parallel.split_vocabulary`. If it is given, they never are.

    Returns:
        `[B, count]`, float32 or wider, nats; 0 for a sequence without tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    head = as_head(head)
    if targets.shape != hidden.shape[:-1] or sequence_ids.shape != targets.shape:
        raise ValueError(
            "targets and sequence_ids must be [B, T] for hidden [B, T, D], got "
            f"{targets.shape}, {sequence_ids.shape} and {hidden.shape}."
        )
    dtype = compute_dtype(hidden, head.weight)
    if chunk_size is None:
        usual = default_chunk_size(head.weight.shape[1], dtype.itemsize)
        width = targets.shape[1]
        chunk_size = width if usual < width <= MOST_ROW * usual else usual
    plain = token_logps is linear_token_logps and jax.device_count() == 1
    # Without `foresee` too: the same arithmetic for a policy and its reference.
    if plain and targets.shape[1] <= chunk_size:
        return foreseen_sequence_logps(
            hidden, head, targets, sequence_ids, count, foresee, operands, chunk_size
        )
    stats = token_logps(hidden, head, targets, mask=sequence_ids >= 0)
    which = sequence_ids[..., None] == jnp.arange(count)[None, None]
    return jnp.sum(jnp.where(which, stats.logps[..., None], 0.0), axis=1)


def foreseen_sequence_logps(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    sequence_ids: jax.Array,
    count: int,
    foresee: Foresee | None,
    operands: Any,
    chunk_size: int,
) -> jax.Array:
    """`linear_sequence_logps` in chunks of whole rows; a row must fit into one."""
    dtype = compute_dtype(hidden, head.weight)
    columns = min(chunk_size, targets.size)
    settings = Settings(
        columns, dtype, head.scale, head.softcap, 1.0, False, False, None
    )
    scored = sequence_ids >= 0
    row = jnp.arange(targets.shape[0], dtype=jnp.int32)[:, None]
    dead = targets.shape[0] * count
    slots = jnp.where(scored, row * count + sequence_ids.astype(jnp.int32), dead)
    ends = jnp.cumsum(jnp.sum(scored, axis=1, dtype=jnp.int32), dtype=jnp.int32)
    # Scored tokens to the front, rows kept together and in order; then whole chunks,
    # and one more for a chunk that begins within the last.
    order = jnp.argsort(~scored.reshape(-1), stable=True)
    size = (-(-targets.size // columns) + 1) * columns

    def front(x, fill):
        x = jnp.asarray(x).reshape(-1, *x.shape[2:])[order]
        widths = [(0, size - len(order))] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=fill)

    alive = scored[..., None]
    packed = _Packed(
        front(jnp.where(alive, hidden, jnp.zeros((), hidden.dtype)), 0),
        head.weight,
        head.bias,
        front(targets, 0),
        front(slots, dead),
        ends,
    )
    shape = (targets.shape[0], count)
    return _sequences((settings, shape, foresee), packed, operands)


class _Packed(NamedTuple):
    """Scored tokens of all rows in one line, `[S, ...]`.

    Fields:
        slots: which of the `B * count` sequences a token belongs to, `[S]`.
        ends: one past each row's last token, `[B]`.
    """

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    targets: jax.Array
    slots: jax.Array
    ends: jax.Array


def _inputs(settings: Settings, packed: _Packed) -> Inputs:
    trips = (packed.ends[-1] + (settings.columns - 1)) // settings.columns
    return Inputs(
        packed.hidden[None],
        packed.weight,
        packed.bias,
        packed.targets[None],
        None,
        trips,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequences(static, packed: _Packed, operands) -> jax.Array:
    return _walk(static, packed, operands, with_grads=False)[0]


def _forward(static, packed, operands):
    logps, *rest = _walk(static, packed, operands, with_grads=static[2] is not None)
    return logps, (packed, *rest)


class _Walk(NamedTuple):
    """What is carried from chunk to chunk: sums per sequence, and what was foreseen."""

    start: jax.Array
    logps: jax.Array
    log_norms: jax.Array
    factors: jax.Array
    grads: Grads | None


def _walk(static, packed: _Packed, operands, *, with_grads: bool):
    """Sums of all sequences; with `with_grads`, what their gradients need too."""
    settings, shape, foresee = static
    inputs, columns = _inputs(settings, packed), settings.columns
    sequences = shape[0] * shape[1]

    sizes = _chunk_sizes(columns, len(packed.targets))

    def step(walk: _Walk) -> _Walk:
        # Up to the end of the last row that fits; `start` is the end of one before.
        last = jnp.searchsorted(packed.ends, walk.start + columns, side="right") - 1
        end = packed.ends[last]
        enough = jnp.searchsorted(jnp.array(sizes), end - walk.start)
        branches = [functools.partial(step_of, size) for size in sizes]
        return lax.switch(enough, branches, walk, end)

    def step_of(size: int, walk: _Walk, end: jax.Array) -> _Walk:
        start = walk.start

        def take(x):
            return lax.dynamic_slice_in_dim(x, start, size)

        live = start + jnp.arange(size) < end
        slots = jnp.where(live, take(packed.slots), sequences)
        chunk = chunk_logps(settings, inputs, take(packed.hidden), take(packed.targets))
        found = jnp.where(live, chunk.logps, 0)
        logps = walk.logps + jax.ops.segment_sum(found, slots, sequences)
        log_norms = lax.dynamic_update_slice_in_dim(
            walk.log_norms, chunk.log_norm, start, 0
        )
        if walk.grads is None:
            return walk._replace(start=end, logps=logps, log_norms=log_norms)
        foreseen = foresee(logps.reshape(shape), *operands).reshape(-1)
        foreseen = foreseen.astype(settings.dtype)
        weights = jnp.where(live, foreseen[jnp.minimum(slots, sequences - 1)], 0)
        of_chunk = chunk_grads(
            settings, inputs, take(packed.hidden), chunk, take(packed.targets), weights
        )
        old = walk.grads
        grads = Grads(
            # What lies past `end` is zero here, and written by the next chunk.
            lax.dynamic_update_slice_in_dim(
                old.hidden, of_chunk.hidden[None], start, 1
            ),
            of_chunk.add_weight(old.weight),
            None if old.bias is None else old.bias + of_chunk.bias,
        )
        done = jnp.repeat((packed.ends > start) & (packed.ends <= end), shape[1])
        factors = jnp.where(done, foreseen, walk.factors)
        return _Walk(end, logps, log_norms, factors, grads)

    def zeros(size):
        return jnp.zeros(size, settings.dtype)

    first = _Walk(
        jnp.zeros((), jnp.int32),
        zeros(sequences),
        zeros(len(packed.targets)),
        zeros(sequences),
        zero_grads(settings, inputs) if with_grads else None,
    )
    walk = lax.while_loop(lambda walk: walk.start < packed.ends[-1], step, first)
    return walk.logps.reshape(shape), walk.log_norms, walk.factors, walk.grads


def _chunk_sizes(columns: int, tokens: int) -> tuple[int, ...]:
    """Sizes that a chunk of whole rows may have, the last one `columns`.

    Rows seldom fill it: those of 384 tokens would leave a quarter of 512 idle. At most
    nine, each a program of its own to compile.
    """
    if tokens <= 2 * columns:  # one chunk, and what is added for one that begins late
        return (columns,)
    parts = min(max(columns // SIZE_STEP, 8), 16)
    return tuple(
        sorted({-(-columns * n // parts) for n in range(-(-parts // 2), parts + 1)})
    )


def _backward(static, saved, logps_bar):
    settings = static[0]
    packed, log_norms, factors, grads = saved
    inputs = _inputs(settings, packed)
    bars = jnp.append(logps_bar.reshape(-1), 0).astype(settings.dtype)
    # What is foreseen of a sequence without tokens says nothing.
    held = jnp.zeros(bars.size, bool).at[packed.slots].set(True)[:-1]
    if grads is None:
        start, trips = zero_grads(settings, inputs), inputs.trips
    else:
        start, trips = scale_if_foreseen(
            jnp.where(held, factors, 0),
            inputs.trips,
            grads,
            jnp.where(held, bars[:-1], 0),
            None,
        )
    stats = Stats(log_norms[None], log_norms[None], None, None)
    found = gradient_sweep(
        settings, inputs, stats, bars[packed.slots][None], None, start, trips
    )
    of_packed = packed._replace(
        hidden=found.hidden[0].astype(packed.hidden.dtype),
        weight=found.weight.astype(packed.weight.dtype),
        **{
            name: np.zeros(getattr(packed, name).shape, jax.dtypes.float0)
            for name in ("targets", "slots", "ends")
        },
    )
    if found.bias is not None and packed.bias is not None:
        of_packed = of_packed._replace(bias=found.bias.astype(packed.bias.dtype))
    return of_packed, None


_sequences.defvjp(_forward, _backward)
