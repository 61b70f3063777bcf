"""Which problems `jaxpost opt` solves: one by name, or a suite, made one at a time."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpost import data
from jaxpost.solvers import problems


class Task(NamedTuple):
    """A problem that is made when its turn comes.

    Fields:
        name: of the problem, unique within a suite and seed.
        seed: of what is drawn for it, and of the sketches.
        make: makes it; `problems.InfeasibleError` where what is drawn for it has no
            feasible point.
        data: hash of the file it is made from; None without one.
    """

    name: str
    seed: int
    make: Callable[[], problems.Problem]
    data: str | None = None


def tasks_of(config: Any, note: Callable[[str], None]) -> list[Task]:
    """The problems of a run, by seed.

    Args:
        config: an `OptConfig`.
        note: told what takes time before the first problem.

    Raises:
        ImportError: CUTEst is asked for and sif2jax is not installed.
        ValueError: no such problem or data file, one that cannot be solved here, or
            two data files of one name.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if config.suite == "logistic":
        return _logistic(config, seeds)
    if (config.problem or "").lower() == "pde":
        makers = {f"PDE-{grid}": _pde_maker(grid) for grid in config.grid or (3,)}
    else:
        note("importing sif2jax (CUTEst), which takes about half a minute")
        names = (config.problem,) if config.problem else problems.cutest_names()
        opened = [problems.from_sif2jax(name) for name in names]
        makers = {problem.name: _constant(problem) for problem in opened}
    return [Task(name, seed, make) for seed in seeds for name, make in makers.items()]


def _logistic(config: Any, seeds: Sequence[int]) -> list[Task]:
    files = [
        (name, problems.read_libsvm(path, labels=config.labels), _digest(path))
        for name, path in _by_stem(config.data).items()
    ]
    return [_logistic_task(*file, seed) for seed in seeds for file in files]


def _logistic_task(
    name: str, read: problems.LibsvmData, digest: str, seed: int
) -> Task:
    def make() -> problems.Problem:
        return problems.constrained_logistic(*read, key=jax.random.key(seed), name=name)

    return Task(name, seed, make, digest)


def _by_stem(paths: Sequence[str]) -> dict[str, str]:
    """Files by what results call them."""
    found: dict[str, str] = {}
    for path in paths:
        name = _stem(path)
        if name in found:
            raise ValueError(
                f"--data {found[name]} and --data {path} would both be {name} in the "
                "results; rename one, or give each a run of its own (--name)."
            )
        found[name] = path
    return found


def _digest(path: str) -> str:
    return data.fingerprint(path)[:16]


def _stem(path: str) -> str:
    return pathlib.Path(path).name.removesuffix(".gz").removesuffix(".txt")


def _pde_maker(grid: int) -> Callable[[], problems.Problem]:
    return lambda: problems.pde(grid)


def _constant(problem: problems.Problem) -> Callable[[], problems.Problem]:
    return lambda: problem
