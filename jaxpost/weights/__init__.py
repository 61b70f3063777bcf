"""Other people's checkpoint formats, both ways; the only room that knows them."""

from jaxpost.weights._adapter import load_adapter, save_adapter
from jaxpost.weights._card import ModelCard
from jaxpost.weights._config import FAMILIES, from_hf_config, to_hf_config
from jaxpost.weights._convert import convert
from jaxpost.weights._errors import WeightsError
from jaxpost.weights._load import load
from jaxpost.weights._names import TOLERATED
from jaxpost.weights._save import hf_tensors, save
from jaxpost.weights._special import SpecialIds, special_ids
from jaxpost.weights._verify import ExportReport, verify_export

__all__ = [
    "FAMILIES",
    "TOLERATED",
    "ExportReport",
    "ModelCard",
    "SpecialIds",
    "WeightsError",
    "convert",
    "from_hf_config",
    "hf_tensors",
    "load",
    "load_adapter",
    "save",
    "save_adapter",
    "special_ids",
    "to_hf_config",
    "verify_export",
]
