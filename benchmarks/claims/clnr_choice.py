"""Which settings beyond the published ones are best on Cora's validation nodes?

python benchmarks/claims/clnr_choice.py [--seeds N] [--only NAME ...]

Each candidate changes a few settings of configs/clnr/cora.yaml. The labels of the test
nodes are erased before anything is trained or probed, so nothing here can have been
chosen by them. Seeds differ from those of claims/clnr.py, which reports the choice.
Adds to benchmarks/claims/results/clnr_choice.json.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import evaluation, graphs, recipes
from jaxpost.recipes import clnr

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "clnr" / "cora.yaml"
OUT = ROOT / "benchmarks" / "claims" / "results" / "clnr_choice.json"
SEED = 1000

VIEWS = ("view1", "view2")


def views(**changes: float | str) -> tuple[str, ...]:
    """Flags that change both views alike."""
    return tuple(
        word
        for view in VIEWS
        for name, value in changes.items()
        for word in (f"--{view}.{name.replace('_', '-')}", str(value))
    )


CANDIDATES: dict[str, tuple[str, ...]] = {
    "published": (),
    "all nodes in the loss": ("--objective.batch", "None"),
    "features masked 0.4": views(feature_mask=0.4),
    "features masked 0.6": views(feature_mask=0.6),
    "edges dropped 0.3": views(edge_drop=0.3),
    "edges dropped 0.7": views(edge_drop=0.7),
    "symmetric drop": views(drop="symmetric"),
    "30 epochs": ("--train.epochs", "30"),
    "80 epochs": ("--train.epochs", "80"),
    "temperature 1": ("--objective.temperature", "1.0"),
    "temperature 0.3": ("--objective.temperature", "0.3"),
    "one layer": ("--encoder.widths", "512"),
    "1024 wide at the end": ("--encoder.widths", "512", "1024"),
    "CCA-SSG": ("--objective.kind", "cca_ssg"),
}
SMOOTH = ((0, 0.0), (2, 0.1), (8, 0.1))
"""Steps and restart of smoothing, tried on the published embeddings."""


def validate(name: str, seeds: int) -> dict:
    """Best validation accuracy of each seed, for each smoothing."""
    flags = [*CANDIDATES[name], "--seeds", str(seeds), "--seed", str(SEED)]
    config = recipes.load_config(str(CONFIG), flags, prog=__file__)
    data = clnr.load(config)
    assert data.masks is not None
    assert data.labels is not None
    test = data.masks["test"]
    labels = np.where(test, 0, data.labels)
    # The probe wants test nodes: one, whose label is erased.
    one = np.arange(test.size) == int(np.argmax(test))
    masks = (data.masks["train"], data.masks["validation"], one)

    method, tx = config.method(), config.train.optimizer()
    plan = graphs.plan_for(method, data.graph)
    start = time.perf_counter()

    @jax.jit
    def train(graph, plan, keys):
        states, metrics = graphs.train_seeds(
            method, tx, graph, plan, epochs=config.train.epochs, keys=keys
        )
        embed = jax.lax.map(
            lambda params: graphs.embed(method, params, graph, plan), states.params
        )
        return embed, metrics["loss"]

    embeddings, losses = train(data.graph, plan, config.keys())
    found: dict = {
        "flags": list(CANDIDATES[name]),
        "loss": float(jnp.mean(losses[:, -1])),
        "validation": {},
    }
    for steps, restart in SMOOTH if name == "published" else SMOOTH[:1]:
        smoothed = jnp.stack(
            [
                graphs.smooth(data.graph, u, steps=steps, restart=restart, plan=plan)
                for u in embeddings
            ]
        )
        result = evaluation.linear_probe(
            smoothed, labels, masks, config=config.probe, key=jax.random.key(SEED)
        )
        key = f"{steps} steps, restart {restart}"
        found["validation"][key] = np.asarray(result.validation).tolist()
    found["seconds"] = time.perf_counter() - start
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", action="append", choices=tuple(CANDIDATES))
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(arguments)
    table = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    for name in args.only or CANDIDATES:
        table[name] = validate(name, args.seeds)
        for smoothing, values in table[name]["validation"].items():
            mean, std = np.mean(values), np.std(values, ddof=1)
            print(f"{name:<24} {smoothing:<24} {mean:.4f} ± {std:.4f}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
