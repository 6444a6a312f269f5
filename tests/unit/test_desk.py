"""The HTTPS desk, with real TLS: tokens, client certificates, places, .vv files."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests import pool as pools
from vdibuild.errors import InputError
from vdibuild.pool.desk import Desk, Door, tls_context
from vdibuild.pool.leases import State
from vdibuild.pool.stations import Stations, enrol


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, this host's certificate, and a station's."""
    directory = tmp_path_factory.mktemp("certificates")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")
    openssl(directory, *new, "-x509", "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.pem")
    for name, subject, extra in (
        ("host", "/CN=localhost", ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")),
        ("station", "/CN=reading-room", ()),
    ):
        issued = ("-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.pem")
        openssl(directory, *new, "-x509", "-subj", subject, *extra, *issued)
    return directory


@dataclass
class There:
    """A served desk. token: of the station `reception`."""

    pool: pools.Desk
    url: str
    token: str
    ca: Path

    async def call(self, token: str | None = None, certificate: Path | None = None) -> tuple[int, str, Any]:
        """Ask for a machine. Returns status, text and headers."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        context = ssl.create_default_context(cafile=str(self.ca))
        if certificate:
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url, headers=headers, ssl=context) as response,
        ):
            return response.status, await response.text(), response.headers


@contextlib.asynccontextmanager
async def serving(directory: Path, certificates: Path, **seconds: float) -> AsyncIterator[There]:
    pool = pools.desk(directory)
    known = directory / "stations"
    token = enrol(known, "reception")
    door = Door("pool.example.org", 5907, (certificates / "ca.pem").read_text())
    tls = tls_context(certificates / "host.pem", certificates / "host.key", certificates / "ca.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"https://localhost:{listening.getsockname()[1]}/v1/machine"
        desk = Desk(pool.broker, Stations(known), door, **seconds)
        async with desk.serving(listening, tls), pools.lapsing(pool.broker):
            yield There(pool, url, token, certificates / "ca.pem")
    pool.leases.close()


def test_a_connection_file(tmp_path: Path, certificates: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates) as there:
            machine = there.pool.clean()
            status, text, headers = await there.call(there.token)
            assert status == 200
            assert headers["Content-Type"] == "application/x-virt-viewer"
            assert headers["Cache-Control"] == "no-store"
            file = configparser.RawConfigParser()
            file.read_string(text)
            entries = dict(file["virt-viewer"])
            assert entries["type"] == "spice"
            assert entries["host"] == "pool.example.org"
            assert entries["tls-port"] == "5907"
            assert entries["delete-this-file"] == "1"
            assert "port" not in entries
            assert entries["ca"].replace("\\n", "\n").strip() == there.ca.read_text().strip()
            assert there.pool.relay.offers == {machine.lease: (None, entries["password"])}
            assert there.pool.leases.get(machine.lease).station == "reception"

    asyncio.run(run())


def test_virt_viewer_reads_it(tmp_path: Path, certificates: Path) -> None:
    """GLib's own parser, which virt-viewer uses, gives the CA back as it was."""
    glib = pytest.importorskip("gi.repository.GLib")
    ca = (certificates / "ca.pem").read_text()
    key_file = glib.KeyFile()

    async def run() -> str:
        async with serving(tmp_path, certificates) as there:
            there.pool.clean()
            return (await there.call(there.token))[1]

    text = asyncio.run(run())
    key_file.load_from_data(text, len(text), glib.KeyFileFlags.NONE)
    assert key_file.get_string("virt-viewer", "ca") == ca


@pytest.mark.parametrize("token", [None, "", "x" * 43, "\xff"])
def test_strangers(tmp_path: Path, certificates: Path, token: str | None) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates) as there:
            machine = there.pool.clean()
            status, _, _ = await there.call(token)
            assert status == 401
            assert there.pool.leases.get(machine.lease).state == State.CLEAN

    asyncio.run(run())


def test_a_station_with_a_certificate(tmp_path: Path, certificates: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates) as there:
            machine = there.pool.clean()
            assert (await there.call(certificate=certificates / "station.pem"))[0] == 200
            assert there.pool.leases.get(machine.lease).station == "reading-room"

    asyncio.run(run())


def test_calling_again_gives_the_same_machine(tmp_path: Path, certificates: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates) as there:
            there.pool.clean()
            there.pool.clean()
            first = await there.call(there.token)
            assert (await there.call(there.token))[1] == first[1]
            assert len(there.pool.relay.offers) == 1

    asyncio.run(run())


def test_the_place_is_kept(tmp_path: Path, certificates: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates, answer_seconds=0.2) as there:
            other = enrol(tmp_path / "stations", "hall")
            assert (await there.call(there.token))[:2] == (202, '{"place": 1}')
            assert (await there.call(other))[:2] == (202, '{"place": 2}')
            assert (await there.call(there.token))[:2] == (202, '{"place": 1}')
            there.pool.clean()
            assert (await there.call(other))[:2] == (202, '{"place": 1}')
            assert (await there.call(there.token))[0] == 200

    asyncio.run(run())


def test_the_place_of_a_silent_station_is_given_up(tmp_path: Path, certificates: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, certificates, answer_seconds=0.1, keep_seconds=0.2) as there:
            assert (await there.call(there.token))[0] == 202
            await pools.eventually(lambda: there.pool.broker.waiting == 0)

    asyncio.run(run())


def test_a_new_token_ends_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "stations"
    stations = Stations(file)
    first, other = enrol(file, "hall"), enrol(file, "office")
    assert stations.named(first) == "hall"
    second = enrol(file, "hall")
    assert (stations.named(first), stations.named(second), stations.named(other)) == (None, "hall", "office")
    assert file.stat().st_mode & 0o777 == 0o640
    assert first not in file.read_text()


def test_a_damaged_file_of_stations(tmp_path: Path) -> None:
    file = tmp_path / "stations"
    file.write_text("hall nonsense\n")
    with pytest.raises(InputError, match=r"stations:1: "):
        Stations(file).named("x")
    with pytest.raises(InputError, match="no name"):
        enrol(tmp_path / "other", "a b")
