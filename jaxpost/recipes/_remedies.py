"""Which changes make a run fit that does not: each one is planned, none is guessed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxpost import parallel

Exact = Callable[[Sequence[Any]], list[parallel.Memory]]
Compile = Callable[[Any, int], tuple[Any, tuple[str, ...]]]

HELPS = 0.99
"""A change that leaves more than this share of the memory does not count."""
MOST_DEVICES = 1024
TRIES = 3
"""Numbers of devices to compile for at most."""
ALONE = ("optimizer.mu_dtype", "model.remat", "train.accumulate")
"""Keys that mean something without the other keys of a change."""
WITH_FIRST_MOMENT = ("adamw", "adam", "lion", "muon", "sgd")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes with which a run fits.

    Fields:
        flags: of the command line.
        total: bytes on one device then.
    """

    flags: str
    total: int


@dataclasses.dataclass(frozen=True)
class _Change:
    """Dotted keys of a config and their new values; and the devices, if others."""

    keys: dict[str, Any]
    devices: int | None = None

    def apply(self, config: Any) -> Any:
        for name, value in self.keys.items():
            section, key = name.split(".")
            changed = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: changed})
        return config

    @property
    def flags(self) -> str:
        words = [f"--devices {self.devices}"] if self.devices else []
        return " ".join(words + [f"--{name} {v}" for name, v in self.keys.items()])

    def join(self, other: "_Change") -> "_Change":
        return _Change(self.keys | other.keys, other.devices or self.devices)


def find_remedies(
    config: Any, forecast: Any, limit: int, exact: Exact, compile: Compile
) -> tuple[Remedy, ...]:
    """Changes with which `config` fits into `limit` bytes; empty if none was found.

    First single changes on the same devices, then those of them that help together,
    then more devices.

    Args:
        config: does not fit.
        forecast: of it.
        limit: bytes that a device has.
        exact: bytes that need no compiler, of several configs with whole meshes.
        compile: a forecast for a number of devices.
    """
    config = _with_whole_mesh(config, forecast.mesh)
    found = _on_same_devices(config, forecast, limit, exact, compile)
    return found or _on_more_devices(config, forecast, limit, exact, compile)


def _with_whole_mesh(config: Any, mesh: dict[str, int]) -> Any:
    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    return _Change(sizes | {"mesh.devices": None}).apply(config)


def _on_same_devices(config, forecast, limit, exact, compile) -> tuple[Remedy, ...]:
    base, devices = forecast.memory, forecast.devices
    changes = _single_changes(config, forecast.mesh)
    if not changes:
        return ()
    together = changes[0]
    for change in changes[1:]:
        together = together.join(change)
    *alone, least = exact([one.apply(config) for one in (*changes, together)])
    if least.needed > limit:
        return ()  # whatever the temporaries
    fitting, helping = [], []
    for change, memory in zip(changes, alone, strict=True):
        if memory.needed > limit and memory.exact >= base.exact:
            helping.append((change, base.total))  # if at all, then with others
            continue
        total, fits = _try(change, config, devices, limit, compile)
        if fits:
            fitting.append(Remedy(change.flags, total))
        elif total < HELPS * base.total:
            helping.append((change, total))
    if fitting:
        return tuple(sorted(fitting, key=lambda remedy: remedy.total))
    return _join_helping(config, devices, helping, limit, compile)


def _join_helping(config, devices, helping, limit, compile) -> tuple[Remedy, ...]:
    """The best changes one after the other, until they fit together."""
    joined, best = _Change({}), None
    for change, _ in sorted(helping, key=lambda pair: pair[1]):
        candidate = joined.join(change)
        total, fits = _try(candidate, config, devices, limit, compile)
        if best is not None and total >= HELPS * best:
            continue
        joined, best = candidate, total
        if fits:
            return (_without_needless(joined, total, config, devices, limit, compile),)
    return ()


def _without_needless(joined, total, config, devices, limit, compile) -> Remedy:
    """Changes that were taken before a better one came may not be needed with it."""
    for name in list(joined.keys)[:-1]:
        if name not in ALONE:
            continue
        fewer = _Change({k: v for k, v in joined.keys.items() if k != name})
        smaller, fits = _try(fewer, config, devices, limit, compile)
        if fits:
            joined, total = fewer, smaller
    return Remedy(joined.flags, total)


def _on_more_devices(config, forecast, limit, exact, compile) -> tuple[Remedy, ...]:
    counts, count = [], forecast.devices * 2
    while count <= MOST_DEVICES:
        counts.append(count)
        count *= 2
    changes = [change for n in counts if (change := _arrange(config, n)) is not None]
    sizes = exact([change.apply(config) for change in changes]) if changes else []
    possible = [
        change
        for change, size in zip(changes, sizes, strict=True)
        if size.needed <= limit
    ]
    for change in possible[:TRIES]:
        tried = [change]
        if config.model.remat != "full":
            tried.append(change.join(_Change({"model.remat": "full"})))
        for one in tried:
            total, fits = _try(one, config, change.devices, limit, compile)
            if fits:
                return (Remedy(one.flags, total),)
    return ()


def _try(change, config, devices, limit, compile) -> tuple[int, bool]:
    forecast, _ = compile(change.apply(config), devices)
    return forecast.memory.total, forecast.memory.needed <= limit


def _single_changes(config: Any, mesh: dict[str, int]) -> list[_Change]:
    changes = []
    if mesh["data"] > 1:
        whole = mesh["data"] * mesh["fsdp"]
        changes.append(_Change({"mesh.data": 1, "mesh.fsdp": whole}))
    if config.model.remat != "full":
        changes.append(_Change({"model.remat": "full"}))
    rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"])  # of one device
    fewest = next(
        (
            parts
            for parts in range(config.train.accumulate + 1, rows + 1)
            if rows % parts == 0
        ),
        None,
    )
    if fewest is not None:
        for parts in sorted({fewest, rows}):
            changes.append(_Change({"train.accumulate": parts}))
    optimizer = config.optimizer
    if optimizer.name in WITH_FIRST_MOMENT and optimizer.mu_dtype is None:
        changes.append(_Change({"optimizer.mu_dtype": "bfloat16"}))
    return changes


def _arrange(config: Any, devices: int) -> _Change | None:
    """A mesh of more devices: as many parts of the batch as it has rows, and tensor
    parallelism for the rest; more rows if that is too little."""
    rows = config.train.batch_size // config.train.accumulate
    tensor = config.mesh.tensor
    while devices % tensor == 0 and rows % (devices // tensor) and tensor < 8:
        tensor *= 2
    if devices % tensor:
        return None
    keys = {"mesh.data": 1, "mesh.fsdp": devices // tensor, "mesh.tensor": tensor}
    if rows % (devices // tensor):
        more = devices // tensor * config.train.accumulate
        keys["train.batch_size"] = more
    return _Change(keys, devices)
