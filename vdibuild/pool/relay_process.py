"""A pool's relay as a process of its own, which outlives the service that starts it.

DIRECTORY/relay.sock     its control socket
DIRECTORY/relay.json     its configuration, from the site file
DIRECTORY/relay.log      what it says
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from vdibuild import process
from vdibuild.errors import HostError, VdibuildError
from vdibuild.pool import control
from vdibuild.pool.relay import Config, Listener, SecureListener
from vdibuild.settings.pools import Pool

LOOK_SECONDS = 1.0
"""How often it is looked whether the relay is there."""

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
_STOP_SECONDS = 15.0
_TAIL_LINES = 5

_log = logging.getLogger(__name__)


def config(pool: Pool) -> Config:
    """The configuration of a pool's relay. pool: as Site.pool returns it."""
    desk = pool.desk
    return Config(
        control=pool.relay,
        plain=Listener(address=pool.listen, port=pool.spice_port) if pool.spice_port is not None else None,
        tls=SecureListener(
            address=pool.listen, port=desk.tls_port, certificate=desk.certificate, key=desk.key
        )
        if desk
        else None,
    )


@contextlib.asynccontextmanager
async def kept(pool: Pool) -> AsyncIterator[None]:
    """See that a relay runs for as long as the block does, which begins when one is there.

    One that runs already is left as it is; at the end of the block it goes on, with its sessions. Raises
    HostError when it does not start.
    """
    started = None if await _answers(pool.relay) else await _start(pool)
    keeper = asyncio.create_task(_keep(pool, started))
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def stop(pool: Pool) -> None:
    """End a pool's relay, and every session with it; nothing where there is none."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(pool.relay))
    except OSError:
        return
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            writer.write(control.Stop().line())
            while await reader.read(1 << 16):
                pass
            while pool.relay.exists():
                await asyncio.sleep(_POLL_SECONDS)
    writer.close()


async def _keep(pool: Pool, started: subprocess.Popen[bytes] | None) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if started is not None:
            started.poll()  # one that ended has to be buried
        if await _answers(pool.relay):
            continue
        _log.error("the relay is not at %s: starting one", pool.relay)
        try:
            started = await _start(pool)
        except VdibuildError as error:
            _log.error("%s", error)


async def _start(pool: Pool) -> subprocess.Popen[bytes]:
    file, log = pool.directory / "relay.json", pool.directory / "relay.log"
    try:
        file.write_text(config(pool).model_dump_json(indent=2), encoding="utf-8")
        with log.open("ab") as output:
            started = process.start(
                [sys.executable, "-m", "vdibuild.pool.relay", str(file)],
                env={"PYTHONPATH": str(Path(__file__).parents[2])},  # the same code as this
                stdout=output,
                outlives=True,
            )
    except OSError as error:
        raise HostError(f"the relay cannot be started in {pool.directory}: {error.strerror}") from None
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not await _answers(pool.relay):
                if started.poll() is not None:
                    raise HostError(f"the relay does not start: {_last(log)}", f"its log is {log}")
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        process.stop(started)
        raise HostError(
            f"the relay does not answer within {_START_SECONDS:.0f} s", f"its log is {log}"
        ) from None
    return started


async def _answers(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True


def _last(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
