"""Equality-constrained problems solved and compared: `jaxpost opt`.

One problem by name, or a suite, by one or several methods; into a JSONL file that can
be continued, a live table, a summary, performance profiles and curves of convergence.
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from tyro.conf import UseAppendAction

from jaxpost import reports, training
from jaxpost.recipes import _json_lines, _opt_board
from jaxpost.recipes._config import to_mapping
from jaxpost.recipes._opt_problems import Task, tasks_of
from jaxpost.recipes._opt_solve import measure, options_of
from jaxpost.solvers import problems

LARGEST_DENSE = 10_000
"""Unknowns beyond which the KKT matrix must not be formed: 0.8 GB."""

METHODS = ("exact", "hybrid", "minres", "block_gaussian", "published-gaussian")
"""Those of a suite, where none is named."""


@dataclasses.dataclass(frozen=True)
class OptConfig:
    """Solve equality-constrained problems, and compare methods on suites of them.

    Attributes:
        problem: A problem of CUTEst, such as HS6, or `pde`.
        suite: All problems of the paper's CUTEst list that sif2jax has, or constrained
            logistic regression on `data`.
        method: One of the solver's (exact, minres, gaussian, kaczmarz, ...), or one
            with the paper's rule and constants (published-gaussian, ...); may be given
            several times. `exact` for a problem, several for a suite, if none is.
        data: File in LIBSVM's format for the logistic suite; may be given several
            times, each of another name: results call it by its name without folder,
            .gz and .txt.
        labels: Map the file's two labels to 1 and -1, or take them as they are.
        grid: Points per side of the PDE problem; may be given several times.
        tolerance: Norm of the KKT residual to reach.
        max_iterations: Outer iterations.
        max_inner: Sketches or Krylov steps per outer iteration.
        matrix_free: Form no matrix (for minres, gaussian and kaczmarz).
        seed: Of the constraints drawn for logistic regression, and of the sketches.
        seeds: How many seeds in a row.
        repeats: Timed runs of each solve; their median counts.
        name: Of the run folder; `opt-` and the problem or suite if not given.
        run_root: Folder of the run folders.
        out: JSONL file of the results; `results.jsonl` in the run folder if not given.
            What it already has, of the same settings and data, is not solved again.
        progress: A live table, plain lines, or nothing.

    Raises:
        ValueError: settings that contradict each other.
    """

    problem: str | None = None
    suite: Literal["cutest", "logistic"] | None = None
    method: UseAppendAction[tuple[str, ...]] = ()
    data: UseAppendAction[tuple[str, ...]] = ()
    labels: Literal["signs", "raw"] = "signs"
    grid: UseAppendAction[tuple[int, ...]] = ()
    tolerance: float = 1e-4
    max_iterations: int = 1000
    max_inner: int = 100_000
    matrix_free: bool = False
    seed: int = 0
    seeds: int = 1
    repeats: int = 3
    name: str | None = None
    run_root: str = "runs"
    out: str | None = None
    progress: Literal["auto", "rich", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        if (self.problem is None) == (self.suite is None):
            raise ValueError(
                "give either --problem NAME (such as HS6, or pde), or --suite cutest "
                "or logistic."
            )
        if (self.suite == "logistic") != bool(self.data):
            raise ValueError(
                "--suite logistic and --data FILE (LIBSVM's format) need each other."
            )
        if self.grid and (self.problem or "").lower() != "pde":
            raise ValueError("--grid is for --problem pde.")
        for name in ("seeds", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        for method in self.methods:
            self.options(method)

    @property
    def methods(self) -> tuple[str, ...]:
        """Those asked for, each once."""
        default = ("exact",) if self.suite is None else METHODS
        return tuple(dict.fromkeys(self.method or default))

    def options(self, method: str) -> Any:
        """The solver's settings for a method."""
        changes: dict[str, Any] = {
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "max_inner": self.max_inner,
        }
        if self.matrix_free:
            changes |= {
                "matrix_free": True,
                "accuracy": "relative",
                "hessian_check": "none",
                "guard": "none",
            }
        return options_of(method, **changes)

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        kind = self.suite or str(self.problem)
        return pathlib.Path(self.run_root) / (self.name or f"opt-{kind.lower()}")


def run_opt(config: OptConfig) -> dict[str, Any]:
    """Solves what `config` names and writes the run folder.

    A line of the results holds `id`, `problem`, `method`, `seed`, hashes of `settings`
    and of the `data` file, `status` (`infeasible` where the constraints that were drawn
    contradict each other), counts, residuals, seconds and `kkt_history`. The folder
    gets `summary.json` and, where matplotlib is installed, `convergence.svg` and, of
    several methods on several problems, `profiles.svg`. 64-bit mode is on meanwhile.

    Returns:
        The summary: by method, how many were solved of how many, medians and times.

    Raises:
        ImportError: CUTEst is asked for and sif2jax is not installed.
        ValueError: no such problem (names close ones), it is not one of equality
            constraints, a bad grid or data file, two data files of one name, or
            results of other settings or data.
    """
    with jax.enable_x64(True):
        return _run(config)


def _run(config: OptConfig) -> dict[str, Any]:
    settings, folder = to_mapping(config), config.folder
    quiet = config.progress == "none"
    tasks = tasks_of(config, (lambda _: None) if quiet else print)
    with training.create_run(
        folder,
        settings,
        seeds={"first": config.seed},
        data=_data_of(tasks),
        resume=folder.exists(),
    ):
        path = pathlib.Path(config.out) if config.out else folder / "results.jsonl"
        lines = _solve_missing(path, tasks, config)
        summary = _summarise(lines, config)
        _write(folder, lines, summary)
    _show(lines, config, folder, path)
    return summary


def _solve_missing(
    path: pathlib.Path, tasks: Sequence[Task], config: OptConfig
) -> list[dict[str, Any]]:
    """All lines of a run in its order, after solving and appending those missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _read(path, tasks, config)
    wanted = [(task, method) for task in tasks for method in config.methods]
    missing = [pair for pair in wanted if _id(*pair) not in found]
    known = [found[_id(*pair)] for pair in wanted if _id(*pair) in found]
    board = _opt_board.make_board(config.progress, config.methods, len(wanted), known)
    if known:
        board.note(f"{path} already has {len(known)} of {len(wanted)} solves")
    try:
        with path.open("a", encoding="utf-8") as file:
            for task, method in missing:
                board.begin(task.name, method)
                line = _solve(task, method, config)
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                found[line["id"]] = line
                board.add(line)
    finally:
        board.close()
    return [found[_id(*pair)] for pair in wanted]


def _solve(task: Task, method: str, config: OptConfig) -> dict[str, Any]:
    line = {
        "id": _id(task, method),
        "problem": task.name,
        "method": method,
        "seed": task.seed,
        "settings": _digest(config, method),
        "data": task.data,
    }
    try:
        problem = task.make()
    except problems.InfeasibleError as error:  # a finding
        return {**line, "status": "infeasible", "explained": str(error)}
    _check_size(problem, config)
    _, facts = measure(
        problem,
        config.options(method),
        key=jax.random.key(task.seed),
        repeats=config.repeats,
    )
    return line | facts


def _check_size(problem: problems.Problem, config: OptConfig) -> None:
    size = problem.num_variables + problem.num_constraints
    if size > LARGEST_DENSE and not config.matrix_free:
        raise ValueError(
            f"{problem.name} has {size} unknowns: its matrix takes "
            f"{8 * size**2 / 2**30:.0f} GiB; solve it with --matrix-free --method "
            "minres."
        )


def _id(task: Task, method: str) -> str:
    return f"{task.name}/{method}/{task.seed}"


def _digest(config: OptConfig, method: str) -> str:
    """What else decides a line but the problem and its data.

    A file holds lines of one such setting per method.
    """
    content = [
        dataclasses.asdict(config.options(method)),
        config.repeats,
        config.labels,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _data_of(tasks: Sequence[Task]) -> dict[str, str]:
    """Hashes of data files by what results call them."""
    return {task.name: task.data for task in tasks if task.data is not None}


def _read(
    path: pathlib.Path, tasks: Sequence[Task], config: OptConfig
) -> dict[str, dict[str, Any]]:
    """Lines of a file by id.

    Raises:
        ValueError: a line is none of this command's, or of other settings or data.
    """
    now = {method: _digest(config, method) for method in config.methods}
    data = _data_of(tasks)
    lines = {}
    for number, line in _json_lines.read(path):
        try:
            method, settings, name = line["method"], line["settings"], line["id"]
            problem, read_from = line["problem"], line.get("data")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is not a line of solves ({error!r}); name another "
                "--out, or move this file away."
            ) from error
        if settings != now.get(method, settings):
            raise ValueError(
                f"{path}:{number} was solved by {method} with other settings "
                f"({settings}, now {now[method]}); give those again, name another "
                "--out, or move this file away."
            )
        if read_from != data.get(problem, read_from):
            raise ValueError(
                f"{path}:{number} was solved on another file named {problem} (hash "
                f"{read_from}, now {data[problem]}); give that file again, name "
                "another --out, or move this file away."
            )
        lines[name] = line
    return lines


def _by_method(
    lines: Sequence[dict[str, Any]], methods: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    return {name: [x for x in lines if x["method"] == name] for name in methods}


def _summarise(lines: Sequence[dict[str, Any]], config: OptConfig) -> dict[str, Any]:
    summary: dict[str, Any] = {"settings": to_mapping(config), "methods": {}}
    for method, found in _by_method(lines, config.methods).items():
        ran = [line for line in found if "iterations" in line]
        solved = [line for line in ran if line["status"] == "converged"]
        iterations = [line["iterations"] for line in solved]
        summary["methods"][method] = {
            "problems": len(ran),
            "solved": len(solved),
            "not_solved": {
                f"{x['problem']}/{x['seed']}": x["status"]
                for x in ran
                if x["status"] != "converged"
            },
            "infeasible": len(found) - len(ran),
            "median_iterations": statistics.median(iterations) if solved else None,
            "solve_s": sum(line["solve_s"] for line in ran),
            "compile_s": sum(line["compile_s"] for line in ran),
        }
    return summary


def _write(
    folder: pathlib.Path, lines: Sequence[dict[str, Any]], summary: Mapping[str, Any]
) -> None:
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return
    groups = _by_method([x for x in lines if "iterations" in x], summary["methods"])
    groups = {name: found for name, found in groups.items() if found}
    if not groups:
        return
    histories = {n: [_curve(x) for x in found] for n, found in groups.items()}
    reports.draw_convergence(histories, folder / "convergence.svg")
    if len(groups) > 1 and len(lines) > len(groups):
        reports.draw_profiles(
            {
                "time": _costs(groups, "solve_s"),
                "iterations": _costs(groups, "iterations"),
                "f, c evaluations": _costs(groups, "objective_evaluations"),
            },
            folder / "profiles.svg",
        )


def _curve(line: Mapping[str, Any]) -> list[float]:
    return [float("nan") if x is None else x for x in line["kkt_history"]]


def _costs(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], name: str
) -> dict[str, list[float]]:
    """By method, infinite where a problem was not solved; at least one of a count."""

    def cost(line: Mapping[str, Any]) -> float:
        if line["status"] != "converged":
            return float("inf")
        return float(line[name] or 1)

    return {method: [cost(x) for x in found] for method, found in groups.items()}


def _show(
    lines: Sequence[dict[str, Any]],
    config: OptConfig,
    folder: pathlib.Path,
    path: pathlib.Path,
) -> None:
    if config.progress == "none":
        return
    import rich.console

    console = rich.console.Console()
    console.print(_opt_board.summary_table(_by_method(lines, config.methods)))
    for text in _remarks(lines):
        console.print(text, highlight=False)
    console.print(f"results {path}, run folder {folder}", soft_wrap=True)


def _remarks(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What did not converge and why; a converged solve above the known optimum."""
    for line in lines:
        where = f"{line['problem']}, {line['method']}, seed {line['seed']}"
        if line["status"] != "converged":
            yield f"{where}: {line['explained']}"
        elif line["optimum"] is not None and _off(line):
            yield (
                f"{where}: objective {line['objective']:.9g}, best known "
                f"{line['optimum']:.9g}"
            )


def _off(line: Mapping[str, Any]) -> bool:
    scale = max(1.0, abs(line["optimum"]))
    return abs(line["objective"] - line["optimum"]) > 1e-3 * scale
