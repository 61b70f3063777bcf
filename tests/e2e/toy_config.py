"""A run of seconds, shared by tests of whole runs: a fresh model on built-in rows."""

import pathlib
from typing import Any

import yaml

TOY: dict[str, dict[str, Any]] = {
    "model": {
        "tokenizer": "builtin:words",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 128,
    },
    "data": {
        "train": "builtin:arithmetic?count=120&grades=1",
        "eval": "builtin:arithmetic?count=16&grades=1",
        "max_length": 128,
    },
}


def toy_config(**sections: dict[str, Any]) -> dict[str, Any]:
    """The toy's config with keys of `sections` added or changed."""
    names = TOY.keys() | sections.keys()
    merged = {name: TOY.get(name, {}) | sections.get(name, {}) for name in names}
    return {"recipe": "sft", "name": "toy", **merged}


def write_config(folder: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """`config` as `toy.yaml` in `folder`."""
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
