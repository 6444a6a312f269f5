"""Ways to put an image's system on a volume; the fastest that the image and the size allow is taken.

    copy    the disk's allocated blocks, then its last partition and file system grow
    unpack  the bundle's files, onto partitions and file systems made anew: also on a smaller disk, or on one
            with other file systems; straight onto them where root may mount them, in a namespace that takes
            the mounts with it

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
from vdibuild.disk import (
    appliance,
    bootloader,
    ext4,
    ext4_files,
    grow,
    mkfs,
    mounted,
    native,
    seal,
    write,
    zeros,
)
from vdibuild.disk.appliance_files import GuestFiles
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.disk.volumes import Devices
from vdibuild.errors import CommandError, HostError, SpaceError, VdibuildError
from vdibuild.families import BootFiles, Family
from vdibuild.output import sync
from vdibuild.provision import anew, identity
from vdibuild.provision.anew import Disk
from vdibuild.provision.identity import Identity
from vdibuild.provision.prepared import PreparedDisks
from vdibuild.provision.sources import Source
from vdibuild.tree import Tree

_MIB = 1 << 20


@dataclass(frozen=True)
class Way:
    """How a volume gets its system. by: what changes it there. layout: of the volume. anew: the system was
    not made for it.
    """

    name: Literal["copy", "unpack"]
    by: Literal["native", "mount", "appliance"]
    reason: str
    layout: Layout
    anew: bool = False


def choose(source: Source, size: int | None, disk: Disk | None) -> Way:
    """The fastest way for a system, and a volume of `size` MiB; by default the size of the disk it was on.

    disk: the file systems that are wanted, where it matters. Raises VdibuildError where there is none.
    """
    layout = source.layout
    size = size or (layout.size if layout else None)
    if size is None:
        raise VdibuildError(f"{source.name} was on no disk that says how large it is", "give it a --size")
    if disk or layout is None:
        return _anew(layout.firmware if layout else "bios", size, disk or Disk("ext4", 0))
    if source.disk is None or size < layout.size:
        resized = grow.resized(layout, size)
        by: Literal["native", "mount", "appliance"] = "appliance"
        if write.choose(layout)[0] == "native":
            by = unpacking(layout) if source.sealed else "native"
        less = f"{size} MiB are less than the image's {layout.size}: files onto new file systems"
        return Way("unpack", by, less if source.disk else "the bundle's files onto new file systems", resized)
    return _copying(layout, grow.resized(layout, size))


def _anew(firmware: str, size: int, disk: Disk) -> Way:
    layout = disk.plan(firmware, size)
    swap = f", {disk.swap} MiB of swap" if disk.swap else ""
    reason = f"files onto a new {disk.filesystem}{swap}"
    by: Literal["native", "appliance"] = "native" if write.choose(layout)[0] == "native" else "appliance"
    return Way("unpack", by, reason, layout, anew=True)


def _copying(layout: Layout, resized: Layout) -> Way:
    by, why = write.choose(layout)
    root = layout.mounts[0][0]
    if not isinstance(root, Partition) or root.holds != layout.root or layout.root.kind != "ext4":
        return Way("copy", "appliance", why if by == "appliance" else f"{layout.root.kind} on /", resized)
    if resized.size > layout.size and not _is_ext4(grow.growing(layout)):
        return Way("copy", "appliance", f"the last partition is no ext4: {why}", resized)
    return Way("copy", "native", "the image's allocated blocks; ext4 is changed where it lies", resized)


def unpacking(layout: Layout) -> Literal["native", "mount", "appliance"]:
    """What is fastest to make a sealed system's file systems anew and fill them."""
    by, _ = write.choose(layout)
    if by == "appliance":
        return "appliance"
    plain = all(fs.kind in ("ext4", "swap") for _, fs in layout.volumes)
    mounts = os.geteuid() == 0 and Path("/dev/loop-control").exists()
    return "mount" if plain and mounts and layout.firmware == "bios" else "native"


def needed(source: Source, way: Way) -> int:
    """Bytes that the volume will have allocated at least."""
    if way.name == "unpack" or source.disk is None:
        return source.size
    argv = ["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", str(source.disk[0])]
    extents = json.loads(process.run(argv, capture=True).stdout)
    return sum(extent["length"] for extent in extents if extent["data"])


@dataclass(frozen=True)
class Placement:
    """What goes where. source: the system, which was checked. volume: a raw file that is all holes, or a
    block device; size: of the volume, in MiB, at least that of the way's layout. site_directory: where
    templates are looked for first. scratch: a directory for temporary files. prepared: the store's disks
    without their compression.
    """

    source: Source
    way: Way
    volume: Path
    size: int
    identity: Identity
    scratch: Path
    site_directory: Path
    accelerator: Literal["kvm", "tcg"]
    prepared: PreparedDisks

    @property
    def layout(self) -> Layout:
        """The layout on this volume."""
        return grow.resized(self.way.layout, self.size)

    def put(self) -> None:
        """Make the volume the disk of the machine; on return it is on the disk itself.

        Raises HostError when there is no room, VdibuildError when the system does not fit.
        """
        try:
            # The system goes on zeros: what a device held before is not the machine's to see. One that cannot
            # forget by itself would take as long as writing all of it: it was erased when it was given back.
            blank = not self.volume.is_block_device() or zeros.by_itself(self.volume)
            {"copy": self._copy, "unpack": self._unpack}[self.way.name](blank)
            with progress.step("write to the disk"):
                sync(self.volume)
        except (CommandError, OSError) as error:
            tail = error.tail if isinstance(error, CommandError) else [str(error)]
            if any("No space left on device" in line for line in tail):
                raise HostError(
                    f"no space left for {self.volume}", "`virsh pool-info` tells the pool's room"
                ) from error
            raise

    def _copy(self, blank: bool) -> None:
        if self.source.disk is None:
            raise TypeError("a bundle is unpacked")
        self.prepared.copy(*self.source.disk, self.volume, blank=blank)
        if self._grows:
            native.write_table(self.layout, self.volume, sync=False)
        if self.way.by == "native":
            with progress.step("grow"):
                self._grow_ext4()
            self._personalise_ext4()
        else:
            self._change_in_appliance()

    @property
    def _grows(self) -> bool:
        return self.source.layout is None or self.size != self.source.layout.size

    @property
    def _family(self) -> Family:
        return families.get(self.source.family)

    def _grow_ext4(self) -> None:
        grown = grow.growing(self.layout)
        if isinstance(grown, Partition) and self._grows:
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
                identity.write(files, self._family, self.identity)
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
                if self._grows:
                    self._make_room(devices, grown)
                for place, fs in layout.mounts:
                    guest.mount(devices.path(place), fs.mountpoint)
                    if place == grown:
                        _grow_mounted(devices, fs)
                identity.write(GuestFiles(guest), self._family, self.identity)
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

    def _unpack(self, blank: bool) -> None:
        if self.way.by == "mount":
            self._unpack_mounted(blank)
            return
        family, layout = self._family, self.layout
        root = self.scratch / "tree"
        root.mkdir()
        bundle.unpack(self.source.archive, root)
        system = Tree(root)
        if self.way.anew:
            anew.move(system, family, layout, self.site_directory)
        elif not self.source.sealed:
            bootloader.prepare(system, layout, family.boot_files(system))
        identity.write(system, family, self.identity)
        if not self.source.sealed:
            with progress.step("remove what identifies the machine it was packed on"):
                seal.seal(system, family)
        device = self.volume.is_block_device()
        raw = self.scratch / "disk.raw" if device else self.volume
        with progress.step(f"write the disk ({self.way.by})"):
            write.write(system, layout, family.boot_files(system), raw, self.accelerator)
            if device:
                argv = ["qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw"]
                argv += ["--target-is-zero"] if blank else []
                process.run([*argv, str(raw), str(self.volume)])

    def _unpack_mounted(self, blank: bool) -> None:
        """Make the file systems on the volume, and let tar write onto them, where nobody else sees them."""
        layout = self.layout
        native.write_table(layout, self.volume, sync=False)
        empty = self.scratch / "mounted"
        empty.mkdir()
        places = []
        with progress.step("make file systems"):
            for place in layout.partitions:
                if isinstance(place.holds, FileSystem) and place.holds.kind == "ext4":
                    offset, size = place_of(place)
                    argv = mkfs.ext4(place.holds, self.volume, offset=offset, size=place.size, blank=blank)
                    process.run(argv, env={"MKE2FS_CONFIG": "/dev/null"})
                    places.append((offset, size, place.holds.mountpoint))
                else:
                    native.write_partition(Tree(empty), layout, place, self.volume, self.scratch)
        places.sort(key=lambda one: PurePosixPath(one[2]).parts)
        try:
            bundle.unpack(
                self.source.archive, empty, lambda tar: mounted.command(empty, self.volume, places, tar)
            )
        except SpaceError as error:
            raise VdibuildError(
                f"the system does not fit onto a disk of {self.size} MiB", "give it a larger one: --size"
            ) from error
        with progress.step("boot loader"):
            self._install_boot_loader(layout)
        self._personalise_ext4()

    def _install_boot_loader(self, layout: Layout) -> None:
        """Write GRUB's two parts, which a sealed system has in its /boot, where the firmware finds them."""
        place, fs = layout.holding("/boot")
        if not isinstance(place, Partition):
            raise TypeError("a /boot on LVM is the appliance's")
        inside = PurePosixPath("/boot").relative_to(fs.mountpoint)
        images = Tree(self.scratch)
        with ext4_files.opened(self.volume, place.start * _MIB, self.scratch) as files:
            directory = next(
                (name for name in ("grub", "grub2") if files.exists(f"/{inside / name}/i386-pc/core.img")),
                None,
            )
            if directory is None:
                raise VdibuildError(f"{self.source.name} has no GRUB for BIOS in its /boot", "build it again")
            boot = BootFiles(f"/boot/{directory}", "", "", {})
            modules = images.make_directory(f"{boot.grub_directory}/i386-pc")
            for name in ("boot.img", "core.img"):
                files.copy_out(f"/{inside / directory}/i386-pc/{name}", modules / name)
        bootloader.install(images, layout, boot, self.volume)


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
