"""Boots what was built, twice, and looks at it: does it come up, is it healthy, is each copy its own machine.

Both machines are throw-away overlays of the image, which is only read. All that a guest says is untrusted;
it is compared and quoted, never acted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vdibuild import machine, progress
from vdibuild.errors import VdibuildError, VerificationError
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
    r"No bootable device|BdsDxe: No bootable option": "the firmware found nothing to boot",
    r"Boot failed: not a bootable disk": "the firmware found nothing to boot",
    r"You are in (?:emergency|rescue) mode|Reached target .*(?:emergency\.target|Emergency Mode)": (
        "it ended in emergency mode"
    ),
    r"dracut-initqueue.*timeout|Entering emergency mode": "the initramfs did not find the root file system",
    r"ALERT! .* does not exist|Gave up waiting for root": "the initramfs did not find the root file system",
}
"""What a console shows, as a pattern, when a boot has failed; and what that means."""

_FAILURE = re.compile("|".join(f"(?:{pattern})" for pattern in FAILURES), re.MULTILINE)
_LAST_WORDS_SECONDS = 1.0  # a panic goes on printing
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

    def boot(name: str, picture: Path | None) -> Coroutine[None, None, _Seen]:
        return _boot(disk, form, hardware, seconds, work, name, picture)

    with progress.step("boot two copies"):
        if _room_for_two(hardware):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(boot("first", output / PICTURE)),
                        group.create_task(boot("second", None)),
                    ]
            except BaseExceptionGroup as failed:
                # The other machine was stopped because of the first error; one is enough to read.
                raise failed.exceptions[0] from None
            first, second = (task.result() for task in tasks)
        else:
            first = await boot("first", output / PICTURE)
            second = await boot("second", None)
    shared = sorted(path for path in first.identity if first.identity[path] == second.identity.get(path))
    if shared:
        raise VerificationError(
            f"two copies of the image have the same {', '.join(shared)}",
            "the image must be sealed: these are made at a machine's first boot",
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
        startup=first.startup,
        session=first.session,
        differing=tuple(sorted(first.identity)),
    )


async def _boot(
    disk: Path,
    form: Literal["raw", "qcow2"],
    hardware: Hardware,
    seconds: float,
    work: Path,
    name: str,
    picture: Path | None,
) -> _Seen:
    """Boot one machine and look at it. picture: the file that gets its screen."""
    async with machine.started(disk, form, hardware, work, name) as guest:
        looking = asyncio.create_task(_look(guest, time.monotonic(), picture))
        failing = asyncio.create_task(guest.console.shows(_FAILURE))
        ending = asyncio.create_task(guest.ended())
        tasks: tuple[asyncio.Task[object], ...] = (looking, failing, ending)
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if looking in done and not looking.exception():
                return looking.result()
            # A machine that ends, or fails, often takes the agent with it: what the console says comes first.
            await asyncio.wait((failing, ending), timeout=_LAST_WORDS_SECONDS)
            error = VerificationError(
                f"the {name} machine did not come up: ", tail=guest.console.tail()
            )
            raise error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
