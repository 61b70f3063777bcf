"""Distillation's loss function: an independent value, cached teachers, meshes."""

import functools
import math
import pathlib
import re
import types

import chex
import jax
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import support as oracle

from jaxpost import data, models, ops, parallel, training
from jaxpost.recipes import _distill_cache, _distill_teacher, _setup, distill
from jaxpost.recipes._distill_teacher import TeacherSection, VocabularyMismatchError

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
)
# Another width: a teacher is seldom the student's twin.
TEACHER = CONFIG.replace(hidden_size=16, intermediate_size=32)
TEMPERATURE, ALPHA, K = 1.5, 0.3, 5


@functools.cache
def model(config, seed=0):
    built = models.build(config, jax.random.key(seed))
    # Wider than a fresh head, so that the distributions are far apart.
    head = {"kernel": 6.0 * built.params["head"]["kernel"]}
    return built.replace(params=built.params | {"head": head})


def examples(count=6, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = rng.integers(3, 64, rng.integers(4, 12)).astype(np.int32)
        start = rng.integers(1, 3)
        found.append(data.Example(tokens, np.arange(len(tokens)) >= start))
    return found


def params():
    return model(CONFIG).params | {"teacher": model(TEACHER, 1).params}


def compare_with(**options):
    options = {"alpha": ALPHA, "temperature": TEMPERATURE} | options
    return _distill_teacher.live_teacher(model(TEACHER, 1), **options)


def loss_with(compare=None, **options):
    return distill.distill_loss(model(CONFIG), compare or compare_with(), **options)


def objective(loss_fn, params, batch):
    """The loss, as the training step forms it, and its gradient in the student."""
    teacher = {"teacher": params["teacher"]}

    def total(student):
        output = loss_fn(student | teacher, None, batch, jax.random.key(0))
        parts = [t.coefficient * t.total / t.weight for t in output.terms.values()]
        return sum(parts), output

    student = {name: x for name, x in params.items() if name != "teacher"}
    return jax.jit(jax.value_and_grad(total, has_aux=True))(student)


def output_of(loss_fn, params, batch):
    """Forward alone, which compiles in a fraction of the time."""
    return jax.jit(lambda p, b: loss_fn(p, None, b, jax.random.key(0)))(params, batch)


def mean(term):
    return float(term.total / term.weight)


@functools.cache
def oracle_logps(config, seed):
    """Of each example alone, unpadded, in float64: `[n - 1, V]` at TEMPERATURE."""
    found = []
    for example in examples():
        weights = model(config, seed).params
        hidden = decoder_oracle.hidden_states(
            weights, config, example.tokens[None], np.arange(len(example))[None]
        )
        scores = decoder_oracle.logits(weights, config, hidden)[0][:-1]
        identity = np.eye(config.vocab_size)
        found.append(oracle.log_softmax(scores, identity, temperature=TEMPERATURE))
    return found


def oracle_mean(of_token):
    """Of a function of two tokens' log-probs, over the trained tokens."""
    student, teacher = oracle_logps(CONFIG, 0), oracle_logps(TEACHER, 1)
    values = [
        of_token(s[t], q[t])
        for example, s, q in zip(examples(), student, teacher, strict=True)
        for t in range(len(example) - 1)
        if example.loss_mask[t + 1]
    ]
    return np.mean(values)


def test_the_value_is_that_of_float64():
    output = output_of(loss_with(), params(), data.pad_batch(examples(), 16))
    wanted = oracle_mean(lambda s, t: oracle.divergence(np.exp(s), np.exp(t), ALPHA))
    assert mean(output.terms["divergence"]) == pytest.approx(wanted, rel=2e-5)
    count = sum(int(example.loss_mask.sum()) for example in examples())
    assert float(output.terms["divergence"].weight) == count


@pytest.mark.parametrize(
    ("support", "rest"),
    [
        ("teacher", "bucket"),
        pytest.param("student", "bucket", marks=pytest.mark.slow),
        pytest.param("teacher", "renormalize", marks=pytest.mark.slow),
        pytest.param("teacher", "teacher", marks=pytest.mark.slow),
    ],
)
def test_the_value_on_a_few_tokens_is_that_of_float64(support, rest):
    loss_fn = loss_with(compare_with(top_k=K, support=support, rest=rest))
    batch = data.pad_batch(examples(), 16)
    output = output_of(loss_fn, params(), batch)

    def ids(s, t):
        return np.argsort(-(t if support == "teacher" else s))[:K]

    def value(s, t):
        pair = (oracle.support(x, ids(s, t)) for x in (s, t))
        return oracle.support_divergence(*pair, ALPHA, rest)

    wanted = oracle_mean(value)
    assert mean(output.terms["divergence"]) == pytest.approx(wanted, rel=2e-5)
    metric = output.metrics["teacher/tail"]
    tail = oracle_mean(lambda s, t: math.exp(oracle.support(t, ids(s, t))[1]))
    assert float(metric.value / metric.weight) == pytest.approx(tail, rel=2e-5)


def with_columns(batch, k=K):
    """The batch with what the teacher says, as a cache would hold it."""
    teacher = model(TEACHER, 1)
    hidden = teacher.apply(
        teacher.params, batch["tokens"], batch["positions"], batch["segment_ids"]
    ).hidden
    said = ops.linear_top_logps(
        hidden, teacher.unembed(teacher.params), k, temperature=TEMPERATURE
    )
    return batch | dict(zip(_distill_teacher.COLUMNS, said, strict=True))


@pytest.mark.slow
def test_a_cached_teacher_says_what_the_live_one_does():
    batch = data.pad_batch(examples(), 16)
    cached = _distill_teacher.cached_teacher(alpha=ALPHA, temperature=TEMPERATURE)
    (found, _), grads = objective(loss_with(cached), params(), with_columns(batch))
    (wanted, _), same = objective(loss_with(compare_with(top_k=K)), params(), batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    chex.assert_trees_all_close(grads, same, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_terms_are_mixed_by_their_coefficients():
    """In the oracle's numbers: the likelihood is that of temperature 1."""
    batch = data.pad_batch(examples(), 16)
    loss_fn = loss_with(coefficient=2.25, sft_coefficient=0.5)
    (value, output), _ = objective(loss_fn, params(), batch)
    divergence = oracle_mean(
        lambda s, t: oracle.divergence(np.exp(s), np.exp(t), ALPHA)
    )
    nll = []
    for example, s in zip(examples(), oracle_logps(CONFIG, 0), strict=True):
        for t in range(len(example) - 1):
            if example.loss_mask[t + 1]:
                scores = TEMPERATURE * s[t]
                norm = math.log(math.fsum(np.exp(scores)))
                nll.append(norm - scores[example.tokens[t + 1]])
    assert mean(output.terms["nll"]) == pytest.approx(np.mean(nll), rel=2e-5)
    wanted = 2.25 * divergence + 0.5 * np.mean(nll)
    assert float(value) == pytest.approx(wanted, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, K])
def test_packing_and_what_is_masked_change_nothing(top_k):
    loss_fn = loss_with(compare_with(top_k=top_k))
    padded = data.pad_batch(examples(), 16)
    (wanted, _), grads = objective(loss_fn, params(), padded)
    packed = data.stack(data.pack(examples(), 32))
    junk = np.where(packed["segment_ids"] > 0, packed["tokens"], 61)
    (found, _), same = objective(loss_fn, params(), packed | {"tokens": junk})
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max() + 1e-8)


def sharded(kind, mesh):
    """Loss function and batch for a mesh; None is one device."""
    layout = _setup.Layout(mesh if mesh is None or mesh.size > 1 else None)
    split = _distill_teacher.split_over(layout)
    batch = data.pad_batch(examples(8), 16)
    if kind == "cached":
        batch = with_columns(batch)
        compare = _distill_teacher.cached_teacher(
            alpha=ALPHA, temperature=TEMPERATURE, split=split
        )
    else:
        compare = compare_with(top_k=K if kind == "top_k" else None, split=split)
    return loss_with(compare, token_logps=layout.token_logps), batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "top_k", "cached"])
def test_a_step_is_the_same_on_one_device_and_on_eight(kind):
    """4 x 2: rows over four, the vocabulary over two."""
    tx = optax.sgd(0.1)
    found = []
    for shape in (None, {"data": 1, "fsdp": 4, "tensor": 2}):
        mesh = None if shape is None else parallel.make_mesh(shape)
        loss_fn, batch = sharded(kind, mesh)
        state = training.init_state(
            model(CONFIG).params,
            tx,
            jax.random.key(0),
            frozen={"teacher": model(TEACHER, 1).params},
        )
        if mesh is not None:
            layout = _setup.Layout(mesh)
            placement = layout.state_shardings(state._replace(frozen=None), CONFIG)
            teacher = layout.state_shardings(state.frozen["teacher"], TEACHER)
            state = jax.device_put(
                state, placement._replace(frozen={"teacher": teacher})
            )
            batch = layout.place_batch(batch)
        step = jax.jit(training.make_train_step(loss_fn, tx))
        state, metrics = step(state, batch)
        found.append(jax.device_get((state.params, metrics)))
    (params, metrics), (wanted, same) = found[1], found[0]
    chex.assert_trees_all_close(metrics, same, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)
    assert float(metrics["grad_norm"]) > 1e-3


@pytest.mark.slow
def test_microbatches_are_the_whole_batch():
    batch, tx = data.pad_batch(examples(6), 16), optax.sgd(0.1)
    found = []
    for accumulate in (1, 3):
        state = training.init_state(
            model(CONFIG).params,
            tx,
            jax.random.key(0),
            frozen={"teacher": model(TEACHER, 1).params},
        )
        step = training.make_train_step(
            loss_with(compare_with(top_k=K)), tx, accumulate=accumulate
        )
        state, metrics = jax.jit(step)(state, batch)
        found.append((state.params, metrics["loss"]))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_are_left_out():
    """Heads of one vocabulary, filled up to different sizes."""
    wide = TEACHER.replace(vocab_size=72)
    built = model(wide, 2)
    weights = built.params | {
        "embed": {"embedding": built.params["embed"]["embedding"]},
        # The columns beyond would win everywhere.
        "head": {"kernel": built.params["head"]["kernel"].at[:, 64:].set(9.0)},
    }
    compare = _distill_teacher.live_teacher(built, alpha=0.0, vocab_size=64)
    batch = data.pad_batch(examples(2), 16)
    output = output_of(
        loss_with(compare), model(CONFIG).params | {"teacher": weights}, batch
    )
    narrow = model(TEACHER, 1)
    cut = weights | {
        "embed": {"embedding": weights["embed"]["embedding"][:64]},
        "head": {"kernel": weights["head"]["kernel"][:, :64]},
    }
    plain = _distill_teacher.live_teacher(narrow, alpha=0.0)
    wanted = output_of(loss_with(plain), model(CONFIG).params | {"teacher": cut}, batch)
    found, wanted = (mean(x.terms["divergence"]) for x in (output, wanted))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_another_vocabulary_is_refused_by_its_tokens():
    one = data.train_word_tokenizer(["a cat sat"])
    same = data.train_word_tokenizer(["a cat sat"])
    _distill_teacher.check_vocabulary(one, same)
    other = data.train_word_tokenizer(["a dog sat on a mat"])
    sizes = [len(t.backend.get_vocab(with_added_tokens=True)) for t in (one, other)]
    differing = next(
        id for id in range(1000) if one.token_text(id) != other.token_text(id)
    )
    texts = [repr(t.token_text(differing)) for t in (one, other)]
    with pytest.raises(
        VocabularyMismatchError,
        match=rf"has {sizes[0]} tokens, .* {sizes[1]}, and they differ: "
        rf"id {differing} is {' and '.join(texts)}",
    ):
        _distill_teacher.check_vocabulary(one, other)
    whole, small = (
        types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=size))
        for size in (one.vocab_size + 8, one.vocab_size - 1)
    )
    run = types.SimpleNamespace(tokenizer=one, model=whole)
    assert _distill_teacher.common_vocabulary(run, whole) == one.vocab_size + 8
    with pytest.raises(
        VocabularyMismatchError, match=f"teacher's {one.vocab_size - 1}"
    ):
        _distill_teacher.common_vocabulary(run, small)


def test_an_example_is_the_same_wherever_it_is_packed():
    ids = [
        id
        for row in data.pad(examples(), [16, 8, 32])
        for id, _ in _distill_cache.examples_of(row)
    ]
    places = {}
    for row in data.pack(examples(), 32):
        for id, at in _distill_cache.examples_of(row):
            places[id] = row["tokens"][at + 1]
    assert set(ids) == set(places)
    for id, example in zip(ids, examples(), strict=True):
        np.testing.assert_array_equal(places[id], example.tokens[example.loss_mask])


def test_settings_that_contradict_each_other():
    for options, words in (
        ({"alpha": 1.2}, r"alpha must lie in \[0, 1\], got 1.2"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0"),
        ({"coefficient": 0.0}, "coefficient must be positive"),
        ({"sft_coefficient": -1.0}, "sft_coefficient must be at least 0"),
        (
            {"alpha": 1.0, "teacher": TeacherSection(top_k=4, rest="teacher")},
            "teacher.rest is teacher, .* alpha = 1",
        ),
        (
            {
                "teacher": TeacherSection(mode="cached", top_k=4),
                "on_policy": distill.OnPolicySection(every=1),
            },
            "a cached teacher never read the student's answers",
        ),
        (
            {"sft_coefficient": 1.0, "on_policy": distill.OnPolicySection(every=2)},
            "sft_coefficient would train on the student's own answers",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            distill.DistillConfig(**options)
    for options, words in (
        ({"cache": "x.npz"}, "cache is given, but mode is live"),
        ({"mode": "cached"}, "top_k must be given"),
        ({"mode": "cached", "top_k": 4, "support": "student"}, "set support to teach"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"rest": "renormalize"}, "read only with top_k"),
    ):
        with pytest.raises(ValueError, match=words):
            TeacherSection(**options)
    with pytest.raises(ValueError, match="every must be at least 0"):
        distill.OnPolicySection(every=-1)
    with pytest.raises(ValueError, match="top_p"):
        distill.OnPolicySection(top_p=2.0)


@pytest.mark.slow
def test_the_guides_example_runs():
    guide = pathlib.Path(__file__).parents[2] / "docs" / "distillation.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    (block,) = blocks
    names: dict = {}
    exec(compile(block, str(guide), "exec"), names)
    assert names["values"].shape == names["fewer"].shape == (2, 5)
    assert float(names["values"].min()) > 0.0
    assert float(names["fewer"].min()) >= 0.0
