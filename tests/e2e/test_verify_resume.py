"""A run that is killed at a random moment and resumed is the same run."""

import pytest
from toy_config import toy_config, write_config

from jaxpost import cli
from jaxpost.recipes.verify_resume import verify_resume

CONFIG = toy_config(
    mesh={"devices": 1},
    model={"num_kv_heads": 4},
    optimizer={"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    train={
        "steps": 10,
        "batch_size": 8,
        "accumulate": 4,
        "log_every": 1,
        "eval_every": 5,
        "save_every": 2,
        "sample_prompts": 0,
    },
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return str(write_config(tmp_path_factory.mktemp("config"), CONFIG))


@pytest.mark.slow
def test_one_kill(config_file):
    (verdict,) = verify_resume(config_file, kills=1, seed=1)
    assert verdict.problems == []


@pytest.mark.slow
def test_fifty_kills(config_file):
    verdicts = verify_resume(config_file, kills=50, seed=2)
    assert [verdict.problems for verdict in verdicts] == [[]] * 50
    assert len({verdict.resumed_from for verdict in verdicts}) > 2


@pytest.mark.slow
def test_fewer_devices(config_file, monkeypatch):
    flags = ("--mesh.devices", "8", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    flags += ("--train.accumulate", "1")
    verdicts = verify_resume(config_file, flags, kills=0, devices=(4, 8))
    assert [verdict.problems for verdict in verdicts] == [[], []]


def test_nothing_to_resume_is_refused(config_file, capsys):
    assert cli.main(["verify-resume", config_file, "--train.save-every", "0"]) == 2
    assert "train.save_every is 0" in capsys.readouterr().err
