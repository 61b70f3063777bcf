"""What a program may use, and what became of it."""

import dataclasses
from typing import Literal

Status = Literal[
    "passed",
    "failed",
    "timeout",
    "memory",
    "processes",
    "output",
    "killed",
    "refused",
]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program.

    Fields:
        wall_s: elapsed time, seconds; the program and all it started end then.
        cpu_s: CPU time of each process, whole seconds.
        memory_mb: address space of each process, and what all together hold resident,
            MiB. Pages shared by processes count once for each.
        processes: processes and threads at a time.
        disk_mb: its temporary folder, which is in memory; also one file's size, MiB.
        files: files and folders in it.
        open_files: descriptors of each process.
        output_mb: standard output and error together, MiB.
        tail_bytes: how much of the end of each is kept.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 512
    processes: int = 16
    disk_mb: int = 32
    files: int = 1024
    open_files: int = 64
    output_mb: int = 4
    tail_bytes: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.name == "wall_s":
                if not 0.0 < value < float("inf"):
                    raise ValueError(f"wall_s must be positive, got {value}.")
            elif not whole or value < 1:
                raise ValueError(
                    f"{field.name} must be a whole number of at least 1, got {value!r}."
                )
        if self.memory_mb < 64:
            raise ValueError(
                f"memory_mb must be at least 64, got {self.memory_mb}: Python itself "
                "does not start in less."
            )


@dataclasses.dataclass(frozen=True)
class SandboxResult:
    """What became of one program.

    Fields:
        status: `passed`: it reached its last line and ended with exit status 0;
            `failed`: an exception, another exit status, or it left early; `timeout`
            (wall clock or CPU), `memory`, `processes`, `output`: it went over that
            limit; `killed`: by a signal; `refused`: it was not run.
        detail: one line on why, for people.
        exit_code: of the program; None if it did not exit by itself.
        stdout, stderr: their ends.
        seconds, cpu_seconds: elapsed, and CPU time of the program and of those of its
            children that it waited for.
        peak_memory_mb, peak_processes: the most that the watchdog saw.
        isolated: whether it ran in namespaces of its own.
        ran: whether it is the program that this is about. False if it was refused, or
            the sandbox failed to start it or lost sight of it: that says nothing of it.
    """

    status: Status
    detail: str = ""
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    peak_processes: int = 0
    isolated: bool = False
    ran: bool = True

    @property
    def passed(self) -> bool:
        """Whether `status` is `passed`."""
        return self.status == "passed"
