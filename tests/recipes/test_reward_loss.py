"""The loss function of reward models: an independent value, layouts, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import pairwise as oracle

from jaxpost import data, losses, models, testing, training
from jaxpost.recipes import reward

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=32,
    tie_embeddings=False,
    head="score",
)
PAD, EOS = 0, 2
LOSSES = {
    "bradley_terry": {},
    "robust_dpo": {"flip_rate": 0.2},
    "hinge": {},
    "ipo": {},
    "r3m": {"lam": 0.45},
    "adaptive_scaling": {"rho0": 0.1, "tau_min": 0.1, "tau_max": 4.0},
}


@functools.cache
def model():
    built = models.build(CONFIG, jax.random.key(0))
    # Wider than fresh weights, so that margins are not all near zero.
    return built.replace(params=jax.tree.map(lambda x: 2.0 * x, built.params))


def pairs(count=8, seed=0):
    rng = np.random.default_rng(seed)

    def answer(prompt):
        tail = np.append(rng.integers(3, 64, rng.integers(1, 9)), EOS)
        tokens = np.concatenate([prompt, tail]).astype(np.int32)
        return data.Example(tokens, np.arange(len(tokens)) >= len(prompt))

    found = []
    for number in range(count):
        prompt = rng.integers(3, 64, rng.integers(2, 6))
        found.append(data.Pair(answer(prompt), answer(prompt), 2**40 + number))
    return found


def batch_of(items, length=16, pad_id=PAD):
    return data.stack(data.pad_pairs(items, length, pad_id=pad_id))


def loss_of(name="bradley_terry", *, scores=None, centering=0.0, pad_id=PAD):
    score = scores or reward.reward_scores(model(), pad_id=pad_id)
    config = losses.PairwiseConfig(name, **LOSSES[name])
    return reward.reward_loss(score, config, centering=centering)


def value_and_grad(loss_fn, params, batch):
    def total(params):
        output = loss_fn(params, None, batch, jax.random.key(0))
        terms = output.terms.values()
        return sum(t.coefficient * t.total / t.weight for t in terms), output

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


def oracle_scores(items, drop=0):
    """Each text alone, unpadded, in float64, at its last token but `drop`: [n, 2]."""
    kernel = np.asarray(model().params["score"]["kernel"], np.float64)[:, 0]
    scores = np.zeros((len(items), 2))
    for row, pair in enumerate(items):
        for side, example in enumerate((pair.chosen, pair.rejected)):
            hidden = decoder_oracle.hidden_states(
                model().params,
                CONFIG,
                example.tokens[None],
                np.arange(len(example))[None],
            )[0, -1 - drop]
            scores[row, side] = sum(h * k for h, k in zip(hidden, kernel, strict=True))
    return scores


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_is_that_of_float64(name):
    items = pairs(5)
    scores = oracle_scores(items)
    margins = scores[:, 0] - scores[:, 1]
    function = {"adaptive_scaling": "adaptive"}.get(name, name)
    found = [getattr(oracle, function)(m, **LOSSES[name]) for m in margins]
    extra = None
    if isinstance(found[0], tuple):
        found, extra = zip(*found, strict=True)

    loss_fn = jax.jit(loss_of(name, centering=0.25))
    output = loss_fn(model().params, None, batch_of(items), jax.random.key(0))
    term, centred = output.terms[name], output.terms["centering"]
    assert float(term.weight) == float(centred.weight) == 5
    assert float(term.total) == pytest.approx(sum(found), rel=2e-5, abs=2e-5)
    squares = sum((chosen + rejected) ** 2 for chosen, rejected in scores)
    assert float(centred.total) == pytest.approx(squares, rel=2e-5)
    assert centred.coefficient == 0.25

    def mean(key):
        metric = output.metrics[key]
        return float(metric.value / metric.weight)

    assert 0 < mean("rewards/accuracies") < 1
    assert mean("rewards/accuracies") == pytest.approx(np.mean(margins > 0))
    assert mean("rewards/margins") == pytest.approx(np.mean(margins), rel=2e-5)
    assert mean("rewards/chosen") == pytest.approx(np.mean(scores[:, 0]), rel=2e-5)
    assert mean("rewards/rejected") == pytest.approx(np.mean(scores[:, 1]), rel=2e-5)
    if name == "r3m":
        assert mean("delta/mean") == pytest.approx(np.mean(extra), rel=2e-5)
        assert mean("delta/share") == pytest.approx(np.mean(np.asarray(extra) > 0))
    if name == "adaptive_scaling":
        assert mean("tau/mean") == pytest.approx(np.mean(extra), rel=2e-5)


def test_no_coefficient_means_no_term():
    output = loss_of()(model().params, None, batch_of(pairs()), jax.random.key(0))
    assert list(output.terms) == ["bradley_terry"]


def test_a_tokenizer_that_pads_with_its_end_token_is_read_before_it():
    """As transformers reads it, which finds the end by the id alone."""
    items = pairs(4)
    score = jax.jit(reward.reward_scores(model(), pad_id=EOS))
    found = score(model().params, batch_of(items, pad_id=EOS))
    np.testing.assert_allclose(found["rewards"], oracle_scores(items, 1), atol=1e-5)


def moved(batch, shift):
    """Every sequence `shift` places to the right, padding in front: left padding."""
    return {
        name: np.roll(x, shift, axis=-1) if x.ndim == 3 else x
        for name, x in batch.items()
    }


@pytest.mark.slow
def test_padding_on_either_side_and_longer_rows_change_nothing():
    items, params = pairs(), model().params
    (expected, _), grads = value_and_grad(loss_of("r3m"), params, batch_of(items))
    batch = moved(batch_of(items, 32), 9)
    (value, _), found = value_and_grad(loss_of("r3m"), params, batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max() + 1e-9)


@pytest.mark.slow
def test_masked_tokens_and_rows_of_padding_change_nothing_even_nan():
    items = pairs(6)
    batch = batch_of(items)
    loss_fn = loss_of(centering=0.1)
    (expected, output), grads = value_and_grad(loss_fn, model().params, batch)
    assert not any(61 in e.tokens for p in items for e in (p.chosen, p.rejected))
    junk = np.where(batch["segment_ids"] > 0, batch["tokens"], 61)
    filled = {
        name: np.concatenate([x, np.zeros_like(x[:2])])
        for name, x in (batch | {"tokens": junk}).items()
    }
    table = model().params["embed"]["embedding"]
    bad = model().params | {
        "embed": {"embedding": table.at[jnp.array([0, 61])].set(jnp.nan)}
    }
    (value, padded), found = value_and_grad(loss_fn, bad, filled)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name, metric in output.metrics.items():
        other = padded.metrics[name]
        assert float(metric.weight) == float(other.weight) == 6, name
        assert float(other.value) == pytest.approx(float(metric.value), rel=1e-5)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


def test_swapping_answers_turns_the_margin():
    batch = batch_of(pairs())
    score = jax.jit(reward.reward_scores(model(), pad_id=PAD))
    found = score(model().params, batch)
    turned = {n: x[:, ::-1] if x.ndim == 3 else x for n, x in batch.items()}
    swapped = score(model().params, turned)
    np.testing.assert_allclose(swapped["margins"], -found["margins"], atol=1e-5)
    np.testing.assert_allclose(swapped["rewards"], found["rewards"][:, ::-1], atol=1e-5)


def test_narrow_compute_keeps_the_head_wide():
    batch, params = batch_of(pairs()), model().params
    narrow = reward.reward_scores(model(), pad_id=PAD, dtype=jnp.dtype("bfloat16"))
    found = narrow(params, batch)["rewards"]
    assert found.dtype == jnp.float32
    last = last_hidden(models.cast_params(params, jnp.bfloat16), batch)
    expected = np.float64(last) @ np.asarray(params["score"]["kernel"], np.float64)
    np.testing.assert_allclose(found, expected.reshape(-1, 2), atol=1e-5)


def last_hidden(params, batch):
    """States of the last tokens, `[2B, D]`, found without the recipe."""
    flat = {n: np.reshape(batch[n], (-1, 16)) for n in batch if n != "example_id"}
    hidden = (
        model()
        .apply(params, flat["tokens"], flat["positions"], flat["segment_ids"])
        .hidden
    )
    last = np.count_nonzero(flat["segment_ids"], axis=1) - 1
    return np.asarray(hidden)[np.arange(len(last)), last]


def test_gradient_of_the_head_is_the_chain_rule():
    """`sum_i l'(m_i) (h_w - h_l)`, with `l' = -sigmoid(-m)`, over the pairs."""
    batch = batch_of(pairs())
    _, grads = value_and_grad(loss_of(), model().params, batch)
    last = last_hidden(model().params, batch)
    gap = np.float64(last[0::2]) - np.float64(last[1::2])
    margins = gap @ np.float64(model().params["score"]["kernel"])[:, 0]
    slopes = -1.0 / (1.0 + np.exp(margins))
    expected = (slopes[:, None] * gap).mean(axis=0)
    found = np.asarray(grads["score"]["kernel"])[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_microbatches_are_the_whole_batch():
    tx = optax.sgd(0.1)
    state = training.init_state(model().params, tx, jax.random.key(0))
    batch, loss_fn = batch_of(pairs()), loss_of("adaptive_scaling", centering=0.1)
    whole, metrics = jax.jit(training.make_train_step(loss_fn, tx))(state, batch)
    step = jax.jit(training.make_train_step(loss_fn, tx, accumulate=4))
    split, found = step(state, batch)
    for name, value in metrics.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    for one, two in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("margin", [np.inf, np.nan])
@pytest.mark.parametrize("name", ["bradley_terry", "r3m"])
def test_a_margin_that_is_not_finite_is_not_hidden(name, margin):
    def scores(params, batch):
        margins = jnp.array([0.5, margin, -0.5]) + 0.0 * params
        return {"margins": margins, "rewards": jnp.zeros((3, 2))}

    loss_fn = loss_of(name, scores=scores)
    output = loss_fn(jnp.float32(0.0), None, batch_of(pairs(3)), jax.random.key(0))
    assert np.isnan(float(output.terms[name].total))


MESHES = (testing.MESHES[0], testing.MESHES[2])


def step_and_state():
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    score = reward.reward_scores(model(), pad_id=PAD)
    config = losses.PairwiseConfig("r3m", lam=0.45)
    loss_fn = reward.reward_loss(score, config, centering=0.1)
    step = training.make_train_step(loss_fn, tx, accumulate=2)
    # Plain weights: the doubled ones amplify rounding in attention.
    params = models.build(CONFIG, jax.random.key(0)).params
    return step, training.init_state(params, tx, jax.random.key(1))


@pytest.mark.slow
def test_mesh_kit():
    step, state = step_and_state()
    testing.assert_mesh_invariant(
        step, state, batch_of(pairs(16)), MESHES, axes=models.param_axes(CONFIG)
    )


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="centering must be finite and not negative"):
        reward.RewardConfig(centering=-0.1)
    with pytest.raises(ValueError, match="r3m does not read label_smoothing"):
        losses.PairwiseConfig("r3m", lam=0.4, label_smoothing=0.1)


def test_joined_answers_give_the_same():
    """Both answers behind their prompt in one row: same values, same gradients.

    In float64: rounding in float32 is amplified by the doubled weights.
    """
    batch = batch_of(pairs(5))
    joined = data.join_answers(batch, 64)
    assert joined["tokens"].ndim == 2
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), model().params)
        loss_fn = loss_of("r3m", centering=0.1)
        found, gradient = value_and_grad(loss_fn, params, joined)
        expected, wanted = value_and_grad(loss_fn, params, batch)
        assert jax.tree.leaves(gradient)[0].dtype == jnp.float64
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10),
            (found[0], gradient),
            (expected[0], wanted),
        )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        value_and_grad(loss_of("r3m", centering=0.1), model().params, joined)[0],
        value_and_grad(loss_of("r3m", centering=0.1), model().params, batch)[0],
    )
