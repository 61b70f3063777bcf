"""Low-rank adapters put on a model, taken off, and folded into its kernels.

Parameters of a model with adapters are the base's, untouched, with `lora_a` and
`lora_b` beside the kernels that have one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import ops, parallel
from jaxpost.typing import Params

from ._config import DecoderConfig, LoraConfig
from ._model import Model, init_params, param_axes
from ._quantize import Quantization, is_quantized, quantize_params, widen

ADAPTER_LEAVES = ("lora_a", "lora_b")


def add_lora(
    model: Model,
    lora: LoraConfig,
    key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules | None = None,
) -> Model:
    """The model with fresh adapters: the same function until they are trained.

    Args:
        model: without adapters; its arrays are shared, not copied.
        lora: rank, factor and targets.
        key: PRNG key of `lora_a`, drawn as PEFT does; `lora_b` is zero.
        mesh: where the model lies, if on several devices.
        rules: changes to `parallel.RULES`.

    Returns:
        A model whose parameters are the base's and, in float32, the adapters'.

    Raises:
        ValueError: the model has adapters already.
    """
    if model.config.lora is not None:
        raise ValueError(
            "add_lora: the model has adapters already; merge_lora or without_lora "
            "first."
        )
    config = model.config.replace(lora=lora)
    # Compiled, so that nothing else of the drawn model is ever made.
    init = functools.partial(_init_adapters, config)
    placement = None
    if mesh is not None:
        axes, _ = split_lora(param_axes(config))
        shapes = jax.eval_shape(init, key)
        placement = parallel.shardings(axes, mesh, rules, shapes=shapes)
    adapters = jax.jit(init, out_shardings=placement)(key)
    params = ops.join_trees(model.params, adapters)
    return dataclasses.replace(model, params=params, config=config)


def split_lora(params: Params) -> tuple[Params, Params]:
    """Adapters and base of a parameter tree; `ops.join_trees` puts them back.

    Args:
        params: nested dict of anything (arrays, shapes, logical axes).

    Returns:
        Two nested dicts with the same leaves; empty dictionaries are left out.
    """
    adapters, base = {}, {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            for side, part in zip((adapters, base), split_lora(value), strict=True):
                if part:
                    side[key] = part
        else:
            (adapters if key in ADAPTER_LEAVES else base)[key] = value
    return adapters, base


def without_lora(model: Model) -> Model:
    """The base of a model with adapters, sharing its arrays; the model, if none."""
    if model.config.lora is None:
        return model
    config = model.config.replace(lora=None)
    params = split_lora(model.params)[1]
    return dataclasses.replace(model, params=params, config=config)


def merge_lora(model: Model) -> Model:
    """A plain model that computes what the adapted one does.

    Kernels with an adapter become `kernel + (alpha / rank) A B`, computed and kept in
    at least float32; quantised kernels are widened. All other arrays are shared.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.config.lora is None:
        raise ValueError("merge_lora: the model has no adapters.")

    def walk(tree: Mapping[str, Any]) -> dict[str, Any]:
        merged = {
            key: walk(value) if isinstance(value, Mapping) else value
            for key, value in tree.items()
            if key not in ADAPTER_LEAVES
        }
        if is_quantized(merged.get("kernel")):
            merged["kernel"] = _widened(merged["kernel"])
        if "lora_a" in tree:
            merged["kernel"] = _merged(
                merged["kernel"], tree["lora_a"], tree["lora_b"], scale
            )
        return merged

    scale = model.config.lora.scale
    config = model.config.replace(lora=None)
    return dataclasses.replace(model, params=walk(model.params), config=config)


def quantize_base(model: Model, kind: Quantization) -> Model:
    """The model with the kernels of its layers in 8 or 4 bits; inference and LoRA only.

    Embedding, head, norms, biases and adapters stay as they are. Each kernel is widened
    where it is used, so memory is that of the narrow ones plus one layer. `weights`
    stores the merged model, in a wide dtype.

    Args:
        model: its wide kernels may be dropped afterwards.
        kind: "int8": symmetric, a scale per output. "nf4": 4-bit normal floats with a
            scale per 64 inputs.

    Raises:
        ValueError: unknown kind.
        ImportError: `qwix` is not installed.

    Source: Dettmers et al. (2023), "QLoRA", without its double quantization.
    """
    params = quantize_params(model.params, kind, param_axes(model.config))
    return dataclasses.replace(model, params=params)


def _init_adapters(config: DecoderConfig, key: jax.Array) -> Params:
    return split_lora(init_params(config, jnp.dtype(jnp.float32), key))[0]


_widened = jax.jit(widen)


@functools.partial(jax.jit, static_argnums=3)
def _merged(kernel: Any, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`a [L, in..., r]` and `b [L, r, out...]` folded into `kernel [L, in..., out...]`.

    The stack is the one axis in front.
    """
    dtype = jnp.promote_types(jnp.promote_types(kernel.dtype, a.dtype), jnp.float32)
    layers, rank = a.shape[0], a.shape[-1]
    product = jnp.einsum(
        "lir,lro->lio",
        a.astype(dtype).reshape(layers, -1, rank),
        b.astype(dtype).reshape(layers, rank, -1),
        precision="highest",
    )
    return kernel.astype(dtype) + scale * product.reshape(kernel.shape)
