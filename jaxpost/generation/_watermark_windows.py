"""A watermark in a part of a document: z over windows, and the window that shows most.

Windows are runs of scored tokens, so positions without a choice do not dilute them.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._watermark_detect import (
    TokenMarks,
    binomial_tails,
    z_scores,
)

SMALLEST_WINDOW = 16


class Window(NamedTuple):
    """The run of scored tokens with the least probability by chance.

    Fields:
        start, end: first token of the run, and the one after its last, as columns of
            the document.
        scored: scored tokens in it.
        green: green ones among them.
        z: as in `Detection`.
        p: probability that chance makes any of the windows looked at stand out so far:
            the binomial tail of this one times their number, at most 1.
        windows: how many were looked at.
    """

    start: int
    end: int
    scored: int
    green: int
    z: float
    p: float
    windows: int


def best_windows(
    marks: TokenMarks, *, gamma: float, sizes: Sequence[int] | None = None
) -> list[Window | None]:
    """The most conspicuous window of each document.

    Args:
        marks: of documents, bool `[B, T]` each, from `mark_tokens`.
        gamma: fraction of ids that are green.
        sizes: scored tokens of the windows to look at; None takes 16, 23, 32, 45, ...
            (powers of the square root of 2) as far as a document goes.

    Returns:
        One window per document, None where it has fewer scored tokens than the
        smallest size.

    Raises:
        ValueError: a size is less than 1.

    Source: Kirchenbauer et al. (2024), "On the Reliability of Watermarks for Large
    Language Models", section 4 (WinMax), with windows of some sizes instead of all and
    a bound for the number of looks instead of none.
    """
    scored, green = np.asarray(marks.scored), np.asarray(marks.green)
    chosen = tuple(sizes) if sizes is not None else window_sizes(scored.shape[1])
    if not all(size >= 1 for size in chosen):
        raise ValueError(f"window sizes must be at least 1, got {list(chosen)}.")
    if not chosen:
        return [None] * len(scored)
    most, ends = jax.device_get(_most_green(scored, green, sizes=chosen))
    totals = scored.sum(axis=1)
    return [
        _best(scored[row], int(totals[row]), most[row], ends[row], chosen, gamma)
        for row in range(len(scored))
    ]


def window_sizes(length: int) -> tuple[int, ...]:
    """Sizes in steps of the square root of 2, from 16 to `length`."""
    count = max(0, math.floor(2 * math.log2(max(length, 1) / SMALLEST_WINDOW)) + 1)
    return tuple(round(SMALLEST_WINDOW * 2 ** (step / 2)) for step in range(count))


def sliding_z(marks: TokenMarks, *, gamma: float, size: int) -> np.ndarray:
    """z of the last `size` scored tokens up to each token, float64 `[B, T]`.

    Args:
        marks: of documents, bool `[B, T]` each.
        gamma: fraction of ids that are green.
        size: scored tokens per window, at least 1.

    Returns:
        NaN where fewer than `size` tokens were scored so far.

    Raises:
        ValueError: `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    scored = np.asarray(marks.scored)
    green = scored & np.asarray(marks.green)
    so_far = scored.cumsum(axis=1)
    out = np.full(scored.shape, np.nan)
    for row in range(len(scored)):
        hits = np.concatenate([[0], green[row][scored[row]].cumsum()])
        enough = so_far[row] >= size
        last = so_far[row][enough]
        out[row][enough] = z_scores(hits[last] - hits[last - size], size, gamma=gamma)
    return out


@functools.partial(jax.jit, static_argnames=("sizes",))
def _most_green(
    scored: jax.Array, green: jax.Array, *, sizes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Most green tokens in a window of each size, and where the first such ends.

    Returns:
        int32 `[B, len(sizes)]` each; -1 where no window of a size fits. Ends count
        scored tokens.
    """
    length = scored.shape[1]
    # Scored tokens in front, in their order; what comes behind counts nothing.
    order = jnp.argsort(~scored, axis=1, stable=True)
    hits = jnp.take_along_axis(scored & green, order, axis=1).astype(jnp.int32)
    sums = jnp.pad(jnp.cumsum(hits, axis=1), ((0, 0), (1, 0)))
    total = jnp.sum(scored, axis=1, dtype=jnp.int32)[:, None]
    most, ends = [], []
    for size in sizes:
        if size > length:
            most.append(jnp.full(scored.shape[:1], -1, jnp.int32))
            ends.append(jnp.zeros(scored.shape[:1], jnp.int32))
            continue
        inside = sums[:, size:] - sums[:, :-size]
        stops = jnp.arange(size, length + 1, dtype=jnp.int32)[None]
        inside = jnp.where(stops <= total, inside, -1)
        place = jnp.argmax(inside, axis=1)
        most.append(jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0])
        ends.append(place.astype(jnp.int32) + size)
    return jnp.stack(most, axis=1), jnp.stack(ends, axis=1)


def _best(
    scored: np.ndarray,
    total: int,
    most: np.ndarray,
    ends: np.ndarray,
    sizes: Sequence[int],
    gamma: float,
) -> Window | None:
    widths = np.asarray(sizes)
    fits = widths <= total
    if not fits.any():
        return None
    looks = int((total - widths[fits] + 1).sum())
    tails: Any = np.where(
        fits, binomial_tails(np.maximum(most, 0), widths, gamma=gamma), 2.0
    )
    best = int(np.argmin(tails))
    size, green, end = int(widths[best]), int(most[best]), int(ends[best])
    columns = np.flatnonzero(scored)[end - size : end]
    return Window(
        start=int(columns[0]),
        end=int(columns[-1]) + 1,
        scored=size,
        green=green,
        z=float(z_scores(green, size, gamma=gamma)),
        p=float(min(1.0, tails[best] * looks)),
        windows=looks,
    )
