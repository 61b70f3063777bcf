"""Pairs over two processes of two devices: the same run as one process of four."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from toy_config import toy_config, write_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = toy_config(
    mesh={"data": -1, "fsdp": 2},
    data={
        "train": "builtin:arithmetic_pairs?count=40&grades=1&slips=copy",
        "eval": "builtin:arithmetic_pairs?count=6&grades=1&slips=copy",
    },
    loss={"name": "adaptive_scaling", "rho0": 0.1, "tau_min": 0.1, "tau_max": 4.0},
    optimizer={"learning_rate": 1e-2, "schedule": "linear"},
    train={"steps": 3, "batch_size": 8, "log_every": 1, "sample_prompts": 0},
) | {"recipe": "dpo"}


def train(folder, processes, reference):
    root = folder / f"{processes}"
    root.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "several_processes.py"),
            *(str(processes), write_config(root, CONFIG), "--run-root", root),
            *("--reference", reference),
        ],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    lines = (root / "toy" / "metrics.jsonl").read_text().splitlines()
    with (root / "toy" / "pairs" / "pairs.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    return [json.loads(line) for line in lines], pairs


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_two_processes_are_the_same_run(reference, tmp_path):
    one, one_pairs = train(tmp_path, 1, reference)
    two, two_pairs = train(tmp_path, 2, reference)
    for found, wanted in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "eval_loss", "rewards/margins"):
            if name in wanted:
                np.testing.assert_allclose(
                    found[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name
                )
    assert len(one_pairs) == 46
    for found, wanted in zip(two_pairs, one_pairs, strict=True):
        assert found["example_id"] == wanted["example_id"]
        assert float(found["margin"]) == pytest.approx(
            float(wanted["margin"]), abs=1e-4
        )
