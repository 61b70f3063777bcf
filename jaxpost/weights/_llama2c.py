"""Checkpoints of llama2.c (`.bin`, version 0) under Hugging Face names.

The file is seven int32 (dim, hidden dim, layers, heads, key/value heads, vocabulary,
context; a negative vocabulary marks an untied head), then float32 matrices in a fixed
order. Rotary pairs are interleaved there, `(0, 1), (2, 3), ...`, and split in halves
here, `(0, H/2), (1, H/2 + 1), ...`: query and key rows are reordered while reading.

Source: https://github.com/karpathy/llama2.c, `run.c` (`memory_map_weights`).
"""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxpost import models
from jaxpost.weights._errors import WeightsError

_HEADER = 7
_MAGIC_NEWER = 0x616B3432  # "ak42": versions 1 and 2 lay matrices out differently


class Llama2cFile:
    """One llama2.c checkpoint; its matrices are memory-mapped.

    Args:
        path: the `.bin` file.

    Raises:
        WeightsError: not such a file, a newer version, or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        header = np.fromfile(self.path, "<i4", _HEADER)
        if len(header) == _HEADER and header.view("<u4")[0] == _MAGIC_NEWER:
            raise WeightsError(
                f"{self.path} is a llama2.c checkpoint of version 1 or newer; only "
                "version 0 is read. Export it again with `--version 0`."
            )
        if len(header) < _HEADER or header[[0, 1, 2, 3, 4, 6]].min(initial=1) < 1:
            raise WeightsError(
                f"{self.path} does not begin with a llama2.c header; pickled `.bin` "
                "files of torch are never opened."
            )
        width, inner, layers, heads, kv_heads, vocab, context = header.tolist()
        if width % heads or heads % kv_heads or vocab == 0:
            raise WeightsError(
                f"{self.path}: the header's sizes contradict each other: "
                f"{header.tolist()}."
            )
        self.config = models.DecoderConfig(
            family="llama",
            vocab_size=abs(vocab),
            hidden_size=width,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            max_positions=context,
            tie_embeddings=vocab > 0,
        )
        self._matrices = self._map()
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: matrix.shape for name, matrix in self._matrices.items()
        }

    def dtype(self, name: str) -> np.dtype:
        """Always float32."""
        return self._matrices[name].dtype

    def place(self, name: str) -> str:
        """The file, whatever the tensor."""
        del name
        return str(self.path)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, rotary halves split."""
        matrix = self._matrices[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = np.arange(start, stop)
            half = self.config.head_dim // 2
            head, place = np.divmod(rows, self.config.head_dim)
            pair, second = place % half, place >= half
            return matrix[head * self.config.head_dim + 2 * pair + second]
        return np.array(matrix[start:stop])

    def _map(self) -> dict[str, np.ndarray]:
        config = self.config
        width, inner = config.hidden_size, config.intermediate_size
        keys = config.num_kv_heads * config.head_dim
        per_layer: list[tuple[str, tuple[int, ...]]] = [
            ("input_layernorm", (width,)),
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (keys, width)),
            ("self_attn.v_proj", (keys, width)),
            ("self_attn.o_proj", (width, width)),
            ("post_attention_layernorm", (width,)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
            ("mlp.up_proj", (inner, width)),
        ]
        order: list[tuple[str, tuple[int, ...]]] = [
            ("model.embed_tokens.weight", (config.vocab_size, width))
        ]
        order += [
            (f"model.layers.{layer}.{name}.weight", shape)
            for name, shape in per_layer
            for layer in range(config.num_layers)
        ]
        order.append(("model.norm.weight", (width,)))
        # Tables of cosines and sines, which follow from the sizes.
        order.append(("", (2 * config.max_positions * (config.head_dim // 2),)))
        if not config.tie_embeddings:
            order.append(("lm_head.weight", (config.vocab_size, width)))
        expected = 4 * (_HEADER + sum(int(np.prod(shape)) for _, shape in order))
        size = self.path.stat().st_size
        if size != expected:
            raise WeightsError(
                f"{self.path}: the header describes {expected} bytes, the file has "
                f"{size}; it is truncated or no llama2.c checkpoint of version 0."
            )
        values = np.memmap(self.path, "<f4", "r", offset=4 * _HEADER)
        matrices, position = {}, 0
        for name, shape in order:
            count = int(np.prod(shape))
            if name:
                matrices[name] = values[position : position + count].reshape(shape)
            position += count
        return matrices
