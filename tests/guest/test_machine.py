"""Throw-away machines that end as soon as they begin, several side by side."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vdibuild.machine import Hardware, started

# A jump to the processor's reset vector, as the first thing of a boot sector.
RESET = b"\xea\x00\x00\xff\xff".ljust(510, b"\0") + b"\x55\xaa"


def test_a_machine_that_ends_at_once_says_why(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(RESET.ljust(1 << 20, b"\0"))

    async def start(number: int) -> str:
        async with started(disk, "raw", Hardware("bios", 64, "tcg"), tmp_path, f"m{number}") as guest:
            return await guest.ended()

    async def several() -> list[str]:
        # In one loop, one after the other too: they get each other's descriptors.
        return [why for _ in range(4) for why in await asyncio.gather(*map(start, range(4)))]

    assert set(asyncio.run(several())) == {"it ended by itself (guest-reset)"}
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]
