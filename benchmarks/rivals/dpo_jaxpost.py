"""jaxpost's own DPO step, timed as its rivals are; what they are compared with.

The pieces are those of the recipe: both answers in one row behind their prompt,
log-probs of the answers' tokens only, the metrics it logs, the reference live or as
columns. `--loss`
takes any pairwise loss's name. Runs in the project's own environment; prints one JSON
line.
"""

import os

from dpo_settings import pair_tokens, parse
from sft_settings import Clock, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from sft_jaxpost import build_model

from jaxpost import data, losses, training
from jaxpost.recipes import dpo


def pair_batch(tokens: np.ndarray, prompt: int) -> dict:
    """As the recipe's batches: the answers joined to one row, their tokens scored."""
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


def main() -> None:
    args = parse(
        __doc__,
        loss={"choices": ("bradley_terry", "r3m", "ipo"), "default": "bradley_terry"},
    )
    sizes = args.sizes
    model = build_model(sizes, sizes["length"], "full" if args.remat else "none")
    total = args.warmup + args.steps
    optimizer = training.OptimizerConfig(
        learning_rate=sizes["learning_rate"],
        weight_decay=sizes["weight_decay"],
        schedule="constant",
    )
    tx, _ = training.build_optimizer(optimizer, total)
    settings = losses.PairwiseConfig(args.loss, lam=0.6 if args.loss == "r3m" else None)

    def score(reference):
        return dpo.dpo_scores(
            model, beta=sizes["beta"], reference=reference, loss=settings
        )

    live = args.reference == "live"
    loss_fn = dpo.dpo_loss(score(args.reference), settings)
    step = training.compile_step(training.make_train_step(loss_fn, tx))
    batches = [pair_batch(t, sizes["prompt"]) for t in pair_tokens(sizes, total)]
    if not live:  # the one pass before training is not timed, as it is not TRL's
        own = jax.jit(lambda params, batch: score("none")(params, batch)["logps"])
        for batch in batches:
            logps = np.asarray(own(model.params, batch))
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps.T
    frozen = {"reference": jax.tree.map(jnp.copy, model.params)} if live else None
    state = training.init_state(
        model.params, tx, jax.random.key(1), frozen=frozen, copy=False
    )
    clock = Clock(args.warmup)
    for batch in batches:
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        clock.tick()
    report(
        "jaxpost",
        args,
        clock,
        settings=f"reference {args.reference}, {args.loss}",
        versions=f"jax {jax.__version__}",
        reference=args.reference,
        loss=float(metrics["loss"]),
        compile_s=step.compile_s,
        traces=step.traces,
    )


if __name__ == "__main__":
    main()
