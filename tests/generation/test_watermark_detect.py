"""Detection: oracles of the statistics, invariants, and the errors it promises."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder
from oracles import watermark as oracle

from jaxpost import generation
from jaxpost.generation import watermark

KEY = watermark.WatermarkKey(5, VOCAB)
MODEL = FakeDecoder()
PARAMS = MODEL.init(jax.random.key(3))


def green_of(key: watermark.WatermarkKey, gamma: float):
    rows = watermark.green_list(jnp.arange(key.vocab_size), key, gamma=gamma)
    sets = [set(np.flatnonzero(row).tolist()) for row in np.asarray(rows)]
    return lambda previous: sets[previous]


@pytest.mark.parametrize(
    ("green", "scored", "gamma", "z", "p"),
    [
        (60, 100, 0.5, 2.0, 0.0227501319),
        (40, 100, 0.25, 3.4641016151, 2.660027526e-4),
        (25, 100, 0.25, 0.0, 0.5),
        (10, 10, 0.25, 5.4772255751, 2.16023e-8),
        (0, 10, 0.5, -3.1622776602, 0.9992172989),
        (28, 50, 0.25, 5.0622787, 2.07137e-7),
    ],
)
def test_z_and_p(green, scored, gamma, z, p):
    found = watermark.z_scores(green, scored, gamma=gamma)
    # As many digits as the numbers above have.
    assert found == pytest.approx(z, rel=3e-8, abs=1e-12)
    assert watermark.p_values(found) == pytest.approx(p, rel=1e-5)
    assert (found, watermark.p_values(found)) == pytest.approx(
        oracle.z_and_p(green, scored, gamma), rel=1e-12
    )
    exact = watermark.binomial_tails(green, scored, gamma=gamma)
    assert exact == pytest.approx(oracle.tail(green, scored, gamma), rel=1e-10)


@pytest.mark.parametrize(
    ("scored", "gamma", "fewest"),
    [(20, 0.5, 19), (16, 0.5, None), (10, 0.25, 8), (15, 0.25, 11), (20, 0.25, 13)],
)
def test_fewest_green_tokens_that_exceed_the_threshold(scored, gamma, fewest):
    assert watermark.fewest_green(scored, gamma=gamma) == fewest


@hypothesis.given(
    data=st.data(),
    length=st.integers(2, 60),
    gamma=st.sampled_from([0.1, 0.25, 0.5]),
    tau=st.sampled_from([-1.0, 0.5, 1.2]),
    unique=st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_detection_is_that_of_a_loop(data, length, gamma, tau, unique):
    prompt_length = data.draw(st.integers(1, length - 1))
    ids = st.lists(st.integers(0, 4), min_size=length, max_size=length)
    tokens = data.draw(ids)  # few ids, so that pairs come again
    heights = [0.0, 0.5, 0.7, 1.2, 2.0]
    entropies = [heights[i] for i in data.draw(ids)]
    found = watermark.detect(
        tokens, entropies, prompt_length, KEY, gamma=gamma, tau=tau, unique=unique
    )
    z, scored, green = oracle.detect(
        tokens, entropies, prompt_length, green_of(KEY, gamma), gamma, tau, unique
    )
    assert (found.scored, found.green) == (scored, green)
    assert found.z == pytest.approx(z, rel=1e-12, abs=1e-12)
    assert found.green_fraction == (green / scored if scored else 0.0)
    assert found.watermarked_fraction == scored / (length - prompt_length)
    assert int(found.marks.scored.sum()) == scored
    assert not found.marks.green[:prompt_length].any()


def test_a_batch_is_its_texts_one_by_one():
    rng = np.random.default_rng(1)
    lengths, starts = [30, 9, 17], [3, 1, 16]
    tokens, entropies = rng.integers(0, VOCAB, (3, 32)), rng.uniform(0, 2, (3, 32))
    entropies[:, 30:] = np.nan  # after the end anything may stand
    columns = np.arange(32)[None]
    mask = (columns >= np.array(starts)[:, None]) & (
        columns < np.array(lengths)[:, None]
    )
    settings = {"gamma": 0.25, "tau": 0.9, "unique": True}
    batch = watermark.detect_batch(tokens, entropies, mask, KEY, **settings)
    for row, found in enumerate(batch):
        n = lengths[row]
        alone = watermark.detect(
            tokens[row, :n], entropies[row, :n], starts[row], KEY, **settings
        )
        assert (found.z, found.scored, found.green, found.verdict) == (
            alone.z,
            alone.scored,
            alone.green,
            alone.verdict,
        )


def test_random_tokens_have_z_of_mean_0_and_variance_1():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, (600, 120))
    mask = np.ones(tokens.shape, bool)
    mask[:, 0] = False
    found = []
    for secret in range(5):
        key = watermark.WatermarkKey(secret, 1000)
        rows = watermark.detect_batch(
            tokens, np.ones(tokens.shape), mask, key, gamma=0.25, tau=-1.0
        )
        found += [row.z for row in rows]
    error = 1 / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3.5 * error
    assert 0.95 < np.std(found) < 1.05


def test_repeats_inflate_z_and_unique_scoring_does_not():
    """A text of one sentence over and over, under 400 keys."""
    rng = np.random.default_rng(0)
    tokens = np.resize(rng.integers(0, 1000, 40), 400)
    entropies = np.ones(400)
    spread = {}
    for unique in (False, True):
        zs = []
        for secret in range(400):
            key = watermark.WatermarkKey(secret, 1000)
            found = watermark.detect(
                tokens, entropies, 1, key, gamma=0.5, tau=0.5, unique=unique
            )
            zs.append(found.z)
        spread[unique] = np.std(zs)
    assert 0.85 < spread[True] < 1.15
    assert spread[False] == pytest.approx(math.sqrt(10), rel=0.15)


def test_no_threshold_is_wllm():
    """Every token of the text is scored, whatever its entropy, as in WLLM."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, 50)
    wllm = watermark.detect(tokens, None, 5, KEY, gamma=0.5, tau=-1.0)
    zeros = watermark.detect(tokens, np.zeros(50), 5, KEY, gamma=0.5, tau=-1.0)
    assert wllm.scored == zeros.scored == 45
    assert wllm.z == zeros.z


def test_a_threshold_out_of_reach_scores_nothing():
    tokens = np.arange(20) % VOCAB
    with pytest.warns(UserWarning, match="nothing is ever marked or scored"):
        found = watermark.detect(tokens, np.ones(20), 1, KEY, gamma=0.5, tau=4.0)
    assert (found.z, found.p, found.scored, found.green_fraction) == (-100, 1, 0, 0)
    assert found.verdict == "insufficient tokens"
    assert found.prediction is None


def test_too_few_tokens_are_no_human_text():
    greens, tokens = green_of(KEY, 0.5), [0]
    for _ in range(17):
        tokens.append(min(greens(tokens[-1])))
    settings = {"gamma": 0.5, "tau": 0.0}
    short = watermark.detect(tokens[:17], np.ones(17), 1, KEY, **settings)
    assert (short.z, short.scored, short.green) == (4.0, 16, 16)
    assert short.verdict == "insufficient tokens"
    assert "z could not exceed 4.0" in short.reason
    longer = watermark.detect(tokens, np.ones(18), 1, KEY, **settings)
    assert longer.verdict == "watermarked"
    assert longer.prediction is True
    assert longer.confidence == 1.0 - longer.p
    strict = watermark.detect(tokens, np.ones(18), 1, KEY, **settings, z_threshold=4.2)
    assert strict.verdict == "insufficient tokens"
    human = watermark.detect([0] * 41, np.ones(41), 1, KEY, **settings)
    assert human.verdict == ("watermarked" if human.z > 4 else "not detected")
    assert human.prediction is (human.z > 4)


@pytest.fixture(scope="module")
def generated():
    """Tokens and masks of marked texts, and the entropies seen while decoding them."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB, (32, 4))
    rollout = generation.generate(
        MODEL,
        PARAMS,
        prompts,
        np.ones((32, 4), bool),
        config=generation.SamplingConfig(max_new_tokens=60),
        processors=(watermark.processor(KEY, gamma=0.25, delta=4.0, tau=1.5),),
        key=jax.random.key(1),
    )
    tokens = np.concatenate([prompts, np.asarray(rollout.tokens)], axis=1)
    mask = np.broadcast_to(np.arange(64)[None] >= 4, tokens.shape)
    return tokens, mask, np.asarray(rollout.entropies)


def test_one_pass_decides_as_decoding_did_but_near_the_threshold(generated):
    tokens, mask, decoded = generated
    entropies = np.asarray(watermark.token_entropies(MODEL, PARAMS, tokens, mask))
    assert not entropies[:, :4].any()
    assert np.abs(entropies[:, 4:] - decoded).max() < 1e-5
    for tau in (1.5, float(np.median(decoded)), float(decoded[0, 0])):
        marks = watermark.mark_tokens(tokens, entropies, mask, KEY, gamma=0.25, tau=tau)
        then = decoded > np.float32(tau)
        flipped = np.asarray(marks.scored)[:, 4:] != then
        near = np.asarray(marks.near)[:, 4:]
        assert not (flipped & ~near).any()
        distance = np.abs(entropies[:, 4:].astype(np.float64) - tau)
        assert abs(int(near.sum()) - int((distance < 1e-4).sum())) <= 1
    assert near.sum() >= 1  # the last threshold is an entropy that was decoded


def test_marked_texts_are_found_by_their_own_key_only(generated):
    tokens, mask, _ = generated
    entropies = watermark.token_entropies(MODEL, PARAMS, tokens, mask)
    settings = {"gamma": 0.25, "tau": 1.5}
    own = watermark.detect_batch(tokens, entropies, mask, KEY, **settings)
    assert sum(found.verdict == "watermarked" for found in own) > 24
    other = watermark.WatermarkKey(6, VOCAB)
    foreign = watermark.detect_batch(
        tokens, entropies, mask, other, unique=True, **settings
    )
    assert max(found.z for found in foreign) < 4
    # Entropies off by one place are those of other tokens: the mark fades.
    late = np.roll(np.asarray(entropies), 1, axis=1)
    shifted = watermark.detect_batch(tokens, late, mask, KEY, **settings)
    assert np.mean([f.z for f in shifted]) < np.mean([f.z for f in own]) - 1


def test_detection_traces_once_per_bucket_whatever_the_key():
    from jaxpost.generation import _watermark_detect

    tokens = np.arange(30) % VOCAB
    watermark.detect(tokens, np.ones(30), 1, KEY, gamma=0.5, tau=0.5)
    size = _watermark_detect._mark._cache_size()
    for secret in range(3):
        for length in (20, 25, 30):
            key = watermark.WatermarkKey(secret, VOCAB)
            watermark.detect(
                tokens[:length], np.ones(length), 2, key, gamma=0.25, tau=0.1
            )
    assert _watermark_detect._mark._cache_size() == size


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entropies": np.ones(9)}, r"entropies must be \[T\] = \(10,\)"),
        ({"entropies": None}, "needs the generating model's entropies"),
        ({"entropies": np.full(10, np.nan)}, r"entropies\[3\] is nan"),
        ({"prompt_length": 10}, "nothing to score"),
        ({"prompt_length": 0}, "at least 1"),
        ({"tokens": np.zeros((2, 5), int)}, "integer ids"),
        ({"tokens": np.zeros(10)}, "integer ids"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"gamma": 0.001}, "makes 0 of 31"),
        ({"tau": math.nan}, "tau must be a number"),
    ],
)
def test_texts_that_cannot_be_tested(changed, message):
    arguments = {
        "tokens": np.arange(10),
        "entropies": np.ones(10),
        "prompt_length": 3,
        "gamma": 0.5,
        "tau": 0.5,
        **changed,
    }
    tokens = arguments.pop("tokens")
    entropies = arguments.pop("entropies")
    prompt_length = arguments.pop("prompt_length")
    with pytest.raises(ValueError, match=message):
        watermark.detect(tokens, entropies, prompt_length, KEY, **arguments)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 8), bool), "column 0"),
        (np.zeros((2, 8), bool), r"nothing to score in rows \[0, 1\]"),
        (np.zeros((2, 7), bool), "must be"),
    ],
)
def test_batches_that_cannot_be_tested(mask, message):
    tokens = np.zeros((2, 8), int)
    with pytest.raises(ValueError, match=message):
        watermark.detect_batch(tokens, np.ones((2, 8)), mask, KEY, gamma=0.5, tau=0.5)


def test_entropies_of_no_token_and_of_the_first_token():
    tokens = np.zeros((1, 8), int)
    with pytest.raises(ValueError, match="column 0"):
        watermark.token_entropies(MODEL, PARAMS, tokens, np.ones((1, 8), bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        watermark.token_entropies(MODEL, PARAMS, tokens, np.ones((1, 8)))
