"""Pendulum, noisy labels, and what the control recipe says about its numbers."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import recipes
from jaxpost.losses import PairwiseConfig
from jaxpost.recipes import _control_pendulum as pendulum
from jaxpost.recipes import _control_preferences as preferences
from jaxpost.recipes import _control_report as report
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._control_preferences import Noise
from jaxpost.recipes.control import ControlConfig

# --- the environment ---


def play_by_hand(theta, speed, torques):
    """Gymnasium's `Pendulum-v1`, one float at a time."""
    rewards = []
    for torque in torques:
        torque = min(max(torque, -2.0), 2.0)
        angle = math.atan2(math.sin(theta), math.cos(theta))
        rewards.append(-(angle**2 + 0.1 * speed**2 + 0.001 * torque**2))
        speed += (3 * 10.0 / 2 * math.sin(theta) + 3.0 * torque) * 0.05
        speed = min(max(speed, -8.0), 8.0)
        theta += speed * 0.05
    return rewards, theta, speed


@pytest.mark.parametrize("name", sorted(pendulum.ENVIRONMENTS))
def test_pendulum_obeys_its_equations(name):
    if name == "gymnax":
        pytest.importorskip("gymnax", reason="gymnax is not installed")
    environment = pendulum.ENVIRONMENTS[name]()
    start = environment.reset(jax.random.key(3))
    torques = np.random.default_rng(0).uniform(-3.0, 3.0, 60).astype(np.float32)
    cosine, sine, speed = np.asarray(environment.observe(start), float)
    assert abs(speed) <= 1.0 / 8.0
    wanted, theta, speed = play_by_hand(
        math.atan2(sine, cosine), 8.0 * speed, torques.tolist()
    )
    last, found = jax.lax.scan(environment.step, start, jnp.asarray(torques))
    # A chaotic system: float32 drifts off within some tens of steps.
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        environment.observe(last),
        [math.cos(theta), math.sin(theta), speed / 8.0],
        atol=2e-3,
    )


def test_gymnax_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match="environment: builtin"):
        pendulum.gymnax_pendulum()


# --- labels ---


def some_segments(count=300, steps=25, seed=0):
    draw = np.random.default_rng(seed)
    rewards = -np.abs(draw.normal(size=(count, 1)) + draw.normal(size=(count, steps)))
    inputs = draw.normal(size=(count, steps, preferences.FEATURES))
    return preferences.Segments(np.float32(inputs), np.float32(rewards))


def pairs_of(noise, segments=None, count=1280, seed=1):
    segments = segments or some_segments()
    draw = np.random.default_rng(seed)
    return preferences.draw_pairs(segments, noise, count, batch=64, draw=draw)


def test_clean_labels_are_those_of_the_returns():
    segments = some_segments()
    (chosen, rejected), flipped = pairs_of(Noise("clean"), segments)
    returns = segments.rewards.astype(float).sum(axis=1)
    assert np.all(chosen != rejected)
    assert np.all(returns[chosen] > returns[rejected])
    assert flipped == 0.0


def test_every_noise_labels_the_same_pairs():
    def unordered(noise):
        return np.sort(np.stack(pairs_of(noise)[0]), axis=0)

    clean = unordered(Noise("clean"))
    for noise in (Noise("stochastic", 1.0), Noise("myopic", 0.5)):
        np.testing.assert_array_equal(unordered(noise), clean)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_stochastic_labels_are_wrong_as_often_as_the_model_says(temperature):
    gaps = np.random.default_rng(0).normal(size=40_000)
    labels = preferences.label(
        Noise("stochastic", temperature),
        gaps,
        gaps[:, None],
        0 * gaps[:, None],
        64,
        np.random.default_rng(1),
    )
    wrong = np.mean(labels != (gaps > 0.0))
    expected = np.mean([1.0 / (1.0 + math.exp(abs(g) / temperature)) for g in gaps])
    assert abs(wrong - expected) < 4 * 0.5 / math.sqrt(len(gaps))


def test_myopic_labels_discount_what_came_first():
    first = np.array([[9.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    second = np.array([[0.0, 0.0, 2.0], [9.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    labels = preferences.label(
        Noise("myopic", 0.3),
        first.mean(axis=1) - second.mean(axis=1),
        first,
        second,
        1,
        np.random.default_rng(0),
    )
    # 9 * 0.09 + 1 < 2; 1 > 9 * 0.09; 0.3 > 0.09.
    assert labels.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("power", "flips"), [(1 / 3, 4), (0.5, 8), (2 / 3, 16), (1.0, 64)]
)
def test_irrational_labels_flip_the_clearest_pairs_of_a_batch(power, flips):
    gaps = np.random.default_rng(0).normal(size=128)
    rewards = gaps[:, None]
    labels = preferences.label(
        Noise("irrational", power),
        gaps,
        rewards,
        0 * rewards,
        64,
        np.random.default_rng(0),
    )
    wrong = (labels != (gaps > 0.0)).reshape(2, 64)
    for row, sizes in zip(wrong, np.abs(gaps).reshape(2, 64), strict=True):
        assert row.sum() == flips
        if flips < 64:
            assert sizes[row].min() > sizes[~row].max()


# --- the reward network ---


@pytest.mark.parametrize(
    "loss",
    [
        PairwiseConfig(),
        PairwiseConfig("r3m", lam=0.5),
        PairwiseConfig("adaptive_scaling", rho0=0.1, tau_min=0.1, tau_max=3.0),
    ],
    ids=lambda loss: loss.name,
)
def test_a_linear_reward_is_learned_from_clean_pairs(loss):
    segments = some_segments(200, 5)
    weights = np.array([1.0, -2.0, 0.5, 0.0])
    segments = segments._replace(rewards=segments.features @ weights)
    config = preferences.PreferenceConfig(epochs=20, train_pairs=640, hidden=16)
    (chosen, rejected), _ = pairs_of(Noise("clean"), segments, 640)
    inputs = jnp.asarray(segments.features)
    fit = jax.jit(preferences.make_fit(loss, config))
    start = preferences.init_reward(jax.random.key(1), config.hidden)
    params = fit(start, inputs, chosen, rejected, jax.random.key(0))
    learned = np.asarray(preferences.segment_returns(params, inputs))
    test, _ = pairs_of(Noise("clean"), segments, 1280, seed=9)
    assert preferences.accuracy(learned, test) > 0.9


def test_ties_count_half():
    pairs = preferences.Pairs(np.array([0, 1, 2]), np.array([1, 2, 0]))
    assert preferences.accuracy(np.zeros(3), pairs) == 0.5
    assert preferences.accuracy(np.array([2.0, 1.0, 1.0]), pairs) == 0.5


# --- what is said ---


def some_cells(gain, seeds=5):
    draw = np.random.default_rng(0)
    level = draw.normal(-300.0, 80.0, seeds)  # that differ more than the losses do
    cells = []
    for rate in (1.0, 2.0):
        for name, more in (("bradley_terry", 0.0), ("r3m", gain)):
            returns = (level + more + draw.normal(0.0, 5.0, seeds)).tolist()
            same = [0.9] * seeds
            noise = Noise("stochastic", rate)
            cells.append(report.Cell(noise, name, {}, same, same, same, returns))
    return cells


@pytest.mark.parametrize(
    ("gain", "seeds", "words"),
    [
        (40.0, 5, "return higher .*at 2 of 2 rates.*under stochastic"),
        (-40.0, 5, "return lower .*at 0 of 2 rates.*under none of them"),
        (0.0, 5, "return no difference shown"),
        (40.0, 1, "one seed shows nothing"),
    ],
)
def test_verdicts_follow_the_paired_interval(gain, seeds, words):
    said = " ".join(report.sentences(some_cells(gain, seeds)))
    assert re.search(words, said), said


def test_the_interval_is_students():
    cells = some_cells(40.0)
    differences = np.mean(
        [np.subtract(b.returns, a.returns) for a, b in (cells[:2], cells[2:])], axis=0
    )
    mean, low, high = report.paired(cells[1::2], cells[::2], "returns")
    half = 2.7764 * differences.std(ddof=1) / math.sqrt(5)  # t, 4 degrees of freedom
    np.testing.assert_allclose(
        [mean, low, high],
        differences.mean() + np.array([0.0, -half, half]),
        rtol=1e-4,
    )


# --- settings ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"losses": [{"name": "r3m", "lam": 0.5}]}, "must begin with bradley_terry"),
        ({"losses": [{"name": "r3m"}]}, "r3m needs lam"),
        ({"ppo": {"minibatches": 7}}, "must divide into minibatches"),
        ({"ppo": {"iterations": 3}}, "preferences.rounds must be below"),
        ({"preferences": {"train_pairs": 100}}, "multiple of batch_pairs = 64"),
        ({"preferences": {"segment_steps": 30}}, "must divide 200"),
        ({"noise": {"stochastic": [0.0]}}, "stochastic must be positive"),
        ({"noise": {"myopic": [1.5]}}, "myopic must lie in"),
        ({"environment": "cartpole"}, "environment must be one of"),
    ],
)
def test_wrong_settings_are_refused(values, words):
    from jaxpost.recipes._config import from_mapping

    with pytest.raises(ConfigError, match=words):
        from_mapping(ControlConfig, {"recipe": "control", **values})


def test_resume_is_refused():
    with pytest.raises(ConfigError, match="cannot resume"):
        recipes.run(ControlConfig(), resume=True)
