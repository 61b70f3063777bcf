"""A contrastive epoch's time and memory by number of edges, and the loss's by nodes.

    .venv/bin/python benchmarks/bench_graph_scale.py [--least EDGES] [--most EDGES]

Random graphs of 10^4 to 10^7 directed edges, ten for each node, features and layers 64
wide, CLNR with 1024 sampled nodes: one whole epoch (two views, forward, backward, Adam)
in a fresh process per row, for each way of summing over edges: "csr", and "segment",
which holds the messages of 2^17 edges at a time. Peak memory is the process's resident
set beyond what it was before the graph. Then the bytes that the compiled NT-Xent and
its gradient need at the size of ogbn-arxiv (169,343 nodes), all nodes against all, from
the compiler's own analysis; nothing is run there. Writes
`benchmarks/results/graph_scale.json` and, with matplotlib,
`docs/figures/graph_scale.svg`; rows that are not measured again stay.
"""

import argparse
import datetime
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from _processes import machine

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "results" / "graph_scale.json"
FIGURE = HERE.parent / "docs" / "figures" / "graph_scale.svg"
SIZES = (10**4, 10**5, 10**6, 10**7)
WAYS = ("csr", "segment")
WIDTH, DEGREE, SAMPLED = 64, 10, 1024
ARXIV_NODES = 169_343
LIMIT_BYTES = 2 * 2**30
FEWEST, ENOUGH_S = 3, 30.0
"""Timed epochs at least; seconds of them after which no more are needed."""


def measure(edges: int, way: str, repeats: int) -> dict:
    """One row, in this process."""
    import jax
    import numpy as np
    import optax

    from jaxpost import graphs

    nodes = edges // DEGREE
    rng = np.random.default_rng(0)
    ends = rng.integers(nodes, size=(2, edges // 2), dtype=np.int32)
    features = rng.normal(size=(nodes, WIDTH)).astype(np.float32)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the runtime is up
    before = peak_bytes()
    both = np.concatenate([ends, ends[::-1]], axis=1)
    graph = graphs.make_graph(features, both)
    config = graphs.ContrastiveConfig(
        graphs.EncoderConfig(widths=(WIDTH, WIDTH), aggregation=way),
        graphs.ObjectiveConfig(batch=min(SAMPLED, nodes)),
    )
    tx = optax.adam(1e-3)
    plan = graphs.plan_for(config, graph)
    state = graphs.init_state(config, tx, WIDTH, key=jax.random.key(0))
    step = jax.jit(graphs.make_step(config, tx), donate_argnums=0)
    compiled = step.lower(state, graph, plan).compile()
    memory = compiled.memory_analysis()
    state, metrics = jax.block_until_ready(compiled(state, graph, plan))
    times = []
    while len(times) < repeats and (len(times) < FEWEST or sum(times) < ENOUGH_S):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, graph, plan))
        times.append(time.perf_counter() - start)
    assert np.isfinite(metrics["loss"])
    return {
        "edges": edges,
        "nodes": nodes,
        "way": way,
        "epoch_s": statistics.median(times),
        "epochs": len(times),
        "peak_bytes": peak_bytes() - before,
        "compiled_temporary_bytes": memory.temp_size_in_bytes,
        "loss": float(metrics["loss"]),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_bytes(width: int) -> dict:
    """What the compiled loss and gradient need, `[N, width]` views, by kind."""
    import jax
    import jax.numpy as jnp

    from jaxpost import losses

    def loss(z1, z2):
        return jnp.mean(losses.nt_xent(z1, z2, temperature=0.5))

    view = jax.ShapeDtypeStruct((ARXIV_NODES, width), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(view, view).compile()
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return {"nodes": ARXIV_NODES, "width": width, **parts, "total": sum(parts.values())}


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in WAYS:
        found = [row for row in rows if row["way"] == way]
        edges = [row["edges"] for row in found]
        left.loglog(edges, [row["epoch_s"] for row in found], "o-", label=way)
        peaks = [row["peak_bytes"] / 2**20 for row in found]
        right.loglog(edges, peaks, "o-", label=way)
    features = [row["nodes"] * WIDTH * 4 / 2**20 for row in found]
    right.loglog(edges, features, ":", color="grey", label="the features alone")
    left.set_ylabel("seconds for an epoch")
    right.set_ylabel("peak memory, MiB")
    for axes in (left, right):
        axes.set_xlabel("directed edges")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="timed epochs a row, at most"
    )
    parser.add_argument("--least", type=int, default=0, help="edges, at least")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="edges, at most")
    parser.add_argument("--row", nargs=2, metavar=("EDGES", "WAY"), help="one row")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(int(args.row[0]), args.row[1], args.repeats)))
        return 0
    rows = earlier()
    for edges in (size for size in SIZES if args.least <= size <= args.most):
        for way in WAYS:
            command = [sys.executable, __file__, "--row", str(edges), way]
            command += ["--repeats", str(args.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{edges} edges, {way}: failed: {done.stderr.strip()[-300:]}")
                return 1
            row = json.loads(done.stdout.strip().splitlines()[-1]) | stamp()
            rows[edges, way] = row
            print(
                f"{edges:>9} edges {row['nodes']:>8} nodes  {way:<8}"
                f"{row['epoch_s']:9.3f} s {row['peak_bytes'] / 2**20:9.0f} MiB",
                flush=True,
            )
    losses = [loss_bytes(width) for width in (128, 512)]
    for found in losses:
        print(
            f"NT-Xent, {found['nodes']} nodes, {found['width']} wide: "
            f"{found['total'] / 2**30:.2f} GiB with arguments and gradients"
        )
    ordered = [rows[at] for at in sorted(rows)]
    content = {"rows": ordered, "losses": losses}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(content, indent=1) + "\n")
    draw(ordered)
    print(f"wrote {OUT} and {FIGURE}")
    return 0 if all(found["total"] <= LIMIT_BYTES for found in losses) else 1


def stamp() -> dict:
    """When and where a row is measured."""
    now = datetime.datetime.now(datetime.UTC)
    return {"date": now.isoformat(timespec="seconds"), "machine": machine()}


def earlier() -> dict[tuple[int, str], dict]:
    """Rows measured before, by edges and way."""
    if not OUT.is_file():
        return {}
    rows = json.loads(OUT.read_text("utf-8"))["rows"]
    return {(row["edges"], row["way"]): row for row in rows}


if __name__ == "__main__":
    sys.exit(main())
