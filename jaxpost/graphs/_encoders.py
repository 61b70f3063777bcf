"""Encoders: a graph in, one embedding per node out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jraph
from flax import nnx

from jaxpost.graphs._container import edge_weights, features_of
from jaxpost.graphs._layers import (
    ACTIVATIONS,
    GAT,
    GCN,
    SAGE,
    Activation,
    BatchNorm,
    Context,
    Dense,
)
from jaxpost.graphs._patterns import EDGE_CHUNK, GraphPlan, plan_graph

Params = Any
KINDS = ("gcn", "mlp", "gat", "sage")
DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder's shape.

    Fields:
        kind: "gcn", "mlp" (no edges; BatchNorm), "gat" or "sage".
        widths: of each layer's output; the last is the embedding's.
        activation: after each layer: "relu", "elu" or "prelu".
        activate_last: also after the last layer (GRACE does, CLNR does not).
        heads: of "gat"; they share each width.
        dtype: of the computation; parameters and embeddings are float32 under
            "float32" and "bfloat16".
        aggregation: how neighbours are summed: "csr", "segment", "dense", or None to
            choose by device and size, see `graphs.sparse_matmul`.
        edge_chunk: edges whose messages "segment" holds at once.
    """

    kind: str = "gcn"
    widths: tuple[int, ...] = (512, 512)
    activation: str = "relu"
    activate_last: bool = False
    heads: int = 4
    dtype: str = "float32"
    aggregation: str | None = None
    edge_chunk: int = EDGE_CHUNK

    def __post_init__(self):
        for name, known in (
            ("kind", KINDS),
            ("activation", tuple(ACTIVATIONS)),
            ("dtype", DTYPES),
            ("aggregation", (None, "csr", "segment", "dense")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive, got {self.widths}.")
        if self.edge_chunk < 1:
            raise ValueError(f"edge_chunk must be at least 1, got {self.edge_chunk}.")
        if self.kind == "gat" and any(width % self.heads for width in self.widths):
            raise ValueError(
                f"heads={self.heads} must divide every width of {self.widths}."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoder:
    """Parameters with the pure function that uses them; a pytree of the parameters."""

    params: Params
    config: EncoderConfig = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})

    def apply(
        self, params: Params, graph: jraph.GraphsTuple, plan: GraphPlan | None = None
    ) -> jax.Array:
        """Embeddings `[N, D]` of a graph, float32 or wider.

        Args:
            params: like `self.params`.
            graph: features `[N, in_features]`, dense or sparse; edge weights or None.
            plan: `plan_graph(graph)`; None sorts the edges here.
        """
        return _apply(self.config, self.in_features, params, graph, plan)


def build_encoder(
    config: EncoderConfig, in_features: int, *, key: jax.Array
) -> Encoder:
    """An encoder with fresh parameters.

    Args:
        config: its shape.
        in_features: columns of the node features.
        key: PRNG key.
    """
    module = _Stack(config, in_features, key)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return Encoder(params, config, in_features)


class _Stack(nnx.Module):
    """Layers with activations between them."""

    def __init__(self, config: EncoderConfig, in_features: int, key: jax.Array):
        self.config = config
        sizes = (in_features, *config.widths)
        keys = jax.random.split(key, len(config.widths))
        self.layers = nnx.List(
            [
                _LAYERS[config.kind](config, *sizes[i : i + 2], keys[i])
                for i in range(len(keys))
            ]
        )
        last = len(config.widths) - (not config.activate_last)
        self.activations = nnx.List(
            [Activation(config.activation) for _ in range(last)]
        )
        between = config.widths[:-1] if config.kind == "mlp" else ()
        self.norms = nnx.List([BatchNorm(width) for width in between])

    def __call__(self, x: Any, context: Context) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, context, dtype)
            if i < len(self.norms):
                x = self.norms[i](x)
            if i < len(self.activations):
                x = self.activations[i](x)
        return x


_LAYERS = {
    "gcn": lambda config, inputs, outputs, key: GCN(inputs, outputs, key),
    "mlp": lambda config, inputs, outputs, key: Dense(inputs, outputs, key),
    "sage": lambda config, inputs, outputs, key: SAGE(inputs, outputs, key),
    "gat": lambda config, inputs, outputs, key: GAT(
        inputs, outputs, key, heads=config.heads
    ),
}


@functools.lru_cache(maxsize=64)
def _graphdef(config: EncoderConfig, in_features: int) -> Any:
    abstract = nnx.eval_shape(lambda: _Stack(config, in_features, jax.random.key(0)))
    return nnx.split(abstract)[0]


def _apply(
    config: EncoderConfig,
    in_features: int,
    params: Params,
    graph: jraph.GraphsTuple,
    plan: GraphPlan | None,
) -> jax.Array:
    features = features_of(graph)
    if features.shape[1] != in_features:
        raise ValueError(
            f"the encoder was built for {in_features} features, but the graph has "
            f"{features.shape[1]}."
        )
    plan = plan_graph(graph) if plan is None else plan
    wide = jnp.promote_types(jnp.dtype(config.dtype), jnp.float32)
    context = Context(
        plan.edges,
        plan.edges.sort(edge_weights(graph, wide)),
        plan.features,
        config.aggregation,
        config.edge_chunk,
    )
    module = nnx.merge(_graphdef(config, in_features), params)
    return module(features, context).astype(wide)
