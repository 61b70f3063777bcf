"""The noise lab: labels, small models, intervals, and a quick run of all of it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def parts():
    """The modules beside the script, found as the script finds them."""
    sys.path.insert(0, str(CLAIMS))
    try:
        import _noise_lab_report as report
        import _noisy_pairs as pairs
        import _small_preference_models as small
        import noise_lab
    finally:
        sys.path.remove(str(CLAIMS))
    return pairs, small, report, noise_lab


def truth_of(pairs, count=4000):
    return pairs.make_truth(3, 0, count, answers=2, width=5)


def test_flips_are_nested_and_as_many_as_asked_for(parts):
    pairs, *_ = parts
    truth = truth_of(pairs)
    right = pairs.true_signs(truth)
    wrong = [
        pairs.labels(truth, pairs.Scenario("x", "flips", rate)) != right
        for rate in (0.0, 0.1, 0.4)
    ]
    shares = [w.mean() for w in wrong]
    np.testing.assert_allclose(shares, [0.0, 0.1, 0.4], atol=0.025)  # 3 deviations
    assert not (wrong[1] & ~wrong[2]).any()


def test_other_noise_hits_the_pairs_it_says(parts):
    pairs, *_ = parts
    truth = truth_of(pairs)
    right = pairs.true_signs(truth)
    margins = np.abs(truth.rewards[:, 0] - truth.rewards[:, 1])
    np.testing.assert_allclose(margins.std(), np.sqrt(1 - 2 / np.pi), atol=0.05)
    clearest = pairs.labels(truth, pairs.Scenario("x", "clearest", 0.1)) != right
    np.testing.assert_allclose(clearest.mean(), 0.1, atol=1e-3)
    assert margins[clearest].min() > margins[~clearest].max()
    longer = np.where(truth.phi[:, 0, -1] > truth.phi[:, 1, -1], 1.0, -1.0)
    by_length = pairs.labels(truth, pairs.Scenario("x", "length", 1.0))
    np.testing.assert_array_equal(by_length, longer)
    wrong = pairs.labels(truth, pairs.Scenario("x", "strength")) != right
    small_margins = margins < np.median(margins)
    assert wrong[small_margins].mean() > 1.5 * wrong[~small_margins].mean()


def test_the_true_reward_does_not_depend_on_length(parts):
    pairs, *_ = parts
    truth = truth_of(pairs)
    features = truth.phi.reshape(-1, 5)
    found = np.linalg.lstsq(features, truth.rewards.ravel(), rcond=None)[0]
    np.testing.assert_allclose(found[-1], 0.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found), np.sqrt(0.5), rtol=1e-5)


def test_dpo_of_a_log_linear_policy_is_a_linear_reward(parts):
    """The normaliser cancels: tables of `policy` hold of linear rewards."""
    _, small, *_ = parts
    sizes = small.Sizes("policy", 4, 0, 3, 0.5, steps=1, learning_rate=0.1)
    phi = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    theta = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    found = small.margins(sizes, {"theta": theta}, phi)
    want = 0.5 * (phi[:, 0] - phi[:, 1]) @ theta
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    scores = np.asarray(small.scores(sizes, {"theta": theta}, phi))
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_models_of_a_grid_do_not_meet(parts, kind):
    _, small, _, lab = parts
    sizes = small.Sizes(kind, 3, 2, 2, 1.0, steps=5, learning_rate=0.1)
    plain = small.Setting(lab.losses.PairwiseConfig("bradley_terry"), 0.01)
    robust = small.Setting(lab.losses.PairwiseConfig("r3m", lam=0.3), 0.1)
    phi = np.random.default_rng(1).normal(size=(2, 40, 2, 3)).astype(np.float32)
    signs = np.sign(np.random.default_rng(2).normal(size=(2, 2, 40))).astype(np.float32)
    counts = (40, 10)
    grid = [[plain, robust], [robust, robust]]
    together = small.train(sizes, grid, phi, signs, counts, seed=0)
    for s in range(2):
        for f in range(2):
            alone = small.train(
                sizes, [[grid[s][f]]], phi, signs[f : f + 1], counts[f : f + 1], seed=0
            )
            jax.tree.map(
                lambda a, b, at=(s, f): np.testing.assert_allclose(
                    a[at], b[0, 0], rtol=1e-4, atol=1e-5
                ),
                together,
                alone,
            )


def test_pairs_beyond_a_scenario_s_count_do_not_matter(parts):
    _, small, _, lab = parts
    sizes = small.Sizes("policy", 3, 0, 2, 1.0, steps=5, learning_rate=0.1)
    setting = small.Setting(lab.losses.PairwiseConfig("bradley_terry"), 0.01)
    phi = np.random.default_rng(1).normal(size=(1, 40, 2, 3)).astype(np.float32)
    signs = np.ones((1, 1, 40), np.float32)
    found = small.train(sizes, [[setting]], phi, signs, (10,), seed=0)
    signs[..., 10:] = -1.0
    again = small.train(sizes, [[setting]], phi, signs, (10,), seed=0)
    np.testing.assert_array_equal(found["theta"], again["theta"])


def test_paired_intervals_and_verdicts_by_hand(parts):
    *_, report, _ = parts
    a, b = np.array([3.0, 5.0, 4.0]), np.array([1.0, 2.0, 3.0])  # 2, 3, 1
    mean, low, high = report.paired(a, b)
    half = 4.302652730 / np.sqrt(3.0)  # Student's t, 2 degrees of freedom
    np.testing.assert_allclose([mean, low, high], [2.0, 2 - half, 2 + half], rtol=1e-8)
    assert report.verdict((1.0, 0.1, 1.9)) == "reproduced"
    assert report.verdict((-1.0, -1.9, -0.1)) == "not reproduced, the opposite"
    assert "no difference" in report.verdict((0.1, -0.1, 0.3))


@pytest.mark.slow
def test_quick_run_end_to_end(parts, tmp_path):
    command = [sys.executable, str(CLAIMS / "noise_lab.py"), "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    *_, report, _ = parts
    found = json.loads((tmp_path / "noise_lab_quick.json").read_text())
    for model, rows in report.ROWS.items():
        for method in rows:

            def accuracy(scenario, model=model, method=method):
                return report.numbers(found, model, method, scenario, "accuracy")

            assert accuracy("flip 0%").min() > 0.9
            assert 0.7 < accuracy("flip 30%").mean() < accuracy("flip 0%").mean()
            assert accuracy("flip 30%, x2").mean() < accuracy("flip 30%").mean()
        auroc = report.numbers(found, model, "r3m", "flip 30%", "auroc, fitted")
        assert auroc.min() > 0.75
    assert len(found["verdicts"]) == 2 * 6 + 1
    assert all(line in done.stdout for line in found["verdicts"])
    drawn = (tmp_path / "noise_lab_quick.svg").read_text()
    assert "R³M-DPO" in drawn


def test_committed_results_are_of_the_committed_lab(parts):
    *_, report, lab = parts
    found = json.loads((CLAIMS / "results" / "noise_lab.json").read_text())
    assert found["lab"] == json.loads(json.dumps(dataclasses.asdict(lab.LAB)))
    assert report.verdict_lines(found) == found["verdicts"]
    guide = (ROOT / "docs" / "preferences.md").read_text("utf-8")
    for model in report.ROWS:
        assert report.markdown_table(found, model) in guide
    larger = json.loads((CLAIMS / "results" / "noise_lab_penalties.json").read_text())
    assert larger["lab"] == json.loads(
        json.dumps(dataclasses.asdict(lab.penalty_lab()))
    )
    for scenario in report.names_of(larger):
        cells = [
            report.points(report.gain(larger, model, "r3m", scenario))
            for model in report.ROWS
        ]
        assert f"| {scenario} | {' | '.join(cells)} |" in guide
