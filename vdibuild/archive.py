"""tar archives of whole systems: made and unpacked so that nothing that belongs to a file is lost.

Extended attributes carry file capabilities, SELinux labels, and ACLs as the kernel has them: with tar's own
--acls they would be texts that name users, whom the system that is packed or unpacked need not know.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO, cast

from vdibuild import process, progress
from vdibuild.errors import CommandError, HostError
from vdibuild.tree import host_command

ATTRIBUTES = ("--xattrs", "--xattrs-include=*")
"""tar's options for all extended attributes."""

PACK = (
    *("--format=posix", "--pax-option=delete=atime,delete=ctime", "--numeric-owner"),
    *("--sparse", *ATTRIBUTES, "--warning=no-file-ignored"),  # sockets
)
"""tar's options to pack a system."""

UNPACK = ("--numeric-owner", "--preserve-permissions", "--delay-directory-restore", *ATTRIBUTES)
"""tar's options to unpack one."""


def unpack(archive: Path | int | IO[bytes], directory: Path) -> None:
    """Unpack a tar archive over a directory.

    archive: a file, or a stream to read it from. Raises HostError when the directory's file system cannot
    hold all that belongs to the files, CommandError when tar fails otherwise.
    """
    source = subprocess.DEVNULL if isinstance(archive, Path) else archive
    file = str(archive) if isinstance(archive, Path) else "-"
    argv = host_command(["tar", "--extract", "--file", file, f"--directory={directory}", *UNPACK])
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
            raise HostError(f"no space left in {directory.parent}", "free some space, then run again")
        raise CommandError(argv, status, lines, f"tar could not unpack into {directory}")
