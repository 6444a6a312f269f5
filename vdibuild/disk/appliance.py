"""LVM and XFS through the libguestfs appliance: what no tool writes into a plain file, a small guest does.

One launch for everything. The files go in as a tar archive on a read-only disk of its own, which the
appliance's tar reads directly: several times faster than through libguestfs's own channel.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdibuild import process, progress
from vdibuild.disk import lvm, native, volumes
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.disk.volumes import Devices, file_system
from vdibuild.errors import HostError, VdibuildError
from vdibuild.tree import Tree

_MEMORY = 1024
"""MiB for the appliance: what it extracts has to fit into its page cache, or it waits for the disk."""

_ATTRIBUTES = ("--xattrs", "--xattrs-include=*")
"""tar's options for all extended attributes: capabilities, SELinux labels, and ACLs as the kernel has them.
With --acls they would be texts that name users, and the appliance does not know the tree's users."""

DISK, ARCHIVE = "disk", "files"
"""What the drives are called. The kernel looks for disks in parallel: the second is not always /dev/sdb."""

_PACKAGES = {"xfs": ("libguestfs-xfs", "xfsprogs"), "lvm2": ("lvm2",), "btrfs": ("btrfs-progs",)}


def write(
    tree: Tree,
    layout: Layout,
    places: Sequence[Partition | LogicalVolume],
    disk: Path,
    scratch: Path,
    accelerator: str,
) -> None:
    """Make the layout's volume groups and the file systems on these places, and fill them from the tree.

    disk: a raw image with its partition table. scratch: a directory for temporary files. accelerator: kvm
    or tcg. Raises HostError when the appliance does not start or lacks something, VdibuildError when
    something in it fails.
    """
    mounted = [place for place in places if file_system(place).mountpoint.startswith("/")]
    archives = []
    with progress.step("pack the files"):
        for number, place in enumerate(mounted):
            archives.append(scratch / f"files-{number}.tar")
            _pack(tree, layout, file_system(place), archives[-1], scratch)
    created = int(process.environment().get("SOURCE_DATE_EPOCH") or time.time())
    for group in layout.groups:
        lvm.write(layout, group, disk, created)
    labels = [ARCHIVE + "abcdefghijklmnopqrstuvwxyz"[number] for number in range(len(archives))]
    drives = [
        Drive(disk, DISK),
        *(Drive(*pair, readonly=True) for pair in zip(archives, labels, strict=True)),
    ]
    with launched(drives, scratch, accelerator) as guest:
        _require(guest, layout, places)
        # LVM finds devices through udev, which may still be at work on a busy host.
        run(guest, ["udevadm", "settle"])
        devices = Devices(functools.partial(run, guest), path_of(DISK), blank=True)
        with progress.step("make volumes"):
            for group in layout.groups:
                devices.activate(group)
            for place in places:
                devices.make_file_system(place)
        with progress.step("copy the files"):
            for place, label in zip(mounted, labels, strict=True):
                guest.mount(devices.path(place), "/")
                extract = ["tar", "--extract", "--file", path_of(label), "--directory", "/sysroot"]
                extract += ["--numeric-owner", "--preserve-permissions", "--delay-directory-restore"]
                run(guest, [*extract, *_ATTRIBUTES])
                guest.umount("/")
        for group in layout.groups:
            run(guest, ["vgchange", "--activate", "n", group.name])


def _pack(tree: Tree, layout: Layout, fs: FileSystem, archive: Path, scratch: Path) -> None:
    """Put what belongs on a file system into a tar archive."""
    argv = ["tar", "--create", "--file", str(archive), "--directory", str(tree.make_directory(fs.mountpoint))]
    argv += ["--format=posix", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--sparse"]
    argv += ["--numeric-owner", *_ATTRIBUTES, "."]
    process.run(native.masked(tree, native.below(layout, fs), argv, scratch))


@dataclass(frozen=True)
class Drive:
    """A disk of the appliance. label: letters only. form: raw or qcow2. readonly: what is written to it is
    thrown away.
    """

    path: Path
    label: str
    form: str = "raw"
    readonly: bool = False


@contextlib.contextmanager
def launched(drives: Sequence[Drive], scratch: Path, accelerator: str) -> Iterator[Any]:
    """A running appliance with the drives; shut down whatever happens.

    Raises HostError when it does not start, VdibuildError for what fails in it during the block.
    """
    try:
        import guestfs
    except ImportError as error:
        raise HostError(
            "libguestfs's Python binding is missing", "install python3-guestfs (Debian) or python3-libguestfs"
        ) from error
    with contextlib.ExitStack() as stack:
        guest = guestfs.GuestFS(python_return_dict=True)
        stack.callback(guest.close)
        guest.set_backend("direct")
        if accelerator == "tcg":
            # libguestfs would try KVM first, and hang where it is there but broken.
            guest.set_backend_setting("force_tcg", "1")
        guest.set_tmpdir(str(scratch))
        guest.set_memsize(_MEMORY)
        guest.set_smp(min(os.cpu_count() or 1, 4))
        for drive in drives:
            named = {"format": drive.form, "label": drive.label}
            if drive.readonly:
                guest.add_drive_opts(str(drive.path), readonly=True, **named)
            else:
                # A half-written disk is thrown away anyway: no need to wait for the host's disk at each sync.
                guest.add_drive_opts(str(drive.path), cachemode="unsafe", discard="besteffort", **named)
        with progress.step("start the appliance"):
            try:
                guest.launch()
            except RuntimeError as error:
                raise HostError(f"the libguestfs appliance does not start: {error}", _mend()) from error
        try:
            yield guest
            guest.shutdown()
        except RuntimeError as error:
            message = str(error)
            if "No space left on device" in message:
                raise VdibuildError(
                    f"the files do not fit onto the disk: {message.splitlines()[-1]}",
                    "make the disk or the volume larger, or install less",
                ) from error
            raise VdibuildError(f"in the libguestfs appliance: {message}") from error


def _mend() -> str:
    kernels = list(Path("/boot").glob("vmlinuz-*"))
    if kernels and not any(os.access(kernel, os.R_OK) for kernel in kernels):
        return "it needs a kernel it can read: sudo chmod 0644 /boot/vmlinuz-*"
    if not kernels:
        return "it needs a kernel in /boot: install linux-image-amd64 (Debian) or kernel-core (Fedora)"
    return "libguestfs-test-tool says why"


def _require(guest: Any, layout: Layout, places: Sequence[Partition | LogicalVolume]) -> None:
    needed = {"lvm2"} if layout.groups else set()
    needed |= {file_system(place).kind for place in places} & _PACKAGES.keys()
    for feature in sorted(needed):
        if not guest.feature_available([feature]):
            raise HostError(
                f"the libguestfs appliance has no {feature}", f"install {' and '.join(_PACKAGES[feature])}"
            )


def run(guest: Any, argv: Sequence[str]) -> str:
    """Run a program of the appliance; returns what it printed."""
    progress.log("appliance + " + " ".join(argv))
    output: str = guest.debug("sh", [shlex.join(argv)])
    for line in output.splitlines():
        progress.log(line)
    return output


def path_of(label: str) -> str:
    """A drive of the appliance (guestfs(3), "Disk labels")."""
    return f"/dev/disk/guestfs/{label}"


def device(place: Partition | LogicalVolume) -> str:
    """A partition or a logical volume of the drive that is labelled DISK."""
    return volumes.device(path_of(DISK), place)
