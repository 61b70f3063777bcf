"""Branches of a segment: a row with a shared prompt equals rows of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops
from jaxpost.typing import BRANCH

# Two segments in one row: 5 tokens with branches of 4 and 3, 2 with one of 2; padding.
LENGTHS = [(1, 0, 5), (1, 1, 4), (1, 2, 3), (2, 0, 2), (2, 1, 2)]
SEGMENTS = np.array(
    [s + b * BRANCH for s, b, n in LENGTHS for _ in range(n)] + [0, 0], np.int32
)[None]


def test_predictors_by_hand():
    found = ops.predictors(jnp.asarray(SEGMENTS))[0].tolist()
    trunk, first, second = [-1, 0, 1, 2, 3], [4, 5, 6, 7], [4, 9, 10]
    assert found == [*trunk, *first, *second, -1, 12, 13, 14, -1, -1]


def test_padding_may_lie_before_a_branch():
    first, second = 1 + BRANCH, 1 + 2 * BRANCH
    segments = jnp.asarray([[1, 1, 0, 0, first, first, 0, 0, second]])
    wanted = [[-1, 0, -1, -1, 1, 4, -1, -1, 1]]
    np.testing.assert_array_equal(ops.predictors(segments), wanted)


def test_without_branches_predictors_are_the_place_before():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    assert ops.predictors(segments)[0].tolist() == [-1, 0, 1, -1, 3, -1]


def test_a_branch_without_trunk_predicts_from_itself_only():
    segments = jnp.asarray([[1 + BRANCH] * 2 + [1 + 2 * BRANCH] * 2])
    assert ops.predictors(segments)[0].tolist() == [-1, 0, -1, 2]


@pytest.mark.parametrize(
    ("implementation", "length"), [("xla", 30), ("chunked", 30), ("chunked", 300)]
)
def test_attention_equals_rows_of_their_own(implementation, length):
    """Outputs and gradients of trunk + branches, the trunk's summed over its rows."""
    rng = np.random.default_rng(0)
    trunk, one, two = length // 2, length // 3, length - length // 2 - length // 3
    shape = (1, length, 2, 4)
    query, key, value, slope = (jnp.asarray(rng.normal(size=shape)) for _ in range(4))
    branch = np.repeat([0, 1, 2], (trunk, one, two))
    positions = np.concatenate(
        [np.arange(trunk), trunk + np.arange(one), trunk + np.arange(two)]
    )
    together = (positions[None], (1 + branch * BRANCH)[None].astype(np.int32))

    def attend(place, segments, *arrays):
        return ops.attention(
            *arrays,
            query_positions=place,
            key_positions=place,
            query_segments=segments,
            key_segments=segments,
            implementation=implementation,
        )

    def shared(*arrays):
        return attend(*together, *arrays)

    def apart(*arrays):
        rows = [np.flatnonzero((branch == 0) | (branch == b)) for b in (1, 2)]
        outs = []
        for row, own in zip(rows, (1, 2), strict=True):
            place = positions[row][None]
            out = attend(place, np.ones_like(place), *(x[:, row] for x in arrays))
            if own == 1:  # the trunk sees nothing of its branches
                outs.append(out[:, :trunk])
            outs.append(out[:, trunk:])
        return jnp.concatenate(outs, axis=1)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(slope)

    found, grads = with_gradients(shared, query, key, value)
    expected, grads_apart = with_gradients(apart, query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for x, y in zip(grads, grads_apart, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


@pytest.mark.slow
def test_a_decoder_sees_branches_as_rows():
    """Log-probs of each branch's tokens, from one row and from one row each."""
    config = models.DecoderConfig(
        family="llama",
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=32,
        tie_embeddings=False,
    )
    model = models.build(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    prompt, one, two = (rng.integers(1, 23, n).astype(np.int32) for n in (5, 4, 3))
    tokens = np.concatenate([prompt, one, two])[None]
    positions = np.concatenate([np.arange(9), np.arange(5, 8)])[None].astype(np.int32)
    segments = np.repeat([1, 1 + BRANCH, 1 + 2 * BRANCH], (5, 4, 3))[None]

    def logps(tokens, positions, segments):
        hidden = model.apply(model.params, tokens, positions, segments).hidden
        places = np.maximum(np.asarray(ops.predictors(segments)), 0)
        scores = ops.logits(hidden[0, places[0]][None], model.unembed(model.params))
        return np.asarray(ops.token_logps(scores, tokens))[0]

    found = logps(jnp.asarray(tokens), positions, jnp.asarray(segments, jnp.int32))
    for answer, part in ((one, found[5:9]), (two, found[9:12])):
        alone = np.concatenate([prompt, answer])[None]
        place = np.arange(alone.shape[1], dtype=np.int32)[None]
        expected = logps(jnp.asarray(alone), place, jnp.ones_like(place))
        np.testing.assert_allclose(part, expected[5:], atol=2e-6)
