"""Control from noisy preferences: a reward learned of trajectory pairs, then PPO.

`jaxpost train configs/control/pendulum.yaml`, or `run(ControlConfig(...))`. For each
seed: PPO on the true reward leaves policies from untrained to good; these play the
segments; pairs of segments are labelled with each noise; each pairwise loss fits a
reward network; PPO maximises that, and the true return is what counts.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import training
from jaxpost.losses import PairwiseConfig
from jaxpost.recipes import _control_pendulum as _pendulum
from jaxpost.recipes import _control_ppo as _ppo
from jaxpost.recipes import _control_preferences as _preferences
from jaxpost.recipes import _control_report as _report
from jaxpost.recipes._config import ConfigError, to_mapping
from jaxpost.recipes._control_ppo import PPOConfig
from jaxpost.recipes._control_preferences import Noise, PreferenceConfig

# Brings the true reward to about mean 0 and variance 1 over the mixed segments.
_TRUE_MEAN, _TRUE_SCALE = -5.0, 4.0


@dataclasses.dataclass(frozen=True)
class NoiseSection:
    """Which noises, and at which rates (those of arXiv 2406.15568, section 5.1).

    Attributes:
        clean: Also with true labels.
        stochastic: Temperatures, in reward per step.
        myopic: Discounts of what came before.
        irrational: Of a batch of B pairs, the B to this power with the largest gap are
            flipped.
    """

    clean: bool = True
    stochastic: tuple[float, ...] = (1.0, 2.0, 3.0)
    myopic: tuple[float, ...] = (0.3, 0.5, 0.7)
    irrational: tuple[float, ...] = (1 / 3, 1 / 2, 2 / 3)

    def __post_init__(self) -> None:
        if any(rate <= 0.0 for rate in self.stochastic):
            raise ValueError(f"stochastic must be positive, got {self.stochastic}.")
        for name in ("myopic", "irrational"):
            if any(not 0.0 <= rate <= 1.0 for rate in getattr(self, name)):
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)}."
                )

    def all(self) -> list[Noise]:
        found = [Noise("clean")] if self.clean else []
        for name in ("stochastic", "myopic", "irrational"):
            found += [Noise(name, rate) for rate in getattr(self, name)]
        return found


_LOSSES = (
    PairwiseConfig("bradley_terry"),
    *(PairwiseConfig("r3m", lam=lam) for lam in (0.3, 0.5, 0.7)),
    *(
        PairwiseConfig("adaptive_scaling", rho0=rho0, tau_min=0.1, tau_max=tau_max)
        for rho0 in (0.1, 0.5)
        for tau_max in (1.0, 3.0)
    ),
)


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Settings of one run over all noises, losses and seeds.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of everything that is drawn.
        seeds: How many independent repetitions.
        environment: Pendulum of our own, or gymnax's (the same equations).
        noise: How labels come about.
        preferences: Pairs and reward network.
        losses: Pairwise losses; of those with one name, the setting with the best
            accuracy on noisy validation pairs is taken, for each noise.
        ppo: Settings of the reinforcement learning.
        test_episodes: Played by each trained policy, without exploration.
    """

    recipe: Literal["control"] = "control"
    name: str = "control"
    run_root: str = "runs"
    seed: int = 0
    seeds: int = 5
    environment: Literal["builtin", "gymnax"] = "builtin"
    noise: NoiseSection = NoiseSection()
    preferences: PreferenceConfig = PreferenceConfig()
    losses: tuple[PairwiseConfig, ...] = _LOSSES
    ppo: PPOConfig = PPOConfig()
    test_episodes: int = 50

    def __post_init__(self) -> None:
        for name in ("seeds", "test_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1.")
        if not self.noise.all():
            raise ValueError("noise names no way to make labels.")
        if self.losses[:1] != (PairwiseConfig("bradley_terry"),):
            raise ValueError(
                "losses must begin with bradley_terry, which the others are compared "
                "with."
            )
        if not all(0 <= r < self.ppo.iterations for r in self.preferences.rounds):
            raise ValueError(
                f"preferences.rounds must be below ppo.iterations = "
                f"{self.ppo.iterations}, got {self.preferences.rounds}."
            )


class Reward(NamedTuple):
    """What PPO maximises: a network's output, standardised, or the true reward."""

    params: Any
    mean: jax.Array
    scale: jax.Array
    is_true: jax.Array


class Trained(NamedTuple):
    """First axis the seeds.

    Fields:
        policies: after each round, leaves `[seeds, rounds, ...]`.
        curve: mean true return of each round's episodes, `[seeds, rounds]`.
        returns: mean true return of the last policy without exploration, `[seeds]`.
    """

    policies: _ppo.Policy
    curve: jax.Array
    returns: jax.Array


Train = Callable[[Reward, jax.Array], Trained]
"""(rewards and keys, first axis the seeds) -> what came of it."""


class Source(NamedTuple):
    """What the true reward gave, first axis the seeds.

    Fields:
        curve: mean true return of each round's episodes, `[seeds, rounds]`.
        returns: of the last policy without exploration, `[seeds]`.
        seconds: that the training took, compilation apart.
        train, test: segments for the fit, and for the test, a pair for each seed.
    """

    curve: np.ndarray
    returns: np.ndarray
    seconds: float
    train: list[_preferences.Segments]
    test: list[_preferences.Segments]


def run(config: ControlConfig, *, resume: bool = False) -> list[_report.Cell]:
    """Everything that `config` says; table, figure and JSON go to the run folder.

    Args:
        config: the settings.
        resume: not supported: a run takes minutes.

    Raises:
        ConfigError: `resume` is True.
        FileExistsError: the run folder holds a run already.
        ImportError: matplotlib is not installed, or gymnax is asked for and is not.
    """
    if resume:
        raise ConfigError(
            "the control recipe takes minutes and cannot resume: start it anew, under "
            "another name."
        )
    _report.need_matplotlib()
    environment = _pendulum.ENVIRONMENTS[config.environment]()
    path = pathlib.Path(config.run_root) / config.name
    with training.create_run(
        path, to_mapping(config), seeds={"all": config.seed}
    ) as folder:
        start = time.perf_counter()
        train = make_train(config, environment)
        source = play_source(config, environment, train)
        _say(
            f"PPO on the true reward: {_report.spread(source.curve[:, 0])} -> "
            f"{_report.spread(source.returns)} in {source.seconds:.1f} s "
            f"({config.seeds} seeds)"
        )
        cells, curves = compare(config, source, train)
        for index in range(config.ppo.iterations):
            line = {name: curve[index] for name, curve in curves.items()}
            folder.log_metrics({"step": index + 1, **line})
        _write(config, path, source, cells, time.perf_counter() - start)
    return cells


def make_train(config: ControlConfig, environment: _pendulum.Environment) -> Train:
    """PPO of all seeds, compiled once for true and learned rewards alike.

    Compiling takes longer than training.
    """
    init = functools.partial(_ppo.init_policy, hidden=config.ppo.hidden)
    policies = jax.jit(jax.vmap(init))(_keys(config, 5))

    def train(source: Reward, policy: _ppo.Policy, key: jax.Array) -> Trained:
        def reward(observations, torques, true):
            inputs = _preferences.features(observations, torques)
            learned = (_ppo.mlp(source.params, inputs) - source.mean) / source.scale
            return jnp.where(source.is_true, (true - _TRUE_MEAN) / _TRUE_SCALE, learned)

        found, curve = _ppo.train_ppo(environment, reward, config.ppo, policy, key)
        steps = _ppo.play(
            environment,
            jax.tree.map(lambda x: x[-1], found),
            config.test_episodes,
            jax.random.fold_in(key, 1),
            explore=False,
        )
        return Trained(found, curve, jnp.mean(jnp.sum(steps.rewards, axis=1)))

    example = (_true_reward(config), policies, _keys(config, 0))
    compiled = jax.jit(jax.vmap(train)).lower(*example).compile()
    return lambda source, keys: jax.block_until_ready(compiled(source, policies, keys))


def play_source(
    config: ControlConfig, environment: _pendulum.Environment, train: Train
) -> Source:
    """Trains on the true reward and plays segments with policies on the way."""
    preferences = config.preferences
    start = time.perf_counter()
    policies, curve, returns = train(_true_reward(config), _keys(config, 0))
    seconds = time.perf_counter() - start

    rounds = np.array(preferences.rounds)
    chosen = jax.tree.map(lambda x: x[:, rounds], policies)
    play = functools.partial(_ppo.play, environment)
    of_policies = jax.vmap(lambda p, key: play(p, preferences.episodes, key))
    of_seeds = jax.jit(jax.vmap(of_policies))
    pools = []
    for part in (1, 2):
        part_keys = jax.vmap(lambda k: jax.random.split(k, len(rounds)))(
            _keys(config, part)
        )
        steps = of_seeds(chosen, part_keys)
        pools.append(
            [
                _preferences.cut(
                    jax.tree.map(lambda x, s=seed: x[s], steps),
                    preferences.segment_steps,
                )
                for seed in range(config.seeds)
            ]
        )
    return Source(np.asarray(curve), np.asarray(returns), seconds, *pools)


def compare(
    config: ControlConfig, source: Source, train: Train
) -> tuple[list[_report.Cell], dict[str, np.ndarray]]:
    """Fits and trains for each noise and loss; also mean returns of each round."""
    noises = config.noise.all()
    fits = []
    for setting in config.losses:
        fits.append(_fit(config, setting, noises, source))
        _say(f"rewards fitted by {_named(setting)} under {len(noises)} noises")
    names = list(dict.fromkeys(setting.name for setting in config.losses))
    cells, curves = [], {"return/true_reward": source.curve.mean(axis=0)}
    for place, noise in enumerate(noises):
        for name in names:
            tried = [
                (setting, fit)
                for setting, fit in zip(config.losses, fits, strict=True)
                if setting.name == name
            ]
            # The first of equals, so that ties are broken the same way each time.
            setting, fit = max(tried, key=lambda x: float(np.mean(x[1].valid[place])))
            _, curve, returns = train(fit.rewards[place], _keys(config, 4))
            varied = {k: v for k, v in setting.settings().items() if k != "tau_min"}
            cell = _report.Cell(
                noise,
                name,
                varied,
                fit.flipped[place],
                fit.accuracy[place],
                fit.correlation[place],
                np.asarray(returns).tolist(),
            )
            cells.append(cell)
            key = f"return/{str(noise).replace(' ', '_')}/{name}"
            curves[key] = np.asarray(curve).mean(axis=0)
            _say(f"{noise}, {_report.SHOWN[name]}: {_report.spread(cell.returns)}")
    return cells, curves


def _named(setting: PairwiseConfig) -> str:
    values = ", ".join(f"{k} {v:g}" for k, v in setting.settings().items())
    return f"{_report.SHOWN[setting.name]} {values}".rstrip()


class _Fits(NamedTuple):
    """What came of one setting, for each noise, then each seed."""

    rewards: list[Reward]
    flipped: list[list[float]]
    valid: list[list[float]]
    accuracy: list[list[float]]
    correlation: list[list[float]]


def _fit(
    config: ControlConfig,
    setting: PairwiseConfig,
    noises: Sequence[Noise],
    source: Source,
) -> _Fits:
    keys, no = _keys(config, 3), jnp.zeros(config.seeds, bool)
    start = _initial_rewards(_keys(config, 6), hidden=config.preferences.hidden)
    fit = jax.jit(jax.vmap(_preferences.make_fit(setting, config.preferences)))
    learned = jax.jit(jax.vmap(_preferences.segment_returns))
    seen = jnp.stack([pool.features for pool in source.train])
    unseen = jnp.stack([pool.features for pool in source.test])
    rows: list[tuple] = []
    for noise in noises:
        pairs = [_pairs(config, noise, source, seed) for seed in range(config.seeds)]
        params = fit(
            start,
            seen,
            np.stack([p["train"].chosen for p in pairs]),
            np.stack([p["train"].rejected for p in pairs]),
            keys,
        )
        fitted, tested = (np.asarray(learned(params, x)) for x in (seen, unseen))
        seeds = range(config.seeds)
        true = [pool.rewards.sum(axis=1) for pool in source.test]
        mean, scale = _moments(params, seen)
        rows.append(
            (
                Reward(params, mean, scale, no),
                [p["flipped"] for p in pairs],
                [_preferences.accuracy(fitted[s], pairs[s]["valid"]) for s in seeds],
                [_preferences.accuracy(tested[s], pairs[s]["test"]) for s in seeds],
                [float(np.corrcoef(tested[s], true[s])[0, 1]) for s in seeds],
            )
        )
    return _Fits(*(list(column) for column in zip(*rows, strict=True)))


def _pairs(
    config: ControlConfig, noise: Noise, source: Source, seed: int
) -> dict[str, Any]:
    """The same pairs for every noise and every loss; only the labels differ."""
    settings = config.preferences

    def drawn(part: int, pool: _preferences.Segments, noise: Noise, count: int):
        draw = np.random.default_rng([config.seed, seed, part])
        batch = settings.batch_pairs
        return _preferences.draw_pairs(pool, noise, count, batch=batch, draw=draw)

    train, flipped = drawn(0, source.train[seed], noise, settings.train_pairs)
    valid, _ = drawn(1, source.train[seed], noise, settings.validation_pairs)
    test, _ = drawn(2, source.test[seed], Noise("clean"), settings.test_pairs)
    return {"train": train, "valid": valid, "test": test, "flipped": flipped}


@jax.jit
@jax.vmap
def _moments(params: Any, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the learned reward per step."""
    rewards = _ppo.mlp(params, features.reshape(-1, features.shape[-1]))
    return jnp.mean(rewards), jnp.std(rewards) + 1e-6


@functools.partial(jax.jit, static_argnames="hidden")
def _initial_rewards(keys: jax.Array, *, hidden: int) -> Any:
    """Networks to start the fits from, the same for every loss."""
    return jax.vmap(lambda key: _preferences.init_reward(key, hidden))(keys)


def _true_reward(config: ControlConfig) -> Reward:
    ones = jnp.ones(config.seeds)
    unused = _initial_rewards(_keys(config, 6), hidden=config.preferences.hidden)
    return Reward(unused, ones, ones, ones > 0.0)


def _keys(config: ControlConfig, part: int) -> jax.Array:
    """A key for each seed and part of the run.

    0 true reward, 1 and 2 segments, 3 fits, 4 learned rewards, 5 policies, 6 networks.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), part)
    return jax.random.split(key, config.seeds)


def _write(
    config: ControlConfig,
    path: pathlib.Path,
    source: Source,
    cells: list[_report.Cell],
    seconds: float,
) -> None:
    said = _report.sentences(cells)
    head = (
        f"PPO on the true reward: {_report.spread(source.curve[:, 0])} untrained, "
        f"{_report.spread(source.returns)} trained ({source.seconds:.1f} s for "
        f"{config.seeds} seeds, compilation apart)."
    )
    text = f"{head}\n\n{_report.table(cells)}\n" + "\n".join(f"- {x}" for x in said)
    (path / "control.md").write_text(text + "\n", encoding="utf-8")
    settings = {k: v for k, v in to_mapping(config).items() if k != "run_root"}
    results = {
        "true_reward": {
            "before": source.curve[:, 0].tolist(),
            "after": source.returns.tolist(),
            "seconds": source.seconds,
        },
        "cells": _report.as_json(cells),
        "sentences": said,
        "seconds": seconds,
        "config": settings,
    }
    (path / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    _report.draw_figure(cells, source.returns.tolist(), path / "control.svg")
    _say(f"\n{text}\n\n{path}: control.md, control.svg, results.json ({seconds:.0f} s)")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
