"""Products with sparse matrices: where the nonzeros are, sorted for both directions.

A pattern is made once per graph. The values come with every product, so that masking
an edge or a feature is a zero among them and every shape stays as it is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.core import Tracer

from jaxpost.graphs._container import (
    SparseFeatures,
    count_nodes,
    edges_of,
    features_of,
)

EDGE_CHUNK = 2**17
"""Edges whose messages are held at once by `implementation="segment"`."""
DENSE_BYTES = 64 * 2**20
"""Largest adjacency that an accelerator holds as a dense matrix unasked."""


class Pattern(NamedTuple):
    """Places of `Z` values in a matrix `[R, C]`, in compressed rows and columns.

    Fields:
        rows, columns: of each value in the order of the rows, int32 `[Z]`.
        indptr: where each row begins among them, and the end, int32 `[R + 1]`.
        order: from the values as given to the order of the rows, int32 `[Z]`; None if
            they are given in it.
        t_rows, t_columns, t_indptr, t_order: the same for the transposed matrix;
            `t_order` is from the order of the rows to that of the columns.
    """

    rows: jax.Array
    columns: jax.Array
    indptr: jax.Array
    order: jax.Array | None
    t_rows: jax.Array
    t_columns: jax.Array
    t_indptr: jax.Array
    t_order: jax.Array

    def sort(self, values: jax.Array) -> jax.Array:
        """Values as given, to the order of the rows."""
        return values if self.order is None else values[self.order]

    def transpose(self, values: jax.Array) -> "tuple[Pattern, jax.Array]":
        """The transposed matrix's pattern, and sorted values in its order.

        Its `t_order` leads back to the order of the rows, for second derivatives; a
        program that takes none drops its computation.
        """
        order = self.t_order
        places = jnp.arange(order.size, dtype=order.dtype)
        inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
        flipped = Pattern(
            self.t_rows,
            self.t_columns,
            self.t_indptr,
            None,
            self.rows,
            self.columns,
            self.indptr,
            inverse,
        )
        return flipped, values[order]


def make_pattern(rows: Any, columns: Any, shape: tuple[int, int]) -> Pattern:
    """Sort places by row and by column; on the host where they are concrete."""
    concrete = not any(isinstance(x, Tracer) for x in (rows, columns))
    xp: Any = np if concrete else jnp
    rows, columns = xp.asarray(rows), xp.asarray(columns)
    order = None
    if not concrete or (np.diff(rows) < 0).any():
        order = xp.argsort(rows, stable=True).astype(xp.int32)
        rows, columns = rows[order], columns[order]
    t_order = xp.argsort(columns, stable=True).astype(xp.int32)
    bounds = [
        xp.searchsorted(sorted_ids, xp.arange(size + 1, dtype=xp.int32))
        for sorted_ids, size in ((rows, shape[0]), (columns[t_order], shape[1]))
    ]
    pattern = Pattern(
        rows,
        columns,
        bounds[0],
        order,
        columns[t_order],
        rows[t_order],
        bounds[1],
        t_order,
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), pattern)


class GraphPlan(NamedTuple):
    """What is sorted once per graph and used in every step.

    Fields:
        edges: receivers as rows, senders as columns, `[N, N]`.
        features: those of sparse node features, `[N, F]`; None if they are dense.
        pairs: the number of each edge's undirected edge, int32 `[E]`, or None.
    """

    edges: Pattern
    features: Pattern | None
    pairs: jax.Array | None = None


def plan_graph(graph: jraph.GraphsTuple, *, pairs: bool = False) -> GraphPlan:
    """Sort a graph's edges and features for products in both directions.

    Args:
        graph: features dense or sparse.
        pairs: whether to number undirected edges, for `drop="symmetric"`.

    Returns:
        The plan; computed on the host for concrete arrays, in the program otherwise.
    """
    nodes = count_nodes(graph)
    senders, receivers = edges_of(graph)
    edges = make_pattern(receivers, senders, (nodes, nodes))
    features, x = None, features_of(graph)
    if isinstance(x, SparseFeatures):
        features = make_pattern(x.rows, x.columns, x.shape)
    return GraphPlan(edges, features, edge_pairs(graph) if pairs else None)


def edge_pairs(graph: jraph.GraphsTuple) -> jax.Array:
    """A number for each edge that its reverse shares, int32 `[E]`, below E."""
    senders, receivers = edges_of(graph)
    low, high = jnp.minimum(senders, receivers), jnp.maximum(senders, receivers)
    order = jnp.lexsort((high, low))
    low, high = low[order], high[order]
    new = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    number = jnp.cumsum(jnp.pad(new, (1, 0)).astype(jnp.int32))
    return jnp.zeros_like(number).at[order].set(number)


def choose_implementation(rows: int, columns: int, dtype: Any) -> str:
    """ "csr" on a CPU, "dense" for small matrices elsewhere, else "segment"."""
    wide = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))
    if jax.default_backend() == "cpu":
        return "csr" if wide else "segment"
    small = rows * columns * jnp.dtype(dtype).itemsize <= DENSE_BYTES
    return "dense" if small else "segment"


def sparse_matmul(
    pattern: Pattern,
    values: jax.Array,
    x: jax.Array,
    *,
    implementation: str | None = None,
    edge_chunk: int = EDGE_CHUNK,
) -> jax.Array:
    """`M @ x` for the sparse matrix `M` of these values; differentiable in `x` alone.

    Args:
        pattern: of `M`, `[R, C]`.
        values: in the order of the pattern's rows (`pattern.sort`), float `[Z]`.
        x: float `[C, D]`.
        implementation: "csr", JAX's product of compressed sparse rows, which no device
            but a CPU has a kernel for; "segment", sorted segment sums over chunks of
            edges; "dense", `M` as a dense matrix; None chooses by device and size.
        edge_chunk: values whose messages "segment" holds at once.

    Returns:
        `[R, D]`, dtype of `x`.
    """
    if implementation is None:
        rows, columns = (len(p) - 1 for p in (pattern.indptr, pattern.t_indptr))
        implementation = choose_implementation(rows, columns, x.dtype)
    product = _IMPLEMENTATIONS.get(implementation)
    if product is None:
        raise ValueError(
            f"aggregation must be one of {', '.join(_IMPLEMENTATIONS)} or None, got "
            f"{implementation!r}."
        )
    return _matmul(implementation, edge_chunk, pattern, values, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation, edge_chunk, pattern, values, x):
    product = _IMPLEMENTATIONS[implementation]
    return product(pattern, values.astype(x.dtype), x, edge_chunk)


def _matmul_forward(implementation, edge_chunk, pattern, values, x):
    result = _matmul(implementation, edge_chunk, pattern, values, x)
    return result, (pattern, values)


def _matmul_backward(implementation, edge_chunk, residuals, cotangent):
    pattern, values = residuals
    transposed, flipped = pattern.transpose(values)
    grad = _matmul(implementation, edge_chunk, transposed, flipped, cotangent)
    return None, None, grad


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _csr(pattern: Pattern, values: jax.Array, x: jax.Array, _: int) -> jax.Array:
    from jax.experimental import sparse

    @jax.custom_batching.sequential_vmap  # a batch has no kernel
    def product(values, columns, indptr, x):
        matrix = sparse.BCSR(
            (values, columns, indptr),
            shape=(len(pattern.indptr) - 1, x.shape[0]),
            indices_sorted=True,
        )
        return matrix @ x

    return product(values, pattern.columns, pattern.indptr, x)


def _segment(
    pattern: Pattern, values: jax.Array, x: jax.Array, edge_chunk: int
) -> jax.Array:
    rows = len(pattern.indptr) - 1
    count = len(values)
    if count <= edge_chunk:
        messages = values[:, None] * x[pattern.columns]
        return jax.ops.segment_sum(
            messages, pattern.rows, rows, indices_are_sorted=True
        )
    chunks = -(-count // edge_chunk)
    missing = chunks * edge_chunk - count

    def arrange(a, fill):
        return jnp.pad(a, (0, missing), constant_values=fill).reshape(chunks, -1)

    def add(total, chunk):
        values, places, sources = chunk
        messages = values[:, None] * x[sources]
        return total.at[places].add(messages, indices_are_sorted=True), None

    start = jnp.zeros((rows, x.shape[1]), x.dtype)
    inputs = (
        arrange(values, 0),
        arrange(pattern.rows, max(rows - 1, 0)),
        arrange(pattern.columns, 0),
    )
    return jax.lax.scan(add, start, inputs)[0]


def _dense(pattern: Pattern, values: jax.Array, x: jax.Array, _: int) -> jax.Array:
    shape = (len(pattern.indptr) - 1, x.shape[0])
    matrix = jnp.zeros(shape, x.dtype).at[pattern.rows, pattern.columns].add(values)
    return jnp.dot(matrix, x, precision=jax.lax.Precision.HIGHEST)


_IMPLEMENTATIONS = {"csr": _csr, "segment": _segment, "dense": _dense}
