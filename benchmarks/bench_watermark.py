"""Cost of a watermark: embedding and detecting, beside transformers' own.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_watermark.py

Vocabulary 32000, batch 16. Processing: logits of one decoding step after another.
Detecting: 64 texts of 256 random tokens, the model's pass over them not included.
Decoding: whole steps of the 256 x 4 model with and without the watermark, in turn in
one process. transformers' processor is WLLM, which needs no entropies; ours is timed as
that and as SWEET; ours of detecting and decoding is SWEET. Each row is a fresh process
per round; rounds are interleaved. For a first look: `--rounds 1 --calls 1`. Writes
`benchmarks/results/watermark.json`.
"""

import argparse
import statistics
import sys

from _processes import (
    OWN,
    TORCH,
    Benchmark,
    Entry,
    Goal,
    Rows,
    comparison,
    run,
)
from rich.table import Table

PROCESS, SWEET = "jaxpost, process", "jaxpost, process SWEET"
DETECT, DECODE = "jaxpost, detect", "jaxpost, decode"
RIVAL_PROCESS, RIVAL_DETECT = "transformers, process", "transformers, detect"
ENTRIES = (
    Entry(
        PROCESS, OWN, "watermark_jaxpost.py", ("--work=process", "--tau=-1"), times=5
    ),
    Entry(SWEET, OWN, "watermark_jaxpost.py", ("--work", "process"), times=5),
    Entry(RIVAL_PROCESS, TORCH, "watermark_transformers.py", ("--work", "process")),
    Entry(DETECT, OWN, "watermark_jaxpost.py", ("--work", "detect"), times=20),
    Entry(RIVAL_DETECT, TORCH, "watermark_transformers.py", ("--work", "detect")),
    Entry(DECODE, OWN, "watermark_jaxpost.py", ("--work", "decode"), times=3),
)


def problem(entry: Entry, found: dict) -> str | None:
    """Green lists must have their share of random text, and of raised logits."""
    share = found.get("green_fraction", 0.25)
    if abs(share - 0.25) > 0.02:
        return f"green fraction {share:.3f} of random texts"
    if "changed" in found and not 0.05 < found["changed"] < 0.26:
        return f"{found['changed']:.3f} of the logits were raised"
    return None


def summarise(runs: list[dict]) -> dict:
    shares = [run["embedding_share"] for run in runs if "embedding_share" in run]
    return {"embedding_share": statistics.median(shares) if shares else None}


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours of the same work."""
    return comparison(
        f"Watermark, float32, CPU, {args.threads} threads",
        rows,
        lambda name, _: DETECT if name.endswith("detect") else PROCESS,
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises."""
    goals = []
    if DECODE in rows:
        share = rows[DECODE]["embedding_share"]
        goals.append(Goal("embedding over a decoding step", share, 0.08, False))
    for text, ours, rival, bound in (
        ("processing a step, over transformers", PROCESS, RIVAL_PROCESS, 10.0),
        ("detection, over transformers", DETECT, RIVAL_DETECT, 200.0),
    ):
        if ours in rows and rival in rows:
            ratio = rows[ours]["tokens_per_s"] / rows[rival]["tokens_per_s"]
            goals.append(Goal(text, ratio, bound, True))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="watermark",
                description=__doc__,
                entries=ENTRIES,
                unit="calls",
                count=4,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
