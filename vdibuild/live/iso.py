"""An ISO that starts as CD, USB stick and SD card, with BIOS and UEFI: written by pycdlib, completed here.

    sector 0        GRUB's boot sector and a protective MBR, for the ISO as a disk
    sector 1        GUID partition table (its end is the file's last sectors)
    byte 32768      ISO 9660 with Rock Ridge, Joliet and El Torito
    next MiB        EFI system partition: a copy of what El Torito has
    next MiB        KIOSKCFG, a FAT file system for settings, if there is one

No partition covers the ISO's own data: it would inherit the label, and whoever looks for the medium by its
label might get the partition (systemd#12409). pycdlib's own `add_isohybrid` is not used: it knows isolinux
only, and writes an invalid table, over the end of the last file where that is too near.
"""

from __future__ import annotations

import re
import shutil
import struct
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from time import struct_time
from typing import Any

import pycdlib
from pycdlib.pycdlibexception import PyCdlibException

from vdibuild import process, progress
from vdibuild.errors import VdibuildError
from vdibuild.families import Medium
from vdibuild.output import unfinished

LABEL_LENGTH = 16
"""A label's characters: Joliet's volume identifier is 32 bytes of UCS-2, and GRUB and blkid read that one."""

SETTINGS = "KIOSKCFG"
"""The name of the partition for settings."""

_NAMESPACE = uuid.UUID("5b1ac6a4-8cb7-4d2b-9d5c-0c2f6fa2c1f0")
_MIB = 1 << 20
_SECTOR = 512
_BLOCK = 2048  # ECMA-119, 6.1.2: a logical sector
_SECTORS = _BLOCK // _SECTOR
_DESCRIPTORS = 16 * _BLOCK  # ECMA-119, 6.2.1: where the volume descriptors begin; 8.4: the primary one

_BOOT_CATALOGUE = "/boot/boot.cat"
_BIOS_LOADED = 4  # 512-byte sectors that the BIOS loads: GRUB's cdboot.img, which loads the rest
_BIOS_PLATFORM, _EFI_PLATFORM = 0, 0xEF  # El Torito 1.0, figure 2; UEFI 2.10, 13.3.2.1

# mkisofs's boot information table (genisoimage(1), EL TORITO BOOT INFORMATION TABLE): u32 at 8 the primary
# volume descriptor, at 12 the file, at 16 its length, at 20 the sum of the 32-bit words from 64 on.
_SUM, _SUMMED_FROM = 20, 64
# In GRUB's El Torito image, which is cdboot.img (2048 bytes) and then a core image whose first sector is
# diskboot.img: its GRUB_BOOT_MACHINE_LIST_SIZE from the end, the u64 sector of the core's second sector
# (grub: include/grub/i386/pc/boot.h; xorriso(1), grub2_boot_info).
_CORE_LIST = _BLOCK + 0x1F4
_CORE_REST = _BLOCK // _SECTOR + 1
# In boot_hybrid.img: the u64 sector of diskboot.img (grub: boot/i386/pc/boot.S, kernel_sector of hybrid).
_HYBRID_CORE = 0x1B0
_BOOT_CODE_END = 0x1B8  # the MBR's disk signature and partition table follow

# The MBR's second entry: active, of no type (UEFI 2.10, 5.2.1). Some BIOSes start no disk without an
# active partition; one of type 0 does not count for anybody else.
_SECOND_ENTRY = 0x1CE
_ACTIVE_NOTHING = struct.pack("<B3sB3sII", 0x80, bytes(3), 0, bytes(3), 0, 1)

# UEFI 2.10, table 5.7; and Microsoft's "basic data", which every system shows to its users.
_TYPE_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_TYPE_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
_TABLE_END = 33 * _SECTOR  # UEFI 2.10, 5.3.1: the entries' 16 KiB, and the header

_AUTHORING = threading.Lock()


@dataclass(frozen=True)
class Content:
    """What an ISO is made of.

    label: its name: capitals, digits and underscores, at most LABEL_LENGTH. files: by the path in the ISO.
    bios, hybrid, esp: see grub.Programs. settings: a FAT image for the partition KIOSKCFG. bios_place,
    esp_place: the paths of these images in the ISO.
    """

    label: str
    files: Mapping[str, Path] = field(default_factory=dict)
    bios: Path | None = None
    hybrid: Path | None = None
    esp: Path | None = None
    settings: Path | None = None
    bios_place: str = Medium.bios
    esp_place: str = Medium.esp


@dataclass(frozen=True)
class _Partition:
    """A partition to append. image: what is in it."""

    name: str
    type: str
    image: Path


def write(content: Content, output: Path, epoch: int) -> None:
    """Write an ISO; the same content and epoch give the same bytes.

    output: the new file, which is removed again when anything fails. epoch: the time of everything in it,
    seconds since 1970. Raises VdibuildError for a label or a path that an ISO cannot have and for a file
    that is not there, HostError when the disk is full.
    """
    _check(content)
    with unfinished(output):
        core = _author(content, output, epoch)
        if core is not None:
            _tell_core(output, core)
        _append_partitions(content, output)
        if core is not None and content.hybrid:
            _write_boot_sector(output, content.hybrid.read_bytes(), core)


def label(medium: Path) -> str:
    """The name of an ISO, or of a medium that holds one. Raises VdibuildError for what is none."""
    try:
        with medium.open("rb") as file:
            file.seek(_DESCRIPTORS)
            descriptor = file.read(_BLOCK)
    except OSError as error:
        raise VdibuildError(f"{medium} cannot be read: {error.strerror}") from None
    if descriptor[:6] != b"\x01CD001":
        raise VdibuildError(f"{medium} holds no ISO")
    return descriptor[40:72].decode("ascii", "replace").rstrip()


def _check(content: Content) -> None:
    if not re.fullmatch(rf"[A-Z0-9_]{{1,{LABEL_LENGTH}}}", content.label):
        raise VdibuildError(
            f"{content.label!r} cannot be the label of an ISO",
            f"1 to {LABEL_LENGTH} capitals, digits and underscores",
        )
    own = [file for file in (content.bios, content.hybrid, content.esp, content.settings) if file]
    for file in (*content.files.values(), *own):
        if not file.is_file():
            raise VdibuildError(f"{file}, which belongs into the ISO, is not there")


def _author(content: Content, output: Path, epoch: int) -> int | None:
    """Write the ISO 9660 file system. Returns the block of GRUB's image for BIOS, where there is one."""
    with _AUTHORING, _stopped_clock(epoch):
        iso = pycdlib.PyCdlib()
        iso.new(
            interchange_level=3,
            sys_ident="LINUX",
            vol_ident=content.label,
            app_ident_str="VDIBUILD",
            rock_ridge="1.09",
            joliet=3,
        )
        try:
            names = _Names()
            for place, file in sorted({**content.files, **_boot_images(content)}.items()):
                try:
                    _add(iso, names, place, file)
                except PyCdlibException as error:
                    raise VdibuildError(f"{place} cannot be on an ISO: {error}", "shorten it") from None
            _add_boot_entries(iso, names, content)
            iso.force_consistency()
            core = None
            if content.bios:
                core = iso.get_record(iso_path=names.file(content.bios_place)).extent_location()
            with progress.step("ISO") as step:
                iso.write(str(output), progress_cb=_shown(step))
        finally:
            iso.close()
    return core


def _boot_images(content: Content) -> dict[str, Path]:
    images = {content.bios_place: content.bios, content.esp_place: content.esp}
    return {place: file for place, file in images.items() if file}


def _add(iso: Any, names: _Names, place: str, file: Path) -> None:
    """Add a file, and the directories on the way to it."""
    for parent in reversed(PurePosixPath(place).parents[:-1]):
        if names.is_new(parent):
            path = str(parent)
            iso.add_directory(names.directory(path), rr_name=parent.name, joliet_path=path)
    iso.add_file(str(file), names.file(place), rr_name=PurePosixPath(place).name, joliet_path=place)


def _add_boot_entries(iso: Any, names: _Names, content: Content) -> None:
    """El Torito's boot catalogue, in which the first entry is the default one."""
    catalogue: dict[str, str] = {
        "bootcatfile": names.file(_BOOT_CATALOGUE),
        "rr_bootcatname": PurePosixPath(_BOOT_CATALOGUE).name,
        "joliet_bootcatfile": _BOOT_CATALOGUE,
    }
    if content.bios:
        iso.add_eltorito(
            names.file(content.bios_place),
            **catalogue,
            boot_load_size=_BIOS_LOADED,
            platform_id=_BIOS_PLATFORM,
            boot_info_table=True,
        )
        catalogue = {}
    if content.esp:
        iso.add_eltorito(names.file(content.esp_place), **catalogue, efi=True, platform_id=_EFI_PLATFORM)


class _Names:
    """The ISO 9660 names of files and directories: capitals, digits, underscores and one dot."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}
        self._directories: set[PurePosixPath] = set()

    def is_new(self, directory: PurePosixPath) -> bool:
        """Whether that directory is asked for for the first time."""
        new = directory not in self._directories
        self._directories.add(directory)
        return new

    def directory(self, path: str) -> str:
        """A directory's name, with those of its parents."""
        return self._unique(path, "/".join(_plain(part) for part in path.split("/")))

    def file(self, path: str) -> str:
        """A file's name, with its version."""
        parent, _, name = path.rpartition("/")
        stem, _, ending = name.rpartition(".") if "." in name[1:] else (name, "", "")
        directory = "/".join(_plain(part) for part in parent.split("/"))
        return self._unique(path, f"{directory}/{_plain(stem)}.{_plain(ending)};1")

    def _unique(self, path: str, name: str) -> str:
        if self._taken.setdefault(name, path) != path:
            raise VdibuildError(f"{path} and {self._taken[name]} have the same name on an ISO", "rename one")
        return name


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9_]", "_", name.upper())


def _shown(step: progress.Step) -> Any:
    """pycdlib's report of its progress, as a step's."""

    def report(done: int, total: int) -> None:
        step.total = total
        step.advance(done - step.done)

    return report


@contextmanager
def _stopped_clock(epoch: int) -> Iterator[None]:
    """Let it be `epoch`, in UTC, for pycdlib, which has no other way to be told a time."""
    clock = _Clock(epoch)
    modules = [
        module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "pycdlib" and getattr(module, "time", None) is time
    ]
    for module in modules:
        vars(module)["time"] = clock
    try:
        yield
    finally:
        for module in modules:
            vars(module)["time"] = time


class _Clock:
    """Takes the place of the module `time`."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        """The one moment there is."""
        return float(self._epoch)

    def localtime(self, seconds: float | None = None) -> struct_time:
        """The local time, which is UTC."""
        return time.gmtime(self._epoch if seconds is None else seconds)

    gmtime = localtime


def _tell_core(iso: Path, core: int) -> None:
    """Tell GRUB's image for BIOS where the rest of it is, and sum it up again."""
    with iso.open("r+b") as file:
        file.seek(core * _BLOCK)
        head = file.read(_SUMMED_FROM)
        length: int = struct.unpack_from("<I", head, 16)[0]
        image = bytearray(head + file.read(length - len(head)))
        struct.pack_into("<Q", image, _CORE_LIST, core * _SECTORS + _CORE_REST)
        padded = image + bytes(-len(image) % 4)
        words = struct.unpack_from(f"<{(len(padded) - _SUMMED_FROM) // 4}I", padded, _SUMMED_FROM)
        struct.pack_into("<I", image, _SUM, sum(words) & 0xFFFFFFFF)
        file.seek(core * _BLOCK)
        file.write(image)


def _append_partitions(content: Content, iso: Path) -> None:
    """Put the partitions behind the ISO, and the table that lists them around it all."""
    asked = [("ESP", _TYPE_ESP, content.esp), (SETTINGS, _TYPE_DATA, content.settings)]
    partitions = [_Partition(name, kind, image) for name, kind, image in asked if image]
    if not partitions:
        return
    lines = ["label: gpt", f"label-id: {_uuid(content, 'disk')}", "first-lba: 34", "unit: sectors", ""]
    with iso.open("r+b") as file:
        end = file.seek(0, 2)
        for partition in partitions:
            start = file.seek(_up(end, _MIB))
            with partition.image.open("rb") as source:
                shutil.copyfileobj(source, file, _MIB)
            end = _up(file.tell(), _SECTOR)
            lines.append(
                f"start={start // _SECTOR}, size={(end - start) // _SECTOR}, type={partition.type}, "
                f'uuid={_uuid(content, partition.name)}, name="{partition.name}"'
            )
        file.truncate(_up(end + _TABLE_END, _MIB))
    quiet = ["--quiet", "--wipe", "never", "--no-reread", "--no-tell-kernel"]
    process.run(["sfdisk", *quiet, str(iso)], stdin="".join(f"{line}\n" for line in lines))


def _write_boot_sector(iso: Path, boot_hybrid: bytes, core: int) -> None:
    """Put GRUB's boot sector before the partition table, made to find its core image."""
    code = bytearray(boot_hybrid[:_BOOT_CODE_END])
    struct.pack_into("<Q", code, _HYBRID_CORE, (core + 1) * _SECTORS)
    with iso.open("r+b") as file:
        file.write(code)
        file.seek(_SECOND_ENTRY)
        file.write(_ACTIVE_NOTHING)
        file.seek(_SECTOR - 2)
        file.write(b"\x55\xaa")


def _uuid(content: Content, role: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{content.label}\n{role}")).upper()


def _up(number: int, unit: int) -> int:
    """The number, rounded up to a whole multiple of the unit."""
    return -(-number // unit) * unit
