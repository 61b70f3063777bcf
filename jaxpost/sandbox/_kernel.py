"""The few Linux system calls that Python has no function for, by `ctypes`."""

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = (
    CLONE_NEWUSER
    | CLONE_NEWNS
    | CLONE_NEWPID
    | CLONE_NEWNET
    | CLONE_NEWIPC
    | CLONE_NEWUTS
)

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP = 1, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2

# Numbers of system calls without a wrapper in every C library.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(what: str, option: int, value: object) -> None:
    zero = ctypes.c_ulong(0)
    _call(what, "prctl", option, value, zero, zero, zero)


def unshare(flags: int) -> None:
    """Leaves the named namespaces for new ones."""
    _call("new namespaces", "unshare", ctypes.c_int(flags))


def mount(
    source: str, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    """`mount(2)`."""
    _call(
        f"mount {kind or source} on {target}",
        "mount",
        source.encode(),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        options.encode() or None,
    )


def set_mount(path: str, attributes: int, *, recursive: bool) -> None:
    """Adds attributes to the mount at `path`, and to those below it. Linux 5.12."""
    wanted = _MountAttributes(attr_set=attributes)
    _call(
        f"make {path} read-only",
        "syscall",
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )


def enter_root(folder: str) -> None:
    """Makes `folder` (a mount) the root, and forgets the old one."""
    os.chdir(folder)
    number = ctypes.c_long(_PIVOT_ROOT[platform.machine()])
    # Both roots on one place: the old one then lies on top, and is taken off.
    _call("pivot_root", "syscall", number, b".", b".")
    unmount(".")
    os.chdir("/")


def unmount(path: str) -> None:
    """Takes a mount out of the tree; open descriptors keep it alive."""
    _call(f"unmount {path}", "umount2", os.fsencode(path), ctypes.c_int(MNT_DETACH))


def die_with_parent(signal: int) -> None:
    """Sends this process `signal` when the thread that started it ends."""
    _prctl("parent-death signal", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal))


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent ended."""
    _prctl("subreaper", _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def filter_calls(program: bytes) -> None:
    """Installs a filter of system calls, for good, here and in all children."""
    _prctl("no new privileges", _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))
    whole = _FilterProgram(len(program) // 8, program)
    _call(
        "filter of system calls",
        "prctl",
        _PR_SET_SECCOMP,
        ctypes.c_ulong(_SECCOMP_MODE_FILTER),
        ctypes.byref(whole),
    )
