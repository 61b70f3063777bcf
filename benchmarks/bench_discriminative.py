"""Discriminative fine-tuning's step against fine-tuning on the same tokens.

    .venv/bin/python benchmarks/bench_discriminative.py --rounds 2  # about 5 minutes

A prompt of 128 tokens with a right answer and 2, 4 or 8 negatives of 128 tokens each,
joined in one row as the recipe has them; about 24 answers a step. The yardstick is our
own step of recipe `sft` on the very same rows with the same tokens trained on: the
forward and backward passes alone. The reference's log-probs are computed beforehand
(not timed); one row has the reference live, one is DFT2, which needs none. Each
measurement is a fresh process, rounds are interleaved. Writes
`benchmarks/results/discriminative.json`.
"""

import argparse
import math
import statistics
import sys

from _processes import OWN, Benchmark, Entry, Goal, Rows, comparison, run
from rich.table import Table

SCRIPT = "discriminative_jaxpost.py"
NEGATIVES = (2, 4, 8)
LIMIT = 1.15


def ours(negatives: int) -> str:
    return f"jaxpost, {negatives} negatives"


def yardstick(negatives: int) -> str:
    return f"SFT, {1 + negatives} answers a row"


def _entry(name: str, negatives: int, *flags: str) -> Entry:
    return Entry(name, OWN, SCRIPT, ("--negatives", str(negatives), *flags))


ENTRIES = (
    *(
        entry
        for n in NEGATIVES
        for entry in (
            _entry(ours(n), n),
            _entry(yardstick(n), n, "--method", "sft"),
        )
    ),
    _entry("jaxpost, 2 negatives, DFT2", 2, "--method", "dft2"),
    _entry("jaxpost, 2 negatives, reference live", 2, "--reference", "live"),
)


def problem(entry: Entry, found: dict) -> str | None:
    """Random weights on random tokens: the loss of SFT is known, ours only finite."""
    expected = math.log(found["sizes"]["vocab"])
    if found["method"] == "sft" and abs(found["loss"] - expected) > 0.5:
        return f"loss {found['loss']}, not {expected:.2f}"
    return None if math.isfinite(found["loss"]) else "loss is not finite"


def summarise(runs: list[dict]) -> dict:
    return {
        "method": runs[0]["method"],
        "negatives": runs[0]["negatives"],
        "step_s": statistics.median(run["step_s"] for run in runs),
        "cpu_step_s": statistics.median(run["cpu_step_s"] for run in runs),
        "compile_s": statistics.median(run["compile_s"] for run in runs),
        "traces": max(run["traces"] for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, the yardsticks compared with ours of as many answers."""
    return comparison(
        f"Discriminative fine-tuning, float32, CPU, {args.threads} threads",
        rows,
        lambda _, row: ours(row["negatives"]),
        extra=(("step s", "step_s"), ("compile s", "compile_s")),
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises, as far as the rows were measured."""
    goals = []
    for n in NEGATIVES:
        if ours(n) in rows and yardstick(n) in rows:
            ratio = rows[ours(n)]["step_s"] / rows[yardstick(n)]["step_s"]
            text = f"step time with {n} negatives over SFT on the same tokens"
            goals.append(Goal(text, ratio, LIMIT, False))
        if ours(n) in rows:
            traces = rows[ours(n)]["traces"]
            goals.append(Goal(f"traces of our step, {n} negatives", traces, 1, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="discriminative",
                description=__doc__,
                entries=ENTRIES,
                unit="steps",
                count=5,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
