"""Post-training of language models in JAX: pure losses, sharded training, sampling.

Rooms are imported one by one (`from jaxpost import losses`); importing the package
itself loads none of them.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_ROOMS = frozenset(
    {
        "advantages",
        "data",
        "evaluation",
        "generation",
        "graphs",
        "losses",
        "models",
        "ops",
        "parallel",
        "prompts",
        "recipes",
        "reports",
        "rewards",
        "sandbox",
        "testing",
        "training",
        "typing",
        "weights",
    }
)


def __getattr__(name: str):
    if name in _ROOMS:
        return _import_module(f"jaxpost.{name}")
    raise AttributeError(f"module 'jaxpost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_ROOMS | set(globals()))
