"""Systems that tests put on disks, and looking at them file by file."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdibuild.disk import bootloader, layout, lvm, native
from vdibuild.disk.layout import Layout, LogicalVolume, Partition
from vdibuild.families import BootFiles, Kernel
from vdibuild.tree import Tree

GRUB = BootFiles("/boot/grub", "/usr/lib/grub/i386-pc", "", {})
SPARSE = 4 << 30


def system(root: Path) -> Tree:
    """A tree that looks like a small Debian that GRUB could start, without programs."""
    made = Tree(root)
    made.write("/usr/lib/os-release", 'ID=debian\nPRETTY_NAME="Debian of the tests"\n')
    made.link("/etc/os-release", "../usr/lib/os-release")
    for name in ("boot", "proc", "sys", "dev", "run", "tmp"):
        made.make_directory(f"/{name}")
    made.write("/boot/vmlinuz-1", "kernel" * 1000)
    shutil.copytree("/usr/lib/grub/i386-pc", root / "usr/lib/grub/i386-pc")
    return made


def bootable(tree: Tree, planned: Layout) -> BootFiles:
    """Put into the tree what boots it from this layout; a UEFI program is only a file of that name."""
    tree.write("/etc/fstab", layout.fstab(planned))
    for _, fs in planned.mounts:
        tree.make_directory(fs.mountpoint)
    menu = bootloader.menu(planned, [Kernel("1", "/boot/vmlinuz-1", "")], "quiet", "Test", 0, Path())
    tree.write("/boot/grub/grub.cfg", menu)
    if planned.firmware == "bios":
        bootloader.prepare(tree, planned, GRUB)
    elif planned.esp:
        tree.write(f"{planned.esp.mountpoint}/EFI/BOOT/BOOTX64.EFI", "MZ")
    return GRUB


def hostile(root: Path, attribute: int, sparse: int = SPARSE) -> None:
    """Fill a new directory with what is easily copied wrongly.

    attribute: bytes of the largest extended attribute. sparse: bytes of a file with holes.
    """
    root.mkdir()
    plain = root / "plain"
    plain.write_text("text\n")
    plain.chmod(0o6751)
    os.link(plain, root / "second name")
    (root / "directory").mkdir(mode=0o1777)
    os.link(plain, root / "directory" / "third name")
    (root / "dangling").symlink_to("/no/such/place")
    (root / ("n" * 255)).write_text("a long name")
    (root / "new\nline").write_text("a name of two lines")
    Path(os.fsdecode(bytes(root) + b"/latin-\xe9-\xff")).write_text("no UTF-8")
    with (root / "sparse").open("wb") as file:
        file.truncate(sparse)
        file.seek(sparse // 2)
        file.write(b"middle" * 1000)
    os.mkfifo(root / "pipe", 0o640)
    os.mknod(root / "character", 0o600 | stat.S_IFCHR, os.makedev(5, 1))
    os.mknod(root / "block", 0o660 | stat.S_IFBLK, os.makedev(7, 3))
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(root)  # a socket's address is at most 108 bytes
        try:
            unix.bind("socket")
        finally:
            os.chdir(here)
    attributes = root / "attributes"
    attributes.write_text("")
    os.setxattr(attributes, "user.large", os.urandom(attribute))
    os.setxattr(attributes, "trusted.mark", b"root's")
    os.setxattr(attributes, "security.selinux", b"system_u:object_r:etc_t:s0\0")
    capable = root / "capable"
    capable.write_text("#!/bin/sh\n")
    subprocess.run(["setcap", "cap_net_raw,cap_net_admin+ep", capable], check=True)
    subprocess.run(["setfacl", "-n", "-m", "u:4321:r,m::rx", plain], check=True)
    subprocess.run(["setfacl", "-n", "-m", "d:g:77:rwx,d:u:4321:r", root / "directory"], check=True)
    for number, path in enumerate(sorted(root.iterdir())):
        if path.name not in ("plain", "second name", "capable"):  # chown would clear their set-ids and more
            os.chown(path, 1000 + number, 60_000 + number, follow_symlinks=False)
        os.utime(path, ns=(0, 1_000_000_000_123_456_789 + number), follow_symlinks=False)


def immutable(root: Path) -> None:
    """Put a file that nobody can change into a directory of a mounted image.

    Only there: a killed test would leave a directory that nothing can remove.
    """
    fixed = root / "immutable"
    fixed.write_text("fixed")
    subprocess.run(["chattr", "+i", fixed], check=True)


def seen(root: Path, *, sockets: bool = True, resolution: int = 1) -> dict[str, tuple[object, ...]]:
    """All that is known about each file below a directory, by its path: equal where a copy is exact.

    sockets: with them. resolution: of the times, in nanoseconds. What FAT holds is not looked at.
    """
    inodes: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(bytes(root)):
        names.sort()
        for name in sorted([*files, *names]):
            path = os.path.join(directory, name)  # noqa: PTH118 (bytes)
            status = os.lstat(path)
            inside = os.fsdecode(os.path.relpath(path, bytes(root)))
            if (stat.S_ISSOCK(status.st_mode) and not sockets) or inside.startswith("boot/efi"):
                continue
            attributes = {
                attribute: os.getxattr(path, attribute, follow_symlinks=False)
                for attribute in os.listxattr(path, follow_symlinks=False)
                # XFS shows ACLs a second time, in a form of its own; its mkfs and quota add nothing else.
                if not attribute.startswith("trusted.SGI_ACL")
            }
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)  # noqa: PTH115 (bytes)
            elif stat.S_ISREG(status.st_mode):
                content = data(path)
                assert not inside.endswith("srv/sparse") or status.st_blocks * 512 < 1 << 20, "holes are lost"
            device = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            links = status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0
            same = inodes.setdefault(status.st_ino, inside)
            owner = (status.st_uid, status.st_gid)
            found[inside] = (
                *(oct(status.st_mode), owner, status.st_mtime_ns // resolution, size, links, same, device),
                *(content, sorted(attributes.items())),
            )
    return found


def data(path: bytes) -> list[tuple[int, bytes]]:
    """A file's content that is not zeros, in pieces of 4096 bytes with their positions."""
    pieces: list[tuple[int, bytes]] = []
    with open(path, "rb") as file:  # noqa: PTH123 (bytes)
        position = 0
        while True:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                return pieces
            end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            for start in range(position - position % 4096, end, 4096):
                piece = os.pread(file.fileno(), 4096, start)
                if piece.strip(b"\0"):
                    pieces.append((start, piece))
            position = end


@contextlib.contextmanager
def loop(raw: Path, start: int, size: int) -> Iterator[str]:
    """A part of an image as a loop device of this host; positions in MiB."""
    argv: list[str | Path] = [
        "losetup",
        "--find",
        "--show",
        "--offset",
        str(start << 20),
        "--sizelimit",
        str(size << 20),
        raw,
    ]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def mounted(raw: Path, start: int, size: int, at: Path, options: str = "defaults") -> Iterator[Path]:
    """A file system of an image, mounted by this host's kernel."""
    at.mkdir(exist_ok=True)
    with loop(raw, start, size) as device:
        subprocess.run(["mount", "-o", options, device, at], check=True)
        try:
            yield at
        finally:
            subprocess.run(["umount", at], check=True)


@dataclass(frozen=True)
class Made:
    """A partition of a disk that this host's own tools make. start, size: MiB. make: the mkfs command."""

    start: int
    size: int
    type: str
    make: tuple[str, ...] = ()
    number: int = 0


def disk(raw: Path, size: int, table: str, partitions: Sequence[Made]) -> None:
    """A disk with file systems that nothing of this project has made. size: MiB; table: gpt or dos."""
    with raw.open("wb") as file:
        file.truncate(size << 20)
    lines = [f"label: {table}", "unit: sectors"]
    for number, part in enumerate(partitions, 1):
        lines.append(
            f"p{part.number or number}: start={part.start * 2048}, size={part.size * 2048}, type={part.type}"
        )
    script = "\n".join(lines) + "\n"
    subprocess.run(["sfdisk", "--quiet", raw], input=script, text=True, check=True)
    for part in partitions:
        if part.make:
            with loop(raw, part.start, part.size) as device:
                subprocess.run([*part.make, device], check=True, capture_output=True)


def grub(raw: Path, core: int = 1) -> None:
    """Put on a disk what is GRUB as far as its place goes: boot code, and a core image of 40 KiB."""
    image = (Path("/usr/lib/grub/i386-pc") / "diskboot.img").read_bytes() + b"core" * 10_000
    boot = (Path("/usr/lib/grub/i386-pc") / "boot.img").read_bytes()
    first, placed = bootloader.embed(boot, image, core)
    with raw.open("r+b") as file:
        file.write(first)
        file.seek(core * 512)
        file.write(placed)


def made(planned: Layout, raw: Path) -> None:
    """A disk of that layout, whose file systems this host's own tools make, empty."""
    with raw.open("wb") as file:
        file.truncate(planned.size << 20)
    native.write_table(planned, raw)
    for group in planned.groups:
        lvm.write(planned, group, raw, 0)
    for place, fs in planned.volumes:
        command = {
            "ext4": ["mkfs.ext4", "-q", "-U"],
            "xfs": ["mkfs.xfs", "-q", "-m"],
            "btrfs": ["mkfs.btrfs", "-q", "-U"],
            "swap": ["mkswap", "-U"],
        }[fs.kind]
        start, size = place_of(planned, place)
        with loop(raw, start, size) as device:
            uuid = f"uuid={fs.uuid}" if fs.kind == "xfs" else fs.uuid
            subprocess.run([*command, uuid, device], check=True, capture_output=True)


def place_of(planned: Layout, place: Partition | LogicalVolume) -> tuple[int, int]:
    """Where on a disk a partition lies, or a logical volume of one piece: start and size in MiB."""
    if isinstance(place, Partition):
        return place.start, place.size
    ((offset, size),) = lvm.pieces(planned, place)
    return offset >> 20, size >> 20


def fstab(root: Path, lines: Sequence[str]) -> None:
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/fstab").write_text("".join(f"{line}\n" for line in lines))
