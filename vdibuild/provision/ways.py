"""Ways to put an image's system on a volume; the fastest that the image and the size allow is taken.

    copy    the disk's allocated blocks, then its last partition and file system grow
    unpack  the bundle's files, onto partitions and file systems made anew: also on a smaller disk; straight
            onto them where root may mount them, in a namespace that takes the mounts with it

An ext4 root is grown and gets its identity by e2fsprogs on the volume itself, in a fraction of a second. XFS,
btrfs and LVM need a running kernel: the libguestfs appliance's.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from vdibuild import bundle, families, process, progress
from vdibuild.disk import appliance, bootloader, ext4, ext4_files, grow, mkfs, mounted, native, write
from vdibuild.disk.appliance_files import GuestFiles
from vdibuild.disk.image import Image
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.disk.volumes import Devices
from vdibuild.errors import CommandError, HostError, SpaceError, VdibuildError
from vdibuild.manifest import Manifest
from vdibuild.output import sync
from vdibuild.provision import identity
from vdibuild.provision.identity import Identity
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.store import BUNDLE, DISK
from vdibuild.tree import Tree

_MIB = 1 << 20
_SECTOR = 512


@dataclass(frozen=True)
class Way:
    """How a volume gets its system. by: what changes it there. file: of the version, the one that is used."""

    name: Literal["copy", "unpack"]
    by: Literal["native", "mount", "appliance"]
    reason: str

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the version that are used as they are, and have to be checked before."""
        if self.name == "copy":
            return ()  # PreparedDisks checks what it prepares
        return (BUNDLE, DISK) if self.by == "mount" else (BUNDLE,)


def choose(layout: Layout, size: int) -> Way:
    """The fastest way for an image with that layout, and a volume of `size` MiB.

    Raises VdibuildError where there is none.
    """
    by, why = write.choose(layout)
    root = layout.mounts[0][0]
    if size < layout.size:
        grow.resized(layout, size)
        reason = f"{size} MiB are less than the image's {layout.size}: files onto new file systems"
        return Way("unpack", unpacking(layout), reason)
    if not isinstance(root, Partition) or root.holds != layout.root or layout.root.kind != "ext4":
        return Way("copy", "appliance", why if by == "appliance" else f"{layout.root.kind} on /")
    grown = grow.growing(layout)
    if size > layout.size and not _is_ext4(grown):
        return Way("copy", "appliance", f"the last partition is no ext4: {why}")
    return Way("copy", "native", "the image's allocated blocks; ext4 is changed where it lies")


def unpacking(layout: Layout) -> Literal["native", "mount", "appliance"]:
    """What is fastest to make an image's file systems anew and fill them."""
    by, _ = write.choose(layout)
    if by == "appliance":
        return "appliance"
    plain = all(fs.kind in ("ext4", "swap") for _, fs in layout.volumes)
    mounts = os.geteuid() == 0 and Path("/dev/loop-control").exists()
    return "mount" if plain and mounts and layout.firmware == "bios" else "native"


def needed(version: Path, way: Way, described: Manifest) -> int:
    """Bytes that the volume will have allocated at least."""
    if way.name == "unpack":
        return sum(file.size for name, file in described.files.items() if name == BUNDLE)
    argv = ["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", str(version / DISK)]
    extents = json.loads(process.run(argv, capture=True).stdout)
    return sum(extent["length"] for extent in extents if extent["data"])


@dataclass(frozen=True)
class Placement:
    """What goes where. version: the directory of the checked version. volume: a raw file that is all holes,
    or a block device; size: of the volume, in MiB. scratch: a directory for temporary files. prepared: the
    store's disks without their compression.
    """

    version: Path
    described: Manifest
    volume: Path
    size: int
    identity: Identity
    scratch: Path
    accelerator: Literal["kvm", "tcg"]
    prepared: PreparedDisks

    @property
    def layout(self) -> Layout:
        """The image's layout on this volume."""
        return grow.resized(self.described.layout, self.size)

    def put(self, way: Way) -> None:
        """Make the volume the disk of the machine; on return it is on the disk itself.

        Raises HostError when there is no room, VdibuildError when the system does not fit.
        """
        try:
            {"copy": self._copy, "unpack": self._unpack}[way.name](way)
            with progress.step("write to the disk"):
                sync(self.volume)
        except (CommandError, OSError) as error:
            tail = error.tail if isinstance(error, CommandError) else [str(error)]
            if any("No space left on device" in line for line in tail):
                raise HostError(
                    f"no space left for {self.volume}", "`virsh pool-info` tells the pool's room"
                ) from error
            raise

    def _copy(self, way: Way) -> None:
        self.prepared.copy(self.version / DISK, self.described.files[DISK].sha256, self.volume)
        if self.size != self.described.layout.size:
            native.write_table(self.layout, self.volume)
        if way.by == "native":
            with progress.step("grow"):
                self._grow_ext4()
            self._personalise_ext4()
        else:
            self._change_in_appliance()

    def _grow_ext4(self) -> None:
        grown = grow.growing(self.layout)
        if isinstance(grown, Partition) and self.size != self.described.layout.size:
            if not ext4.is_clean(self.volume, grown.start * _MIB, checked=True):
                grow.check_ext4(self.volume, grown)
            grow.grow_ext4(self.volume, grown)

    def _personalise_ext4(self) -> None:
        root, _ = self.layout.mounts[0]
        if not isinstance(root, Partition):
            raise TypeError("a root on LVM is the appliance's")
        with progress.step("personalise"):
            # It may have a journal to replay, which debugfs would not see.
            if not ext4.is_clean(self.volume, root.start * _MIB):
                grow.check_ext4(self.volume, root)
            with ext4_files.opened(self.volume, root.start * _MIB, self.scratch) as files:
                identity.write(files, families.get(self.described.family), self.identity)
            grow.check_ext4(self.volume, root)

    def _change_in_appliance(self) -> None:
        layout = self.layout
        drive = appliance.Drive(self.volume, appliance.DISK)
        with appliance.launched([drive], self.scratch, self.accelerator) as guest:
            devices = Devices(
                functools.partial(appliance.run, guest), appliance.path_of(appliance.DISK), False
            )
            with progress.step("grow and personalise"):
                for group in layout.groups:
                    devices.activate(group)
                grown = grow.growing(layout)
                if self.size != self.described.layout.size:
                    self._make_room(devices, grown)
                for place, fs in layout.mounts:
                    guest.mount(devices.path(place), fs.mountpoint)
                    if place == grown:
                        _grow_mounted(devices, fs)
                identity.write(GuestFiles(guest), families.get(self.described.family), self.identity)
                guest.umount_all()
                for group in layout.groups:
                    devices.run(["vgchange", "--activate", "n", group.name])

    def _make_room(self, devices: Devices, grown: Partition | LogicalVolume) -> None:
        """Let what grows have the room behind it: a logical volume, and an ext4 that is not mounted."""
        if isinstance(grown, LogicalVolume):
            devices.run(["pvresize", devices.path(grow.last_partition(self.layout))])
            free = devices.run(["vgs", "--noheadings", "--options", "vg_free_count", grown.group])
            if int(free):  # less than an extent is no room, and for lvextend an error
                devices.run(["lvextend", "--extents", "+100%FREE", devices.path(grown)])
        if _is_ext4(grown):
            # Status 1: it mended what needs no decision.
            devices.run(["sh", "-c", f"e2fsck -f -p {shlex.quote(devices.path(grown))} || test $? -eq 1"])
            devices.run(["resize2fs", devices.path(grown)])

    def _unpack(self, way: Way) -> None:
        if way.by == "mount":
            self._unpack_mounted()
            return
        family = families.get(self.described.family)
        root = self.scratch / "tree"
        root.mkdir()
        bundle.unpack(self.version / BUNDLE, root)
        system = Tree(root)
        identity.write(system, family, self.identity)
        device = self.volume.is_block_device()
        raw = self.scratch / "disk.raw" if device else self.volume
        with progress.step(f"write the disk ({way.by})"):
            write.write(system, self.layout, family.boot_files(system), raw, self.accelerator)
            if device:
                argv = ["qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw"]
                process.run([*argv, str(raw), str(self.volume)])

    def _unpack_mounted(self) -> None:
        """Make the file systems on the volume, and let tar write onto them, where nobody else sees them."""
        layout = self.layout
        native.write_table(layout, self.volume)
        empty = self.scratch / "mounted"
        empty.mkdir()
        places = []
        with progress.step("make file systems"):
            for place in layout.partitions:
                if isinstance(place.holds, FileSystem) and place.holds.kind == "ext4":
                    offset, size = place_of(place)
                    # What a block device held before is not all zeros.
                    blank = not self.volume.is_block_device()
                    argv = mkfs.ext4(place.holds, self.volume, offset=offset, size=place.size, blank=blank)
                    process.run(argv, env={"MKE2FS_CONFIG": "/dev/null"})
                    places.append((offset, size, place.holds.mountpoint))
                else:
                    native.write_partition(Tree(empty), layout, place, self.volume, self.scratch)
            self._copy_boot_loader(layout)
        places.sort(key=lambda one: PurePosixPath(one[2]).parts)
        try:
            bundle.unpack(
                self.version / BUNDLE, empty, lambda tar: mounted.command(empty, self.volume, places, tar)
            )
        except SpaceError as error:
            raise VdibuildError(
                f"the system does not fit onto a disk of {self.size} MiB", "give it a larger one: --size"
            ) from error
        self._personalise_ext4()

    def _copy_boot_loader(self, layout: Layout) -> None:
        """Copy GRUB's two parts from the image: their places are the same, and so is what they name."""
        image = Image(self.version / DISK, self.scratch)
        boot = layout.bios_boot
        start, size = place_of(boot) if boot else (_SECTOR, layout.partitions[0].start * _MIB - _SECTOR)
        with self.volume.open("r+b") as file:
            file.write(image.read(0, _SECTOR)[: bootloader.BOOT_CODE_END])
            file.seek(start)
            file.write(image.read(start, size))


def place_of(place: Partition) -> tuple[int, int]:
    """Where a partition begins, and its size, in bytes."""
    return place.start * _MIB, place.size * _MIB


def _grow_mounted(devices: Devices, fs: FileSystem) -> None:
    """Let a file system that grows while it is mounted in the appliance fill its volume."""
    place = f"/sysroot{fs.mountpoint}"
    if fs.kind == "xfs":
        devices.run(["xfs_growfs", place])
    elif fs.kind == "btrfs":
        devices.run(["btrfs", "filesystem", "resize", "max", place])


def _is_ext4(place: Partition | LogicalVolume) -> bool:
    return isinstance(place.holds, FileSystem) and place.holds.kind == "ext4"
