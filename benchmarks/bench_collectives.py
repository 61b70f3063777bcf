"""What a fine-tuning step sends between devices, by collective, mesh and batch.

Read off the compiled program of the real step; nothing is run, so an idle machine is
not needed, and one device per mesh position is virtual. With the model fixed, the bytes
that a device sends under fsdp must not grow with the batch: parameters travel, rows do
not. The exception is the embedding while a device has fewer tokens than the vocabulary
has ids: then exchanging rows is cheaper than gathering the table, and is bounded by it.
Tensor parallelism sends activations, which do grow.

    .venv/bin/python benchmarks/bench_collectives.py
"""

import argparse
import os

DEVICES = 8
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    f"--xla_force_host_platform_device_count={DEVICES}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", str(4 * DEVICES))

import jax  # noqa: E402 (after the environment is set)
import jax.numpy as jnp  # noqa: E402
from _measure import environment, write_json  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from jaxpost import models, ops, parallel, training  # noqa: E402
from jaxpost.recipes.sft import sft_loss  # noqa: E402

MODELS = {
    # Fewer ids than a device has tokens: the embedding's table is gathered.
    "small vocabulary": models.DecoderConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_positions=1024,
        remat="full",
    ),
    # More: rows are exchanged.
    "large vocabulary": models.DecoderConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_positions=1024,
        remat="full",
    ),
}
LENGTH = 1024
BATCHES = (8, 16, 32)
MESHES = (
    {"data": 1, "fsdp": 2},
    {"data": 1, "fsdp": 4},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 1, "fsdp": 4, "tensor": 2},
)
SLACK_BYTES = 4096
"""Of what may differ with the batch beside: flags and sums of a few bytes a row."""


def collectives_of(
    config: models.DecoderConfig, shape: dict[str, int], rows: int
) -> tuple[parallel.Collective, ...]:
    """Those of the compiled step, for a batch of so many rows."""
    size = 1
    for part in shape.values():
        size *= part
    mesh = parallel.make_mesh(shape, devices=jax.devices()[:size])
    model = models.build(config, mesh=mesh, abstract=True)
    tx, _ = training.build_optimizer(training.OptimizerConfig(), 100)

    def make(params):
        return training.init_state(params, tx, jax.random.key(0), copy=False)

    state = jax.eval_shape(make, model.params)
    placement = parallel.shardings(models.param_axes(config), mesh, shapes=state.params)
    placement = parallel.shardings_like(state, state.params, placement)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        state,
        placement,
    )
    split = parallel.batch_sharding(mesh)
    names = ("tokens", "positions", "segment_ids", "loss_mask")
    batch = {
        name: jax.ShapeDtypeStruct(
            (rows, LENGTH),
            jnp.bool_ if name == "loss_mask" else jnp.int32,
            sharding=split,
        )
        for name in names
    }
    loss_fn = sft_loss(
        model.with_lookup(parallel.split_lookup(mesh)),
        token_logps=parallel.split_vocabulary(ops.linear_token_logps, mesh),
    )
    step = training.compile_step(
        training.make_train_step(loss_fn, tx), state_shardings=placement
    )
    text = step.lower(state, batch).compile().as_text()
    # The head's loop: as many rounds as chunks of tokens, 512 on a CPU.
    tokens = rows * LENGTH // (mesh.shape["data"] * mesh.shape["fsdp"])
    loops = {
        "transpose(jvp())/shard_map/while": 0,
        "jvp()/shard_map/while": -(-tokens // 512),
    }
    return parallel.list_collectives(text, loops=loops)


def measure(name: str, shape: dict[str, int], rows: int) -> dict:
    """One line of the table."""
    found = collectives_of(MODELS[name], shape, rows)
    sent = parallel.sum_by_kind(found)
    return {
        "model": name,
        "mesh": shape,
        "rows": rows,
        "tokens_per_device": rows * LENGTH // (shape["data"] * shape["fsdp"]),
        "sent_bytes": sent,
        "total_bytes": sum(sent.values()),
        "largest": _largest(found),
    }


def _largest(found: tuple[parallel.Collective, ...], count: int = 8) -> list[dict]:
    """Those that send most; alike ones are one entry."""
    together: dict[tuple, list] = {}
    for one in found:
        key = (one.kind, one.group, one.where)
        together.setdefault(key, []).append(one)
    entries = [
        {
            "kind": kind,
            "devices": group,
            "runs": sum(one.times for one in alike),
            "sent_bytes": round(sum(one.sent_bytes for one in alike)),
            "of": where,
        }
        for (kind, group, where), alike in together.items()
    ]
    return sorted(entries, key=lambda entry: -entry["sent_bytes"])[:count]


def check(lines: list[dict]) -> list[str]:
    """Bytes that grow with the batch though they should not; empty if none."""
    problems = []
    for name, config in MODELS.items():
        table = config.vocab_size * config.hidden_size * 4
        for shape in MESHES:
            if "tensor" in shape:
                continue
            same = [x for x in lines if x["model"] == name and x["mesh"] == shape]
            sent = [line["sent_bytes"] for line in same]
            rows = [kinds.get("all-to-all", 0) for kinds in sent]
            rest = [
                line["total_bytes"] - one for line, one in zip(same, rows, strict=True)
            ]
            # Ids travel with the exchange: 4 bytes against a row of the table.
            ids = max(line["tokens_per_device"] for line in same) * 4 * shape["fsdp"]
            allowed = SLACK_BYTES + (ids if any(rows) else 0)
            if max(rest) - min(rest) > allowed:
                problems.append(f"{name}, {shape}: {rest} bytes besides the exchange")
            if max(rows) > 2 * table:
                problems.append(f"{name}, {shape}: {rows} bytes exchanged")
            if name == "small vocabulary" and any(rows):
                problems.append(f"{name}, {shape}: rows are exchanged")
    return problems


def main() -> None:
    """Compiles every step, prints the table, checks it, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="write no JSON file")
    arguments = parser.parse_args()
    lines = [
        measure(name, shape, rows)
        for name in MODELS
        for shape in MESHES
        for rows in BATCHES
    ]
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    table = Table(title="sent by one device in one step, MB (float32)")
    for heading in ("model", "mesh", "rows", *kinds, "total"):
        table.add_column(heading, justify="right" if heading in kinds else "left")
    for line in lines:
        mesh = " ".join(f"{axis} {size}" for axis, size in line["mesh"].items())
        cells = [f"{line['sent_bytes'].get(kind, 0) / 1e6:.2f}" for kind in kinds]
        total = f"{line['total_bytes'] / 1e6:.2f}"
        table.add_row(line["model"], mesh, str(line["rows"]), *cells, total)
    Console(width=120).print(table)
    problems = check(lines)
    if not arguments.no_write:
        write_json("collectives", {"environment": environment(), "rows": lines})
    if problems:
        raise SystemExit("grows with the batch:\n" + "\n".join(problems))
    print("under fsdp, what a device sends does not grow with the batch")


if __name__ == "__main__":
    main()
