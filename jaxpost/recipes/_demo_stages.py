"""The runs of the demo as configs: base, fine-tuning, and what comes after it."""

import dataclasses
import pathlib
from typing import Any

from jaxpost import training
from jaxpost.recipes import grpo, self_rewarding_ppo, sft
from jaxpost.recipes._policy import PolicySection
from jaxpost.recipes._ppo_terms import (
    CriticSection,
    PPOKLSection,
    PPOOptimizerConfig,
    PPORolloutSection,
)
from jaxpost.recipes._rounds import RolloutSection
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    MeshSection,
    ModelSection,
    TrainSection,
)
from jaxpost.recipes.self_rewarding_ppo import SelfRewardSection
from jaxpost.rewards import RewardSection

LICENCE = "apache-2.0"
ANSWER_TOKENS = 80
"""Longest answer, tokens; worked answers take at most 65."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train, fine-tune, optimise and export a small model; needs no download.

    Attributes:
        name: Of the run folder; `demo-` and the time if not given.
        run_root: Folder of the run folders.
        seed: Of the problems, fresh weights, the order of the data and the sampler.
        base_steps: Optimizer steps of the base model.
        steps: Optimizer steps of fine-tuning.
        self_rewarding_steps: Optimizer steps of Self-Rewarding PPO.
        policy_steps: Optimizer steps of GRPO.
        grade: Of the problems that both of them are given, without answers.
        batch_size: Packed rows per step of base and fine-tuning.
        max_length: Tokens of a packed row, and the longest problem with its answer.
        base_problems: Questions that the base model is trained on.
        problems: Problems with worked answers to fine-tune on.
        prompts: Problems to draw answers to.
        batch_prompts: Of them per round.
        samples: Answers to each of them in GRPO.
        eval_problems: Held-out problems of each grade that every model answers.
        hidden_size: Width of the model.
        intermediate_size: Feed-forward width.
        num_layers: Layers.
        num_heads: Attention heads.
        learning_rate: Peak learning rate of base and fine-tuning.
        policy_learning_rate: Peak learning rate of GRPO.
        self_rewarding_learning_rate: Peak learning rate of Self-Rewarding PPO.
    """

    name: str | None = None
    run_root: str = "runs"
    seed: int = 0
    base_steps: int = 300
    steps: int = 1550
    self_rewarding_steps: int = 60
    policy_steps: int = 200
    grade: int = 4
    batch_size: int = 16
    max_length: int = 128
    base_problems: int = 12_000
    problems: int = 31_000
    prompts: int = 8_000
    batch_prompts: int = 32
    samples: int = 8
    eval_problems: int = 200
    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 2
    num_heads: int = 2
    learning_rate: float = 6e-3
    policy_learning_rate: float = 3e-4
    self_rewarding_learning_rate: float = 3e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "seed" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")
        if self.grade > 4:
            raise ValueError(f"grade must be at most 4, got {self.grade}.")


def base_config(config: DemoConfig, folder: pathlib.Path) -> sft.SFTConfig:
    """Plain language modelling on questions, without a worked answer or a result."""
    return _sft_config(
        config,
        folder,
        name="base",
        form="question",
        count=config.base_problems,
        steps=config.base_steps,
        model=ModelSection(
            tokenizer=str(folder / "tokenizer"),
            family="qwen3",  # normalised queries and keys bear the high learning rate
            tie_embeddings=False,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            max_positions=2 * config.max_length,
        ),
    )


def sft_config(config: DemoConfig, folder: pathlib.Path) -> sft.SFTConfig:
    """Fine-tuning of that model on worked answers; only they are trained on."""
    return _sft_config(
        config,
        folder,
        name="sft",
        form="worked",
        count=config.problems,
        steps=config.steps,
        model=ModelSection(path=str(folder / "base" / "export")),
    )


def _sft_config(
    config: DemoConfig,
    folder: pathlib.Path,
    *,
    name: str,
    form: str,
    count: int,
    steps: int,
    model: ModelSection,
) -> sft.SFTConfig:
    problems = f"builtin:arithmetic?form={form}&seed={config.seed}&count="
    return sft.SFTConfig(
        **_common(config, folder, name),
        model=model,
        data=DataSection(
            train=f"{problems}{count}",
            eval=f"{problems}{min(200, count)}",
            max_length=config.max_length,
        ),
        optimizer=training.OptimizerConfig(
            name="muon",  # fewer steps than AdamW to the same loss, at this size
            learning_rate=config.learning_rate,
            schedule="wsd",
            decay_fraction=0.6,
            warmup_fraction=0.03,
            final_fraction=0.02,
            b1=0.95,
            b2=0.98,
            weight_decay=0.01,
        ),
        train=TrainSection(
            steps=steps,
            batch_size=config.batch_size,
            eval_every=max(1, steps // 6),
            keep_last=1,
            sample_prompts=0,
        ),
    )


def self_rewarding_config(
    config: DemoConfig, folder: pathlib.Path
) -> self_rewarding_ppo.SelfRewardingPPOConfig:
    """On from the fine-tuned model, rewarded by how much likelier than the base's an
    answer has become; held-out answers are checked, but never rewarded."""
    return self_rewarding_ppo.SelfRewardingPPOConfig(
        **_common(config, folder, "self_rewarding_ppo"),
        **_prompts(config, folder, config.self_rewarding_steps),
        self_reward=SelfRewardSection(base=str(folder / "base" / "export")),
        kl=PPOKLSection(in_reward=1.0),  # to the fine-tuned model
        rollout=PPORolloutSection(
            samples=2,
            max_new_tokens=ANSWER_TOKENS,
            epochs=2,
            minibatches=2,
            show_every=20,
        ),
        critic=CriticSection(learning_rate=1e-3),
        eval_rewards=(RewardSection(),),
        optimizer=PPOOptimizerConfig(
            learning_rate=config.self_rewarding_learning_rate, schedule="linear"
        ),
    )


def grpo_config(config: DemoConfig, folder: pathlib.Path) -> grpo.GRPOConfig:
    """On from the fine-tuned model too, rewarded for the right final number."""
    return grpo.GRPOConfig(
        **_common(config, folder, "grpo"),
        **_prompts(config, folder, config.policy_steps),
        advantage="leave_one_out",
        rollout=RolloutSection(
            samples=config.samples, max_new_tokens=ANSWER_TOKENS, show_every=50
        ),
        policy=PolicySection(divide_by="constant"),
        optimizer=training.OptimizerConfig(
            learning_rate=config.policy_learning_rate,
            schedule="linear",
            warmup_fraction=0.05,
            final_fraction=0.1,
            b2=0.99,
        ),
    )


def _common(config: DemoConfig, folder: pathlib.Path, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "run_root": str(folder),
        "seed": config.seed,
        "mesh": MeshSection(devices=1),
        "export": ExportSection(license=LICENCE),
    }


def _prompts(config: DemoConfig, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """From the fine-tuned model, on problems of one grade that it has not been taught;
    some of the test split are answered on the way."""
    problems = f"builtin:arithmetic?grades={config.grade}&seed={config.seed + 100}"
    return {
        "model": ModelSection(path=str(folder / "sft" / "export")),
        "data": DataSection(
            train=f"{problems}&count={config.prompts}",
            eval=f"{problems}&count={min(100, config.prompts)}",
            max_length=config.max_length,
        ),
        "train": TrainSection(
            steps=steps,
            batch_size=config.batch_prompts,
            eval_every=max(1, steps // 4),
            keep_last=1,
            sample_prompts=0,
        ),
    }
