"""The run folder: its files, and lines that survive a resume."""

import json
import pathlib

import jax
import numpy as np
import pytest
import yaml

from jaxpost import training


def test_files_of_a_new_run(tmp_path):
    config = {"optimizer": {"learning_rate": 1e-4}, "eos": ("a",), "path": tmp_path}
    with training.create_run(
        tmp_path / "runs" / "mine", config, seeds={"data": 3}, data={"train": "ab12"}
    ) as run:
        assert run.checkpoints.is_dir()
        written = yaml.safe_load((run.path / "config.yaml").read_text())
        assert written["optimizer"] == {"learning_rate": 1e-4}
        assert written["eos"] == ["a"]
        environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["device"]["platform"] == "cpu"
    assert environment["seeds"] == {"data": 3}
    assert environment["data"] == {"train": "ab12"}
    assert "host_platform_device_count" in environment["xla_flags"]


def test_a_run_is_not_overwritten(tmp_path):
    training.create_run(tmp_path, {"a": 1}).close()
    with pytest.raises(FileExistsError, match="already holds a run"):
        training.create_run(tmp_path, {"a": 2})
    training.create_run(tmp_path, {"a": 2}, resume=True).close()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert len(environment["resumes"]) == 1
    training.create_run(tmp_path, {"a": 2}, resume=True).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"a": 2}
    kept = sorted(tmp_path.glob("config.before_resume_*.yaml"))
    assert [yaml.safe_load(file.read_text()) for file in kept] == [{"a": 1}]


@pytest.mark.parametrize("place", ["a_file", "read_only"])
def test_a_folder_that_cannot_be_written(place, tmp_path):
    root = tmp_path / "file"
    root.write_text("in the way")
    if place == "read_only":
        root = pathlib.Path("/proc/1/net")  # of the kernel: nobody writes there
        if not root.exists():
            pytest.skip("no /proc here")
    with pytest.raises(OSError, match=r"mine cannot be written \(.*run_root"):
        training.create_run(root / "mine", {})


def test_lines_are_there_at_once_and_json(tmp_path):
    with training.create_run(tmp_path, {}) as run:
        run.log_metrics({"step": 1, "loss": np.float32(0.5), "bad": float("nan")})
        run.log_sample({"step": 1, "completion": "zwölf ☃"})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"step": 1, "loss": 0.5, "bad": None}
        ]
        sample = json.loads((tmp_path / "samples.jsonl").read_text())
        assert sample["completion"] == "zwölf ☃"
        with pytest.raises(ValueError, match="needs a step"):
            run.log_metrics({"loss": 1.0})
        with pytest.raises(TypeError, match="cannot write object"):
            run.log_metrics({"step": 1, "loss": object()})


def test_truncate_drops_later_and_broken_lines(tmp_path):
    with training.create_run(tmp_path, {}) as run:
        for step in range(1, 6):
            run.log_metrics({"step": step})
        run.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')  # a crash in the middle of a line
        run.truncate(3)
        run.log_metrics({"step": 4})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        run.truncate(0)
        assert (tmp_path / "metrics.jsonl").read_text() == ""
