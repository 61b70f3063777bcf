"""Two real processes: they meet, and learn of each other's failures."""

import socket
import subprocess
import sys

import jax
import pytest

from jaxpost import parallel

PROGRAM = """
import sys, time
from jaxpost import parallel

index, port, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
parallel.start_processes(f"127.0.0.1:{port}", 2, index, deadline_s=60)
if index == 1:
    time.sleep(1)
parallel.wait_for_processes("start")

def job():
    print("job ran on", index)
    if what == "fails":
        raise ValueError("no room")

try:
    parallel.on_first_process("writing", job)
    import jax
    from jax.experimental import multihost_utils
    double = parallel.compile_together(jax.jit(lambda x: 2 * x))
    print("gathered", multihost_utils.process_allgather(double(index + 1)).tolist())
except (ValueError, parallel.FirstProcessError) as error:
    print(type(error).__name__, error)
parallel.wait_for_processes("end")
"""


def run_two(what):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), port, what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended[0][1][-2000:]
    words = "\n".join(output for output, _ in ended)
    return [x for x in words.splitlines() if x and not x.startswith("[Gloo]")]


def test_one_does_it_and_all_go_on():
    assert run_two("works") == ["job ran on 0", "gathered [2, 4]", "gathered [2, 4]"]


def test_a_failure_reaches_all():
    assert run_two("fails") == [
        "job ran on 0",
        "ValueError no room",
        "FirstProcessError writing on process 0 failed: no room",
    ]


def test_alone_there_is_nobody_to_wait_for():
    done = []
    parallel.on_first_process("counting", lambda: done.append(1))
    parallel.wait_for_processes("nobody")
    assert done == [1]
    assert parallel.compile_together(jax.jit(abs))(-2) == 2
    with pytest.raises(ValueError, match="mine"):
        parallel.on_first_process("failing", lambda: fail("mine"))


def fail(words):
    raise ValueError(words)
