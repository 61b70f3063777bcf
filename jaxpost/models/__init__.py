"""Decoders as pure functions over plain parameter trees."""

from ._cache import KVCache as KVCache
from ._config import LORA_TARGETS as LORA_TARGETS
from ._config import DecoderConfig as DecoderConfig
from ._config import LoraConfig as LoraConfig
from ._config import MoEConfig as MoEConfig
from ._config import RopeScaling as RopeScaling
from ._lora import add_lora as add_lora
from ._lora import merge_lora as merge_lora
from ._lora import quantize_base as quantize_base
from ._lora import split_lora as split_lora
from ._lora import without_lora as without_lora
from ._model import Model as Model
from ._model import build as build
from ._model import param_axes as param_axes
from ._quantize import cast_params as cast_params
from ._score import add_score_head as add_score_head
from ._score import scores as scores
from ._score import split_trained as split_trained

__all__ = [
    "LORA_TARGETS",
    "DecoderConfig",
    "KVCache",
    "LoraConfig",
    "MoEConfig",
    "Model",
    "RopeScaling",
    "add_lora",
    "add_score_head",
    "build",
    "cast_params",
    "merge_lora",
    "param_axes",
    "quantize_base",
    "scores",
    "split_lora",
    "split_trained",
    "without_lora",
]
