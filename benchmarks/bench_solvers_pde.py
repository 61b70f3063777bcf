"""Memory and time of the solver on the PDE family, matrix-free and dense, by size.

    .venv/bin/python benchmarks/bench_solvers_pde.py   # about 3 minutes

Each row is a fresh process that solves one grid to a KKT residual of 1e-8 times the
first. `program` is what the compiled solve holds, as XLA counts it: arguments, results
and temporary arrays. `peak` is the process's largest resident set, interpreter, JAX and
compiler included. Writes `benchmarks/results/solvers_pde.json`, which
`docs/figures/solvers_pde_scale.py` draws.
"""

import argparse
import datetime
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
from _processes import HERE, Goal, machine
from rich.console import Console
from rich.table import Table

FREE = "MINRES with the sine-transform preconditioner, matrix-free"
PLAIN = "MINRES, matrix-free"
DENSE = "exact, dense"
GRIDS = {
    FREE: (10, 22, 50, 100, 158, 224, 500, 708),
    PLAIN: (5, 10, 22, 50),
    DENSE: (5, 10, 22, 32, 40),
}
REDUCTION = 1e-8


def measure(kind: str, grid: int) -> dict:
    """Solves one grid in this process."""
    import jax
    import jax.numpy as jnp

    from jaxpost import solvers
    from jaxpost.solvers import problems

    jax.config.update("jax_enable_x64", True)
    problem = problems.pde(grid)
    first = float(jnp.linalg.norm(_conditions(problem)))
    choices = {"tolerance": REDUCTION * first, "delta": REDUCTION}
    choices |= {"delta_min": REDUCTION, "max_iterations": 20, "max_inner": 1_000_000}
    if kind != DENSE:
        choices |= {"method": "minres", "matrix_free": True, "guard": "none"}
        choices |= {"hessian_check": "none"}
    options = solvers.SolveOptions(**choices)

    def solve(x0, args, multipliers, key):
        return solvers.solve(
            problem.objective,
            problem.constraint,
            x0,
            args,
            multipliers=multipliers,
            options=options,
            preconditioner=problem.preconditioner if kind == FREE else None,
            key=key,
        )

    inputs = (problem.x0, problem.args, problem.multipliers, jax.random.key(0))
    start = time.perf_counter()
    compiled = jax.jit(solve).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 10.0:
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {
        "kind": kind,
        "grid": grid,
        "n": problem.num_variables,
        "m": problem.num_constraints,
        "status": solvers.Status(int(result.status)).name.lower(),
        "reduction": float(result.kkt_residual) / first,
        "iterations": int(result.iterations),
        "inner_steps": int(result.counters.inner_steps),
        "program_bytes": memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "solve_s": float(np.median(seconds)),
        "compile_s": compile_s,
    }


def _conditions(problem):
    import jax
    import jax.numpy as jnp

    _, pull = jax.vjp(
        lambda x: (
            problem.objective(x, problem.args),
            problem.constraint(x, problem.args),
        ),
        problem.x0,
    )
    (gradient,) = pull((jnp.float64(1.0), problem.multipliers))
    return jnp.concatenate([gradient, problem.constraint(problem.x0, problem.args)])


def main() -> int:
    args = _parse()
    if args.row:
        print(json.dumps(measure(args.row[0], int(args.row[1]))))
        return 0
    console = Console(width=max(Console().width, 120))
    rows = []
    for kind, grids in GRIDS.items():
        for grid in grids:
            command = [sys.executable, __file__, "--row", kind, str(grid)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{kind}, grid {grid}: {done.stderr.strip().splitlines()[-1:]}")
                continue
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            _save(args.out, rows)
            print(f"{kind}, grid {grid}: {rows[-1]['solve_s']:.3g} s", flush=True)
    console.print(_table(rows))
    goals = _judge(rows)
    for goal in goals:
        console.print(str(goal))
    print(f"wrote {args.out}")
    return 0 if goals and all(goal.met for goal in goals) else 1


def _table(rows: list[dict]) -> Table:
    table = Table(title="PDE family, float64, CPU")
    table.add_column("")
    headings = ("n", "status", "KKT/first", "iterations", "inner", "program MiB")
    for heading in (*headings, "bytes / n", "peak MiB", "time s", "compile s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            f"{row['n']}",
            row["status"],
            f"{row['reduction']:.0e}",
            f"{row['iterations']}",
            f"{row['inner_steps']}",
            f"{row['program_bytes'] / 2**20:.4g}",
            f"{row['program_bytes'] / row['n']:.4g}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['solve_s']:.3g}",
            f"{row['compile_s']:.2g}",
        )
    table.caption = machine()["cpu"]
    return table


def _judge(rows: list[dict]) -> list[Goal]:
    free = [r for r in rows if r["kind"] == FREE and r["status"] == "converged"]
    if len(free) < 2:
        return []
    sizes = np.log([row["n"] for row in free[2:]])
    held = np.log([row["program_bytes"] for row in free[2:]])
    slope = float(np.polyfit(sizes, held, 1)[0])
    return [
        Goal("largest n solved matrix-free", free[-1]["n"], 100_000, True),
        Goal("power of n that the program's memory grows with", slope, 1.05, False),
    ]


def _save(path: pathlib.Path, rows: list[dict]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": now, "machine": machine(), "rows": rows}
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", nargs=2, metavar=("KIND", "GRID"), help="one, as JSON")
    out = HERE / "results" / "solvers_pde.json"
    parser.add_argument("--out", type=pathlib.Path, default=out)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
