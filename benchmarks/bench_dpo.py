"""DPO speed and memory of jaxpost and its rivals, on one small Llama.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_dpo.py

Eight pairs of two sequences of 256 tokens a step, half of each the prompt; the
reference live, or its log-probs computed beforehand (not timed). Tunix cannot compute
them beforehand; its row "no reference" is another loss at the same cost. Each
measurement is a fresh process, rounds are interleaved. Writes
`benchmarks/results/dpo.json`.
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

COLUMNS = ("--reference", "precomputed")
OURS, OURS_COLUMNS = "jaxpost", "jaxpost, precomputed"
ENTRIES = (
    Entry(OURS, OWN, "dpo_jaxpost.py"),
    Entry("TRL", TORCH, "dpo_trl.py"),
    Entry("TRL, compiled", TORCH, "dpo_trl.py", ("--compile", "1")),
    Entry("Tunix", TUNIX, "dpo_tunix.py"),
    Entry("jaxpost, r3m", OWN, "dpo_jaxpost.py", ("--loss", "r3m")),
    Entry("jaxpost, remat", OWN, "dpo_jaxpost.py", ("--remat",)),
    Entry(OURS_COLUMNS, OWN, "dpo_jaxpost.py", COLUMNS),
    Entry("TRL, precomputed", TORCH, "dpo_trl.py", COLUMNS),
    Entry(
        "TRL, precomputed, compiled", TORCH, "dpo_trl.py", (*COLUMNS, "--compile", "1")
    ),
    Entry("Tunix, no reference", TUNIX, "dpo_tunix.py", COLUMNS),
)


def problem(entry: Entry, found: dict) -> str | None:
    """A policy near its reference has the loss log 2; without one, nothing is known."""
    if entry.name == "Tunix, no reference":
        return None if math.isfinite(found["loss"]) else "loss is not finite"
    if abs(found["loss"] - math.log(2.0)) > 0.3:
        return f"loss {found['loss']}, not near {math.log(2.0):.2f}"
    return None


def summarise(runs: list[dict]) -> dict:
    return {
        "reference": runs[0]["reference"],
        "remat": runs[0]["remat"],
        "first_step_s": statistics.median(run["first_step_s"] for run in runs),
        "compile_s": statistics.median(run.get("compile_s", math.nan) for run in runs),
        "traces": max(run.get("traces", 0) for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same kind of reference."""
    return comparison(
        f"DPO, float32, CPU, {args.threads} threads",
        rows,
        lambda _, row: OURS if row["reference"] == "live" else OURS_COLUMNS,
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises, as far as the rows were measured.

    Rivals count with the faster of their variants; Tunix, which cannot precompute, with
    its live reference.
    """
    goals = []
    for ours, reference, bounds in (
        (OURS, "live", {"TRL": 4.0, "Tunix": 1.6}),
        (OURS_COLUMNS, "precomputed", {"TRL": 5.0}),
        (OURS_COLUMNS, "live", {"Tunix": 2.0}),
    ):
        if ours not in rows:
            continue
        for rival, bound in bounds.items():
            ratio = fastest_ratio(
                rows,
                ours,
                lambda name, row, rival=rival, reference=reference: (
                    name.startswith(rival) and row["reference"] == reference
                ),
            )
            if ratio is not None:
                text = f"tokens/s, {ours} over {rival}, its reference {reference}"
                goals.append(Goal(text, ratio, bound, True))
    if OURS in rows and "TRL" in rows:
        ratio = rows[OURS]["peak_bytes"] / rows["TRL"]["peak_bytes"]
        goals.append(Goal("peak memory, ours over TRL", ratio, 0.45, False))
    if OURS in rows:
        goals.append(Goal("traces of our step", rows[OURS]["traces"], 1, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="dpo",
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
