"""What is on a disk: any bootable Linux image, read without being changed, and its content as a tree.

    with inspection.opened(path, scratch, accelerator) as disk:
        disk.found                  # partitions, volumes, file systems, boot loader, operating system
        disk.extract(directory)     # all files, with everything that is known about them

Tables, volume groups and superblocks are read here. The files of ext4 and FAT are read by programs too; for
XFS and btrfs a running kernel is needed: the libguestfs appliance is started then, once, and serves for
everything. What is not understood is refused before anything is done.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vdibuild import archive, families, process, progress
from vdibuild.disk import appliance, bootloader, ext4, times
from vdibuild.disk.appliance import Drive
from vdibuild.disk.image import Image, confined
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition
from vdibuild.disk.structure import Structure, name_of
from vdibuild.errors import InputError
from vdibuild.tree import Tree, host_command

_SPARE = 1 << 30  # bytes
_LONGEST = 1 << 20  # characters of an fstab or an os-release
_ESP_TYPES = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "ef")
_VIRTUAL = {
    *(
        "proc",
        "sysfs",
        "tmpfs",
        "devpts",
        "devtmpfs",
        "cgroup",
        "cgroup2",
        "debugfs",
        "tracefs",
        "securityfs",
    ),
    *("hugetlbfs", "mqueue", "binfmt_misc", "overlay", "autofs", "none", "efivarfs", "configfs"),
    *("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs", "iso9660", "udf"),
}
_ELSEWHERE = {"nofail", "noauto", "_netdev"}
"""Options under which a system starts without the device."""

_USUAL = {"vfat": "umask=0077"}


@dataclass(frozen=True)
class Usage:
    """How full a file system is, in bytes."""

    used: int
    total: int


@dataclass(frozen=True)
class Mount:
    """A line of the system's fstab that mounts a file system of this disk. place: see `structure.name_of`."""

    place: str
    mountpoint: str
    options: str


@dataclass(frozen=True)
class BootLoader:
    """What starts the system. core: the sector of GRUB's core image for BIOS, or None.

    programs: the EFI programs, as paths of the EFI system partition.
    """

    core: int | None
    programs: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found on a disk.

    layout: what disk.write could make again; a size or a start that is no whole MiB is rounded down, ext2
    and ext3 are called ext4, options that name a btrfs subvolume are left out. size: bytes. family: debian
    or redhat. os: os-release. usage; pieces, offset and size in bytes; types, the file systems' own names
    (ext3): by `structure.name_of`. mounts: of fstab, each after those it is mounted on.
    """

    layout: Layout
    size: int
    firmware: Literal["bios", "uefi", "both"]
    family: str
    os: Mapping[str, str]
    usage: Mapping[str, Usage]
    mounts: tuple[Mount, ...]
    boot: BootLoader
    pieces: Mapping[str, tuple[tuple[int, int], ...]]
    types: Mapping[str, str]


class Disk:
    """An inspected disk. found: what is on it."""

    def __init__(self, image: Image, scratch: Path, accelerator: str, stack: contextlib.ExitStack) -> None:
        self.image = image
        self._scratch = scratch
        self._accelerator = accelerator
        self._running = stack.enter_context(contextlib.ExitStack())
        self._volumes: dict[str, Path] = {}
        self._guest: Any = None
        self._archive = scratch / "content.tar"
        self._structure = Structure(image)
        self.found = self._inspect()

    @property
    def native(self) -> bool:
        """Whether every file system can be read by a program, without a kernel that mounts it."""
        return all(fs.kind in ("ext4", "vfat", "swap") for _, fs in self._structure.layout.volumes)

    def volume(self, place: Partition | LogicalVolume) -> Path:
        """A partition or a logical volume as a sparse file of its own, which may be changed.

        The journal of an ext4 file system has been replayed in it.
        """
        name = name_of(place)
        if name not in self._volumes:
            output = self._scratch / f"volume-{len(self._volumes)}"
            self.image.cut(self._structure.pieces[name], output)
            if self._structure.kind(place) == "ext4":
                ext4.replay(output, self._scratch, f"{self.image.path} ({name})")
            self._volumes[name] = output
        return self._volumes[name]

    def guest(self) -> Any:
        """The appliance, with this disk as its first; what it writes to it is thrown away."""
        if self._guest is None:
            with self._archive.open("wb") as file:
                file.truncate(2 * self._structure.size + _SPARE)
            disk = Drive(self.image.path, appliance.DISK, self.image.form, readonly=True)
            drives = [disk, Drive(self._archive, appliance.ARCHIVE)]
            self._guest = self._running.enter_context(
                appliance.launched(drives, self._scratch, self._accelerator)
            )
        return self._guest

    @property
    def second(self) -> Path:
        """The appliance's second disk: a raw, sparse file, larger than this disk, for what it puts out."""
        return self._archive

    def release(self) -> None:
        """Shut the appliance down, so that all it wrote is in `second`; it starts anew when it is needed."""
        if self._guest is not None:
            self._running.close()
            self._guest = None

    def extract(self, directory: Path) -> Tree:
        """Copy all files into a new directory, as the running system would see them.

        They keep owners, modes, times, extended attributes (ACLs, capabilities, SELinux labels), hard links
        and holes; sockets are left out. Raises InputError for a file system that fstab does not mount.
        """
        layout, mounts = self.found.layout, self.found.mounts
        mounted = {mount.place for mount in mounts}
        for place, fs in layout.volumes:
            if fs.kind != "swap" and name_of(place) not in mounted and not _is_esp(place):
                raise InputError(
                    self.image.path,
                    None,
                    f"{name_of(place)} holds {fs.kind}, but /etc/fstab does not mount it",
                )
        directory.mkdir()
        directory.chmod(0o755)
        with progress.step("copy the files out"):
            # Without fuse2fs, which EL lacks, the appliance does it.
            if self.native and process.find("fuse2fs") and Path("/dev/fuse").exists():
                self._extract_natively(Tree(directory))
            else:
                self._extract_through_guest(directory)
        return Tree(directory)

    # What the disk says

    def _inspect(self) -> Inspection:
        structure = self._structure
        with progress.step("inspect") as step:
            reader = _ByProgram(self) if self.native else _ByGuest(self)
            roots = reader.roots()
            if not roots:
                raise self._refused("no operating system was found on it", "is it a bootable Linux disk?")
            if len(roots) > 1:
                systems = ", ".join(root.os.get("PRETTY_NAME", "Linux") for root in roots)
                raise self._refused(f"there are {len(roots)} systems on it: {systems}")
            root = roots[0]
            family = families.of(root.os)
            if family is None:
                raise self._refused(f"it holds {root.os.get('PRETTY_NAME', 'a system')}", "neither is known")
            mounts, options = self._mounts(root)
            layout = _mounted(structure.layout, mounts, options)
            boot = self._boot_loader(layout)
            firmware = self._firmware(boot)
            layout = replace(layout, firmware="bios" if firmware == "both" else firmware)
            step.note(f"{root.os.get('PRETTY_NAME', family)}, {firmware}, {layout.size} MiB")
            return Inspection(
                layout=layout,
                size=self.image.size,
                firmware=firmware,
                family=family,
                os=root.os,
                usage=reader.usage(),
                mounts=tuple(mounts),
                boot=boot,
                pieces=structure.pieces,
                types=structure.types,
            )

    def _mounts(self, root: _Root) -> tuple[list[Mount], dict[str, str]]:
        """The mounts of the system's fstab, and the options of its swap areas."""
        mounts, swaps = [Mount(root.place, "/", "")], {}
        for source, mountpoint, kind, options in _fstab(root.fstab):
            words = set(options.split(","))
            if (kind in _VIRTUAL and not source.startswith(("UUID=", "LABEL="))) or words & {"bind", "rbind"}:
                continue
            found = self._structure.named(source)
            if found is None:
                if source.startswith("/") and not source.startswith("/dev/"):
                    continue  # a swap file, an image, …
                if words & _ELSEWHERE or ":" in source or source.startswith("//") or source in _VIRTUAL:
                    continue
                raise self._refused(
                    f"/etc/fstab mounts {source} on {mountpoint}, which is not on this disk",
                    "systems on several disks are not understood; nofail would say that it can do without",
                )
            if kind == "swap":
                swaps[found] = options
            elif mountpoint == "/":
                mounts[0] = Mount(root.place, "/", options)
            elif mountpoint.startswith("/"):
                mounts.append(Mount(found, str(PurePosixPath(mountpoint)), options))
        return sorted(mounts, key=lambda mount: PurePosixPath(mount.mountpoint).parts), swaps

    def _boot_loader(self, layout: Layout) -> BootLoader:
        core = bootloader.core_of(self.image.read(0, 512))
        programs: list[str] = []
        for partition in layout.partitions:
            if _is_esp(partition):
                programs += _programs(self.volume(partition), self._scratch)
        return BootLoader(core, tuple(sorted(programs)))

    def _firmware(self, boot: BootLoader) -> Literal["bios", "uefi", "both"]:
        if boot.core is not None:
            return "both" if boot.programs else "bios"
        if not boot.programs:
            raise self._refused(
                "nothing on it is known to boot it", "GRUB 2 for BIOS, and any EFI program, are understood"
            )
        return "uefi"

    def _refused(self, message: str, hint: str = "") -> InputError:
        return InputError(self.image.path, None, message, hint)

    # Its files

    def _extract_natively(self, tree: Tree) -> None:
        places = {name_of(place): place for place, _ in self.found.layout.volumes}
        for mount in self.found.mounts:
            target = tree.make_directory(mount.mountpoint)
            volume = self.volume(places[mount.place])
            if self._structure.types[mount.place] == "vfat":
                copy = ["mcopy", "-i", str(volume), "-s", "-m", "-p", "-n", "-Q", "::/", str(target)]
                process.run(host_command(copy), env={"MTOOLSRC": "/dev/null"})
                continue
            packed = self._archive
            # The mount is in a namespace of its own, which ends, and with it the file system's program.
            script = 'fuse2fs -o ro "$1" "$2" && find "$2" -xdev -printf "%i\\0%P\\0" >"$3" && shift 3 && '
            script += 'exec "$@"'
            mountpoint, listed = self._scratch / "mounted", self._scratch / "listed"
            mountpoint.mkdir(exist_ok=True)
            create = ["tar", "--create", "--file", str(packed), "--directory", str(mountpoint)]
            # FUSE does not tell where the holes are.
            create += [*archive.PACK, "--hole-detection=raw", "."]
            arguments = ["sh", str(volume), str(mountpoint), str(listed), *create]
            process.run(host_command(["sh", "-c", script, *arguments]))
            archive.unpack(packed, target)
            self._set_times(volume, listed, target)
            packed.unlink()
            _tidy(target)

    def _set_times(self, volume: Path, listed: Path, target: Path) -> None:
        """Set the times of unpacked files to the nanosecond: fuse2fs tells only seconds.

        listed: the volume's files, an inode number and a path each, ended by zeros.
        """
        exact = {inode.number: inode.mtime_ns for inode in ext4.inodes(volume, self._scratch)}
        words = listed.read_bytes().split(b"\0")
        pairs = zip(words[::2], words[1::2], strict=False)
        wanted = {path or b".": exact[int(number)] for number, path in pairs if int(number) in exact}
        # A directory's own time comes after its entries', which change it.
        times.write(dict(sorted(wanted.items(), reverse=True)), listed)
        process.run(host_command(times.command(target, listed)))

    def _extract_through_guest(self, directory: Path) -> None:
        guest = self.guest()
        self.mount_in_guest()
        archive_device = appliance.path_of(appliance.ARCHIVE)
        pack = ["tar", "--create", "--file", archive_device, "--directory", "/sysroot", *archive.PACK, "."]
        appliance.run(guest, pack)
        guest.umount_all()
        guest.sync()
        archive.unpack(self._archive, directory)
        for mount in self.found.mounts:
            if self._structure.types[mount.place] != "vfat":
                _tidy(Tree(directory).path(mount.mountpoint))

    def mount_in_guest(self) -> None:
        """Mount the system's file systems in the appliance, read-only, below its /sysroot."""
        places = {name_of(place): place for place, _ in self.found.layout.volumes}
        for mount in self.found.mounts:
            subvolume = [word for word in mount.options.split(",") if word.startswith("subvol")]
            options = ",".join(["ro", *subvolume])
            self.guest().mount_options(options, appliance.device(places[mount.place]), mount.mountpoint)


@contextlib.contextmanager
def opened(path: Path, scratch: Path, accelerator: str) -> Iterator[Disk]:
    """An inspected disk; nothing of it is changed.

    path: a raw image, a qcow2 or a block device. scratch: a directory for temporary files, as large as the
    content. accelerator: kvm or tcg, for the appliance where it is needed. Raises InputError for a disk
    that is not understood, HostError when this host lacks a tool.
    """
    with contextlib.ExitStack() as stack:
        yield Disk(Image(path, scratch), scratch, accelerator, stack)


def inspect(path: Path, scratch: Path, accelerator: str) -> Inspection:
    """What is on a disk; arguments and errors as for `opened`."""
    with opened(path, scratch, accelerator) as disk:
        return disk.found


def _tidy(top: Path) -> None:
    """Remove the directory that each ext4 is made with, if it is empty."""
    times = top.stat()
    with contextlib.suppress(OSError):
        (top / "lost+found").rmdir()
    os.utime(top, ns=(times.st_atime_ns, times.st_mtime_ns))


# How the files of a system are looked at


@dataclass(frozen=True)
class _Root:
    """A root file system. place: see `structure.name_of`; os: its os-release; fstab: its text."""

    place: str
    os: Mapping[str, str]
    fstab: str


class _ByProgram:
    """Reads ext4 and FAT with e2fsprogs and mtools."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def roots(self) -> list[_Root]:
        found = []
        for place, fs in self._disk._structure.layout.volumes:
            if fs.kind == "ext4":
                text = self._text(place, "/usr/lib/os-release") or self._text(place, "/etc/os-release")
                fstab = self._text(place, "/etc/fstab")
                if text or fstab:
                    found.append(_Root(name_of(place), _variables(text), fstab))
        return found

    def usage(self) -> dict[str, Usage]:
        result = {}
        for place, fs in self._disk._structure.layout.volumes:
            volume = self._disk.volume(place) if fs.kind != "swap" else None
            if volume and fs.kind == "ext4":
                result[name_of(place)] = _ext4_usage(volume, self._disk._scratch)
            elif volume:
                result[name_of(place)] = _fat_usage(volume, self._disk._scratch)
        return result

    def _text(self, place: Partition | LogicalVolume, path: str) -> str:
        argv = ["debugfs", "-R", f"cat {path}", str(self._disk.volume(place))]
        text = process.run(confined(argv, self._disk._scratch), capture=True).stdout
        return text if len(text) < _LONGEST else ""


class _ByGuest:
    """Reads any file system through the appliance's kernel."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._usage: dict[str, Usage] = {}

    def roots(self) -> list[_Root]:
        guest, found = self._disk.guest(), []
        for place, fs in self._disk._structure.layout.volumes:
            if fs.kind in ("ext4", "xfs", "btrfs"):
                device = appliance.device(place)
                found += [_Root(name_of(place), *seen) for seen in self._systems(guest, device, fs.kind)]
                continue
            if fs.kind == "vfat":
                self._usage[name_of(place)] = _fat_usage(self._disk.volume(place), self._disk._scratch)
        return found

    def _systems(self, guest: Any, device: str, kind: str) -> list[tuple[Mapping[str, str], str]]:
        """The systems on a file system: on a btrfs in any of its subvolumes, but not in snapshots of one."""
        place = next(
            name_of(place)
            for place, _ in self._disk._structure.layout.volumes
            if appliance.device(place) == device
        )
        guest.mount_options("ro", device, "/")
        seen = [self._system(guest)]
        stat = guest.statvfs("/")
        free, total = stat["bfree"] * stat["frsize"], stat["blocks"] * stat["frsize"]
        self._usage[place] = Usage(total - free, total)
        volumes = guest.btrfs_subvolume_list("/") if kind == "btrfs" and not seen[0] else []
        guest.umount("/")
        for volume in volumes:
            path = volume["btrfssubvolume_path"]
            if "/" not in path and "," not in path:
                guest.mount_options(f"ro,subvol={path}", device, "/")
                seen.append(self._system(guest))
                guest.umount("/")
        return [system for system in seen if system]

    def _system(self, guest: Any) -> tuple[Mapping[str, str], str] | None:
        texts = {
            path: guest.cat(path) if guest.is_file(path, followsymlinks=True) else ""
            for path in ("/usr/lib/os-release", "/etc/os-release", "/etc/fstab")
        }
        release = texts["/etc/os-release"] or texts["/usr/lib/os-release"]
        return (_variables(release), texts["/etc/fstab"]) if release or texts["/etc/fstab"] else None

    def usage(self) -> dict[str, Usage]:
        return self._usage


def _variables(text: str) -> dict[str, str]:
    """os-release(5)."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip().strip("\"'") for name, _, value in pairs}


def _fstab(text: str) -> Iterator[tuple[str, str, str, str]]:
    """The lines of an fstab (fstab(5)): what, where, which kind, with what options."""
    for line in text.splitlines():
        words = [
            re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)
            for word in line.split("#")[0].split()
        ]
        if len(words) >= 3:
            yield words[0], words[1], words[2], words[3] if len(words) > 3 else "defaults"


def _mounted(layout: Layout, mounts: Sequence[Mount], swaps: Mapping[str, str]) -> Layout:
    """A layout with the mount points and options of the system's fstab."""
    by_place: dict[str, Mount] = {}
    for mount in mounts:
        by_place.setdefault(mount.place, mount)

    def finished(place: Partition | LogicalVolume, fs: FileSystem) -> FileSystem:
        mount = by_place.get(name_of(place))
        if mount:
            return replace(fs, mountpoint=mount.mountpoint, options=_unusual(mount.options, fs.kind))
        if fs.kind == "swap":
            return replace(fs, options=_unusual(swaps.get(name_of(place), ""), fs.kind))
        return fs

    return replace(
        layout,
        partitions=tuple(
            replace(place, holds=finished(place, place.holds))
            if isinstance(place.holds, FileSystem)
            else place
            for place in layout.partitions
        ),
        logical=tuple(replace(place, holds=finished(place, place.holds)) for place in layout.logical),
    )


def _unusual(options: str, kind: str) -> str:
    """Options without a btrfs subvolume's, and empty where they are what `layout.fstab` writes anyway."""
    kept = ",".join(word for word in options.split(",") if not word.startswith("subvol"))
    return "" if kept in ("defaults", _USUAL.get(kind)) else kept


def _is_esp(place: Partition | LogicalVolume) -> bool:
    return (
        isinstance(place, Partition)
        and place.type in _ESP_TYPES
        and isinstance(place.holds, FileSystem)
        and place.holds.kind == "vfat"
    )


# What programs say of volumes


def _ext4_usage(volume: Path, scratch: Path) -> Usage:
    count, free, size = ext4.numbers(volume, scratch, "Block count", "Free blocks", "Block size")
    return Usage((count - free) * size, count * size)


def _fat_usage(volume: Path, scratch: Path) -> Usage:
    argv = ["fsck.vfat", "-n", "-v", str(volume)]
    said = process.run(confined(argv, scratch), capture=True, check=False).stdout
    size = re.search(r"(\d+) bytes per cluster", said)
    count = re.search(r"(\d+)/(\d+) clusters", said)
    if not size or not count:
        raise InputError(volume, None, "fsck.vfat cannot read the FAT file system")
    return Usage(int(count[1]) * int(size[1]), int(count[2]) * int(size[1]))


def _programs(esp: Path, scratch: Path) -> list[str]:
    """The EFI programs on an EFI system partition."""
    argv = ["mdir", "-i", str(esp), "-b", "-/", "::/"]
    done = process.run(confined(argv, scratch), capture=True, check=False, env={"MTOOLSRC": "/dev/null"})
    paths = [line.removeprefix("::/") for line in done.stdout.splitlines()]
    return [path for path in paths if path.lower().endswith(".efi")]
