"""A station from its start as a CD to a session, and after it; pictures of all its screens.

It needs a kiosk that is built: the ISO $VDIBUILD_KIOSK, or else the current one in the store of
$VDIBUILD_SITE. It is started four times; under emulation that takes minutes each. The pictures go to
$VDIBUILD_PICTURES, if that is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from qemu.qmp import QMPClient, QMPError

from tests import pool as pools
from tests.damage import flip
from tests.long import monitors, wire
from tests.long.wire import Wire
from tests.unit import test_signal_port
from vdibuild import host, kiosk, machine, process, site, station
from vdibuild.live import ISO
from vdibuild.machine import Console, Hardware
from vdibuild.settings.live_systems import KIOSK
from vdibuild.store import Store

SECONDS = 1500.0
SECURE_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.ms.fd")
SECURE_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
PASSWORD = "open sesame"
LOGIN = "let me in"
# A boot sector that prints what follows it by the BIOS's call 10h, function 0Eh, sets the loudspeaker's timer
# to 440 Hz, switches it on, and halts for good.
STICK_CODE = bytes.fromhex(
    "31c08ed8be2c7cfcac84c07409b40ebb0700cd10ebf2b0b6e643b8980ae64288e0e642e4610c03e661f4ebfd"
)
STICK_TEXT = "Greetings from the stick"
SOUND = "heard.wav"
WAV_HEADER = 44  # bytes before the first sample
GREYS = range(0x80, 0xC1)
"""About the usual colour of letters on a VGA text screen."""


class Guest:
    """The machine that the station runs on."""

    def __init__(self, directory: Path, monitor: QMPClient, console: Console) -> None:
        self._directory = directory
        self._monitor = monitor
        self.console = console
        self._seen = 0

    async def says(self, text: str, key: str = "") -> None:
        """Wait until the station says something, after what was waited for before.

        key: one that is pressed until then, again and again: before its window has the focus, a station
        hears none.
        """
        pattern = re.compile(f"(?s).{{{self._seen}}}.*?{re.escape(text)}")
        saying = asyncio.create_task(self.console.shows(pattern))
        try:
            while not saying.done():
                if key:
                    await self.press(key)
                await asyncio.wait((saying,), timeout=2 if key else None)
        finally:
            saying.cancel()
        self._seen = saying.result().end()

    async def press(self, keys: str) -> None:
        """Press keys together, by QEMU's names, parted by `-`."""
        await self.tells("send-key", keys=[{"type": "qcode", "data": key} for key in keys.split("-")])

    async def holds(self, key: str) -> None:
        """Hold a key for the first seconds, as a person does while a machine starts."""
        for _ in range(30):
            await self.press(key)
            await asyncio.sleep(0.2)

    async def types(self, text: str) -> None:
        """Type a line, of lower case letters and spaces."""
        for letter in text:
            await self.press("spc" if letter == " " else letter)
            await asyncio.sleep(0.2)  # a key is held for a tenth of a second
        await self.press("ret")

    async def cable(self, is_in: bool) -> None:
        await self.tells("set_link", name="network", up=is_in)

    async def plug_in(self) -> None:
        """Plug in the stick."""
        await self.tells("device_add", driver="usb-storage", id="stick", drive="stick", bus="usb.0")

    async def pull_out(self) -> None:
        """Pull it out again."""
        await self.tells("device_del", id="stick")

    async def pull_out_the_card(self) -> None:
        """Pull out what it was started from, as a stick."""
        place = "/machine/peripheral-anon"
        for device in cast(list[dict[str, str]], await self.tells("qom-list", path=place)):
            if device["type"] == "child<usb-storage>":
                await self.tells("device_del", id=f"{place}/{device['name']}")

    async def tells(self, command: str, **arguments: object) -> object:
        """Send a command to its QEMU's monitor."""
        return await self._monitor.execute(command, arguments)

    def heard(self) -> bool:
        """Whether its loudspeaker has made any sound so far."""
        file = self._directory / SOUND
        return file.exists() and any(file.read_bytes()[WAV_HEADER:])

    async def picture(self, name: str, **screen: object) -> bytes:
        """The screen's pixels; the picture is kept. screen: which, where there are several."""
        picture = kept(self._directory) / f"{name}.png"
        await self.tells("screendump", filename=str(picture), format="png", **screen)
        pixels = self._directory / "screen.ppm"
        await self.tells("screendump", filename=str(pixels), **screen)
        return pixels.read_bytes()

    async def drawn(self, name: str) -> bytes:
        """The same, when GTK has drawn what was said."""
        await asyncio.sleep(3)
        return await self.picture(name)


def kept(directory: Path) -> Path:
    """Where the pictures and the console's text go."""
    return Path(os.environ.get("VDIBUILD_PICTURES", directory))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The kiosk, whose settings know a server that is not there: DHCP names another one."""
    if "VDIBUILD_KIOSK" in os.environ:
        built = Path(os.environ["VDIBUILD_KIOSK"])
    else:
        loaded = site.load(Path(os.environ.get("VDIBUILD_SITE", site.DEFAULT_NAME)))
        built = Store(loaded.artifacts_directory, loaded.keys).get(KIOSK).path / ISO
    shutil.copyfile(built, tmp_path / ISO)
    (tmp_path / ISO).chmod(0o644)
    settings = {"server_ip": "198.51.100.1", "technician": station.hashed(PASSWORD)}
    kiosk.configure(tmp_path / ISO, settings)
    return tmp_path / ISO


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path)
    yield made
    made.close()


@contextlib.asynccontextmanager
async def started(
    hardware: Hardware,
    image: Path,
    directory: Path,
    network: Wire,
    *,
    is_secure: bool = False,
    graphics: Sequence[str] = ("-vga", "std"),
) -> AsyncIterator[Guest]:
    """Start it in that network. is_secure: with Secure Boot, by the keys that real machines have. graphics:
    QEMU's options.
    """
    ours, theirs = {}, {}
    for channel in ("monitor", "agent", "console"):
        ours[channel], theirs[channel] = socket.socketpair()
    assert hardware.medium != "disk"
    drive = machine._read_only(image, "raw", hardware.medium)
    argv = machine.command(hardware, drive, directory, {key: end.fileno() for key, end in theirs.items()})
    argv += ["-device", "qemu-xhci,id=usb"]
    argv += ["-blockdev", f"driver=raw,node-name=stick,file.driver=file,file.filename={stick(directory)}"]
    argv += ["-audiodev", f"wav,id=sound,path={directory / SOUND}"]
    argv += ["-device", "intel-hda", "-device", "hda-output,audiodev=sound"]
    card = argv.index("-vga")
    argv[card : card + 2] = graphics
    if is_secure:
        argv = with_secure_boot(argv, directory)
    argv[argv.index("user,id=network,restrict=on")] = (
        f"tap,id=network,ifname={wire.TAP},script=no,downscript=no"
    )
    with network.entered():
        qemu = process.start(
            argv, stdout=subprocess.DEVNULL, pass_fds=tuple(end.fileno() for end in theirs.values())
        )
    console = Console("station")
    monitor = QMPClient("station")
    try:
        for end in theirs.values():
            end.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours["console"])
        following = asyncio.create_task(console.follow(reader))
        await monitor.connect(ours["monitor"])
        yield Guest(directory, monitor, console)
        # A machine that is off has taken its monitor with it.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await monitor.disconnect()
        following.cancel()
        writer.close()
    finally:
        process.stop(qemu)
        ours["agent"].close()
        name = f"console-{hardware.firmware}-{hardware.medium}.txt"
        (kept(directory) / name).write_text(console.text)


def with_secure_boot(argv: list[str], directory: Path) -> list[str]:
    """The same machine with the firmware that has Microsoft's keys, whose variables only it can change."""
    shutil.copyfile(SECURE_VARIABLES, directory / "variables")
    plain = str(machine.uefi_firmware().code)
    argv = [word.replace(plain, str(SECURE_CODE)) for word in argv]
    argv = [f"{word},smm=on" if word.startswith("q35,") else word for word in argv]
    return [*argv, "-global", "driver=cfi.pflash01,property=secure,value=on"]


def hardware(firmware: str = "bios", medium: str = "cdrom") -> Hardware:
    # One processor: with two, QEMU's threads trip over the guest's patched kernel code.
    return Hardware(firmware, 1024, host.accelerator().name, medium=medium)  # type: ignore[arg-type]


def stick(directory: Path) -> Path:
    """What a person brings along: a bootable stick, with one partition of no use (IBM PC's MBR)."""
    code = STICK_CODE + STICK_TEXT.encode() + b"\r\n\0"
    partition = struct.pack("<B3sB3sII", 0x80, bytes(3), 0x0C, bytes(3), 1, 16383)
    file = directory / "stick.img"
    file.write_bytes(code.ljust(446, b"\0") + partition + bytes(48) + b"\x55\xaa" + bytes((8 << 20) - 512))
    return file


class Server:
    """A person's machine: nothing but its firmware, which starts what it is given by USB."""

    def __init__(self, running: subprocess.Popen[bytes], monitor: QMPClient, serial: Path) -> None:
        self.running = running
        self._monitor = monitor
        self._serial = serial
        self._seen = 0

    async def says(self, text: str) -> None:
        """Wait until it has printed something, after what was waited for before."""
        while (found := self._serial.read_bytes().find(text.encode(), self._seen)) < 0:
            await asyncio.sleep(0.5)
        self._seen = found + len(text)

    async def restart(self) -> None:
        await self._monitor.execute("system_reset")


@contextlib.asynccontextmanager
async def spice_server(port: int, directory: Path) -> AsyncIterator[Server]:
    ours, theirs = socket.socketpair()
    serial = directory / "server.txt"
    # graphics=off has the firmware repeat on the serial port what is on the screen.
    argv = ["qemu-system-x86_64", "-machine", "q35,graphics=off,pcspk-audiodev=sound", "-accel", "tcg"]
    argv += ["-m", "64", "-nodefaults", "-vga", "std", "-display", "none", "-audiodev", "spice,id=sound"]
    argv += ["-spice", f"port={port},addr=127.0.0.1,disable-ticketing=on"]
    argv += ["-device", "qemu-xhci", "-chardev", "spicevmc,name=usbredir,id=usb"]
    argv += ["-device", "usb-redir,chardev=usb"]
    # It looks again and again for something to start.
    argv += ["-boot", "order=c,reboot-timeout=3000", "-serial", f"file:{serial}"]
    argv += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
    monitor = QMPClient("server")
    with theirs:
        running = process.start(argv, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    try:
        await monitor.connect(ours)
        yield Server(running, monitor, serial)
        with contextlib.suppress(QMPError, EOFError, OSError):
            await monitor.disconnect()
    finally:
        process.stop(running)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port: int = unused.getsockname()[1]
        return port


def letters(pixels: bytes) -> int:
    """How many pixels are of a text screen's light grey, which the station's own screens have nowhere (PPM:
    three bytes each). Not all of them are: a machine's screen is enlarged.
    """
    _, body = parted(pixels)
    return sum(1 for red, green, blue in zip(*[iter(body)] * 3, strict=True) if red == green == blue in GREYS)


def parted(pixels: bytes) -> tuple[tuple[int, int], bytes]:
    """A picture's width and height, and its pixels, three bytes each (ppm(5), as QEMU writes it)."""
    _, size, _, body = pixels.split(b"\n", 3)
    width, height = size.split()
    return (int(width), int(height)), body


def brightness(pixels: bytes) -> float:
    """Of a whole picture, 0 to 255."""
    _, body = parted(pixels)
    return sum(body) / len(body)


async def linked(there: pools.Desk) -> None:
    """Tell the broker, as the relay does, that the viewer has come for what was offered."""
    while True:
        for one in there.leases.living(pools.POOL):
            if one.linked is None and one.offered is not None:
                there.broker.linked(one.lease, "127.0.0.1")
        await asyncio.sleep(0.2)


def test_nobody_can_log_in(image: Path, tmp_path: Path) -> None:
    """By what is in the ISO: no password, no consoles that ask for one."""
    root = tmp_path / "squashfs.img"
    with root.open("wb") as file:
        subprocess.run(["isoinfo", "-R", "-i", image, "-x", "/LiveOS/squashfs.img"], check=True, stdout=file)

    def unsquashed(*options: str) -> str:
        argv = ["unsquashfs", *options]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    shadow = unsquashed("-cat", str(root), "etc/shadow").splitlines()
    users = {name: password for name, password, *_ in (line.split(":") for line in shadow)}
    assert {"root", "station"} <= users.keys()
    assert all(password.startswith(("!", "*")) for password in users.values()), users
    units = unsquashed("-ll", str(root), "etc/systemd/system")
    for unit in ("getty@.service", "serial-getty@.service", "autovt@.service", "ctrl-alt-del.target"):
        assert re.search(rf"/{re.escape(unit)} -> /dev/null$", units, re.MULTILINE), unit
    # Servers would bring their own sockets and units; these are systemd's and D-Bus's.
    assert not re.search(r"ssh|avahi|cups|rpcbind|exim|postfix", units)


def test_a_session(image: Path, tmp_path: Path, network: Wire) -> None:
    right, wrong = f"server_ip={wire.SERVER}", f"server_ip={wire.SERVER};language=xx"

    async def run() -> None:
        there = pools.desk(tmp_path)
        behind = free_port()
        async with (
            asyncio.timeout(SECONDS),
            test_signal_port.serving(there) as signal,
            started(hardware(), image, tmp_path, network) as guest,
        ):
            with network.dhcp(right):
                await guest.says(station.UP)
                assert letters(await guest.picture("welcome")) == 0
                await nothing_is_open(network)
                # The server of DHCP's answer, which nobody has started.
                await guest.says("screen: The server cannot be reached", key="ret")
                await guest.says(f"{wire.SERVER} port 5905: Connection refused")
                await guest.drawn("unreachable")
                await guest.cable(False)
                await guest.says("screen: There is no network")
                await guest.drawn("no-network")
            with network.dhcp(wrong):
                await guest.cable(True)
                await guest.says("screen: The settings of this station are wrong | DHCP option 224, line 2")
                await guest.drawn("broken")
                await guest.cable(False)
            with network.dhcp(f"{right};sound=yes"):
                await guest.cable(True)
                # It finds its way by itself; the server is back, too.
                async with (
                    spice_server(behind, tmp_path) as server,
                    network.forwarded(5905, signal),
                    network.forwarded(5906, behind),
                ):
                    await guest.says("screen: All computers are in use | You are number 1 in line")
                    await guest.drawn("in-line")
                    await guest.plug_in()
                    there.clean()
                    telling = asyncio.create_task(linked(there))
                    await guest.says("the viewer begins")
                    while letters(await guest.picture("session")) < 1000:
                        await asyncio.sleep(1)
                    # The machine starts the person's stick, which was there before; it is seen and heard.
                    await server.says(STICK_TEXT)
                    while not guest.heard():
                        await asyncio.sleep(0.5)
                    await guest.drawn("stick")
                    # One that is plugged in during a session goes over as well.
                    await guest.pull_out()
                    await server.restart()
                    await server.says("No bootable device")
                    await guest.plug_in()
                    await server.says(STICK_TEXT)
                    # The machine is gone: the session ends, and the station begins anew.
                    process.stop(server.running)
                    await guest.says("the viewer ended with status 0")
                    telling.cancel()
                await guest.says(station.UP)
                assert letters(await guest.picture("afterwards")) == 0
                await guest.says("screen: For the technician", key="ctrl-alt-t")
                await guest.drawn("password")
                await guest.types(PASSWORD)
                await guest.says("screen: This station")
                await guest.drawn("technician")
                await guest.types("off")
                await guest.says("the technician wants it: power-off")
                await guest.says("reboot: Power down")

    asyncio.run(run())


async def nothing_is_open(network: Wire) -> None:
    """No TCP port of the station answers, not even with a refusal."""
    assert await network.open_ports(wire.GUEST, range(1, 65536)) == []
    # As seen by a scan that finds what there is.
    assert await network.open_ports(wire.SERVER, range(1, 10)) == list(range(1, 10))


def test_a_flipped_bit(image: Path, tmp_path: Path, network: Wire) -> None:
    """It is noticed by a station that is asked to look, as by the key C while it starts."""
    flip(image, image.stat().st_size // 2)

    async def run() -> None:
        async with (
            asyncio.timeout(SECONDS),
            started(hardware(), image, tmp_path, network) as guest,
        ):
            await guest.holds("c")
            await guest.says("The card is being checked")
            await guest.says("THIS CARD IS DAMAGED")
            await guest.says("LiveOS/squashfs.img: FAILED")
            await guest.drawn("damaged")

    asyncio.run(run())


def test_a_card_that_is_pulled_out(image: Path, tmp_path: Path, network: Wire) -> None:
    async def run() -> None:
        async with (
            asyncio.timeout(SECONDS),
            started(hardware("bios", "usb"), image, tmp_path, network) as guest,
        ):
            await guest.says(station.UP)
            assert letters(await guest.picture("before")) == 0
            await guest.pull_out_the_card()
            await guest.says("THIS CARD CANNOT BE READ")
            # X is gone, and does not come back.
            assert letters(await guest.drawn("unreadable")) > 0

    asyncio.run(run())


def test_two_monitors_and_a_login(image: Path, tmp_path: Path, network: Wire) -> None:
    kiosk.configure(image, {"login": station.hashed(LOGIN), "server_ip": wire.SERVER})

    async def run() -> None:
        there = pools.desk(tmp_path)
        behind = free_port()
        async with (
            asyncio.timeout(SECONDS),
            test_signal_port.serving(there) as signal,
            spice_server(behind, tmp_path),
            network.forwarded(5905, signal),
            network.forwarded(5906, behind),
            started(hardware(), image, tmp_path, network, graphics=monitors.options(tmp_path)) as guest,
        ):
            second = {"device": monitors.CARD, "head": 1}
            with network.dhcp(f"server_ip={wire.SERVER}"), monitors.plugged_in(tmp_path, 1024, 768):
                await guest.says(station.UP)
                first = await guest.drawn("two-monitors-first")
                other = await guest.picture("two-monitors-second", **second)
                assert parted(other)[0] == (1024, 768)
                assert abs(brightness(first) - brightness(other)) < 20
                await guest.says("screen: Log in", key="ret")
                await guest.drawn("two-monitors-login")
                await guest.types("wrong")
                await guest.says("screen: Wrong password")
                await asyncio.sleep(1)
                await guest.picture("two-monitors-wrong")
                await guest.says("screen: Log in")
                await guest.drawn("two-monitors-once-more")  # what is typed before is not taken
                await guest.types(LOGIN)
                await guest.says("screen: All computers are in use")
                await guest.drawn("two-monitors-in-line-first")
                await guest.picture("two-monitors-in-line-second", **second)
                there.clean()
                telling = asyncio.create_task(linked(there))
                await guest.says("the viewer begins")
                while letters(await guest.picture("two-monitors-session")) < 1000:
                    await asyncio.sleep(1)
                await guest.picture("two-monitors-session-second", **second)
                telling.cancel()

    asyncio.run(run())


def test_secure_boot_from_a_usb_stick(image: Path, tmp_path: Path, network: Wire) -> None:
    with image.open("r+b") as file:
        # OVMF starts a disk through El Torito, where there is one, and would hide a bad partition table.
        # The boot record is the second volume descriptor (El Torito 1.0, figure 7).
        file.seek(17 * 2048 + 7)
        assert file.read(23) == b"EL TORITO SPECIFICATION"
        file.seek(17 * 2048 + 7)
        file.write(bytes(23))

    async def run() -> None:
        async with (
            asyncio.timeout(SECONDS),
            started(hardware("uefi", "usb"), image, tmp_path, network, is_secure=True) as guest,
        ):
            await guest.says(station.UP)
            await guest.says("screen: For the technician", key="ctrl-alt-t")
            await guest.drawn("secure-password")  # before that, keys are lost
            await guest.types(PASSWORD)
            await guest.says("UEFI with Secure Boot")
            await guest.drawn("secure-boot")

    asyncio.run(run())
