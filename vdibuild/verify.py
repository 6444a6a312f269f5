"""Boots what was built, twice, and looks at it: does it come up, is it healthy, is each copy its own machine.

Both machines are throw-away overlays of the image, which is only read. All that a guest says is untrusted;
it is compared and quoted, never acted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from vdibuild import machine, progress
from vdibuild.errors import VerificationError
from vdibuild.machine import Hardware, Machine

PICTURE = "boot.png"
"""The name of the picture of the first machine's screen: when it was up, or when it failed."""

IDENTITY = (
    "/etc/machine-id",
    "/etc/ssh/ssh_host_*_key.pub",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/NetworkManager/secret_key",
    "/etc/hostid",
    "/etc/iscsi/initiatorname.iscsi",
    "/etc/nvme/hostid",
)
"""Files that tell one machine from another: where two copies of an image have one, it must differ."""

FAILURES = {
    r"Kernel panic - not syncing: .*": "the kernel panicked",
    r"grub rescue> ?$": "GRUB did not find its own files",
    r"grub> ?$": "GRUB found no boot menu",
    r"No bootable device|Boot failed: not a bootable disk": "the firmware found nothing to boot",
    r"BdsDxe: No bootable option|UEFI Interactive Shell": "the firmware found nothing to boot",
    r"You are in (?:emergency|rescue) mode|Reached target .*(?:emergency\.target|Emergency Mode)": (
        "it ended in emergency mode"
    ),
    r"dracut-initqueue.*timeout|Entering emergency mode": "the initramfs did not find the root file system",
    r"dracut: FATAL: .*|dracut Warning: Boot has failed": "the initramfs gave up",
    r"-- Press any key to proceed --": "systemd-firstboot waits for a person at the console",
    r"ALERT! .* does not exist|Gave up waiting for root": "the initramfs did not find the root file system",
}
"""What a console shows, as a pattern, when a boot has failed; and what that means."""

_FAILURE = re.compile("|".join(f"(?:{pattern})" for pattern in FAILURES), re.MULTILINE)
_STARTED = re.compile(
    r" login: ?$|Reached target .*(?:multi-user\.target|graphical\.target|Multi-User|Graphical)", re.MULTILINE
)
_T = TypeVar("_T")
_FIRST, _SECOND = "first", "second"
_LAST_WORDS_SECONDS = 1.0
_LATE_ANSWER_SECONDS = 15.0
_SPARE_MEMORY = 512  # MiB that two machines side by side leave to the host
_SETTLE_SECONDS = 180.0  # for a desktop to stop drawing; one with a moving picture never does


class Verification(BaseModel):
    """What was seen when an image was booted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    accelerator: Literal["kvm", "tcg"]
    """How the machine ran: with the processor's help, or emulated."""
    firmware: Literal["bios", "uefi"]
    """What the machine booted with."""
    os: str
    """The operating system as it names itself, such as Debian GNU/Linux 13 (trixie)."""
    os_id: str
    """The operating system's identifier, such as debian."""
    os_version: str
    """Its version, such as 13."""
    kernel: str
    """The release of the running kernel."""
    host_name: str
    """The name the machine gave itself."""
    agent_seconds: float
    """From switching on to the guest agent's first answer."""
    running_seconds: float
    """From switching on until every unit had started."""
    failed_units: tuple[str, ...]
    """The units that failed. An image with any is refused."""
    startup: dict[str, float]
    """Seconds as systemd-analyze tells them, by part: firmware, loader, kernel, initrd, userspace."""
    session: str
    """The user of the graphical session; empty on a machine without a desktop."""
    differing: tuple[str, ...]
    """The files that identify a machine, and differed between the two."""


@dataclass(frozen=True)
class _Seen:
    """What one machine showed. identity: SHA-256 by path."""

    os: dict[str, str]
    host_name: str
    agent_seconds: float
    running_seconds: float
    startup: dict[str, float]
    session: str
    identity: dict[str, str]


def verify(
    disk: Path,
    form: Literal["raw", "qcow2"],
    hardware: Hardware,
    *,
    seconds: float,
    output: Path,
    work: Path,
) -> Verification:
    """Boot a disk image twice and look at both machines.

    form: the disk's image format. hardware: of each machine. seconds: how long each may take until it has
    started. output: the directory that gets `boot.png`. work: the directory for temporary files. Raises
    VerificationError, which says what was wrong and has the console's last lines; HostError when QEMU does
    not start. Not to be called from a running event loop: there, await `verified`.
    """
    return asyncio.run(verified(disk, form, hardware, seconds=seconds, output=output, work=work))


async def verified(
    disk: Path,
    form: Literal["raw", "qcow2"],
    hardware: Hardware,
    *,
    seconds: float,
    output: Path,
    work: Path,
) -> Verification:
    """As `verify`, for a program that has an event loop."""

    def boot(name: str) -> Coroutine[None, None, _Seen]:
        return _boot(disk, form, hardware, seconds, output / PICTURE, work, name, _look)

    with progress.step("boot two copies"):
        first, second = await both(boot, (_FIRST, _SECOND), hardware)
    shared = sorted(path for path in first.identity if first.identity[path] == second.identity.get(path))
    if shared:
        raise VerificationError(
            f"two copies of the image have the same {', '.join(shared)}",
            "the image must be sealed: each machine makes its own at its first boot",
        )
    return Verification(
        accelerator=hardware.accelerator,
        firmware=hardware.firmware,
        os=first.os.get("pretty-name", ""),
        os_id=first.os.get("id", ""),
        os_version=first.os.get("version-id", ""),
        kernel=first.os.get("kernel-release", ""),
        host_name=first.host_name,
        agent_seconds=first.agent_seconds,
        running_seconds=first.running_seconds,
        failed_units=(),
        startup=first.startup,
        session=first.session,
        differing=tuple(sorted(first.identity)),
    )


def starts(
    disk: Path,
    form: Literal["raw", "qcow2"],
    hardware: Hardware,
    *,
    seconds: float,
    picture: Path,
    work: Path,
) -> float:
    """Boot a copy of a disk that need not be ours until it has started; returns the seconds that took.

    It has when its guest agent answers, or a login prompt or a running system shows on its serial console.
    picture: the file for the screen of a machine that fails; the other arguments and errors as for `verify`.
    """
    return asyncio.run(_boot(disk, form, hardware, seconds, picture, work, _FIRST, _wait))


async def both(
    boot: Callable[[str], Coroutine[None, None, _T]], names: tuple[str, str], hardware: Hardware
) -> tuple[_T, _T]:
    """What `boot` returns for each of two machines of that hardware: side by side, where there is room.

    When one fails, the other is stopped before the error goes on.
    """
    if not _room_for_two(hardware):
        return await boot(names[0]), await boot(names[1])
    tasks = [asyncio.create_task(boot(name)) for name in names]
    try:
        first, second = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return first, second


def _room_for_two(hardware: Hardware) -> bool:
    """Whether this host has the memory and the processors for two such machines at a time."""
    text = Path("/proc/meminfo").read_text()
    available = int(re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[0]) // 1024
    processors = len(os.sched_getaffinity(0))
    return available >= 2 * hardware.memory + _SPARE_MEMORY and processors >= 2 * hardware.cores


async def _boot(
    disk: Path,
    form: Literal["raw", "qcow2"],
    hardware: Hardware,
    seconds: float,
    picture: Path,
    work: Path,
    name: str,
    look: Callable[[Machine, Path | None], Coroutine[None, None, _T]],
) -> _T:
    """Boot one machine and look at it; `picture` gets the first one's screen, or that of one that fails."""
    async with machine.started(disk, form, hardware, work, name) as guest:
        looking = asyncio.create_task(look(guest, picture if name == _FIRST else None))
        failing = asyncio.create_task(guest.console.shows(_FAILURE))
        ending = asyncio.create_task(guest.ended())
        tasks = {looking, failing, ending}
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if looking.done() and not looking.exception():
                return looking.result()
            if not ending.done():
                # The console often says more, and why: a panic goes on printing.
                await asyncio.wait({ending}, timeout=_LAST_WORDS_SECONDS)
            if failing.done():
                said = failing.result()[0].strip()
                problem, hint = f"{_meaning(said)}: {said}", ""
            elif ending.done():
                problem, hint = ending.result(), ""
            elif looking.done():
                looking.result()
            else:
                problem, hint = await _late(guest, seconds)
            raise VerificationError(f"the {name} machine did not come up: {problem}", hint)
        except VerificationError as error:
            error.tail = guest.console.tail()
            if await _pictured(guest, picture):
                error.hint = "\n  ".join(filter(None, (error.hint, f"its screen is in {picture}")))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _meaning(said: str) -> str:
    return next(meaning for pattern, meaning in FAILURES.items() if re.search(pattern, said))


async def _late(guest: Machine, seconds: float) -> tuple[str, str]:
    """Why a machine that shows no failure has not started in time, and what to do."""
    if guest.has_agent:
        waiting = "something that its agent does not tell"
        with contextlib.suppress(VerificationError, TimeoutError):
            async with asyncio.timeout(_LATE_ANSWER_SECONDS):
                jobs = await guest.agent.run(["systemctl", "list-jobs", "--no-legend", "--plain"])
                running = [line.split()[1] for line in jobs.stdout.splitlines() if line.endswith("running")]
                waiting = ", ".join(running) or "its desktop"
        return (
            f"after {seconds:.0f} s it still waits for {waiting}",
            "boot_seconds in the site file gives it more time",
        )
    if not guest.console.tail():
        return (
            f"nothing was heard of it for {seconds:.0f} s",
            'let the kernel speak on the serial port: bootloader --append="console=tty0 console=ttyS0"',
        )
    return (
        f"its guest agent did not answer within {seconds:.0f} s",
        "the image needs the package qemu-guest-agent; boot_seconds in the site file gives it more time",
    )


async def _look(guest: Machine, picture: Path | None) -> _Seen:
    """Wait until a machine has started, and look at it from inside. picture: the file for its screen."""
    began = time.monotonic()
    await guest.answering()
    agent_seconds = time.monotonic() - began
    progress.note(f"{guest.name} machine answers after {agent_seconds:.1f} s")
    state = (await guest.agent.run(["systemctl", "is-system-running", "--wait"])).stdout.strip()
    running_seconds = time.monotonic() - began
    if state != "running":
        raise await _unhealthy(guest, state)
    progress.note(f"{guest.name} machine has started after {running_seconds:.1f} s")
    if (await guest.agent.run(["test", "-w", "/"])).status != 0:
        raise VerificationError(f"the root file system of the {guest.name} machine is read-only")
    session = await _session(guest)
    seen = _Seen(
        os=await guest.agent.ask("guest-get-osinfo"),
        host_name=(await guest.agent.ask("guest-get-host-name"))["host-name"],
        agent_seconds=round(agent_seconds, 1),
        running_seconds=round(running_seconds, 1),
        startup=_startup((await guest.agent.run(["systemd-analyze", "time"])).stdout),
        session=session,
        identity=await _identity(guest),
    )
    if picture:
        await _drawn(guest, desktop=bool(session))
        await _pictured(guest, picture)
    return seen


async def _wait(guest: Machine, picture: Path | None) -> float:
    """Wait until a machine shows in any way that it has started; returns the seconds that took."""
    began = time.monotonic()
    signs = [asyncio.create_task(guest.answering()), asyncio.create_task(_prompted(guest))]
    try:
        await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for sign in signs:
            sign.cancel()
        await asyncio.gather(*signs, return_exceptions=True)
    return round(time.monotonic() - began, 1)


async def _prompted(guest: Machine) -> None:
    await guest.console.shows(_STARTED)


async def _unhealthy(guest: Machine, state: str) -> VerificationError:
    """The error for a machine that has started, but not well: the failed units, with their last words."""
    listed = await guest.agent.run(["systemctl", "list-units", "--failed", "--no-legend", "--plain"])
    units = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
    if not units:
        return VerificationError(f"the {guest.name} machine's state is {state or 'unknown'}, not running")
    words = []
    for unit in units:
        journal = await guest.agent.run(["journalctl", "-b", "-q", "-n", "8", "-o", "cat", "-u", unit])
        words += [f"{unit}: {line}" for line in journal.stdout.splitlines()]
    return VerificationError(
        f"units failed on the {guest.name} machine: {', '.join(units)}", "\n  ".join(words)
    )


async def _identity(guest: Machine) -> dict[str, str]:
    """SHA-256 of each file that identifies this machine, by path."""
    # The patterns are the guest's shell's to expand; a file that is not there is no error.
    summed = await guest.agent.run(["sh", "-c", f"sha256sum -- {' '.join(IDENTITY)}"])
    digests = {
        path: digest for digest, _, path in (line.partition("  ") for line in summed.stdout.splitlines())
    }
    identifier = await guest.agent.run(["cat", "/etc/machine-id"])
    if not re.fullmatch(r"[0-9a-f]{32}\n?", identifier.stdout):
        raise VerificationError(f"the {guest.name} machine has no valid /etc/machine-id")
    return digests


def _startup(text: str) -> dict[str, float]:
    """The parts of systemd-analyze's "Startup finished in 2.1s (kernel) + 1min 3.5s (userspace) = …"."""
    parts: dict[str, float] = {}
    for duration, name in re.findall(r"((?:\d[\d.]*(?:h|min|ms|s) ?)+)\((\w+)\)", text):
        units = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 0.001}
        pieces = re.findall(r"([\d.]+)(h|min|ms|s)", duration)
        parts[name] = round(sum(float(number) * units[unit] for number, unit in pieces), 3)
    return parts


async def _session(guest: Machine) -> str:
    """The user of the graphical session, once there is one; empty on a machine without a desktop."""
    manager = await guest.agent.run(["systemctl", "is-active", "display-manager.service"])
    if manager.stdout.strip() != "active":
        return ""
    while True:
        listed = await guest.agent.run(["loginctl", "list-sessions", "--no-legend"])
        # Columns: session, uid, user, seat, …
        for words in map(str.split, listed.stdout.splitlines()):
            if len(words) > 3 and words[3] == "seat0":
                return words[2]
        await asyncio.sleep(1)


async def _drawn(guest: Machine, desktop: bool) -> None:
    """Wait until something is on the screen; for a desktop, until it is no more being drawn."""
    end = time.monotonic() + _SETTLE_SECONDS
    pause = 3.0 if desktop else 0.5
    before, used = b"", 0.0
    while time.monotonic() < end:
        pixels, now_used = await _pixels(guest), guest.processor_seconds()
        idle = now_used - used < pause / 2
        if _covered(pixels) > (0.01 if desktop else 0.0) and (
            not desktop or (idle and _changed(before, pixels) < 0.005)
        ):
            return
        before, used = pixels, now_used
        await asyncio.sleep(pause)
    if not _covered(await _pixels(guest)):
        raise VerificationError(f"the screen of the {guest.name} machine stays blank")


async def _pixels(guest: Machine) -> bytes:
    """A sample of the screen: every seventh pixel, a byte each."""
    image = await guest.screenshot("ppm")
    # PPM, binary: "P6", width, height, 255, each after white space, one white space, three bytes a pixel.
    header = re.match(rb"P6\s+\d+\s+\d+\s+\d+\s", image)
    body = image[header.end() :] if header else b""
    return body[1::21]  # the green of it


def _covered(pixels: bytes) -> float:
    """The share of the screen that is not of the colour most of it has."""
    return 1 - Counter(pixels).most_common(1)[0][1] / len(pixels) if pixels else 0.0


def _changed(before: bytes, after: bytes) -> float:
    """The share of the screen that is not what it was."""
    if len(before) != len(after) or not after:
        return 1.0
    return sum(one != other for one, other in zip(before, after, strict=True)) / len(after)


async def _pictured(guest: Machine, file: Path) -> bool:
    """Save a machine's screen; False when it has none any more."""
    try:
        file.write_bytes(await guest.screenshot("png"))
    except VerificationError:
        return False
    return True
