"""Speed and memory of one GRPO step, rollout included, ours and its rivals'.

    benchmarks/rivals/setup.sh          # once: the rivals' environments
    .venv/bin/python benchmarks/bench_grpo.py

Eight prompts of 64 tokens, eight answers of 128 tokens to each, a reward that costs
nothing, one update, no reference model; one small Llama. Ours is the recipe itself,
from a config to the end, and returns log-probabilities and entropies of the sampler
besides. Tokens/s are new tokens over the whole step; a step is shown in its parts, the
rollout (drawing, and with the rivals rewards and advantages) and the rest. Each
measurement is a fresh process, rounds are interleaved. For a first look: `--rounds 1
--warmup 1 --steps 2`. Writes `benchmarks/results/grpo.json`.
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

OURS = "jaxpost"
ENTRIES = (
    Entry(OURS, OWN, "grpo_jaxpost.py"),
    Entry("TRL", TORCH, "grpo_trl.py"),
    Entry("TRL, compiled", TORCH, "grpo_trl.py", ("--compile", "1")),
    Entry("TRL, 8 at a time", TORCH, "grpo_trl.py", ("--microbatch", "8")),
    Entry("Tunix, 2 prompts at a time", TUNIX, "grpo_tunix.py", ("--microbatch", "2")),
)


def problem(_: Entry, found: dict) -> str | None:
    """Advantages of a group add up to zero, so on its first step the loss does."""
    loss = found.get("loss", 0.0)
    if not math.isfinite(loss) or abs(loss) > 0.01:
        return f"loss {loss}, where ratios of one and centred advantages give zero"
    return None


def summarise(runs: list[dict]) -> dict:
    names = ("step_s", "cpu_step_s", "rollout_s", "update_s", "first_step_s")
    return {
        **{name: statistics.median(run[name] for run in runs) for name in names},
        "traces": max(run.get("traces", 0) for run in runs),
        "compiled_later": max(run.get("compiled_later", 0) for run in runs),
    }


def table(rows: Rows, args: argparse.Namespace) -> Table:
    """All rows, each compared with ours."""
    return comparison(
        f"GRPO, float32, CPU, {args.threads} threads",
        rows,
        lambda *_: OURS,
        extra=(
            ("step s", "step_s"),
            ("rollout s", "rollout_s"),
            ("rest s", "update_s"),
        ),
    )


def judge(rows: Rows) -> list[Goal]:
    """The project's promises; rivals count with the fastest of their variants."""
    if OURS not in rows:
        return []
    goals = []
    ratio = fastest_ratio(rows, OURS, lambda name, _: name.startswith("TRL"))
    if ratio is not None:
        text = "new tokens/s of a whole step, ours over TRL"
        goals.append(Goal(text, ratio, 3.5, True))
    goals.append(Goal("traces of our step", rows[OURS]["traces"], 1, False))
    later = rows[OURS]["compiled_later"]
    goals.append(Goal("programs compiled after the first step", later, 0, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="grpo",
                description=__doc__,
                entries=ENTRIES,
                unit="steps",
                count=3,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
            )
        )
    )
