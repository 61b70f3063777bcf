"""Layers of the graph encoders, as Flax modules over one graph and its plan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost.graphs._container import Features, SparseFeatures
from jaxpost.graphs._patterns import EDGE_CHUNK, Pattern, sparse_matmul


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    Fields:
        edges: receivers as rows, senders as columns.
        weights: of the edges, in the pattern's order, float32 `[E]`.
        features: pattern of sparse node features, or None.
        aggregation, edge_chunk: see `sparse_matmul`.
    """

    edges: Pattern
    weights: jax.Array
    features: Pattern | None
    aggregation: str | None = None
    edge_chunk: int = EDGE_CHUNK

    def gather(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """Sums of weighted senders for each receiver, `[N, D]` to `[N, D]`."""
        return sparse_matmul(
            self.edges,
            weights,
            x,
            implementation=self.aggregation,
            edge_chunk=self.edge_chunk,
        )

    def degrees(self) -> jax.Array:
        """Weights that arrive at each node, without a self-loop, `[N]`."""
        return jax.ops.segment_sum(
            self.weights,
            self.edges.rows,
            len(self.edges.indptr) - 1,
            indices_are_sorted=True,
        )


def project(features: Features, kernel: jax.Array, context: Context) -> jax.Array:
    """`features @ kernel`; sparse features are never made dense."""
    if not isinstance(features, SparseFeatures):
        return jnp.dot(features.astype(kernel.dtype), kernel)
    assert context.features is not None
    values = context.features.sort(features.values)
    return sparse_matmul(
        context.features,
        values,
        kernel,
        implementation=None if context.aggregation == "dense" else context.aggregation,
        edge_chunk=context.edge_chunk,
    )


class Dense(nnx.Module):
    """`x W (+ b)`, Glorot-uniform kernel, zero bias."""

    def __init__(self, inputs: int, outputs: int, key: jax.Array, *, bias: bool = True):
        kernel = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Features, context: Context, dtype: Any) -> jax.Array:
        y = project(x, self.kernel[...].astype(dtype), context)
        return y if self.bias is None else y + self.bias[...].astype(dtype)[None, :]


class GCN(nnx.Module):
    """Graph convolution: `D^-1/2 (A + I) D^-1/2 x W + b`.

    Degrees are those of the receivers, self-loop included. Where the input is narrower
    than the output, neighbours are summed before the product instead of after it.

    Source: Kipf & Welling (2017), arXiv 1609.02907, equation 2.
    """

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        self.linear = Dense(inputs, outputs, key, bias=False)
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Features, context: Context, dtype: Any) -> jax.Array:
        inverse = jax.lax.rsqrt(context.degrees() + 1.0)
        edges = context.edges
        weights = context.weights * inverse[edges.rows] * inverse[edges.columns]
        loops = (inverse * inverse).astype(dtype)[:, None]

        def spread(h: jax.Array) -> jax.Array:
            return context.gather(weights, h) + loops * h

        inputs, outputs = self.linear.kernel.shape
        if not isinstance(x, SparseFeatures) and inputs < outputs:
            y = self.linear(spread(x.astype(dtype)), context, dtype)
        else:
            y = spread(self.linear(x, context, dtype))
        return y + self.bias[...].astype(dtype)[None, :]


class SAGE(nnx.Module):
    """`x W_self + mean over neighbours of x W_neighbour + b`.

    Source: Hamilton et al. (2017), arXiv 1706.02216, with the mean aggregator.
    """

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        key_own, key_neighbour = jax.random.split(key)
        self.own = Dense(inputs, outputs, key_own)
        self.neighbour = Dense(inputs, outputs, key_neighbour, bias=False)

    def __call__(self, x: Features, context: Context, dtype: Any) -> jax.Array:
        degrees = context.degrees()
        share = jnp.where(degrees > 0.0, 1.0 / jnp.where(degrees > 0.0, degrees, 1), 0)
        weights = context.weights * share[context.edges.rows]
        neighbour = self.neighbour(x, context, dtype)
        return self.own(x, context, dtype) + context.gather(weights, neighbour)


class GAT(nnx.Module):
    """Attention over neighbours and the node itself, heads concatenated.

    A dropped edge takes no part in the softmax. Holds `[E, heads, D / heads]`.

    Source: Velickovic et al. (2018), arXiv 1710.10903, equations 1 to 5.
    """

    def __init__(self, inputs: int, outputs: int, key: jax.Array, *, heads: int):
        key_kernel, key_send, key_receive = jax.random.split(key, 3)
        glorot = jax.nn.initializers.glorot_uniform()
        self.heads = heads
        self.linear = Dense(inputs, outputs, key_kernel, bias=False)
        shape = (heads, outputs // heads)
        self.send = nnx.Param(glorot(key_send, shape))
        self.receive = nnx.Param(glorot(key_receive, shape))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Features, context: Context, dtype: Any) -> jax.Array:
        h = self.linear(x, context, dtype)
        nodes, width = h.shape
        h = h.reshape(nodes, self.heads, -1)
        send = jnp.sum(h * self.send[...].astype(dtype)[None], axis=-1)  # [N, heads]
        receive = jnp.sum(h * self.receive[...].astype(dtype)[None], axis=-1)
        rows, columns = context.edges.rows, context.edges.columns
        scores = jax.nn.leaky_relu(send[columns] + receive[rows], 0.2)
        own = jax.nn.leaky_relu(send + receive, 0.2)
        scores, own = (
            s.astype(jnp.promote_types(dtype, jnp.float32)) for s in (scores, own)
        )
        weights = context.weights[:, None]
        scores = jnp.where(weights > 0.0, scores, -jnp.inf)
        top = jnp.maximum(own, jax.ops.segment_max(scores, rows, nodes))
        top = jax.lax.stop_gradient(top)
        terms = jnp.exp(scores - top[rows]) * weights  # [E, heads]
        own = jnp.exp(own - top)
        total = jax.ops.segment_sum(terms, rows, nodes) + own
        messages = (terms / total[rows]).astype(dtype)[:, :, None] * h[columns]
        y = jax.ops.segment_sum(messages, rows, nodes, indices_are_sorted=True)
        y = y + (own / total).astype(dtype)[:, :, None] * h
        return y.reshape(nodes, width) + self.bias[...].astype(dtype)[None, :]


class BatchNorm(nnx.Module):
    """Columns to mean 0 and variance 1 by the statistics at hand, then affine.

    There is no other mode: embeddings are read with the whole graph's statistics.
    """

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=0, keepdims=True)
        variance = jnp.mean(centred * centred, axis=0, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + 1e-5)
        y = y * self.scale[...][None, :] + self.bias[...][None, :]
        return y.astype(x.dtype)


class Activation(nnx.Module):
    """ReLU, ELU, or PReLU with one learned slope."""

    def __init__(self, name: str):
        self.name = name
        self.slope = nnx.Param(jnp.full((), 0.25)) if name == "prelu" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.slope is None:
            return ACTIVATIONS[self.name](x)
        return jnp.where(x >= 0.0, x, self.slope[...].astype(x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "prelu": jax.nn.leaky_relu,  # never called: `Activation` has a learned slope
}
