"""Speed of rollouts: continuous batching, static batches and rivals, one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_rollout.py

Two kinds of work. The stream: 512 prompts whose answers have very different lengths
(geometric, mean 64, at most 512), 16 at a time. Everyone gets the same lengths and uses
them only to stop there, but that our static batches have no more room than they need.
Equal work: 16 prompts, 128 tokens each. Each measurement is a fresh process; rounds are
interleaved. Equal work is timed three times as often, being short. A shorter stream
does for a first look: `--rounds 1 --warmup 1 --sizes '{"stream": 128}'`. Writes
`benchmarks/results/rollout.json`.
"""

import argparse
import statistics
import sys

from _processes import (
    OWN,
    TORCH,
    TUNIX,
    Benchmark,
    Entry,
    Goal,
    Rows,
    comparison,
    fastest_ratio,
    run,
)
from rich.table import Table

STREAM, BATCHES = "jaxpost, stream", "jaxpost, stream in batches"
EQUAL = "jaxpost, equal"
STREAM_SIZES = ("stream", "mean_tokens", "most_tokens")
ENTRIES = (
    Entry(STREAM, OWN, "rollout_jaxpost.py"),
    Entry(BATCHES, OWN, "rollout_jaxpost.py", ("--work", "batches")),
    Entry("transformers, stream", TORCH, "rollout_transformers.py"),
    Entry(
        "transformers, stream, continuous",
        TORCH,
        "rollout_transformers.py",
        ("--work", "continuous"),
    ),
    Entry(EQUAL, OWN, "rollout_jaxpost.py", ("--work", "equal"), times=3),
    Entry(
        "transformers, equal",
        TORCH,
        "generate_transformers.py",
        without=STREAM_SIZES,
        times=3,
    ),
    Entry("Tunix, equal", TUNIX, "generate_tunix.py", without=STREAM_SIZES, times=3),
)
SPEEDS = (
    ("the stream, ours over transformers", 8.0, STREAM, "transformers, stream"),
    ("equal work, ours over transformers", 4.5, EQUAL, "transformers, equal"),
    ("equal work, ours over Tunix's sampler", 2.0, EQUAL, "Tunix, equal"),
)


def problem(_: Entry, found: dict) -> str | None:
    """Random weights sample almost evenly; stuck rows repeat themselves."""
    if found["distinct"] < 0.5:
        return f"distinct tokens {found['distinct']:.2f}"
    return None


def summarise(runs: list[dict]) -> dict:
    return {
        "first_call_s": statistics.median(run["first_call_s"] for run in runs),
        "cpu_call_s": statistics.median(run["cpu_call_s"] for run in runs),
        "utilisation": runs[0].get("utilisation"),
        "near": runs[0].get("near"),
        "traces": max(sum(run.get("traces", {}).values()) for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same work; tokens are new ones."""
    return comparison(
        f"Rollouts, float32, CPU, {args.threads} threads",
        rows,
        lambda name, _: EQUAL if name.endswith("equal") else STREAM,
        extra=(("first call s", "first_call_s"),),
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises; rivals count with the fastest of their variants."""
    goals = []
    if STREAM in rows and BATCHES in rows:
        ratio = rows[STREAM]["tokens_per_s"] / rows[BATCHES]["tokens_per_s"]
        goals.append(Goal("the stream, slots over static batches", ratio, 2.0, True))
    for text, bound, ours, prefix in SPEEDS:
        if ours not in rows:
            continue
        ratio = fastest_ratio(rows, ours, lambda name, _, p=prefix: name.startswith(p))
        if ratio is not None:
            goals.append(Goal(text, ratio, bound, True))
    if STREAM in rows:
        traces = rows[STREAM]["traces"]
        goals.append(Goal("programs traced for the stream", traces, 3, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="rollout",
                description=__doc__,
                entries=ENTRIES,
                unit="calls",
                count=1,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
