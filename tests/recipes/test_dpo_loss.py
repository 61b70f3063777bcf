"""DPO's loss function: an independent value, layouts, references, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import pairwise as oracle

from jaxpost import data, losses, models, ops, parallel, testing, training
from jaxpost.recipes import dpo

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=32,
    tie_embeddings=False,
)
BETA = 0.3
LOSSES = {
    "bradley_terry": {},
    "robust_dpo": {"flip_rate": 0.2},
    "hinge": {},
    "ipo": {},
    "r3m": {"lam": 0.45},
    "adaptive_scaling": {"rho0": 0.1, "tau_min": 0.1, "tau_max": 4.0},
}


@functools.cache
def model(seed=0):
    built = models.build(CONFIG, jax.random.key(seed))
    # Wider than a fresh head, so that margins are not all near zero.
    head = {"kernel": 6.0 * built.params["head"]["kernel"]}
    return built.replace(params=built.params | {"head": head})


def pairs(count=8, seed=0):
    rng = np.random.default_rng(seed)

    def answer(prompt):
        tail = rng.integers(3, 64, rng.integers(1, 10))
        tokens = np.concatenate([prompt, tail]).astype(np.int32)
        return data.Example(tokens, np.arange(len(tokens)) >= len(prompt))

    found = []
    for number in range(count):
        prompt = rng.integers(3, 64, rng.integers(2, 6))
        found.append(data.Pair(answer(prompt), answer(prompt), 2**40 + number))
    return found


def batch_of(items, length=16):
    return data.stack(data.pad_pairs(items, length))


def loss_of(name="bradley_terry", *, scores=None, **options):
    score = scores or dpo.dpo_scores(model(), beta=BETA, **options)
    return dpo.dpo_loss(score, losses.PairwiseConfig(name, **LOSSES[name]))


def params_with_reference():
    return model().params | {"reference": model(1).params}


def value_and_grad(loss_fn, params, batch):
    def total(params):
        output = loss_fn(params, None, batch, jax.random.key(0))
        (term,) = output.terms.values()
        return term.total / term.weight, output

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@functools.cache
def scores_of_five(normalized):
    """`(params, batch) -> scores` that were computed once for all losses."""
    score = dpo.dpo_scores(model(), beta=BETA, length_normalized=normalized)
    found = jax.jit(score)(params_with_reference(), batch_of(pairs(5)))
    return lambda params, batch: found


@functools.cache
def oracle_logps_of_five(seed):
    return oracle_logps(model(seed), pairs(5))


def oracle_logps(model, items):
    """Each answer alone, unpadded, in float64: (chosen, rejected) sums."""
    sums = ([], [])
    for pair in items:
        for side, example in enumerate((pair.chosen, pair.rejected)):
            tokens = example.tokens[None]
            positions = np.arange(len(example))[None]
            hidden = decoder_oracle.hidden_states(
                model.params, CONFIG, tokens, positions
            )
            scores = decoder_oracle.logits(model.params, CONFIG, hidden)[0]
            total = 0.0
            for t in range(1, len(example)):
                if example.loss_mask[t]:
                    row = scores[t - 1]
                    top = row.max()
                    total += row[example.tokens[t]] - top
                    total -= np.log(np.sum(np.exp(row - top)))
            sums[side].append(total)
    return sums


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_value_is_that_of_float64(name, normalized):
    items = pairs(5)
    policy, reference = oracle_logps_of_five(0), oracle_logps_of_five(1)
    lengths = None
    if normalized:
        sides = ([p.chosen for p in items], [p.rejected for p in items])
        lengths = [[int(e.loss_mask.sum()) for e in side] for side in sides]
    margins = oracle.dpo_margins(policy, reference, BETA, lengths)
    function = {"adaptive_scaling": "adaptive"}.get(name, name)
    found = [getattr(oracle, function)(m, **LOSSES[name]) for m in margins]
    extra = None
    if isinstance(found[0], tuple):
        found, extra = zip(*found, strict=True)

    loss_fn = loss_of(name, scores=scores_of_five(normalized))
    output = loss_fn({}, None, batch_of(items), jax.random.key(0))
    term = output.terms[name]
    assert float(term.weight) == 5
    assert float(term.total) == pytest.approx(sum(found), rel=2e-5, abs=2e-5)

    def mean(key):
        metric = output.metrics[key]
        return float(metric.value / metric.weight)

    assert mean("rewards/margins") == pytest.approx(np.mean(margins), rel=2e-5)
    right = np.mean(np.asarray(margins) > 0)
    assert mean("rewards/accuracies") == pytest.approx(right)
    assert 0 < right < 1
    assert mean("logps/chosen") == pytest.approx(np.mean(policy[0]), rel=2e-5)
    assert mean("logps/rejected") == pytest.approx(np.mean(policy[1]), rel=2e-5)
    gap = mean("rewards/chosen") - mean("rewards/rejected")
    assert gap == pytest.approx(np.mean(margins), rel=1e-4)
    if name == "r3m":
        assert mean("delta/mean") == pytest.approx(np.mean(extra), rel=2e-5)
        share = np.mean(np.asarray(extra) > 0)
        assert mean("delta/share") == pytest.approx(share)
        assert 0 < share < 1
    if name == "adaptive_scaling":
        assert mean("tau/mean") == pytest.approx(np.mean(extra), rel=2e-5)
        share = np.mean(np.asarray(extra) == 0.1)
        assert mean("tau/share_at_min") == pytest.approx(share)


def test_a_target_margin_is_subtracted_and_simpo_needs_no_reference():
    batch = batch_of(pairs())
    options = {"beta": 2.0, "reference": "none", "length_normalized": True}
    plain = dpo.dpo_scores(model(), **options)(model().params, batch)
    simpo = dpo.dpo_scores(model(), target_margin=0.5, **options)(model().params, batch)
    np.testing.assert_allclose(simpo["margins"], plain["margins"] - 0.5, atol=1e-6)
    lengths = batch["loss_mask"].sum(axis=-1)
    expected = 2.0 * np.asarray(plain["logps"]) / lengths
    np.testing.assert_allclose(plain["rewards"], expected, rtol=1e-5)


def moved(batch, shift):
    """Every sequence `shift` places to the right, padding in front: left padding."""
    return {
        name: np.roll(x, shift, axis=-1) if x.ndim == 3 else x
        for name, x in batch.items()
    }


@pytest.mark.slow
def test_padding_on_either_side_and_longer_rows_change_nothing():
    items, params = pairs(), params_with_reference()
    (expected, _), grads = value_and_grad(loss_of("r3m"), params, batch_of(items))
    for batch in (moved(batch_of(items, 20), 4), batch_of(items, 32)):
        (value, _), found = value_and_grad(loss_of("r3m"), params, batch)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        for one, two in zip(
            jax.tree.leaves(grads), jax.tree.leaves(found), strict=True
        ):
            np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max() + 1e-9)


@pytest.mark.slow
def test_masked_tokens_and_rows_of_padding_change_nothing():
    items, params = pairs(6), params_with_reference()
    batch = batch_of(items)
    (expected, output), _ = value_and_grad(loss_of(), params, batch)
    junk = np.where(batch["segment_ids"] > 0, batch["tokens"], 61)
    filled = {
        name: np.concatenate([x, np.zeros_like(x[:2])])
        for name, x in (batch | {"tokens": junk}).items()
    }
    (value, padded), grads = value_and_grad(loss_of(), params, filled)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for name, metric in output.metrics.items():
        other = padded.metrics[name]
        assert float(metric.weight) == float(other.weight) == 6, name
        assert float(other.value) == pytest.approx(float(metric.value), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_order_of_pairs_does_not_matter_and_swapping_answers_turns_the_margin():
    batch = batch_of(pairs())
    score = jax.jit(dpo.dpo_scores(model(), beta=BETA))
    found = score(params_with_reference(), batch)
    turned = {n: x[:, ::-1] if x.ndim == 3 else x for n, x in batch.items()}
    swapped = score(params_with_reference(), turned)
    np.testing.assert_allclose(swapped["margins"], -found["margins"], atol=1e-5)
    backwards = score(params_with_reference(), {n: x[::-1] for n, x in batch.items()})
    np.testing.assert_allclose(backwards["margins"][::-1], found["margins"], atol=1e-5)


@pytest.mark.slow
def test_all_references_agree():
    """A live copy, its log-probs as columns, and the base under adapters."""
    batch = batch_of(pairs())
    adapted = models.add_lora(
        model(),
        models.LoraConfig(rank=4, alpha=8.0, targets=("all-linear",)),
        jax.random.key(3),
    )
    config = losses.PairwiseConfig()

    def value(reference, params, batch, of=None):
        score = dpo.dpo_scores(of or model(), beta=BETA, reference=reference)
        (found, output), _ = value_and_grad(dpo.dpo_loss(score, config), params, batch)
        return float(found), float(output.metrics["rewards/margins"].value)

    own = dpo.dpo_scores(model(), beta=BETA, reference="none")
    logps = np.asarray(jax.jit(own)(model().params, batch)["logps"])
    columns = {
        "ref_chosen_logps": logps[:, data.CHOSEN],
        "ref_rejected_logps": logps[:, data.REJECTED],
    }
    found = {
        "live": value("live", model().params | {"reference": model().params}, batch),
        "precomputed": value("precomputed", model().params, batch | columns),
        "lora_base": value("lora_base", adapted.params, batch, of=adapted),
    }
    for name, (loss, margin) in found.items():
        assert loss == pytest.approx(np.log(2.0), abs=1e-6), name
        assert margin == pytest.approx(0.0, abs=1e-5), name
    # And away from the start, where the reference is not the policy.
    moved_on = jax.tree.map(lambda x: 1.1 * x, model().params)
    live, _ = value("live", moved_on | {"reference": model().params}, batch)
    stored, _ = value("precomputed", moved_on, batch | columns)
    assert live == pytest.approx(stored, rel=1e-6)
    assert abs(live - np.log(2.0)) > 1e-3


def test_no_gradient_reaches_a_live_reference():
    _, grads = value_and_grad(loss_of(), params_with_reference(), batch_of(pairs()))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["reference"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["layers"]))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4])
def test_microbatches_are_the_whole_batch(accumulate):
    tx = optax.sgd(0.1)
    frozen = {"reference": model(1).params}
    state = training.init_state(model().params, tx, jax.random.key(0), frozen=frozen)
    batch, loss_fn = batch_of(pairs()), loss_of("adaptive_scaling")
    whole, metrics = jax.jit(training.make_train_step(loss_fn, tx))(state, batch)
    step = jax.jit(training.make_train_step(loss_fn, tx, accumulate=accumulate))
    split, found = step(state, batch)
    for name, value in metrics.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    for one, two in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("margin", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["bradley_terry", "hinge", "r3m"])
def test_a_margin_that_is_not_finite_is_not_hidden(name, margin):
    batch = batch_of(pairs(3))

    def scores(params, batch):
        margins = jnp.array([0.5, margin, -0.5]) + 0.0 * params
        zeros = jnp.zeros((3, 2))
        return {"margins": margins, "rewards": zeros, "logps": zeros}

    loss_fn = loss_of(name, scores=scores)
    output = loss_fn(jnp.float32(0.0), None, batch, jax.random.key(0))
    assert np.isnan(float(output.terms[name].total))


MESHES = (testing.MESHES[0], testing.MESHES[2])


def step_and_state(token_logps=ops.linear_token_logps, lookup=None):
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    score = dpo.dpo_scores(
        model().with_lookup(lookup), beta=BETA, token_logps=token_logps
    )
    loss_fn = dpo.dpo_loss(score, losses.PairwiseConfig("r3m", lam=0.45))
    step = training.make_train_step(loss_fn, tx, accumulate=2)
    frozen = {"reference": model(1).params}
    return step, training.init_state(
        model().params, tx, jax.random.key(1), frozen=frozen
    )


@pytest.mark.slow  # as the other tests of whole models on eight devices
def test_the_step_is_the_same_on_four_by_two_devices():
    """As the recipe runs it: both answers of a pair on one slice of the mesh."""
    batch = batch_of(pairs(8))
    step, state = step_and_state()
    mesh = parallel.make_mesh(MESHES[1])
    split, _ = step_and_state(
        parallel.split_vocabulary(ops.linear_token_logps, mesh),
        parallel.split_lookup(mesh),
    )
    placement = parallel.shardings(models.param_axes(CONFIG), mesh)
    placed = parallel.place(
        state, parallel.shardings_like(state, state.params, placement)
    )
    split_batch = parallel.place(batch, parallel.batch_sharding(mesh))
    assert split_batch["tokens"].sharding.shard_shape((8, 2, 16)) == (2, 2, 16)
    wanted, metrics = jax.jit(step)(state, batch)
    found, split_metrics = jax.jit(split)(placed, split_batch)
    for name, value in metrics.items():
        assert float(split_metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    for old, new in zip(
        jax.tree.leaves(wanted.params), jax.tree.leaves(found.params), strict=True
    ):
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())


@pytest.mark.slow
def test_mesh_kit():
    step, state = step_and_state()
    axes = models.param_axes(CONFIG)
    testing.assert_mesh_invariant(
        step, state, batch_of(pairs(16)), MESHES, axes=axes | {"reference": axes}
    )


@pytest.mark.parametrize(
    "hint",
    [pytest.param(None, marks=pytest.mark.slow), "r3m"],
    ids=["tokens", "foreseen"],
)
@pytest.mark.slow
def test_joined_answers_give_the_same(hint, monkeypatch):
    """Prompts once in a row, and gradients formed at once, change no number."""
    if hint is not None:  # as on one device
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = losses.PairwiseConfig("r3m", **LOSSES["r3m"])
    batch = batch_of(pairs(7))
    rows = [{name: array[i] for name, array in batch.items()} for i in range(7)]
    joined = data.join_answers(batch, data.joined_widths(rows))
    assert joined["tokens"].ndim == 2
    assert np.count_nonzero(joined["tokens"]) < np.count_nonzero(batch["tokens"])
    plain = dpo.dpo_loss(dpo.dpo_scores(model(), beta=BETA), config)
    hinted = dpo.dpo_loss(
        dpo.dpo_scores(model(), beta=BETA, loss=config if hint else None), config
    )
    expected = value_and_grad(plain, params_with_reference(), batch)
    found = value_and_grad(hinted, params_with_reference(), joined)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        found,
        expected,
    )
