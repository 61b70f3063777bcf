"""Tunix's GRPOLearner with its own sampler, on its Llama 3 of this size.

One device plays all roles and actor and sampler share their weights; no reference model
(`beta=0`), logging, evaluation or checkpoints. Prints one JSON line.
"""

import os

from generate_tunix import NoTokenizer
from grpo_settings import Stopwatch, parse, prompt_tokens, report, rewards_of
from sft_settings import Clock

os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Numbers(NoTokenizer):
    """Answers are numbers in words too, for the reward."""

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def main() -> None:
    args = parse(
        __doc__,
        microbatch={"type": int, "default": 0, "help": "prompts; 0 takes all"},
    )
    import importlib.metadata

    import jax
    import numpy as np
    from sft_tunix import build_model, optimizer
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    sizes = args.sizes
    clock, rollout = Clock(args.warmup), Stopwatch()
    steps = args.warmup + args.steps
    total = sizes["prompt"] + sizes["new_tokens"]
    microbatch = args.microbatch or sizes["prompts"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.RLCluster(
        actor=build_model(sizes, args.remat),
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(sizes),
                eval_every_n_steps=10**9,
                max_steps=steps,
                mini_batch_size=sizes["prompts"],
                train_micro_batch_size=microbatch,
                rollout_micro_batch_size=sizes["prompts"],
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=sizes["new_tokens"],
                max_prompt_length=sizes["prompt"],
                kv_cache_size=total,
                temperature=sizes["temperature"],
                top_p=1.0,
                top_k=None,
                eos_tokens=[-1],
            ),
        ),
    )

    def reward(prompts, completions, **_):
        return rewards_of([list(map(int, c.split())) for c in completions], sizes)

    learner = grpo_learner.GRPOLearner(
        cluster,
        grpo_learner.GRPOConfig(
            num_generations=sizes["samples"], beta=0.0, epsilon=sizes["clip"]
        ),
        reward,
    )
    learner._generate_and_compute_advantage = rollout.around(
        learner._generate_and_compute_advantage
    )
    run_step = learner._run_global_step

    def whole_step(*step_args):
        run_step(*step_args)
        jax.block_until_ready(jax.tree.leaves(learner_state(cluster)))
        clock.tick()
        rollout.mark()

    learner._run_global_step = whole_step
    data = [
        {"prompts": np.array([" ".join(map(str, row)) for row in prompts])}
        for prompts in prompt_tokens(sizes, steps).tolist()
    ]
    clock.start()
    learner.train(data)
    report(
        "Tunix GRPOLearner",
        args,
        clock,
        rollout,
        settings=f"{microbatch} prompts at a time, vanilla rollout",
        versions=f"tunix {importlib.metadata.version('google-tunix')}, "
        f"jax {jax.__version__}",
    )


def learner_state(cluster):
    """The parameters being trained."""
    from flax import nnx

    return nnx.state(cluster.actor_trainer.model)


if __name__ == "__main__":
    main()
