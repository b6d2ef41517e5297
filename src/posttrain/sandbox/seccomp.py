"""A filter of system calls for programs in the sandbox, as the kernel reads it (classic BPF).

Namespaces keep a program from seeing anything; this keeps it from what they leave open: memory that no limit counts
(memfd, System V shared memory), sockets, and the interfaces to the kernel that exploits have gone through most. Of
sockets there are pairs only, which asyncio needs: what a listening socket or a larger buffer holds is memory of no
process, and some families know no namespaces (vsock). What is refused fails with an error, and a program continues.
"""

from __future__ import annotations

import platform
import struct

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EACCES = 1, 13
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
X32 = 0x40000000
"""System calls of x86-64's 32-bit ABI carry this bit, and would slip past a list of numbers."""

NAMES = (
    "memfd_create memfd_secret shmget shmat msgget semget mq_open add_key request_key keyctl ptrace process_vm_readv "
    "process_vm_writev bpf userfaultfd io_uring_setup perf_event_open mount umount2 unshare setns pivot_root chroot "
    "kexec_load open_by_handle_at name_to_handle_at open_tree move_mount fsopen fsmount mount_setattr fanotify_init "
    "pidfd_getfd personality syslog bind listen connect setsockopt"
).split()
NUMBERS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    # machine: (audit number, socket, the numbers of NAMES)
    "x86_64": (0xC000003E, 41, (
        319, 447, 29, 30, 68, 64, 240, 248, 249, 250, 101, 310, 311, 321, 323, 425, 298, 165, 166, 272, 308, 155, 161,
        246, 304, 303, 428, 429, 430, 432, 442, 300, 438, 135, 103, 49, 50, 42, 54,
    )),
    "aarch64": (0xC00000B7, 198, (
        279, 447, 194, 196, 186, 190, 180, 217, 218, 219, 117, 270, 271, 280, 282, 425, 241, 40, 39, 97, 268, 41, 51,
        104, 265, 264, 428, 429, 430, 432, 442, 262, 438, 92, 116, 200, 201, 203, 208,
    )),
}  # fmt: skip


def known() -> bool:
    """Return True if the filter has the system calls of this machine."""
    return platform.machine() in NUMBERS


def program() -> bytes:
    """Return the filter for this machine. Raises KeyError if its system calls are not known."""
    audit, socket, numbers = NUMBERS[platform.machine()]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, ERRNO | EPERM)]
    for number in numbers:
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | EPERM)]
    code += [(EQUAL, 0, 1, socket), (RETURN, 0, 0, ERRNO | EACCES), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
