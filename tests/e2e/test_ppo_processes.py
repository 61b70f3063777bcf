"""Self-Rewarding PPO on several devices and processes: the same run as on one."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from toy_config import toy_config, write_config
from toy_models import TRAIN, save_pair

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


def train(folder, folders, *, devices, processes=1):
    """The first round, of two steps; its logged lines and its answers."""
    name = f"{devices}-{processes}"
    mesh = {"data": -1, "tensor": 2 if devices > 1 else 1}
    config = toy_config(
        mesh=mesh if processes > 1 else mesh | {"devices": devices},
        model={"path": folders["sft"], "tokenizer": folders["sft"]},
        data={"train": TRAIN, "eval": None, "max_length": 100},
        rollout={
            "samples": 2,
            "minibatches": 2,
            "max_new_tokens": 8,
            "show_prompts": 8,
        },
        self_reward={"base": folders["base"]},
        optimizer={"name": "sgd", "learning_rate": 0.01, "schedule": "constant"},
        critic={"learning_rate": 0.1},
        train={"steps": 2, "batch_size": 8, "accumulate": 2, "log_every": 1},
        export={"enabled": False},
    )
    root = folder / name
    root.mkdir()
    config |= {"recipe": "self_rewarding_ppo"}
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "several_processes.py"),
            *(str(processes), write_config(root, config), "--run-root", root),
        ],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = [
        [json.loads(x) for x in (root / "toy" / f"{n}.jsonl").read_text().splitlines()]
        for n in ("metrics", "samples")
    ]
    return found


@pytest.mark.slow
def test_several_devices_and_processes_are_the_same_run(folders, tmp_path):
    lines, samples = train(tmp_path, folders, devices=1)
    assert len(samples) == 16
    assert lines[1]["self_reward/mean"] > 0.0
    names = (
        *("loss", "loss/policy", "loss/value", "grad_norm", "kl", "reward"),
        *("objective/kl", "objective/scores", "kl/base", "val/explained_variance"),
        *("completions/mean_length", "entropy", "reward_std"),
    )
    for processes in (1, 2):
        other, others = train(tmp_path, folders, devices=4, processes=processes)
        assert [x["completion"] for x in others] == [x["completion"] for x in samples]
        for found, wanted in zip(other[1:], lines[1:], strict=True):
            for name in names:
                np.testing.assert_allclose(
                    found[name], wanted[name], rtol=2e-4, atol=1e-5, err_msg=name
                )
