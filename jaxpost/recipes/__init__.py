"""One page per method: a config schema, and the wiring of the rooms below.

Recipes are chosen by the config's `recipe` key and imported only then.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.recipes._config import (
    ConfigError,
    from_mapping,
    read_yaml,
    to_mapping,
    with_flags,
)

RECIPES = {
    "clnr": ("jaxpost.recipes.clnr", "CLNRConfig"),
    "control": ("jaxpost.recipes.control", "ControlConfig"),
    "discriminative": ("jaxpost.recipes.discriminative", "DiscriminativeConfig"),
    "distill": ("jaxpost.recipes.distill", "DistillConfig"),
    "dpo": ("jaxpost.recipes.dpo", "DPOConfig"),
    "grpo": ("jaxpost.recipes.grpo", "GRPOConfig"),
    "ppo": ("jaxpost.recipes.ppo", "PPOConfig"),
    "reward": ("jaxpost.recipes.reward", "RewardConfig"),
    "self_rewarding_ppo": (
        "jaxpost.recipes.self_rewarding_ppo",
        "SelfRewardingPPOConfig",
    ),
    "sft": ("jaxpost.recipes.sft", "SFTConfig"),
}

__all__ = [
    "RECIPES",
    "ConfigError",
    "check_data",
    "config_type",
    "load_config",
    "run",
    "to_mapping",
    "with_flags",
]


def load_config(path: str | None, flags: Sequence[str] = (), *, prog: str) -> Any:
    """The recipe's config in a YAML file, with flags applied.

    Args:
        path: the file; None takes the defaults of fine-tuning (for `--help`).
        flags: `--section.key value` words.
        prog: how the program was called, for its help.

    Raises:
        ConfigError: the file, its recipe, a key or a value is wrong.
    """
    values = {} if path is None else read_yaml(path)
    config = from_mapping(config_type(values, path), values, where=str(path))
    return with_flags(config, flags, prog=prog)


def config_type(values: Mapping[str, Any], path: str | None) -> Any:
    """The config's dataclass of the recipe that `values` name.

    Raises:
        ConfigError: there is no such recipe.
    """
    name = values.get("recipe", "sft")
    if name not in RECIPES:
        raise ConfigError(
            f"{path}: no recipe {name!r}; there are {', '.join(sorted(RECIPES))}."
        )
    module, schema = RECIPES[name]
    return getattr(importlib.import_module(module), schema)


def run(config: Any, *, resume: bool = False) -> Any:
    """Runs the recipe that `config` is for; returns what the recipe returns."""
    module, _ = RECIPES[config.recipe]
    return importlib.import_module(module).run(config, resume=resume)


def check_data(config: Any) -> int:
    """Prints tokens and problems of a config's rows; the number of errors.

    Raises:
        ConfigError: the recipe reads no rows.
    """
    from jaxpost.recipes._check_data import print_check

    if not hasattr(config, "data"):
        raise ConfigError(f"recipe {config.recipe} reads no rows: nothing to check.")
    return print_check(config)
