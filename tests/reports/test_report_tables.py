"""Tables as text."""

import csv
import io

import pytest
from run_folders import write_run

from jaxpost import reports
from jaxpost.reports import _tables


def test_markdown_of_two_runs(tmp_path):
    runs = reports.read_runs(
        [write_run(tmp_path / "a|b"), write_run(tmp_path / "c", steps=1)]
    )
    lines = reports.summary_table(runs).splitlines()
    assert lines[0] == "| metric | a\\|b | c |"
    assert lines[2] == "| eval_loss | 2 (2 to 2.5) | 2 (2 to 2.5) |"
    assert lines[3] == "| loss | 1.5 (1.5 to 1.9) | 1.9 |"


def test_csv_reads_back(tmp_path):
    runs = reports.read_runs([write_run(tmp_path / "run")])
    rows = list(csv.DictReader(io.StringIO(reports.summary_table(runs, style="csv"))))
    assert rows[1]["metric"] == "loss"
    assert float(rows[1]["last"]) == 1.5
    assert rows[1]["last step"] == "5"


def test_unknown_style(tmp_path):
    with pytest.raises(ValueError, match="markdown, csv"):
        reports.summary_table([], style="html")  # pyright: ignore[reportArgumentType]


def test_differences_of_nested_settings():
    rows = _tables.differences([{"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 1}}, None])
    assert rows == [
        (["a.b", "1", "1", "—"], True),
        (["a.c", "[1, 2]", "—", "—"], True),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3"), (1e-4, "0.0001"), (1 / 3, "0.33333"), (2e12, "2e+12")],
)
def test_numbers(value, text):
    assert _tables.format_number(value) == text
