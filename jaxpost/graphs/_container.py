"""The graph container's rules, and node features that stay sparse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseFeatures:
    """A matrix of node features, its nonzero values only, row after row.

    Fields:
        values: float `[Z]`.
        rows: the node of each value, int32 `[Z]`, never decreasing.
        columns: the feature of each value, int32 `[Z]`.
        shape: `(N, F)`; static.
    """

    values: jax.Array
    rows: jax.Array
    columns: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def todense(self) -> jax.Array:
        """The whole matrix, `[N, F]`; values at the same place add up."""
        dense = jnp.zeros(self.shape, self.values.dtype)
        return dense.at[self.rows, self.columns].add(self.values)


Features = jax.Array | SparseFeatures


def sparse_features(
    values: Any, columns: Any, indptr: Any, shape: tuple[int, int]
) -> SparseFeatures:
    """From compressed sparse rows, as SciPy's `csr_matrix` and `.npz` files have them.

    Args:
        values: float `[Z]`.
        columns: int `[Z]`.
        indptr: where each row begins, and the end, int `[N + 1]`.
        shape: `(N, F)`.

    Raises:
        ValueError: the arrays do not describe a matrix of that shape.
    """
    values, columns, indptr = (np.asarray(x) for x in (values, columns, indptr))
    nodes, width = int(shape[0]), int(shape[1])
    counts = np.diff(indptr)
    if indptr.shape != (nodes + 1,) or indptr[0] != 0 or (counts < 0).any():
        raise ValueError(
            f"sparse_features: indptr must be {nodes + 1} numbers from 0 that never "
            f"decrease, got shape {indptr.shape}."
        )
    if values.shape != (indptr[-1],) or columns.shape != (indptr[-1],):
        raise ValueError(
            f"sparse_features: indptr ends at {indptr[-1]}, but there are "
            f"{values.shape} values and {columns.shape} columns."
        )
    if columns.size and not 0 <= columns.min() <= columns.max() < width:
        raise ValueError(
            f"sparse_features: columns must lie in [0, {width}), got "
            f"{columns.min()} to {columns.max()}."
        )
    rows = np.repeat(np.arange(nodes, dtype=np.int32), counts)
    return SparseFeatures(
        jnp.asarray(values),
        jnp.asarray(rows),
        jnp.asarray(columns, jnp.int32),
        (nodes, width),
    )


def make_graph(features: Features | np.ndarray, edge_index: Any) -> jraph.GraphsTuple:
    """One graph from features and a list of directed edges.

    Args:
        features: float `[N, F]`, or `SparseFeatures`.
        edge_index: senders and receivers, int `[2, E]`; an undirected edge is listed
            in both directions. No self-loops: encoders add their own.

    Returns:
        `GraphsTuple` with edges sorted by receiver, then sender; `edges` is None, which
        reads as weight 1 for each.

    Raises:
        ValueError: the list is not `[2, E]` of integers, or names a node that the
            features do not have.
    """
    nodes: Any = features
    if not isinstance(features, SparseFeatures):
        nodes = jnp.asarray(features)
    edges = np.asarray(edge_index)
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {edges.shape}.")
    if not np.issubdtype(edges.dtype, np.integer):
        raise ValueError(f"edge_index must hold integers, got dtype {edges.dtype}.")
    count = features.shape[0]
    if edges.size and not 0 <= edges.min() <= edges.max() < count:
        raise ValueError(
            f"edge_index must lie in [0, {count}), got {edges.min()} to {edges.max()}."
        )
    order = np.lexsort((edges[0], edges[1]))
    senders, receivers = edges[:, order].astype(np.int32)
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=None,
        senders=jnp.asarray(senders),
        receivers=jnp.asarray(receivers),
        globals=None,
        n_node=jnp.asarray([count], jnp.int32),
        n_edge=jnp.asarray([edges.shape[1]], jnp.int32),
    )


def features_of(graph: jraph.GraphsTuple) -> Features:
    """The node features, `[N, F]`.

    Raises:
        ValueError: `nodes` is neither a matrix nor `SparseFeatures`.
    """
    nodes: Any = graph.nodes
    if len(getattr(nodes, "shape", ())) != 2:
        raise ValueError(
            "graph.nodes must be features [N, F], dense or SparseFeatures, got "
            f"{jax.tree.map(jnp.shape, nodes)}."
        )
    return nodes


def edges_of(graph: jraph.GraphsTuple) -> tuple[jax.Array, jax.Array]:
    """Senders and receivers, int32 `[E]` each."""
    if graph.senders is None or graph.receivers is None:
        none = jnp.zeros((0,), jnp.int32)
        return none, none
    return graph.senders, graph.receivers


def count_nodes(graph: jraph.GraphsTuple) -> int:
    """N, from the features, so that it is static."""
    return features_of(graph).shape[0]


def edge_weights(graph: jraph.GraphsTuple, dtype: Any = jnp.float32) -> jax.Array:
    """The weight of each edge, `[E]`; `edges=None` is one for each.

    Raises:
        ValueError: `edges` is neither None nor one number per edge.
    """
    shape = edges_of(graph)[0].shape
    weights: Any = graph.edges
    if weights is None:
        return jnp.ones(shape, dtype)
    if getattr(weights, "shape", None) != shape:
        raise ValueError(
            f"graph.edges must be None or weights of shape {shape}, got "
            f"{jax.tree.map(jnp.shape, weights)}."
        )
    return jnp.asarray(weights, dtype)
