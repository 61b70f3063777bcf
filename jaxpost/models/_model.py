"""From a config to pure functions and a plain dictionary of parameters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost import parallel
from jaxpost.typing import ApplyFn, Head, ModelOutput, Params

from ._cache import KVCache, init_cache
from ._config import DecoderConfig
from ._decoder import Decoder, unstack
from ._quantize import any_quantized, is_quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters with the pure functions that use them; a pytree of the parameters.

    Fields:
        params: nested dict of arrays, layers stacked on a leading axis.
        config: static.
        lookup: how rows of the embedding are found, from `parallel.split_lookup`;
            static; None is plain indexing.
    """

    params: Params
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    lookup: parallel.Lookup | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @property
    def apply(self) -> ApplyFn:
        """`apply(params, tokens, positions, segment_ids=None, cache=None)`."""
        return _apply_of(self.config, self.lookup)

    def unembed(self, params: Params) -> Head:
        """The output head of `params`, `[D, V]`.

        Raises:
            ValueError: the model has a score head.
        """
        config = self.config
        if config.head == "score":
            raise ValueError(
                "the model has a score head and no output over the vocabulary: it "
                "scores texts (models.scores) and cannot generate or give "
                "log-probabilities."
            )
        if config.tie_embeddings:
            weight, bias = params["embed"]["embedding"].T, None
        else:
            weight, bias = params["head"]["kernel"], params["head"].get("bias")
        return Head(weight, bias, softcap=config.final_softcap)

    def init_cache(
        self,
        batch: int,
        length: int,
        dtype: Any = jnp.float32,
        *,
        by_layer: bool | None = None,
    ) -> KVCache:
        """An empty cache for `batch` rows of at most `length` positions.

        Args:
            batch, length, dtype: sizes and element type.
            by_layer: each layer gets arrays of its own instead of a place in stacked
                ones, and single tokens are decoded layer by layer instead of in a
                scan. None does so on CPU, where that spares copies, but for a quantised
                base.
        """
        if by_layer is None and any_quantized(self.params):
            by_layer = False
        return init_cache(self.config, batch, length, dtype, by_layer=by_layer)

    def for_decoding(self, params: Params) -> Params:
        """`params` as single tokens are decoded with; `apply` takes them too.

        On CPU, where every look into a stacked array copies what it reads, `layers` is
        a tuple of each layer's parameters, which `apply` does not scan. They stay as
        they are elsewhere; where this was called on them before; and with a quantised
        base, all of which would be widened ahead of the loop.
        """
        layers = params["layers"]
        if jax.default_backend() != "cpu" or isinstance(layers, tuple):
            return params
        if any_quantized(layers):
            return params
        return {**params, "layers": unstack(layers, self.config.num_layers)}

    def replace(self, *, params: Params) -> "Model":
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)

    def with_lookup(self, lookup: parallel.Lookup | None) -> "Model":
        """The same model that finds rows of its embedding by `lookup`."""
        return dataclasses.replace(self, lookup=lookup)

    def param_count(self) -> int:
        """Number of parameters (a tied head counts once)."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_quantized)
        return sum(math.prod(leaf.shape) for leaf in leaves)


def build(
    config: DecoderConfig,
    key: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules | None = None,
    abstract: bool = False,
) -> Model:
    """Initialise a decoder, or describe one without memory.

    Args:
        config: what to build.
        key: PRNG key; only `abstract=True` does without.
        dtype: of the parameters, and thereby of the computation.
        mesh: where to put parameters, created there shard by shard under `jit`, with
            the same values as on one device; None is the default device.
        rules: changes to `parallel.RULES`.
        abstract: parameters are `jax.ShapeDtypeStruct` (with shardings if there is a
            mesh); no memory at any size.

    Returns:
        The model.

    Raises:
        NotImplementedError: `config.experts` is set.
        ValueError: neither a key nor `abstract=True`.
    """
    if config.experts is not None:
        raise NotImplementedError(
            "DecoderConfig.experts: mixture-of-experts layers are not built yet; "
            "set experts=None."
        )
    if key is None and not abstract:
        raise ValueError("models.build needs a key unless abstract=True.")
    init = functools.partial(init_params, config, jnp.dtype(dtype))
    shapes = jax.eval_shape(init, jax.random.key(0))
    placement = None
    if mesh is not None:
        axes = param_axes(config)
        placement = parallel.shardings(axes, mesh, rules, shapes=shapes)
    if not abstract and placement is None:
        return Model(init(key), config)
    if not abstract:
        return Model(jax.jit(init, out_shardings=placement)(key), config)
    if placement is not None:
        shapes = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            placement,
        )
    return Model(shapes, config)


def param_axes(config: DecoderConfig) -> Params:
    """Logical axis names of every parameter, a tree of tuples like the parameters'."""
    _, state = _split(config)

    flat = {path: leaf.axes for path, leaf in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_params(config: DecoderConfig, dtype: Any, key: jax.Array) -> Params:
    """Fresh parameters; those of the base do not depend on `config.lora`."""
    state = nnx.to_pure_dict(nnx.state(Decoder(config, key), nnx.Param))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)


@functools.lru_cache(maxsize=64)
def _split(config: DecoderConfig):
    abstract = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    return nnx.split(abstract)


@functools.lru_cache(maxsize=64)
def _apply_of(config: DecoderConfig, lookup: parallel.Lookup | None) -> ApplyFn:
    graph, _ = _split(config)

    @jax.jit
    def apply(
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> ModelOutput:
        layers = params["layers"] if isinstance(params["layers"], tuple) else None
        if layers is not None:
            params = {**params, "layers": layers[0]}
        decoder = nnx.merge(graph, params)
        return decoder(
            tokens, positions, segment_ids, cache, lookup=lookup, layers=layers
        )

    return apply
