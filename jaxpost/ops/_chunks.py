"""How tokens are arranged for a sweep in chunks: rows kept, columns walked.

A sweep walks `[A, S, ...]` along `S`, `columns` at a time, so that a chunk holds
`A * columns` tokens. The batch axis stays whole in `A` where devices may share it:
slicing along a sharded axis would gather it at every step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_BYTES = 32 * 2**20
"""Default size of one chunk's logits; larger ones gained nothing measurable on CPU."""
MIN_CHUNK_CPU, MIN_CHUNK_ACCELERATOR, MAX_CHUNK = 512, 2048, 4096


def default_chunk_size(vocab: int, itemsize: int, *, on_cpu: bool | None = None) -> int:
    """Tokens per chunk whose logits take about `CHUNK_BYTES`, but not too few.

    Args:
        vocab: ids that one device scores.
        itemsize: bytes of one logit.
        on_cpu: for which kind of device; None is JAX's default one.

    Each chunk reads and writes the whole gradient of the head, `2 / tokens` bytes for
    each operation of its three products: memory keeps up with a CPU from about 512
    tokens on, with an accelerator from about 2048.
    """
    if on_cpu is None:
        on_cpu = jax.default_backend() == "cpu"
    least = MIN_CHUNK_CPU if on_cpu else MIN_CHUNK_ACCELERATOR
    return min(max(CHUNK_BYTES // max(vocab * itemsize, 1), least), MAX_CHUNK)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens of `shape` arranged as `[rows, chunks * columns]`, padded at the end.

    Fields:
        shape: the tokens' own axes, `B` first.
        rows: `A`, a divisor of `B`.
        columns: steps of `S` in one chunk.
        chunks: number of chunks when every token is walked.
    """

    shape: tuple[int, ...]
    rows: int
    columns: int
    chunks: int

    def arrange(self, x: jax.Array) -> jax.Array:
        """`[*shape, ...]` to `[A, S, ...]`, padded with zeros."""
        rest = x.shape[len(self.shape) :]
        x = x.reshape(self.rows, -1, *rest)
        missing = self.chunks * self.columns - x.shape[1]
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `arrange`."""
        size = 1
        for length in self.shape:
            size *= length
        rest = x.shape[2:]
        return x[:, : size // self.rows].reshape(*self.shape, *rest)


def plan_layout(shape: tuple[int, ...], chunk_size: int) -> Layout:
    """Arrange tokens of `shape` into near-equal chunks of at most `chunk_size`.

    With one device all tokens form one row, where masked tokens can be set aside best;
    with several, rows are a divisor of the batch, which may be sharded over them.
    """
    batch, tokens = shape[0], 1
    for length in shape:
        tokens *= length
    rows = 1
    if jax.device_count() > 1:
        limit = min(batch, chunk_size)
        rows = max(d for d in range(1, max(limit, 1) + 1) if batch % d == 0)
    width = tokens // rows
    chunks = max(-(-width // max(chunk_size // rows, 1)), 1)
    columns = max(-(-width // chunks), 1)
    return Layout(shape, rows, columns, chunks)


def gather_columns(x: jax.Array, order: jax.Array) -> jax.Array:
    """`out[a, s] = x[a, order[a, s]]` for `x` `[A, S, ...]` and `order` `[A, S]`."""
    index = order.reshape(order.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


class Walk(NamedTuple):
    """The tokens of a layout in the order in which they are walked.

    Fields:
        layout: how they are arranged.
        trips: how many chunks to walk, a scalar.
        mask: True on tokens to score, bool `[A, S]` in the order of the walk, where
            they are the first of their rows; None for all.
        order, back: from the arrangement to the walk and back, `[A, S]`, or None.
    """

    layout: Layout
    trips: jax.Array | int
    mask: jax.Array | None = None
    order: jax.Array | None = None
    back: jax.Array | None = None

    def bring(self, x: jax.Array) -> jax.Array:
        """`[*shape, ...]` to `[A, S, ...]`, zeros where not scored."""
        x = self.layout.arrange(x)
        return (
            x if self.order is None else self._zero_rest(gather_columns(x, self.order))
        )

    def take_back(self, x: jax.Array) -> jax.Array:
        """`[A, S, ...]` to `[*shape, ...]`, zeros where not scored."""
        if self.back is not None:
            x = gather_columns(self._zero_rest(x), self.back)
        return self.layout.restore(x)

    def _zero_rest(self, x: jax.Array) -> jax.Array:
        assert self.mask is not None
        mask = self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 2))
        return jnp.where(mask, x, jnp.zeros((), x.dtype))


def plan_walk(layout: Layout, mask: jax.Array | None) -> Walk:
    """Bring the tokens of `mask`, bool `[*shape]`, to the front of their rows.

    The others are not walked, as far as whole chunks of them are left.
    """
    if mask is None:
        return Walk(layout, layout.chunks)
    mask = layout.arrange(mask)
    order = jnp.argsort(~mask, axis=1, stable=True)
    scored = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    trips = (scored + (layout.columns - 1)) // layout.columns
    mask = gather_columns(mask, order)
    return Walk(layout, trips, mask, order, jnp.argsort(order, axis=1))
