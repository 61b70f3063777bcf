"""jaxpost's discriminative step, and fine-tuning on the very same rows.

`--method dft` or `dft2` is the recipe's step: a right answer and its negatives joined
in one row behind their prompt, moving averages read and written, the metrics it logs;
the reference's log-probs as columns, or live. `--method sft` is the step of recipe
`sft` on the same rows and with the same tokens trained on: what the forward and
backward passes alone cost. (It takes the first token of an answer to follow the answer
before, which costs the same.) Runs in the project's own environment; prints one JSON
line.
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

from jaxpost import data, training
from jaxpost.recipes import _answer_scores, discriminative, sft

SIZES = {
    **SFT_SIZES,
    "texts": 24,  # about so many a step: rows of a right answer and its negatives
    "length": 256,  # tokens of a prompt and one answer
    "prompt": 128,
    "tau": 1.0,
    "gamma": 0.85,
    "batch": 8,  # rows, for tokens/s; follows from `texts` and `--negatives`
}


def answer_tokens(sizes: dict, rows: int, negatives: int, count: int) -> np.ndarray:
    """Random answers, int32 `[count, N, 1 + B, T]`: one prompt a row, answers that end
    in `END`, nothing to pad."""
    shape = (count, rows, 1 + negatives, sizes["length"])
    tokens = np.random.default_rng(0).integers(3, sizes["vocab"], shape, np.int32)
    tokens[:, :, 1:, : sizes["prompt"]] = tokens[:, :, :1, : sizes["prompt"]]
    tokens[..., -1] = END
    return tokens


def joined_rows(tokens: np.ndarray, prompt: int) -> dict:
    """As the recipe's batches: answers `[N, 1 + B, T]` joined to rows `[N, W]`, their
    tokens scored."""
    positions = np.broadcast_to(
        np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape
    )
    batch = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones(tokens.shape, np.int32),
        "loss_mask": positions >= prompt,
    }
    rows = [
        {name: array[i] for name, array in batch.items()} for i in range(len(tokens))
    ]
    return data.join_answers(batch, data.joined_widths(rows))


def make_step(args: Any, model: Any, tx: Any, count: int) -> tuple[Any, Any, Any]:
    """The compiled step, the method's state, and frozen parameters."""
    if args.method == "sft":
        step = training.make_train_step(sft.sft_loss(model), tx)
        return training.compile_step(step), None, None
    live = args.reference == "live" and args.method == "dft"
    settings = {"tau": args.sizes["tau"], "gamma": args.sizes["gamma"]}
    score = _answer_scores.discriminative_scores(
        model,
        reference="live" if live else "precomputed",
        answers=1 + args.negatives,
        foresee=_answer_scores.slopes(args.method, **settings),
    )
    loss_fn = discriminative.discriminative_loss(
        score, variant=args.method, count=count, **settings
    )
    frozen = {"reference": jax.tree.map(jnp.copy, model.params)} if live else None
    step = training.compile_step(training.make_train_step(loss_fn, tx))
    return step, discriminative.init_memory(count), frozen


def make_batches(args: Any, model: Any, rows: int, total: int) -> list[dict]:
    """Batches `[N, W]`; but for `sft` with what the method reads besides."""
    tokens = answer_tokens(args.sizes, rows, args.negatives, total)
    batches = [joined_rows(part, args.sizes["prompt"]) for part in tokens]
    if args.method == "sft":
        return batches
    score = _answer_scores.discriminative_scores(
        model, reference="none", answers=1 + args.negatives
    )
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
    sizes["batch"], sizes["length"] = batches[0]["tokens"].shape
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
