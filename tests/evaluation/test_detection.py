"""AUROC, TPR at a false-positive rate, and pass@k, against counting."""

import itertools
import math

import numpy as np
import pytest

from jaxpost import evaluation


def test_oracle_with_ties_and_unequal_sizes():
    human, machine = [-1.0, 0.0, 0.5, 1.0, 2.0], [0.5, 1.5, 2.0, 3.0, 4.0]
    found = evaluation.detection(machine, human, rates=(0.0, 0.05, 0.2))
    assert found.auroc == pytest.approx(0.84, abs=1e-12)
    assert found.tpr == {0.0: 0.4, 0.05: 0.4, 0.2: 0.8}
    assert (found.positives, found.negatives) == (5, 5)
    shorter = evaluation.detection(machine[:2], human)
    assert shorter.auroc == pytest.approx((2.5 + 4.0) / 10)


@pytest.mark.parametrize("seed", range(6))
def test_against_every_pair_and_every_threshold(seed):
    rng = np.random.default_rng(seed)
    positives = rng.integers(0, 6, rng.integers(1, 30)) / 2 + 0.5
    negatives = rng.integers(0, 6, rng.integers(1, 200)) / 2
    found = evaluation.detection(positives, negatives, rates=(0.0, 0.01, 0.05, 0.3, 1))
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    assert found.auroc == pytest.approx(np.mean(pairs), abs=1e-12)
    for rate, share in found.tpr.items():
        points = [
            np.mean(positives >= cut)
            for cut in (*positives, *negatives, np.inf)
            if np.mean(negatives >= cut) <= rate
        ]
        assert share == pytest.approx(max(points), abs=1e-12)


def test_a_share_of_whole_negatives_is_allowed():
    negatives = np.arange(100.0)
    assert evaluation.tpr_at_fpr([71.0], negatives, fpr=0.29) == 1.0
    assert evaluation.tpr_at_fpr([70.0], negatives, fpr=0.29) == 0.0


def test_infinite_scores_are_ordered():
    found = evaluation.detection([np.inf, 1.0], [-np.inf, 1.0, 0.0])
    assert found.auroc == pytest.approx(5.5 / 6)
    assert found.tpr[0.0] == 0.5


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(40, 13, 1, 0.325), (40, 13, 10, 0.9900475665), (5, 2, 3, 0.9), (20, 0, 1, 0.0)],
)
def test_pass_at_k_oracle(n, c, k, value):
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(value, abs=5e-11)


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for n, c in itertools.combinations_with_replacement(range(1, 7), 2):
        n, c = max(n, c), min(n, c)
        for k in range(1, n + 1):
            choices = list(itertools.combinations(range(n), k))
            share = sum(min(choice) < c for choice in choices) / len(choices)
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
            binomial = 1 - math.comb(n - c, k) / math.comb(n, k)
            assert share == pytest.approx(binomial, abs=1e-12)


def test_pass_at_k_of_many_tasks():
    found = evaluation.pass_at_k([40, 5], [13, 2], 3)
    assert found.dtype == np.float64
    assert found.shape == (2,)
    assert found[1] == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [], {}), "negatives must be a list of at least one score"),
        (([np.nan], [1.0], {}), "score 0 of positives is NaN"),
        (([1.0], [1.0], {"rates": (1.5,)}), "fpr must lie in"),
    ],
)
def test_bad_scores(arguments, message):
    positives, negatives, options = arguments
    with pytest.raises(ValueError, match=message):
        evaluation.detection(positives, negatives, **options)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (2, 3, 1, "correct must lie between"),
        (2, -1, 1, "correct must lie between"),
        (2, 1, 3, "got k=3 with 2 samples"),
        (2, 1, 0, "k must lie between"),
        (2.0, 1, 1, "must be integers"),
        ([2, 2], [1], 1, "of one shape"),
    ],
)
def test_bad_counts(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        evaluation.pass_at_k(n, c, k)
