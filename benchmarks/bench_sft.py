"""Fine-tuning speed and memory of jaxpost and its rivals, on one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_sft.py

Each measurement is a fresh process; rounds are interleaved, so that a slow minute of
the machine hits everyone. All get the same tokens, threads and allocator settings, and
run at their best: no logging, evaluation, saving or padding, fused or chunked losses
and optimizers where they have them. Writes `benchmarks/results/sft.json`.
"""

import argparse
import math
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

OURS, OURS_REMAT = "jaxpost", "jaxpost, remat"
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
SPEEDS = (
    ("tokens/s, ours over TRL", 2.5, "TRL"),
    ("tokens/s, ours over Tunix", 1.4, "Tunix"),
    ("tokens/s, ours over the transformers loop", 1.2, "transformers"),
    ("tokens/s, ours over a naive JAX step", 1.0, "naive"),
)


def problem(entry: Entry, found: dict) -> str | None:
    """Random weights on random tokens: another loss is another computation."""
    expected = math.log(found["sizes"]["vocab"])
    if abs(found["loss"] - expected) > 0.5:
        return f"loss {found['loss']}, not {expected:.2f}"
    return None


def summarise(runs: list[dict]) -> dict:
    return {
        "remat": runs[0]["remat"],
        "first_step_s": statistics.median(run["first_step_s"] for run in runs),
        "compile_s": statistics.median(run.get("compile_s", math.nan) for run in runs),
        "traces": max(run.get("traces", 0) for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same rematerialisation."""
    return comparison(
        f"Supervised fine-tuning, float32, CPU, {args.threads} threads",
        rows,
        lambda _, row: OURS_REMAT if row["remat"] else OURS,
        extra=(("first step s", "first_step_s"),),
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises, as far as the rows were measured.

    Rivals count with the faster of their variants.
    """
    ours, remat, trl = rows.get(OURS), rows.get(OURS_REMAT), rows.get("TRL")
    if ours is None:
        return []
    goals = []
    for text, bound, prefix in SPEEDS:
        ratio = fastest_ratio(
            rows,
            OURS,
            lambda name, row, p=prefix: name.startswith(p) and not row["remat"],
        )
        if ratio is not None:
            goals.append(Goal(text, ratio, bound, True))
    if trl:
        ratio = ours["peak_bytes"] / trl["peak_bytes"]
        goals.append(Goal("peak memory, ours over TRL", ratio, 0.4, False))
    if trl and remat:
        ratio = remat["peak_bytes"] / trl["peak_bytes"]
        goals.append(Goal("peak memory, ours with remat over TRL", ratio, 0.25, False))
    if remat:
        peak = remat["peak_bytes"] / 2**30
        goals.append(Goal("peak memory, ours with remat, GiB", peak, 1.2, False))
    goals.append(Goal("compile time of our step, s", ours["compile_s"], 6.0, False))
    goals.append(Goal("traces of our step", ours["traces"], 1, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="sft",
                description=__doc__,
                entries=ENTRIES,
                unit="steps",
                count=10,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
