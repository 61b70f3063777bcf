"""From a checkpoint to a `Model`, one parameter at a time.

Each parameter is filled on the host from blocks of rows of a few megabytes, checked,
cast, and put on the devices before the next one is begun: above the result, the host
never holds more than about one parameter.
"""

import os
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models
from jaxpost.weights._config import from_hf_config
from jaxpost.weights._errors import WeightsError, listed
from jaxpost.weights._names import (
    Piece,
    file_tensors,
    is_tolerated,
    leaf_at,
    parameter_pieces,
    set_leaf,
)
from jaxpost.weights._safetensors import NAMES, is_finite
from jaxpost.weights._source import TensorSource, open_folder, read_json, resolve

_BLOCK_BYTES = 8 * 2**20


def load(
    path_or_hub_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Any = None,
    check_finite: bool = True,
    ignore_fields: Collection[str] = (),
) -> models.Model:
    """A decoder with the weights of a Hugging Face checkpoint.

    Reads safetensors only, single or sharded; nothing is ever unpickled. Rotary
    frequencies and the `lm_head.weight` of tied heads may be in the files and are not
    read; any other surplus tensor is an error.

    Args:
        path_or_hub_name: a folder with `config.json` and weights, or `owner/name` (with
            an optional `@revision`) on the hub.
        dtype: of the parameters; None keeps each as it is stored.
        mesh: devices to spread the parameters over; None puts them on the default one.
        rules: which mesh axes each logical axis takes, as for `models.build`.
        check_finite: refuse weights that hold NaN or infinity.
        ignore_fields: fields of `config.json` that jaxpost does not know and that are
            known not to change the forward pass.

    Returns:
        The model. Above its own size, host memory grows by at most about the largest
        parameter (all layers of one kind count as one).

    Raises:
        FileNotFoundError: no such folder.
        WeightsError: the folder, its configuration or its tensors are not usable;
            missing, surplus and mis-shaped tensors are named.
    """
    folder = resolve(path_or_hub_name)
    config = from_hf_config(
        read_json(folder / "config.json"), ignore_fields=ignore_fields
    )
    with open_folder(folder) as source:
        return load_source(
            source,
            config,
            dtype=dtype,
            mesh=mesh,
            rules=rules,
            check_finite=check_finite,
            where=folder,
        )


def load_source(
    source: TensorSource,
    config: models.DecoderConfig,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    rules: Any,
    check_finite: bool,
    where: pathlib.Path,
) -> models.Model:
    """A model whose parameters come from `source`; arguments as `load`."""
    check_names(source, config, where)
    abstract = models.build(config, mesh=mesh, rules=rules, abstract=True)
    params: dict[str, Any] = {}
    for piece in parameter_pieces(config):
        leaf = leaf_at(abstract.params, piece.path)
        names = _names_of(piece, config)
        wanted = _result_dtype(source, names, dtype)
        sharding = getattr(leaf, "sharding", None)
        box = _local_box(sharding, leaf.shape)
        host = np.empty([stop - start for start, stop in box], wanted)
        layers = range(*box[0]) if piece.stacked else (0,)
        for offset, layer in enumerate(layers):
            target = host[offset] if piece.stacked else host
            _fill(target, source, names[layer], piece, box, check_finite)
        set_leaf(params, piece.path, _place(host, box, leaf.shape, sharding))
    return abstract.replace(params=params)


def check_names(
    source: TensorSource, config: models.DecoderConfig, where: pathlib.Path
) -> None:
    """Compare names and shapes with what the decoder needs, before reading anything.

    Raises:
        WeightsError: naming up to eight missing, surplus and mis-shaped tensors each.
    """
    wanted = {tensor.name: tensor.shape for tensor in file_tensors(config)}
    missing = [name for name in wanted if name not in source.shapes]
    surplus = [
        name
        for name in source.shapes
        if name not in wanted and not is_tolerated(name, config)
    ]
    misshaped = [
        f"{name} is {list(source.shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    parts = [
        f"{len(found)} {what}: {listed(found)}"
        for what, found in (
            ("missing", missing),
            ("not expected", surplus),
            ("of the wrong shape", misshaped),
        )
        if found
    ]
    if parts:
        hint = ""
        if "lm_head.weight" in missing:
            hint = (
                " config.json says that the head is not tied to the embedding; if it "
                "is, set tie_word_embeddings to true there."
            )
        raise WeightsError(
            f"{where}: the tensors do not fit the {config.family} model of its "
            f"configuration. {'; '.join(parts)}.{hint}"
        )


def _names_of(piece: Piece, config: models.DecoderConfig) -> list[str]:
    if not piece.stacked:
        return [piece.name]
    return [piece.name.format(i=layer) for layer in range(config.num_layers)]


def _result_dtype(source: TensorSource, names: list[str], dtype: Any) -> np.dtype:
    if dtype is not None:
        wanted = np.dtype(dtype)
        if wanted not in NAMES:
            raise WeightsError(
                f"dtype must be one of {', '.join(kind.name for kind in NAMES)}, got "
                f"{wanted.name}."
            )
    else:
        wanted = source.dtype(names[0])
        for name in names[1:]:  # layers stored differently take the wider type
            wanted = np.dtype(jnp.promote_types(wanted, source.dtype(name)))
    return np.dtype(jax.dtypes.canonicalize_dtype(wanted))


def _local_box(sharding: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The smallest box that covers this process's shards: what has to be read."""
    if sharding is None:
        return tuple((0, size) for size in shape)
    indices = sharding.addressable_devices_indices_map(shape).values()
    bounds = [
        [part.indices(size) for part, size in zip(index, shape, strict=True)]
        for index in indices
    ]
    return tuple(
        (min(b[axis][0] for b in bounds), max(b[axis][1] for b in bounds))
        for axis in range(len(shape))
    )


def _fill(
    target: np.ndarray,
    source: TensorSource,
    name: str,
    piece: Piece,
    box: tuple[tuple[int, int], ...],
    check_finite: bool,
) -> None:
    """Read a file tensor's rows into `target`, the box of one layer's parameter."""
    axes = box[1:] if piece.stacked else box
    count = len(piece.in_shape)
    if piece.transposed:
        in_box, out_box = axes[:count], axes[count:]
        # Ours is in + out; rows of the file are our trailing axes.
        order = (*range(count, len(axes)), *range(count))
        target = target.transpose(order)
    else:
        out_box, in_box = axes[: len(axes) - count], axes[len(axes) - count :]
    # Whole rows are read; beyond the first row axis the box is cut from each block.
    first, last = out_box[0]
    inner = piece.rows // piece.out_shape[0]
    row_bytes = max(1, inner * piece.columns * source.dtype(name).itemsize)
    step = max(1, _BLOCK_BYTES // row_bytes)
    cut = tuple(slice(*bounds) for bounds in (*out_box[1:], *in_box))
    for start in range(first, last, step):
        stop = min(start + step, last)
        block = source.read_rows(
            name, piece.first_row + start * inner, piece.first_row + stop * inner
        )
        block = block.reshape(stop - start, *piece.out_shape[1:], *piece.in_shape)
        block = block[(slice(None), *cut)]
        cast = block
        if block.dtype != target.dtype:
            with np.errstate(over="ignore", invalid="ignore"):  # checked just below
                cast = block.astype(target.dtype)
        if check_finite and not is_finite(cast):
            raise WeightsError(_not_finite(source, name, block, target.dtype))
        target[start - first : stop - first] = cast


def _not_finite(
    source: TensorSource, name: str, block: np.ndarray, dtype: np.dtype
) -> str:
    if is_finite(block):
        return (
            f"{source.place(name)}: tensor {name} holds values too large for {dtype}; "
            "load it as bfloat16 or float32."
        )
    return (
        f"{source.place(name)}: tensor {name} holds NaN or infinity; the checkpoint is "
        "damaged. Pass check_finite=False to load it all the same."
    )


def _place(
    host: np.ndarray,
    box: tuple[tuple[int, int], ...],
    shape: tuple[int, ...],
    sharding: Any,
) -> jax.Array:
    """Put a filled box on the devices; returns when the host array is free again."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(host))
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        local = tuple(
            slice(part.indices(size)[0] - low, part.indices(size)[1] - low)
            for part, size, (low, _) in zip(index, shape, box, strict=True)
        )
        # One at a time, so that the copies of shards that are no contiguous part of
        # the box do not pile up.
        shard = np.ascontiguousarray(host[local])
        shards.append(jax.block_until_ready(jax.device_put(shard, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
