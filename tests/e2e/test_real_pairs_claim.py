"""Preference losses on real pairs: what the script reads, and its committed table."""

import gzip
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"
RESULTS = CLAIMS / "results" / "real_pairs.json"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(CLAIMS))
    try:
        import real_pairs
    finally:
        sys.path.remove(str(CLAIMS))
    return real_pairs


def test_the_layout_is_told_by_the_first_row(script, tmp_path):
    rows = {"trl": {"chosen": "a", "rejected": "b"}, "sharegpt": {"conversations": []}}
    for wanted, row in rows.items():
        packed, plain = tmp_path / "rows.jsonl.gz", tmp_path / "rows.jsonl"
        packed.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n{}\n"))
        plain.write_text(json.dumps(row) + "\n{}\n")
        assert script._format(str(packed)) == script._format(str(plain)) == wanted


def test_only_whole_checkpoints_count(script, tmp_path):
    assert script._steps(tmp_path / "none") == []
    for name in ("step_00000022", "step_00000040.orbax-tmp-1", "latest"):
        (tmp_path / name).mkdir()
    assert script._steps(tmp_path) == [22]


def test_a_row_of_the_table_by_hand(script):
    run = {
        "file": "pairs",
        "method": "DPO",
        "accuracy_before": [0.5, 0.5, 0.5],
        "accuracy": [0.535, 0.43, 0.631],
        "margin_before": 0.0,
        "margin": [-0.049, -0.271, 0.149],
        "train_accuracy": 0.79,
    }
    *_, row = script.markdown_table({"runs": [run]}).splitlines()
    words = "| pairs | DPO | 50 [50, 50] | 54 [43, 63] | 0.000 | -0.05 [-0.27, +0.15] "
    assert row == words + "| 79 |"


def test_what_was_before_is_told_from_the_metrics(script):
    names = ("eval_rewards/margins", "eval_rewards/accuracies")
    tied = script._before(dict(zip(names, (0.0, 0.0), strict=True)), 100)
    assert tied == {"accuracy_before": [0.5, 0.5, 0.5], "margin_before": 0.0}
    found = script._before(dict(zip(names, (-0.01, 0.46), strict=True)), 100)
    value, low, high = found["accuracy_before"]
    assert value == pytest.approx(0.46)
    # A share's standard deviation, twice.
    assert low == pytest.approx(0.46 - 0.1, abs=0.03)
    assert high == pytest.approx(0.46 + 0.1, abs=0.03)


def test_committed_results_are_those_of_the_guide(script):
    found = json.loads(RESULTS.read_text())
    guide = (ROOT / "docs" / "preferences.md").read_text("utf-8")
    assert script.markdown_table(found) in guide
    methods = [run["method"] for run in found["runs"]]
    assert methods == list(script.LOSSES) * 3
    for run in found["runs"]:
        assert run["loss"] == script.LOSSES[run["method"]]
        assert 0 < run["stopped_at"] < found["steps"]
        if run["method"] != "reward model":  # policy and reference are the same
            assert run["margin_before"] == 0.0
        assert run["reloaded_export_difference"] <= 1e-5
        assert run["pairs"]["held out"] == found["eval_rows"]
