"""Fine-tuning speed and memory of jaxpost and its rivals, on one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_sft.py

Each measurement is a fresh process; rounds are interleaved, so that a slow minute of
the machine hits everyone. All get the same tokens, threads and allocator settings, and
run at their best: no logging, evaluation, saving or padding, fused or chunked losses
and optimizers where they have them. Writes `benchmarks/results/sft.json`.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
HUGE_PAGES = "glibc.malloc.hugetlb=1"
OURS, OURS_REMAT = "jaxpost", "jaxpost, remat"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: which script in which environment, with which flags."""

    name: str
    env: str
    script: str
    flags: tuple[str, ...] = ()

    @property
    def remat(self) -> bool:
        return "--remat" in self.flags

    @property
    def python(self) -> pathlib.Path:
        return ROOT / self.env / "bin" / "python"


TORCH, TUNIX, OWN = ".venv-rivals-torch", ".venv-rivals-tunix", ".venv"
ENTRIES = (
    Entry(OURS, OWN, "sft_jaxpost.py"),
    Entry("TRL", TORCH, "sft_trl.py"),
    Entry("TRL, compiled", TORCH, "sft_trl.py", ("--compile", "1")),
    Entry("transformers", TORCH, "sft_transformers.py"),
    Entry("transformers, compiled", TORCH, "sft_transformers.py", ("--compile", "1")),
    Entry("Tunix", TUNIX, "sft_tunix.py"),
    Entry("Tunix, its own loss", TUNIX, "sft_tunix.py", ("--loss", "default")),
    Entry("naive JAX", OWN, "sft_naive_jax.py"),
    Entry(OURS_REMAT, OWN, "sft_jaxpost.py", ("--remat",)),
    Entry("TRL, remat", TORCH, "sft_trl.py", ("--remat",)),
    Entry("transformers, remat", TORCH, "sft_transformers.py", ("--remat",)),
    Entry("Tunix, remat", TUNIX, "sft_tunix.py", ("--remat",)),
    Entry("naive JAX, remat", OWN, "sft_naive_jax.py", ("--remat",)),
)


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


def main() -> int:
    args = parse()
    console = Console(width=max(Console().width, 110))
    chosen = [e for e in ENTRIES if not args.only or e.name in args.only]
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
            found = measure(entry, args, console)
            if found is None:
                continue
            results[entry.name].append(found)
            console.print(
                f"round {number}: {entry.name:<24} "
                f"{found['tokens_per_s']:8.0f} tokens/s "
                f"{found['peak_bytes'] / 2**20:8.0f} MiB"
            )
    rows = {name: summarise(runs) for name, runs in results.items() if runs}
    console.print(table(rows, args))
    goals = judge(rows)
    for goal in goals:
        sign = "at least" if goal.at_least else "at most"
        verdict = "[green]met[/]" if goal.met else "[red]missed[/]"
        console.print(f"{verdict} {goal.text}: {goal.value:.2f} ({sign} {goal.bound})")
    save(args, rows, goals)
    console.print(f"wrote {args.out}")
    return 0 if goals and all(goal.met for goal in goals) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON of sizes")
    parser.add_argument("--only", action="append", help="a row's name; repeatable")
    parser.add_argument("--timeout", type=float, default=900.0, help="s per process")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE / "results" / "sft.json"
    )
    args = parser.parse_args()
    names = [entry.name for entry in ENTRIES]
    for name in args.only or ():
        if name not in names:
            parser.error(f"no row {name!r}; rows: {'; '.join(names)}")
    return args


def measure(entry: Entry, args: argparse.Namespace, console: Console) -> dict | None:
    """One process of one row; None, and its last words, if it failed."""
    command = [str(entry.python), str(HERE / "rivals" / entry.script), *entry.flags]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    command += ["--threads", str(args.threads), "--sizes", json.dumps(args.sizes)]
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
        console.print(f"[red]{entry.name}: no result within {args.timeout:.0f} s[/]")
        return None
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        console.print(f"[red]{entry.name} failed ({done.returncode}):[/] {words[0]}")
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    # Random weights on random tokens: anything else is not the same computation.
    expected = math.log(found["sizes"]["vocab"])
    if abs(found["loss"] - expected) > 0.5:
        console.print(f"[red]{entry.name}: loss {found['loss']}, not {expected:.2f}[/]")
        return None
    return found


def summarise(runs: list[dict]) -> dict:
    """Median speed and memory over rounds, with the range of the speed."""
    speeds = [run["tokens_per_s"] for run in runs]
    return {
        **{
            k: runs[0][k] for k in ("settings", "versions", "remat", "threads", "sizes")
        },
        "tokens_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "first_step_s": statistics.median(run["first_step_s"] for run in runs),
        "compile_s": statistics.median(run.get("compile_s", math.nan) for run in runs),
        "traces": max(run.get("traces", 0) for run in runs),
        "runs": runs,
    }


def table(rows: dict[str, dict], args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same rematerialisation."""
    first = next(iter(rows.values()), {"sizes": {}})
    sizes = " ".join(f"{k}={v}" for k, v in first["sizes"].items())
    result = Table(
        title=f"Supervised fine-tuning, float32, CPU, {args.threads} threads\n{sizes}",
        caption=f"{machine()['cpu']}; median of {args.rounds} rounds of {args.steps} "
        f"steps; GLIBC_TUNABLES={HUGE_PAGES}",
    )
    for name, justify in (
        ("", "left"),
        ("tokens/s", "right"),
        ("range", "right"),
        ("ours / it", "right"),
        ("peak MiB", "right"),
        ("ours / it", "right"),
        ("first step s", "right"),
        ("settings", "left"),
    ):
        result.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for name, row in rows.items():
        ours = rows.get(OURS_REMAT if row["remat"] else OURS)
        speed = memory = "-"
        if ours and name not in (OURS, OURS_REMAT):
            speed = f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}"
            memory = f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"
        result.add_row(
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{row['slowest']:.0f}-{row['fastest']:.0f}",
            speed,
            f"{row['peak_bytes'] / 2**20:.0f}",
            memory,
            f"{row['first_step_s']:.1f}",
            f"{row['settings']} ({row['versions']})",
        )
    return result


def judge(rows: dict[str, dict]) -> list[Goal]:
    """The project's promises, as far as the rows were measured.

    Rivals count with the faster of their variants.
    """
    goals = []
    ours, remat, trl = rows.get(OURS), rows.get(OURS_REMAT), rows.get("TRL")
    if ours is None:
        return goals
    for title, bound, prefix in (
        ("tokens/s, ours over TRL", 2.5, "TRL"),
        ("tokens/s, ours over Tunix", 1.4, "Tunix"),
        ("tokens/s, ours over the transformers loop", 1.2, "transformers"),
        ("tokens/s, ours over a naive JAX step", 1.0, "naive"),
    ):
        rivals = [
            row["tokens_per_s"]
            for name, row in rows.items()
            if name.startswith(prefix) and not row["remat"]
        ]
        if rivals:
            goals.append(Goal(title, ours["tokens_per_s"] / max(rivals), bound, True))
    if trl:
        ratio = ours["peak_bytes"] / trl["peak_bytes"]
        goals.append(Goal("peak memory, ours over TRL", ratio, 0.4, False))
    if trl and remat:
        ratio = remat["peak_bytes"] / trl["peak_bytes"]
        goals.append(Goal("peak memory, ours with remat over TRL", ratio, 0.25, False))
    goals.append(Goal("compile time of our step, s", ours["compile_s"], 6.0, False))
    goals.append(Goal("traces of our step", ours["traces"], 1, False))
    return goals


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


def save(args: argparse.Namespace, rows: dict[str, dict], goals: list[Goal]) -> None:
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": rows,
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(args.out)


if __name__ == "__main__":
    sys.exit(main())
