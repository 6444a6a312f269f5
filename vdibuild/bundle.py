"""The bundle: a root file system as one archive, the same bytes for the same tree on every machine.

A pax archive made by GNU tar, compressed by zstd. It holds owners as numbers, modes, ACLs, SELinux labels,
extended attributes (file capabilities among them) and holes; hard links stay links. It does not hold the
contents of the API file systems, sockets, or when a file was read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, cast

import zstandard

from vdibuild import process, progress
from vdibuild.errors import CommandError
from vdibuild.tree import Tree, host_command

_API_FILE_SYSTEMS = ("dev", "proc", "run", "sys", "tmp")
# Measured with a minimal Debian of 263 MiB, on two cores: level 3 gives 117 MiB in 1.2 s; with the long
# window level 3 gives 105 (1.2 s), level 6 102 (1.7 s), level 9 100 (2.4 s), level 12 98 (4.6 s).
_LEVEL = 6
_WINDOW_LOG = 27  # 128 MiB: the most that `zstd -d` accepts without being asked


def create(tree: Tree, output: Path, epoch: int) -> None:
    """Write a tree's bundle to a file.

    epoch: no file in it is younger than this (seconds since 1970). Raises CommandError when the tree
    cannot be read to its end; there is no output then.
    """
    try:
        _create(tree, output, epoch)
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    progress.note(f"{output.stat().st_size >> 20} MiB")


def _create(tree: Tree, output: Path, epoch: int) -> None:
    argv = host_command(_tar(tree.root, epoch))
    with output.open("wb") as file, os.fdopen(os.memfd_create("stderr"), "w+b") as messages:
        tar = process.start(argv, stderr=messages)
        try:
            _compressor().copy_stream(cast(IO[bytes], tar.stdout), file)
            status = tar.wait()
        finally:
            process.stop(tar)
        messages.seek(0)
        tail = messages.read().decode(errors="replace").splitlines()
        for line in tail:
            progress.log(line)
        if status != 0:
            raise CommandError(argv, status, tail[-process.TAIL_LINES :], f"tar could not read {tree.root}")


def _tar(root: Path, epoch: int) -> list[str]:
    return [
        "tar",
        "--create",
        f"--directory={root}",
        "--format=posix",
        # The default name of a pax header contains tar's process id.
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--sort=name",
        f"--mtime=@{epoch}",
        "--clamp-mtime",
        "--numeric-owner",
        # ACLs and SELinux labels are among these. With --acls they would be texts that name users, whom
        # the system that the bundle is unpacked on need not know.
        "--xattrs",
        "--xattrs-include=*",
        # Holes by content: where a file system keeps them depends on its block size.
        "--sparse",
        "--hole-detection=raw",
        "--one-file-system",
        "--warning=no-file-ignored",  # sockets
        "--anchored",
        *(f"--exclude=./{name}/*" for name in _API_FILE_SYSTEMS),
        ".",
    ]


def _compressor() -> zstandard.ZstdCompressor:
    # Any number of threads gives the same bytes, as long as there is one beside the main thread.
    threads = len(os.sched_getaffinity(0))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, threads=threads, enable_ldm=True, window_log=_WINDOW_LOG, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
