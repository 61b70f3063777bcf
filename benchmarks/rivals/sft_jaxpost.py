"""jaxpost's own fine-tuning step, timed as its rivals are; what they are compared with.

The pieces are those of the recipe: the scanned decoder, fused log-probs, the SFT loss,
the train step compiled once with its state donated. `--metrics 1` adds entropy and
accuracy per token, which TRL always computes. `--segments 0` leaves out segment ids.
Runs in the project's own environment; prints one JSON line.
"""

import os
import time

from sft_settings import Clock, batches, parse, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import losses, models, ops, training
from jaxpost.typing import LossOutput, Metric, Term


def build_model(sizes: dict, positions: int, remat: str = "none") -> models.Model:
    """A fresh Llama of the benchmark's sizes."""
    config = models.DecoderConfig(
        family="llama",
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        max_positions=positions,
        tie_embeddings=sizes["tied"],
        remat=remat,  # pyright: ignore[reportArgumentType]
    )
    return models.build(config, jax.random.key(0))


def make_loss(model: models.Model, *, metrics: bool):
    """The recipe's loss function, for `training.make_train_step`."""

    def loss_fn(params, method_state, batch, key):
        del key
        targets, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
        output = model.apply(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        stats = ops.linear_token_logps(
            output.hidden,
            model.unembed(params),
            targets,
            grad_weights=mask,
            with_entropy=metrics,
            with_top1=metrics,
        )
        values, weights = losses.sft(stats.logps, mask)
        count = jnp.sum(weights)
        found = {}
        if metrics:
            found = {
                "entropy": Metric(jnp.sum(stats.entropy), count),
                "mean_token_accuracy": Metric(jnp.sum(stats.top1), count),
            }
        terms = {"nll": Term(jnp.sum(values), count)}
        return LossOutput(terms, found, method_state)

    return loss_fn


def language_batch(tokens: np.ndarray, segments: bool) -> dict:
    """A full batch: one segment per row, every token but the first trained on."""
    loss_mask = np.ones(tokens.shape, bool)
    loss_mask[:, 0] = False
    positions = np.broadcast_to(
        np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
    )
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones(tokens.shape, np.int32) if segments else None,
        "loss_mask": loss_mask,
    }


def main() -> None:
    flag = {"type": int, "choices": (0, 1)}
    args = parse(
        __doc__,
        metrics={**flag, "default": 1},
        segments={**flag, "default": 1},
        policy={"choices": ("full", "dots"), "default": "full"},
    )
    model = build_model(
        args.sizes, args.sizes["length"], args.policy if args.remat else "none"
    )
    total = args.warmup + args.steps
    optimizer = training.OptimizerConfig(
        learning_rate=args.sizes["learning_rate"],
        weight_decay=args.sizes["weight_decay"],
        schedule="constant",
    )
    tx, _ = training.build_optimizer(optimizer, total)
    step = training.compile_step(
        training.make_train_step(make_loss(model, metrics=bool(args.metrics)), tx)
    )
    state = training.init_state(model.params, tx, jax.random.key(1), copy=False)
    model = None
    clock = Clock(args.warmup)
    for tokens in batches(args.sizes, total):
        state, metrics = step(state, language_batch(tokens, bool(args.segments)))
        jax.block_until_ready(metrics)
        clock.tick()
    report(
        "jaxpost",
        args,
        clock,
        settings=f"remat={args.policy if args.remat else 'none'}, "
        f"entropy and accuracy {'on' if args.metrics else 'off'}",
        versions=f"jax {jax.__version__}",
        loss=float(metrics["loss"]),
        compile_s=step.compile_s,
        traces=step.traces,
        finished=time.time(),
    )


if __name__ == "__main__":
    main()
