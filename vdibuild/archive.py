"""tar archives of whole systems: made and unpacked so that nothing that belongs to a file is lost.

Extended attributes carry file capabilities, SELinux labels, and ACLs as the kernel has them: with tar's own
--acls they would be texts that name users, whom the system that is packed or unpacked need not know.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Protocol, cast

from vdibuild import process, progress
from vdibuild.errors import CommandError, HostError, SpaceError
from vdibuild.tree import host_command

ATTRIBUTES = ("--xattrs", "--xattrs-include=*")
"""tar's options for all extended attributes."""

PACK = (
    *("--format=posix", "--pax-option=delete=atime,delete=ctime", "--numeric-owner"),
    *("--sparse", *ATTRIBUTES, "--warning=no-file-ignored"),  # sockets
)
"""tar's options to pack a system."""

_PIPE = 1 << 20

UNPACK = ("--numeric-owner", "--preserve-permissions", "--delay-directory-restore", *ATTRIBUTES)
"""tar's options to unpack one."""


class Through(Protocol):
    """Makes a command of tar's that unpacks, without its directory."""

    def __call__(self, tar: Sequence[str]) -> list[str]:
        """The command that runs it where its directory is to be seen, and adds that."""


def unpack(archive: Path | Iterable[bytes], directory: Path, through: Through | None = None) -> None:
    """Unpack a tar archive over a directory. through: how tar is run, where that is not here.

    archive: a file, or the bytes of one, piece by piece; what goes wrong with those is raised here. Raises
    HostError when the directory's file system cannot hold all that belongs to the files, SpaceError when it
    is full, CommandError when tar fails otherwise.
    """
    if isinstance(archive, Path):
        _extract(str(archive), subprocess.DEVNULL, directory, through)
        return
    reading, writing = os.pipe()
    # Fewer turns between the two processes. What a user may not have is not needed.
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
    failures: list[BaseException] = []
    feeder = threading.Thread(target=_feed, args=(archive, writing, failures))
    feeder.start()
    try:
        _extract("-", reading, directory, through)
    except CommandError:
        # tar cannot say what it was not told.
        os.close(reading)
        reading = -1
        feeder.join()
        if not failures:
            raise
    finally:
        if reading >= 0:
            os.close(reading)
        feeder.join()
    if failures:
        raise failures[0]


def _feed(pieces: Iterable[bytes], descriptor: int, failures: list[BaseException]) -> None:
    """Write pieces into a pipe until they end, or nobody reads them any more."""
    try:
        with os.fdopen(descriptor, "wb") as pipe:
            for piece in pieces:
                pipe.write(piece)
    except BrokenPipeError:
        return  # tar has ended, and says why
    except Exception as error:
        failures.append(error)


def _extract(file: str, source: int, directory: Path, through: Through | None) -> None:
    command = ["tar", "--extract", "--file", file, *UNPACK]
    argv = host_command(through(command) if through else [*command, f"--directory={directory}"])
    tar = process.start(argv, stdin=source)
    try:
        lines = []
        for line in cast(IO[bytes], tar.stdout):
            lines.append(line.decode(errors="replace").rstrip())
            progress.log(lines[-1])
            del lines[: -process.TAIL_LINES]
            # For tar that is a warning only.
            if "Cannot set " in lines[-1] and "attribute" in lines[-1]:
                raise HostError(
                    f"the file system of {directory} cannot hold an extended attribute: {lines[-1]}",
                    "use a directory on XFS or btrfs (they hold 64 KiB for each), and be root for labels",
                )
        status = tar.wait()
    finally:
        process.stop(tar)
    if status != 0:
        if any("No space left on device" in line for line in lines):
            raise SpaceError(f"no space left in {directory.parent}", "free some space, then run again")
        raise CommandError(argv, status, lines, f"tar could not unpack into {directory}")
