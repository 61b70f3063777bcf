"""Draws `solvers_pde_scale.svg`: memory and time of the solver on the PDE family.

.venv/bin/python benchmarks/bench_solvers_pde.py   # measures
.venv/bin/python docs/figures/solvers_pde_scale.py
"""

import json
import pathlib

import matplotlib
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parents[1] / "benchmarks" / "results" / "solvers_pde.json"
COLORS = ("#0072B2", "#E69F00", "#D55E00")


def main() -> None:
    rows = json.loads(DATA.read_text("utf-8"))["rows"]
    rows = [row for row in rows if row["status"] == "converged"]
    settings = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        memory, seconds = figure.subplots(1, 2)
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        for color, kind in zip(COLORS, kinds, strict=False):
            mine = [row for row in rows if row["kind"] == kind]
            sizes = [row["n"] for row in mine]
            held = [row["program_bytes"] / 2**20 for row in mine]
            memory.plot(sizes, held, "o-", color=color, markersize=3, label=kind)
            times = [row["solve_s"] for row in mine]
            seconds.plot(sizes, times, "o-", color=color, markersize=3)
        first = next(row for row in rows if row["n"] > 10_000)
        ends = [first["n"] / 100, first["n"] * 100]
        per_unknown = first["program_bytes"] / first["n"] / 2**20
        line = [per_unknown * n for n in ends]
        memory.plot(ends, line, ":", color="#888888", label="proportional to n")
        memory.set(ylabel="memory of the compiled solve, MiB")
        seconds.set(ylabel="time of a solve, s")
        for axes in (memory, seconds):
            axes.set(xscale="log", yscale="log", xlabel="variables n")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        memory.legend(fontsize=7)
        figure.savefig(
            HERE / "solvers_pde_scale.svg", metadata={"Date": None, "Creator": None}
        )


if __name__ == "__main__":
    main()
