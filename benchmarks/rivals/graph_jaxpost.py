"""jaxpost's contrastive epochs on Cora: one step a call, or a scan of them.

`--mode step` calls a compiled step per epoch; `scan` a program of several epochs;
`seeds` trains several seeds in one program and reports compilation too; `single` is
one of those seeds in a program of its own. Prints one JSON line.
"""

import os
import time

from graph_settings import METHODS, SIZES, cora
from sft_settings import Clock, parse, peak_bytes

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import json
import statistics
from typing import Any

import jax
import optax

from jaxpost import graphs


def make_method(name: str, nodes: int) -> tuple[graphs.ContrastiveConfig, Any]:
    """The method and its optimizer."""
    sizes = METHODS[name]
    batch = sizes["batch"]
    views = [
        graphs.AugmentConfig(edge_drop, feature_mask)
        for edge_drop, feature_mask in zip(
            sizes["edge_drop"], sizes["feature_mask"], strict=True
        )
    ]
    method = graphs.ContrastiveConfig(
        graphs.EncoderConfig(
            widths=sizes["widths"], activate_last=sizes["activate_last"]
        ),
        graphs.ObjectiveConfig(
            name,
            sizes["temperature"],
            batch=None if batch is None else min(batch, nodes),
            head_width=sizes.get("head"),
        ),
        *views,
    )
    decay = optax.add_decayed_weights(sizes["weight_decay"])
    return method, optax.chain(decay, optax.adam(sizes["learning_rate"]))


def make_graph(nodes: int) -> Any:
    held = cora(nodes)
    parts = (held["values"], held["columns"], held["indptr"], held["shape"])
    return graphs.make_graph(graphs.sparse_features(*parts), held["edges"])


def time_epochs(args: Any, method: Any, tx: Any, graph: Any, plan: Any) -> dict:
    """Epochs per second of one step a call, or of a scan."""
    inner = args.sizes["epochs_in_scan"] if args.mode == "scan" else 1
    if args.mode == "scan":

        def call(state, graph, plan):
            return graphs.train_epochs(method, tx, state, graph, plan, epochs=inner)

    else:
        call = graphs.make_step(method, tx)
    width = graph.nodes.shape[1]
    state = graphs.init_state(method, tx, width, key=jax.random.key(0))
    start = time.perf_counter()
    compiled = jax.jit(call, donate_argnums=(0,)).lower(state, graph, plan).compile()
    compile_s = time.perf_counter() - start
    # As many epochs are timed either way.
    calls = max(args.epochs // inner, 3)
    clock = Clock(max(args.warmup // inner, 1))
    metrics = {}
    for _ in range(clock.warmup + calls):
        state, metrics = compiled(state, graph, plan)
        jax.block_until_ready(metrics)
        clock.tick()
    return {
        "epochs_per_s": inner / statistics.median(clock.steps_s),
        "cpu_epoch_s": statistics.median(clock.cpu_steps_s) / inner,
        "compile_s": compile_s,
        "loss": float(metrics["loss"].ravel()[-1]),
    }


def time_seeds(args: Any, method: Any, tx: Any, graph: Any, plan: Any) -> dict:
    """Seconds of whole runs of all seeds, compilation included."""
    seeds = args.sizes["seeds"] if args.mode == "seeds" else 1
    keys = jax.random.split(jax.random.key(0), seeds)

    def train(graph, plan, keys):
        return graphs.train_seeds(
            method, tx, graph, plan, epochs=args.epochs, keys=keys
        )

    start = time.perf_counter()
    compiled = jax.jit(train).lower(graph, plan, keys).compile()
    compile_s = time.perf_counter() - start
    _, metrics = jax.block_until_ready(compiled(graph, plan, keys))
    total_s = time.perf_counter() - start
    return {
        "epochs_per_s": seeds * args.epochs / (total_s - compile_s),
        "cpu_epoch_s": 0.0,
        "total_s": total_s,
        "compile_s": compile_s,
        "loss": float(metrics["loss"].ravel()[-1]),
    }


def main() -> None:
    args = parse(
        __doc__,
        unit="epochs",
        count=30,
        sizes=SIZES,
        method={"choices": tuple(METHODS), "default": "clnr"},
        mode={"choices": ("step", "scan", "seeds", "single"), "default": "step"},
    )
    method, tx = make_method(args.method, args.sizes["nodes"])
    graph = make_graph(args.sizes["nodes"])
    plan = graphs.plan_for(method, graph)
    timed = time_epochs if args.mode in ("step", "scan") else time_seeds
    found = timed(args, method, tx, graph, plan)
    print(
        json.dumps(
            {
                "name": "jaxpost",
                **found,
                "peak_bytes": peak_bytes(),
                "threads": args.threads,
                "sizes": args.sizes,
                "settings": f"{args.method}, {args.mode}",
                "versions": f"jax {jax.__version__}",
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
