"""The whole decoder as a Flax module, its layers stacked and scanned."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpost.parallel import Lookup
from jaxpost.typing import ModelOutput, Params

from ._cache import KVCache, split_layers, stack_layers
from ._config import DecoderConfig
from ._layers import Context, DecoderLayer, Embedding, Norm, Projection, ScoreHead
from ._rope import rope_tables


class Decoder(nnx.Module):
    """Embedding, `L` layers with parameters stacked on a leading axis, final norm."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        self.embed = Embedding(config, key_embed)
        stack = {"layers": config.num_layers}
        self.layers = DecoderLayer(config, key_layers, stack)
        self.final_norm = Norm(config, {"embed": config.hidden_size}, {})
        if config.head == "score":
            self.score = ScoreHead(config, key_head)
        elif not config.tie_embeddings:
            self.head = Projection(
                key_head,
                {"embed": config.hidden_size},
                {"vocab": config.vocab_size},
                {},
                bias=config.head_bias,
                gain=0.02 * config.hidden_size**0.5,
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        lookup: Lookup | None = None,
        layers: Sequence[Params] | None = None,
    ) -> ModelOutput:
        """`layers` are the parameters of each layer, to be used instead of a scan."""
        x = self.embed(tokens, lookup)
        if segment_ids is not None:
            # Padding starts at zero, so no bad id or row reaches a gradient through it.
            real = (segment_ids != 0)[:, :, None]
            x = jnp.where(real, x, jnp.zeros_like(x))
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = rope_tables(self.config, positions, wide)
        context = Context(cos, sin, positions, segment_ids)
        x, cache = self._apply_layers(x, context, cache, layers)
        return ModelOutput(self.final_norm(x), cache, {})

    def _apply_layers(self, x, context, cache, layers):
        if layers is None and cache is not None and cache.by_layer:
            if x.shape[1] > 1:
                # A prompt pays for copies of its cache, and a scan compiles sooner.
                x, cache = self._scan_layers(x, context, stack_layers(cache))
                return x, split_layers(cache)
            stacked = nnx.to_pure_dict(nnx.state(self.layers))
            layers = unstack(stacked, self.config.num_layers)
        if layers is None:
            return self._scan_layers(x, context, cache)
        graph, _ = nnx.split(self.layers)
        for number, params in enumerate(layers):
            window = self.config.window_of(number)
            x, cache = nnx.merge(graph, params)(x, context, window, number, cache)
        return x, cache

    def _scan_layers(self, x, context, cache):
        config = self.config
        graph, stacked = nnx.split(self.layers)
        numbers = np.arange(config.num_layers, dtype=np.int32)
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        alike = len(set(windows)) == 1
        # One traced program serves every layer, so a window that differs by layer is
        # data; a layer without one gets a window that no distance reaches.
        sizes = [2**31 - 1 if window is None else window for window in windows]
        per_layer = None if alike else np.asarray(sizes, np.int32)

        def step(carry, inputs):
            x, cache = carry
            params, layer, window = inputs
            window = windows[0] if alike else window
            x, cache = nnx.merge(graph, params)(x, context, window, layer, cache)
            return (x, cache), None

        (x, cache), _ = jax.lax.scan(
            _remat(step, config), (x, cache), (stacked, numbers, per_layer)
        )
        return x, cache


@functools.partial(jax.jit, static_argnames=("count",))
def unstack(stacked: Params, count: int) -> tuple[Params, ...]:
    """The parameters of each of `count` layers that are stacked on the first axis."""
    return tuple(jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(count))


def _remat(step, config: DecoderConfig):
    """What a layer keeps for its backward pass; see `DecoderConfig.remat`."""
    policies = jax.checkpoint_policies
    dots = policies.dots_with_no_batch_dims_saveable
    if config.lora is not None:
        dots = _without_adapter_outputs(dots, config.lora.rank)
    keep = {
        "none": policies.save_from_both_policies(
            dots, policies.save_only_these_names("attention")
        ),
        "dots": dots,
        "full": None,
    }[config.remat]
    # The scan's loop boundary already keeps recomputation from being merged back.
    return jax.checkpoint(step, prevent_cse=False, policy=keep)


def _without_adapter_outputs(policy, rank: int):
    """`policy`, but a product with an adapter's narrow `B` is computed again.

    It is as large as the kernel's own output beside it, and cheap.
    """

    def keep(primitive, *avals, **params):
        if primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            if [avals[0].shape[axis] for axis in contracted] == [rank]:
                return False
        return policy(primitive, *avals, **params)

    return keep
