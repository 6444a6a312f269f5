"""The station's guard, which is root's: it notices when what the station runs from cannot be read any more.

A card that is dying, or is not what was hashed (live/verity.py), shows in the kernel's log, as an error of
its squashfs; one that was pulled out is none of the kernel's devices any more. Programs that are in memory
would go on, and half of what they do would fail. So the session ends, the screen says why, and the station
starts again after a minute.

Nothing of this needs the card: the guard is locked in memory, and asks the kernel alone. It runs in the live
system with nothing but Python's standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import time

UNREADABLE = "/run/vdibuild-unreadable"
"""The file that keeps station.service from starting."""

_SIGN = re.compile(
    rb"SQUASHFS error: (?:failed|unable) to read|device-mapper: verity: .* is corrupted", re.IGNORECASE
)
_RECORD = 8192  # /dev/kmsg gives a record whole, or an error (kernel.org, ABI/testing/dev-kmsg)
_FACILITY = 3  # how far it is shifted in a record's first number; the kernel's is 0
_LOOK_SECONDS = 2  # how soon it is seen that the medium is gone
_MEDIUM = "/run/initramfs/livedev"  # a link to it, made by dracut's dmsquash-live
_SESSION = "/sys/fs/cgroup/system.slice/station.service/cgroup.kill"
_TERMINAL = 1  # the one that nobody uses
_VT_ACTIVATE = 0x5606  # linux/vt.h
_ALL_MEMORY = 1 | 2  # MCL_CURRENT, MCL_FUTURE: mlockall(2)
_SECONDS = 60
_TEXT = b"""\033[2J\033[H

    THIS CARD CANNOT BE READ any more: is it still in its place?

    The station starts again in a minute.
    If this comes back, the card has to be replaced.
"""


def is_unreadable(record: bytes) -> bool:
    """Whether the kernel says, in a record of /dev/kmsg, that the system's medium could not be read."""
    prefix, _, text = record.partition(b";")
    return int(prefix.split(b",")[0]) >> _FACILITY == 0 and _SIGN.search(text) is not None


def watch(messages: int, medium: str) -> None:
    """Read the kernel's log, from its beginning, until it says so, or until the medium is gone.

    messages: /dev/kmsg, opened. medium: its directory in sysfs.
    """
    while os.access(medium, os.F_OK):
        if select.select([messages], [], [], _LOOK_SECONDS)[0]:
            try:
                if is_unreadable(os.read(messages, _RECORD)):
                    return
            except BrokenPipeError:
                pass  # what was not read in time is overwritten


def main() -> None:
    """Wait, and end the session then, show the screen, and restart the machine. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    messages = os.open("/dev/kmsg", os.O_RDONLY)
    device = os.path.realpath(_MEDIUM, strict=True).rpartition("/")[2]
    medium = os.path.realpath(f"/sys/class/block/{device}", strict=True)
    # The serial port is the console's.
    screens = [os.open(name, os.O_WRONLY | os.O_NOCTTY) for name in (f"/dev/tty{_TERMINAL}", "/dev/console")]
    trigger = os.open("/proc/sysrq-trigger", os.O_WRONLY)
    if libc.mlockall(_ALL_MEMORY) != 0:
        raise OSError(ctypes.get_errno(), "the guard cannot be kept in memory")
    watch(messages, medium)
    os.close(os.open(UNREADABLE, os.O_CREAT | os.O_WRONLY))
    for screen in screens:
        os.write(screen, _TEXT)
    for _ in range(_SECONDS):
        # X, too: then the screen is the kernel's again. Once more each second: one may just have begun.
        with contextlib.suppress(OSError):
            session = os.open(_SESSION, os.O_WRONLY)
            os.write(session, b"1")
            os.close(session)
        fcntl.ioctl(screens[0], _VT_ACTIVATE, _TERMINAL)
        time.sleep(1)
    os.write(trigger, b"b")


if __name__ == "__main__":
    main()
