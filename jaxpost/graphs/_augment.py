"""Random views of a graph: dropped edges and masked feature columns, shapes kept."""

import dataclasses

import jax
import jax.numpy as jnp
import jraph

from jaxpost.graphs._container import (
    Features,
    SparseFeatures,
    edge_weights,
    features_of,
)
from jaxpost.graphs._patterns import edge_pairs

DROPS = ("directed", "symmetric")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a view differs from the graph.

    Fields:
        edge_drop: probability that an edge is dropped, in [0, 1).
        feature_mask: probability that a feature is zero on all nodes, in [0, 1).
        drop: "directed", each listed direction by itself, as published, or
            "symmetric", both directions of an edge together.
    """

    edge_drop: float = 0.5
    feature_mask: float = 0.2
    drop: str = "directed"

    def __post_init__(self):
        for name in ("edge_drop", "feature_mask"):
            rate = getattr(self, name)
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}.")
        if self.drop not in DROPS:
            raise ValueError(
                f"drop must be one of {', '.join(DROPS)}, got {self.drop!r}."
            )


def augment(
    graph: jraph.GraphsTuple,
    *,
    edge_drop: float,
    feature_mask: float,
    drop: str = "directed",
    pairs: jax.Array | None = None,
    key: jax.Array,
) -> jraph.GraphsTuple:
    """A view: some edges have weight zero, some features are zero on every node.

    Nothing is rescaled, and nothing is removed: shapes are those of the graph.
    Encoders take degrees from the weights, so each view has its own.

    Args:
        graph: `edges` None or weights `[E]`; a weight stays what it was or becomes 0.
        edge_drop, feature_mask, drop: see `AugmentConfig`.
        pairs: `edge_pairs(graph)`, if it is at hand; only "symmetric" needs it.
        key: PRNG key.

    Returns:
        The view, with `edges` float32 `[E]`.

    Raises:
        ValueError: a rate is outside [0, 1), or `drop` is unknown.

    Source: Zhu et al. (2020), arXiv 2006.04131, section 3.2 (removing edges, masking
    node features); one mask per column and edges by direction as CLNR has them.
    """
    AugmentConfig(edge_drop, feature_mask, drop)  # checks
    key_edges, key_features = jax.random.split(key)
    weights = edge_weights(graph)
    if edge_drop > 0.0:
        kept = jax.random.bernoulli(key_edges, 1.0 - edge_drop, weights.shape)
        if drop == "symmetric":
            kept = kept[edge_pairs(graph) if pairs is None else pairs]
        weights = jnp.where(kept, weights, 0.0)
    nodes = features_of(graph)
    if feature_mask > 0.0:
        width = (nodes.shape[1],)
        kept = jax.random.bernoulli(key_features, 1.0 - feature_mask, width)
        nodes = keep_columns(nodes, kept)
    return graph._replace(nodes=nodes, edges=weights)


def keep_columns(features: Features, kept: jax.Array) -> Features:
    """Features with zeros outside the columns of `kept`, bool `[F]`."""
    if isinstance(features, SparseFeatures):
        zero = jnp.zeros((), features.dtype)
        values = jnp.where(kept[features.columns], features.values, zero)
        return dataclasses.replace(features, values=values)
    return jnp.where(kept[None, :], features, jnp.zeros((), features.dtype))
