"""The claims on GRPO and Self-Rewarding PPO: tables by hand, and a quick run."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxpost import data, recipes

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def claim():
    """The script as a module."""
    sys.path.insert(0, str(CLAIMS))
    try:
        import grpo
    finally:
        sys.path.remove(str(CLAIMS))
    return grpo


def test_the_table_of_grpo_by_hand(claim):
    starts, ends = [0.4, 0.5, 0.45], [0.7, 0.6, 0.8]
    part = {
        "problems": 1000,
        "runs": [
            {
                "seed": seed,
                "sft": {"greedy": start, "drawn": 0.3},
                "sft, right in 8": 0.9,
                "grpo": {"greedy": end, "drawn": 0.65},
                "grpo seconds": [100.0, 190.0],
            }
            for seed, (start, end) in enumerate(zip(starts, ends, strict=True))
        ],
    }
    *_, first, second = claim.policy_lines(part)
    gains = 100 * (np.array(ends) - np.array(starts))
    half = 4.302652729749464 * gains.std(ddof=1) / np.sqrt(3)  # t(0.975, 2)
    assert f"{gains.mean():+.1f} points" in first
    assert f"{gains.mean() - half:+.1f} to {gains.mean() + half:+.1f}" in first
    assert "from 45.0 to 70.0%" in first
    assert "from 30.0 to 65.0%: +35.0 points" in second


def test_the_table_of_self_rewarding_ppo_by_hand(claim):
    part = {
        "problems": 1000,
        "base": {"greedy": 0.1, "drawn": 0.05},
        "runs": [
            {
                "SFT": {"greedy": 0.5, "drawn": 0.4},
                "more SFT": {"greedy": 0.5 + step, "drawn": 0.4},
                "Self-Rewarding PPO": {"greedy": 0.6, "drawn": 0.3 + step},
            }
            for step in (0.0, 0.02, 0.04)
        ],
    }
    lines = claim.few_lines(part)
    assert "| base | 10.0 | 5.0 |" in lines
    assert "| more SFT | 52.0 ± 2.0 | 40.0 ± 0.0 |" in lines
    assert "| Self-Rewarding PPO | 60.0 ± 0.0 | 32.0 ± 2.0 |" in lines
    assert "greedy answers" in lines[-2]
    assert "+8.0 points" in lines[-2]
    assert "-8.0 points" in lines[-1]


def test_seeds_have_rows_of_their_own_and_the_held_out_ones_are_nobodys(claim):
    name = "grpo/grpo-sft.yaml"
    lab = claim.Lab(rows=500)
    sources = [claim.of_seed(lab, name, seed) for seed in (0, 1)]
    rows = [list(data.read_rows(source)) for source in sources]
    asked = [{row.columns["prompt"] for row in part} for part in rows]
    assert len(asked[0] & asked[1]) < 50
    held = {row["prompt"] for row in claim.held_out("grpo/grpo.yaml", 50, seed=50)}
    config = recipes.load_config(str(ROOT / "configs/grpo/grpo.yaml"), prog="t")
    trained = {row.columns["prompt"] for row in data.read_rows(config.data.train)}
    assert len(held) == 50
    assert not held & (asked[0] | asked[1] | trained)


def test_the_guides_show_the_committed_results(claim):
    found = json.loads((CLAIMS / "results" / "grpo.json").read_text())
    assert found["lab"] == json.loads(json.dumps(dataclasses.asdict(claim.Lab())))
    for lines, guide in (
        (claim.policy_lines(found["grpo"]), "policy_optimisation.md"),
        (claim.few_lines(found["few"]), "self_rewarding_ppo.md"),
    ):
        text = " ".join((ROOT / "docs" / guide).read_text("utf-8").split())
        for line in lines:
            assert " ".join(line.split()) in text, line


@pytest.mark.slow
def test_a_quick_run_goes_through_and_is_not_repeated(tmp_path):
    command = [
        *(sys.executable, str(CLAIMS / "grpo.py"), "--quick"),
        *("--out", str(tmp_path / "runs"), "--results", str(tmp_path / "found.json")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Self-Rewarding PPO minus more SFT" in done.stdout
    report = json.loads((tmp_path / "found.json").read_text())
    assert len(report["grpo"]["runs"]) == len(report["few"]["runs"]) == 2
