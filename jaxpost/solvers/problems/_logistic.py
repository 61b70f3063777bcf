"""Logistic regression under random linear constraints on a sphere; rows over a mesh."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import parallel
from jaxpost.solvers.problems._problem import Problem, need_float64

ROWS = ("features", "labels", "weights")
"""Fields of the data whose first axis is the rows."""


class InfeasibleError(ValueError):
    """No point satisfies the constraints that were drawn."""


class LogisticData(NamedTuple):
    """What the problem depends on.

    Fields:
        features: float64 `[N, D]`.
        labels: 1 or -1, float64 `[N]`.
        weights: of the rows, float64 `[N]`; zero for rows that only fill up a mesh.
        matrix: of the linear constraints, float64 `[R, D]`.
        offsets: their right-hand sides, float64 `[R]`.
    """

    features: jax.Array
    labels: jax.Array
    weights: jax.Array
    matrix: jax.Array
    offsets: jax.Array


def constrained_logistic(
    features: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    key: jax.Array,
    num_linear: int = 10,
    name: str = "logistic",
) -> Problem:
    """Mean logistic loss subject to `A w = b` and `||w||^2 = 1`.

    `A` and `b` are drawn from the standard normal distribution; `w` and the multipliers
    start at one. No regulariser and no intercept. Such a `w` exists if and only if
    `b^T (A A^T)^-1 b`, the squared distance of `{A w = b}` from the origin, is at most
    one; it is checked, and is `facts["feasibility"]` of the problem.

    Args:
        features: `[N, D]`.
        labels: 1 or -1, `[N]`; others are taken as they are.
        key: of `A` and `b`.
        num_linear: rows of `A`.
        name: of the problem.

    Raises:
        RuntimeError: JAX's 64-bit mode is off.
        ValueError: `num_linear` is not in [1, D).
        InfeasibleError: the constraints contradict each other; a ValueError too.
        AssertionError: shapes do not fit.

    Source: arXiv 2305.18379, Section 5, constrained logistic regression.
    """
    need_float64("constrained_logistic")
    chex.assert_rank([features, labels], [2, 1])
    chex.assert_equal_shape_prefix([features, labels], 1)
    rows, width = features.shape
    if not 1 <= num_linear < width:
        raise ValueError(
            f"{name}: num_linear must be at least 1 and below the {width} features, "
            f"got {num_linear}; draw fewer constraints, or take data with more."
        )
    key_matrix, key_offsets = jax.random.split(key)
    matrix = jax.random.normal(key_matrix, (num_linear, width), jnp.float64)
    offsets = jax.random.normal(key_offsets, (num_linear,), jnp.float64)
    distance = float(offsets @ jnp.linalg.solve(matrix @ matrix.T, offsets))
    if not distance <= 1.0:
        raise InfeasibleError(
            f"{name}: the drawn constraints contradict each other: b^T (A A^T)^-1 b is "
            f"{distance:.4f}, but a w of length one needs at most 1; take another key."
        )
    return Problem(
        name=name,
        objective=logistic_objective,
        constraint=logistic_constraint,
        x0=jnp.ones(width, jnp.float64),
        multipliers=jnp.ones(num_linear + 1, jnp.float64),
        args=LogisticData(
            features=jnp.asarray(features, jnp.float64),
            labels=jnp.asarray(labels, jnp.float64),
            weights=jnp.ones(rows, jnp.float64),
            matrix=matrix,
            offsets=offsets,
        ),
        facts={"rows": rows, "feasibility": distance},
    )


def logistic_objective(w: jax.Array, data: LogisticData) -> jax.Array:
    """Weighted mean of `log(1 + exp(-y x^T w))`, a scalar; never overflows."""
    margins = data.labels * (data.features @ w)
    return data.weights @ jax.nn.softplus(-margins) / jnp.sum(data.weights)


def logistic_constraint(w: jax.Array, data: LogisticData) -> jax.Array:
    """`A w - b` and `||w||^2 - 1`, `[R + 1]`."""
    sphere = jnp.sum(jnp.square(w), keepdims=True) - 1.0
    return jnp.concatenate([data.matrix @ w - data.offsets, sphere])


def shard_rows(data: LogisticData, mesh: jax.sharding.Mesh) -> LogisticData:
    """The same data with its rows split over a mesh, the constraints on every device.

    Rows of weight zero fill up to a multiple of the mesh, so every function of the data
    keeps its value.

    Args:
        data: of a problem.
        mesh: from `parallel.make_mesh`; rows go over the axes of "batch".
    """
    over = parallel.batch_sharding(mesh)
    everywhere = parallel.shardings((None,), mesh)
    parts = mesh.size // over.shard_shape((mesh.size,))[0]
    missing = -len(data.labels) % parts

    def fill(rows: jax.Array) -> np.ndarray:
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))

    rows = {name: fill(getattr(data, name)) for name in ROWS}
    placed = data._asdict() | rows
    places = {name: over if name in ROWS else everywhere for name in placed}
    return LogisticData(**parallel.place(placed, places))
