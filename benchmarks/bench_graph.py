"""Contrastive epochs on Cora: jaxpost beside torch-geometric, same sizes, same run.

    benchmarks/rivals/setup.sh torch    # once: the rivals' environment
    .venv/bin/python benchmarks/bench_graph.py

GRACE with the settings of its repository for Cora (256 and 128 wide, all 2708 nodes in
the loss) and CLNR as published (512 wide, 1024 sampled nodes), an epoch a call and ten
epochs in one program; and whole runs of 20 seeds in one program against one run of one
seed in a program of its own, compilation included. Each measurement is a fresh process;
rounds are interleaved. The rival counts with the fastest of its rows that compute what
the published code computes; a torch row with our ideas (sparse features, three products
instead of four) is shown beside them. Needs cora.npz, see `JAXPOST_GRAPHS`. Writes
`benchmarks/results/graph.json`.
"""

import argparse
import statistics
import sys

from _processes import OWN, TORCH, Benchmark, Entry, Goal, Rows, run
from rich.table import Table

METHODS = ("grace", "clnr")
RIVALS = (
    ("edges", ("--adjacency", "edges")),
    ("sparse", ("--adjacency", "sparse")),
    ("edges, compiled", ("--adjacency", "edges", "--compile")),
)
LEAN = (
    ("lean", ("--adjacency", "sparse", "--features", "sparse", "--loss", "lean")),
    (
        "lean, compiled",
        (
            *("--adjacency", "edges", "--features", "sparse"),
            "--loss",
            "lean",
            "--compile",
        ),
    ),
)
SEEDS, SINGLE = "jaxpost, clnr, 20 seeds in one program", "jaxpost, clnr, one seed"


def entries() -> tuple[Entry, ...]:
    found = []
    for method in METHODS:
        chosen = ("--method", method)
        for mode in ("step", "scan"):
            flags = (*chosen, "--mode", mode)
            found.append(
                Entry(f"jaxpost, {method}, {mode}", OWN, "graph_jaxpost.py", flags)
            )
        for name, flags in (*RIVALS, *LEAN):
            found.append(
                Entry(
                    f"torch-geometric, {method}, {name}",
                    TORCH,
                    "graph_torch.py",
                    (*chosen, *flags),
                )
            )
    seeds = ("--method", "clnr", "--mode", "seeds")
    single = ("--method", "clnr", "--mode", "single")
    return (
        *found,
        Entry(SEEDS, OWN, "graph_jaxpost.py", seeds),
        Entry(SINGLE, OWN, "graph_jaxpost.py", single),
    )


def problem(_: Entry, found: dict) -> str | None:
    """The loss of an untrained encoder is near the logarithm of the negatives."""
    if not 1.0 < found["loss"] < 9.0:
        return f"loss {found['loss']:.2f}"
    return None


def summarise(runs: list[dict]) -> dict:
    names = ("cpu_epoch_s", "compile_s", "loss", "total_s")
    return {
        name: statistics.median(run[name] for run in runs)
        for name in names
        if name in runs[0]
    }


def ours_for(name: str) -> str:
    method = name.split(", ")[1]
    return f"jaxpost, {method}, step"


def table(rows: Rows, args: argparse.Namespace) -> Table:
    result = Table(title=f"Contrastive epochs on Cora, float32, {args.threads} threads")
    headings = ("epochs/s", "range", "step / it", "scan / it", "peak MiB", "compile s")
    result.add_column("")
    for heading in headings:
        result.add_column(heading, justify="right")
    result.add_column("settings")
    for name, row in rows.items():
        step = rows.get(ours_for(name))
        scan = rows.get(ours_for(name).replace("step", "scan"))
        ratios = [
            f"{ours['epochs_per_s'] / row['epochs_per_s']:.2f}"
            if ours is not None and name.startswith("torch")
            else "-"
            for ours in (step, scan)
        ]
        result.add_row(
            name,
            f"{row['epochs_per_s']:.2f}",
            f"{row['slowest']:.2f}-{row['fastest']:.2f}",
            *ratios,
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['compile_s']:.1f}",
            f"{row['settings']} ({row['versions']})",
        )
    return result


def judge(rows: Rows) -> list[Goal]:
    """The project's promises; the rival counts with the fastest published row."""
    goals = []
    for method in METHODS:
        rivals = [f"torch-geometric, {method}, {name}" for name, _ in RIVALS]
        speeds = [rows[name]["epochs_per_s"] for name in rivals if name in rows]
        for mode, bound in (("step", 1.8), ("scan", 2.7)):
            ours = rows.get(f"jaxpost, {method}, {mode}")
            if ours is not None and speeds:
                ratio = ours["epochs_per_s"] / max(speeds)
                text = f"{method}, {mode}, ours over torch-geometric"
                goals.append(Goal(text, ratio, bound, True))
    if SEEDS in rows and SINGLE in rows:
        seeds = rows[SEEDS]["sizes"]["seeds"]
        ratio = rows[SEEDS]["total_s"] / (seeds * rows[SINGLE]["total_s"])
        text = (
            f"{seeds} seeds in one program over {seeds} single runs, compile included"
        )
        goals.append(Goal(text, ratio, 1.0, False))
    return goals


if __name__ == "__main__":
    sys.exit(
        run(
            Benchmark(
                name="graph",
                description=__doc__,
                entries=entries(),
                unit="epochs",
                count=30,
                problem=problem,
                summarise=summarise,
                table=table,
                judge=judge,
                rate="epochs",
            )
        )
    )
