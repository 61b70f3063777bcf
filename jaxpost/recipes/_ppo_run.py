"""How the recipes of PPO run: a critic beside the policy, rounds, export."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost import models, training
from jaxpost.recipes import _export, _ppo_round, _ppo_terms, _rounds
from jaxpost.recipes._ppo_round import EarnFn
from jaxpost.recipes._ppo_terms import CRITIC
from jaxpost.recipes._round_rows import Judge
from jaxpost.recipes._run import Run
from jaxpost.recipes._samples import EvalFn
from jaxpost.recipes._sections import LoraSection
from jaxpost.typing import Params


def refuse_lora(recipe: str, lora: LoraSection) -> None:
    """Raises a ValueError that names the key, if adapters are asked for."""
    if lora.rank:
        raise ValueError(
            f"lora.rank is {lora.rank}, but {recipe} trains whole models so far, a "
            "policy and its critic: set it to 0, or choose recipe grpo."
        )


def open_critic(run: Run) -> models.Model:
    """A copy of the run's model that expects nothing yet: its score head is zero."""
    scored = models.add_score_head(
        run.model,
        jax.random.key(0),  # drawn, then zeroed
        mesh=run.layout.mesh,
        rules=run.layout.rules,
    )
    copy = jax.tree.map(jnp.copy, scored.params)
    # Multiplied, so that it stays on its devices.
    params = copy | {"score": jax.tree.map(lambda x: 0.0 * x, copy["score"])}
    return scored.replace(params=params)


def two_rates(
    config: training.OptimizerConfig, total_steps: int, *, critic_rate: float | None
) -> optax.GradientTransformation:
    """One optimizer for the policy and one for `params["critic"]`, each with its own
    learning rate and its own clipping.

    Args:
        config: of both.
        total_steps: see `training.build_optimizer`.
        critic_rate: the critic's peak learning rate; None is the policy's.
    """
    if critic_rate is not None:
        other = dataclasses.replace(config, learning_rate=critic_rate)
    else:
        other = config
    parts: dict[Hashable, optax.GradientTransformation] = {
        "policy": training.build_optimizer(config, total_steps)[0],
        CRITIC: training.build_optimizer(other, total_steps)[0],
    }
    return optax.partition(
        parts,
        lambda params: {
            name: CRITIC if name == CRITIC else "policy" for name in params
        },
    )


def train(
    run: Run,
    *,
    earn: EarnFn,
    frozen: Mapping[str, models.Model],
    reference: str | None,
    judge: Judge | None,
    eval_judge: Judge | None,
    method: str,
) -> training.TrainState:
    """Trains, evaluates, saves and exports the policy as the run's config says.

    Args:
        run: opened with `PROMPTS`, not trained yet; its config has the sections of a
            PPO recipe.
        earn: gives a round's rewards.
        frozen: models that the round is read by, by name; their parameters stay.
        reference: which of them a KL is measured from, or None.
        judge: of the answers drawn, or None.
        eval_judge: of greedy answers to held-out prompts, or None.
        method: in words, for the exported model's card.

    Returns:
        The last state.
    """
    config, critic = run.config, open_critic(run)
    wide = _with_critic(run, critic)
    lookup = run.layout.lookup
    policy, valued = (model.with_lookup(lookup) for model in (run.model, critic))
    options: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "dtype": run.compute_dtype,
        "token_logps": run.layout.token_logps,
    }
    rounds = _rounds.Rounds(
        run,
        config.rollout,
        judge=judge,
        score=_ppo_round.score_round(
            policy,
            valued,
            {name: model.with_lookup(lookup) for name, model in frozen.items()},
            **options,
        ),
        finish=_ppo_round.finish_round(
            earn,
            reference=reference,
            advantage=config.advantage,
            kl=config.kl,
            divide_by=config.policy.divide_by,
            max_tokens=config.rollout.max_new_tokens,
        ),
    )
    loss_fn = _ppo_terms.ppo_loss(
        policy,
        valued,
        policy=config.policy,
        kl=config.kl,
        value=config.critic,
        **options,
    )
    step = training.make_train_step(
        loss_fn,
        wide.tx,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
    )
    held: Params = {name: model.params for name, model in frozen.items()}
    state = dataclasses.replace(wide, lengths=rounds.lengths).train(
        step,
        loss_fn,
        frozen=held or None,
        batches=rounds,
        prepare=rounds.prepare,
        eval_fn=_evaluation(run, eval_judge),
    )
    if config.export.enabled:
        _export.export(run, state, method=method)
    return state


def _evaluation(run: Run, judge: Judge | None) -> EvalFn:
    found = judge and _rounds.held_out_rewards(run, run.config.rollout, judge)
    return found or (lambda state: {})


def _with_critic(run: Run, critic: models.Model) -> Run:
    """The run that trains both; its model is not for sampling."""
    params = run.model.params | {CRITIC: critic.params}
    tx = two_rates(
        run.config.optimizer,
        run.total_steps,
        critic_rate=run.config.critic.learning_rate,
    )
    return dataclasses.replace(run, model=run.model.replace(params=params), tx=tx)
