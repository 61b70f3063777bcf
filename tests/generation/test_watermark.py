"""Green lists and their embedding."""

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
from jaxpost.generation._watermark_hash import are_green, grid

SMALL = watermark.WatermarkKey(15485863, 50)


def green_sets(key: watermark.WatermarkKey, previous, gamma: float) -> list[set[int]]:
    rows = watermark.green_list(jnp.asarray(previous), key, gamma=gamma)
    return [set(np.flatnonzero(row).tolist()) for row in np.asarray(rows)]


@pytest.mark.parametrize("vocab", [2, 3, 4, 31, 50, 53, 512])
@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_green_lists_are_those_of_plain_integers(vocab, gamma, strict_dtypes):
    if int(gamma * vocab) == 0:
        pytest.skip("no id would be green")
    key = watermark.WatermarkKey(2**127 + 12345, vocab)
    previous = [0, 1, vocab - 1]
    expected = [
        oracle.green_ids(
            key.secret, key.scheme, p, int(gamma * vocab), vocab, grid(vocab)
        )
        for p in previous
    ]
    assert green_sets(key, previous, gamma) == expected


@hypothesis.given(
    vocab=st.sampled_from([2, 5, 53, 211, 400]),
    gamma=st.floats(0.01, 0.99),
    secret=st.integers(0, 2**128 - 1),
    previous=st.integers(0, 2**24),
)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_exactly_as_many_ids_are_green_as_asked_for(vocab, gamma, secret, previous):
    count = math.floor(gamma * vocab)
    hypothesis.assume(0 < count < vocab)
    key = watermark.WatermarkKey(secret, vocab)
    (ids,) = green_sets(key, [previous], gamma)
    (again,) = green_sets(key, [previous], gamma)
    assert len(ids) == count
    assert ids == again


@pytest.mark.parametrize("vocab", [31, 512, 32000, 32003, 50257])
def test_one_id_is_looked_up_as_in_the_whole_list(vocab):
    key, count = watermark.WatermarkKey(9, vocab), np.uint32(vocab // 4)
    previous = jnp.asarray([0, vocab // 2, vocab - 1])
    ids = jnp.arange(-1, vocab + 1)
    rows = watermark.green_list(previous, key, gamma=0.25)
    assert np.asarray(rows).sum(axis=1).tolist() == [vocab // 4] * 3
    single = jax.jit(are_green, static_argnums=4)(
        key.words,
        jnp.broadcast_to(previous[:, None], (3, vocab + 2)),
        jnp.broadcast_to(ids[None], (3, vocab + 2)),
        count,
        vocab,
    )
    assert np.array_equal(single[:, 1:-1], rows)
    assert not np.asarray(single[:, [0, -1]]).any()  # outside the vocabulary


def test_the_list_after_token_0_depends_on_the_key():
    sets = [green_sets(watermark.WatermarkKey(n, 200), [0], 0.5)[0] for n in range(30)]
    overlaps = [len(a & b) for i, a in enumerate(sets) for b in sets[:i]]
    # Hypergeometric: mean 50, standard deviation 3.5.
    assert abs(np.mean(overlaps) - 50) < 1.5
    assert max(overlaps) < 75


def test_each_id_and_each_pair_is_green_as_often_as_in_a_random_list():
    vocab, lists, gamma = 2000, 4000, 0.25
    key = watermark.WatermarkKey(77, vocab)
    rows = np.asarray(
        watermark.green_list(jnp.arange(lists), key, gamma=gamma), np.float32
    )
    spread = math.sqrt(gamma * (1 - gamma) / lists)
    z = (rows.mean(axis=0) - gamma) / spread
    assert abs(z).max() < 5
    assert 0.9 < z.std() < 1.1
    centred = (rows - gamma) / math.sqrt(gamma * (1 - gamma))
    pairs = (centred.T @ centred) / math.sqrt(lists)
    others = pairs[~np.eye(vocab, dtype=bool)]
    # Independent lists give a standard normal; one list in the next one's place too.
    assert 0.97 < others.std() < 1.03
    following = np.mean(centred[1:] * centred[:-1]) * math.sqrt(lists * vocab)
    assert abs(following) < 4


def test_green_mass_of_any_distribution_varies_as_under_random_lists():
    """The null distribution of z rests on this, for peaked distributions too."""
    vocab, gamma = 32000, 0.25
    key, rng = watermark.WatermarkKey(3, vocab), np.random.default_rng(0)
    rows = np.asarray(watermark.green_list(jnp.arange(400), key, gamma=gamma))
    for power in (0.0, 1.0, 2.0):
        weights = 1.0 / np.arange(1, vocab + 1) ** power
        weights = rng.permutation(weights / weights.sum())
        mass = rows @ weights
        variance = gamma * (1 - gamma) * (np.sum(weights**2) - 1 / vocab)
        z = (mass.mean() - gamma) / math.sqrt(max(variance, 1e-30) / len(rows))
        if power:
            assert abs(z) < 4
            assert 0.8 < mass.var() / variance < 1.25
        else:  # exactly as many green ids in each list
            assert np.abs(mass - gamma).max() < 1e-12


def test_the_green_mass_of_uniform_logits():
    key = watermark.WatermarkKey(1, 4)
    logits = watermark.watermark_logits(
        jnp.zeros((1, 4)), jnp.asarray([2]), key, gamma=0.5, delta=2.0, tau=-1.0
    )
    green = watermark.green_list(jnp.asarray([2]), key, gamma=0.5)
    mass = float(jnp.sum(jnp.where(green, jax.nn.softmax(logits), 0.0)))
    assert mass == pytest.approx(0.8807970780, abs=1e-7)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.25] * 4, 1.3862943611),
        ([0.5, 0.25, 0.25, 0.0], 1.0397207708),
        ([0.97, 0.01, 0.01, 0.01], 0.1677005368),
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.8, 0.2, 0.0, 0.0], 0.5004024235),
    ],
)
def test_entropies(probabilities, expected):
    from jaxpost.generation._sampling import spread

    logits = jnp.asarray([[math.log(p) if p else -math.inf for p in probabilities]])
    assert oracle.entropy(probabilities) == pytest.approx(expected, abs=1e-10)
    for of in (watermark.entropy, lambda logits: spread(logits).entropies):
        assert float(of(logits)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tau", [-1.0, 1.2, 3.8])
@pytest.mark.parametrize("width", [50, 64])
def test_logits_are_those_of_a_loop(tau, width, strict_dtypes):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(6, width)) * np.array([0, 1, 2, 3, 4, 6])[:, None]
    logits[3, 7] = -np.inf
    previous = rng.integers(0, 50, 6)
    marked = watermark.watermark_logits(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(previous, jnp.int32),
        SMALL,
        gamma=0.25,
        delta=2.0,
        tau=tau,
    )
    greens = green_sets(SMALL, previous, 0.25)
    expected = [
        oracle.marked_logits(row, p, green, 2.0, tau)
        for row, p, green in zip(logits, previous, greens, strict=True)
    ]
    assert np.allclose(marked, expected, rtol=1e-6, atol=1e-6)
    changed = np.any(np.asarray(marked) != logits.astype(np.float32), axis=1)
    assert changed.any()
    assert changed.all() == (tau < 0.0)
    assert not np.any(np.asarray(marked)[:, 50:] != logits[:, 50:].astype(np.float32))


def test_a_threshold_that_is_met_but_not_exceeded_marks_nothing():
    logits = jnp.asarray([[0.3, -1.0, 2.0, 0.1]])
    height = float(np.asarray(watermark.entropy(logits))[0])
    key = watermark.WatermarkKey(1, 4)

    def changed(tau: float) -> bool:
        out = watermark.watermark_logits(
            logits, jnp.asarray([0]), key, gamma=0.5, delta=1.0, tau=tau
        )
        return bool(jnp.any(out != logits))

    assert changed(height - 1e-6)
    assert not changed(height + 1e-6)


def test_a_constant_added_to_logits_changes_no_decision():
    logits = jax.random.normal(jax.random.key(0), (4, 50)) * 3.0
    previous, settings = jnp.arange(4), {"gamma": 0.5, "delta": 2.0, "tau": 1.5}
    plain = watermark.watermark_logits(logits, previous, SMALL, **settings)
    shifted = watermark.watermark_logits(logits + 8.0, previous, SMALL, **settings)
    assert np.array_equal(plain != logits, shifted != logits + 8.0)


# Embedding within the decode loop.

MODEL = FakeDecoder()
PARAMS = MODEL.init(jax.random.key(3))
KEY = watermark.WatermarkKey(5, VOCAB)
CONFIG = generation.SamplingConfig(max_new_tokens=24, temperature=0.8)


@jax.jit
def logits_of(tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[0])[None]
    return MODEL.apply(PARAMS, tokens[None], positions).hidden[0] @ PARAMS["head"]


def whole_logits(tokens: np.ndarray) -> np.ndarray:
    """Raw logits `[T, V]` of one text, without a cache."""
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(logits_of(padded))[: len(tokens)]


@pytest.fixture(scope="module")
def marked_texts():
    """Prompts of many lengths, padded on either side, and their marked answers."""
    rng = np.random.default_rng(0)
    mask = np.ones((8, 6), bool)
    for row in range(8):
        mask[row, : row % 4] = False
        mask[row] = mask[row] if row % 2 else mask[row, ::-1]
    prompts = np.where(mask, rng.integers(0, VOCAB, mask.shape), -7)
    processor = watermark.processor(KEY, gamma=0.25, delta=4.0, tau=1.5)
    rollout = generation.generate(
        MODEL,
        PARAMS,
        prompts,
        mask,
        config=CONFIG,
        processors=(processor,),
        key=jax.random.key(1),
    )
    texts = [prompts[row][mask[row]] for row in range(8)]
    return texts, jax.device_get(rollout), processor


def test_every_token_was_drawn_from_the_marked_distribution(marked_texts):
    """Also the first, whose predecessor is the prompt's last token."""
    prompts, rollout, _ = marked_texts
    marked, greens = 0, green_sets(KEY, np.arange(VOCAB), 0.25)
    for row, prompt in enumerate(prompts):
        text = np.concatenate([prompt, rollout.tokens[row]])
        logits = whole_logits(text[:-1])[len(prompt) - 1 :]
        for step, raw in enumerate(logits):
            previous, token = (
                int(text[len(prompt) - 1 + step]),
                rollout.tokens[row, step],
            )
            shown = oracle.marked_logits(raw, previous, greens[previous], 4.0, 1.5)
            marked += bool((shown != raw).any())
            expected = math.log(oracle.softmax((shown / 0.8).tolist())[token])
            assert rollout.sampling_logps[row, step] == pytest.approx(
                expected, abs=1e-4
            )
            plain = math.log(oracle.softmax((raw / 0.8).tolist())[token])
            assert rollout.logps[row, step] == pytest.approx(plain, abs=1e-4)
    assert 20 < marked < 8 * 24  # some steps were above the threshold, some not


def test_slots_embed_what_batches_embed(marked_texts):
    prompts, rollout, processor = marked_texts
    stream = generation.generate_stream(
        MODEL,
        PARAMS,
        [prompt.astype(np.int32) for prompt in prompts],
        config=CONFIG,
        slots=3,
        processors=(processor,),
        key=jax.random.key(1),
    )
    found = generation.as_rollout(list(stream), max_new_tokens=24)
    assert np.array_equal(found.tokens, rollout.tokens)


def test_another_key_or_strength_compiles_nothing(marked_texts):
    prompts, rollout, _ = marked_texts
    before = generation.trace_counts()
    other = watermark.WatermarkKey(6, VOCAB)
    for key, delta, tau in ((other, 4.0, 1.5), (KEY, 2.0, 1.5), (KEY, 4.0, 0.5)):
        processor = watermark.processor(key, gamma=0.5, delta=delta, tau=tau)
        again = generation.generate(
            MODEL,
            PARAMS,
            np.stack([np.resize(prompt, 6) for prompt in prompts]),
            np.ones((8, 6), bool),
            config=CONFIG,
            processors=(processor,),
            key=jax.random.key(1),
        )
        assert not np.array_equal(again.tokens, rollout.tokens)
    assert generation.trace_counts() == before


def test_no_strength_or_a_threshold_out_of_reach_changes_no_answer(marked_texts):
    prompts, _, _ = marked_texts

    def answers(*processors) -> np.ndarray:
        return np.asarray(
            generation.generate(
                MODEL,
                PARAMS,
                np.stack([np.resize(prompt, 6) for prompt in prompts]),
                np.ones((8, 6), bool),
                config=CONFIG,
                processors=processors,
                key=jax.random.key(1),
            ).tokens
        )

    weak = watermark.processor(KEY, gamma=0.5, delta=0.0, tau=0.5)
    with pytest.warns(UserWarning, match="nothing is ever marked"):
        never = watermark.processor(KEY, gamma=0.5, delta=9.0, tau=10.0)
    assert np.array_equal(answers(weak), answers())
    assert np.array_equal(answers(never), answers())


def test_keys_are_told_apart_and_keep_their_secret():
    key = watermark.WatermarkKey(123456789, 50)
    assert "123456789" not in repr(key)
    others = [
        watermark.WatermarkKey(123456788, 50),
        watermark.WatermarkKey(123456789, 51),
    ]
    assert len({k.fingerprint for k in (key, *others)}) == 3
    new = watermark.WatermarkKey.new(50)
    assert new.secret != watermark.WatermarkKey.new(50).secret


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"secret": -1, "vocab_size": 50}, "at least 0"),
        ({"secret": 2**128, "vocab_size": 50}, "below"),
        ({"secret": "x", "vocab_size": 50}, "must be an integer, got str"),
        ({"secret": 1, "vocab_size": 1}, "at least 2"),
        ({"secret": 1, "vocab_size": 50.0}, "must be an integer"),
        ({"secret": 1, "vocab_size": 50, "scheme": "simple_1"}, "simple_1"),
    ],
)
def test_keys_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        watermark.WatermarkKey(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"gamma": 1.0}, "gamma must lie in"),
        ({"gamma": 0.01}, "makes 0 of 50"),
        ({"delta": -0.5}, "delta must be finite and at least 0"),
        ({"delta": math.inf}, "delta must be finite"),
        ({"tau": math.nan}, "tau must be a number"),
    ],
)
def test_settings_that_cannot_be_used(changed, message):
    settings = {"gamma": 0.5, "delta": 2.0, "tau": 0.9, **changed}
    with pytest.raises(ValueError, match=message):
        watermark.processor(SMALL, **settings)


@pytest.mark.parametrize(
    ("logits", "previous", "message"),
    [
        (
            np.zeros((2, 40)),
            [0, 1],
            "vocabulary of 50 ids, but the model has logits of",
        ),
        (np.full((2, 50), np.nan), [0, 1], r"rows \[0, 1\] are not finite"),
        (np.full((1, 50), np.inf), [0], "not finite"),
        (np.full((1, 50), -np.inf), [0], "not finite"),
        (np.zeros((2, 50)), [0], r"logits must be \[B, W\]"),
    ],
)
def test_logits_that_cannot_be_marked(logits, previous, message):
    with pytest.raises(ValueError, match=message):
        watermark.watermark_logits(
            jnp.asarray(logits, jnp.float32),
            jnp.asarray(previous),
            SMALL,
            gamma=0.5,
            delta=1.0,
            tau=-1.0,
        )
