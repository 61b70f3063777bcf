"""Training on pieces of a graph that does not fit: clusters of equal size, on the host.

Nodes are put in an order in which neighbours are near each other, and cut into runs
of equal length from a random place on; a batch is a few of these runs and all edges
between their nodes. So all batches have the same number of nodes, none of them padded.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import jraph
import numpy as np

from jaxpost.graphs._container import (
    SparseFeatures,
    edge_weights,
    edges_of,
    features_of,
)


def cluster_order(graph: jraph.GraphsTuple, *, rng: np.random.Generator) -> np.ndarray:
    """Nodes in the order of a breadth-first search, int32 `[N]`.

    Args:
        graph: in the host's memory; directions of edges are ignored.
        rng: draws where the search begins, in each connected part.
    """
    senders, receivers = (np.asarray(x) for x in edges_of(graph))
    nodes = features_of(graph).shape[0]
    sources = np.concatenate([senders, receivers])
    targets = np.concatenate([receivers, senders])
    targets = targets[np.argsort(sources, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(sources, minlength=nodes))])
    seen = np.zeros(nodes, bool)
    order = []
    for root in rng.permutation(nodes):
        if seen[root]:
            continue
        frontier = np.asarray([root])
        seen[root] = True
        while frontier.size:
            order.append(frontier)
            counts = starts[frontier + 1] - starts[frontier]
            offsets = np.arange(counts.sum()) - np.repeat(
                np.cumsum(counts) - counts, counts
            )
            found = targets[np.repeat(starts[frontier], counts) + offsets]
            frontier = np.unique(found[~seen[found]])
            seen[frontier] = True
    return np.concatenate(order).astype(np.int32)


def cluster_batches(
    graph: jraph.GraphsTuple,
    order: np.ndarray,
    *,
    cluster_nodes: int,
    clusters: int,
    edges: int,
    rng: np.random.Generator,
) -> Iterator[jraph.GraphsTuple]:
    """One epoch of subgraphs, all of the same shapes.

    Each node is in one batch at most; fewer than `cluster_nodes * clusters` are left
    out, others in each epoch. Edges between batches are left out too.

    Args:
        graph: in the host's memory, features dense.
        order: from `cluster_order`.
        cluster_nodes: nodes of a cluster.
        clusters: how many of them, at random, make a batch.
        edges: rows for edges in each batch; those not needed have weight 0.
        rng: draws the first node and the clusters of each batch.

    Yields:
        Subgraphs with features in order of the original node numbers, and edges sorted
        by receiver; `globals` is those numbers, int32 `[1, nodes]`.

    Raises:
        ValueError: the features are sparse, a batch has more nodes than the graph, or
            more edges than `edges`.

    Source: Chiang et al. (2019), "Cluster-GCN", arXiv 1905.07953, section 3.2
    (several clusters in a batch, with the edges between them).
    """
    features = features_of(graph)
    if isinstance(features, SparseFeatures):
        raise ValueError(
            "cluster_batches needs dense features: use features.todense()."
        )
    features = np.asarray(features)
    count, size = len(features), cluster_nodes * clusters
    if not 2 <= size <= count:
        raise ValueError(
            f"cluster_nodes * clusters = {size} must lie between 2 and the graph's "
            f"{count} nodes."
        )
    whole = tuple(np.asarray(x) for x in (*edges_of(graph), edge_weights(graph)))
    turned = np.roll(order, -int(rng.integers(count)))
    runs = turned[: count - count % cluster_nodes].reshape(-1, cluster_nodes)
    runs = runs[rng.permutation(len(runs))]
    for first in range(0, len(runs) - clusters + 1, clusters):
        nodes = np.sort(runs[first : first + clusters], axis=None)
        yield _induced(features, whole, nodes, edges)


def _induced(
    features: np.ndarray,
    whole: tuple[np.ndarray, ...],
    nodes: np.ndarray,
    edges: int,
) -> jraph.GraphsTuple:
    """The subgraph of `nodes`, renumbered, its edges padded to `edges` rows."""
    senders, receivers, weights = whole
    number = np.full(len(features), -1, np.int32)
    number[nodes] = np.arange(len(nodes), dtype=np.int32)
    inside = (number[senders] >= 0) & (number[receivers] >= 0)
    senders, receivers = number[senders[inside]], number[receivers[inside]]
    if len(senders) > edges:
        raise ValueError(
            f"a batch of {len(nodes)} nodes has {len(senders)} edges, more than "
            f"edges={edges}: raise edges or take fewer nodes."
        )
    order = np.lexsort((senders, receivers))
    missing = edges - len(order)
    last = len(nodes) - 1  # padding keeps receivers sorted; its weight is 0

    def pad(x: np.ndarray, fill: float) -> jnp.ndarray:
        return jnp.asarray(np.pad(x[order], (0, missing), constant_values=fill))

    return jraph.GraphsTuple(
        nodes=jnp.asarray(features[nodes]),
        edges=pad(weights[inside], 0.0),
        senders=pad(senders, last),
        receivers=pad(receivers, last),
        globals=jnp.asarray(nodes, jnp.int32)[None, :],
        n_node=jnp.asarray([len(nodes)], jnp.int32),
        n_edge=jnp.asarray([edges], jnp.int32),
    )
