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

index, port, what, file = int(sys.argv[1]), *sys.argv[2:]

def say(*words):
    with open(file, "a") as lines:
        print(*words, file=lines)

parallel.start_processes(f"127.0.0.1:{port}", 2, index, deadline_s=60)
if index == 1:
    time.sleep(1)
parallel.wait_for_processes("start")

def job():
    say("job ran on", index)
    if what == "fails":
        raise ValueError("no room")

try:
    parallel.on_first_process("writing", job)
    import jax
    from jax.experimental import multihost_utils
    double = parallel.compile_together(jax.jit(lambda x: 2 * x))
    say("gathered", multihost_utils.process_allgather(double(index + 1)).tolist())
except (ValueError, parallel.FirstProcessError) as error:
    say(type(error).__name__, error)
parallel.wait_for_processes("end")
"""


def run_two(what, folder):
    """What both processes say, one after the other; standard output is gloo's."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    files = [folder / f"{index}.txt" for index in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), port, what, str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, file in enumerate(files)
    ]
    ended = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended[0][1][-2000:]
    return "".join(file.read_text() for file in files).splitlines()


def test_one_does_it_and_all_go_on(tmp_path):
    assert run_two("works", tmp_path) == [
        "job ran on 0",
        "gathered [2, 4]",
        "gathered [2, 4]",
    ]


def test_a_failure_reaches_all(tmp_path):
    assert run_two("fails", tmp_path) == [
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
