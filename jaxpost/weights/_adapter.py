"""LoRA adapters in PEFT's folder layout, both ways and without torch.

PEFT has one pair of matrices per module of the published architecture. Where that fuses
several of our products into one module (Phi-3's query, key and value; gate and up),
their adapters become one of a larger rank: inputs stacked, outputs block by block, the
rest zero. That is exact; what the blocks were is kept in `jaxpost_lora.json`, which
PEFT does not look at. A score head, which is trained whole, is stored beside them as
one of PEFT's `modules_to_save`.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models, ops, parallel
from jaxpost.typing import Params
from jaxpost.weights._atomic import atomic_folder
from jaxpost.weights._errors import WeightsError, listed
from jaxpost.weights._names import (
    SCORE_NAME,
    Piece,
    leaf_at,
    parameter_pieces,
    set_leaf,
)
from jaxpost.weights._safetensors import (
    PlannedTensor,
    SafetensorsFile,
    is_finite,
    write_safetensors,
)
from jaxpost.weights._source import read_json, resolve

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BLOCKS_NAME = "jaxpost_lora.json"
_PREFIX = "base_model.model."
_SCORE = _PREFIX + SCORE_NAME
# Fields of PEFT's configuration that change the function in ways we do not compute, and
# the values under which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}


class _Module(NamedTuple):
    """A module of the published architecture that has an adapter.

    Fields:
        name: with `{i}` for the layer, such as `model.layers.{i}.self_attn.qkv_proj`.
        pieces: our kernels that it holds, by first row.
        rows: its outputs.
    """

    name: str
    pieces: tuple[Piece, ...]
    rows: int

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[1]


def save_adapter(
    model: models.Model,
    path: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    dtype: Any = jnp.float32,
) -> pathlib.Path:
    """Write a model's adapters, and its score head if it has one, for PEFT to read.

    Args:
        model: with adapters; the base is not written.
        path: the folder; an earlier adapter there is replaced in one step.
        base_name: folder or hub name of the base, for readers of the adapter.
        dtype: of the stored values.

    Returns:
        The folder.

    Raises:
        WeightsError: the model has no adapters, or one is not finite.
        FileExistsError: the folder holds files that no adapter has.
        NotImplementedError: the family has no key table.
    """
    lora = model.config.lora
    if lora is None:
        raise WeightsError("save_adapter: the model has no adapters; use save.")
    target = pathlib.Path(path)
    _check_replaceable(target)
    modules = _modules(model.config, lora.targets)
    adapters, _ = models.split_lora(model.params)
    stored = np.dtype(dtype)
    plan, blocks = [], []
    layers = itertools.product(range(model.config.num_layers), modules)
    named = itertools.chain.from_iterable(
        _matrices(module, layer, adapters, lora) for layer, module in layers
    )
    for name, matrix in itertools.chain(named, _score_matrix(model)):
        with np.errstate(over="ignore"):  # checked just below
            matrix = np.ascontiguousarray(matrix.astype(stored))
        if not is_finite(matrix):
            raise WeightsError(f"the adapter {name} is not finite as {stored}.")
        plan.append(PlannedTensor(name, stored, matrix.shape))
        blocks.append(matrix)
    fields = _peft_fields(modules, lora, base_name)
    if model.config.head == "score":
        fields |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    with atomic_folder(target) as folder:
        write_safetensors(folder / WEIGHTS_NAME, plan, blocks)
        _write_json(folder / CONFIG_NAME, fields)
        _write_json(folder / BLOCKS_NAME, dataclasses.asdict(lora))
    return target


def load_adapter(
    model: models.Model,
    path_or_hub_name: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules | None = None,
) -> models.Model:
    """A model with the adapters of a folder in PEFT's layout.

    Adapters that `save_adapter` wrote come back as they were. Of others, a module that
    fuses several of our products gives each of them its input matrix; modules of unlike
    rank are filled up with zeros, of unlike scale are multiplied by the ratio.

    Args:
        model: the base, without adapters; its arrays are shared. A score head in the
            folder takes the place of its own head.
        path_or_hub_name: a folder or hub name with `adapter_config.json` and
            `adapter_model.safetensors`.
        mesh: where the model lies, if on several devices.
        rules: which mesh axes each logical axis takes, as for `models.build`.

    Returns:
        The model with adapters in float32.

    Raises:
        FileNotFoundError: no such folder.
        WeightsError: the adapter does something else than low-rank sums, or its tensors
            do not fit the model: missing, surplus and mis-shaped ones are named.
        ValueError: the model has adapters already.
    """
    if model.config.lora is not None:
        raise ValueError("load_adapter: the model has adapters already.")
    folder = resolve(path_or_hub_name)
    fields = read_json(folder / CONFIG_NAME)
    _check_plain(folder, fields)
    if not (folder / WEIGHTS_NAME).is_file():
        raise WeightsError(
            f"{folder} has no {WEIGHTS_NAME}; pickled adapters are not opened."
        )
    with SafetensorsFile(folder / WEIGHTS_NAME) as file:
        modules = _modules_in(file, fields, model.config, folder)
        found = {module: _read(file, module, model.config) for module in modules}
        if _SCORE in file.tensors:
            model = _with_score(model, file, mesh, rules)
    lora, adapters = _as_ours(folder, fields, found, model.config)
    config = model.config.replace(lora=lora)
    axes, _ = models.split_lora(models.param_axes(config))
    shapes, _ = models.split_lora(models.build(config, abstract=True).params)
    placed = jax.tree.map(
        lambda leaf, like: np.asarray(leaf, np.float32).reshape(like.shape),
        adapters,
        shapes,
    )
    if mesh is None:
        placed = jax.tree.map(jnp.asarray, placed)
    else:
        placement = parallel.shardings(axes, mesh, rules, shapes=shapes)
        placed = parallel.place(placed, placement)
    params = ops.join_trees(model.params, placed)
    return dataclasses.replace(model, params=params, config=config)


def _modules(
    config: models.DecoderConfig, targets: tuple[str, ...]
) -> tuple[_Module, ...]:
    """The modules that hold some of `targets`."""
    groups: dict[str, list[Piece]] = {}
    for piece in parameter_pieces(config.replace(lora=None)):
        if piece.stacked and piece.path[-1] == "kernel":
            groups.setdefault(piece.name.removesuffix(".weight"), []).append(piece)
    modules = []
    for name, pieces in groups.items():
        chosen = tuple(piece for piece in pieces if piece.path[-2] in targets)
        if chosen:
            rows = sum(piece.rows for piece in pieces)
            modules.append(_Module(name, chosen, rows))
    return tuple(modules)


def _matrices(
    module: _Module, layer: int, adapters: Params, lora: models.LoraConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of `lora_A [rank, in]` and `lora_B [out, rank]` of a layer."""
    rank = lora.rank
    b_all = np.zeros((module.rows, rank * len(module.pieces)), np.float32)
    a_all = []
    for number, piece in enumerate(module.pieces):
        leaves = leaf_at(adapters, piece.path[:-1])
        a, b = (np.asarray(leaves[key][layer]) for key in ("lora_a", "lora_b"))
        a_all.append(a.reshape(piece.columns, rank).T)
        rows = slice(piece.first_row, piece.first_row + piece.rows)
        columns = slice(number * rank, (number + 1) * rank)
        b_all[rows, columns] = b.reshape(rank, piece.rows).T
    name = _PREFIX + module.name.format(i=layer)
    yield f"{name}.lora_A.weight", np.concatenate(a_all)
    yield f"{name}.lora_B.weight", b_all


def _peft_fields(
    modules: tuple[_Module, ...], lora: models.LoraConfig, base_name: str | None
) -> dict[str, Any]:
    fused = {m.short: len(m.pieces) for m in modules if len(m.pieces) > 1}
    # PEFT types it as an integer, but divides whatever is there.
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [module.short for module in modules],
        # The same factor alpha / rank at the larger rank.
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _check_plain(folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] not in neutral:
            raise WeightsError(
                f"{folder / CONFIG_NAME}: {name} is {fields[name]!r}, which jaxpost "
                "does not compute."
            )
    # PEFT adds the usual names of heads; a tensor of any but ours is refused later.
    whole = fields.get("modules_to_save") or []
    if not set(whole) <= {"score", "classifier"}:
        raise WeightsError(
            f"{folder / CONFIG_NAME}: modules_to_save is {whole!r}; only a score head "
            "can be stored whole beside adapters."
        )
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise WeightsError(
            f"{folder / CONFIG_NAME}: init_lora_weights {start!r} changes the base "
            "too; let PEFT convert the adapter (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def _modules_in(
    file: SafetensorsFile,
    fields: Mapping[str, Any],
    config: models.DecoderConfig,
    folder: pathlib.Path,
) -> tuple[_Module, ...]:
    """The modules that the file has tensors of, complete and of the right shapes."""
    present, missing, misshaped, known = [], [], [], set()
    for module in _modules(config, models.LORA_TARGETS):
        pairs = [_names(module, layer) for layer in range(config.num_layers)]
        names = [name for pair in pairs for name in pair]
        known |= set(names)
        if not any(name in file.tensors for name in names):
            continue
        present.append(module)
        missing += [name for name in names if name not in file.tensors]
        if missing:
            continue
        rank = file.tensors[pairs[0][0]].shape[0]
        wanted = ((rank, module.pieces[0].columns), (module.rows, rank))
        misshaped += [
            f"{name} is {list(file.tensors[name].shape)}, expected {list(shape)}"
            for pair in pairs
            for name, shape in zip(pair, wanted, strict=True)
            if file.tensors[name].shape != shape
        ]
    if _SCORE in file.tensors:
        known.add(_SCORE)
        shape = (1, config.hidden_size)
        if file.tensors[_SCORE].shape != shape:
            found = list(file.tensors[_SCORE].shape)
            misshaped.append(f"{_SCORE} is {found}, expected {list(shape)}")
    elif fields.get("modules_to_save"):
        missing.append(_SCORE)
    surplus = [name for name in file.tensors if name not in known]
    problems = {
        "missing": missing,
        "not expected": surplus,
        "of the wrong shape": misshaped,
    }
    parts = [f"{len(v)} {what}: {listed(v)}" for what, v in problems.items() if v]
    if parts or not present:
        raise WeightsError(
            f"{folder}: the adapter does not fit this {config.family} model. "
            f"{'; '.join(parts) or 'It has no tensors.'}"
        )
    return tuple(present)


def _names(module: _Module, layer: int) -> tuple[str, str]:
    name = _PREFIX + module.name.format(i=layer)
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _read(
    file: SafetensorsFile, module: _Module, config: models.DecoderConfig
) -> tuple[np.ndarray, np.ndarray]:
    """`A [L, rank, in]` and `B [L, out, rank]` in float32."""
    sides = ([], [])
    for layer in range(config.num_layers):
        for side, name in zip(sides, _names(module, layer), strict=True):
            values = file.read_rows(name, 0, file.tensors[name].shape[0])
            if not is_finite(values):
                raise WeightsError(f"{file.path}: tensor {name} is not finite.")
            side.append(values.astype(np.float32))
    return np.stack(sides[0]), np.stack(sides[1])


def _score_matrix(model: models.Model) -> Iterator[tuple[str, np.ndarray]]:
    """The score head, `[1, D]`, if the model has one."""
    if model.config.head == "score":
        yield _SCORE, np.asarray(model.params["score"]["kernel"]).T


def _with_score(
    model: models.Model,
    file: SafetensorsFile,
    mesh: jax.sharding.Mesh | None,
    rules: parallel.Rules | None,
) -> models.Model:
    """The model with the file's score head, in float32."""
    values = file.read_rows(_SCORE, 0, 1)
    if not is_finite(values):
        raise WeightsError(f"{file.path}: tensor {_SCORE} is not finite.")
    config = model.config.replace(head="score", head_bias=False)
    kernel: Any = values.astype(np.float32).T
    if mesh is None:
        kernel = jnp.asarray(kernel)
    else:
        axes = models.param_axes(config)["score"]["kernel"]
        placement = parallel.shardings(axes, mesh, rules, shapes=kernel)
        kernel = parallel.place(kernel, placement)
    params = {name: part for name, part in model.params.items() if name != "head"}
    return dataclasses.replace(
        model, params=params | {"score": {"kernel": kernel}}, config=config
    )


def _as_ours(
    folder: pathlib.Path,
    fields: Mapping[str, Any],
    found: Mapping[_Module, tuple[np.ndarray, np.ndarray]],
    config: models.DecoderConfig,
) -> tuple[models.LoraConfig, Params]:
    """One rank and factor for all, and the adapters by our kernels, flat `[L, in, r]`
    and `[L, r, out]`."""
    blocks = _blocks(folder, found, config)
    if blocks is not None:
        return blocks, _block_adapters(found, blocks)
    scales = {m: _scale(fields, m, a.shape[1]) for m, (a, _) in found.items()}
    rank = max(a.shape[1] for a, _ in found.values())
    scale = next(iter(scales.values()))
    targets = [piece.path[-2] for module in found for piece in module.pieces]
    lora = models.LoraConfig(rank=rank, alpha=scale * rank, targets=tuple(targets))
    adapters: dict[str, Any] = {}
    for module, (a, b) in found.items():
        pad = ((0, 0), (0, rank - a.shape[1]), (0, 0))
        a, b = np.pad(a, pad), np.pad(b.transpose(0, 2, 1), pad)
        b = b * np.float32(scales[module] / lora.scale)
        for piece in module.pieces:
            rows = slice(piece.first_row, piece.first_row + piece.rows)
            set_leaf(adapters, (*piece.path[:-1], "lora_a"), a.transpose(0, 2, 1))
            set_leaf(adapters, (*piece.path[:-1], "lora_b"), b[:, :, rows])
    return lora, adapters


def _blocks(
    folder: pathlib.Path,
    found: Mapping[_Module, tuple[np.ndarray, np.ndarray]],
    config: models.DecoderConfig,
) -> models.LoraConfig | None:
    """What `save_adapter` wrote about its blocks, if the tensors still agree."""
    if not (folder / BLOCKS_NAME).is_file():
        return None
    try:
        lora = models.LoraConfig(**read_json(folder / BLOCKS_NAME))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder / BLOCKS_NAME}: {error}") from error
    ranks = {m.name: lora.rank * len(m.pieces) for m in _modules(config, lora.targets)}
    if ranks != {m.name: a.shape[1] for m, (a, _) in found.items()}:
        raise WeightsError(
            f"{folder}: the tensors' ranks are not those of {BLOCKS_NAME}; remove that "
            "file if another program wrote the tensors."
        )
    return lora


def _block_adapters(
    found: Mapping[_Module, tuple[np.ndarray, np.ndarray]], lora: models.LoraConfig
) -> Params:
    adapters: dict[str, Any] = {}
    for module, (a, b) in found.items():
        chosen = [p for p in module.pieces if p.path[-2] in lora.targets]
        for number, piece in enumerate(chosen):
            rows = slice(piece.first_row, piece.first_row + piece.rows)
            block = slice(number * lora.rank, (number + 1) * lora.rank)
            a_own = a[:, block].transpose(0, 2, 1)
            b_own = b[:, rows, block].transpose(0, 2, 1)
            set_leaf(adapters, (*piece.path[:-1], "lora_a"), a_own)
            set_leaf(adapters, (*piece.path[:-1], "lora_b"), b_own)
    return adapters


def _scale(fields: Mapping[str, Any], module: _Module, rank: int) -> float:
    """PEFT's factor for a module; patterns are regular expressions of name endings.

    The same for all layers: patterns that single out layers are refused.
    """
    alphas = fields.get("alpha_pattern") or {}
    for pattern in alphas:
        if any(char.isdigit() for char in pattern):
            raise WeightsError(f"alpha_pattern {pattern!r} names single layers.")
    name = module.name.format(i=0)
    matching = [p for p in alphas if re.match(rf"(.*\.)?({p})$", name)]
    alpha = alphas[matching[0]] if matching else fields.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _check_replaceable(target: pathlib.Path) -> None:
    if not target.exists():
        return
    ours = {CONFIG_NAME, WEIGHTS_NAME, BLOCKS_NAME, "README.md"}
    strange = sorted(entry.name for entry in target.iterdir() if entry.name not in ours)
    if strange:
        raise FileExistsError(
            f"{target} holds {listed(strange)}, which no adapter has, and would be "
            "replaced; choose another folder or empty this one."
        )


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
