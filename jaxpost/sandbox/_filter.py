"""Which system calls a program may not make, as a filter that the kernel runs.

What namespaces and limits already contain is let through. Denied is what would get out
of them (new namespaces, mounts, sockets of families that network namespaces do not
hold), what escapes the count of memory (files in memory without a folder), and large
parts of the kernel that a program under test has no use for.
"""

import errno
import struct

# Name: number on x86_64 and on aarch64, as in the kernel's unistd headers.
DENIED = {
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "acct": (163, 89),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "memfd_create": (319, 279),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "quotactl_fd": (443, 443),
    "memfd_secret": (447, 447),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_SOCKET, _CLONE, _CLONE3 = (41, 198), (56, 220), (435, 435)
_FAMILIES = (1, 2, 10)  # Unix, IPv4, IPv6: those that end at the namespace
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW... flag

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _ARGUMENT = 0, 4, 16  # offsets in `struct seccomp_data`
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def denied_calls(machine: str) -> bytes:
    """The filter for `filter_calls`, in instructions of eight bytes.

    Raises:
        NotImplementedError: the numbers of that machine's calls are not known here.
    """
    if machine not in MACHINES:
        raise NotImplementedError(
            f"no table of system calls for {machine!r}; there is one for "
            f"{', '.join(MACHINES)}."
        )
    column, architecture = MACHINES[machine]
    refuse = _step(_RETURN, _ERROR | errno.EPERM)
    code = [
        _step(_LOAD, _MACHINE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),  # calls of another machine have other numbers
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, 0x40000000, 0, 1),  # x86_64's second set of numbers
        refuse,
    ]
    for numbers in DENIED.values():
        code += [_step(_EQUAL, numbers[column], 0, 1), refuse]
    # Its flags lie in memory, where a filter cannot look: C libraries then use `clone`.
    unknown = _step(_RETURN, _ERROR | errno.ENOSYS)
    code += [_step(_EQUAL, _CLONE3[column], 0, 1), unknown]
    code += [
        _step(_EQUAL, _CLONE[column], 0, 3),
        _step(_LOAD, _ARGUMENT),
        _step(_ANY_BIT, _NEW_NAMESPACES, 0, 4 + len(_FAMILIES)),
        refuse,
        _step(_EQUAL, _SOCKET[column], 0, 2 + len(_FAMILIES)),
        _step(_LOAD, _ARGUMENT),
    ]
    for place, family in enumerate(_FAMILIES):
        code.append(_step(_EQUAL, family, len(_FAMILIES) - place, 0))
    code.append(_step(_RETURN, _ERROR | errno.EAFNOSUPPORT))
    code.append(_step(_RETURN, _ALLOW))
    return b"".join(code)


def _step(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, when_true, when_false, value)
