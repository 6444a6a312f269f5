"""Boots a live ISO as a CD, with BIOS and with UEFI, and waits until it says that it is up."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict

from vdibuild import machine, progress
from vdibuild.errors import VerificationError
from vdibuild.machine import Hardware, Machine
from vdibuild.verify import FAILURES, PICTURE, both

UP = "vdibuild: the live system is up"
"""What a live system prints on its serial port when it has started."""

_FAILURE = re.compile("|".join(f"(?:{pattern})" for pattern in FAILURES), re.MULTILINE)
_FIRMWARES = ("bios", "uefi")
_LAST_WORDS_SECONDS = 1.0


class LiveVerification(BaseModel):
    """What was seen when a live system was booted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    accelerator: Literal["kvm", "tcg"]
    """How the machine ran: with the processor's help, or emulated."""
    up_seconds: dict[str, float]
    """From switching on until it was up, by firmware: bios, uefi."""

    @property
    def running_seconds(self) -> float:
        """The longest of its starts."""
        return max(self.up_seconds.values())


def verify(iso: Path, hardware: Hardware, *, seconds: float, output: Path, work: Path) -> LiveVerification:
    """Boot a live ISO with each firmware.

    hardware: its firmware does not matter. seconds: how long each start may take. output: the directory
    that gets `boot.png`, the screen of the last one. work: the directory for temporary files. Raises
    VerificationError, with the console's last lines; HostError when QEMU or the firmware is missing. Not to
    be called from a running event loop.
    """

    def start(firmware: str) -> Coroutine[None, None, float]:
        used = replace(hardware, firmware=cast(Literal["bios", "uefi"], firmware), medium="cdrom")
        return boot(iso, used, re.compile(UP), seconds, output / PICTURE, work)

    with progress.step("boot with BIOS and with UEFI"):
        times = asyncio.run(both(start, _FIRMWARES, hardware))
    return LiveVerification(
        accelerator=hardware.accelerator, up_seconds=dict(zip(_FIRMWARES, times, strict=True))
    )


async def boot(
    iso: Path, hardware: Hardware, sign: re.Pattern[str], seconds: float, picture: Path, work: Path
) -> float:
    """Boot an ISO until its serial port shows `sign`. Returns the seconds that took; see `verify`."""
    began = time.monotonic()
    async with machine.started(iso, "raw", hardware, work, hardware.firmware) as guest:
        seeing = asyncio.create_task(guest.console.shows(sign))
        failing = asyncio.create_task(guest.console.shows(_FAILURE))
        ending = asyncio.create_task(guest.ended())
        tasks = {seeing, failing, ending}
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            took = round(time.monotonic() - began, 1)
            if not seeing.done() and not ending.done():
                # The console often says more, and why: a panic goes on printing.
                await asyncio.wait({ending}, timeout=_LAST_WORDS_SECONDS)
            # What a machine says last may be read after its end is seen.
            if seeing.done() or sign.search(guest.console.text):
                await _pictured(guest, picture)
                progress.note(f"up with {hardware.firmware.upper()} after {took:.1f} s")
                return took
            if failing.done():
                said = failing.result()[0].strip()
                problem = next(meaning for pattern, meaning in FAILURES.items() if re.search(pattern, said))
                problem = f"{problem}: {said}"
            elif ending.done():
                problem = ending.result()
            else:
                problem = f"it was not up within {seconds:.0f} s"
            await _pictured(guest, picture)
            raise VerificationError(
                f"the live system did not come up with {hardware.firmware.upper()}: {problem}",
                f"its last screen is in {picture}" if picture.exists() else "",
                guest.console.tail(),
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pictured(guest: Machine, file: Path) -> None:
    """Save a machine's screen; there is none when the machine has ended."""
    try:
        file.write_bytes(await guest.screenshot("png"))
    except VerificationError:
        progress.log("the machine had ended before its screen could be saved")
