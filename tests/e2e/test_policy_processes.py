"""GRPO, PPO, Self-Rewarding PPO on eight devices, in one process or two: as on one."""

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


REWARDS = [
    {"name": "regex", "settings": {"pattern": r"[0-4]"}, "isolate": "none"},
    {"name": "length", "settings": {"longest": 8, "soft": 6}, "isolate": "none"},
]
COMMON = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")
CRITIC = (
    "kl",
    "loss/policy",
    "loss/value",
    "val/explained_variance",
    "objective/scores",
)
LOGGED = {
    "grpo": (*COMMON, "reward_std", "frac_reward_zero_std"),
    "ppo": (*COMMON, *CRITIC),
    "self_rewarding_ppo": (
        *(*COMMON, *CRITIC, "reward_std"),
        *("objective/kl", "kl/base", "self_reward/mean"),
    ),
}


def train(folder, folders, recipe, *, devices, processes=1):
    """The first round, of two steps; its logged lines and its answers."""
    name = f"{devices}-{processes}"
    mesh = {"data": -1, "tensor": 2 if devices > 1 else 1}
    more = {} if recipe == "grpo" else {"critic": {"learning_rate": 0.1}}
    if recipe == "self_rewarding_ppo":
        more |= {"self_reward": {"base": folders["base"]}}
    config = toy_config(
        mesh=mesh if processes > 1 else mesh | {"devices": devices},
        model={"path": folders["sft"], "tokenizer": folders["sft"]},
        data={"train": TRAIN, "eval": None, "max_length": 100},
        rollout={
            "samples": 2,
            "minibatches": 2,
            "max_new_tokens": 8,
            "show_prompts": 16,
        },
        optimizer={"name": "sgd", "learning_rate": 0.01, "schedule": "constant"},
        train={"steps": 2, "batch_size": 16, "accumulate": 2, "log_every": 1},
        export={"enabled": False},
        **more,
    )
    root = folder / name
    root.mkdir()
    config |= {"recipe": recipe}
    if recipe != "self_rewarding_ppo":
        config |= {"rewards": REWARDS}
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
@pytest.mark.parametrize("recipe", LOGGED)
def test_several_devices_and_processes_are_the_same_run(folders, tmp_path, recipe):
    lines, samples = train(tmp_path, folders, recipe, devices=1)
    assert len(samples) == 32
    assert all(line["grad_norm"] > 0.0 for line in lines[1:])
    if recipe == "self_rewarding_ppo":
        assert lines[1]["self_reward/mean"] > 0.0
    for processes in (1, 2):
        other, others = train(tmp_path, folders, recipe, devices=8, processes=processes)
        assert [x["completion"] for x in others] == [x["completion"] for x in samples]
        for found, wanted in zip(other[1:], lines[1:], strict=True):
            for name in LOGGED[recipe]:
                np.testing.assert_allclose(
                    found[name], wanted[name], rtol=2e-4, atol=1e-5, err_msg=name
                )
