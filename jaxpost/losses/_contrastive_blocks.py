"""The sums of NT-Xent over blocks of similarities, forward and backward.

Three families of blocks: between the views, and within each of them. Those within are
symmetric, so a block below the diagonal is never formed: its column sums are the row
sums that are missing. A loss of `N` nodes costs `2 N²` inner products, not `4 N²`.

With `E[i, j] = exp(s[i, j] / t)` and `a[i] = g[i] / (2 D[i])`, where `g` is the
cotangent and `D` the denominator, the gradient of every similarity, whatever its
family, is `(a[i] + a[j]) E[i, j] / t`: one product with each side of the block.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KEEP_BYTES = 256 * 2**20
"""Blocks up to this size together are kept for the backward pass."""
CHUNK = 1024
"""Rows of a block, at most: 4 MiB, which a core's share of the cache about holds."""
SHORTEST = 1e-12
"""Length below which a row has no direction."""
COLDEST = 1 / 40
"""Temperature from which `exp((cos - 1) / t)` cannot vanish in float32."""


def inverse_lengths(z: jax.Array) -> jax.Array:
    """`1 / max(|row|, 1e-12)`, `[N, D]` to `[N]`."""
    squares = jnp.sum(z * z, axis=1)
    positive = jnp.where(squares > 0.0, squares, 1.0)  # sqrt has no slope at 0
    lengths = jnp.where(squares > 0.0, jnp.sqrt(positive), 0.0)
    return 1.0 / jnp.maximum(lengths, SHORTEST)


def normalize_rows(z: jax.Array) -> jax.Array:
    """Rows divided by their length; one shorter than 1e-12 is a constant."""
    inverse = inverse_lengths(jax.lax.stop_gradient(z))
    z = jnp.where(_has_direction(inverse)[:, None], z, jax.lax.stop_gradient(z))
    return z * inverse_lengths(z)[:, None]


def _has_direction(inverse: jax.Array) -> jax.Array:
    return inverse < 1.0 / SHORTEST


class Plan(NamedTuple):
    """How N rows are cut into blocks; static.

    Fields:
        nodes: N.
        size: rows of a chunk; the last chunk overlaps the one before, whose rows it
            then masks, so that nothing is padded.
        keep: whether the blocks are kept for the backward pass.
    """

    nodes: int
    size: int
    keep: bool

    @property
    def chunks(self) -> int:
        return -(-self.nodes // self.size)

    def take(self, x: jax.Array, chunk: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start(chunk), self.size)

    def add(self, x: jax.Array, chunk: jax.Array, update: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            x, self.take(x, chunk) + update, self.start(chunk), 0
        )

    def put(self, x: jax.Array, chunk: jax.Array, rows: jax.Array) -> jax.Array:
        """`x` with other rows in this chunk, which those of the one before survive."""
        if self.chunks * self.size != self.nodes:
            mine = self.mine(chunk, jnp.bool_)[:, None]
            rows = jnp.where(mine, rows, self.take(x, chunk))
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start(chunk), 0)

    def start(self, chunk: jax.Array) -> jax.Array:
        return jnp.minimum(chunk * self.size, self.nodes - self.size)

    def mine(self, chunk: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """1 on rows of this chunk, 0 on those of the one before, `[size]`."""
        rows = self.start(chunk) + jnp.arange(self.size, dtype=jnp.int32)
        return (rows >= chunk * self.size).astype(dtype)


class Family(NamedTuple):
    """Blocks of one kind: `first` and `second` are views, 0 or 1.

    Fields:
        first, second: whose rows and whose columns.
        pairs: the chunks, int `[blocks, 2]`.
        diagonal: whether a block is one chunk against itself, without self-pairs and
            whole, so that its columns repeat its rows.
    """

    first: int
    second: int
    pairs: np.ndarray
    diagonal: bool = False


def plan_blocks(
    count: int,
    itemsize: int,
    intra: bool,
    chunk_size: int | None,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Plan, list[Family]]:
    """Near-equal chunks and the families of blocks between them."""
    chunks = -(-count // min(chunk_size or CHUNK, count))
    size = -(-count // chunks)
    chunks = -(-count // size)
    everyone = list(itertools.product(range(chunks), repeat=2))
    families = [Family(0, 1, np.asarray(everyone, np.int32))]
    if intra:
        above = [pair for pair in everyone if pair[0] < pair[1]]
        same = np.asarray([(c, c) for c in range(chunks)], np.int32)
        for view in (0, 1):
            families.append(Family(view, view, same, diagonal=True))
            if above:
                families.append(Family(view, view, np.asarray(above, np.int32)))
    blocks = sum(len(family.pairs) for family in families)
    keep = blocks * size**2 * itemsize <= keep_bytes
    return Plan(count, size, keep), families


def blockwise_nt_xent(
    z1: jax.Array,
    z2: jax.Array,
    temperature: float,
    intra: bool,
    chunk_size: int | None,
    keep_bytes: int = KEEP_BYTES,
) -> jax.Array:
    """See `nt_xent`, which checks."""
    settings = Settings(float(temperature), intra, chunk_size, keep_bytes)
    return _nt_xent(settings, z1, z2)


class Settings(NamedTuple):
    """What is static; see `nt_xent`, and `KEEP_BYTES`."""

    temperature: float
    intra: bool
    chunk_size: int | None
    keep_bytes: int

    def plan(self, z: jax.Array) -> tuple[Plan, list[Family]]:
        return plan_blocks(
            z.shape[0], z.dtype.itemsize, self.intra, self.chunk_size, self.keep_bytes
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nt_xent(settings, z1, z2):
    return _forward(settings, z1, z2, False)[0]


# Compiled as wholes, so that a call outside a program does not compile every sweep.
@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(settings, z1, z2, for_gradient=True):
    temperature = settings.temperature
    plan, families = settings.plan(z1)
    cold = temperature < COLDEST
    plan = plan._replace(keep=plan.keep and for_gradient and not cold)
    views = View(z1, inverse_lengths(z1)), View(z2, inverse_lengths(z2))
    if cold:
        shifts = _largest(plan, families, views, temperature)
    else:
        shifts = (jnp.full(z1.shape[:1], 1.0 / temperature, z1.dtype),) * 2
    sums = (jnp.zeros_like(shifts[0]), jnp.zeros_like(shifts[1]))
    blocks = []
    for family in families:
        sums, kept = _sum_family(plan, family, views, temperature, shifts, sums, cold)
        blocks.append(kept)
    positive = jnp.sum(z1 * z2, axis=1) * (views[0].inverse * views[1].inverse)
    logs = tuple(jnp.log(s) + shift for s, shift in zip(sums, shifts, strict=True))
    values = (logs[0] + logs[1]) / 2.0 - positive / temperature
    return values, (views, logs, blocks)


class View(NamedTuple):
    """One view's rows `[N, D]` and what brings each of them to length one, `[N]`."""

    z: jax.Array
    inverse: jax.Array


def _rows(plan: Plan, view: View, chunk: jax.Array) -> jax.Array:
    return plan.take(view.z, chunk) * plan.take(view.inverse, chunk)[:, None]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _exponents(plan, family, views, temperature, i, j):
    """`s / t` of a block, `[size, size]`; -inf where a pair is not this block's."""
    a = _rows(plan, views[family.first], i)
    b = _rows(plan, views[family.second], j)
    scores = _dot(a * (1.0 / temperature), b.T)
    if family.diagonal:
        scores = jnp.where(jnp.eye(plan.size, dtype=bool), -jnp.inf, scores)
    if plan.chunks * plan.size != plan.nodes:
        mine = plan.mine(i, jnp.bool_)[:, None] & plan.mine(j, jnp.bool_)[None, :]
        scores = jnp.where(mine, scores, -jnp.inf)
    return scores, a, b


def _sum_family(plan, family, views, temperature, shifts, sums, cold):
    """Adds the family's `exp(s / t - shift)` to the rows' sums, and columns'."""

    def step(sums, inputs):
        (i, j), _ = inputs
        sums = list(sums)
        scores, _, _ = _exponents(plan, family, views, temperature, i, j)
        terms = by_row = by_column = jnp.exp(scores - 1.0 / temperature)
        if cold:
            by_row = jnp.exp(scores - plan.take(shifts[family.first], i)[:, None])
            by_column = jnp.exp(scores - plan.take(shifts[family.second], j)[None, :])
        sums[family.first] = plan.add(sums[family.first], i, jnp.sum(by_row, axis=1))
        if not family.diagonal:
            total = jnp.sum(by_column, axis=0)
            sums[family.second] = plan.add(sums[family.second], j, total)
        return tuple(sums), terms if plan.keep else None

    return _walk(step, sums, family.pairs)


def _largest(plan, families, views, temperature):
    """The largest exponent of each row of either view, `[N]` twice."""
    low = jnp.full(views[0].inverse.shape, -jnp.inf, views[0].z.dtype)
    found = (low, low)
    for family in families:

        def step(found, inputs, family=family):
            (i, j), _ = inputs
            found = list(found)
            scores, _, _ = _exponents(plan, family, views, temperature, i, j)
            for view, chunk, axis in ((family.first, i, 1), (family.second, j, 0)):
                new = jnp.maximum(
                    plan.take(found[view], chunk), jnp.max(scores, axis=axis)
                )
                found[view] = jax.lax.dynamic_update_slice_in_dim(
                    found[view], new, plan.start(chunk), 0
                )
            return tuple(found), None

        found, _ = _walk(step, found, family.pairs)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _backward(settings, residuals, cotangent):
    temperature = settings.temperature
    views, logs, blocks = residuals
    plan, families = settings.plan(views[0].z)
    half = cotangent / (2.0 * temperature)
    slopes = tuple(half * jnp.exp(1.0 / temperature - log) for log in logs)
    grads = tuple(jnp.zeros_like(view.z) for view in views)
    for family, kept in zip(families, blocks, strict=True):
        grads = _grad_family(
            plan, family, views, temperature, logs, half, slopes, grads, kept
        )
    return _through_lengths(plan, views, grads, cotangent / temperature)


def _grad_family(plan, family, views, temperature, logs, half, slopes, grads, kept):
    """Adds the family's part of the gradient of the rows of length one."""
    cold = temperature < COLDEST

    def step(grads, inputs):
        (i, j), terms = inputs
        grads = list(grads)
        if terms is None:
            scores, a, b = _exponents(plan, family, views, temperature, i, j)
        else:
            scores = None
            a = _rows(plan, views[family.first], i)
            b = _rows(plan, views[family.second], j)
        if cold:  # no common shift: each side has its own exponents
            by_row = jnp.exp(scores - plan.take(logs[family.first], i)[:, None])
            by_column = jnp.exp(scores - plan.take(logs[family.second], j)[None, :])
            slope = plan.take(half, i)[:, None] * by_row
            slope += plan.take(half, j)[None, :] * by_column
        else:
            if terms is None:
                terms = jnp.exp(scores - 1.0 / temperature)
            left = plan.take(slopes[family.first], i)[:, None]
            slope = (left + plan.take(slopes[family.second], j)[None, :]) * terms
        grads[family.first] = plan.add(grads[family.first], i, _dot(slope, b))
        if not family.diagonal:
            grads[family.second] = plan.add(grads[family.second], j, _dot(slope.T, a))
        return tuple(grads), None

    grads, _ = _walk(step, grads, family.pairs, kept)
    return grads


def _through_lengths(plan, views, grads, slopes):
    """From gradients of rows of length one to those of the rows, chunk by chunk.

    In place: whole arrays here would be two more of each gradient's size.
    """

    def step(grads, chunk):
        first, second = (View(*(plan.take(x, chunk) for x in view)) for view in views)
        own = plan.take(slopes, chunk)

        def put(grad, view, other):
            part = _through_length(view, other, plan.take(grad, chunk), own)
            return plan.put(grad, chunk, part)

        return (put(grads[0], first, second), put(grads[1], second, first)), None

    chunks = jnp.arange(plan.chunks, dtype=jnp.int32)
    return jax.lax.scan(step, grads, chunks)[0]


def _through_length(view: View, other: View, grad: jax.Array, slopes: jax.Array):
    """From the gradient of the row of length one to that of the row itself."""
    unit = view.z * view.inverse[:, None]
    grad = grad - slopes[:, None] * (other.z * other.inverse[:, None])  # -s[i, i] / t
    along = jnp.sum(grad * unit, axis=1, keepdims=True)
    scale = jnp.where(_has_direction(view.inverse), view.inverse, 0.0)
    return scale[:, None] * (grad - along * unit)


def _walk(step, carry, pairs: np.ndarray, extra=None):
    """`lax.scan` over blocks."""
    chunks = (jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]))
    return jax.lax.scan(step, carry, (chunks, extra))


_nt_xent.defvjp(_forward, _backward)
