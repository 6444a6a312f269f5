"""GRUB from outside, without grub-install: its menu, its modules in the tree, its images on the disk.

grub-install needs a block device, root and a mounted target. What it does comes down to this: make a core
image with grub-mkimage, put it where the firmware finds it, and copy the modules to /boot. All of it is
done with the tree's own GRUB, since core image, modules and signed programs have to be of one version.
"""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from vdibuild import config_template, process
from vdibuild.disk.layout import FIRST, Layout, LogicalVolume, Partition, kernel_root
from vdibuild.errors import HostError, VdibuildError
from vdibuild.families import BootFiles, Kernel
from vdibuild.tree import Tree

_SECTOR = 512
_MIB = 1 << 20

# Offsets in GRUB's include/grub/i386/pc/boot.h; what is written there: util/setup.c.
BOOT_CODE_END = 0x1B8  # GRUB_BOOT_MACHINE_WINDOWS_NT_MAGIC: disk signature and MBR table follow
_KERNEL_SECTOR = 0x5C  # u64: the sector of the core image's first sector
_DRIVE_CHECK = 0x66  # a jump that distrusts the BIOS's drive number; two NOPs on hard disks
_BLOCK_LIST = 0x1F4  # in the core image's first sector (diskboot.img): u64 first sector, u16 sectors
_BLOCK_LIST_ENTRY = 12
_MESSAGES = b"GRUB \0Geom\0Hard Disk\0Read\0 Error"  # boot/i386/pc/boot.S

_PARTITION_MODULE = {"gpt": "part_gpt", "msdos": "part_msdos"}
_FILE_SYSTEM_MODULE = {"ext4": "ext2", "xfs": "xfs", "btrfs": "btrfs"}
# What grub.cfg uses, and what a person at the prompt needs when it does not boot.
_MODULES = (
    *("normal", "linux", "search", "search_fs_uuid", "configfile", "echo", "test", "serial", "terminal"),
    *("loadenv", "gzio", "ls", "cat", "minicmd", "reboot", "halt", "sleep"),
)
_BIOS_MODULES = ("biosdisk",)
_EFI_MODULES = ("fat", "efi_gop")

_ENVIRONMENT_BYTES = 1024  # GRUB_ENVBLK_DEFSIZE, include/grub/lib/envblk.h
_ENVIRONMENT_SIGNATURE = b"# GRUB Environment Block\n"


def menu(
    layout: Layout, kernels: Sequence[Kernel], arguments: str, title: str, timeout: int, site_directory: Path
) -> str:
    """The text of grub.cfg: one entry for each kernel, the first is the default.

    kernels: with paths of the tree. arguments: the kernel's, after `root=… ro`; double quotes keep blanks,
    as on the kernel's own command line. title: the system's name. timeout: seconds the menu is shown.
    site_directory: where templates/grub.cfg.j2 is looked for first.
    """
    entries = [
        {
            "title": quoted(f"{title}, with Linux {kernel.version}"),
            "id": quoted(f"linux-{kernel.version}"),
            "message": quoted(f"Loading Linux {kernel.version} ..."),
            "kernel": quoted(_boot_path(layout, kernel.image)),
            "initramfs": quoted(_boot_path(layout, kernel.initramfs)) if kernel.initramfs else "",
            "arguments": " ".join(
                quoted(word) for word in (f"root={kernel_root(layout)}", "ro", *shlex.split(arguments))
            ),
        }
        for kernel in kernels
    ]
    return config_template.render(
        "grub.cfg.j2", site_directory, timeout=timeout, uuid=layout.boot.uuid, entries=entries
    )


def prepare(tree: Tree, layout: Layout, boot: BootFiles) -> None:
    """Put into the tree what GRUB needs: modules, an environment block, core image or EFI programs.

    The EFI programs go below the EFI system partition's mount point. Doing it twice changes nothing.
    Raises VdibuildError where the tree has no GRUB for the layout's firmware, HostError where neither the
    tree nor this host has grub-mkimage.
    """
    _put(tree, f"{boot.grub_directory}/grubenv", _ENVIRONMENT_SIGNATURE.ljust(_ENVIRONMENT_BYTES, b"#"))
    if layout.firmware == "bios":
        if not boot.bios_modules:
            raise VdibuildError(
                "the system has no GRUB for BIOS",
                "add its package to the kickstart's %packages: grub-pc-bin (Debian), grub2-pc (Fedora, EL)",
            )
        modules = _copy_modules(tree, boot, boot.bios_modules)
        _put(tree, f"{modules}/boot.img", tree.path(f"{boot.bios_modules}/boot.img").read_bytes())
        _make_image(tree, layout, boot, "i386-pc", f"{modules}/core.img")
        return
    if layout.esp is None:
        raise VdibuildError("the layout has no EFI system partition", "add: part /boot/efi --fstype=efi")
    if boot.efi_modules:
        _copy_modules(tree, boot, boot.efi_modules)
    if boot.signed:
        for place, source in boot.signed.items():
            _put(tree, f"{layout.esp.mountpoint}/{place}", tree.path(source).read_bytes())
        # A signed GRUB reads grub.cfg beside itself, or in the directory its distribution built into it.
        for directory in sorted({str(PurePosixPath(place).parent) for place in boot.signed}):
            stub = _find_menu(layout, boot) + "configfile $prefix/grub.cfg\n"
            _put(tree, f"{layout.esp.mountpoint}/{directory}/grub.cfg", stub.encode())
    elif boot.efi_modules:
        _make_image(tree, layout, boot, "x86_64-efi", f"{layout.esp.mountpoint}/EFI/BOOT/BOOTX64.EFI")
    else:
        raise VdibuildError(
            "the system has no GRUB for UEFI",
            "add its package to the kickstart's %packages: grub-efi-amd64-bin (Debian), grub2-efi-x64 (EL)",
        )


def install(tree: Tree, layout: Layout, boot: BootFiles, disk: Path) -> None:
    """Write what the firmware starts onto a raw disk that has its partition table.

    With UEFI there is nothing to do: the programs are files on the EFI system partition.
    disk: a raw image. Raises VdibuildError when the core image does not fit.
    """
    if layout.firmware != "bios":
        return
    modules = f"{boot.grub_directory}/i386-pc"
    boot_image = tree.path(f"{modules}/boot.img").read_bytes()
    core_image = tree.path(f"{modules}/core.img").read_bytes()
    place = layout.bios_boot
    if place is not None:
        sector, room = place.start * _MIB // _SECTOR, place.size * _MIB
    else:
        sector, room = 1, FIRST * _MIB - _SECTOR
    if len(core_image) > room:
        raise VdibuildError(f"GRUB's core image of {len(core_image)} bytes does not fit into {room} bytes")
    first, core = embed(boot_image, core_image, sector)
    with disk.open("r+b") as file:
        file.write(first)
        file.seek(sector * _SECTOR)
        file.write(core)


def embed(boot_image: bytes, core_image: bytes, sector: int) -> tuple[bytes, bytes]:
    """The disk's first 440 bytes, and the core image, made to find each other.

    boot_image, core_image: as GRUB and grub-mkimage made them. sector: where the core image will be.
    """
    first = bytearray(boot_image[:BOOT_CODE_END])
    struct.pack_into("<Q", first, _KERNEL_SECTOR, sector)
    first[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"
    core = bytearray(core_image)
    core.extend(bytes(-len(core) % _SECTOR))
    struct.pack_into("<QH", core, _BLOCK_LIST, sector + 1, len(core) // _SECTOR - 1)
    return bytes(first), bytes(core)


def core_of(first: bytes) -> int | None:
    """The sector where GRUB's core image begins, by the disk's first sector; None without GRUB 2."""
    if _MESSAGES not in first[:BOOT_CODE_END]:
        return None
    return int(struct.unpack_from("<Q", first, _KERNEL_SECTOR)[0])


def move(first: bytes, core: bytes, distance: int) -> tuple[bytes, bytes]:
    """The disk's first sector, and the core image, when that lies `distance` sectors further on."""
    moved, image = bytearray(first), bytearray(core)
    struct.pack_into(
        "<Q", moved, _KERNEL_SECTOR, struct.unpack_from("<Q", first, _KERNEL_SECTOR)[0] + distance
    )
    # The list grows downwards and ends with an entry of no sectors.
    for place in range(_BLOCK_LIST, 0, -_BLOCK_LIST_ENTRY):
        sector, count = struct.unpack_from("<QH", core, place)
        if not count:
            break
        struct.pack_into("<Q", image, place, sector + distance)
    return bytes(moved), bytes(image)


def _copy_modules(tree: Tree, boot: BootFiles, source: str) -> str:
    """Copy GRUB's modules to where it looks for them; returns that directory of the tree."""
    target = f"{boot.grub_directory}/{PurePosixPath(source).name}"
    for name in (*tree.glob(f"{source}/*.mod"), *tree.glob(f"{source}/*.lst")):
        _put(tree, f"{target}/{PurePosixPath(name).name}", tree.path(name).read_bytes())
    return target


def _make_image(tree: Tree, layout: Layout, boot: BootFiles, platform: str, output: str) -> None:
    """Make GRUB's core image for a platform with what it needs to find and show the menu."""
    bios = platform == "i386-pc"
    source = boot.bios_modules if bios else boot.efi_modules
    load = f"{boot.grub_directory}/{platform}/load.cfg"
    _put(tree, load, _find_menu(layout, boot).encode())
    tree.make_directory(str(PurePosixPath(output).parent))
    place, fs = layout.holding("/boot")
    modules = [*(_BIOS_MODULES if bios else _EFI_MODULES), _PARTITION_MODULE[layout.table]]
    modules += ["lvm"] if isinstance(place, LogicalVolume) else []
    modules += [_FILE_SYSTEM_MODULE[fs.kind], *_MODULES]
    options = {"-d": source, "-c": load, "-o": output}
    run_mkimage(tree, platform, options, _menu_directory(layout, boot), modules)


def run_mkimage(
    tree: Tree, platform: str, paths: Mapping[str, str], prefix: str, modules: Sequence[str]
) -> None:
    """Run the tree's grub-mkimage, or this host's where the tree has none.

    platform: as `grub-mkimage -O` takes it. paths: the options that name files, with paths of the tree.
    prefix: where GRUB looks for its menu. Raises HostError where neither is there, CommandError.
    """
    own = next((name for name in ("grub-mkimage", "grub2-mkimage") if tree.exists(f"/usr/bin/{name}")), None)
    foreign = next((name for name in ("grub-mkimage", "grub2-mkimage") if process.find(name)), None)

    def argv(program: str, at: PurePosixPath) -> list[str]:
        options = [word for option, inside in paths.items() for word in (option, f"{at}{inside}")]
        return [program, "-O", platform, *options, "-p", prefix, *modules]

    if own:
        tree.run(argv(own, PurePosixPath("")))
    elif foreign:
        process.run(argv(foreign, PurePosixPath(tree.root)))
    else:
        raise HostError("neither the system nor this host has grub-mkimage", "install grub-common")


def _find_menu(layout: Layout, boot: BootFiles) -> str:
    """GRUB commands that set $root and $prefix to where grub.cfg and the modules are."""
    place, fs = layout.holding("/boot")
    hint = ""
    if isinstance(place, Partition) and layout.firmware == "bios":
        # Tried first, so that no floppy or CD-ROM drive is waited for.
        hint = f" hd0,{layout.table}{place.number}"
    elif isinstance(place, LogicalVolume):
        hint = f" lvm/{place.mapper}"
    return f"search.fs_uuid {fs.uuid} root{hint}\nset prefix=($root){_menu_directory(layout, boot)}\n"


def _menu_directory(layout: Layout, boot: BootFiles) -> str:
    return _boot_path(layout, boot.grub_directory)


def _boot_path(layout: Layout, path: str) -> str:
    """A path of the tree below /boot as GRUB sees it: from the top of the file system that holds it."""
    mountpoint = PurePosixPath(layout.holding(path)[1].mountpoint)
    return f"/{PurePosixPath(path).relative_to(mountpoint)}"


def quoted(word: str) -> str:
    """A word for GRUB's shell, quoted where it has to be."""
    if re.fullmatch(r"[A-Za-z0-9_./:=,@%+-]+", word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def _put(tree: Tree, inside: str, data: bytes) -> None:
    """Write a file as root, replacing a link; what it holds already is left alone."""
    tree.make_directory(str(PurePosixPath(inside).parent))
    target = tree.path(inside, follow=False)
    if target.is_symlink():
        target.unlink()
    if not target.exists() or target.read_bytes() != data:
        target.write_bytes(data)
        target.chmod(0o644)
