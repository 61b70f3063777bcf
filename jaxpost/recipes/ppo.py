"""Proximal policy optimisation: a critic, advantages per token, clipped updates.

`jaxpost train configs/ppo/NAME.yaml`, or `run(PPOConfig(...))`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxpost import training
from jaxpost.recipes import _ppo_round, _ppo_run, _reference, _rewards, _run, _setup
from jaxpost.recipes._policy import PolicySection
from jaxpost.recipes._ppo_round import AdvantageSection
from jaxpost.recipes._ppo_terms import (
    CriticSection,
    PPOKLSection,
    PPOOptimizerConfig,
    PPORolloutSection,
)
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
    TrainSection,
)
from jaxpost.rewards import RewardSection
from jaxpost.typing import RewardFn


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of one run.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of fresh weights, the order of the prompts and the sampler.
        rewards: What answers are judged by.
        rollout: How they are drawn, and how often they are trained on.
        advantage: From rewards and values to advantages.
        policy: The policy's loss.
        critic: The value function.
        kl: The pull to a live copy of the first model.
        processes: On which hosts.
        mesh: On which devices.
        model: Which model.
        lora: Not supported here; rank must be 0.
        data: Which prompts; their other columns reach the rewards by name.
        optimizer: Which update of the policy, and of the critic but for its rate.
        train: How long, `batch_size` being prompts and `steps` optimizer steps.
        export: What to write at the end.
    """

    recipe: Literal["ppo"] = "ppo"
    name: str = "ppo"
    run_root: str = "runs"
    seed: int = 0
    rewards: tuple[RewardSection, ...] = (RewardSection(),)
    rollout: PPORolloutSection = PPORolloutSection()
    advantage: AdvantageSection = AdvantageSection()
    policy: PolicySection = PolicySection()
    critic: CriticSection = CriticSection()
    kl: PPOKLSection = PPOKLSection()
    processes: ProcessesSection = ProcessesSection()
    mesh: MeshSection = MeshSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    optimizer: PPOOptimizerConfig = PPOOptimizerConfig()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    def __post_init__(self) -> None:
        _ppo_run.refuse_lora(self.recipe, self.lora)


def run(
    config: PPOConfig,
    *,
    resume: bool = False,
    rewards: Mapping[str, RewardFn] | None = None,
) -> training.TrainState:
    """Trains, evaluates, saves and exports as `config` says.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.
        rewards: functions by name, each of weight 1, instead of `config.rewards`.

    Returns:
        The last state; its parameters hold the critic's under `critic`.
    """
    with (
        _run.open_run(
            config, resume=resume, kind=_setup.PROMPTS, updates=config.rollout.updates
        ) as run,
        _rewards.open_judge(config.rewards, rewards) as judge,
    ):
        frozen = {}
        if config.kl.used:
            first = run.model.replace(params=_reference.live_copy(run))
            frozen = {"reference": first}
        return _ppo_run.train(
            run,
            earn=_ppo_round.judged,
            frozen=frozen,
            reference="reference" if frozen else None,
            judge=judge,
            eval_judge=judge,
            method="Proximal policy optimisation of verifiable rewards.",
        )
