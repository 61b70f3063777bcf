"""Speed of generation: jaxpost and its rivals, on one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_generate.py

Each measurement is a fresh process; rounds are interleaved, so that a slow minute of
the machine hits everyone. All get the same prompts, lengths, threads and allocator
settings, sample at temperature 1, and run at their best: nothing stops early, no scores
are returned by the rivals. Writes `benchmarks/results/generate.json`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

from bench_sft import HERE, HUGE_PAGES, OWN, TORCH, TUNIX, Entry, Goal, machine
from rich.console import Console
from rich.table import Table

OURS = "jaxpost"
STATIC = ("--cache", "static")
FILTERED = ("--top_k", "50", "--top_p", "0.9")
ENTRIES = (
    Entry(OURS, OWN, "generate_jaxpost.py"),
    Entry("transformers", TORCH, "generate_transformers.py"),
    Entry("transformers, static cache", TORCH, "generate_transformers.py", STATIC),
    Entry(
        "transformers, static, compiled",
        TORCH,
        "generate_transformers.py",
        (*STATIC, "--compile"),
    ),
    Entry("Tunix", TUNIX, "generate_tunix.py"),
    Entry("Tunix, log-probs", TUNIX, "generate_tunix.py", ("--logprobs",)),
    Entry("jaxpost, top-k top-p", OWN, "generate_jaxpost.py", FILTERED),
    Entry("transformers, top-k top-p", TORCH, "generate_transformers.py", FILTERED),
    Entry("Tunix, top-k top-p", TUNIX, "generate_tunix.py", FILTERED),
)


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
                f"round {number}: {entry.name:<31}{found['tokens_per_s']:8.0f} tokens/s"
            )
    rows = {name: summarise(runs) for name, runs in results.items() if runs}
    console.print(table(rows, args))
    goals = judge(rows)
    for goal in goals:
        verdict = "[green]met[/]" if goal.met else "[red]missed[/]"
        sign = "at least" if goal.at_least else "at most"
        console.print(f"{verdict} {goal.text}: {goal.value:.2f} ({sign} {goal.bound})")
    save(args, rows, goals)
    console.print(f"wrote {args.out}")
    return 0 if goals and all(goal.met for goal in goals) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="timed calls per process")
    parser.add_argument("--warmup", type=int, default=2, help="calls before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON of sizes")
    parser.add_argument("--only", action="append", help="a row's name; repeatable")
    parser.add_argument("--timeout", type=float, default=900.0, help="s per process")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE / "results" / "generate.json"
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
    command += ["--calls", str(args.calls), "--warmup", str(args.warmup)]
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
    # Random weights sample almost uniformly; greedy or stuck rows repeat themselves.
    if not entry.flags and found["distinct"] < 0.5:
        console.print(f"[red]{entry.name}: distinct tokens {found['distinct']:.2f}[/]")
        return None
    return found


def summarise(runs: list[dict]) -> dict:
    """Median speed and memory over rounds, with the range of the speed."""
    speeds = [run["tokens_per_s"] for run in runs]
    return {
        **{key: runs[0][key] for key in ("settings", "versions", "threads", "sizes")},
        "tokens_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "first_call_s": statistics.median(run["first_call_s"] for run in runs),
        "traces": max(sum(run.get("traces", {}).values()) for run in runs),
        "runs": runs,
    }


def table(rows: dict[str, dict], args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same filters."""
    first = next(iter(rows.values()), {"sizes": {}})
    sizes = " ".join(f"{k}={v}" for k, v in first["sizes"].items())
    result = Table(
        title=f"Generation, float32, CPU, {args.threads} threads\n{sizes}",
        caption=f"{machine()['cpu']}; median of {args.rounds} rounds of {args.calls} "
        f"calls; GLIBC_TUNABLES={HUGE_PAGES}",
    )
    result.add_column("")
    for name in ("new tokens/s", "range", "ours / it", "peak MiB", "first call s"):
        result.add_column(name, justify="right")
    result.add_column("settings")
    for name, row in rows.items():
        filtered = ", top-k top-p" if name.endswith("top-p") else ""
        ours = rows.get(OURS + filtered)
        speed = "-"
        if ours and not name.startswith(OURS):
            speed = f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}"
        result.add_row(
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{row['slowest']:.0f}-{row['fastest']:.0f}",
            speed,
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['first_call_s']:.1f}",
            f"{row['settings']} ({row['versions']})",
        )
    return result


def judge(rows: dict[str, dict]) -> list[Goal]:
    """The project's promises; rivals count with the fastest of their variants."""
    goals = []
    ours = rows.get(OURS)
    if ours is None:
        return goals
    for title, bound, prefix in (
        ("new tokens/s, ours over transformers generate", 4.0, "transformers"),
        ("new tokens/s, ours over Tunix's sampler", 2.0, "Tunix"),
    ):
        rivals = [
            row["tokens_per_s"]
            for name, row in rows.items()
            if name.startswith(prefix) and not name.endswith("top-p")
        ]
        if rivals:
            goals.append(Goal(title, ours["tokens_per_s"] / max(rivals), bound, True))
    goals.append(Goal("programs traced by ours", ours["traces"], 2, False))
    return goals


def save(args: argparse.Namespace, rows: dict[str, dict], goals: list[Goal]) -> None:
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": args.rounds,
        "calls": args.calls,
        "rows": rows,
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(args.out)


if __name__ == "__main__":
    sys.exit(main())
