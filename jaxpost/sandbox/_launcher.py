"""The process beside a program: makes its world, watches it, and says what it did.

Run as a script (`_run.py` starts it), because a process with threads must not fork.

    launcher ── reads output, has the last word on time; outside
      └ entry ── made the namespaces; waits
          └ supervisor ── first process of its namespace: when it ends, all end
              └ the program, with an unprivileged user

The supervisor keeps the only view of the processes and is root at most inside; the
program cannot signal, trace or outlive it. Without namespaces (`isolate` false) there
is no entry, and the supervisor ends what descends from it.
"""

import json
import os
import platform
import resource
import selectors
import signal
import sys
import time
from typing import Any, NoReturn

from jaxpost.sandbox import _kernel
from jaxpost.sandbox._filter import denied_calls
from jaxpost.sandbox._supervise import supervise

USER = 1000  # of the program, inside
NOBODY = 65534  # who that is outside, if the caller is root
GRACE_S = 2.0  # for the supervisor to end a program that is out of time
MIB = 2**20
DEVICES = ("null", "zero", "full", "random", "urandom")
PROGRAM, INPUT, DRIVER = "program.py", "input", "driver.py"


def main() -> None:
    """Reads a task from standard input, runs it, writes the report to the output."""
    task = json.load(sys.stdin)
    os.setsid()  # the terminal's signals are the caller's business
    _kernel.die_with_parent(signal.SIGKILL)
    json.dump(launch(task), sys.stdout)


def launch(task: dict[str, Any]) -> dict[str, Any]:
    """Forks the supervisor, keeps the ends of its output, and returns its report."""
    out, err, report, ready, go = (os.pipe() for _ in range(5))
    child = os.fork()
    if not child:
        for pipe in (out, err, report, ready):
            os.close(pipe[0])
        os.close(go[1])
        ends = {"stdout": out[1], "stderr": err[1], "report": report[1]}
        _child(task, ends, ready[1], go[0])
    for pipe in (out, err, report, ready):
        os.close(pipe[1])
    os.close(go[0])
    try:
        if task["isolate"] and os.read(ready[0], 1):
            _map_users(child)
            os.write(go[1], b".")
    except OSError as error:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"refused": f"mapping of users: {error}"}
    os.close(go[1])
    found = _drain(task, child, out[0], err[0], report[0])
    os.waitpid(child, 0)
    return found


def _map_users(child: int) -> None:
    """Gives the namespace of `child` its users: the program's must not be root."""
    if os.geteuid() == 0:
        lines = f"0 0 1\n{USER} {NOBODY} 1\n"
        users = groups = lines
    else:
        users, groups = f"{USER} {os.geteuid()} 1\n", f"{USER} {os.getegid()} 1\n"
        _write(f"/proc/{child}/setgroups", "deny")  # or groups may not be mapped
    _write(f"/proc/{child}/uid_map", users)
    _write(f"/proc/{child}/gid_map", groups)


def _drain(
    task: dict[str, Any], child: int, out: int, err: int, report: int
) -> dict[str, Any]:
    """Reads until everybody has closed their ends, or time or output is over."""
    limits = task["limits"]
    kept = {out: b"", err: b"", report: b""}
    total, over = 0, None
    deadline = time.monotonic() + limits["wall_s"] + GRACE_S
    with selectors.DefaultSelector() as selector:
        for end in kept:
            selector.register(end, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0.0 and not over:
                over, deadline = "timeout", time.monotonic() + GRACE_S
                os.kill(child, signal.SIGKILL)  # the supervisor dies with it
            elif left <= 0.0:
                break
            for ready, _ in selector.select(max(0.0, left)):
                chunk = os.read(ready.fd, 65536)
                if not chunk:
                    selector.unregister(ready.fd)
                    continue
                if ready.fd != report:
                    total += len(chunk)
                    chunk = (kept[ready.fd] + chunk)[-limits["tail_bytes"] :]
                    kept[ready.fd] = chunk
                else:
                    kept[report] += chunk
            if total > limits["output_mb"] * MIB and not over:
                over, deadline = "output", time.monotonic() + GRACE_S
                os.kill(child, signal.SIGKILL)
    found = json.loads(kept[report]) if kept[report] else {}
    if over:
        found["over"] = over
    texts = {"stdout": kept[out], "stderr": kept[err]}
    return found | {k: v.decode("utf-8", "replace") for k, v in texts.items()}


def _child(task: dict[str, Any], ends: dict[str, int], ready: int, go: int) -> NoReturn:
    """Entry and supervisor: never returns into the launcher's code."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _kernel.die_with_parent(signal.SIGKILL)
        if task["isolate"]:
            filter_program = denied_calls(platform.machine())
            _kernel.unshare(_kernel.NAMESPACES)
            _kernel.die_with_parent(signal.SIGKILL)
            os.write(ready, b".")
            if not os.read(go, 1):
                os._exit(1)
            supervisor = os.fork()  # the first process of the new namespace
            if supervisor:
                for end in ends.values():
                    os.close(end)
                os.waitpid(supervisor, 0)
                os._exit(0)
            _kernel.die_with_parent(signal.SIGKILL)
            view = _build_world(task)
        else:
            filter_program = b""
            view = os.open("/proc", os.O_RDONLY)
            _kernel.adopt_orphans()
        _supervisor(task, ends, view, filter_program)
    except (OSError, NotImplementedError) as error:
        os.write(ends["report"], json.dumps({"refused": str(error)}).encode())
    finally:
        os._exit(1)


def _supervisor(
    task: dict[str, Any], ends: dict[str, int], view: int, filter_program: bytes
) -> NoReturn:
    done = os.pipe()
    program = os.fork()
    if not program:
        try:
            _become_program(task, ends, done[1], filter_program)
        except OSError as error:
            os.write(2, f"sandbox: {error}\n".encode())
        finally:
            os._exit(127)
    for end in (ends["stdout"], ends["stderr"], done[1]):
        os.close(end)
    found = supervise(task["limits"], program, view, isolated=task["isolate"])
    os.set_blocking(done[0], False)  # a child of the program may hold the other end
    try:
        found["said"] = os.read(done[0], 4096).decode("utf-8", "replace")
    except BlockingIOError:
        found["said"] = ""
    os.write(ends["report"], json.dumps(found).encode())
    os._exit(0)


def _build_world(task: dict[str, Any]) -> int:
    """Mounts what the program may see; returns a view of the processes, for us only."""
    root, limits = task["folder"], task["limits"]
    plain = _kernel.MS_NOSUID | _kernel.MS_NODEV
    _kernel.mount("none", "/", None, _kernel.MS_REC | _kernel.MS_PRIVATE)
    written = sum(len(task[name].encode()) for name in (PROGRAM, INPUT, DRIVER))
    _kernel.mount("sandbox", root, "tmpfs", plain, f"size={MIB + written},mode=755")
    for path in task["paths"]:
        _show(path, root)
    for device in DEVICES:
        _bind(f"/dev/{device}", f"{root}/dev/{device}")
    for name in (PROGRAM, INPUT, DRIVER):
        _write(f"{root}/{name}", task[name])
    os.mkdir(f"{root}/tmp")
    room = (
        f"size={limits['disk_mb']}m,nr_inodes={limits['files'] + 1},mode=700,"
        f"uid={USER},gid={USER}"
    )
    _kernel.mount("tmp", f"{root}/tmp", "tmpfs", plain, room)
    os.mkdir(f"{root}/proc")
    _kernel.mount("proc", f"{root}/proc", "proc", plain | _kernel.MS_NOEXEC)
    view = os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY)
    _kernel.unmount(f"{root}/proc")
    _kernel.enter_root(root)
    _kernel.set_mount("/", _kernel.ATTR_RDONLY, recursive=False)
    return view


def _show(path: str, root: str) -> None:
    """Gives the new root what the old one has at `path`, read-only."""
    place = root + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.symlink(os.readlink(path), place)
        return
    _bind(path, place)
    attributes = _kernel.ATTR_RDONLY | _kernel.ATTR_NOSUID | _kernel.ATTR_NODEV
    _kernel.set_mount(place, attributes, recursive=True)


def _bind(path: str, place: str) -> None:
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        _write(place, "")
    _kernel.mount(path, place, None, _kernel.MS_BIND | _kernel.MS_REC)


def _become_program(
    task: dict[str, Any], ends: dict[str, int], done: int, filter_program: bytes
) -> NoReturn:
    """Turns this process into the program: limits, user, filter, then another Python.

    The order matters: limits while they may still be set, the user before the filter,
    and `exec` last, which takes the remaining privileges away.
    """
    os.setsid()
    inside = task["isolate"]
    folder = "/" if inside else task["folder"] + "/"
    home = folder + "tmp"
    # High numbers first, so that none is overwritten before it is used.
    held = [os.dup(end) for end in (ends["stdout"], ends["stderr"], done)]
    os.dup2(os.open(folder + INPUT, os.O_RDONLY), 0)
    for number, end in enumerate(held, start=1):
        os.dup2(end, number, inheritable=True)
    os.closerange(4, 4096)
    _set_limits(task["limits"], count_processes=inside)
    if inside:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
        _kernel.filter_calls(filter_program)
    os.umask(0o077)
    os.chdir(home)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    environment = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C"}
    python = [task["python"], "-I", "-S", "-B", "-X", "utf8", folder + DRIVER]
    os.execve(python[0], [*python, folder + PROGRAM, task["mark"]], environment)


def _set_limits(limits: dict[str, Any], *, count_processes: bool) -> None:
    wanted = {
        resource.RLIMIT_AS: limits["memory_mb"] * MIB,
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["disk_mb"] * MIB,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if count_processes:
        # Counted per user and namespace, with entry and supervisor if that user is
        # theirs too. Some room above, so that the watchdog can see the limit passed.
        wanted[resource.RLIMIT_NPROC] = 2 * limits["processes"] + 4
    for kind, value in wanted.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        hard = value
        if kind == resource.RLIMIT_CPU and value != most:
            hard += 1  # first a signal that says why, then one that none can ignore
        resource.setrlimit(kind, (value, hard))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
