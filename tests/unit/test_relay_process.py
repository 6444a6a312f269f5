"""A pool's relay is started, found again, started anew, and ended; as the process that it really is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from tests import spice as fakes
from vdibuild.errors import HostError
from vdibuild.pool import relay_process
from vdibuild.settings.pools import Desk, Pool

SECONDS = 30


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"image": "small", "listen": "127.0.0.1", "spice_port": port}
    return Pool.model_validate(values | {"directory": tmp_path, "relay": tmp_path / "relay.sock"})


def serving(pool: Pool) -> int:
    """The process that listens at the control socket (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(pool.relay))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("iii", credentials)[0])


def test_it_outlives_who_started_it_until_it_is_stopped(pool: Pool) -> None:
    async def scene() -> None:
        async with relay_process.kept(pool):
            first = serving(pool)
        assert serving(pool) == first
        async with relay_process.kept(pool):
            assert serving(pool) == first
        assert pool.spice_port is not None
        _, writer = await asyncio.open_connection("127.0.0.1", pool.spice_port)
        writer.close()
        await relay_process.stop(pool)
        assert not pool.relay.exists()
        await relay_process.stop(pool)

    asyncio.run(asyncio.wait_for(scene(), SECONDS))


def test_one_that_was_killed_is_started_anew(pool: Pool) -> None:
    async def scene() -> None:
        async with relay_process.kept(pool):
            first = serving(pool)
            os.kill(first, signal.SIGKILL)
            while True:
                try:
                    if serving(pool) != first:
                        break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.05)
        await relay_process.stop(pool)

    asyncio.run(asyncio.wait_for(scene(), SECONDS))


def test_one_that_cannot_start(pool: Pool) -> None:
    async def scene(listening: socket.socket) -> None:
        taken = pool.model_copy(update={"spice_port": listening.getsockname()[1]})
        with pytest.raises(HostError, match=r"the relay does not start: .*Address already in use"):
            async with relay_process.kept(taken):
                raise AssertionError("it cannot run")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        asyncio.run(asyncio.wait_for(scene(listening), SECONDS))


def test_its_tls_is_the_desks(tmp_path: Path, pool: Pool) -> None:
    made = fakes.certificates(tmp_path)
    desk = Desk(certificate=made.certificate, key=made.key, ca=made.ca, host="127.0.0.1", tls_port=5999)
    config = relay_process.config(pool.model_copy(update={"desk": desk, "spice_port": None}))
    assert config.plain is None
    assert config.tls
    assert (config.tls.port, config.tls.certificate) == (5999, made.certificate)
