"""Self-Rewarding PPO on several devices and processes: the same run as on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_config import toy_config, write_config

from jaxpost import data, models, weights

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = "builtin:arithmetic?count=24&grades=1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and another one in place of what fine-tuning makes of it."""
    root = tmp_path_factory.mktemp("models")
    texts = [
        row.columns[name]
        for row in data.load_rows(TRAIN)
        for name in ("prompt", "completion")
    ]
    tokenizer = data.train_word_tokenizer(texts)
    config = models.DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size + tokenizer.vocab_size % 2,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        tie_embeddings=False,
    )
    base = models.build(config, jax.random.key(5))
    head = base.params["head"]["kernel"]
    tuned = head + 0.2 * jax.random.normal(jax.random.key(6), head.shape)
    for name, kernel in (("base", head), ("sft", tuned)):
        model = base.replace(params=base.params | {"head": {"kernel": kernel}})
        weights.save(model, root / name, tokenizer=tokenizer)
    return {name: str(root / name) for name in ("base", "sft")}


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
