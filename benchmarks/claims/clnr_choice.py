"""Which settings beyond the published ones are best on Cora's validation nodes?

python benchmarks/claims/clnr_choice.py [--encoders N] [--only NAME ...] [--folder DIR]

Each candidate changes a few settings of configs/clnr/cora.yaml, and is read in several
ways: one encoder or several side by side, smoothed or not, with other probes. The
labels of the test nodes are erased before anything is trained or probed, so nothing
here can have been chosen by them. A probe's epoch is chosen on a random half of the
validation nodes and its accuracy taken on the other half, both ways round: the best
accuracy on all of them would favour whatever fluctuates. Seeds differ from those of
claims/clnr.py, which reports the choice. Adds what is missing to
benchmarks/claims/results/clnr_choice.json.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
from typing import NamedTuple

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


class Reading(NamedTuple):
    """What is done with trained encoders.

    Fields:
        encoders: how many stand side by side.
        steps, restart: of smoothing.
        decay: of the probe.
    """

    encoders: int = 1
    steps: int = 0
    restart: float = 0.1
    decay: float = 1e-4

    def __str__(self) -> str:
        parts = [f"{self.encoders} encoder{'s' if self.encoders > 1 else ''}"]
        if self.steps:
            parts.append(f"smoothed {self.steps} steps, restart {self.restart}")
        return ", ".join([*parts, f"decay {self.decay:g}"])


READINGS = {
    "published": (
        *(Reading(1), Reading(3), Reading(6)),
        *(Reading(decay=decay) for decay in (1e-3, 1e-2)),
        *(Reading(steps=steps) for steps in (2, 8)),
        Reading(3, decay=1e-2),
    )
}
OTHERS = (Reading(), Reading(3))
"""Readings of the other candidates."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", type=int, default=6, help="of each candidate")
    parser.add_argument("--only", action="append", choices=tuple(CANDIDATES))
    parser.add_argument(
        "--folder", type=pathlib.Path, default=ROOT / "runs/clnr-choice"
    )
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(arguments)
    table = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    for name in args.only or CANDIDATES:
        flags = [*CANDIDATES[name], "--seeds", str(args.encoders), "--seed", str(SEED)]
        config = recipes.load_config(str(CONFIG), flags, prog=__file__)
        data = clnr.load(config)
        embeddings = trained(name, config, data, args.folder)
        new = {"flags": list(CANDIDATES[name]), "validation": {}}
        rows = table.setdefault(name, new)["validation"]
        for reading in READINGS.get(name, OTHERS):
            if str(reading) in rows:
                continue
            values = rows[str(reading)] = validate(config, data, embeddings, reading)
            print(f"{name:<24} {reading!s:<50} {np.mean(values):.4f}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def trained(
    name: str, config: clnr.CLNRConfig, data: graphs.NodeData, folder: pathlib.Path
) -> jax.Array:
    """Embeddings `[S, N, D]`, kept in `folder`."""
    file = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".npy")
    if file.is_file():
        found = jnp.asarray(np.load(file))
        if len(found) != config.seeds:
            raise ValueError(f"{file}: has {len(found)} encoders, not {config.seeds}.")
        return found
    method, tx = config.method(), config.train.optimizer()

    @jax.jit
    def train(graph, plan, keys):
        states, _ = graphs.train_seeds(
            method, tx, graph, plan, epochs=config.train.epochs, keys=keys
        )
        return jax.lax.map(
            lambda params: graphs.embed(method, params, graph, plan), states.params
        )

    found = train(data.graph, graphs.plan_for(method, data.graph), config.keys())
    folder.mkdir(parents=True, exist_ok=True)
    np.save(file, np.asarray(found))
    return found


def validate(
    config: clnr.CLNRConfig,
    data: graphs.NodeData,
    embeddings: jax.Array,
    reading: Reading,
) -> list[float]:
    """Accuracy on validation nodes, for each run of encoders that follow each other."""
    count = len(embeddings)
    starts = range(count if reading.encoders < count else 1)
    plan = graphs.plan_graph(data.graph)
    wide = jnp.stack(
        [
            jnp.concatenate(
                [embeddings[(start + i) % count] for i in range(reading.encoders)], 1
            )
            for start in starts
        ]
    )
    if reading.steps:
        settings = {"steps": reading.steps, "restart": reading.restart, "plan": plan}
        wide = jnp.stack([graphs.smooth(data.graph, u, **settings) for u in wide])
    probe = dataclasses.replace(config.probe, weight_decay=reading.decay)
    return held_out(wide, data, probe).tolist()


def held_out(
    embeddings: jax.Array, data: graphs.NodeData, probe: evaluation.ProbeConfig
) -> np.ndarray:
    """Accuracy on halves of the validation nodes that chose no epoch, `[S]`."""
    assert data.masks is not None
    assert data.labels is not None
    labels = np.where(data.masks["test"], 0, data.labels)
    nodes = np.nonzero(data.masks["validation"])[0]
    first = np.zeros((len(embeddings), labels.size), bool)
    for seed, mask in enumerate(first):
        order = np.random.default_rng(seed).permutation(nodes)
        mask[order[: nodes.size // 2]] = True
    second = data.masks["validation"][None] & ~first
    found = [
        evaluation.linear_probe(
            embeddings,
            labels,
            (np.broadcast_to(data.masks["train"], first.shape), *halves),
            config=probe,
            key=jax.random.key(SEED),
        ).clean
        for halves in ((first, second), (second, first))
    ]
    return np.mean(found, axis=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
