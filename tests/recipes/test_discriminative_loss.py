"""Discriminative fine-tuning's loss function: value, table, references, meshes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import discriminative as oracle

from jaxpost import data, losses, models, ops, parallel, testing, training
from jaxpost.recipes import _answer_scores, discriminative, dpo

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=32,
    tie_embeddings=False,
)
NEGATIVES = 2
SETTINGS = {"dft": {"tau": 1.3, "gamma": 0.85}, "dft2": {"tau": 0.3, "gamma": 0.9}}


@functools.cache
def model(seed=0):
    built = models.build(CONFIG, jax.random.key(seed))
    # Wider than a fresh head, so that answers are not all equally likely.
    head = {"kernel": 6.0 * built.params["head"]["kernel"]}
    return built.replace(params=built.params | {"head": head})


def items(count=8, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt = rng.integers(3, 64, rng.integers(2, 6))
        texts = []
        for _ in range(1 + NEGATIVES):
            tail = rng.integers(3, 64, rng.integers(1, 6))
            tokens = np.concatenate([prompt, tail]).astype(np.int32)
            texts.append(data.Example(tokens, np.arange(len(tokens)) >= len(prompt)))
        found.append(data.Answers(texts[0], tuple(texts[1:]), 2**40 + number))
    return found


def batch_of(items, places=None, length=12):
    batch = data.stack(data.pad_answers(items, length))
    places = range(len(items)) if places is None else places
    return batch | {"example_index": np.array(places, np.int32)}


def memory(log_u):
    log_u = jnp.asarray(log_u, jnp.float32)
    return {"log_u": log_u, "visits": jnp.zeros(log_u.shape, jnp.int32)}


def word_table(seed):
    return np.random.default_rng(seed).normal(size=(64, 8)).astype(np.float32)


def word_scores(params, batch):
    """Scores that compile in no time: each word costs what its row of a table says."""

    def logps_of(table):
        costs = jnp.sum(jax.nn.softplus(table), axis=1) / 8
        return -jnp.sum(
            jnp.where(batch["loss_mask"], costs[batch["tokens"]], 0), axis=2
        )

    lengths = jnp.sum(batch["loss_mask"], axis=2, dtype=jnp.float32)
    found = {"logps": logps_of(params["words"]), "lengths": lengths}
    return found | {"ref_neg_logps": logps_of(jnp.asarray(word_table(1)))[:, 1:]}


def word_logps(seed, count):
    """The same of each answer, `[count, 1 + B]`."""
    costs = np.log1p(np.exp(np.float64(word_table(seed)))).mean(axis=1)
    return -np.array(
        [[costs[x.tokens[x.loss_mask]].sum() for x in i.texts] for i in items(count)]
    )


WORDS = {"words": word_table(0)}


def loss_of(variant="dft", *, scores=word_scores, count=8):
    return discriminative.discriminative_loss(
        scores, variant=variant, count=count, **SETTINGS[variant]
    )


def model_scores(**options):
    return _answer_scores.discriminative_scores(model(), **options)


def params_with_reference():
    return model().params | {"reference": model(1).params}


def value_and_grad(loss_fn, params, method_state, batch):
    def total(params):
        output = loss_fn(params, method_state, batch, jax.random.key(0))
        (term,) = output.terms.values()
        return term.total / term.weight, output

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@functools.cache
def oracle_logps(seed, count):
    """Each answer alone, unpadded, in float64: `[count, 1 + B]`."""
    params = model(seed).params
    sums = np.zeros((count, 1 + NEGATIVES))
    for row, item in enumerate(items(count)):
        for side, example in enumerate(item.texts):
            positions = np.arange(len(example))[None]
            hidden = decoder_oracle.hidden_states(
                params, CONFIG, example.tokens[None], positions
            )
            scores = decoder_oracle.logits(params, CONFIG, hidden)[0]
            for t in np.flatnonzero(example.loss_mask):
                row_scores = scores[t - 1] - scores[t - 1].max()
                logp = row_scores[example.tokens[t]]
                sums[row, side] += logp - np.log(np.sum(np.exp(row_scores)))
    return sums


SOURCES = {
    "model": (lambda: model_scores(), params_with_reference, oracle_logps),
    "words": (lambda: word_scores, lambda: WORDS, word_logps),
}


@pytest.mark.parametrize(
    ("variant", "source"), [("dft", "model"), ("dft", "words"), ("dft2", "words")]
)
def test_the_value_and_the_table_are_those_of_float64(variant, source):
    """Places are not those in the batch, and other examples' stay as they are."""
    places, before = [6, 0, 3, 7, 2], np.linspace(-2.0, 1.0, 8)
    score, params, logps_of = SOURCES[source]
    policy, reference = logps_of(0, 5), logps_of(1, 5)
    lengths = np.array([[x.loss_mask.sum() for x in i.texts] for i in items(5)])
    scores = policy / lengths if variant == "dft2" else policy
    log_p0 = np.zeros((5, NEGATIVES)) if variant == "dft2" else reference[:, 1:]
    tau, gamma = SETTINGS[variant].values()
    after, total, weights = before.copy(), 0.0, []
    for row, place in enumerate(places):
        value, u, weights_ = oracle.visit(
            scores[row, 0],
            scores[row, 1:],
            log_p0[row],
            np.exp(before[place]),
            tau,
            gamma,
        )
        after[place] = math.log(u)
        total += value
        weights.append(weights_)

    (value, output), _ = value_and_grad(
        loss_of(variant, scores=score()),
        params(),
        memory(before),
        batch_of(items(5), places),
    )
    assert float(value) == pytest.approx(total / 5, rel=5e-5)
    assert output.method_state["log_u"].dtype == "float32"
    np.testing.assert_allclose(output.method_state["log_u"], after, atol=1e-4)
    untouched = [1, 4, 5]
    np.testing.assert_array_equal(
        output.method_state["log_u"][np.array(untouched)], np.float32(before)[untouched]
    )
    visited = np.isin(np.arange(8), places)
    np.testing.assert_array_equal(output.method_state["visits"], visited)

    def mean(key):
        metric = output.metrics[key]
        return float(metric.value / metric.weight)

    assert mean("logps/positive") == pytest.approx(np.mean(policy[:, 0]), rel=2e-5)
    assert mean("logps/negative") == pytest.approx(np.mean(policy[:, 1:]), rel=2e-5)
    assert mean("log_u/mean") == pytest.approx(np.mean(after[places]), rel=1e-4)
    assert mean("weights/mean") == pytest.approx(np.mean(weights), rel=1e-4)
    assert mean("weights/max") == pytest.approx(np.max(weights), rel=1e-4)
    assert mean("log_u/visited") == 5 / 8
    objective = np.mean(tau * after[places] - scores[:, 0])
    assert mean("objective") == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_held_out_rows_have_the_objective_of_their_own_negatives(variant):
    policy, reference = word_logps(0, 5), word_logps(1, 5)
    lengths = np.array([[x.loss_mask.sum() for x in i.texts] for i in items(5)])
    scores = policy / lengths if variant == "dft2" else policy
    log_p0 = np.zeros((5, NEGATIVES)) if variant == "dft2" else reference[:, 1:]
    tau = SETTINGS[variant]["tau"]
    wanted = [
        oracle.objective(
            # tau log P0 as part of the score: the pool is then a plain one.
            np.concatenate([s[:1], s[1:] - tau * p]),
            0,
            np.array([1, 2]),
            tau,
            0.5,
        )
        for s, p in zip(scores, log_p0, strict=True)
    ]
    loss_fn = discriminative.held_out_loss(word_scores, variant=variant, tau=tau)
    batch = batch_of(items(5))
    del batch["example_index"]  # they have none
    output = jax.jit(loss_fn)(WORDS, None, batch, jax.random.key(0))
    term = output.terms["discriminative"]
    assert float(term.total / term.weight) == pytest.approx(np.mean(wanted), rel=5e-5)
    # A row of which no negative is left, and one that only fills up, do not count.
    rows = data.pad_answers(items(5), 12)
    gone = np.zeros((5, NEGATIVES), bool)
    gone[4] = True
    emptied = data.stack(data.drop_answers(rows, gone))
    padded = {n: np.concatenate([x, np.zeros_like(x[:1])]) for n, x in emptied.items()}
    output = jax.jit(loss_fn)(WORDS, None, padded, jax.random.key(0))
    term = output.terms["discriminative"]
    assert float(term.weight) == 4
    assert float(term.total) == pytest.approx(np.sum(wanted[:4]), rel=5e-5)


def test_rows_of_padding_and_masked_tokens_change_nothing():
    params, before = WORDS, np.linspace(-2.0, 1.0, 8)
    batch = batch_of(items(6), [5, 4, 1, 2, 7, 6])
    (expected, output), grads = value_and_grad(loss_of(), params, memory(before), batch)
    junk = np.where(batch["segment_ids"] > 0, batch["tokens"], 61)
    filled = {  # their place is 0, which is another example's
        name: np.concatenate([x, np.zeros_like(x[:2])])
        for name, x in (batch | {"tokens": junk}).items()
    }
    (value, padded), found = value_and_grad(loss_of(), params, memory(before), filled)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for one, two in zip(
        jax.tree.leaves((output.method_state, grads)),
        jax.tree.leaves((padded.method_state, found)),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert float(padded.method_state["log_u"][0]) == before[0]
    assert int(padded.method_state["visits"][0]) == 0
    for name, metric in output.metrics.items():
        other = padded.metrics[name]
        assert float(metric.weight) == float(other.weight), name
        assert float(other.value) == pytest.approx(float(metric.value), rel=1e-5)


def test_a_dropped_negative_does_not_count_and_keeps_an_average_without_any():
    params, before = WORDS, np.linspace(-2.0, 1.0, 8)
    rows = data.pad_answers(items(3), 12)
    gone = np.array([[False, True], [True, True], [False, False]])
    dropped = data.stack(data.drop_answers(rows, gone))
    dropped |= {"example_index": np.arange(3, dtype=np.int32)}
    (value, output), grads = value_and_grad(loss_of(), params, memory(before), dropped)
    policy, reference = word_logps(0, 3), word_logps(1, 3)
    tau, gamma = SETTINGS["dft"].values()
    total = -policy[1, 0]
    for row, kept in ((0, [1]), (2, [1, 2])):
        part, u, _ = oracle.visit(
            policy[row, 0],
            policy[row, kept],
            reference[row, kept],
            math.exp(before[row]),
            tau,
            gamma,
        )
        total += part
        assert float(output.method_state["log_u"][row]) == pytest.approx(
            math.log(u), abs=1e-4
        )
    assert float(value) == pytest.approx(total / 3, rel=5e-5)
    assert float(output.method_state["log_u"][1]) == np.float32(before[1])
    assert float(output.metrics["logps/negative"].weight) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_all_references_agree():
    """A live copy, its log-probs as a column, and the base under adapters."""
    batch, method_state = batch_of(items()), memory(np.zeros(8))
    adapted = models.add_lora(
        model(),
        models.LoraConfig(rank=4, alpha=8.0, targets=("all-linear",)),
        jax.random.key(3),
    )

    def found(reference, params, batch, of=None):
        score = _answer_scores.discriminative_scores(of or model(), reference=reference)
        (value, output), _ = value_and_grad(
            loss_of(scores=score), params, method_state, batch
        )
        return float(value), np.asarray(output.method_state["log_u"])

    own = _answer_scores.discriminative_scores(model(), reference="none")
    columns = {"ref_logps": np.asarray(own(model().params, batch)["logps"])}
    live = found("live", model().params | {"reference": model().params}, batch)
    stored = found("precomputed", model().params, batch | columns)
    base = found("lora_base", adapted.params, batch, of=adapted)
    for other in (stored, base):
        assert other[0] == pytest.approx(live[0], rel=1e-5)
        np.testing.assert_allclose(other[1], live[1], atol=1e-5)


@pytest.mark.slow
def test_no_gradient_reaches_a_live_reference():
    _, grads = value_and_grad(
        loss_of(scores=model_scores()),
        params_with_reference(),
        memory(np.zeros(8)),
        batch_of(items()),
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["reference"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["layers"]))


def state_of(tx, params=None, frozen=None):
    return training.init_state(
        params or WORDS,
        tx,
        jax.random.key(0),
        method_state=memory(np.linspace(-2.0, 1.0, 256)),
        frozen=frozen,
    )


def model_state(tx):
    return state_of(tx, model().params, {"reference": model(1).params})


PLACES = [200, 3, 77, 4, 0, 255, 128, 9]


def test_microbatches_are_the_whole_batch_and_each_writes_its_examples():
    tx = optax.sgd(0.1)
    batch, loss_fn = batch_of(items(), PLACES), loss_of(count=256)
    whole, metrics = jax.jit(training.make_train_step(loss_fn, tx))(state_of(tx), batch)
    step = training.make_train_step(loss_fn, tx, accumulate=4)
    split, found = jax.jit(step)(state_of(tx), batch)
    for name, value in metrics.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    for one, two in zip(
        jax.tree.leaves((whole.params, whole.method_state)),
        jax.tree.leaves((split.params, split.method_state)),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())
    assert float(found["log_u/visited"]) == 8 / 256
    np.testing.assert_array_equal(
        np.flatnonzero(split.method_state["visits"]), sorted(PLACES)
    )


@pytest.mark.parametrize(
    ("place", "count"), [(256, 256), (2**31 - 1, 256), (-1, 256), (250, 250)]
)
def test_a_place_outside_the_table_is_refused(place, count):
    """Also where the table is longer than there are examples."""
    tx = optax.sgd(0.1)
    places = [200, 3, 77, 4, 0, 249, 128, place]
    step = jax.jit(training.make_train_step(loss_of(count=count), tx))
    state, metrics = step(before := state_of(tx), batch_of(items(), places))
    assert float(metrics["nonfinite"]) == 1.0  # the loss term
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        if not jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "where", ["ref_neg_logps", pytest.param("logps", marks=pytest.mark.slow)]
)
def test_a_number_that_is_not_finite_changes_nothing(where):
    def scores(params, batch):
        found = word_scores(params, batch)
        return found | {where: found[where].at[5, 1].set(-jnp.inf)}

    tx = optax.sgd(0.1)
    step = jax.jit(training.make_train_step(loss_of(scores=scores, count=256), tx))
    after, metrics = step(before := state_of(tx), batch_of(items(), PLACES))
    assert float(metrics["nonfinite"]) > 0.0
    for name, table in before.method_state.items():
        np.testing.assert_array_equal(after.method_state[name], table)


MESHES = (testing.MESHES[0], testing.MESHES[2])


def test_the_step_is_the_same_on_one_and_four_by_two_devices():
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    step = training.make_train_step(loss_of(count=256), tx)
    testing.assert_mesh_invariant(step, state_of(tx), batch_of(items(), PLACES), MESHES)


@pytest.mark.slow  # as the other tests of whole models on eight devices
def test_mesh_kit():
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    loss_fn = loss_of(scores=model_scores(), count=256)
    step = training.make_train_step(loss_fn, tx)
    axes = models.param_axes(CONFIG)
    testing.assert_mesh_invariant(
        step,
        model_state(tx),
        batch_of(items(), PLACES),
        MESHES,
        axes=axes | {"reference": axes},
    )


def check_table(step_of, state, placement, mesh, batch, sizes=(64, 256)):
    """The table after a step on one device, and on a mesh split or whole."""
    wanted, _ = jax.jit(step_of(None))(state, batch)
    rows = parallel.place(batch, parallel.batch_sharding(mesh))
    split = parallel.batch_sharding(mesh)
    held = placement._replace(method_state={"log_u": split, "visits": split})
    for size in sizes:
        where = held if size == 64 else placement
        placed = parallel.place(state, where)
        table = placed.method_state["log_u"].sharding
        assert table.shard_shape((256,)) == (size,)
        run = jax.jit(step_of(mesh), out_shardings=(where, None))
        found, _ = run(placed, rows)
        np.testing.assert_allclose(
            found.method_state["log_u"], wanted.method_state["log_u"], atol=2e-5
        )
        np.testing.assert_array_equal(
            found.method_state["visits"], wanted.method_state["visits"]
        )


def test_the_table_is_the_same_split_over_devices():
    tx, mesh = optax.sgd(0.1), parallel.make_mesh(MESHES[1])
    state = state_of(tx)
    placement = jax.tree.map(lambda _: parallel.shardings((), mesh), state)
    step = training.make_train_step(loss_of(count=256), tx)
    batch = batch_of(items(), PLACES)
    check_table(lambda _: step, state, placement, mesh, batch, sizes=(64,))


@pytest.mark.slow
def test_the_table_of_a_model_is_the_same_split_or_whole():
    """As the recipe runs it, with a split vocabulary and microbatches."""
    tx, mesh = optax.sgd(0.1), parallel.make_mesh(MESHES[1])

    def step_of(mesh):
        score = _answer_scores.discriminative_scores(
            model().with_lookup(parallel.split_lookup(mesh)),
            token_logps=parallel.split_vocabulary(ops.linear_token_logps, mesh),
        )
        loss_fn = loss_of(scores=score, count=256)
        return training.make_train_step(loss_fn, tx, accumulate=2)

    state = model_state(tx)
    placement = parallel.shardings(models.param_axes(CONFIG), mesh)
    placement = parallel.shardings_like(state, model().params, placement)
    check_table(step_of, state, placement, mesh, batch_of(items(), PLACES))


def largest_array(program):
    """Elements of the largest array of a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["discriminative", pytest.param("dpo", marks=pytest.mark.slow)]
)
def test_no_array_has_the_size_of_all_logits(method):
    """Nothing of B x T x V in the compiled step, forward or backward."""
    wide = models.build(
        CONFIG.replace(vocab_size=16_411, max_positions=256), abstract=True
    )
    tokens, rows = 256, 4

    def step(**options):
        if method == "dpo":
            score = dpo.dpo_scores(wide, beta=0.1, **options)
            return dpo.dpo_loss(score, losses.PairwiseConfig())
        score = _answer_scores.discriminative_scores(wide, **options)
        return loss_of(scores=score, count=256)

    answers = 2 if method == "dpo" else 3
    grid = jax.ShapeDtypeStruct((rows, answers, tokens), "int32")
    batch = dict.fromkeys(("tokens", "positions", "segment_ids"), grid)
    batch["loss_mask"] = jax.ShapeDtypeStruct(grid.shape, "bool")
    batch["example_index"] = jax.ShapeDtypeStruct((rows,), "int32")
    tx = optax.sgd(0.1)

    def program(**options):
        state = jax.eval_shape(
            lambda params: training.init_state(
                params,
                tx,
                jax.random.key(0),
                method_state=discriminative.init_memory(256),
                frozen={"reference": params},
            ),
            wide.params,
        )
        compiled = training.compile_step(training.make_train_step(step(**options), tx))
        return compiled.lower(state, batch).compile().as_text()

    logits = rows * answers * tokens * 16_411
    # A chunk of 512 tokens, never all; the plain head shows that the look finds it.
    assert largest_array(program()) <= 512 * 16_411 < logits / 3
    dense = functools.partial(ops.linear_token_logps, implementation="dense")
    assert largest_array(program(token_logps=dense)) >= logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["dft", pytest.param("dft2", marks=pytest.mark.slow)]
)
def test_joined_answers_and_foreseen_gradients_give_the_same(variant, monkeypatch):
    """Prompts once in a row, and gradients formed at once, change no number."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # where they are foreseen
    before, places = np.linspace(-2.0, 1.0, 8), [5, 4, 1, 2, 7, 6]
    gone = np.zeros((6, NEGATIVES), bool)
    gone[2, 0] = gone[3] = True
    rows = data.drop_answers(data.pad_answers(items(6), 12), gone)
    batch = data.stack(rows) | {"example_index": np.array(places, np.int32)}
    batch = {n: np.concatenate([x, np.zeros_like(x[:1])]) for n, x in batch.items()}
    joined = data.join_answers(batch, data.joined_widths(rows))
    assert joined["tokens"].ndim == 2
    assert np.count_nonzero(joined["tokens"]) < np.count_nonzero(batch["tokens"])
    foresee = _answer_scores.slopes(variant, **SETTINGS[variant])
    reference = "live" if variant == "dft" else "none"
    plain = loss_of(variant, scores=model_scores(reference=reference))
    hinted = loss_of(
        variant,
        scores=model_scores(reference=reference, answers=3, foresee=foresee),
    )
    params = params_with_reference()
    expected = value_and_grad(plain, params, memory(before), batch)
    found = value_and_grad(hinted, params, memory(before), joined)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=5e-6),
        found,
        expected,
    )
