"""Running untrusted Python programs under limits; standard library only.

On Linux each program gets new user, process, mount, network and IPC namespaces, an
unprivileged user, limits and a watchdog. Where the kernel refuses that, nothing is run
unless the caller says `unsafe=True`. Knows no model, task or score.
"""

from jaxpost.sandbox._result import Limits, SandboxResult
from jaxpost.sandbox._run import refusal, run, run_many

__all__ = ["Limits", "SandboxResult", "refusal", "run", "run_many"]
