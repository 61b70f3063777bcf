"""From a `Model` to a Hugging Face folder, one tensor at a time and without torch.

The folder appears whole or not at all: a full disk or a killed process leaves the
previous export as it was.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models
from jaxpost.typing import Params
from jaxpost.weights._atomic import atomic_folder
from jaxpost.weights._card import ModelCard
from jaxpost.weights._config import to_hf_config
from jaxpost.weights._errors import WeightsError, listed
from jaxpost.weights._names import FileTensor, Piece, file_tensors, leaf_at
from jaxpost.weights._safetensors import (
    NAMES,
    PlannedTensor,
    is_finite,
    write_safetensors,
)
from jaxpost.weights._source import INDEX_NAME, WEIGHTS_NAME
from jaxpost.weights._special import SpecialIds, generation_fields

REPORT_NAME = "export_report.json"
MAX_SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 4 * 2**20
# Files that an export may hold; a folder with any other is not replaced.
_OURS = {
    *("config.json", "generation_config.json", "README.md", REPORT_NAME),
    *(WEIGHTS_NAME, INDEX_NAME, "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
}


def save(
    model: models.Model,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
    check_finite: bool = True,
) -> pathlib.Path:
    """Write a model for transformers, vLLM and others to read.

    Args:
        model: the decoder; a tied head is not written, an untied one is. With a score
            head it becomes a sequence classifier of one label.
        path: the folder; an earlier export there is replaced in one step.
        tokenizer: what `data.load_tokenizer` returns (read are `save(folder)`,
            `vocab_size`, `bos_id`, `eos_ids`, `pad_id`); None writes no such files.
        dtype: of the stored values; None keeps each parameter's own.
        max_shard_bytes: most bytes of values in one file; a larger tensor gets a file
            of its own.
        generation_config: fields of `generation_config.json` in Hugging Face's words;
            they override the tokenizer's special ids.
        card: what `README.md` says; None writes none.
        check_finite: refuse to store NaN or infinity, which `load` would refuse too.

    Returns:
        The folder.

    Raises:
        WeightsError: the family's layout cannot express the configuration, the
            tokenizer's vocabulary is larger than the embedding, special ids lie
            outside it, a model with a score head has no padding id, or a parameter is
            not finite (in the stored dtype).
        FileExistsError: the folder holds files that no export writes.
        OSError: the disk is full or cannot be written; the old export is intact.
        NotImplementedError: parameters live partly on other processes.
    """
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the embedding only "
            f"{config.vocab_size} rows: it belongs to another model."
        )
    ids = SpecialIds()
    if tokenizer is not None:
        ids = SpecialIds(tokenizer.bos_id, tuple(tokenizer.eos_ids), tokenizer.pad_id)
    generation = generation_fields(ids, generation_config, config.vocab_size)
    tensors = file_tensors(config)
    plan = plan_tensors(tensors, model.params, dtype)
    fields = _config_fields(config, plan, generation)
    target = pathlib.Path(path)
    _check_replaceable(target)
    with atomic_folder(target) as folder:
        if tokenizer is not None:
            tokenizer.save(folder)
        _write_weights(
            folder, tensors, plan, model.params, max_shard_bytes, check_finite
        )
        _write_json(folder / "config.json", fields)
        _write_json(folder / "generation_config.json", generation)
        if card is not None:
            (folder / "README.md").write_text(card.render(), encoding="utf-8")
    return target


def hf_tensors(
    config: models.DecoderConfig, params: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters, or their gradients, by Hugging Face name and in its layout.

    Args:
        config: the decoder.
        params: a tree like its parameters.

    Yields:
        Name and array, one at a time, in the tree's dtype.
    """
    for tensor in file_tensors(config):
        blocks = list(_blocks(tensor, params, None, check_finite=False))
        yield tensor.name, np.concatenate(blocks).reshape(tensor.shape)


def plan_tensors(
    tensors: list[FileTensor], params: Params, dtype: Any
) -> list[PlannedTensor]:
    """What will be written, in order.

    Raises:
        WeightsError: a dtype that safetensors has no name for.
        NotImplementedError: parameters live partly on other processes.
    """
    plan = []
    for tensor in tensors:
        leaves = [leaf_at(params, piece.path) for piece in tensor.pieces]
        if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
            raise NotImplementedError(
                f"{tensor.name} is spread over several processes; gather the "
                "parameters on one before saving."
            )
        kinds = {np.dtype(leaf.dtype) for leaf in leaves} if dtype is None else {dtype}
        stored = functools.reduce(jnp.promote_types, map(np.dtype, kinds))
        stored = np.dtype(stored)
        if stored not in NAMES:
            raise WeightsError(
                f"cannot store {tensor.name} as {stored}; dtype must be one of "
                f"{', '.join(kind.name for kind in NAMES)}."
            )
        plan.append(PlannedTensor(tensor.name, stored, tensor.shape))
    return plan


def _blocks(
    tensor: FileTensor, params: Params, dtype: np.dtype | None, check_finite: bool
) -> Iterator[np.ndarray]:
    """A file tensor's rows in order, a few megabytes at a time."""
    for piece in tensor.pieces:
        leaf = leaf_at(params, piece.path)
        if tensor.layer is not None:
            leaf = _layer(leaf, tensor.layer)
        matrix = _as_rows(piece, np.asarray(leaf))
        del leaf
        step = max(1, _BLOCK_BYTES // (piece.columns * matrix.dtype.itemsize))
        for start in range(0, piece.rows, step):
            block = matrix[start : start + step]
            if dtype is not None and block.dtype != dtype:
                with np.errstate(over="ignore", invalid="ignore"):  # checked below
                    block = block.astype(dtype)
            block = np.ascontiguousarray(block)
            if check_finite and not is_finite(block):
                raise WeightsError(
                    f"parameter {'/'.join(piece.path)} is not finite as {block.dtype} "
                    f"({tensor.name}); pass check_finite=False to store it all the "
                    "same."
                )
            yield block


def _layer(leaf: Any, layer: int) -> np.ndarray:
    """One layer of a stacked parameter, so that only it is copied to the host."""
    if isinstance(leaf, jax.Array) and not _is_on_host(leaf):
        leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        return np.asarray(leaf)
    return np.asarray(leaf)[layer]


def _is_on_host(leaf: jax.Array) -> bool:
    """Whether NumPy sees the values without a copy."""
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _as_rows(piece: Piece, values: np.ndarray) -> np.ndarray:
    """A view `[rows, columns]`, or `[rows]` of a vector, as the file has it."""
    if not piece.in_shape:
        return values.reshape(piece.rows)
    if not piece.transposed:
        return values.reshape(piece.rows, piece.columns)
    return values.reshape(piece.columns, piece.rows).T


def _write_weights(
    folder: pathlib.Path,
    tensors: list[FileTensor],
    plan: list[PlannedTensor],
    params: Params,
    max_shard_bytes: int,
    check_finite: bool,
) -> None:
    shards = _shards(plan, max_shard_bytes)
    index = {}
    for number, (start, stop) in enumerate(shards, start=1):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = list(zip(tensors, plan, strict=True))[start:stop]
        blocks = (
            block
            for tensor, planned in part
            for block in _blocks(tensor, params, planned.dtype, check_finite)
        )
        write_safetensors(folder / name, plan[start:stop], blocks)
        index |= {planned.name: name for _, planned in part}
    if len(shards) > 1:
        total = sum(planned.num_bytes for planned in plan)
        _write_json(
            folder / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _shards(plan: list[PlannedTensor], max_shard_bytes: int) -> list[tuple[int, int]]:
    """Ranges of the plan that go into one file each."""
    if max_shard_bytes < 1:
        raise WeightsError(f"max_shard_bytes must be positive, got {max_shard_bytes}.")
    shards, start, filled = [], 0, 0
    for number, tensor in enumerate(plan):
        if filled and filled + tensor.num_bytes > max_shard_bytes:
            shards.append((start, number))
            start, filled = number, 0
        filled += tensor.num_bytes
    return [*shards, (start, len(plan))]


def _config_fields(
    config: models.DecoderConfig,
    plan: list[PlannedTensor],
    generation: Mapping[str, Any],
) -> dict[str, Any]:
    fields = to_hf_config(config)
    if config.head == "score" and generation.get("pad_token_id") is None:
        raise WeightsError(
            "a score is read at the last token that is not padding, so the export "
            "needs its id: give a tokenizer, or generation_config with pad_token_id."
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # Left out, transformers would take the family's own ids.
        fields[key] = generation.get(key)
    stored = functools.reduce(jnp.promote_types, {tensor.dtype for tensor in plan})
    # Both versions of transformers read this name; the newer `dtype` only one does.
    fields["torch_dtype"] = np.dtype(stored).name
    return fields


def _check_replaceable(target: pathlib.Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a folder to export to.")
    strange = sorted(
        entry.name
        for entry in target.iterdir()
        if entry.is_dir()
        or not (entry.name in _OURS or entry.name.endswith(".safetensors"))
    )
    if strange:
        raise FileExistsError(
            f"{target} holds {listed(strange)}, which no export writes, and would be "
            "replaced; choose another folder or empty this one."
        )


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
