"""Log-probs of whole sequences: against the plain form, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops
from jaxpost.ops import _linear_chunk
from jaxpost.ops._linear_sequences import _chunk_sizes, foreseen_sequence_logps
from jaxpost.typing import Head

ROWS, LENGTH, WIDTH, VOCAB = 5, 7, 6, 11


def problem(seed=0, dtype=jnp.float64):
    """Rows with 0 to 7 scored tokens in two sequences, in any order, one row empty."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    head = Head(
        jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), dtype),
        jnp.asarray(rng.normal(size=VOCAB), dtype),
        3.0,
        0.7,
    )
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    ids = rng.integers(-1, 2, (ROWS, LENGTH)).astype(np.int32)
    ids[1] = -1
    ids[3] = 0
    return hidden, head, targets, jnp.asarray(ids)


def row_losses(logps, reference):
    """Preference losses: each row's gradient depends on both its sequences."""
    ratios = logps - reference
    return jax.nn.softplus(-0.3 * (ratios[:, 0] - ratios[:, 1]))


foresee = jax.grad(lambda logps, reference: jnp.sum(row_losses(logps, reference)))


def wrong(logps, reference):
    return jnp.ones_like(logps) + 0 * reference


def plain(hidden, head, targets, ids):
    logps = ops.token_logps(ops.logits(hidden, head), targets)
    which = ids[..., None] == jnp.arange(2)[None, None]
    return jnp.sum(jnp.where(which, logps[..., None], 0), axis=1)


def both(guess, chunk, inputs, reference):
    """Mean loss and gradients: foreseen in chunks, and the plain form."""
    hidden, head, targets, ids = inputs

    def fused(hidden, weight, bias):
        found = foreseen_sequence_logps(
            hidden,
            Head(weight, bias, head.softcap, head.scale),
            targets,
            ids,
            2,
            guess,
            (reference,),
            chunk,
        )
        return jnp.mean(row_losses(found, reference)), found

    def simple(hidden, weight, bias):
        found = plain(
            hidden, Head(weight, bias, head.softcap, head.scale), targets, ids
        )
        return jnp.mean(row_losses(found, reference)), found

    arguments = (hidden, head.weight, head.bias)
    return [
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*arguments)
        for f in (fused, simple)
    ]


@pytest.mark.parametrize("chunk", [7, 9, 100])
@pytest.mark.parametrize(
    "guess", [foresee, wrong, None], ids=["foreseen", "not foreseen", "no guess"]
)
def test_equals_the_plain_form(guess, chunk):
    with jax.enable_x64():
        inputs = problem()
        reference = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 2)))
        fused, simple = both(guess, chunk, inputs, reference)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
            fused,
            simple,
        )


def test_what_is_foreseen_is_not_computed_again(monkeypatch):
    """In float32 and compiled apart, the loss and the guess still agree."""
    seen = []
    sweep = _linear_chunk.scale_if_foreseen

    def spy(weights, trips, *rest):
        start, left = sweep(weights, trips, *rest)
        jax.debug.callback(lambda *x: seen.append([int(n) for n in x]), trips, left)
        return start, left

    monkeypatch.setattr("jaxpost.ops._linear_sequences.scale_if_foreseen", spy)
    reference = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 2)))
    for guess in (foresee, wrong):
        inputs = problem(dtype=jnp.float32)
        jax.block_until_ready(both(guess, 9, inputs, reference.astype(jnp.float32)))
    jax.effects_barrier()
    (trips, left), (_, left_of_wrong) = seen
    assert trips == left_of_wrong > 0
    assert left == 0


def test_chunks_are_about_as_long_as_the_rows_in_them():
    """Otherwise three rows of 384 tokens would cost as much as three of 512."""
    assert 384 in _chunk_sizes(512, 4096)
    for columns, most in ((512, 5 / 4), (1280, 9 / 8)):
        sizes = _chunk_sizes(columns, 8 * columns)
        assert len(sizes) <= 9
        assert max(sizes) == columns
        for row in range(1, columns + 1):
            live = columns // row * row  # as many whole rows as fit
            assert live <= min(size for size in sizes if size >= live) <= live * most
        assert _chunk_sizes(columns, 2 * columns) == (columns,)


@pytest.mark.parametrize(("usual", "foreseen"), [(3, True), (2, False)])
def test_rows_of_up_to_three_times_the_usual_chunk_are_foreseen(
    monkeypatch, usual, foreseen
):
    monkeypatch.setattr(
        "jaxpost.ops._linear_sequences.default_chunk_size", lambda *_: usual
    )
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    asked = []

    def watched(logps, reference):
        asked.append(logps.shape)
        return foresee(logps, reference)

    hidden, head, targets, ids = problem(dtype=jnp.float32)

    def loss(hidden):
        found = ops.linear_sequence_logps(
            hidden,
            head,
            targets,
            ids,
            2,
            foresee=watched,
            operands=(jnp.zeros((ROWS, 2)),),
        )
        return jnp.sum(found)

    jax.eval_shape(jax.grad(loss), hidden)
    assert bool(asked) == foreseen


def test_a_loss_without_slope_is_foreseen_too():
    """All factors zero: nothing to scale, nothing to sweep, gradients exactly zero."""
    inputs = problem(dtype=jnp.float32)
    hidden, head, targets, ids = inputs

    def loss(hidden):
        found = foreseen_sequence_logps(
            hidden, head, targets, ids, 2, lambda x: 0 * x, (), 9
        )
        return jnp.sum(0.0 * found)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(hidden), 0.0)


def test_nan_in_unscored_tokens_changes_nothing():
    hidden, head, targets, ids = problem(dtype=jnp.float32)
    poisoned = jnp.where(ids[..., None] < 0, jnp.nan, hidden)
    reference = jnp.zeros((ROWS, 2))
    clean, dirty = (
        both(foresee, 9, (h, head, targets, ids), reference)[0]
        for h in (hidden, poisoned)
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_the_public_function_falls_back_on_tokens():
    """With several devices nothing is foreseen; values and gradients are the same."""
    inputs = problem(dtype=jnp.float32)
    hidden, head, targets, ids = inputs
    nothing = jnp.zeros((ROWS, 2))

    def loss(hidden):
        found = ops.linear_sequence_logps(
            hidden, head, targets, ids, 2, foresee=foresee, operands=(nothing,)
        )
        return jnp.mean(row_losses(found, nothing))

    expected = both(foresee, 9, inputs, jnp.zeros((ROWS, 2)))[1]
    value, grad = jax.jit(jax.value_and_grad(loss))(hidden)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1][0], atol=2e-6)


def test_shapes_that_do_not_fit():
    hidden, head, targets, ids = problem(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        ops.linear_sequence_logps(hidden, head, targets, ids[:, 1:], 2)
