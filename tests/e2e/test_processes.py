"""Two processes of four devices are the same run as one process of eight."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_config import toy_config, write_config

from jaxpost import parallel

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = toy_config(
    mesh={"data": -1, "fsdp": 2, "tensor": 2},
    model={"tie_embeddings": False},
    optimizer={"learning_rate": 1e-2, "schedule": "linear"},
    train={
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 2,
    },
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), CONFIG)


def train(config_file, root, processes, *flags):
    """A run of `processes` with eight devices in all; its metrics by step."""
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    script = ROOT / "scripts" / "several_processes.py"
    done = subprocess.run(
        [
            sys.executable,
            script,
            str(processes),
            config_file,
            "--run-root",
            root,
            *flags,
        ],
        env={**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    lines = (root / "toy" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(lines, name):
    return np.array([line[name] for line in lines if name in line])


def assert_same_curves(found, wanted):
    for name in ("loss", "grad_norm", "eval_loss"):
        assert curve(wanted, name).size
        np.testing.assert_allclose(
            curve(found, name), curve(wanted, name), rtol=1e-5, err_msg=name
        )


@pytest.fixture(scope="module")
def one(config_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    return root, train(config_file, root, 1)


@pytest.fixture(scope="module")
def two(config_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return root, train(config_file, root, 2)


@pytest.mark.slow
def test_same_curves_and_export(one, two):
    assert_same_curves(two[1], one[1])
    for root, _ in (one, two):
        receipt = json.loads(
            (root / "toy" / "export" / "export_report.json").read_text()
        )
        assert receipt["max_logit_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_resume_in_the_other(first, config_file, one, tmp_path):
    half = ("--train.steps", "2", "--export.enabled", "False")
    # The schedule must be that of the whole run: a constant rate is.
    constant = ("--optimizer.schedule", "constant")
    train(config_file, tmp_path, first, *half, *constant)
    resumed = train(config_file, tmp_path, 3 - first, "--resume", *constant)
    whole = train(config_file, tmp_path / "whole", 1, *constant)
    assert_same_curves(resumed, whole)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_stays_away_is_named(index):
    start = time.monotonic()
    with pytest.raises(
        parallel.MissingProcessError,
        match="did not come within 1 s: 1, 2" if index == 0 else "process 0 did not",
    ):
        parallel.start_processes(f"127.0.0.1:{free_port()}", 3, index, deadline_s=1)
    assert time.monotonic() - start < 10


def test_bad_addresses_and_numbers():
    with pytest.raises(ValueError, match="host:port"):
        parallel.start_processes("localhost", 2, 0)
    with pytest.raises(ValueError, match="process index 2 of 2"):
        parallel.start_processes("localhost:1234", 2, 2)
