"""Someone at a station, in a process of their own: gets a machine as the old client does, and stays.

    python -m tests.guest.sitting SIGNAL_PORT SPICE_PORT

Says "linked LEASE", then "over" when the session ends; leaves when its input ends.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import uuid

from tests.spice import Client
from vdibuild.pool import spice
from vdibuild.pool.signal_port import PHRASE

_MAIN_UUID = 114  # SPICE_MSG_MAIN_UUID (spice/enums.h)


async def sit_down(signals: int, screens: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", signals)
    while PHRASE.encode() not in (line := await reader.readline()):
        if not line:
            raise EOFError("the signal port hung up")
    client = Client({"plain": screens}, ssl.create_default_context())
    link = await client.link()
    if link.error:
        raise EOFError(f"refused with {link.error}")
    kind = 0
    while kind != _MAIN_UUID:
        data = spice.parse_data_header(await link.reader.readexactly(6), mini=True)
        kind, body = data.kind, await link.reader.readexactly(data.size)
    print("linked", uuid.UUID(bytes=body[:16]), flush=True)
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    over = asyncio.create_task(link.ended())
    await asyncio.wait((told, over), return_when=asyncio.FIRST_COMPLETED)
    if over.done():
        print("over", flush=True)
    link.close()
    writer.close()


if __name__ == "__main__":
    asyncio.run(sit_down(*map(int, sys.argv[1:])))
