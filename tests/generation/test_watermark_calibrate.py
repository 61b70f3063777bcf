"""Calibration: facts of a corpus against a loop, forecasts against marked texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder
from oracles import watermark as oracle

from jaxpost import generation
from jaxpost.generation import watermark

MODEL = FakeDecoder()
PARAMS = MODEL.init(jax.random.key(3))
KEYS = [watermark.WatermarkKey(n, VOCAB) for n in range(3)]
GAMMAS = (0.25, 0.5)


@pytest.fixture(scope="module")
def corpus():
    """The model's own unmarked texts, 24 of 4 + 60 tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB, (24, 4))
    rollout = generation.generate(
        MODEL,
        PARAMS,
        prompts,
        np.ones(prompts.shape, bool),
        config=generation.SamplingConfig(max_new_tokens=60, temperature=0.8),
        key=jax.random.key(1),
    )
    tokens = np.concatenate([prompts, np.asarray(rollout.tokens)], axis=1)
    mask = np.broadcast_to(np.arange(64)[None] >= 4, tokens.shape).copy()
    return tokens, mask


@pytest.fixture(scope="module")
def facts(corpus):
    tokens, mask = corpus
    return watermark.measure_tokens(
        MODEL, PARAMS, tokens, mask, keys=KEYS, gammas=GAMMAS, temperature=0.8
    )


def test_facts_are_those_of_a_loop(corpus, facts):
    tokens, _ = corpus
    assert facts.masses.shape == (3, 2, 24 * 60)
    hidden = MODEL.apply(
        PARAMS, jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(64)[None], (24, 64))
    ).hidden
    logits = np.asarray(hidden @ PARAMS["head"], np.float64)
    rng = np.random.default_rng(1)
    for place in rng.integers(0, 24 * 60, 12):
        row, column = divmod(int(place), 60)
        column += 4
        raw = logits[row, column - 1]
        shown = oracle.softmax((raw / 0.8).tolist())
        previous, token = int(tokens[row, column - 1]), int(tokens[row, column])
        assert facts.document[place] == row
        height = oracle.entropy(oracle.softmax(raw.tolist()))
        assert facts.entropies[place] == pytest.approx(height, abs=1e-5)
        assert facts.logps[place] == pytest.approx(math.log(shown[token]), abs=1e-4)
        for k, key in enumerate(KEYS):
            for n, gamma in enumerate(GAMMAS):
                rows = watermark.green_list(jnp.asarray([previous]), key, gamma=gamma)
                green = set(np.flatnonzero(np.asarray(rows)[0]).tolist())
                mass = sum(shown[i] for i in green)
                assert facts.masses[k, n, place] == pytest.approx(mass, abs=1e-5)
                assert facts.green[k, n, place] == (token in green)


def test_cost_is_that_of_whole_distributions():
    """KL and perplexity by summing over the vocabulary, for one position."""
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(8))
    green = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    delta, temperature, token = 1.5, 0.7, 3
    weights = p * np.exp(delta / temperature * green)
    q = weights / weights.sum()
    facts = watermark.TokenFacts(
        np.zeros(1, np.int32),
        np.array([2.0], np.float32),
        np.log(p[[token]]),
        p[green].sum().reshape(1, 1, 1),
        green[token].reshape(1, 1, 1),
    )
    settings = {"gammas": [0.5], "length": 100, "false_positive_rate": 0.01}
    (found,) = watermark.forecast(
        facts, taus=[-1.0], deltas=[delta], temperature=temperature, **settings
    )
    assert found.kl == pytest.approx(float(np.sum(q * np.log(q / p))), rel=1e-6)
    assert found.perplexity == pytest.approx(1 / q[token], rel=1e-6)
    assert found.plain_perplexity == pytest.approx(1 / p[token], rel=1e-6)
    assert found.green_fraction == pytest.approx(q[green].sum(), rel=1e-6)
    (spared,) = watermark.forecast(facts, taus=[2.0], deltas=[delta], **settings)
    assert (spared.kl, spared.power, spared.scored) == (0.0, 0.0, 0.0)


def test_forecasts_come_true_on_marked_texts(facts):
    """z and power of 96 texts per key, marked as forecast."""
    gamma, delta, tau, length = 0.25, 1.0, 1.5, 60
    (expected,) = watermark.forecast(
        watermark.TokenFacts(
            facts.document,
            facts.entropies,
            facts.logps,
            facts.masses[:, :1],
            facts.green[:, :1],
        ),
        gammas=[gamma],
        taus=[tau],
        deltas=[delta],
        length=length,
        false_positive_rate=0.01,
        temperature=0.8,
    )
    rng = np.random.default_rng(5)
    prompts = rng.integers(0, VOCAB, (96, 4))
    z, scored = [], []
    for key in KEYS:
        rollout = generation.generate(
            MODEL,
            PARAMS,
            prompts,
            np.ones(prompts.shape, bool),
            config=generation.SamplingConfig(max_new_tokens=length, temperature=0.8),
            processors=(watermark.processor(key, gamma=gamma, delta=delta, tau=tau),),
            key=jax.random.key(2),
        )
        tokens = np.concatenate([prompts, np.asarray(rollout.tokens)], axis=1)
        mask = np.broadcast_to(np.arange(64)[None] >= 4, tokens.shape)
        heights = watermark.token_entropies(MODEL, PARAMS, tokens, mask)
        found = watermark.detect_batch(tokens, heights, mask, key, gamma=gamma, tau=tau)
        z += [one.z for one in found]
        scored += [one.scored for one in found]
    assert np.mean(scored) == pytest.approx(expected.scored, rel=0.1)
    assert np.mean(z) == pytest.approx(expected.z, abs=0.6)
    power = np.mean(np.array(z) > expected.z_threshold)
    assert power == pytest.approx(expected.power, abs=0.1)
    assert 0.05 < expected.power < 0.99  # a case that could go wrong


def test_the_cheapest_setting_with_the_power_is_proposed(facts):
    found = watermark.forecast(
        facts,
        gammas=GAMMAS,
        taus=[-1.0, 1.0, 2.0],
        deltas=[1.0, 2.0, 4.0],
        length=100,
        false_positive_rate=0.01,
        temperature=0.8,
    )
    assert len(found) == 18
    chosen = watermark.propose(found, power=0.9)
    enough = [one for one in found if one.power >= 0.9]
    assert chosen.kl == min(one.kl for one in enough)
    best = watermark.propose(found, power=1.1)
    assert best.power == max(one.power for one in found)
    with pytest.raises(ValueError, match="no forecast"):
        watermark.propose([], power=0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": []}, "at least one"),
        ({"keys": [KEYS[0], watermark.WatermarkKey(1, 20)]}, "one vocabulary"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"gammas": (1.0,)}, "gamma must lie in"),
        ({"mask": np.ones((2, 8), bool)}, "False in column 0"),
    ],
)
def test_corpora_that_cannot_be_measured(changed, message):
    mask = np.ones((2, 8), bool)
    mask[:, 0] = False
    arguments = {"mask": mask, "keys": KEYS, "gammas": GAMMAS, **changed}
    with pytest.raises(ValueError, match=message):
        watermark.measure_tokens(
            MODEL, PARAMS, np.zeros((2, 8), int), arguments.pop("mask"), **arguments
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"false_positive_rate": 1.0}, "false_positive_rate"),
        ({"gammas": [0.5]}, "2 values of gamma, got 1"),
    ],
)
def test_forecasts_that_cannot_be_made(facts, changed, message):
    arguments = {
        "gammas": GAMMAS,
        "taus": [0.5],
        "deltas": [1.0],
        "length": 10,
        "false_positive_rate": 0.05,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        watermark.forecast(facts, **arguments)
