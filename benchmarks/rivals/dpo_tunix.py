"""Tunix's DPOTrainer on its Llama 3 of this size: no logging, evaluation, checkpoints.

It has no precomputed reference: `--reference precomputed` runs it without any, which
costs the same and is another loss. Prints one JSON line.
"""

import os

from dpo_settings import pair_tokens, parse
from sft_settings import Clock, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    args = parse(__doc__)
    import importlib.metadata

    import jax
    import numpy as np
    from flax import nnx
    from sft_tunix import build_model, optimizer, ticking_hooks
    from tunix.sft.dpo import dpo_trainer

    sizes = args.sizes
    clock = Clock(args.warmup)
    losses = []
    steps = args.warmup + args.steps
    model = build_model(sizes, args.remat)
    reference = None
    if args.reference == "live":
        reference = nnx.clone(model)
    trainer = dpo_trainer.DPOTrainer(
        model,
        reference,
        optimizer(sizes),
        # Its hooks run one step late: they see a step's end when the next is queued.
        dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10**9, max_steps=steps + 1, beta=sizes["beta"]
        ),
    )
    trainer.with_training_hooks(ticking_hooks(clock, losses))
    split = sizes["prompt"]
    data = []
    for tokens in pair_tokens(sizes, steps + 1):
        prompt, chosen = tokens[:, 0, :split], tokens[:, 0, split:]
        rejected = tokens[:, 1, split:]
        data.append(
            dpo_trainer.TrainingInput(
                prompt_ids=prompt,
                prompt_mask=np.ones(prompt.shape, bool),
                chosen_ids=chosen,
                chosen_mask=np.ones(chosen.shape, bool),
                rejected_ids=rejected,
                rejected_mask=np.ones(rejected.shape, bool),
            )
        )
    trainer.train(data)
    clock.ticks = clock.ticks[: steps + 1]
    clock.cpu_ticks = clock.cpu_ticks[: steps + 1]
    report(
        "Tunix DPOTrainer",
        args,
        clock,
        settings="reference " + ("live" if reference is not None else "none at all"),
        versions=f"tunix {importlib.metadata.version('google-tunix')}, "
        f"jax {jax.__version__}",
        reference=args.reference,
        loss=float(losses[-1]),
    )


if __name__ == "__main__":
    main()
