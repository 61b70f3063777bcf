"""Start N processes of one training run on this machine, and wait for them all.

    python scripts/several_processes.py 2 configs/sft/arithmetic.yaml --train.steps 20

Each gets the same arguments and its own `--processes.index`; their output is prefixed
with it. If one fails, the others are stopped. To try it without accelerators, give each
process four CPU devices: `XLA_FLAGS=--xla_force_host_platform_device_count=4`.
"""

import socket
import subprocess
import sys
import threading
import time

PATIENCE_S = 5.0


def main(arguments: list[str]) -> int:
    if not arguments or not arguments[0].isdigit():
        sys.stderr.write(f"{__doc__}\n")
        return 2
    count, rest = int(arguments[0]), arguments[1:]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [start(rest, port, count, index) for index in range(count)]
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(PATIENCE_S)  # the others may be about to say why
            for process in processes:
                process.kill()  # a process that waits for a dead one hears no signal
            break
        time.sleep(0.2)
    return max(abs(process.wait()) for process in processes)


def start(
    arguments: list[str], port: int, count: int, index: int
) -> subprocess.Popen[str]:
    """One process, whose lines are copied to ours."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jaxpost.cli", "train", *arguments),
            *("--processes.coordinator", f"127.0.0.1:{port}"),
            *("--processes.count", str(count), "--processes.index", str(index)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(f"[{index}] {line}")
            sys.stdout.flush()

    threading.Thread(target=copy, daemon=True).start()
    return process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
