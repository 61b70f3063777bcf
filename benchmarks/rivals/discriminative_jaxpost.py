"""jaxpost's discriminative step, and fine-tuning on the very same texts.

`--method dft` or `dft2` is the recipe's step: a right answer and its negatives in one
forward pass, moving averages read and written, the metrics it logs; the reference's
log-probs as columns, or live. `--method sft` is the step of recipe `sft` on the same
rows one below the other, their answers trained on: what the forward and backward passes
alone cost. Runs in the project's own environment; prints one JSON line.
"""

import os

from sft_settings import SIZES as SFT_SIZES
from sft_settings import Clock, parse, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dpo_settings import END
from sft_jaxpost import build_model

from jaxpost import training
from jaxpost.recipes import _answer_scores, discriminative, sft

SIZES = {
    **SFT_SIZES,
    "texts": 24,  # about so many a step: rows of a right answer and its negatives
    "length": 256,  # tokens of a prompt and one answer
    "prompt": 128,
    "tau": 1.0,
    "gamma": 0.85,
    "batch": 24,  # texts, for tokens/s; follows from `texts` and `--negatives`
}


def answer_tokens(sizes: dict, rows: int, negatives: int, count: int) -> np.ndarray:
    """Random answers, int32 `[count, N, 1 + B, T]`: one prompt a row, answers that end
    in `END`, nothing to pad."""
    shape = (count, rows, 1 + negatives, sizes["length"])
    tokens = np.random.default_rng(0).integers(3, sizes["vocab"], shape, np.int32)
    tokens[:, :, 1:, : sizes["prompt"]] = tokens[:, :, :1, : sizes["prompt"]]
    tokens[..., -1] = END
    return tokens


def full_rows(tokens: np.ndarray, prompt: int) -> dict:
    """Full rows `[..., T]`: one segment each, the answers' tokens scored."""
    positions = np.broadcast_to(
        np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape
    )
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones(tokens.shape, np.int32),
        "loss_mask": positions >= prompt,
    }


def make_step(args: Any, model: Any, tx: Any, count: int) -> tuple[Any, Any, Any]:
    """The compiled step, the method's state, and frozen parameters."""
    if args.method == "sft":
        step = training.make_train_step(sft.sft_loss(model), tx)
        return training.compile_step(step), None, None
    live = args.reference == "live" and args.method == "dft"
    score = _answer_scores.discriminative_scores(
        model, reference="live" if live else "precomputed"
    )
    loss_fn = discriminative.discriminative_loss(
        score,
        variant=args.method,
        tau=args.sizes["tau"],
        gamma=args.sizes["gamma"],
        count=count,
    )
    frozen = {"reference": jax.tree.map(jnp.copy, model.params)} if live else None
    step = training.compile_step(training.make_train_step(loss_fn, tx))
    return step, discriminative.init_memory(count), frozen


def make_batches(args: Any, model: Any, rows: int, total: int) -> list[dict]:
    """Batches of the method: `[N, 1 + B, T]`, or `[N (1 + B), T]` for `sft`."""
    sizes = args.sizes
    tokens = answer_tokens(sizes, rows, args.negatives, total)
    if args.method == "sft":
        flat = tokens.reshape(total, -1, sizes["length"])
        return [full_rows(part, sizes["prompt"]) for part in flat]
    batches = [full_rows(part, sizes["prompt"]) for part in tokens]
    score = _answer_scores.discriminative_scores(model, reference="none")
    own = jax.jit(lambda params, batch: score(params, batch)["logps"])
    for number, batch in enumerate(batches):
        first = number * rows
        if args.method == "dft" and args.reference == "precomputed":  # not timed
            batch["ref_logps"] = np.asarray(own(model.params, batch))
        batch["example_index"] = np.arange(first, first + rows, dtype=np.int32)
    return batches


def main() -> None:
    args = parse(
        __doc__,
        sizes=SIZES,
        method={"choices": ("dft", "dft2", "sft"), "default": "dft"},
        negatives={"type": int, "default": 2},
        reference={"choices": ("precomputed", "live"), "default": "precomputed"},
    )
    sizes = args.sizes
    rows = max(sizes["texts"] // (1 + args.negatives), 1)
    sizes["batch"] = rows * (1 + args.negatives)
    model = build_model(sizes, sizes["length"], "full" if args.remat else "none")
    total = args.warmup + args.steps
    optimizer = training.OptimizerConfig(
        learning_rate=sizes["learning_rate"],
        weight_decay=sizes["weight_decay"],
        schedule="constant",
    )
    tx, _ = training.build_optimizer(optimizer, total)
    batches = make_batches(args, model, rows, total)
    step, memory, frozen = make_step(args, model, tx, rows * total)
    state = training.init_state(
        model.params,
        tx,
        jax.random.key(1),
        method_state=memory,
        frozen=frozen,
        copy=False,
    )
    model = None
    clock = Clock(args.warmup)
    metrics = {}
    for batch in batches:
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        clock.tick()
    report(
        "jaxpost",
        args,
        clock,
        settings=f"{args.method}, {rows} rows of {1 + args.negatives} texts, "
        f"reference {args.reference if args.method == 'dft' else 'none'}",
        versions=f"jax {jax.__version__}",
        method=args.method,
        negatives=args.negatives,
        loss=float(metrics["loss"]),
        compile_s=step.compile_s,
        traces=step.traces,
    )


if __name__ == "__main__":
    main()
