"""The smallest disk that holds a system: any bootable Linux image, each file system as small as its content.

Nothing in the files is changed. Partitions keep numbers, UUIDs and names; volume groups, volumes and file
systems keep theirs. So fstab, the boot menu and the initramfs stay right, and what the firmware starts is
copied as it is. ext4 is shrunk block by block (resize2fs), FAT and swap are made anew by programs of this
host; XFS, which cannot shrink, is copied file by file, and btrfs shrunk, by the kernel of the libguestfs
appliance that the inspection has started anyway.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vdibuild import process, progress, verify
from vdibuild.disk import appliance, bootloader, ext4, inspection, lvm, mkfs, native, write
from vdibuild.disk.image import confined
from vdibuild.disk.inspection import Disk, Inspection
from vdibuild.disk.layout import FIRST, PHYSICAL_VOLUME_HEADER, FileSystem, Layout, LogicalVolume, Partition
from vdibuild.disk.structure import name_of
from vdibuild.errors import CommandError, InputError
from vdibuild.machine import Hardware
from vdibuild.output import sync
from vdibuild.scratch import beside

_MIB = 1 << 20
_SECTOR = 512
_SWAP = 8
"""MiB of a swap area: it holds nothing, and whoever makes a machine of the image gives it what it needs."""

_FAT32_SMALLEST = 36  # MiB: 65525 clusters of 512 bytes and their tables (FAT specification, FAT type)
_XFS_SMALLEST = 300  # MiB: mkfs.xfs refuses less
_XFS_LOG = 64  # MiB: the smallest that mkfs.xfs makes for a file system of 300 MiB and more
_XFS_OWN = 48  # MiB: what it keeps for its own trees (about 20), and for data that is not written yet
_EXT4_JOURNALS = ((32768, 1024), (262144, 4096), (524288, 8192))
_EXT4_LARGEST = 16384
"""Blocks of mke2fs's journals, by the file system's blocks (e2fsprogs: ext2fs_default_journal_size)."""


@dataclass(frozen=True)
class Shrunk:
    """A shrunk image. layout: of the new disk. before, after: its sizes; stored: the file's; in bytes.

    started: how many seconds it took to start, by firmware; empty when it was not booted.
    """

    found: Inspection
    layout: Layout
    before: int
    after: int
    stored: int
    started: Mapping[Literal["bios", "uefi"], float]


@dataclass(frozen=True)
class _Content:
    """A volume's new content: a part of a sparse file. offset and size in bytes."""

    file: Path
    offset: int
    size: int


def shrink(
    source: Path,
    output: Path,
    *,
    headroom: int,
    accelerator: Literal["kvm", "tcg"],
    boot_seconds: float | None,
    memory: int = 1024,
) -> Shrunk:
    """Write the smallest image that holds a disk's content: a qcow2 whose clusters zstd compresses.

    source: a raw image, a qcow2 or a block device, which is only read. output: appears when it is whole.
    headroom: MiB that each file system has free, or what it has free now, if that is less. accelerator: kvm
    or tcg. boot_seconds: how long it may take to start, in a machine with `memory` MiB, before it appears;
    None not to boot it. Raises InputError before anything is done for a disk that is not understood,
    VerificationError when the result does not start.
    """
    if output.exists() and output.samefile(source):
        raise InputError(output, None, "would be written over the image it is made from", "name another file")
    with beside(output) as scratch:
        with inspection.opened(source, scratch, accelerator) as disk:
            _check_boot_loader(disk)
            _check_room(disk, headroom)
            contents = _Contents(disk, scratch, headroom).all()
            found = disk.found
            planned = plan(found.layout, {name: content.size // _MIB for name, content in contents.items()})
            if planned.size >= found.size // _MIB:
                raise _full(disk, planned.size, headroom)
            raw = scratch / "disk.raw"
            with progress.step("assemble"):
                _assemble(disk, planned, contents, raw)
        with progress.step("compress"):
            compressed = scratch / "disk.qcow2"
            write.compress(raw, compressed)
        started: dict[Literal["bios", "uefi"], float] = {}
        if boot_seconds is not None:
            for firmware in _firmwares(found):
                with progress.step(f"boot it with {firmware.upper()}"):
                    started[firmware] = verify.starts(
                        compressed,
                        "qcow2",
                        Hardware(firmware, memory, accelerator),
                        seconds=boot_seconds,
                        picture=output.with_name(f"{output.name}.png"),
                        work=scratch,
                    )
        stored = _publish(compressed, output)
    return Shrunk(found, planned, found.size, planned.size * _MIB, stored, started)


def _firmwares(found: Inspection) -> tuple[Literal["bios", "uefi"], ...]:
    return ("bios", "uefi") if found.firmware == "both" else (found.firmware,)


def plan(layout: Layout, sizes: Mapping[str, int]) -> Layout:
    """The layout with volumes of these sizes (MiB, by `structure.name_of`), packed from its beginning.

    Order, numbers, UUIDs and names stay. A volume group's extents all lie on its first physical volume; its
    others stay as small as they can be.
    """
    logical = tuple(
        replace(volume, size=-(-sizes[name_of(volume)] // extent) * extent)
        for volume in layout.logical
        for extent in [next(group.extent for group in layout.groups if group.name == volume.group)]
    )
    position = max(FIRST, layout.partitions[0].start)
    partitions: list[Partition] = []
    container = None
    for partition in layout.partitions:
        if _is_extended(partition):
            container = len(partitions)
            partitions.append(replace(partition, start=position, size=0))
            continue
        inside = layout.table == "msdos" and partition.number > 4
        position += 1 if inside else 0  # each logical partition's own table
        size = _partition_size(layout, partition, logical, sizes)
        partitions.append(replace(partition, start=position, size=size))
        position += size
        if inside and container is not None:
            outer = partitions[container]
            partitions[container] = replace(outer, size=position - outer.start)
    end = position + (1 if layout.table == "gpt" else 0)
    return replace(layout, size=end, partitions=tuple(partitions), logical=logical)


def _partition_size(
    layout: Layout, partition: Partition, logical: tuple[LogicalVolume, ...], sizes: Mapping[str, int]
) -> int:
    if isinstance(partition.holds, FileSystem):
        return sizes[name_of(partition)]
    group = next(group for group in layout.groups if group.name == partition.holds)
    size = PHYSICAL_VOLUME_HEADER + group.extent
    if partition is layout.physical(group)[0]:
        total = sum(volume.size for volume in logical if volume.group == group.name)
        size = PHYSICAL_VOLUME_HEADER + max(total, group.extent)
    return size


def _is_extended(partition: Partition) -> bool:
    return isinstance(partition.holds, FileSystem) and partition.holds.kind == "extended"


def _check_boot_loader(disk: Disk) -> None:
    """Refuse, before anything is done, a boot loader that would not survive the move."""
    found, core = disk.found, disk.found.boot.core
    if core is None:
        return
    place = found.layout.bios_boot
    start, size = found.pieces[name_of(place)][0] if place else (_SECTOR, _first_start(found) - _SECTOR)
    if not start <= core * _SECTOR < start + size:
        raise InputError(
            disk.image.path,
            None,
            f"GRUB's core image is at sector {core}, in no place of its own",
            "install GRUB without --force: into the gap before the first partition, or a BIOS boot partition",
        )


def _check_room(disk: Disk, headroom: int) -> None:
    """Refuse, before anything is done, a disk that is full."""
    needed = sum(
        usage.used + min(headroom * _MIB, usage.total - usage.used) for usage in disk.found.usage.values()
    )
    if needed // _MIB + FIRST >= disk.found.size // _MIB:
        raise _full(disk, needed // _MIB + FIRST, headroom)


def _full(disk: Disk, needed: int, headroom: int) -> InputError:
    return InputError(
        disk.image.path,
        None,
        f"it cannot shrink: its content needs {needed} MiB of {disk.found.size // _MIB} MiB",
        f"less headroom than {headroom} MiB might do" if headroom else "",
    )


def _first_start(found: Inspection) -> int:
    return min(found.pieces[name_of(partition)][0][0] for partition in found.layout.partitions)


class _Contents:
    """Makes each volume's new content."""

    def __init__(self, disk: Disk, scratch: Path, headroom: int) -> None:
        self._disk = disk
        self._scratch = scratch
        self._headroom = headroom
        self._area = 0  # where the next new file system goes on the appliance's second disk, in bytes

    def all(self) -> dict[str, _Content]:
        layout = self._disk.found.layout
        result: dict[str, _Content] = {}
        for place, fs in layout.volumes:
            name = name_of(place)
            with progress.step(f"shrink {fs.mountpoint if fs.mountpoint != '' else name}") as step:
                result[name] = self._content(place, fs)
                step.note(f"{fs.kind}, {self._present(place)} MiB to {result[name].size // _MIB} MiB")
        if layout.bios_boot:
            name = name_of(layout.bios_boot)
            result[name] = self._copied(name)
        if self._area:
            self._disk.release()
        return result

    def _content(self, place: Partition | LogicalVolume, fs: FileSystem) -> _Content:
        if fs.kind == "ext4":
            return self._ext4(place)
        if fs.kind == "vfat":
            return self._vfat(place, fs)
        if fs.kind == "swap":
            return self._swap(place, fs)
        return self._in_guest(place, fs)

    def _free(self, place: Partition | LogicalVolume) -> int:
        """MiB that a file system is to have free."""
        usage = self._disk.found.usage[name_of(place)]
        return min(self._headroom, (usage.total - usage.used) // _MIB)

    def _present(self, place: Partition | LogicalVolume) -> int:
        """MiB that a volume has now."""
        return sum(length for _, length in self._disk.found.pieces[name_of(place)]) // _MIB

    def _new(self, name: str, size: int) -> Path:
        """A new sparse file of `size` MiB."""
        file = self._scratch / f"new-{re.sub(r'[^A-Za-z0-9]', '-', name)}"
        with file.open("wb") as output:
            output.truncate(size * _MIB)
        file.chmod(0o600)
        return file

    def _copied(self, name: str) -> _Content:
        """A volume as it is; what is missing to a whole MiB is added."""
        file = self._new(name, 0)
        self._disk.image.cut(self._disk.found.pieces[name], file)
        return self._whole(file)

    # By programs of this host

    def _ext4(self, place: Partition | LogicalVolume) -> _Content:
        volume = self._disk.volume(place)
        self._run(["e2fsck", "-f", "-p", str(volume)], volume, place)
        size = most = self._ext4_size(volume)
        journal = ext4.journal(volume, self._scratch) // 4
        wanted = self._ext4_least(volume, size) + self._free(place)
        fitting = _fitting_journal(wanted * 256)
        if smaller := journal > fitting:
            # A file system that was made for a large disk has a large journal, which would not shrink.
            self._run(["tune2fs", "-O", "^has_journal", str(volume)], volume, place)
            wanted = self._ext4_least(volume, size) + self._free(place) + fitting // 256
        if wanted < size:
            self._remember_times(volume)
        while wanted < size:
            self._run(["resize2fs", str(volume), f"{wanted}M"], volume, place)
            size = wanted
            # It estimates from what it finds, and finds less in a smaller one.
            less = self._ext4_least(volume, size) + self._free(place) + (fitting // 256 if smaller else 0)
            if less > size - max(8, size // 50):
                break
            wanted = less
        self._restore_times(volume)
        if smaller:
            self._run(["tune2fs", "-j", "-J", f"size={fitting // 256}", str(volume)], volume, place)
        # Tables of the groups' own take some of what the estimate leaves free.
        while (missing := self._free(place) - self._ext4_free(volume)) > 0 and size < most:
            size = min(most, size + missing + 1)
            self._run(["resize2fs", str(volume), f"{size}M"], volume, place)
        # Free blocks become holes: nothing of deleted files is left, and holes need no compressing.
        self._run(["e2fsck", "-f", "-y", "-E", "discard", str(volume)], volume, place)
        return self._whole(volume)

    def _ext4_size(self, volume: Path) -> int:
        """MiB of an ext4 file system, rounded down."""
        count, block = ext4.numbers(volume, self._scratch, "Block count", "Block size")
        return count * block // _MIB

    def _ext4_least(self, volume: Path, size: int) -> int:
        """MiB that an ext4 file system needs, as resize2fs estimates; never more than it has."""
        said = self._said(["resize2fs", "-P", str(volume)])
        (block,) = ext4.numbers(volume, self._scratch, "Block size")
        return min(size, -(-int(said.split()[-1]) * block // _MIB))

    def _ext4_free(self, volume: Path) -> int:
        """MiB that are free on an ext4 file system."""
        free, block = ext4.numbers(volume, self._scratch, "Free blocks", "Block size")
        return free * block // _MIB

    def _remember_times(self, volume: Path) -> None:
        """Keep when each directory was changed in its field `version`, which only an NFS server looks at.

        resize2fs moves inodes to the front, and says of each directory that names one that it was changed.
        """
        found = self._directories(volume)
        self._edit(volume, [f"<{one.number}> version {_seconds(one)}" for one in found])

    def _restore_times(self, volume: Path) -> None:
        changed = [one for one in self._directories(volume) if _seconds(one) != one.version]
        self._edit(volume, [f"<{one.number}> mtime @{one.version}" for one in changed])

    def _directories(self, volume: Path) -> list[ext4.Inode]:
        return [inode for inode in ext4.inodes(volume, self._scratch) if stat.S_ISDIR(inode.mode)]

    def _edit(self, volume: Path, fields: list[str]) -> None:
        script = "".join(f"set_inode_field {field}\n" for field in fields)
        argv = confined(["debugfs", "-w", "-f", "-", str(volume)], self._scratch)
        process.run(argv, stdin=script, capture=True)

    def _vfat(self, place: Partition | LogicalVolume, fs: FileSystem) -> _Content:
        usage, name = self._disk.found.usage[name_of(place)], name_of(place)
        wide = (
            self._disk.found.types[name] == "vfat"
            and self._disk.volume(place).open("rb").read(90)[82:87] == b"FAT32"
        )
        tables = 2 * usage.used // 128 // _MIB + 2  # two tables of 4 bytes for each cluster of 512
        size = max(_FAT32_SMALLEST if wide else 4, -(-usage.used // _MIB) + tables + self._free(place))
        if size >= self._present(place):
            return self._whole(self._disk.volume(place))
        file = self._new(name, size)
        process.run([*mkfs.vfat(fs, file, 0), *(["-F", "32"] if wide else [])])
        drives = self._scratch / "mtoolsrc"
        drives.write_text(
            f'drive a: file="{self._disk.volume(place)}"\ndrive b: file="{file}"\nmtools_skip_check=1\n'
        )
        listed = self._said(["mdir", "-b", "a:/"], drives).splitlines()
        if listed:
            copy = ["mcopy", "-s", "-m", "-p", "-n", "-Q", *listed, "b:/"]
            process.run(confined(copy, self._scratch), env={"MTOOLSRC": str(drives)})
        return _Content(file, 0, size * _MIB)

    def _whole(self, file: Path) -> _Content:
        size = -(-file.stat().st_size // _MIB) * _MIB
        os.truncate(file, size)
        return _Content(file, 0, size)

    def _swap(self, place: Partition | LogicalVolume, fs: FileSystem) -> _Content:
        size = min(_SWAP, self._present(place))
        file = self._new(name_of(place), size)
        process.run(mkfs.swap(fs, file))
        return _Content(file, 0, size * _MIB)

    def _run(self, argv: list[str], volume: Path, place: Partition | LogicalVolume) -> None:
        done = process.run(confined(argv, self._scratch), capture=True, check=False)
        if done.status > 1:  # e2fsck: 1 says that something was mended
            raise CommandError(
                argv,
                done.status,
                done.stdout.splitlines()[-process.TAIL_LINES :],
                f"{argv[0]} cannot work on {name_of(place)} of {self._disk.image.path}",
                "the file system may be damaged: e2fsck -f in the machine may mend it",
            )

    def _said(self, argv: list[str], drives: Path = Path("/dev/null")) -> str:
        env = {"MTOOLSRC": str(drives)}
        return process.run(confined(argv, self._scratch), capture=True, env=env).stdout

    # By the appliance's kernel

    def _in_guest(self, place: Partition | LogicalVolume, fs: FileSystem) -> _Content:
        guest = self._disk.guest()
        size = self._xfs(guest, place, fs) if fs.kind == "xfs" else self._btrfs(guest, place)
        if size is None:
            return self._copied(name_of(place))
        content = _Content(self._disk.second, self._area, size * _MIB)
        self._area += size * _MIB
        return content

    def _xfs(self, guest: Any, place: Partition | LogicalVolume, fs: FileSystem) -> int | None:
        """Copy its files into a new one; returns its size in MiB, None where it would be no smaller."""
        device = appliance.device(place)
        _sh(guest, f"mkdir -p /tmp/from /tmp/to && mount -t xfs -o ro,nouuid {device} /tmp/from")
        # Where files share blocks (reflinks), the copies need more than is in use now.
        files = int(_sh(guest, "du --summarize --block-size=1M --one-file-system /tmp/from").split()[0])
        used = -(-self._disk.found.usage[name_of(place)].used // _MIB)
        own = _XFS_LOG + _XFS_OWN + files // 64
        size = max(_XFS_SMALLEST, max(files, used) + own + self._free(place))
        if size >= self._present(place):
            _sh(guest, "umount /tmp/from")
            return None
        new = self._new_device(guest, size)
        appliance.run(guest, _like(fs, new, _sh(guest, "xfs_info /tmp/from")))
        _sh(guest, _WRITE_SOON)
        # allocsize: it does not set aside more for a file than that has.
        _sh(guest, f"mount -t xfs -o nouuid,allocsize=4k {new} /tmp/to")
        _sh(guest, "cp --archive --sparse=auto /tmp/from/. /tmp/to/")
        _sh(guest, _KEEP_FLAGS)
        _sh(guest, f"umount /tmp/to && umount /tmp/from && dmsetup remove {shlex.quote(new)}")
        return size

    def _btrfs(self, guest: Any, place: Partition | LogicalVolume) -> int:
        """Shrink it in place, on the appliance's overlay of the source, and copy what is left of it.

        Returns its size in MiB.
        """
        device, total = appliance.device(place), self._present(place)
        used = -(-self._disk.found.usage[name_of(place)].used // _MIB)
        _sh(guest, f"mkdir -p /tmp/from && mount -t btrfs {device} /tmp/from")
        size = int(_sh(guest, _SQUEEZE, str(total), str(used)).split()[-1])
        free, block = map(int, _sh(guest, "stat --file-system --format '%f %S' /tmp/from").split())
        missing = self._free(place) - free * block // _MIB
        if missing > 0:
            size = min(total, size + missing)
            _sh(guest, f"btrfs filesystem resize {size}M /tmp/from")
        _sh(guest, "umount /tmp/from")
        new = self._new_device(guest, size)
        _sh(guest, f"dd if={device} of={new} bs=1M count={size} conv=sparse,fsync")
        # What its files have left behind where they were is no part of the new one. The kernel knows the old
        # one by the same UUID, until it is told to forget it.
        _sh(guest, f"btrfs device scan --forget; mount -t btrfs {new} /tmp/from; fstrim /tmp/from")
        _sh(guest, f"umount /tmp/from; dmsetup remove {shlex.quote(new)}")
        return size

    def _new_device(self, guest: Any, size: int) -> str:
        """A device of `size` MiB on the appliance's second disk, behind those before it."""
        sectors = size * _MIB // _SECTOR
        second = appliance.path_of(appliance.ARCHIVE)
        table = f"0 {sectors} linear {second} {self._area // _SECTOR}"
        _sh(guest, f"echo {shlex.quote(table)} | dmsetup create new")
        _sh(guest, "udevadm settle")
        return "/dev/mapper/new"


_SQUEEZE = """
size=$1 least=$2
squeeze() {
    step=$((size / 2))
    while [ $step -ge 8 ]; do
        next=$((size - step))
        if [ $next -ge $least ] && btrfs filesystem resize ${next}M /tmp/from >/dev/null 2>&1
        then size=$next
        else step=$((step / 2))
        fi
        [ $step -le $((size / 2)) ] || step=$((size / 2))
    done
}
squeeze
size=$((size * 14 / 10))
[ $size -le $1 ] || size=$1
btrfs filesystem resize ${size}M /tmp/from
btrfs balance start --full-balance /tmp/from || true
squeeze
echo $size
"""
"""Makes the btrfs on /tmp/from as small as the kernel lets it be; its arguments are its size, and a size that
is too small, in MiB. min-dev-size and resize know only of whole chunks, which are as large as the file system
was: so it is shrunk, its chunks are made anew, with room for that and smaller, and it is shrunk again."""

_WRITE_SOON = "cd /proc/sys/vm; echo 1048576 >dirty_background_bytes; echo 4194304 >dirty_bytes"
"""For data that is not written yet XFS keeps several blocks a file, whatever the file's size; where thousands
of them wait, there is no room for others. So only these bytes may wait."""

_KEEP_FLAGS = r"""
cd /tmp/from && lsattr -R -a . 2>/dev/null | sed -n 's/^[-A-Zb-z]*\([ai]\)[-A-Za-z]* \(.*\)$/\1 \2/p' |
while read -r flag name; do chattr "+$flag" "/tmp/to/$name"; done; cd /
"""
"""Files that cannot be changed, or only grow, stay so; cp does not know of that."""


def _sh(guest: Any, script: str, *arguments: str) -> str:
    return appliance.run(guest, ["sh", "-e", "-c", script, "sh", *arguments])


def _like(fs: FileSystem, device: str, info: str) -> list[str]:
    """mkfs.xfs with the features of the file system that `xfs_info` describes: its own kernel reads those."""
    found = dict(re.findall(r"(\w+)=(\d+)", info))
    options = {
        "-m": ("crc", "finobt", "rmapbt", "reflink", "bigtime", "inobtcount"),
        "-i": ("sparse", "nrext64", "exchange"),
        "-n": ("ftype", "parent"),
    }
    # What this mkfs.xfs knows and the file system's xfs_info does not name is older than both.
    argv = ["mkfs.xfs", "-q", "-f", "-K", "-m", f"uuid={fs.uuid}", "-i", f"size={found.get('isize', '512')}"]
    for option, names in options.items():
        argv += [word for name in names if name in found for word in (option, f"{name}={found[name]}")]
    return [*argv, *(["-L", fs.label] if fs.label else []), device]


def _seconds(inode: ext4.Inode) -> int:
    """The 32 bits that hold the seconds of its time; those beyond are with the nanoseconds, and stay."""
    return inode.mtime_ns // 1_000_000_000 & 0xFFFFFFFF


def _fitting_journal(blocks: int) -> int:
    """Blocks of the journal that mke2fs would make for a file system of that many."""
    return next((journal for limit, journal in _EXT4_JOURNALS if blocks < limit), _EXT4_LARGEST)


# The new disk


def _assemble(disk: Disk, layout: Layout, contents: Mapping[str, _Content], raw: Path) -> None:
    with raw.open("wb") as file:
        file.truncate(layout.size * _MIB)
    native.write_table(layout, raw)
    for group in layout.groups:
        lvm.write(layout, group, raw, int(process.environment().get("SOURCE_DATE_EPOCH", "0")))
    places: list[Partition | LogicalVolume] = [*layout.partitions, *layout.logical]
    for place in places:
        content = contents.get(name_of(place))
        if content is None:
            continue
        position = content.offset
        targets = (
            lvm.pieces(layout, place)
            if isinstance(place, LogicalVolume)
            else [(place.start * _MIB, place.size * _MIB)]
        )
        for offset, size in targets:
            size = min(size, content.offset + content.size - position)
            native.place(content.file, raw, offset, position, size)
            position += size
    _copy_boot_loader(disk, layout, raw)


def _copy_boot_loader(disk: Disk, layout: Layout, raw: Path) -> None:
    """Copy what a BIOS starts: the boot code, and where it is not in a partition GRUB's core image."""
    found = disk.found
    if found.boot.core is None:
        return
    first = disk.image.read(0, _SECTOR)
    place = layout.bios_boot
    with raw.open("r+b") as file:
        if place is None:
            gap = disk.image.read(_SECTOR, min(_first_start(found), FIRST * _MIB) - _SECTOR)
            file.seek(_SECTOR)
            file.write(gap)
        else:
            distance = place.start * _MIB // _SECTOR - found.pieces[name_of(place)][0][0] // _SECTOR
            core = found.boot.core + distance
            file.seek(core * _SECTOR)
            image = file.read(_SECTOR)
            first, image = bootloader.move(first, image, distance)
            file.seek(core * _SECTOR)
            file.write(image)
        file.seek(0)
        file.write(first[: bootloader.BOOT_CODE_END])


def _publish(file: Path, output: Path) -> int:
    """Make a finished file appear under its name; returns its size in bytes."""
    sync(file)
    file.rename(output)
    sync(output.parent)
    return output.stat().st_size
