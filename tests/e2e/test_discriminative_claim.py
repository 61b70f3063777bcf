"""The discriminative claims: plans, runs side by side, verdicts, and a quick run."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpost import data

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def parts():
    """The modules beside the script, found as the script finds them."""
    sys.path.insert(0, str(CLAIMS))
    try:
        import _discriminative_report as report
        import _discriminative_runs as runs
        import discriminative
    finally:
        sys.path.remove(str(CLAIMS))
    return runs, report, discriminative


def world_of(runs, rows=48, columns=4, length=6, seed=0):
    """Random texts: a prompt of two tokens, an answer of the rest."""
    rng = np.random.default_rng(seed)

    def texts(*shape):
        tokens = rng.integers(1, 260, (*shape, length)).astype(np.int32)
        return runs.Texts(tokens, np.broadcast_to(np.arange(length) > 1, tokens.shape))

    right, wrong = texts(rows), texts(rows, columns)
    logps = rng.normal(size=(rows, columns)).astype(np.float32)
    same = np.zeros((rows, columns), bool)
    return runs.World(right.tokens[:, :2].tolist(), right, wrong, logps, same)


@pytest.mark.parametrize(
    ("method", "problems", "columns"),
    [
        ("sft", 24, [[0]] * 4),
        ("dpo", 12, [[0, 1], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [0, 2]]),
        ("dft", 8, [*[[0, 1, 2]] * 6, *[[0, 3, 4]] * 6, *[[0, 1, 2]] * 6]),
    ],
)
def test_every_method_takes_24_texts_and_epochs_their_columns(
    parts, method, problems, columns
):
    runs, *_ = parts
    world = world_of(runs)
    sizes = runs.Sizes(8, 1)
    plan = runs.make_plan(world, method, sizes, len(columns), seed=0)
    assert plan.columns.tolist() == columns
    assert plan.place.shape == (len(columns), problems)
    assert problems * len(columns[0]) == 24
    steps = 48 // problems
    for first in range(0, len(columns) - steps + 1, steps):
        epoch = plan.place[first : first + steps]
        assert sorted(epoch.ravel().tolist()) == list(range(48))  # each once
    again = runs.make_plan(world, method, sizes, len(columns), seed=1)
    assert (again.place != plan.place).any()


def test_texts_hold_prompt_answer_and_padding(parts):
    runs, *_ = parts
    found = runs.make_texts([[5, 6], [7]], [[8, 9], [1, 2, 3]], 5)
    assert found.tokens.tolist() == [[5, 6, 8, 9, 0], [7, 1, 2, 3, 0]]
    assert found.mask.tolist() == [
        [False, False, True, True, False],
        [False, True, True, True, False],
    ]
    with pytest.raises(ValueError, match="a text has 6 tokens, more than 5"):
        runs.make_texts([[1] * 4], [[1, 2]], 5)


def test_parts_share_no_calculation(parts):
    """Nor does the test split with any of them."""
    *_, lab = parts
    tokenizer = data.train_word_tokenizer(["one"])
    seen = {}
    for part in (*lab.PARTS, "test"):
        found = lab.problems(tokenizer, part, 60, seed=3)
        texts = [tokenizer.decode(a, skip_special=True) for a in found.answers]
        seen[part] = {lab.calculation(text) for text in texts}
        assert len(found.prompts) == len(found.results) == 60
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))
    assert lab.calculation("Mia has 9 + 12 = 21 nuts.\n#### 21") == "9+12"
    assert lab.calculation("Mia has 12 + 9 = 21 nuts.") == "9+12"
    assert lab.calculation("Mia has 12 - 9 = 3 nuts.") == "12-9"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dft", "dft2", "dpo"])
def test_runs_side_by_side_do_not_meet(parts, method):
    """Two seeds and two rates together, and each alone."""
    runs, _, lab = parts
    sizes = runs.Sizes(16, 1)
    tokenizer = data.train_word_tokenizer(["one two three"])
    model = runs.make_model(sizes, tokenizer, 0)
    settings = runs.Settings(method, tau=0.7, gamma=0.8)
    plans = [
        runs.make_plan(
            world_of(runs, seed=seed),
            method,
            sizes,
            8,
            seed,
            right_logps=np.full(48, -30.0),
        )
        for seed in (0, 1)
    ]
    rates = (1e-3, 1e-2)
    start = lab.copies(model.params, 2)
    together, _ = runs.train(model, start, settings, plans, rates, looks=2)
    for run in range(2):
        start = lab.copies(model.params, 1)
        alone, _ = runs.train(
            model, start, settings, [plans[run]], [rates[run]], looks=1
        )
        jax.tree.map(
            lambda a, b, run=run: np.testing.assert_allclose(
                a[run], b[0], rtol=1e-3, atol=1e-4
            ),
            together,
            alone,
        )
        moved = jax.tree.map(lambda a, b: np.abs(a[0] - b).max(), alone, model.params)
        assert max(jax.tree.leaves(moved)) > rates[run]


def report_of(negatives, matches):
    """A report with these numbers by row: last and first look, and exact match."""
    rows = {
        row: {
            "exact match": match,
            "right": [[-9.0, -9.5, -8.5], [-5.0, -5.5, -4.0]],
            "negatives": [[-20.0, -21.0, -19.0], [x - 20.0 for x in moved]],
        }
        for row, moved, match in zip(
            ("SFT", "SFT, same epochs", "DFT", "DFT2", "SFT→DPO"),
            negatives,
            matches,
            strict=True,
        )
    }
    rates = dict.fromkeys(rows, 0.2) | {"DFT": 0.1, "SFT→DPO": [0.3, 0.2]}
    return {"rows": rows, "rates": rates, "lab": {"rates": [0.1, 0.2, 0.3]}}


def test_verdicts_by_hand(parts):
    _, report, _ = parts
    falls, rises = [-9.0, -10.5, -8.0], [3.0, 2.5, 3.5]
    even = [0.30, 0.31, 0.29]
    better = [0.40, 0.42, 0.395]
    found = report.verdict_lines(
        report_of(
            [rises, rises, falls, rises, falls], [even, even, better, even, better]
        )
    )
    by_start = {line.split(":")[0]: line for line in found}
    first = by_start["DFT beats SFT on held-out problems on the same tokens"]
    assert "reproduced (+10.50 [" in first
    assert "not" not in first.split(":")[1]
    second = by_start["DFT2 beats SFT on held-out problems on the same tokens"]
    assert "no difference that the seeds can tell" in second
    rise = by_start["The likelihood of negatives rises under SFT"]
    assert rise.split(": ")[1].startswith("reproduced (log-prob of an answer +3.00")
    fall = by_start["The likelihood of negatives falls under DFT"]
    assert fall.split(": ")[1].startswith("reproduced (log-prob of an answer -9.17")
    other = by_start["The likelihood of negatives falls under DFT2"]
    assert "not reproduced, the opposite" in other
    assert "SFT→DPO 0.3 then 0.2; at the edge of what was offered: DFT." in found[-1]


@pytest.mark.slow
def test_quick_run_end_to_end(parts, tmp_path):
    command = [sys.executable, str(CLAIMS / "discriminative.py"), "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    _, report, _ = parts
    found = json.loads((tmp_path / "discriminative_quick.json").read_text())
    for row in report.ROWS:
        right = report.numbers(found, row, "right")
        if row != "SFT→DPO":
            assert (right[-1] > right[0]).all()  # every method learns the answers
        assert np.isfinite(report.numbers(found, row, "negatives")).all()
    sft, dft = (report.numbers(found, row, "negatives") for row in ("SFT", "DFT"))
    assert dft[-1].mean() < sft[-1].mean()
    assert all(line in done.stdout for line in found["verdicts"])
    assert "SFT→DPO" in (tmp_path / "discriminative_quick.svg").read_text()


def test_committed_results_are_of_the_committed_lab(parts):
    _, report, lab = parts
    results = CLAIMS / "results" / "discriminative.json"
    if not results.exists():
        pytest.skip("no results yet: run benchmarks/claims/discriminative.py")
    found = json.loads(results.read_text())
    assert found["lab"] == json.loads(json.dumps(dataclasses.asdict(lab.LAB)))
    assert report.verdict_lines(found) == found["verdicts"]
    guide = (ROOT / "docs" / "negatives.md").read_text("utf-8")
    assert report.markdown_table(found) in guide
