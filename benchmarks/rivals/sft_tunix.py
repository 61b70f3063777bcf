"""Tunix's PeftTrainer, full fine-tuning of its Llama 3 of this size, at its best.

No logging backend, evaluation or checkpoints. `--loss default` is the trainer's own
loss (one-hot targets); `--loss gather` gives it a leaner one, which users can pass.
Prints one JSON line.
"""

import os

from sft_settings import Clock, batches, parse, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def lean_loss(model, input_tokens, input_mask, positions, attention_mask):
    """Cross-entropy by gathering the target's logit, in place of one-hot products."""
    import jax.numpy as jnp
    import optax

    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], input_tokens[:, 1:]
    )
    mask = input_mask[:, 1:].astype(losses.dtype)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def build_model(sizes: dict, remat: bool):
    """Tunix's Llama 3 with the sizes of the benchmark, random weights."""
    from flax import nnx
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=sizes["layers"],
        vocab_size=sizes["vocab"],
        embed_dim=sizes["hidden"],
        hidden_dim=sizes["ffn"],
        num_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=sizes["tied"],
        remat_config=llama.RematConfig.DECODER if remat else llama.RematConfig.NONE,
    )
    return llama.Llama3(config, rngs=nnx.Rngs(0))


def ticking_hooks(clock: Clock, losses: list):
    """Tunix's hooks: `clock` ticks and `losses` grows at each step's end."""
    from tunix.sft import hooks

    class Ticks(hooks.TrainingHooks):
        def on_train_start(self, trainer):
            clock.start()

        def on_train_end(self, trainer):
            pass

        def on_train_step_start(self, trainer):
            pass

        def on_train_step_end(self, trainer, step, loss):
            clock.tick()
            losses.append(loss)

        def on_eval_step_start(self, trainer):
            pass

        def on_eval_step_end(self, trainer, loss):
            pass

    return Ticks()


def optimizer(sizes: dict):
    """AdamW with clipping, as everybody's."""
    import optax

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(sizes["learning_rate"], weight_decay=sizes["weight_decay"]),
    )


def main() -> None:
    args = parse(__doc__, loss={"choices": ("default", "gather"), "default": "gather"})
    import importlib.metadata

    import jax
    import numpy as np
    from tunix.sft import peft_trainer, utils

    sizes = args.sizes
    clock = Clock(args.warmup)
    losses = []
    steps = args.warmup + args.steps
    trainer = peft_trainer.PeftTrainer(
        build_model(sizes, args.remat),
        optimizer(sizes),
        # Its hooks run one step late: they see a step's end when the next is queued.
        peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=steps + 1),
    )
    trainer.with_training_hooks(ticking_hooks(clock, losses))
    if args.loss == "gather":
        trainer.with_loss_fn(lean_loss)

    def model_input(batch):
        positions = utils.build_positions_from_mask(batch.input_mask)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": positions,
            "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
        }

    trainer.with_gen_model_input_fn(model_input)
    data = [
        peft_trainer.TrainingInput(tokens, np.ones(tokens.shape, bool))
        for tokens in batches(sizes, steps + 1)
    ]
    trainer.train(data)
    clock.ticks = clock.ticks[: steps + 1]
    clock.cpu_ticks = clock.cpu_ticks[: steps + 1]
    report(
        "Tunix PeftTrainer",
        args,
        clock,
        settings=f"loss={args.loss}, cached graph, optimizer state donated",
        versions=f"tunix {importlib.metadata.version('google-tunix')}, "
        f"jax {jax.__version__}",
        loss=float(losses[-1]),
    )


if __name__ == "__main__":
    main()
