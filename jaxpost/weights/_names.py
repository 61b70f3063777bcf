"""Which tensor of a Hugging Face checkpoint is which parameter, and how it lies.

Their matrices are `[out, in]`, one file tensor per layer; our kernels are `[in, out]`
with heads on axes of their own and the layers stacked in front. Phi-3 fuses query, key
and value (and gate and up) into one matrix, row block after row block. Rotary halves
lie the same way on both sides, and norm scales are stored alike.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxpost import models
from jaxpost.weights._errors import WeightsError

FUSED_FAMILIES = ("phi3",)
SCORE_NAME = "score.weight"

TOLERATED = (
    (r"rotary_emb\.inv_freq$", "rotary frequencies follow from the configuration"),
    (r"\.self_attn\.(masked_)?bias$", "causal masks of old checkpoints"),
)
"""Tensors that a checkpoint may hold beyond the parameters, and why they are ignored.

`lm_head.weight` is the one more, where the configuration ties it to the embedding.
"""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter's rows within one file tensor (per layer, if `{i}` is in `name`).

    Fields:
        path: keys of the parameter tree.
        name: name of the file tensor, `{i}` for the layer's number.
        in_shape, out_shape: axes of our parameter (without layers) that the file has as
            its columns and as its rows.
        transposed: ours is `in_shape + out_shape`, theirs `out_shape + in_shape`; if
            False (vectors and the embedding) both are `out_shape + in_shape`.
        first_row: where our rows start in a fused tensor.
    """

    path: tuple[str, ...]
    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    transposed: bool = True
    first_row: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.out_shape)

    @property
    def columns(self) -> int:
        return math.prod(self.in_shape)

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of the checkpoint: full name, its shape there, pieces by first row."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    pieces: tuple[Piece, ...]


def parameter_pieces(config: models.DecoderConfig) -> list[Piece]:
    """Every parameter of a decoder with its place in a checkpoint.

    Args:
        config: the decoder; its family decides names and fusions.

    Returns:
        One piece per leaf of the parameter tree, in the order they are written.

    Raises:
        NotImplementedError: the decoder has experts or layer norms.
        WeightsError: it has adapters, which a checkpoint has no place for.
    """
    if config.lora is not None:
        raise WeightsError(
            "the model has adapters: save models.merge_lora(model), or the adapters "
            "alone with weights.save_adapter."
        )
    if config.experts is not None or config.norm_kind != "rms":
        raise NotImplementedError(
            f"weights of family {config.family!r} with experts or layer norms have no "
            "key table yet."
        )
    width, vocab = config.hidden_size, config.vocab_size
    pieces = [
        Piece(
            ("embed", "embedding"),
            "model.embed_tokens.weight",
            (width,),
            (vocab,),
            transposed=False,
        ),
        *_attention_pieces(config),
        *_mlp_pieces(config),
        *_norm_pieces(config),
    ]
    if config.head == "score":
        pieces.append(Piece(("score", "kernel"), SCORE_NAME, (width,), (1,)))
    elif not config.tie_embeddings:
        pieces.append(Piece(("head", "kernel"), "lm_head.weight", (width,), (vocab,)))
        if config.head_bias:
            pieces.append(_vector(("head", "bias"), "lm_head.bias", (vocab,)))
    return pieces


def file_tensors(config: models.DecoderConfig) -> list[FileTensor]:
    """Every tensor of a checkpoint of this decoder, layer by layer.

    Raises:
        NotImplementedError: as `parameter_pieces`.
    """
    pieces = parameter_pieces(config)
    first = [piece for piece in pieces if piece.path[0] == "embed"]
    layers = [piece for piece in pieces if piece.stacked]
    last = [piece for piece in pieces if piece.path[0] != "embed" and not piece.stacked]
    tensors = _grouped(first, None)
    for layer in range(config.num_layers):
        tensors += _grouped(layers, layer)
    return tensors + _grouped(last, None)


def is_tolerated(name: str, config: models.DecoderConfig) -> bool:
    """Whether a file tensor that is no parameter may be left unread."""
    if config.tie_embeddings and name == "lm_head.weight":
        return True
    return any(re.search(pattern, name) for pattern, _ in TOLERATED)


def leaf_at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Put a leaf into a nested dict, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _grouped(pieces: list[Piece], layer: int | None) -> list[FileTensor]:
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    tensors = []
    for name, group in by_name.items():
        group.sort(key=lambda piece: piece.first_row)
        rows = sum(piece.rows for piece in group)
        columns = group[0].in_shape
        shape = (rows, math.prod(columns)) if columns else (rows,)
        full = name if layer is None else name.format(i=layer)
        tensors.append(FileTensor(full, shape, layer, tuple(group)))
    return tensors


def _attention_pieces(config: models.DecoderConfig) -> list[Piece]:
    width, head_dim = config.hidden_size, config.head_dim
    root, ours = "model.layers.{i}.self_attn", ("layers", "attention")
    fused = config.family in FUSED_FAMILIES
    heads = {
        "q": config.num_heads,
        "k": config.num_kv_heads,
        "v": config.num_kv_heads,
    }
    pieces, row = [], 0
    for key, count in heads.items():
        name = f"{root}.qkv_proj" if fused else f"{root}.{key}_proj"
        shape = (count, head_dim)
        pieces.append(
            Piece(
                (*ours, key, "kernel"),
                f"{name}.weight",
                (width,),
                shape,
                first_row=row,
            )
        )
        if config.attention_bias:
            bias = _vector((*ours, key, "bias"), f"{name}.bias", shape)
            pieces.append(dataclasses.replace(bias, first_row=row))
        row += count * head_dim if fused else 0
    inputs = (config.num_heads, head_dim)
    pieces.append(
        Piece((*ours, "o", "kernel"), f"{root}.o_proj.weight", inputs, (width,))
    )
    if config.attention_out_bias:
        pieces.append(_vector((*ours, "o", "bias"), f"{root}.o_proj.bias", (width,)))
    if config.qk_norm:
        for key in ("q_norm", "k_norm"):
            pieces.append(
                _vector((*ours, key, "scale"), f"{root}.{key}.weight", (head_dim,))
            )
    return pieces


def _mlp_pieces(config: models.DecoderConfig) -> list[Piece]:
    width, inner = config.hidden_size, config.intermediate_size
    root, ours = "model.layers.{i}.mlp", ("layers", "mlp")
    pieces, row = [], 0
    for key in ("gate", "up"):
        fused = config.family in FUSED_FAMILIES
        name = f"{root}.gate_up_proj" if fused else f"{root}.{key}_proj"
        path = (*ours, key, "kernel")
        pieces.append(Piece(path, f"{name}.weight", (width,), (inner,), first_row=row))
        row += inner if fused else 0
    path = (*ours, "down", "kernel")
    pieces.append(Piece(path, f"{root}.down_proj.weight", (inner,), (width,)))
    return pieces


def _norm_pieces(config: models.DecoderConfig) -> list[Piece]:
    root = "model.layers.{i}"
    names = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        names = {
            "input_norm": "input_layernorm",
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    shape = (config.hidden_size,)
    layers = [
        _vector(("layers", key, "scale"), f"{root}.{name}.weight", shape)
        for key, name in names.items()
    ]
    return [*layers, _vector(("final_norm", "scale"), "model.norm.weight", shape)]


def _vector(path: tuple[str, ...], name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(path, name, (), shape, transposed=False)
