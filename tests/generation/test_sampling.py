"""Draws against exact probabilities, filters against a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import sampling as oracle

from jaxpost.generation import SamplingConfig
from jaxpost.generation._config import split_config
from jaxpost.generation._sampling import draw_index, sample, top_k, top_p_threshold

FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.8, "temperature": 1.3},
    {"top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.1},
]


def draw(logits, uniforms, processed=None, **settings):
    plan, values = split_config(
        SamplingConfig(max_new_tokens=1, **settings), logits.shape[-1]
    )
    run = jax.jit(
        lambda raw, processed, uniforms, values: sample(
            raw, raw if processed is None else processed, uniforms, plan, values
        )
    )
    return jax.tree.map(np.asarray, run(logits, processed, uniforms, values))


def many(logits, count, seed=3, **settings):
    """`count` draws from one row of logits."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return draw(
        logits, jax.random.uniform(jax.random.key(seed), (count, 2)), **settings
    )


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [11, 300])
def test_draws_and_statistics_follow_the_exact_distribution(settings, vocab):
    logits = 1.5 * np.random.default_rng(vocab).normal(size=vocab)
    count = 20_000
    expected = oracle.filtered(logits, **settings)
    drawn = many(logits, count, **settings)
    seen = np.bincount(drawn.tokens, minlength=vocab)
    assert not seen[expected == 0.0].any()
    # Chi-square over cells that are filled enough, the rest together in one.
    big = expected * count >= 10
    observed = np.append(seen[big], seen[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum()) * count
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(len(wanted) - 1, 1)
    assert scipy.stats.chi2.sf(statistic, freedom) > 1e-3

    plain = oracle.softmax(logits / settings.get("temperature", 1.0))
    np.testing.assert_allclose(drawn.logps, np.log(plain[drawn.tokens]), atol=1e-5)
    np.testing.assert_allclose(
        drawn.sampling_logps, np.log(expected[drawn.tokens]), atol=1e-5
    )
    np.testing.assert_allclose(drawn.entropies, oracle.entropy(plain), atol=1e-5)


def test_processed_logits_move_sampling_logps_only():
    raw = np.random.default_rng(0).normal(size=(1, 200)).astype(np.float32)
    processed = raw.copy()
    processed[:, ::2] = -np.inf
    raw, processed = (np.repeat(x, 500, axis=0) for x in (raw, processed))
    uniforms = jax.random.uniform(jax.random.key(0), (500, 2))
    drawn = draw(raw, uniforms, processed)
    assert (drawn.tokens % 2 == 1).all()
    with np.errstate(divide="ignore"):
        kept = np.log(oracle.softmax(processed[0]))
    np.testing.assert_allclose(drawn.sampling_logps, kept[drawn.tokens], atol=1e-5)
    plain = oracle.softmax(raw[0])
    np.testing.assert_allclose(drawn.logps, np.log(plain[drawn.tokens]), atol=1e-5)


def test_forbidden_raw_tokens_leave_entropy_finite():
    logits = np.array([0.0, -np.inf, 1.0, -np.inf])
    drawn = many(logits, 8)
    plain = oracle.softmax(logits)
    np.testing.assert_allclose(drawn.entropies, oracle.entropy(plain), atol=1e-6)
    assert set(drawn.tokens) <= {0, 2}


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), 0)])
def test_index_of_zero_weight_is_never_drawn(uniform):
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=(64, 96)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.7] = 0.0
    weights[:, :3] = weights[:, -3:] = 0.0
    index, _ = draw_index(weights, np.full((64,), uniform, np.float32))
    assert (weights[np.arange(64), index] > 0).all()
    if uniform == 0.0:
        np.testing.assert_array_equal(index, (weights > 0).argmax(axis=1))


@pytest.mark.parametrize("settings", [{}, {"top_k": 8}], ids=str)
def test_near_is_where_a_small_step_draws_another_token(settings):
    logits = np.random.default_rng(2).normal(size=12).astype(np.float32)
    uniforms = np.random.default_rng(3).uniform(size=(20_000, 2)).astype(np.float32)
    # A tenth of them close to a border of the distribution, in steps of 1e-6.
    probs = np.sort(oracle.filtered(logits, **settings))
    if not settings:
        probs = oracle.softmax(logits)
    borders = np.cumsum(probs[::-1] if settings else probs)[:4]
    offsets = np.arange(-250, 250) * 1e-6
    # A vocabulary of one block draws by the second number, top-k by the first.
    column = 0 if settings else 1
    uniforms[:2000, column] = (borders[:, None] + offsets[None]).ravel()
    rows = np.broadcast_to(logits, (len(uniforms), 12))
    drawn = draw(rows, uniforms, **settings)

    def shifted(step):
        moved = uniforms.copy()
        moved[:, column] += step
        return draw(rows, np.clip(moved, 0, 1 - 1e-7), **settings).tokens

    # The band's own edge is a matter of rounding.
    surely = shifted(-0.9e-5) != shifted(0.9e-5)
    maybe = shifted(-1.1e-5) != shifted(1.1e-5)
    inside = (uniforms > 2e-5).all(axis=1) & (uniforms < 1 - 2e-5).all(axis=1)
    assert surely.sum() >= 4 * 16
    assert drawn.near[surely & inside].all()
    assert not drawn.near[~maybe & inside].any()


@pytest.mark.parametrize(
    ("logits", "settings", "near"),
    [
        ([2.0, 2.0 - 5e-6, 0.0], {"temperature": 0.0}, True),
        ([2.0, 2.0 - 5e-5, 0.0], {"temperature": 0.0}, False),
        ([2.0, 1.0, 1.0 - 5e-6], {"top_k": 2}, True),
        ([2.0, 1.0, 1.0 - 5e-5], {"top_k": 2}, False),
        (np.log([0.5, 0.3, 0.2]), {"top_p": 0.8 + 5e-6}, True),
        (np.log([0.5, 0.3, 0.2]), {"top_p": 0.8 - 5e-6}, True),
        (np.log([0.5, 0.3, 0.2]), {"top_p": 0.8 + 5e-5}, False),
        (np.log([0.5, 0.3, 0.2]), {"top_p": 0.8 - 5e-5}, False),
        (np.log([0.5, 0.25, 0.25 - 1e-6]), {"top_p": 0.7}, True),
        (np.log([0.5, 0.3, 0.2]), {"top_k": 3, "top_p": 0.8 + 5e-6}, True),
        (np.log([0.5, 0.3, 0.2]), {"top_k": 3, "top_p": 0.8 + 5e-5}, False),
        (np.log([0.5, 0.3, 0.2]), {"min_p": 0.4 + 1e-6}, True),
        (np.log([0.5, 0.3, 0.2]), {"min_p": 0.4 + 2e-5}, False),
        (np.log([0.5, 0.3, 0.2]), {"top_k": 3, "min_p": 0.4 - 1e-6}, True),
    ],
    ids=str,
)
def test_near_the_border_of_a_filter(logits, settings, near):
    row = np.asarray(logits, np.float32)[None]
    # Draws from the middle of the first token.
    uniforms = np.array([[0.21, 0.21]], np.float32)
    assert bool(draw(row, uniforms, **settings).near[0]) == near


def test_draw_index_inverts_the_cumulative_sum():
    weights = np.tile(np.array([1.0, 0.0, 2.0, 1.0], np.float32), (5, 1))
    uniforms = np.array([0.0, 0.24, 0.26, 0.74, 0.76], np.float32)
    np.testing.assert_array_equal(draw_index(weights, uniforms)[0], [0, 0, 2, 2, 3])


@pytest.mark.parametrize(("vocab", "k"), [(700, 1), (700, 3), (700, 50), (90, 4)])
def test_top_k_is_exact_with_ties(vocab, k):
    rng = np.random.default_rng(k)
    logits = rng.integers(0, 12, size=(20, vocab)).astype(np.float32)  # many ties
    values, ids = top_k(logits, k)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, order, 1))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set(top_p):
    logits = 3.0 * np.random.default_rng(5).normal(size=(6, 1000))
    weights = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float32)
    threshold = np.asarray(top_p_threshold(jnp.asarray(weights), np.float32(top_p)))
    for row in range(6):
        kept = weights[row] >= threshold[row]
        expected = oracle.filtered(np.log(weights[row].astype(np.float64)), top_p=top_p)
        np.testing.assert_array_equal(kept, expected > 0)


def test_top_p_keeps_all_ties_at_the_border():
    drawn = many(np.zeros(10), 2000, top_p=0.35)
    assert set(drawn.tokens) == set(range(10))


def test_greedy_takes_the_first_maximum_of_the_processed_logits():
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 5.0]], np.float32)
    uniforms = np.zeros((2, 2), np.float32)
    drawn = draw(logits, uniforms, temperature=0.0)
    np.testing.assert_array_equal(drawn.tokens, [1, 0])
    np.testing.assert_array_equal(drawn.sampling_logps, [0.0, 0.0])
    expected = [np.log(oracle.softmax(row)[row.argmax()]) for row in logits]
    np.testing.assert_allclose(drawn.logps, expected, atol=1e-6)
    drawn = draw(logits, uniforms, -logits, temperature=0.0)
    np.testing.assert_array_equal(drawn.tokens, [0, 1])


def test_float32_only(strict_dtypes):
    logits = jax.random.normal(jax.random.key(0), (3, 140), jnp.float32)
    for settings in ({"temperature": 0.0}, *FILTERS[-2:]):
        drawn = draw(logits, jnp.full((3, 2), 0.5), **settings)
        assert drawn.tokens.dtype == np.int32
        assert all(x.dtype == np.float32 for x in drawn[1:4])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-30}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"stop_ids": ("a",)}, "stop_ids"),
        ({"cache_dtype": "int8"}, "cache_dtype"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        SamplingConfig(**{"max_new_tokens": 4, **settings})


def test_stop_id_outside_the_vocabulary():
    with pytest.raises(ValueError, match="stop_ids has 99"):
        split_config(SamplingConfig(max_new_tokens=1, stop_ids=(99,)), 31)
