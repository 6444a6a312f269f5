"""Runs a command whose fsync and its like do nothing: what it writes is thrown away when the machine fails.

dpkg and rpm wait for the disk thousands of times while they install a system. That protects a running
machine; a build that breaks off starts from an empty directory. As systemd-nspawn's --suppress-sync, and as
mkosi does, a seccomp filter answers these calls with success. This file is also the program that sets it;
it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence

# Linux: include/uapi/linux/audit.h; arch/x86/entry/syscalls/syscall_64.tbl, uapi/asm-generic/unistd.h:
# fsync, fdatasync, sync, syncfs, sync_file_range.
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (74, 75, 162, 306, 277)),
    "aarch64": (0xC00000B7, (82, 83, 81, 267, 84)),
}

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RETURN_SUCCESS = 0x00050000  # SECCOMP_RET_ERRNO with errno 0
_RETURN_ALLOW = 0x7FFF0000
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def command(argv: Sequence[str]) -> list[str]:
    """The argument list that runs `argv` with its synchronisation suppressed (and all it starts)."""
    return [sys.executable, "-I", "-S", __file__, *argv]


@contextlib.contextmanager
def sandboxed(argv: Sequence[str], also: Sequence[int] = ()) -> Iterator[tuple[list[str], list[int]]]:
    """The same, for a command that needs no rights: what to run, and the descriptors it has to inherit.

    That starts more quickly, through bubblewrap. also: further calls, of x86-64 by their numbers, that do
    nothing.
    """
    sandbox = ["bwrap", "--dev-bind", "/", "/", "--die-with-parent"]
    architecture, numbers = _ARCHITECTURES.get(platform.machine(), (0, ()))
    with os.fdopen(os.memfd_create("filter"), "w+b") as program:
        program.write(suppressing(architecture, [*numbers, *also]))
        program.flush()
        program.seek(0)
        yield [*sandbox, "--seccomp", str(program.fileno()), "--", *argv], [program.fileno()]


def suppressing(architecture: int, numbers: Sequence[int]) -> bytes:
    """A seccomp filter (struct sock_filter[]) that makes these system calls succeed and do nothing."""
    calls = len(numbers)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 0, calls + 1, architecture),
        (_LOAD, 0, 0, _NUMBER),
        *((_JUMP_EQUAL, calls - index, 0, number) for index, number in enumerate(numbers)),
        (_RETURN, 0, 0, _RETURN_ALLOW),
        (_RETURN, 0, 0, _RETURN_SUCCESS),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def _suppress() -> None:
    """Set the filter for this process and what it becomes. Where it cannot be set, all is as usual."""
    known = _ARCHITECTURES.get(platform.machine())
    if known is None:
        return
    program = suppressing(*known)
    steps = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    length = struct.pack("@HL", len(program) // 8, ctypes.addressof(steps))
    libc = ctypes.CDLL(None)
    # Root of the namespace may set it as it is; anybody may who gives up set-user-ID programs.
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, length, 0, 0) != 0:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, length, 0, 0)


if __name__ == "__main__":
    _suppress()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 (a list; becoming it is the point)
