"""Do embeddings fall into the classes by themselves: k-means, NMI, adjusted Rand index.

K-means runs in JAX, the indices in NumPy float64.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


class KMeans(NamedTuple):
    """What `kmeans` found.

    Fields:
        clusters: int32 `[N]`.
        centres: `[K, D]`.
        inertia: sum of squared distances to the nearest centre, scalar.
    """

    clusters: jax.Array
    centres: jax.Array
    inertia: jax.Array


@functools.partial(jax.jit, static_argnames=("count", "restarts", "steps"))
def kmeans(
    embeddings: jax.Array,
    *,
    count: int,
    restarts: int = 10,
    steps: int = 100,
    key: jax.Array,
) -> KMeans:
    """Lloyd's algorithm from k-means++ starts, the restart with the least inertia.

    Args:
        embeddings: float `[N, D]`.
        count: clusters K; a cluster that loses all its points keeps its centre.
        restarts: starts.
        steps: of Lloyd's algorithm at most; stops once no centre moves.
        key: of the starts.

    Raises:
        ValueError: `count` is below 1 or above N.
        AssertionError: embeddings are not a matrix.

    Source: Arthur & Vassilvitskii (2007), "k-means++".
    """
    chex.assert_rank(embeddings, 2)
    if not 1 <= count <= embeddings.shape[0]:
        raise ValueError(
            f"count must lie in 1..{embeddings.shape[0]} (the nodes), got {count}."
        )
    points = embeddings.astype(jnp.promote_types(embeddings.dtype, jnp.float32))
    run = functools.partial(_kmeans_once, points, count, steps)
    # One after the other: distances of one restart only are held at a time.
    found = jax.lax.map(run, jax.random.split(key, restarts))
    best = jnp.argmin(found.inertia)
    return jax.tree.map(lambda x: x[best], found)


def _kmeans_once(points: jax.Array, count: int, steps: int, key: jax.Array) -> KMeans:
    norms = jnp.sum(points**2, axis=1)

    def distances(centres):
        products = points @ centres.T
        squares = norms[:, None] - 2.0 * products + jnp.sum(centres**2, axis=1)[None]
        return jnp.maximum(squares, 0.0)

    def move(carry):
        centres, number, _ = carry
        clusters = jnp.argmin(distances(centres), axis=1)
        members = jax.nn.one_hot(clusters, count, dtype=points.dtype)
        sizes = jnp.sum(members, axis=0)[:, None]
        sums = members.T @ points
        moved = jnp.where(sizes > 0.0, sums / jnp.maximum(sizes, 1.0), centres)
        return moved, number + 1, jnp.any(moved != centres)

    start = _spread_start(points, count, distances, key)
    carry = (start, jnp.int32(0), jnp.bool_(True))
    centres, _, _ = jax.lax.while_loop(lambda c: c[2] & (c[1] < steps), move, carry)
    last = distances(centres)
    clusters = jnp.argmin(last, axis=1).astype(jnp.int32)
    return KMeans(clusters, centres, jnp.sum(jnp.min(last, axis=1)))


def _spread_start(points, count, distances, key):
    """k-means++: each next centre is a point drawn by its squared distance."""
    keys = jax.random.split(key, count)
    first = jax.random.randint(keys[0], (), 0, points.shape[0])
    centres = jnp.broadcast_to(points[first], (count, points.shape[1]))

    def draw(number, centres):
        # Centres not drawn yet repeat the first, so they change no minimum.
        nearest = jnp.min(distances(centres), axis=1)
        # log 0 is -inf: a point that is a centre is not drawn again.
        chosen = jax.random.categorical(
            keys[number], jnp.where(jnp.sum(nearest) > 0.0, jnp.log(nearest), 0.0)
        )
        return centres.at[number].set(points[chosen])

    return jax.lax.fori_loop(1, count, draw, centres)


def normalized_mutual_information(first: ArrayLike, second: ArrayLike) -> float:
    """Mutual information of two partitions over the mean of their entropies, in [0, 1].

    1 where both put everything into one cluster.

    Args:
        first, second: integers from 0, `[N]`; names of clusters do not matter.

    Raises:
        ValueError: the partitions are empty, or differ in length.
    """
    table = _contingency(first, second)
    joint = table / table.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    positive = joint > 0.0
    ratio = joint[positive] / np.outer(rows, columns)[positive]
    information = float(np.sum(joint[positive] * np.log(ratio)))
    entropies = _entropy(rows) + _entropy(columns)
    if entropies == 0.0:
        return 1.0
    return float(np.clip(2.0 * information / entropies, 0.0, 1.0))


def adjusted_rand_index(first: ArrayLike, second: ArrayLike) -> float:
    """Agreement of two partitions about pairs of points; 0 by chance, at most 1.

    Args:
        first, second: integers from 0, `[N]`; names of clusters do not matter.

    Raises:
        ValueError: the partitions are empty, or differ in length.

    Source: Hubert & Arabie (1985), "Comparing partitions", equation 5.
    """
    table = _contingency(first, second)
    together = float(np.sum(table * (table - 1.0)) / 2.0)
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    of_first = float(np.sum(rows * (rows - 1.0)) / 2.0)
    of_second = float(np.sum(columns * (columns - 1.0)) / 2.0)
    pairs = table.sum() * (table.sum() - 1.0) / 2.0
    expected = of_first * of_second / pairs if pairs else 0.0
    largest = (of_first + of_second) / 2.0
    if largest == expected:  # one cluster each, or only single points
        return 1.0
    return (together - expected) / (largest - expected)


def _contingency(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            "partitions must be two lists of equal length with at least one entry, "
            f"got shapes {list(first.shape)} and {list(second.shape)}."
        )
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.float64)
    np.add.at(table, (rows, columns), 1.0)
    return table


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0.0]
    return float(-np.sum(shares * np.log(shares)))
