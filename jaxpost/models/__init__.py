"""Decoders as pure functions over plain parameter trees."""

from ._cache import KVCache as KVCache
from ._config import DecoderConfig as DecoderConfig
from ._config import MoEConfig as MoEConfig
from ._config import RopeScaling as RopeScaling
from ._model import Model as Model
from ._model import build as build
from ._model import param_axes as param_axes

__all__ = [
    "DecoderConfig",
    "KVCache",
    "MoEConfig",
    "Model",
    "RopeScaling",
    "build",
    "param_axes",
]
