"""Reading run folders: what is there, what is missing, what is broken."""

import math

import pytest
from run_folders import write_run

from jaxpost import reports


def test_reads_everything(tmp_path):
    run = reports.read_run(write_run(tmp_path / "first"))
    assert run.name == "first"
    assert run.notes == ()
    assert run.series("eval_loss") == ([0, 5], [2.5, 2.0])
    assert run.series("loss")[0] == [1, 2, 3, 4, 5]
    assert run.metric_names() == ["eval_loss", "loss", "tokens_per_s"]
    assert run.config == {
        "recipe": "sft",
        "optimizer": {"learning_rate": 1e-3, "b1": 0.9},
    }
    assert run.environment is not None
    assert run.environment["device"]["count"] == 2
    assert run.samples[0]["completion"] == " 2"


def test_later_line_of_a_resumed_run_holds(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.0}\n{"step": 3, "loss": 8.0}\n')
    assert reports.read_run(folder).series("loss") == ([1, 2, 3], [1.9, 9.0, 8.0])


@pytest.mark.parametrize("cut", [b'{"step": 6, "loss": 1.', b'{"step": 6, "te": "\xc3'])
def test_cut_last_line_is_left_out_and_said(tmp_path, cut):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    run = reports.read_run(folder)
    assert run.series("loss")[0][-1] == 5
    (note,) = run.notes
    assert "metrics.jsonl:8: the last line is cut off" in note


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{oops}", "metrics.jsonl:8: not valid JSON"),
        (b"\xff\xfe", "metrics.jsonl:8: not valid JSON ('utf-8' codec"),
        (b"[1, 2]", "metrics.jsonl:8: expected a JSON object, got list"),
        (b'{"loss": 1.0}', "metrics.jsonl:8: no integer `step`"),
        (b'{"step": true, "loss": 1.0}', "metrics.jsonl:8: no integer `step`"),
        (b"[" * 100_000, "metrics.jsonl:8: not valid JSON"),
    ],
)
def test_corrupt_line_is_named_and_the_rest_read(tmp_path, bad, message):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bad + b'\n{"step": 6, "loss": 1.0}\n')
    run = reports.read_run(folder)
    assert run.series("loss")[0][-1] == 6
    (note,) = run.notes
    assert message in note


def test_nan_is_a_value(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": NaN}\n')
    assert math.isnan(reports.read_run(folder).series("loss")[1][-1])


def test_missing_folder_names_the_nearest(tmp_path):
    write_run(tmp_path / "arithmetic")
    with pytest.raises(
        reports.ReportError, match=r"aritmetic: no such run.*arithmetic\?"
    ):
        reports.read_run(tmp_path / "aritmetic")


def test_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(reports.ReportError, match=r"holds no metrics\.jsonl"):
        reports.read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "The file is empty"), ("x\ny\n", "metrics.jsonl:1: not valid JSON")],
)
def test_no_readable_line_is_an_error(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(reports.ReportError, match=message):
        reports.read_run(tmp_path)


def test_optional_files_are_missed_in_notes(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.yaml", "samples.jsonl"):
        (folder / name).unlink()
    (folder / "environment.json").write_text("{")
    run = reports.read_run(folder)
    assert run.config is None
    assert run.environment is None
    assert run.samples == ()
    notes = "\n".join(run.notes)
    assert "config.yaml: missing" in notes
    assert "samples.jsonl: missing" in notes
    assert "environment.json: cannot be read" in notes


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "a: !!python/name:os.system x\n"])
def test_bad_config_is_a_note(tmp_path, content):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(content)
    run = reports.read_run(folder)
    assert run.config is None
    assert "config.yaml" in run.notes[0]


def test_runs_of_one_name_are_called_by_path(tmp_path):
    folders = [write_run(tmp_path / part / "run") for part in ("a", "b")]
    names = [run.name for run in reports.read_runs(folders)]
    assert names == [str(folder) for folder in folders]


def test_no_run_and_the_same_run_twice_are_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        reports.read_runs([])
    folder = write_run(tmp_path / "run")
    with pytest.raises(reports.ReportError, match="given twice"):
        reports.read_runs([folder, folder / "."])
