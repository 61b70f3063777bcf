"""Flax modules of the decoder: norm, projection, attention, feed-forward, layer.

Each parameter carries its logical axes (`axes=`) for `parallel`. Modules compute in
the dtype of their input; norms and softmax in float32 or wider.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost import ops
from jaxpost.parallel import Lookup

from ._cache import KVCache, update_layer
from ._config import DecoderConfig, LoraConfig
from ._quantize import is_quantized, widen
from ._rope import apply_rope

Sizes = dict[str, int]
"""Logical axis names and their sizes, in order."""


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    Fields:
        cos, sin: rotary tables `[B, T, R / 2]`.
        positions: int32 `[B, T]`.
        segments: int32 `[B, T]`, or None.
    """

    cos: jax.Array
    sin: jax.Array
    positions: jax.Array
    segments: jax.Array | None


class Norm(nnx.Module):
    """Root-mean-square or layer norm over the last axis."""

    def __init__(self, config: DecoderConfig, over: Sizes, stack: Sizes):
        self.config = config
        shape, axes = (*stack.values(), *over.values()), (*stack, *over)
        self.scale = nnx.Param(jnp.full(shape, 1.0 - config.norm_offset), axes=axes)
        if config.norm_kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.config.norm_kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(power + self.config.norm_eps)
        ones = (1,) * (x.ndim - 1)
        scale = self.scale[...].astype(wide.dtype).reshape(*ones, -1)
        wide = wide * (self.config.norm_offset + scale)
        if self.config.norm_kind == "layer":
            wide = wide + self.bias[...].astype(wide.dtype).reshape(*ones, -1)
        return wide.astype(x.dtype)


class Projection(nnx.Module):
    """A matrix product over the last axes, with an optional bias and adapter.

    The kernel may be held quantised; the adapter, `lora_a` and `lora_b`, never is.
    """

    def __init__(
        self,
        key: jax.Array,
        inputs: Sizes,
        outputs: Sizes,
        stack: Sizes,
        *,
        bias: bool = False,
        gain: float = 1.0,
        lora: LoraConfig | None = None,
    ):
        self.contracted = len(inputs)
        shape = (*stack.values(), *inputs.values(), *outputs.values())
        spread = gain * math.prod(inputs.values()) ** -0.5
        kernel = spread * jax.random.normal(key, shape)
        self.kernel = nnx.Param(kernel, axes=(*stack, *inputs, *outputs))
        if bias:
            zeros = jnp.zeros((*stack.values(), *outputs.values()))
            self.bias = nnx.Param(zeros, axes=(*stack, *outputs))
        self.has_bias = bias
        self.lora = lora
        if lora is not None:
            # As PEFT draws it; B starts at zero, so the first step starts at the base.
            bound = math.prod(inputs.values()) ** -0.5
            rank = {"rank": lora.rank}
            shape = (*stack.values(), *inputs.values(), lora.rank)
            draw = jax.random.uniform(
                jax.random.fold_in(key, 1), shape, minval=-bound, maxval=bound
            )
            self.lora_a = nnx.Param(draw, axes=(*stack, *inputs, *rank))
            zeros = jnp.zeros((*stack.values(), lora.rank, *outputs.values()))
            self.lora_b = nnx.Param(zeros, axes=(*stack, *rank, *outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value()
        kernel = widen(kernel) if is_quantized(kernel) else kernel
        kernel = kernel.astype(x.dtype)
        split = x.ndim - self.contracted
        outputs = kernel.shape[self.contracted :]
        # Of matrices: XLA transposes operands of other products' gradients in memory.
        rows = x.reshape(-1, math.prod(x.shape[split:]))
        y = rows @ kernel.reshape(rows.shape[1], -1)
        if self.lora is not None:
            a = self.lora_a[...].astype(x.dtype).reshape(rows.shape[1], -1)
            b = self.lora_b[...].astype(x.dtype).reshape(self.lora.rank, -1)
            # Scaled at its narrowest.
            y = y + (rows @ a * jnp.asarray(self.lora.scale, x.dtype)) @ b
        y = y.reshape(*x.shape[:split], *outputs)
        if self.has_bias:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    def __init__(self, config: DecoderConfig, keys: jax.Array, stack: Sizes):
        self.config = config
        model = {"embed": config.hidden_size}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        lora, bias = config.lora_of, config.attention_bias
        self.q = Projection(keys[0], model, heads, stack, bias=bias, lora=lora("q"))
        self.k = Projection(keys[1], model, kv_heads, stack, bias=bias, lora=lora("k"))
        self.v = Projection(keys[2], model, kv_heads, stack, bias=bias, lora=lora("v"))
        self.o = Projection(
            keys[3],
            heads,
            model,
            stack,
            bias=config.attention_out_bias,
            gain=(2 * config.num_layers) ** -0.5,
            lora=lora("o"),
        )
        if config.qk_norm:
            width = {"head_dim": config.head_dim}
            self.q_norm = Norm(config, width, stack)
            self.k_norm = Norm(config, width, stack)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        window: int | jax.Array | None,
        layer: jax.Array | int,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        query, key, value = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rope(query, context.cos, context.sin)
        key = apply_rope(key, context.cos, context.sin)
        options: dict[str, Any] = {
            "window": window,
            "softcap": self.config.attention_softcap,
            "scale": self.config.query_scale,
        }
        if cache is None:
            mixed = self._attend(query, key, value, context, **options)
        else:
            cache, key, value = update_layer(
                cache, layer, key, value, context.positions, context.segments
            )
            mixed = self._attend_to_slots(query, key, value, context, **options)
        return self.o(mixed), cache

    def _attend(self, query, key, value, context, slots=None, **options):
        segments = context.segments
        return ops.attention(
            query,
            key,
            value,
            query_positions=context.positions,
            key_positions=context.positions if slots is None else slots,
            query_segments=segments,
            key_segments=segments if slots is None else None,
            implementation=self.config.attention_implementation,
            **options,
        )

    def _attend_to_slots(self, query, key, value, context, **options):
        """Attention to the rows of a cache, laid out as there."""
        if query.shape[1] == 1:
            segments = context.segments
            mixed = ops.cached_attention(
                query[:, 0],
                key,
                value,
                positions=context.positions[:, 0],
                segments=None if segments is None else segments[:, 0],
                **options,
            )
            return mixed[:, None]
        key, value = key.transpose(0, 3, 1, 2), value.swapaxes(1, 2)
        slots = jnp.arange(key.shape[1], dtype=jnp.int32)
        slots = jnp.broadcast_to(slots[None], key.shape[:2])
        return self._attend(query, key, value, context, slots, **options)


class FeedForward(nnx.Module):
    """Gated feed-forward block: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, keys: jax.Array, stack: Sizes):
        self.config = config
        model, inner = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        lora = config.lora_of
        self.gate = Projection(keys[0], model, inner, stack, lora=lora("gate"))
        self.up = Projection(keys[1], model, inner, stack, lora=lora("up"))
        gain, down = (2 * config.num_layers) ** -0.5, lora("down")
        self.down = Projection(keys[2], inner, model, stack, gain=gain, lora=down)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate(x)
        if self.config.activation == "silu":
            gate = jax.nn.silu(gate)
        else:
            gate = jax.nn.gelu(gate, approximate=True)
        return self.down(gate * self.up(x))


class DecoderLayer(nnx.Module):
    """Pre-norm residual layer; Gemma 2 norms each block's output too.

    Made with its parameters stacked (`stack` names and sizes the leading axes), called
    with those of one layer.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array, stack: Sizes):
        self.config = config
        keys = jax.random.split(key, 7)
        model = {"embed": config.hidden_size}
        self.input_norm = Norm(config, model, stack)
        self.attention = Attention(config, keys[:4], stack)
        self.mlp_norm = Norm(config, model, stack)
        self.mlp = FeedForward(config, keys[4:], stack)
        if config.post_norms:
            self.attention_out_norm = Norm(config, model, stack)
            self.mlp_out_norm = Norm(config, model, stack)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        window: int | jax.Array | None,
        layer: jax.Array | int,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        mixed, cache = self.attention(self.input_norm(x), context, window, layer, cache)
        if self.config.post_norms:
            mixed = self.attention_out_norm(mixed)
        x = x + mixed
        inner = self.mlp(self.mlp_norm(x))
        if self.config.post_norms:
            inner = self.mlp_out_norm(inner)
        return x + inner, cache


class Embedding(nnx.Module):
    """Token embeddings, `[V, D]`."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            0.02 * jax.random.normal(key, shape), axes=("vocab", "embed")
        )

    def __call__(self, tokens: jax.Array, lookup: Lookup | None = None) -> jax.Array:
        table = self.embedding[...]
        return table[tokens] if lookup is None else lookup(table, tokens)


class ScoreHead(nnx.Module):
    """The kernel of a scalar at every token, `[D, 1]`; `models.scores` applies it."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        shape = (config.hidden_size, 1)
        self.kernel = nnx.Param(
            0.02 * jax.random.normal(key, shape), axes=("embed", None)
        )
