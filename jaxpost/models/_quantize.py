"""A frozen base's kernels in 8 or 4 bits, by `qwix` (the extra `quant`).

Kernels are widened where they are used, one layer at a time, so the whole base never
exists in a wide dtype.
"""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost.typing import Params

Quantization = Literal["int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "nf4")
BLOCK = 64
"""Most values that share a scale under nf4, as in QLoRA."""


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is a `qwix.QArray`; imports nothing."""
    return hasattr(leaf, "qvalue")


def any_quantized(params: Params) -> bool:
    """Whether some kernel of a parameter tree is quantised."""
    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def widen(leaf: Any) -> jax.Array:
    """The values of a `qwix.QArray`, in the dtype of its scales."""
    import qwix  # pyright: ignore[reportMissingImports] (extra `quant`)

    return qwix.dequantize(leaf)


def cast_params(params: Params, dtype: Any) -> Params:
    """`params` in another dtype, but for quantised kernels, which stay as they are."""
    return jax.tree.map(
        lambda leaf: leaf if is_quantized(leaf) else leaf.astype(dtype),
        params,
        is_leaf=is_quantized,
    )


def quantize_params(params: Params, kind: Quantization, axes: Params) -> Params:
    """The layers' kernels as `qwix.QArray`; everything else is shared.

    Args:
        params: nested dict.
        kind: "int8", a scale per layer and output; "nf4", 4-bit normal floats, also a
            scale per `BLOCK` inputs (or the most below that divides their last axis).
        axes: logical axes of the parameters, see `models.param_axes`.

    Raises:
        ValueError: unknown kind.
        ImportError: `qwix` is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}."
        )
    if importlib.util.find_spec("qwix") is None:
        raise ImportError(
            f"quantizing to {kind} needs qwix: pip install 'jaxpost[quant]'."
        )

    def layers(tree, names):
        quantized = {}
        for key, value in tree.items():
            if isinstance(value, Mapping):
                quantized[key] = layers(value, names[key])
            elif key == "kernel":
                quantized[key] = _quantize(value, kind, names[key])
            else:
                quantized[key] = value
        return quantized

    return params | {"layers": layers(params["layers"], axes["layers"])}


def _quantize(kernel: jax.Array, kind: Quantization, names: tuple[str, ...]) -> Any:
    """One stacked kernel; its scales lie where their values do."""
    run = functools.partial(_quantize_layers, kind=kind, inputs=_count_inputs(names))
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.jit(run)(kernel)
    placement = jax.tree.map(
        lambda part: _narrowed(sharding, part.shape), jax.eval_shape(run, kernel)
    )
    return jax.jit(run, out_shardings=placement)(kernel)


def _quantize_layers(kernel: jax.Array, *, kind: Quantization, inputs: int) -> Any:
    import qwix  # pyright: ignore[reportMissingImports] (extra `quant`)

    last = kernel.shape[inputs]  # of the inputs, in `[L, in..., out...]`
    block = max(size for size in range(1, min(BLOCK, last) + 1) if last % size == 0)
    # Of one layer, `[in..., out...]`.
    outputs = tuple(range(inputs, kernel.ndim - 1))
    if kind == "int8":
        how: dict[str, Any] = {"channelwise_axes": outputs}
        qtype: Any = jnp.int8
    else:
        others = tuple(range(inputs - 1))
        how = {
            "channelwise_axes": (*others, *outputs),
            "tiled_axes": {inputs - 1: block},
        }
        qtype = "nf4"
    # Layer by layer: nf4 compares each value with 16 others.
    return jax.lax.map(
        lambda one: qwix.quantize(one.astype(jnp.float32), qtype, **how), kernel
    )


def _count_inputs(names: tuple[str, ...]) -> int:
    """How many axes of a kernel `[L, in..., out...]` are inputs."""
    # Either the model's width comes in, or it goes out.
    return 1 if names[1] == "embed" else len(names) - 2


def _narrowed(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding`, whole where it does not divide an axis of `shape`."""
    spec = []
    for size, part in zip(
        shape,
        (*sharding.spec, *[None] * (len(shape) - len(sharding.spec))),
        strict=True,
    ):
        axes = (part,) if isinstance(part, str) else tuple(part or ())
        count = 1
        for axis in axes:
            count *= sharding.mesh.shape[axis]
        spec.append(part if size % count == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
