"""Makes a bundle of what is there: a disk image, a block device, a directory, or the running system."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vdibuild import bundle, hashing, process, progress
from vdibuild.bundle import ARCHIVE, DESCRIPTION, Description
from vdibuild.disk import inspection
from vdibuild.disk.layout import Layout
from vdibuild.errors import BundleError, InputError
from vdibuild.families import systemd
from vdibuild.output import sync
from vdibuild.scratch import beside
from vdibuild.tree import Tree

_ON_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat")


def pack(
    source: Path,
    output: Path,
    *,
    accelerator: Literal["kvm", "tcg"],
    name: str = "",
    exclude: Sequence[str] = (),
    one_file_system: bool = False,
) -> Description:
    """Make a bundle: a new directory with the archive and its description, which appears when it is whole.

    source: a disk image, a block device, or a directory; `/` for the running system. output: the directory.
    accelerator: for the appliance, where an image needs it. name: by default the output's. exclude: paths,
    which may have wildcards. one_file_system: nothing that is mounted below the source. Times are kept;
    SOURCE_DATE_EPOCH, where it is set, is the latest. Raises InputError before anything is done for what
    cannot be packed.
    """
    if output.exists():
        raise InputError(output, None, "is there already", "name another directory, or remove it")
    try:
        kind = source.stat().st_mode
    except OSError as error:
        raise InputError(source, None, f"cannot be read: {error.strerror}") from error
    name = name or output.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise InputError(output, None, f"{name!r} is no name for a bundle", "use letters, digits and . _ -")
    with beside(output) as directory:
        scratch, staging = directory / "scratch", directory / "bundle"
        scratch.mkdir()
        staging.mkdir()
        if stat.S_ISDIR(kind):
            tree, layout = Tree(source), None
            inside = _inside(tree, output.parent)
            hidden = [f"{inside}/.{output.name}-*"] if inside is not None else []
            mounts = [] if one_file_system else _mounts(tree.root)
            described = _make(
                tree, layout, staging, name, [*exclude, *hidden], mounts, live=source == Path("/")
            )
        else:
            with inspection.opened(source, scratch, accelerator) as disk:
                tree, layout = disk.extract(scratch / "tree"), disk.found.layout
                described = _make(tree, layout, staging, name, exclude, [], live=False)
        sync(staging, *staging.iterdir())
        staging.rename(output)
        sync(output.parent)
    return described


def unpack(bundled: Path, directory: Path, *, devices: bool = False) -> Description:
    """Unpack the bundle in a directory into another one, which must be empty or not be there.

    devices: it may hold any device nodes. Raises BundleError before anything is written for an archive that
    is damaged, not the described one, or reaches out of the directory.
    """
    described = bundle.describe(bundled / DESCRIPTION)
    if directory.exists() and any(directory.iterdir()):
        raise InputError(directory, None, "is not empty", "name a new directory")
    with progress.step("compare with the description"):
        if hashing.of_file(bundled / ARCHIVE) != described.sha256:
            raise BundleError(f"{bundled / ARCHIVE} is not what {DESCRIPTION} says", "get it again")
    with progress.step("check the bundle"):
        bundle.check(bundled / ARCHIVE, limit=described.unpacked, devices=devices)
    directory.mkdir(parents=True, exist_ok=True)
    bundle.unpack(bundled / ARCHIVE, directory)
    return described


def _make(
    tree: Tree,
    layout: Layout | None,
    staging: Path,
    name: str,
    exclude: Sequence[str],
    mounts: Sequence[str],
    *,
    live: bool,
) -> Description:
    epoch = process.environment().get("SOURCE_DATE_EPOCH")
    with progress.step("pack"):
        unpacked = bundle.create(
            tree,
            staging / ARCHIVE,
            int(epoch) if epoch else None,
            mounts=mounts,
            exclude=[*(f"{top}/lost+found" for top in ("", *mounts)), *exclude],
            live=live,
        )
    described = Description(
        name=name,
        os=systemd.os_release(tree) if tree.exists("/etc/os-release") else {},
        layout=layout,
        sha256=hashing.of_file(staging / ARCHIVE),
        size=(staging / ARCHIVE).stat().st_size,
        unpacked=unpacked,
    )
    text = described.model_dump_json(indent=2, warnings="error") + "\n"
    (staging / DESCRIPTION).write_text(text, encoding="utf-8")
    return described


def _mounts(root: Path) -> list[str]:
    """Paths below a directory where file systems of disks are mounted (proc_pid_mountinfo(5))."""
    found = []
    for line in (
        Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    ):
        before, _, after = line.partition(" - ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if after.split()[0] in _ON_DISKS and place != root and place.is_relative_to(root):
            found.append(str(place.relative_to(root)))
    return found


def _inside(tree: Tree, directory: Path) -> str | None:
    """Where a directory of this host is in a tree, or None."""
    place = directory.resolve()
    return str(place.relative_to(tree.root)) if place.is_relative_to(tree.root) else None
