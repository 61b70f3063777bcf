"""Slots over two processes of two devices: the same answers, nothing traced anew."""

import json
import os
import socket
import subprocess
import sys

import pytest

WORK = """
import json, sys
import jax
import numpy as np

rank, port = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)

from jaxpost import generation, models, parallel

config = models.DecoderConfig(
    family="llama", vocab_size=31, hidden_size=24, intermediate_size=40, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64,
)
mesh = parallel.make_mesh({"tensor": 2, "fsdp": 2}) if rank >= 0 else None
model = models.build(config, jax.random.key(1), mesh=mesh)


def answers():
    stream = generation.generate_stream(
        model, model.params, [[1, 2, 3], [4], [5] * 7, [6, 7], [8] * 3, [9]],
        config=generation.SamplingConfig(max_new_tokens=8, stop_ids=(3,)),
        slots=3, key=jax.random.key(2),
    )
    return sorted((answer.prompt, answer.tokens.tolist()) for answer in stream)


first = answers()
before = generation.trace_counts()
answers()
assert generation.trace_counts() == before
print(json.dumps(first))
"""


def launch(rank, port, devices):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
    }
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(rank), str(port)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    try:
        out, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.slow
def test_two_processes_answer_as_one_device():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    both = [launch(rank, port, 2) for rank in range(2)]
    found = [result(process) for process in both]
    alone = result(launch(-1, port, 1))
    assert len(alone) == 6
    assert found == [alone, alone]
