"""Benchmarks whose rows are programs: a fresh process per row and round, interleaved.

A slow minute of the machine hits every row; everyone gets the same threads, sizes and
allocator settings. A row is a script under `rivals/` that prints one JSON line.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
HUGE_PAGES = "glibc.malloc.hugetlb=1"
TORCH, TUNIX, OWN = ".venv-rivals-torch", ".venv-rivals-tunix", ".venv"

Rows = dict[str, dict]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: which script in which environment, with which flags.

    `without` are sizes of the benchmark's that the script does not know; `times`
    multiplies how much is timed, for rows that are short.
    """

    name: str
    env: str
    script: str
    flags: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    times: int = 1

    @property
    def python(self) -> pathlib.Path:
        return ROOT / self.env / "bin" / "python"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A promise about our row and a rival's: `value` compared with `bound`."""

    text: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return (self.value >= self.bound) == self.at_least or self.value == self.bound

    def __str__(self) -> str:
        verdict = "[green]met[/]" if self.met else "[red]missed[/]"
        sign = "at least" if self.at_least else "at most"
        return f"{verdict} {self.text}: {self.value:.2f} ({sign} {self.bound})"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks of processes.

    Fields:
        name: of the JSON file under `results/`.
        description: for `--help`.
        entries: the rows.
        unit: what is timed and counted by a flag, "steps" or "calls".
        count: how many by default.
        problem: why a row's result is not the same computation, or None.
        summarise: adds the benchmark's own figures to a row's summary.
        table: shows the rows.
        judge: the promises, as far as the rows were measured.
        rate: what rows count per second, the `x` of their key `x_per_s`.
    """

    name: str
    description: str | None
    entries: tuple[Entry, ...]
    unit: str
    count: int
    problem: Callable[[Entry, dict], str | None]
    summarise: Callable[[list[dict]], dict]
    table: Callable[[Rows, argparse.Namespace], Table]
    judge: Callable[[Rows], list[Goal]]
    rate: str = "tokens"


def run(benchmark: Benchmark) -> int:
    """Measures, prints and writes everything; 0 if every promise is kept."""
    args = _parse(benchmark)
    console = Console(width=max(Console().width, 110))
    chosen = [e for e in benchmark.entries if not args.only or e.name in args.only]
    entries = [entry for entry in chosen if entry.python.exists()]
    for entry in chosen:
        if entry not in entries:
            console.print(
                f"{entry.name}: no {entry.env}; run benchmarks/rivals/setup.sh"
            )
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]load average {load:.1f}: the machine is not idle[/]")
    results: dict[str, list[dict]] = {entry.name: [] for entry in entries}
    for number in range(1, args.rounds + 1):
        for entry in entries:
            found, problem = _measure(benchmark, entry, args)
            if problem is not None:
                console.print(f"[red]{entry.name}: {problem}[/]")
                continue
            results[entry.name].append(found)
            console.print(
                f"round {number}: {entry.name:<31}"
                f"{found[f'{benchmark.rate}_per_s']:8.5g} {benchmark.rate}/s "
                f"{found['peak_bytes'] / 2**20:8.0f} MiB"
            )
    rows = {
        name: _summarise(runs, benchmark.rate) | benchmark.summarise(runs)
        for name, runs in results.items()
        if runs
    }
    table = benchmark.table(rows, args)
    table.caption = (
        f"{machine()['cpu']}; median of {args.rounds} rounds of {args.count} "
        f"{benchmark.unit}; GLIBC_TUNABLES={HUGE_PAGES}"
    )
    console.print(table)
    goals = benchmark.judge(rows)
    for goal in goals:
        console.print(str(goal))
    _save(benchmark, args, rows, goals)
    console.print(f"wrote {args.out}")
    return 0 if goals and all(goal.met for goal in goals) else 1


def fastest_ratio(
    rows: Rows, ours: str, is_rival: Callable[[str, dict], bool]
) -> float | None:
    """Our tokens/s over those of the fastest rival row; None without one."""
    rivals = [row["tokens_per_s"] for name, row in rows.items() if is_rival(name, row)]
    return rows[ours]["tokens_per_s"] / max(rivals) if rivals else None


def comparison(
    title: str,
    rows: Rows,
    ours_of: Callable[[str, dict], str],
    extra: tuple[tuple[str, str], ...] = (),
) -> Table:
    """A table of all rows, each compared with one of ours.

    Args:
        title: above the sizes.
        rows: by name; ours begin with "jaxpost" and are not compared.
        ours_of: the name of our row that a rival's is compared with.
        extra: headings and keys of further columns, in seconds.
    """
    result = Table(title=f"{title}\n{_sizes_of(rows)}")
    result.add_column("")
    headings = ("tokens/s", "range", "ours / it", "peak MiB", "ours / it")
    for heading in (*headings, *(heading for heading, _ in extra)):
        result.add_column(heading, justify="right")
    result.add_column("settings")
    for name, row in rows.items():
        ours = None if name.startswith("jaxpost") else rows.get(ours_of(name, row))
        speed = memory = "-"
        if ours is not None:
            speed = f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}"
            memory = f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"
        result.add_row(
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{row['slowest']:.0f}-{row['fastest']:.0f}",
            speed,
            f"{row['peak_bytes'] / 2**20:.0f}",
            memory,
            *(f"{row[key]:.1f}" for _, key in extra),
            f"{row['settings']} ({row['versions']})",
        )
    return result


def _sizes_of(rows: Rows) -> str:
    """The model's sizes, for a table's title."""
    first = next(iter(rows.values()), {"sizes": {}})
    return " ".join(f"{name}={value}" for name, value in first["sizes"].items())


def machine() -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "load": os.getloadavg()[0],
    }


def _parse(benchmark: Benchmark) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=benchmark.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    unit = benchmark.unit
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        f"--{unit}",
        dest="count",
        type=int,
        default=benchmark.count,
        help=f"timed {unit} per process",
    )
    parser.add_argument("--warmup", type=int, default=2, help=f"{unit} before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON of sizes")
    parser.add_argument("--only", action="append", help="a row's name; repeatable")
    parser.add_argument("--timeout", type=float, default=900.0, help="s per process")
    out = HERE / "results" / f"{benchmark.name}.json"
    parser.add_argument("--out", type=pathlib.Path, default=out)
    args = parser.parse_args()
    names = [entry.name for entry in benchmark.entries]
    for name in args.only or ():
        if name not in names:
            parser.error(f"no row {name!r}; rows: {'; '.join(names)}")
    return args


def _measure(
    benchmark: Benchmark, entry: Entry, args: argparse.Namespace
) -> tuple[dict, str | None]:
    """One process of one row: what it printed, and what is wrong with it."""
    command = [str(entry.python), str(HERE / "rivals" / entry.script), *entry.flags]
    sizes = {k: v for k, v in args.sizes.items() if k not in entry.without}
    count = args.count * entry.times
    command += [f"--{benchmark.unit}", str(count), "--warmup", str(args.warmup)]
    command += ["--threads", str(args.threads), "--sizes", json.dumps(sizes)]
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {
        "GLIBC_TUNABLES": HUGE_PAGES,
        "OMP_NUM_THREADS": str(args.threads),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=args.timeout
        )
    except subprocess.TimeoutExpired:
        return {}, f"no result within {args.timeout:.0f} s"
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {}, f"failed ({done.returncode}): {words[0]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found, benchmark.problem(entry, found)


def _summarise(runs: list[dict], rate: str) -> dict:
    """Median speed and memory over rounds, with the range of the speed."""
    speeds = [run[f"{rate}_per_s"] for run in runs]
    return {
        **{key: runs[0][key] for key in ("settings", "versions", "threads", "sizes")},
        f"{rate}_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "runs": runs,
    }


def _save(
    benchmark: Benchmark, args: argparse.Namespace, rows: Rows, goals: list[Goal]
) -> None:
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": args.rounds,
        benchmark.unit: args.count,
        "rows": rows,
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(args.out)
