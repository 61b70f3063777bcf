"""Embeddings averaged over neighbours once they are trained; nothing to learn."""

import jax
import jax.numpy as jnp
import jraph

from jaxpost.graphs._container import edge_weights
from jaxpost.graphs._patterns import GraphPlan, plan_graph, sparse_matmul


def smooth(
    graph: jraph.GraphsTuple,
    embeddings: jax.Array,
    *,
    steps: int,
    restart: float,
    plan: GraphPlan | None = None,
) -> jax.Array:
    """Steps of personalised PageRank over embeddings.

    `h <- (1 - restart) A h + restart embeddings` from `h = embeddings`, with `A` the
    symmetrically normalised adjacency with self-loops that graph convolutions use.

    Args:
        graph: the whole graph; its features are not read.
        embeddings: float `[N, D]`.
        steps: how many; 0 returns `embeddings`.
        restart: share of a node's own embedding, in [0, 1]; 1 changes nothing.
        plan: `plan_graph(graph)`, if at hand.

    Raises:
        ValueError: `steps` is negative, or `restart` outside [0, 1].

    Source: Gasteiger et al. (2019), "Predict then Propagate", arXiv 1810.05997,
        equation 4.
    """
    if steps < 0 or not 0.0 <= restart <= 1.0:
        raise ValueError(
            "steps must be at least 0 and restart in [0, 1], got "
            f"{steps} and {restart}."
        )
    edges = (plan_graph(graph) if plan is None else plan).edges
    weights = edges.sort(edge_weights(graph, embeddings.dtype))
    nodes = embeddings.shape[0]
    degrees = jax.ops.segment_sum(weights, edges.rows, nodes, indices_are_sorted=True)
    inverse = jax.lax.rsqrt(degrees + 1.0)
    weights = weights * inverse[edges.rows] * inverse[edges.columns]
    loops = (inverse * inverse)[:, None]

    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        spread = sparse_matmul(edges, weights, h) + loops * h
        return (1.0 - restart) * spread + restart * embeddings, None

    return jax.lax.scan(step, jnp.asarray(embeddings), length=steps)[0]
