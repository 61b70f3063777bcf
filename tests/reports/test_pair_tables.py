"""Tables of pairs: what is listed, what is an outlier, shares at the bounds."""

import csv

import numpy as np
import pytest
from run_folders import write_run

from jaxpost import reports
from jaxpost.reports import _page


def columns(**more):
    margins = np.array([0.5, -2.0, 0.0, 3.0, -0.5, 1.0], np.float32)
    return {
        "example_id": [2**62 + n for n in range(6)],
        "part": ["train"] * 4 + ["held out"] * 2,
        "margin": margins,
        **more,
    }


def texts(row):
    return {"prompt": f"<b>{row}</b>|", "chosen": "x" * 400, "rejected": "n\no"}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_pair_and_the_most_wrong_ones(tmp_path):
    files = reports.write_pairs(tmp_path, columns(), texts=texts, outliers=2)
    assert {file.name for file in files} == {
        *("pairs.csv", "summary.csv", "outliers.csv", "report.md", "plot.png"),
    }
    listed = rows(tmp_path / "pairs" / "pairs.csv")
    assert [int(row["example_id"]) for row in listed] == columns()["example_id"]
    wrong = rows(tmp_path / "pairs" / "outliers.csv")
    assert [float(row["margin"]) for row in wrong] == [-2.0, -0.5]
    assert wrong[0]["chosen"] == "x" * 400
    assert wrong[0]["rejected"] == "n\no"
    train, held_out = rows(tmp_path / "pairs" / "summary.csv")
    assert (train["part"], train["pairs"], train["accuracy"]) == ("train", "4", "0.5")
    assert (held_out["pairs"], held_out["mean margin"]) == ("2", "0.25")


def test_outliers_go_by_delta_and_only_positive_ones_count(tmp_path):
    delta = np.array([0.0, 0.2, 0.0, 0.7, 0.0, 0.0])
    reports.write_pairs(tmp_path, columns(delta=delta), texts=texts)
    found = rows(tmp_path / "pairs" / "outliers.csv")
    assert [float(row["delta"]) for row in found] == [0.7, 0.2]
    train = rows(tmp_path / "pairs" / "summary.csv")[0]
    assert train["share of delta > 0"] == "0.5"
    assert "0.7" in (tmp_path / "pairs" / "report.md").read_text()


def test_no_outlier_is_no_table(tmp_path):
    reports.write_pairs(tmp_path, columns(delta=np.zeros(6)), texts=texts)
    assert rows(tmp_path / "pairs" / "outliers.csv") == []
    assert "None." in (tmp_path / "pairs" / "report.md").read_text()


def test_shares_of_tau_add_up(tmp_path):
    tau = np.array([0.1, 0.1, 0.5, 4.0, 1.0, 2.0])
    bounds = {"min": tau <= 0.1, "max": tau >= 4.0}
    reports.write_pairs(tmp_path, columns(tau=tau), texts=texts, bounds=bounds)
    found = rows(tmp_path / "pairs" / "tau_histogram.csv")
    assert [row["tau"] for row in found[:2]] == ["at the min", "at the max"]
    assert [int(row["pairs"]) for row in found[:2]] == [2, 1]
    assert sum(int(row["pairs"]) for row in found) == 6
    assert sum(float(row["share"]) for row in found) == pytest.approx(1, abs=1e-3)
    train = rows(tmp_path / "pairs" / "summary.csv")[0]
    assert (train["tau at its min"], train["tau at its max"]) == ("0.5", "0.25")


def test_unlike_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="columns lack margin"):
        reports.write_pairs(
            tmp_path, {"example_id": [1], "part": ["train"]}, texts=texts
        )
    with pytest.raises(ValueError, match="must have one length"):
        reports.write_pairs(tmp_path, columns(delta=np.zeros(5)), texts=texts)


def test_the_page_shows_them_and_nothing_in_them_runs(tmp_path):
    folder = write_run(tmp_path / "run")
    reports.write_pairs(folder, columns(), texts=texts)
    page = reports.write_report([folder]).read_text("utf-8")
    assert "Pairs to look at" in page
    assert "data:image/png;base64," in page
    assert "&lt;b&gt;1&lt;/b&gt;" in page
    assert "<b>1</b>" not in page
    assert "x" * 299 in page
    assert "x" * 301 not in page
    assert "Pairs:" not in _page.render(reports.read_runs([write_run(tmp_path / "o")]))
