"""The installer's own program: runs in the machine that is to be installed, and does what its kickstart says.

The machine was booted from the installer ISO with `inst.ks=…` among the kernel's arguments, as Anaconda's
are. Storage, boot loader and settings are the library's, the same as for an image that is bootstrapped on a
host; what is different here is that a kernel sees the disk, so that every file system is mounted and filled
in its place.

What happens is told on the virtio-serial port that Anaconda uses for its log, one line each:

    HH:MM:SS,mmm INF vdibuild: stage NAME       a stage begins
    HH:MM:SS,mmm DBG vdibuild: …                all that would stand in a log
    HH:MM:SS,mmm CRT vdibuild: failed: MESSAGE  the end; what to do follows as `hint: …`
    HH:MM:SS,mmm INF vdibuild: done             the end, a good one
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import lzma
import shlex
import ssl
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import zstandard
from rich.console import Console

from vdibuild import archive, families, kickstart, process, progress, rootfs
from vdibuild.disk import bootloader, layout, lvm, native
from vdibuild.disk.layout import FileSystem, Layout
from vdibuild.disk.volumes import Devices
from vdibuild.errors import CommandError, HostError, InputError, SpaceError, VdibuildError
from vdibuild.kickstart.syntax import Reader
from vdibuild.progress import Reporter, Step
from vdibuild.recipe import LiveImage
from vdibuild.settings.images import Disk, Image
from vdibuild.tree import Tree

PORT = "org.fedoraproject.anaconda.log.0"
"""The name of the virtio-serial port; the one that Anaconda looks for too."""

INJECTED = Path("/run/install")
"""Where the initramfs leaves the files that were put into it."""

_PORTS = Path("/dev/virtio-ports")
_CONSOLE = Path("/dev/console")
_TARGET = Path("/run/install/target")
_DOWNLOADS = ".vdibuild-downloads"  # in the target: what is in memory counts against the machine's
_SITE = Path("/run/install/site")  # there are no files of a site: all comes with the library
_RELEASE = "trixie"
_MIB = 1 << 20
_PIECE = 1 << 20
_NETWORK_SECONDS = 60


class Port:
    """Tells the world outside: the virtio-serial port where there is one, else the console."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def say(self, level: Literal["DBG", "INF", "WRN", "CRT"], text: str) -> None:
        """One line, or each of several, in Anaconda's form."""
        now = time.time()
        stamp = f"{time.strftime('%H:%M:%S', time.gmtime(now))},{int(now * 1000) % 1000:03d}"
        for line in text.splitlines() or [""]:
            self._file.write(f"{stamp} {level} vdibuild: {line}\n")
        self._file.flush()

    def write(self, text: str) -> None:
        """See progress.Log."""
        self.say("DBG", text)


class PortReporter(Reporter):
    """Tells of steps on a port: the outermost are the stages."""

    def __init__(self, port: Port) -> None:
        super().__init__(Console(quiet=True), live=False)
        self._port = port

    def started(self, step: Step) -> None:
        """See Reporter."""
        if step.depth == 0:
            self._port.say("INF", f"stage {step.name}")

    def ended(self, step: Step, failed: bool) -> None:
        """See Reporter. Nobody asks on this port when a stage ended."""

    def message(self, text: str) -> None:
        """See Reporter."""
        self._port.say("WRN", text)


@dataclass(frozen=True)
class Order:
    """What the kernel's arguments ask for. disk: the device to install on; empty for the only one."""

    kickstart: str
    disk: str
    release: str


def main() -> int:
    """Install this machine. Returns 0 when that went well; it is for the caller to turn it off then."""
    with _port() as file:
        port = Port(file)
        try:
            with progress.reporting(PortReporter(port)), progress.logging_to(port):
                install(read_order(Path("/proc/cmdline").read_text()))
        except VdibuildError as error:
            for line in getattr(error, "tail", ()):
                port.say("DBG", line)
            port.say("CRT", f"failed: {error.message}")
            for line in error.hint.splitlines():
                port.say("CRT", f"hint: {line.strip()}")
            return 1
        except Exception as error:  # the last place where it can be told
            port.say("DBG", traceback.format_exc())
            port.say("CRT", f"failed: {type(error).__name__}: {error}")
            return 1
        port.say("INF", "done")
    return 0


def read_order(arguments: str) -> Order:
    """Read the kernel's arguments. Raises VdibuildError when they name no kickstart."""
    given = dict(word.partition("=")[::2] for word in shlex.split(arguments))
    if not given.get("inst.ks"):
        raise VdibuildError(
            "the kernel's arguments name no kickstart", "add inst.ks=https://… or inst.ks=file:/NAME.ks"
        )
    return Order(given["inst.ks"], given.get("vdibuild.disk", ""), given.get("vdibuild.release", _RELEASE))


def install(order: Order) -> None:
    """Do what the kickstart says, up to and including the boot loader.

    Raises InputError naming the kickstart's line, HostError for a disk or an address that cannot be had,
    CommandError for what failed.
    """
    with progress.step("kickstart"):
        text = _read_kickstart(order.kickstart)
        disk = find_disk(order.disk)
        source = Path(order.kickstart.rpartition("/")[2])
        image = _image(order, disk, table=_table(text, source, order.release))
        recipe = kickstart.parse(text, source, image)
        planned = layout.plan(
            recipe.storage,
            firmware=image.firmware,
            size=image.disk.size,
            table=image.disk.table,
            seed=text,
            source=recipe.source,
        )
    family = families.get(image.family)
    with contextlib.ExitStack() as stack:
        with progress.step("storage"):
            devices = make_storage(planned, disk)
            stack.enter_context(_mounted(planned, devices, _TARGET))
        tree = Tree(_TARGET)
        if recipe.live_image:
            with progress.step("live image"), fitting(recipe.live_image.line):
                unpack(recipe.live_image, tree)
        else:
            with progress.step("packages"), fitting(None):
                _wait_for_network()
                # An archive that cannot be had is named sooner so, and better, than by the package manager.
                family.repository_states(recipe, image)
                family.bootstrap(recipe, image, _TARGET, _TARGET / _DOWNLOADS)
                tree.remove(_DOWNLOADS)
        with progress.step("settings"):
            rootfs.customise(tree, family, recipe, image, _SITE)
        with progress.step("boot loader"):
            family.prepare_boot(tree, recipe, planned, _SITE)
            if recipe.bootloader.install:
                boot = family.boot_files(tree)
                bootloader.prepare(tree, planned, boot)
                bootloader.install(tree, planned, boot, disk)
        stack.enter_context(progress.step("unmount"))


@contextlib.contextmanager
def fitting(line: int | None) -> Iterator[None]:
    """A full disk is the one that is installed on. line: of the kickstart, that says what it is to hold."""
    try:
        yield
    except SpaceError:
        raise InputError(
            "kickstart",
            line,
            "the disk is too small for the system",
            "give the image a larger `disk`, or the kickstart a larger volume",
        ) from None


def find_disk(wanted: str) -> Path:
    """The disk to install on: the one that is asked for, else the only one that can be written.

    Raises HostError when there is none, or more than one.
    """
    if wanted:
        if not Path(wanted).is_block_device():
            raise HostError(f"there is no disk {wanted}", "correct the kernel's argument vdibuild.disk")
        return Path(wanted).resolve()
    found = []
    for entry in sorted(Path("/sys/block").iterdir()):
        virtual = entry.name.startswith(("loop", "ram", "zram", "sr", "fd", "dm-", "md"))
        if not virtual and int((entry / "size").read_text()) and (entry / "ro").read_text().strip() == "0":
            found.append(f"/dev/{entry.name}")
    if len(found) == 1:
        return Path(found[0])
    if found:
        raise HostError(
            f"there are several disks: {', '.join(found)}",
            f"say which: vdibuild.disk={found[0]} among the kernel's arguments",
        )
    raise HostError("there is no disk to install on", "give the machine one")


def make_storage(planned: Layout, disk: Path) -> Devices:
    """Make the partitions, volume groups and file systems of a layout on a disk; what was there is gone."""
    devices = Devices(_run, str(disk), blank=False)
    _run(["wipefs", "--all", "--quiet", str(disk)])
    native.write_table(planned, disk)
    with disk.open("r+b") as file:
        for partition in planned.partitions:
            # What an earlier system left there would be found by whoever looks for signatures.
            for start in (partition.start, partition.start + partition.size - 1):
                file.seek(start * _MIB)
                file.write(bytes(_MIB))
    for group in planned.groups:
        lvm.write(planned, group, disk, int(time.time()))
    # udev has the kernel read the table when the disk is closed after writing; what it opens meanwhile keeps
    # others from asking for that, but not for a partition to be added.
    _run(["udevadm", "settle"])
    _run(["partx", "--update", str(disk)])
    _run(["udevadm", "settle"])
    for group in planned.groups:
        devices.activate(group)
    for place, _ in planned.volumes:
        devices.make_file_system(place)
    return devices


def unpack(image: LiveImage, tree: Tree) -> None:
    """Unpack a live image into the mounted target: a tar archive, plain or compressed by zstd, xz or gzip.

    Raises InputError when it is none, or not the one that its checksum means.
    """
    with _opened(image) as source:
        counted = _Counted(source)
        try:
            archive.unpack(_decompressed(counted), tree.root)
        except (zstandard.ZstdError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise _bad(image, f"is damaged: {error}") from None
        if image.checksum and counted.finish() != image.checksum:
            raise _bad(image, f"has another checksum: {counted.finish()}")


class _Counted(io.RawIOBase):
    """A stream whose bytes are summed up by SHA-256 as they are read."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        return len(data)

    def finish(self) -> str:
        """Read what is left; the digest of everything."""
        while self.read(_PIECE):
            pass
        return self._digest.hexdigest()


def _decompressed(source: io.RawIOBase) -> Iterator[bytes]:
    """The bytes of an archive, by what its first bytes say; what follows its end is left alone.

    On a disk, zeros up to the sector's end do.
    """
    buffered = io.BufferedReader(source, _PIECE)
    magic = buffered.peek(6)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):  # RFC 8878, section 3.1.1
        yield from _zstd(buffered)
        return
    reader: Any = buffered
    if magic.startswith(b"\xfd7zXZ\0"):
        reader = lzma.LZMAFile(buffered)  # noqa: SIM115 (the stream is not ours to close)
    elif magic.startswith(b"\x1f\x8b"):  # RFC 1952, section 2.3.1
        reader = gzip.GzipFile(fileobj=buffered)
    while piece := reader.read(_PIECE):
        yield piece


def _zstd(source: io.BufferedReader[io.RawIOBase]) -> Iterator[bytes]:
    """One frame; its reader would take zeros behind it for another one that is damaged."""
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    while not frame.eof:
        data = source.read(_PIECE)
        if not data:
            raise EOFError("it is cut off")
        yield frame.decompress(data)


def _bad(image: LiveImage, what: str) -> InputError:
    return InputError("kickstart", image.line, f"liveimg: {image.url} {what}", "get or make it again")


def _read_kickstart(location: str) -> str:
    """The kickstart's text, from where `inst.ks` says it is."""
    scheme, _, path = location.partition(":")
    if scheme == "file":
        file = INJECTED / path.lstrip("/")
        if not file.is_file():
            there = ", ".join(sorted(one.name for one in INJECTED.glob("*.ks"))) or "none"
            raise VdibuildError(f"there is no kickstart {path}", f"the initramfs was given: {there}")
        return file.read_text(encoding="utf-8")
    with _fetched(location) as answer:
        return answer.read().decode()


def _table(text: str, source: Path, release: str) -> Literal["gpt", "msdos"]:
    """The partition table that a kickstart asks for: GPT, where it does not say."""
    cleared = Reader(source, "debian", release).read(text).only("clearpart")
    return "msdos" if cleared and cleared.value.disklabel == "msdos" else "gpt"


def _image(order: Order, disk: Path, table: Literal["gpt", "msdos"]) -> Image:
    """The image as far as the machine knows it; what else belongs to it is done where it was ordered."""
    sectors = int(Path("/sys/block", disk.name, "size").read_text())
    return Image(
        family="debian",
        release=order.release,
        method="install",
        kickstart=order.kickstart,
        firmware="uefi" if Path("/sys/firmware/efi").is_dir() else "bios",
        disk=Disk.model_construct(size=sectors // 2048, layout="", table=table),
    )


@contextlib.contextmanager
def _mounted(planned: Layout, devices: Devices, target: Path) -> Iterator[None]:
    """The layout's file systems, mounted below `target`; let go of in the end, volume groups too."""
    with contextlib.ExitStack() as stack:
        for group in planned.groups:
            stack.callback(_run, ["vgchange", "--quiet", "--activate", "n", group.name])
        for place, fs in planned.mounts:
            directory = target / fs.mountpoint.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
            _run(["mount", "-t", fs.kind, *_options(fs), devices.path(place), str(directory)])
            stack.callback(_run, ["umount", str(directory)])
        yield


def _options(fs: FileSystem) -> list[str]:
    return ["-o", fs.options] if fs.options else []


def _run(argv: Sequence[str]) -> str:
    output = process.run(argv, capture=True).stdout
    if output.strip():
        progress.log(output.rstrip())
    return output


def _wait_for_network() -> None:
    """Start the network, and wait until it is there."""
    process.run(["systemctl", "start", "systemd-networkd", "systemd-resolved"])
    try:
        process.run(
            ["/usr/lib/systemd/systemd-networkd-wait-online", "--any", f"--timeout={_NETWORK_SECONDS}"]
        )
    except CommandError:
        raise HostError(
            f"no network within {_NETWORK_SECONDS} s", "packages come over it: connect it, with DHCP"
        ) from None


@contextlib.contextmanager
def _opened(image: LiveImage) -> Iterator[IO[bytes]]:
    """A live image's bytes."""
    if image.url.startswith("file:"):
        path = Path(image.url.removeprefix("file://"))
        try:
            file = path.open("rb")
        except OSError as error:
            raise _bad(image, f"cannot be read: {error.strerror}") from None
        with file:
            yield file
    else:
        with _fetched(image.url, proxy=image.proxy, verified=image.verify) as answer:
            yield answer


@contextlib.contextmanager
def _fetched(url: str, *, proxy: str = "", verified: bool = True) -> Iterator[IO[bytes]]:
    if not url.startswith(("http://", "https://", "ftp://")):
        raise VdibuildError(f"cannot read {url}", "give an http, https or ftp address, or file:/NAME.ks")
    _wait_for_network()
    context = ssl.create_default_context()
    if not verified:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    proxies = dict.fromkeys(("http", "https", "ftp"), proxy) if proxy else None
    handlers = (urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=_NETWORK_SECONDS) as answer:
            yield cast(IO[bytes], answer)
    except (urllib.error.URLError, OSError) as error:
        raise HostError(f"cannot fetch {url}: {getattr(error, 'reason', error)}") from None


@contextlib.contextmanager
def _port() -> Iterator[IO[str]]:
    port = _PORTS / PORT
    with (port if port.exists() else _CONSOLE).open("w", encoding="utf-8", errors="replace") as file:
        yield file


if __name__ == "__main__":
    sys.exit(main())
