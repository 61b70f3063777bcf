"""Programs that mean harm are contained, and it is reported how they ended.

Every one is bounded from outside as well: short times, few processes, little memory.
"""

import dataclasses
import os
import socket
import threading
import time

import pytest

from jaxpost import sandbox

LIMITS = sandbox.Limits(
    wall_s=6.0, cpu_s=4, memory_mb=128, processes=8, disk_mb=8, files=64
)


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    reason = sandbox.refusal()
    if reason is not None:
        pytest.skip(reason)


def lines(*of: str) -> str:
    return "\n".join(of)


def test_fork_bomb():
    start = time.monotonic()
    result = sandbox.run(
        lines(
            "import os",
            "while True:",
            "    try:",
            "        os.fork()",
            "    except OSError:",
            "        pass",
        ),
        limits=LIMITS,
    )
    assert result.status == "processes"
    assert LIMITS.processes < result.peak_processes <= 2 * LIMITS.processes + 4
    assert time.monotonic() - start < LIMITS.wall_s + 3.0


def test_memory_bomb_of_one_process():
    result = sandbox.run("x = bytearray(10**10)", limits=LIMITS)
    assert result.status == "memory"
    assert result.peak_memory_mb < LIMITS.memory_mb


def test_memory_bomb_that_catches_the_error():
    program = lines(
        "kept = []",
        "while True:",
        "    try:",
        "        kept.append(bytearray(1 << 20))",
        "    except MemoryError:",
        "        pass",
    )
    limits = dataclasses.replace(LIMITS, wall_s=1.5)
    result = sandbox.run(program, limits=limits)
    assert result.status in ("memory", "timeout")
    assert result.peak_memory_mb <= LIMITS.memory_mb + 16


def test_memory_bomb_of_many_processes():
    program = lines(
        "import os, time",
        "for _ in range(4):",
        "    if not os.fork():",
        "        x = b'1' * (60 << 20)",
        "        time.sleep(60)",
        "time.sleep(60)",
    )
    result = sandbox.run(program, limits=LIMITS)
    assert result.status == "memory"


def test_memory_outside_the_count_is_denied():
    """Files in memory without a folder, whose pages no process need hold."""
    program = "import os; os.memfd_create('x')"
    result = sandbox.run(program, limits=LIMITS)
    assert "PermissionError" in result.detail


def test_infinite_loop():
    limits = sandbox.Limits(wall_s=1.0)
    result = sandbox.run("while True: pass", limits=limits)
    assert result.status == "timeout"
    assert 1.0 <= result.seconds < 3.0


def test_infinite_loop_that_ignores_signals():
    program = lines(
        "import signal, time",
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:",
        "    signal.signal(s, signal.SIG_IGN)",
        "while True: time.sleep(1)",
    )
    assert sandbox.run(program, limits=sandbox.Limits(wall_s=0.7)).status == "timeout"


def test_cpu_time():
    limits = sandbox.Limits(wall_s=60.0, cpu_s=1)
    result = sandbox.run("while True: pass", limits=limits)
    assert result.status == "timeout"
    assert "CPU" in result.detail


def test_file_flood():
    program = lines(
        "import errno",
        "full = set()",
        "for i in range(10**6):",
        "    try:",
        "        open(str(i), 'wb').write(b'0' * 200_000)",
        "    except OSError as error:",
        "        full.add(errno.errorcode[error.errno])",
        "        break",
        "print(i, full)",
        "open('/tmp/more', 'w')",
    )
    result = sandbox.run(program, limits=LIMITS)
    count, code = result.stdout.split(" ", 1)
    assert int(count) * 200_000 <= LIMITS.disk_mb * 2**20
    assert code.strip() == "{'ENOSPC'}"


def test_flood_of_empty_files():
    program = lines(
        "for i in range(10**6):",
        "    open(f'{i}', 'w').close()",
    )
    result = sandbox.run(program, limits=LIMITS)
    assert result.status == "failed"
    assert "No space left" in result.detail


def test_output_flood():
    program = lines("while True: print('x' * 10_000)")
    result = sandbox.run(program, limits=LIMITS)
    assert result.status == "output"
    assert len(result.stdout) <= LIMITS.tail_bytes


def test_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        arrived = threading.Event()

        def wait():
            server.settimeout(30.0)
            try:
                server.accept()[0].close()
                arrived.set()
            except OSError:
                return

        waiting = threading.Thread(target=wait)
        waiting.start()
        result = sandbox.run(
            lines(
                "import socket",
                f"for where in (('127.0.0.1', {port}), ('1.1.1.1', 53)):",
                "    try:",
                "        socket.create_connection(where, 1)",
                "        print('connected')",
                "    except OSError as error:",
                "        print('refused')",
                # Not held by network namespaces: to the machine below a virtual one.
                "try:",
                "    socket.socket(socket.AF_VSOCK)",
                "except OSError as error:",
                "    print('no family')",
            ),
            limits=LIMITS,
        )
        assert result.stdout == "refused\nrefused\nno family\n"
        assert not arrived.is_set()
        socket.create_connection(("127.0.0.1", port)).close()  # ends the thread
        waiting.join()
        assert arrived.is_set()


def test_reading_outside(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("do not read")
    places = [
        *(str(secret), "/etc/passwd", "/etc/shadow", os.path.abspath(__file__)),
        *("/proc/self/environ", "/proc/1/root/etc/passwd", "/sys/kernel", "/var"),
        os.path.expanduser("~/.profile"),
    ]
    program = lines(
        "import os",
        f"for place in {places!r}:",
        "    if os.path.lexists(place):",
        "        print('sees', place)",
        "for place in ('/program.py', '/usr/x', '/x', '/dev/null/x', '/bin/sh'):",
        "    try:",
        "        open(place, 'a')",
        "        print('writes', place)",
        "    except OSError:",
        "        pass",
        "for step in ('..', '../..', '/proc'):",
        "    os.chdir(step)",
        "    print(sorted(os.listdir('.')) == [] or 'usr' in os.listdir('.'))",
    )
    result = sandbox.run(program, limits=LIMITS)
    assert result.stdout == "True\nTrue\nTrue\n"


def test_killing_the_parent():
    program = lines(
        "import os, signal",
        "for target in (os.getppid(), 1, -1, -os.getppid(), 0 - 1):",
        "    for name in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):",
        "        try:",
        "            os.kill(target, name)",
        "        except (PermissionError, ProcessLookupError):",
        "            pass",
        "print('alone', sorted({os.getppid()}))",
    )
    before = os.getpid()
    result = sandbox.run(program, limits=LIMITS)
    assert result.stdout == "alone [1]\n"
    assert result.passed
    assert os.getpid() == before
    assert sandbox.run("pass", limits=LIMITS).passed


def test_processes_that_stay_behind_end_with_it():
    program = lines(
        "import os, time",
        "if not os.fork():",
        "    os.setsid()",
        "    if not os.fork():",
        "        time.sleep(3600)",
        "    os._exit(0)",
        "os.wait()",
    )
    before = _descendants()
    result = sandbox.run(program, limits=LIMITS)
    assert result.passed
    assert result.seconds < LIMITS.wall_s
    assert _descendants() <= before


def test_new_namespaces_within_are_denied():
    """In one of its own it would be root, and could mount memory without a limit."""
    program = lines(
        "import ctypes, os",
        "libc = ctypes.CDLL(None, use_errno=True)",
        "assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1",
        "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) == -1",
        "assert ctypes.get_errno() == 1",
    )
    result = sandbox.run(program, limits=LIMITS)
    assert result.passed, result.stderr


def _descendants() -> set[int]:
    """Processes of this machine that sleep for an hour, by number."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if b"driver.py" in file.read():
                        found.add(int(name))
            except OSError:
                continue
    return found
