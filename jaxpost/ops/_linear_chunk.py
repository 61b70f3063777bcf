"""Sweeps over arranged tokens `[A, S, ...]`, chunk by chunk, and their parts.

The two behind `linear_token_logps` are here; other sweeps are made of the same parts.

With `z = cap(scale * (h W + b)) / temperature` and `p = softmax(z)` of one token,

    d logp_y / dz = onehot(y) - p,        d entropy / dz = -p (log p + entropy),

and `d raw = dz * dz/d raw`, `dh = d raw @ W^T`, `dW = h^T @ d raw`: three products, the
one for the logits included. `forward_sweep` forms them at once when it is told what the
log-probs will be multiplied with; `gradient_sweep` forms them from known cotangents,
which costs the logits' product a second time.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpost.ops._dtypes import compute_dtype
from jaxpost.ops._logits import shape_logits
from jaxpost.typing import Head

TILE_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static choices of a sweep; see `linear_token_logps`."""

    columns: int
    dtype: jnp.dtype
    scale: float
    softcap: float | None
    temperature: float
    with_entropy: bool
    with_top1: bool
    vocab_axis: str | None
    slope: Callable[..., jax.Array] | None = None


class Inputs(NamedTuple):
    """Arrays of a sweep; gradients reach `hidden`, `weight` and `bias`.

    Fields:
        hidden: `[A, S, D]`.
        weight: `[D, V]`, `V` being this device's part if sharded.
        bias: `[V]` or None.
        targets: `[A, S]`, ids in the whole vocabulary.
        grad_weights: `[A, S]`, or a tuple of such columns if there is a slope, or None.
        trips: how many chunks to walk, a scalar.
    """

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    targets: jax.Array
    grad_weights: jax.Array | tuple[jax.Array, ...] | None
    trips: jax.Array | int


class Stats(NamedTuple):
    """Per token, `[A, S]`, zero in chunks not walked; `log_norm` is `logsumexp(z)`, and
    `weights` what a slope gave."""

    logps: jax.Array
    log_norm: jax.Array
    entropy: jax.Array | None
    top1: jax.Array | None
    weights: jax.Array | None = None


class Grads(NamedTuple):
    """Gradients in the dtype of the sums, shapes of the inputs."""

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None


class Chunk(NamedTuple):
    """What `chunk_logps` knows of `C` tokens; all but `[C, V]` scores and exps `[C]`.

    `exps` are `exp(scores - top)`, `norm` their sums, `chosen` the targets' scores.
    """

    logps: jax.Array
    log_norm: jax.Array
    chosen: jax.Array
    top: jax.Array
    norm: jax.Array
    scores: jax.Array
    exps: jax.Array


def chunk_logps(settings: Settings, inputs: Inputs, hidden, targets) -> Chunk:
    """One chunk's log-probs: hidden `[C, D]` and targets `[C]`, head of `inputs`."""
    scores = chunk_scores(settings, inputs, hidden)
    scores, chosen = _chosen_scores(settings, scores, targets)
    top = over_vocab(settings, lax.pmax, jnp.max(scores, axis=1))
    exps = jnp.exp(scores - top[:, None])
    norm = over_vocab(settings, lax.psum, jnp.sum(exps, axis=1))
    log_norm = top + jnp.log(norm)
    return Chunk(chosen - log_norm, log_norm, chosen, top, norm, scores, exps)


def chunk_grads(
    settings: Settings, inputs: Inputs, hidden, chunk: Chunk, targets, weights
) -> "ChunkGrads":
    """Gradients of `sum(weights * logps)` of one chunk, from its own scores."""
    # The factor is folded into the small side of each product, so that the
    # exponentials are used as they are.
    slopes = _subtract_at(settings, chunk.exps, targets, chunk.norm)
    return slope_grads(
        settings, inputs, hidden, chunk.scores, slopes, -weights / chunk.norm
    )


class ChunkGrads(NamedTuple):
    """Of one chunk: `[C, D]`, a function that adds to the weight's sum, `[V]`."""

    hidden: jax.Array
    add_weight: Callable[[jax.Array], jax.Array]
    bias: jax.Array


def forward_sweep(
    settings: Settings, inputs: Inputs, *, with_grads: bool
) -> tuple[Stats, Grads | None]:
    """Statistics of every walked token and, if asked, gradients of
    `sum(grad_weights * logps)` from the same logits."""
    rows, width = inputs.hidden.shape[:2]
    token_axes = all_varying_axes(inputs) - {settings.vocab_axis}

    def per_token():
        return zeros_over((rows, width), settings.dtype, token_axes)

    stats = Stats(
        per_token(),
        per_token(),
        per_token() if settings.with_entropy else None,
        per_token() if settings.with_top1 else None,
        per_token() if with_grads and settings.slope is not None else None,
    )
    grads = zero_grads(settings, inputs) if with_grads else None

    def body(i, carry):
        stats, grads = carry
        hidden = take_chunk(inputs.hidden, i, settings.columns)
        targets = take_chunk(inputs.targets, i, settings.columns)
        chunk = chunk_logps(settings, inputs, hidden, targets)
        found = Stats(
            chunk.logps,
            chunk.log_norm,
            _entropy(settings, chunk),
            _top1(settings, chunk, targets),
        )
        if grads is not None:
            assert inputs.grad_weights is not None
            weights = jax.tree.map(
                lambda x: take_chunk(x, i, settings.columns), inputs.grad_weights
            )
            if settings.slope is not None:
                weights = settings.slope(chunk.logps, *weights).astype(settings.dtype)
                found = found._replace(weights=weights)
            of_chunk = chunk_grads(settings, inputs, hidden, chunk, targets, weights)
            grads = with_chunk(grads, i, of_chunk)
        return jax.tree.map(lambda b, x: put_chunk(b, i, x), stats, found), grads

    return lax.fori_loop(0, inputs.trips, body, (stats, grads))


def gradient_sweep(
    settings: Settings,
    inputs: Inputs,
    stats: Stats,
    logps_bar: jax.Array,
    entropy_bar: jax.Array | None,
    start: Grads,
    trips: jax.Array | int,
) -> Grads:
    """Add to `start` the gradients of `sum(logps_bar * logps + entropy_bar * entropy)`.

    Tokens whose cotangents are zero add exactly nothing, whatever they hold.
    """

    def body(i, grads):
        def take(x):
            return take_chunk(x, i, settings.columns)

        bar = take(logps_bar)
        live = bar != 0
        if entropy_bar is not None:
            live |= take(entropy_bar) != 0
        hidden = take(inputs.hidden)
        hidden = jnp.where(live[:, None], hidden, jnp.zeros((), hidden.dtype))
        scores = chunk_scores(settings, inputs, hidden)
        # Infinity makes every probability of a dead token zero.
        log_norm = jnp.where(live, take(stats.log_norm), jnp.inf)
        log_probs = scores - log_norm[:, None]
        probs = jnp.exp(log_probs)
        if entropy_bar is None:
            factor = -bar
            slopes = _subtract_at(settings, probs, take(inputs.targets), 1.0)
        else:
            assert stats.entropy is not None
            entropy = jnp.where(live, take(stats.entropy), 0)
            surplus = jnp.where(probs > 0, log_probs + entropy[:, None], 0)
            slopes = probs * (bar[:, None] + take(entropy_bar)[:, None] * surplus)
            slopes = _subtract_at(settings, slopes, take(inputs.targets), bar)
            factor = -jnp.ones_like(bar)
        of_chunk = slope_grads(settings, inputs, hidden, scores, slopes, factor)
        return with_chunk(grads, i, of_chunk)

    return lax.fori_loop(0, trips, body, start)


def scale_if_foreseen(weights, trips, grads: Grads, logps_bar, entropy_bar):
    """The forward pass's gradients, scaled, and no chunk to walk, if the cotangent is
    `c * weights` up to rounding; otherwise zeros and all `trips`."""
    largest = jnp.max(jnp.abs(weights), initial=0)
    at_largest = (jnp.abs(weights) == largest) & (weights != 0)
    ratios = logps_bar / jnp.where(at_largest, weights, 1)
    factor = jnp.max(jnp.where(at_largest, ratios, -jnp.inf), initial=-jnp.inf)
    factor = jnp.where(largest > 0, factor, 0)
    expected = factor * weights
    # Of each, or next to the largest: what is lost then is rounding of the whole.
    slack = jnp.finfo(weights.dtype).eps * (
        8 * jnp.abs(expected) + jnp.abs(factor) * largest
    )
    foreseen = jnp.all(jnp.abs(logps_bar - expected) <= slack)
    if entropy_bar is not None:
        foreseen &= jnp.all(entropy_bar == 0)
    start = jax.tree.map(lambda x: jnp.where(foreseen, factor * x, 0), grads)
    return start, jnp.where(foreseen, 0, trips)


def zero_grads(settings: Settings, inputs: Inputs) -> Grads:
    """Where a gradient sum starts."""
    axes = all_varying_axes(inputs)
    return jax.tree.map(
        lambda x: zeros_over(x.shape, settings.dtype, axes),
        Grads(inputs.hidden, inputs.weight, inputs.bias),
    )


def slope_grads(settings, inputs, hidden, scores, slopes, factor) -> ChunkGrads:
    """Of one chunk whose gradient of the scores is `factor[:, None] * slopes`."""
    if settings.softcap is not None:
        capped = scores * (settings.temperature / settings.softcap)  # tanh of the input
        slopes = slopes * (1 - jnp.square(capped))
    factor = factor * (settings.scale / settings.temperature)
    weighted = hidden.astype(settings.dtype) * factor[:, None]
    weighted = weighted.astype(_operand_dtype(hidden, inputs.weight))
    slopes_in = slopes.astype(_operand_dtype(hidden, inputs.weight))
    return ChunkGrads(
        _dot(settings, slopes_in, inputs.weight, 1, 1) * factor[:, None],
        lambda total: _add_product(settings, total, weighted, slopes_in),
        factor @ slopes,
    )


def with_chunk(grads: Grads, i, chunk: ChunkGrads) -> Grads:
    """The gradients with those of chunk `i` put or added in."""
    return Grads(
        put_chunk(grads.hidden, i, chunk.hidden),
        chunk.add_weight(grads.weight),
        None if grads.bias is None else grads.bias + chunk.bias,
    )


def _add_product(settings, total, left, right):
    """`total + left.T @ right` for `[D, V]`, `[C, D]`, `[C, V]`.

    XLA's CPU backend forms the whole product before it adds; there, large totals are
    updated in place some rows at a time. Accelerators add inside the product.
    """
    depth = total.shape[0]
    wanted = -(-total.size * total.dtype.itemsize // TILE_BYTES)
    tiles = next((n for n in range(wanted, depth + 1) if depth % n == 0), 1)
    if jax.default_backend() != "cpu":
        return total + _dot(settings, left, right, 0, 0)
    # Rows by columns is the form its faster kernels know; `left` is the small one.
    left = lax.optimization_barrier(left.T)
    if tiles == 1:
        return total + _dot(settings, left, right, 1, 0)
    size = depth // tiles

    def body(j, total):
        part = lax.dynamic_slice_in_dim(left, j * size, size, axis=0)
        old = lax.dynamic_slice_in_dim(total, j * size, size, axis=0)
        new = old + _dot(settings, part, right, 1, 0)
        return lax.dynamic_update_slice_in_dim(total, new, j * size, axis=0)

    return lax.fori_loop(0, tiles, body, total)


def chunk_scores(settings, inputs, hidden):
    """`z` of one chunk, `[C, V]`."""
    raw = _dot(settings, hidden, inputs.weight, 1, 0)
    head = Head(inputs.weight, inputs.bias, settings.softcap, settings.scale)
    scores = shape_logits(raw, head)
    return scores if settings.temperature == 1.0 else scores / settings.temperature


def _operand_dtype(hidden, weight):
    """Products take bfloat16 only where both sides are; sums are wider."""
    if hidden.dtype == weight.dtype == jnp.bfloat16:
        return jnp.dtype(jnp.bfloat16)
    return compute_dtype(hidden, weight)


def _dot(settings, left, right, left_axis, right_axis):
    dtype = _operand_dtype(left, right)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((left_axis,), (right_axis,)), ((), ())),
        preferred_element_type=settings.dtype,
    )


def local_ids(settings, targets, vocab):
    """Ids within this device's part of the vocabulary, and whether they are in it."""
    if settings.vocab_axis is not None:
        start = lax.axis_index(settings.vocab_axis) * vocab
        targets = targets - start.astype(targets.dtype)
    return targets, (targets >= 0) & (targets < vocab)


def _chosen_scores(settings, scores, targets):
    """The scores, and each target's, `[C]`; NaN for ids outside the vocabulary."""
    local, owned = local_ids(settings, targets, scores.shape[1])
    index = jnp.where(owned, local, 0)[:, None]
    chosen = jnp.take_along_axis(scores, index, axis=1)[:, 0]
    # Read before the exponentials overwrite the scores, or both are kept.
    scores, chosen = lax.optimization_barrier((scores, chosen))
    chosen = over_vocab(settings, lax.psum, jnp.where(owned, chosen, 0))
    owners = over_vocab(settings, lax.psum, owned.astype(jnp.int32))
    return scores, jnp.where(owners == 1, chosen, jnp.nan)


def _subtract_at(settings, slopes, targets, amounts):
    """`slopes[c, targets[c]] -= amounts[c]` where this device owns the target."""
    count, vocab = slopes.shape
    local, owned = local_ids(settings, targets, vocab)
    index = jnp.where(owned, local, vocab)  # past the end: dropped
    amounts = jnp.broadcast_to(jnp.asarray(amounts, slopes.dtype), (count,))
    rows = jnp.arange(count, dtype=index.dtype)
    return slopes.at[rows, index].add(-amounts, mode="drop", unique_indices=True)


def _entropy(settings, chunk: Chunk):
    if not settings.with_entropy:
        return None
    scores, exps, norm = chunk.scores, chunk.exps, chunk.norm
    # A score of -inf has probability zero; 0 * -inf would be NaN.
    terms = jnp.where(exps > 0, exps * (scores - chunk.top[:, None]), 0)
    mean = over_vocab(settings, lax.psum, jnp.sum(terms, axis=1)) / norm
    return jnp.log(norm) - mean


def _top1(settings, chunk: Chunk, targets):
    """1.0 where the first of the highest scores, the greedy choice, is the target."""
    if not settings.with_top1:
        return None
    scores, top = chunk.scores, chunk.top
    # Asked so, and not by an argmax, no array of ids as large as the scores is made.
    local, _ = local_ids(settings, targets, scores.shape[1])
    ids = lax.broadcasted_iota(local.dtype, scores.shape, 1)
    earlier = jnp.any((scores == top[:, None]) & (ids < local[:, None]), axis=1)
    earlier = over_vocab(settings, lax.pmax, earlier.astype(settings.dtype))
    return jnp.where(chunk.chosen == top, 1 - earlier, 0)


def over_vocab(settings, reduce, x):
    """`reduce` over the parts of the vocabulary; `x` itself if it is whole."""
    return x if settings.vocab_axis is None else reduce(x, settings.vocab_axis)


def take_chunk(x, i, columns):
    """Chunk `i` of `[A, S, ...]`, flattened: `[A * columns, ...]`."""
    part = lax.dynamic_slice_in_dim(x, i * columns, columns, axis=1)
    return part.reshape(-1, *x.shape[2:])


def put_chunk(buffer, i, part):
    """Write chunk `i` back."""
    rows = buffer.shape[0]
    part = part.reshape(rows, -1, *buffer.shape[2:])
    start = i * part.shape[1]
    return lax.dynamic_update_slice_in_dim(
        buffer, part.astype(buffer.dtype), start, axis=1
    )


def all_varying_axes(inputs):
    """Axes of an enclosing `shard_map` over which the inputs differ."""
    return frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(inputs)))


def vary_together(inputs: Inputs, axes: frozenset[str] = frozenset()) -> Inputs:
    """Let each differentiated input vary over all axes that any input varies over, and
    over `axes`.

    Under a checked `shard_map`, JAX then sums each gradient over the axes that its
    input lacked.
    """
    axes = axes | all_varying_axes(inputs)
    if not axes:
        return inputs
    return inputs._replace(
        hidden=vary_over(inputs.hidden, axes),
        weight=vary_over(inputs.weight, axes),
        bias=None if inputs.bias is None else vary_over(inputs.bias, axes),
    )


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` differs inside a checked `shard_map`; else none."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # the name before jax 0.10.2
        return frozenset(kind.vma)
    return frozenset(kind.manual_axis_type.varying)


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark `x` as differing over `axes` too; the transpose sums over them."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros_over(shape, dtype, axes):
    """Zeros that may differ over `axes`, as the carry of a loop under `shard_map`."""
    return vary_over(jnp.zeros(shape, dtype), axes)
