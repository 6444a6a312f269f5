"""A throw-away machine: QEMU on an overlay of a disk, started directly, without libvirt.

It reaches no network (QEMU's own DHCP server answers, nothing else), writes nothing to the disk it was
given, and dies with whoever started it. The disk's content is untrusted: the machine runs in QEMU's sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from qemu.qmp import EventListener, Message, QMPClient, QMPError, Runstate

from vdibuild import process, processor, progress
from vdibuild.agent import CHANNEL, Agent
from vdibuild.errors import HostError, VerificationError

EMULATORS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
"""QEMU's names: everywhere, and on EL."""

FIRMWARE_DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
"""Where UEFI firmware describes itself, best first (docs/interop/firmware.json in QEMU's source)."""

_AGENT = "agent"  # the id of the agent's port, by which QEMU's events name it
_LOG = "qemu.log"
_ACCELERATORS = {"kvm": "kvm", "tcg": "tcg,tb-size=256"}
"""QEMU's options. tb-size: MiB of translated code that are kept; when they are full, all of it is dropped at
once. QEMU 7.2's own 1024 are not full when a system is up; then each page that programs were run from costs
20 ms when a guest puts it to another use, as it does with its initramfs's: 10 s of a start.
"""
_KEPT = 1 << 20  # characters of the console's output: an untrusted guest may print for ever
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-9;:=?!]*[A-Za-z]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9]|[=>c78])|[\r\0]"
)


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of. memory: MiB. accelerator: see host.accelerator.

    medium: what its disk is: a virtio disk it may write to, a CD, or a USB stick that is write-protected.
    """

    firmware: Literal["bios", "uefi"]
    memory: int
    accelerator: Literal["kvm", "tcg"]
    cores: int = 1
    medium: Literal["disk", "cdrom", "usb"] = "disk"


@dataclass(frozen=True)
class Firmware:
    """UEFI firmware of this host: the program, a template of its variables, and their image format."""

    code: Path
    code_format: str
    variables: Path
    variables_format: str


class Console:
    """What a machine prints on its serial port, without the terminal's escape sequences."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines = ""
        self._partial = b""
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        """What was printed last, about a megabyte at most."""
        return self._lines + printable(self._partial)

    def tail(self, lines: int = process.TAIL_LINES) -> list[str]:
        """The last lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()][-lines:]

    async def shows(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait until something that was printed matches."""
        while True:
            self._changed.clear()
            if match := pattern.search(self.text):
                return match
            await self._changed.wait()

    async def follow(self, output: asyncio.StreamReader) -> None:
        """Read the port until the machine is gone; every line goes to the log."""
        # QEMU resets the connection when it ends with output unsent.
        with contextlib.suppress(ConnectionError):
            while data := await output.read(65536):
                *lines, self._partial = (self._partial + data).split(b"\n")
                self._partial = self._partial[-_KEPT:]
                for line in map(printable, lines):
                    progress.log(f"{self._name}| {line}")
                    self._lines = f"{self._lines[-_KEPT:]}{line}\n"
                self._changed.set()


class Machine:
    """A running machine: its console, its guest agent, its screen (see `started`)."""

    def __init__(self, name: str, qemu: subprocess.Popen[bytes], directory: Path) -> None:
        self.name = name
        self.console = Console(name)
        self.agent = Agent(name)
        self._qemu = qemu
        self._directory = directory
        self._monitor = QMPClient(f"{name}-monitor")
        self._events = EventListener(names={"VSERPORT_CHANGE", "SHUTDOWN"})
        self._monitor.register_listener(self._events)
        self._agent_opened = asyncio.Event()
        self._shutdown = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._console_channel: asyncio.StreamWriter | None = None

    async def answering(self) -> None:
        """Wait until the guest agent answers."""
        await self._agent_opened.wait()
        await self.agent.synchronise()

    @property
    def has_agent(self) -> bool:
        """Whether the guest agent has opened its channel."""
        return self._agent_opened.is_set()

    async def ended(self) -> str:
        """Wait until the machine ends by itself; returns why."""
        status = await self._exit_status()
        # Its last event is read before the end of the monitor's connection, but perhaps after its end.
        while self._monitor.runstate == Runstate.RUNNING:
            await self._monitor.runstate_changed()
        for event in self._events.clear():
            self._notice(event)
        return self._shutdown or self._complaint() or f"QEMU ended with status {status}"

    async def screenshot(self, form: Literal["png", "ppm"]) -> bytes:
        """What the screen shows, as an image file. Raises VerificationError when the machine is gone."""
        file = self._directory / f"screen.{form}"
        try:
            await self._monitor.execute("screendump", {"filename": str(file), "format": form})
        except (QMPError, EOFError, OSError) as error:
            raise VerificationError(f"no picture of the {self.name} machine: {error}") from None
        return file.read_bytes()

    def processor_seconds(self) -> float:
        """How much of the host's processors the machine has used so far."""
        # The command's name, in parentheses, may hold anything; utime and stime are the 14th and 15th field
        # (proc_pid_stat(5)).
        fields = Path(f"/proc/{self._qemu.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def connect(self, monitor: socket.socket, agent: socket.socket, console: socket.socket) -> None:
        """Take over the host's ends of the machine's channels, and let it begin.

        Raises HostError when QEMU did not start.
        """
        output, self._console_channel = await asyncio.open_unix_connection(sock=console)
        self._tasks = [
            asyncio.create_task(self.console.follow(output)),
            asyncio.create_task(self._watch()),
        ]
        try:
            await self._monitor.connect(monitor)
            await self.agent.connect(agent)
            await self._monitor.execute("cont")
        except (QMPError, OSError, EOFError):
            status = await self._exit_status()
            raise HostError(
                f"QEMU did not start: {self._complaint() or f'status {status}'}",
                "`./inv doctor` says what this host can do",
            ) from None

    async def disconnect(self) -> None:
        """Let the channels go."""
        await self.agent.close()
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._monitor.disconnect()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._console_channel:
            self._console_channel.close()
            with contextlib.suppress(ConnectionError):
                await self._console_channel.wait_closed()

    async def _watch(self) -> None:
        async for event in self._events:
            self._notice(event)

    def _notice(self, event: Message) -> None:
        data = cast(dict[str, Any], event["data"])
        if event["event"] == "SHUTDOWN":
            self._shutdown = f"it ended by itself ({data['reason']})"
        elif data["open"] and data["id"] == _AGENT:
            self._agent_opened.set()

    async def _exit_status(self) -> int:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(self._qemu.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._qemu.wait()

    def _complaint(self) -> str:
        lines = (self._directory / _LOG).read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")


@contextlib.asynccontextmanager
async def started(
    disk: Path, form: Literal["raw", "qcow2"], hardware: Hardware, work: Path, name: str = "guest"
) -> AsyncIterator[Machine]:
    """Start a machine on an overlay of `disk`, which is only read; stop it at the end of the block.

    form: the disk's image format; of a CD or USB stick there is no overlay, the guest cannot write to it.
    work: the directory for its temporary files, which are removed with it. name: what it is called in
    the log. Raises HostError when QEMU or the firmware is missing.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work)))
        if hardware.medium == "disk":
            overlay = directory / "overlay.qcow2"
            backing = ["-b", str(disk.resolve()), "-F", form]
            process.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay)])
            drive = _writable(overlay)
        else:
            drive = _read_only(disk.resolve(), form, hardware.medium)
        pairs = {channel: socket.socketpair() for channel in ("monitor", "agent", "console")}
        for ours, theirs in pairs.values():
            stack.callback(ours.close)
            stack.callback(theirs.close)
        descriptors = {channel: theirs.fileno() for channel, (_, theirs) in pairs.items()}
        # It begins when somebody listens (Machine.connect): it may end at once.
        argv = [*command(hardware, drive, directory, descriptors), "-S"]
        with (directory / _LOG).open("wb") as log:
            qemu = process.start(argv, stdout=log, pass_fds=tuple(descriptors.values()))
        stack.callback(process.stop, qemu)
        for _, theirs in pairs.values():
            # Ours must be the only end left, or the end of QEMU would go unnoticed.
            theirs.close()
        machine = Machine(name, qemu, directory)
        try:
            await machine.connect(*(ours for ours, _ in pairs.values()))
            yield machine
        finally:
            # Before QEMU is stopped: a client that finds it gone has asyncio complain of an unread error.
            await machine.disconnect()


def emulator() -> str:
    """QEMU's command on this host. Raises HostError when there is none."""
    for candidate in EMULATORS:
        if process.find(candidate):
            return candidate
    raise HostError("QEMU for x86_64 is not installed", "`./inv doctor` names the package to install")


def _writable(overlay: Path) -> list[str]:
    """QEMU's options for a virtio disk on a throw-away overlay."""
    return [
        # Nothing has to reach the host's disk.
        "-blockdev",
        "driver=qcow2,node-name=disk,discard=unmap,cache.no-flush=on,"
        f"file.driver=file,file.filename={_escaped(overlay)},file.cache.no-flush=on",
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
    ]


def _read_only(image: Path, form: str, medium: Literal["cdrom", "usb"]) -> list[str]:
    """QEMU's options for an image as a CD in a SATA drive, or as a USB stick."""
    device = {
        "cdrom": ["-device", "ide-cd,drive=disk,bootindex=0"],
        "usb": ["-device", "qemu-xhci", "-device", "usb-storage,drive=disk,bootindex=0"],
    }
    return [
        "-blockdev",
        f"driver={form},node-name=disk,read-only=on,file.driver=file,file.filename={_escaped(image)},"
        "file.read-only=on",
        *device[medium],
    ]


def command(
    hardware: Hardware, drive: Sequence[str], directory: Path, channels: Mapping[str, int]
) -> list[str]:
    """QEMU's argument list. drive: the options for the disk, which the machine starts from. channels:
    connected sockets for monitor, agent and console.
    """
    # graphics=off makes SeaBIOS repeat on the serial port what it, and GRUB through it, shows on the screen.
    machine = "q35,graphics=off"
    firmware: list[str] = []
    if hardware.firmware == "uefi":
        found = uefi_firmware()
        variables = directory / "variables"
        shutil.copyfile(found.variables, variables)
        machine += ",pflash0=code,pflash1=variables"
        firmware = [
            "-blockdev",
            f"driver={found.code_format},node-name=code,read-only=on,file.driver=file,file.filename={_escaped(found.code)}",
            "-blockdev",
            f"driver={found.variables_format},node-name=variables,file.driver=file,file.filename={_escaped(variables)}",
        ]
    sockets = [
        word
        for channel, descriptor in channels.items()
        for word in ("-chardev", f"socket,id={channel},fd={descriptor}")
    ]
    return [
        emulator(),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        # A guest's watchdog would end it when this host is busy, or was asleep.
        *("-action", "watchdog=none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", machine, "-accel", _ACCELERATORS[hardware.accelerator]),
        *("-cpu", processor.qemu(hardware.accelerator)),
        *("-smp", str(hardware.cores), "-m", f"{hardware.memory}M"),
        *firmware,
        *sockets,
        *("-mon", "chardev=monitor,mode=control", "-serial", "chardev:console"),
        *(*drive, "-boot", "strict=on"),
        *("-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto", "-vga", "std"),
        # Without its boot ROM: nobody boots this machine over the network.
        *("-netdev", "user,id=network,restrict=on", "-device", "virtio-net-pci,netdev=network,romfile="),
        *(
            "-device",
            "virtio-serial-pci",
            "-device",
            f"virtserialport,id={_AGENT},chardev=agent,name={CHANNEL}",
        ),
    ]


def uefi_firmware() -> Firmware:
    """The host's UEFI firmware for a q35 machine, without Secure Boot. Raises HostError."""
    descriptors: dict[str, Path] = {}
    for directory in FIRMWARE_DIRECTORIES:
        for path in sorted(directory.glob("*.json")):
            descriptors.setdefault(path.name, path)
    for name in sorted(descriptors):
        # An empty file, or a link to /dev/null, masks the distribution's of that name.
        if found := _suitable(descriptors[name].read_text()):
            return found
    raise HostError(
        f"no UEFI firmware for x86_64 is described in {' or '.join(map(str, FIRMWARE_DIRECTORIES))}",
        "install OVMF: the package ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, EL)",
    )


def _suitable(text: str) -> Firmware | None:
    if not text.strip():
        return None
    described = json.loads(text)
    mapping = described["mapping"]
    target = any(
        target["architecture"] == "x86_64" and any(one.startswith("pc-q35") for one in target["machines"])
        for target in described["targets"]
    )
    # Enrolled keys refuse an unsigned GRUB; SMM is needed for nothing else, and slow under emulation.
    if (
        not target
        or "uefi" not in described["interface-types"]
        or {"requires-smm", "enrolled-keys"} & set(described["features"])
        or mapping["device"] != "flash"
        or "nvram-template" not in mapping
    ):
        return None
    code, variables = mapping["executable"], mapping["nvram-template"]
    return Firmware(Path(code["filename"]), code["format"], Path(variables["filename"]), variables["format"])


def _escaped(path: Path) -> str:
    """A path as a value among QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


def printable(line: bytes) -> str:
    """A line that a guest printed, without the terminal's escape sequences."""
    return _ESCAPES.sub("", line.decode(errors="replace"))
