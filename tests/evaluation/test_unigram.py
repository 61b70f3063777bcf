"""The context-free baseline, by hand and in its limits."""

import numpy as np
import pytest

from jaxpost.evaluation import unigram_loss


def example(tokens, mask):
    return np.asarray(tokens, np.int32), np.asarray(mask, bool)


def test_by_hand():
    train = [example([0, 1, 1, 2], [False, True, True, True])]  # counts 0, 2, 1, + 1
    held_out = [example([1, 0], [True, False]), example([2, 0], [True, True])]
    expected = -np.mean(np.log([3 / 7, 2 / 7, 1 / 7]))
    got = unigram_loss(train, held_out, vocab_size=4)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_uniform_where_nothing_was_seen():
    held_out = [example([3, 5], [True, True])]
    got = unigram_loss([], held_out, vocab_size=8)
    np.testing.assert_allclose(got, np.log(8), rtol=1e-12)


def test_needs_a_scored_token():
    with pytest.raises(ValueError, match="at least one trained-on"):
        unigram_loss([], [example([1], [False])], vocab_size=2)
