"""Scores of preferences against their definitions in loops, and by hand."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxpost import evaluation
from tests.oracles import preference as oracle

# Few distinct values, so that ties are common.
MARGINS = st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=1)
SCORED = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()),
    min_size=1,
    max_size=9,
)
quick = hypothesis.settings(max_examples=60, deadline=None)


@quick
@hypothesis.given(MARGINS)
def test_accuracy_is_its_definition(margins):
    got = evaluation.pair_accuracy(margins)
    np.testing.assert_allclose(got, oracle.pair_accuracy(margins), rtol=1e-12)
    swapped = evaluation.pair_accuracy([-m for m in margins])
    np.testing.assert_allclose(got + swapped, 1.0, rtol=1e-12)


def test_ties_count_half_and_infinities_count():
    assert evaluation.pair_accuracy([1.0, 0.0, -1.0, 0.0]) == 0.5
    assert evaluation.pair_accuracy([np.inf, -np.inf, np.inf, 0.0]) == 0.625


@pytest.mark.parametrize(
    ("margins", "words"), [([], "no pairs"), ([1.0, np.nan], "margin 1 is NaN")]
)
def test_margins_that_say_nothing_are_refused(margins, words):
    with pytest.raises(ValueError, match=words):
        evaluation.pair_accuracy(margins)


@quick
@hypothesis.given(SCORED)
def test_auroc_is_its_definition(scored):
    scores, labels = zip(*scored, strict=True)
    got = evaluation.auroc(scores, np.asarray(labels))
    np.testing.assert_allclose(got, oracle.auroc(scores, labels), rtol=1e-12)


@quick
@hypothesis.given(SCORED, st.data())
def test_precision_and_recall_are_the_mean_over_tie_breaks(scored, data):
    scores, labels = zip(*scored, strict=True)
    k = data.draw(st.integers(1, len(scores)))
    got = evaluation.precision_recall_at(scores, np.asarray(labels), k)
    want = oracle.precision_recall_at(scores, labels, k)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_auroc_of_perfect_reversed_and_constant_scores():
    labels = np.array([True, True, False, False, False])
    assert evaluation.auroc([5, 4, 3, 2, 1], labels) == 1.0
    assert evaluation.auroc([1, 2, 3, 4, 5], labels) == 0.0
    assert evaluation.auroc([7, 7, 7, 7, 7], labels) == 0.5
    assert evaluation.auroc([np.inf, 0, 0, -np.inf, 0], labels) == 5 / 6
    assert math.isnan(evaluation.auroc([1.0, 2.0], np.array([True, True])))


def test_outlier_input_is_checked():
    labels = np.array([True, False])
    with pytest.raises(ValueError, match="score 1 is NaN"):
        evaluation.auroc([0.0, np.nan], labels)
    with pytest.raises(ValueError, match="bool labels"):
        evaluation.auroc([0.0, 1.0], np.array([1, 0]))
    with pytest.raises(ValueError, match="k must lie between 1 and 2"):
        evaluation.precision_recall_at([0.0, 1.0], labels, 3)


@quick
@hypothesis.given(
    st.lists(st.tuples(st.floats(-6, 6), st.sampled_from([0.5, 0.8, 1.0])), min_size=1),
    st.sampled_from([1, 2, 10]),
)
def test_calibration_error_is_its_definition(pairs, bins):
    margins, agreement = zip(*pairs, strict=True)
    found = evaluation.calibration(margins, agreement=agreement, bins=bins)
    want = oracle.calibration_error(margins, agreement, bins)
    np.testing.assert_allclose(found.error, want, rtol=1e-9, atol=1e-12)
    assert found.counts.sum() == len(margins)


def test_calibration_by_hand():
    # sigmoid(log 3) = 0.75: three of four right is calibrated, four of four is not.
    margin = math.log(3.0)
    found = evaluation.calibration([margin, margin, margin, -margin])
    np.testing.assert_allclose(found.error, 0.0, atol=1e-12)
    found = evaluation.calibration([margin] * 4)
    np.testing.assert_allclose(found.error, 0.25, rtol=1e-12)
    assert np.isnan(found.accuracies[found.counts == 0]).all()
    # Annotators of whom 3 of 4 agree make it calibrated again.
    found = evaluation.calibration([margin] * 4, agreement=[0.75] * 4)
    np.testing.assert_allclose(found.error, 0.0, atol=1e-12)


def test_calibration_settings_are_checked():
    with pytest.raises(ValueError, match="bins must be at least 1"):
        evaluation.calibration([1.0], bins=0)
    for bad in ([1.5], [0.5, 0.5]):
        with pytest.raises(ValueError, match="agreement must hold one share"):
            evaluation.calibration([1.0], agreement=bad)


def test_margin_deciles_by_hand():
    margins = np.arange(1.0, 21.0) * np.where(np.arange(20) % 4 == 0, -1.0, 1.0)
    groups = evaluation.accuracy_by_margin(margins)
    assert [g.count for g in groups] == [2] * 10
    assert [(g.low, g.high) for g in groups[:2]] == [(1.0, 2.0), (3.0, 4.0)]
    assert [g.accuracy for g in groups] == [0.5, 1.0] * 5
    assert sum(g.count for g in groups) == 20


@quick
@hypothesis.given(MARGINS, st.randoms())
def test_margin_groups_do_not_depend_on_the_order(margins, random):
    groups = evaluation.accuracy_by_margin(margins)
    mixed = list(margins)
    random.shuffle(mixed)
    again = evaluation.accuracy_by_margin(mixed)
    assert [(g.low, g.high, g.count) for g in groups] == [
        (g.low, g.high, g.count) for g in again
    ]
    whole = sum(g.count * g.accuracy for g in groups) / len(margins)
    np.testing.assert_allclose(whole, oracle.pair_accuracy(margins), rtol=1e-12)
    assert all(a.high < b.low for a, b in itertools.pairwise(groups))


def test_margin_groups_with_infinite_margins():
    groups = evaluation.accuracy_by_margin([np.inf, 1.0, -np.inf, 2.0], groups=2)
    assert [(g.high, g.accuracy) for g in groups] == [(2.0, 1.0), (np.inf, 0.5)]
    with pytest.raises(ValueError, match="groups must be"):
        evaluation.accuracy_by_margin([1.0], groups=0)


def test_bootstrap_interval_covers_and_repeats():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        sample = rng.normal(1.0, 1.0, 60)
        found = evaluation.bootstrap_interval(sample, samples=300, seed=trial)
        covered += found.low <= 1.0 <= found.high
        assert found.low <= found.value <= found.high
    assert 86 <= covered <= 100  # 95 of 100 in the mean, three deviations and bias
    again = evaluation.bootstrap_interval(sample, samples=300, seed=99)
    assert again == found


def test_bootstrap_draws_rows_whole():
    rows = np.array([[1.0, 1.5], [4.0, 4.5], [9.0, 9.5]])
    found = evaluation.bootstrap_interval(
        rows, statistic=lambda r: float(np.mean(r[:, 1] - r[:, 0])), seed=0
    )
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one row"):
        evaluation.bootstrap_interval([], seed=0)
    with pytest.raises(ValueError, match="level must lie"):
        evaluation.bootstrap_interval([1.0], level=1.0, seed=0)


def test_reward_bench_by_hand():
    subsets = ["math-prm"] * 2 + ["hep-cpp"] * 4 + ["donotanswer"] + ["mine"]
    margins = [1.0, -1.0, 1.0, 1.0, 1.0, 0.0, -2.0, 5.0]
    found = evaluation.reward_bench(margins, subsets)
    assert found.subsets == {
        "math-prm": 0.5,
        "hep-cpp": 0.875,
        "donotanswer": 0.0,
        "mine": 1.0,
    }
    reasoning = (984 * 0.5 + 164 * 0.875) / (984 + 164)
    np.testing.assert_allclose(found.sections["Reasoning"], reasoning, rtol=1e-12)
    assert found.sections["Safety"] == 0.0
    np.testing.assert_allclose(found.score, reasoning / 2, rtol=1e-12)
    assert found.unknown == ("mine",)
    assert len(found.missing) == 23 - 3


def test_reward_bench_table_is_the_published_one():
    totals = {
        name: sum(weights.values())
        for name, weights in evaluation.REWARD_BENCH_SECTIONS.items()
    }
    # Pairs per section of the paper's table 1; reasoning is 984 + 6 * 164 by weight.
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def test_reward_bench_errors():
    with pytest.raises(ValueError, match="no subset of RewardBench"):
        evaluation.reward_bench([1.0], ["mine"])
    with pytest.raises(ValueError, match="2 margins, but 1 subsets"):
        evaluation.reward_bench([1.0, 2.0], ["hep-go"])


def test_rm_bench_by_hand():
    # A model that only likes markdown: right when the chosen answer has more of it.
    style = np.array([[0.0, 1.0, 2.0]])
    found = evaluation.rm_bench(style, style)
    assert (found.hard, found.normal, found.easy) == (0.0, 0.5, 1.0)
    assert found.average == 0.5
    # One that does not mind style at all.
    found = evaluation.rm_bench(np.ones((4, 3)), np.zeros((4, 3)))
    np.testing.assert_array_equal(found.matrix, np.ones((3, 3)))


def test_rm_bench_is_its_definition():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.integers(0, 4, (2, 30, 3)).astype(float)
    found, want = (
        evaluation.rm_bench(chosen, rejected),
        oracle.rm_bench(chosen, rejected),
    )
    for name, value in want.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12)
    parts = evaluation.rm_bench_by_domain(chosen, rejected, ["a", "b"] * 15)
    assert list(parts) == ["a", "b"]
    mean = (parts["a"].hard + parts["b"].hard) / 2
    np.testing.assert_allclose(mean, found.hard, rtol=1e-12)


def test_rm_bench_errors():
    with pytest.raises(ValueError, match=r"\[N, 3\], got \(1, 2\)"):
        evaluation.rm_bench([[1.0, 2.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="1 prompts, but 2 domains"):
        evaluation.rm_bench_by_domain(np.ones((1, 3)), np.ones((1, 3)), ["a", "b"])
