"""Speed of generation: jaxpost and its rivals, on one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_generate.py

Each measurement is a fresh process; rounds are interleaved, so that a slow minute of
the machine hits everyone. All get the same prompts, lengths, threads and allocator
settings, sample at temperature 1, and run at their best: nothing stops early, no scores
are returned by the rivals. Writes `benchmarks/results/generate.json`.
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
SPEEDS = (
    ("new tokens/s, ours over transformers generate", 4.0, "transformers"),
    ("new tokens/s, ours over Tunix's sampler", 2.0, "Tunix"),
)


def problem(entry: Entry, found: dict) -> str | None:
    """Random weights sample almost evenly; greedy or stuck rows repeat themselves."""
    if not entry.flags and found["distinct"] < 0.5:
        return f"distinct tokens {found['distinct']:.2f}"
    return None


def summarise(runs: list[dict]) -> dict:
    return {
        "first_call_s": statistics.median(run["first_call_s"] for run in runs),
        "traces": max(sum(run.get("traces", {}).values()) for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same filters; tokens are new ones."""
    return comparison(
        f"Generation, float32, CPU, {args.threads} threads",
        rows,
        lambda name, _: OURS + (", top-k top-p" if name.endswith("top-p") else ""),
        extra=(("first call s", "first_call_s"),),
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises; rivals count with the fastest of their variants."""
    if OURS not in rows:
        return []
    goals = []
    for text, bound, prefix in SPEEDS:
        ratio = fastest_ratio(
            rows,
            OURS,
            lambda name, _, p=prefix: name.startswith(p) and not name.endswith("top-p"),
        )
        if ratio is not None:
            goals.append(Goal(text, ratio, bound, True))
    goals.append(Goal("programs traced by ours", rows[OURS]["traces"], 2, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="generate",
                description=__doc__,
                entries=ENTRIES,
                unit="calls",
                count=5,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
