"""Timing and memory of compiled functions, measured the same way by every benchmark.

Interleaved rounds, so that a slow minute of the machine hits every contestant; compile
time apart from run time; medians of at least ten; memory both as XLA plans it and as
the operating system sees it, in a fresh process.
"""

import dataclasses
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

HUGE_PAGES = "glibc.malloc.hugetlb=1"
MIB = 2**20


def use_huge_pages() -> None:
    """Start this script again with huge pages for malloc, unless it has them.

    Worth 9-28% to XLA on CPU, for every contestant alike; glibc reads the setting only
    when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.argv])


@dataclasses.dataclass
class Contestant:
    """One row of a table: a function to compile, and what was found.

    Fields:
        name: shown in the table.
        function: takes the benchmark's arrays.
        compile_s: tracing and compilation, seconds.
        temp_bytes, output_bytes: XLA's plan for temporaries and results.
        times_s: one entry per round.
        peak_bytes: see `peak_bytes_in_fresh_process`.
    """

    name: str
    function: Callable[..., Any]
    compile_s: float = 0.0
    temp_bytes: int = 0
    output_bytes: int = 0
    times_s: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    compiled: Any = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    def compile(self, arguments: Sequence[Any]) -> Any:
        """Compile for `arguments`, run once, return the result."""
        import jax

        start = time.perf_counter()
        self.compiled = jax.jit(self.function).lower(*arguments).compile()
        self.compile_s = time.perf_counter() - start
        plan = self.compiled.memory_analysis()
        self.temp_bytes = plan.temp_size_in_bytes
        self.output_bytes = plan.output_size_in_bytes
        return jax.block_until_ready(self.compiled(*arguments))

    def row(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        return {
            "name": self.name,
            "median_ms": self.median_s * 1e3,
            "fastest_ms": min(self.times_s) * 1e3,
            "rounds": len(self.times_s),
            "compile_s": self.compile_s,
            "temp_mib": self.temp_bytes / MIB,
            "output_mib": self.output_bytes / MIB,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / MIB,
        }


def time_interleaved(
    contestants: Sequence[Contestant], arguments: Sequence[Any], *, rounds: int
) -> None:
    """Run every compiled contestant once per round; results are dropped at once.

    `Contestant.compile` has run each of them before.
    """
    import jax

    for number in range(1, rounds + 1):
        for contestant in contestants:
            start = time.perf_counter()
            jax.block_until_ready(contestant.compiled(*arguments))
            contestant.times_s.append(time.perf_counter() - start)
            print(
                f"round {number} of {rounds}: {contestant.name:<24} "
                f"{contestant.times_s[-1]:.3f} s",
                flush=True,
            )


def peak_bytes_of_first_run(contestant: Contestant, arguments: Sequence[Any]) -> int:
    """Bytes the first run added to the process's peak, results not counted.

    Call in a fresh process that has only made its arguments: where the peak cannot be
    reset it never falls.
    """
    import jax

    contestant.compiled = jax.jit(contestant.function).lower(*arguments).compile()
    plan = contestant.compiled.memory_analysis()
    _forget_peak()
    before = _peak_rss_bytes()
    result = jax.block_until_ready(contestant.compiled(*arguments))
    added = _peak_rss_bytes() - before
    del result
    return max(added - plan.output_size_in_bytes, 0)


def peak_bytes_in_fresh_process(flags: Sequence[str]) -> int:
    """Run the calling script with `flags`; it prints `peak_bytes_of_first_run`."""
    command = [sys.executable, sys.argv[0], *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def _forget_peak() -> None:
    """On Linux, lower the recorded peak to what is held now: compiling had its own."""
    reset = pathlib.Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def _peak_rss_bytes() -> int:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Device, versions and settings, for the table's title and the JSON file."""
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.processor() or platform.machine(),
        "threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def print_table(
    title: str, contestants: Sequence[Contestant], *, limit: str, rival: str
) -> None:
    """A table with every row against the physical limit and against the rival."""
    from rich.console import Console
    from rich.table import Table

    by_name = {c.name: c for c in contestants}
    table = Table(title=title)
    table.add_column("")
    for heading in (
        "median ms",
        f"× {limit}",
        f"× {rival}",
        "temporaries MiB",
        "peak RSS MiB",
        f"memory × {rival}",
        "compile s",
    ):
        table.add_column(heading, justify="right")
    for c in contestants:
        table.add_row(
            c.name,
            f"{c.median_s * 1e3:.1f}",
            f"{c.median_s / by_name[limit].median_s:.2f}",
            f"{c.median_s / by_name[rival].median_s:.2f}",
            f"{c.temp_bytes / MIB:.0f}",
            "" if c.peak_bytes is None else f"{c.peak_bytes / MIB:.0f}",
            f"{c.temp_bytes / max(by_name[rival].temp_bytes, 1):.3f}",
            f"{c.compile_s:.2f}",
        )
    Console(width=120).print(table)


def write_json(name: str, content: dict[str, Any]) -> pathlib.Path:
    """Write `benchmarks/results/<name>.json`."""
    path = pathlib.Path(__file__).resolve().parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
