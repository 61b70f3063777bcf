"""One graph over several devices: nodes and edges split, neighbours fetched by XLA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jraph
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpost import parallel
from jaxpost.graphs._container import (
    SparseFeatures,
    edge_weights,
    edges_of,
    features_of,
)
from jaxpost.graphs._patterns import GraphPlan, Pattern


def place_graph(graph: jraph.GraphsTuple, mesh: Mesh) -> jraph.GraphsTuple:
    """Split a graph over the mesh axis "data".

    Programs compiled on the result compute what one device does: each device sums the
    messages of its edges, and the compiler exchanges rows of nodes where an edge joins
    two parts. Encoders need `aggregation="segment"` (with `edge_chunk` no less than the
    edges) and objectives `implementation="dense"`: a loop over chunks would fetch all
    of a split axis at every step.

    Args:
        graph: one graph; sorted edges (`make_graph`) keep a receiver's edges together.
        mesh: from `parallel.make_mesh`.

    Returns:
        The graph with node features split by node, or, if they are sparse, by value;
        edges split by position. Edges and sparse values are padded with weight 0 to a
        multiple of the devices; nodes are not, since that would change columns' means.

    Raises:
        ValueError: features are dense and N is no multiple of the devices on "data".
    """
    parts = mesh.shape["data"]
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    features = features_of(graph)
    count = features.shape[0]
    nodes: Any
    if isinstance(features, SparseFeatures):
        values = _pad(features.values, parts, 0)
        rows = _pad(features.rows, parts, count - 1)
        columns = _pad(features.columns, parts, 0)
        nodes = dataclasses.replace(features, values=values, rows=rows, columns=columns)
    elif count % parts:
        raise ValueError(
            f"place_graph: {count} nodes do not divide over {parts} devices; give a "
            'mesh whose "data" axis divides them, or sparse features.'
        )
    else:
        nodes = features
    senders, receivers = (_pad(x, parts, count - 1) for x in edges_of(graph))
    placed = graph._replace(
        nodes=nodes,
        edges=_pad(edge_weights(graph), parts, 0),
        senders=senders,
        receivers=receivers,
        n_edge=jnp.full_like(graph.n_edge, len(senders)),
    )
    placement = jax.tree.map(lambda _: split, placed)
    placement = placement._replace(
        n_node=everywhere,
        n_edge=everywhere,
        globals=jax.tree.map(lambda _: everywhere, graph.globals),
    )
    return parallel.place(placed, placement)


def place_plan(plan: GraphPlan, mesh: Mesh) -> GraphPlan:
    """Split a placed graph's plan as the graph is: what is per edge or value, by it.

    Args:
        plan: `plan_graph` or `plan_for` of what `place_graph` returned.
        mesh: the same.
    """
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(pattern: Pattern) -> Pattern:
        placement = jax.tree.map(lambda _: split, pattern)
        return parallel.place(
            pattern, placement._replace(indptr=everywhere, t_indptr=everywhere)
        )

    pairs = plan.pairs
    return GraphPlan(
        one(plan.edges),
        None if plan.features is None else one(plan.features),
        None if pairs is None else parallel.place(pairs, split),
    )


def _pad(x: jax.Array, parts: int, fill: float) -> jax.Array:
    return jnp.pad(x, (0, -len(x) % parts), constant_values=fill)
