"""Sums over the answers of joined rows, and their transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import data, ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, W, A = 3, 11, 4
seeds = st.integers(0, 10**6)


def some(seed):
    """Values per token, values per answer, and ids with gaps and empty answers."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(-1, A, (B, W))
    ids[0][ids[0] == 2] = -1  # an answer without tokens
    ids[1] = -1  # a row without any
    return draw.normal(size=(B, W)), draw.normal(size=(B, A)), ids


answer_sums = jax.jit(ops.answer_sums, static_argnums=2)
per_answer = jax.jit(ops.per_answer)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_values_equal_the_oracle(seed):
    tokens, answers, ids = some(seed)
    with jax.enable_x64(True):
        sums, spread = answer_sums(tokens, ids, A), per_answer(answers, ids)
    assert sums.dtype == spread.dtype == "float64"
    wanted = oracle.answer_sums(tokens, ids, A)
    np.testing.assert_allclose(sums, wanted, rtol=1e-12, atol=1e-14)
    spread = np.asarray(spread)
    for b, w in np.ndindex(B, W):
        assert spread[b, w] == (answers[b, ids[b, w]] if ids[b, w] >= 0 else 0.0)


@jax.jit
def transposed(tokens, answers, ids):
    """What flows back through each function of what the other is given."""
    _, from_sums = jax.vjp(lambda x: ops.answer_sums(x, ids, A), tokens)
    _, from_spread = jax.vjp(lambda x: ops.per_answer(x, ids), answers)
    return from_sums(answers)[0], from_spread(tokens)[0]


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_each_gradient_is_the_other_function(seed):
    tokens, answers, ids = map(jnp.asarray, some(seed))
    of_sums, of_spread = transposed(tokens, answers, ids)
    np.testing.assert_array_equal(of_sums, per_answer(answers, ids))
    np.testing.assert_allclose(of_spread, answer_sums(tokens, ids, A), atol=1e-6)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
def test_what_belongs_to_no_answer_changes_nothing(rubbish):
    tokens, answers, ids = some(1)
    dirty = jnp.asarray(np.where(ids < 0, rubbish, tokens), jnp.float32)
    ids = jnp.asarray(ids)

    @jax.jit
    @jax.grad
    def slopes_of_sums(x):
        return jnp.sum(jnp.square(ops.answer_sums(x, ids, A)))

    np.testing.assert_array_equal(
        answer_sums(dirty, ids, A), answer_sums(tokens.astype(np.float32), ids, A)
    )
    slopes = np.asarray(slopes_of_sums(dirty))
    np.testing.assert_array_equal(slopes[ids < 0], 0.0)
    assert np.isfinite(slopes).all()
    # Of the answers: the one without tokens.
    answers[0, 2] = rubbish
    dirty = jnp.asarray(answers, jnp.float32)
    assert np.isfinite(per_answer(dirty, ids)).all()

    @jax.jit
    @jax.grad
    def slopes_of_spread(x):
        return jnp.sum(jnp.square(ops.per_answer(x, ids)))

    slopes = slopes_of_spread(dirty)
    assert slopes[0, 2] == 0.0
    assert np.isfinite(slopes).all()


def test_ids_beyond_the_answers_belong_to_none():
    ids, ones = jnp.array([[0, 1, 2, -1, -5]]), jnp.ones((1, 5))
    np.testing.assert_array_equal(ops.answer_sums(ones, ids, 2), [[1.0, 1.0]])
    np.testing.assert_array_equal(ops.per_answer(ones[:, :2], ids), [[1, 1, 0, 0, 0]])


def test_answers_of_a_joined_row():
    """The ids that recipes use, of a row as the data room lays it out."""
    padded = np.zeros((1, 3, 4), np.int32)
    rows = [[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 3, 0]]
    padded[0] = rows
    real = padded != 0
    scored = real.copy()
    scored[:, :, :2] = False
    batch = {
        "tokens": padded,
        "positions": np.where(real, np.arange(4), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "loss_mask": scored,
    }
    joined = data.join_answers(batch, 8)
    branches = ops.branch_numbers(jnp.asarray(joined["segment_ids"]))
    ids = jnp.where(joined["loss_mask"], branches - 1, -1)
    tokens = jnp.asarray(joined["tokens"], jnp.float32)
    np.testing.assert_array_equal(ops.answer_sums(tokens, ids, 3), [[7, 17, 3]])


def test_jit_equals_eager_and_rows_split_over_devices():
    tokens, answers, ids = some(3)
    tokens, answers, ids = (
        jnp.asarray(np.tile(x, (8 // B + 1, 1))[:8]) for x in (tokens, answers, ids)
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))

    def both(tokens, answers, ids):
        return ops.answer_sums(tokens, ids, A), ops.per_answer(answers, ids)

    wanted = both(tokens, answers, ids)
    arrays = jax.device_put((tokens, answers, ids), split)
    compiled = jax.jit(both).lower(*arrays).compile()
    text = compiled.as_text()
    assert text is not None
    assert "all-" not in text  # each device sums its own rows
    found = compiled(*arrays)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert other.sharding.is_equivalent_to(split, 2)


def test_no_array_of_every_token_and_answer_is_stored():
    width, answers = 4096, 64
    values, ids = jnp.zeros((8, width)), jnp.zeros((8, width), jnp.int32)

    def back_and_forth(values, ids):
        return jax.grad(lambda x: jnp.sum(ops.answer_sums(x, ids, answers) ** 2))(
            values
        )

    compiled = jax.jit(back_and_forth).lower(values, ids).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < values.nbytes * answers / 8


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda v, a, i: ops.answer_sums(v, i, 0), ValueError, "answers must be at"),
        (lambda v, a, i: ops.answer_sums(v, v, A), AssertionError, "int"),
        (lambda v, a, i: ops.answer_sums(v[0], i[0], A), AssertionError, "rank"),
        (lambda v, a, i: ops.answer_sums(v, i[:, 1:], A), AssertionError, "shape"),
        (lambda v, a, i: ops.per_answer(a, v), AssertionError, "int"),
        (lambda v, a, i: ops.per_answer(a[:1], i), AssertionError, "shape"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(*map(jnp.asarray, some(0)))
