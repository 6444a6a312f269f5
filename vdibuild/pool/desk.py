"""The HTTPS desk: one call gives a known station a .vv file, with which virt-viewer opens its machine.

    POST /v1/machine        Authorization: Bearer TOKEN, or a client certificate

200: the .vv file (virt-viewer's own format: remote-viewer(1), CONNECTION FILE). 202: none is free yet; JSON
with the station's place, which is kept for half a minute: call again. 401: unknown. 429: too many wait. 503:
no machines are given out now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web

from vdibuild.errors import InputError
from vdibuild.pool.broker import Broker, FullError, Offer, Place, Station
from vdibuild.pool.stations import Stations

_LARGEST_BODY = 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    """Where clients find the relay. host: a name in its certificate. ca: that certificate's CA, PEM."""

    host: str
    tls_port: int
    ca: str


def connection_file(offer: Offer, door: Door, title: str) -> str:
    """The .vv file for an offer: a key file as GLib reads it."""
    entries = {
        "type": "spice",
        "host": door.host,
        "tls-port": str(door.tls_port),
        "password": offer.ticket or "",
        "ca": door.ca.replace("\\", "\\\\").replace("\n", "\\n"),
        "title": title,
        "fullscreen": "1",
        "delete-this-file": "1",
    }
    lines = "".join(f"{key}={value}\n" for key, value in entries.items())
    return f"[virt-viewer]\n{lines}"


class Desk:
    """Serves the HTTPS desk for one pool's broker; see `serving`.

    answer_seconds: how long a call waits for a machine, less than what proxies and clients give up after.
    keep_seconds: how long the place of a station that does not call is kept.
    """

    def __init__(
        self,
        broker: Broker,
        stations: Stations,
        door: Door,
        answer_seconds: float = 25,
        keep_seconds: float = 30,
    ) -> None:
        self._broker = broker
        self._stations = stations
        self._door = door
        self._answer_seconds = answer_seconds
        self._keep_seconds = keep_seconds
        self._places: dict[str, Place] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @contextlib.asynccontextmanager
    async def serving(self, listening: socket.socket, tls: ssl.SSLContext) -> AsyncIterator[None]:
        """Serve stations at a listening socket for as long as the block runs."""
        application = web.Application(client_max_size=_LARGEST_BODY)
        application.router.add_post("/v1/machine", self._machine)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, listening, ssl_context=tls).start()
            yield
        finally:
            for timer in self._timers.values():
                timer.cancel()
            for place in self._places.values():
                place.leave()
            await runner.cleanup()

    async def _machine(self, request: web.Request) -> web.Response:
        name = self._name(request)
        if name is None:
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"}, text="unknown station\n")
        try:
            place = self._place(Station(name, request.remote or "", ticketed=True))
        except FullError as error:
            raise web.HTTPTooManyRequests(headers={"Retry-After": "10"}, text=f"{error.message}\n") from None
        try:
            await asyncio.wait((place.offered,), timeout=self._answer_seconds)
        finally:
            self._keep(name)
        if not place.offered.done():
            return web.json_response({"place": place.position}, status=202, headers={"Retry-After": "0"})
        self._leave(name)
        return self._given(place.offered.result())

    def _given(self, offer: Offer) -> web.Response:
        left = max(0.0, offer.expires - asyncio.get_running_loop().time())
        expires = datetime.now(UTC) + timedelta(seconds=left)
        return web.Response(
            body=connection_file(offer, self._door, offer.machine.name).encode(),
            content_type="application/x-virt-viewer",
            headers={
                "Content-Disposition": 'attachment; filename="machine.vv"',
                "Cache-Control": "no-store",
                "Expires": expires.strftime("%a, %d %b %Y %H:%M:%S GMT"),
            },
        )

    def _name(self, request: web.Request) -> str | None:
        """Who calls: by the common name of the client certificate, else by the token."""
        transport = request.transport
        certificate = transport.get_extra_info("peercert") if transport else None
        for relative in (certificate or {}).get("subject", ()):
            for key, value in relative:
                if key == "commonName":
                    return str(value)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            return self._stations.named(token.strip())
        except InputError as error:
            _log.error("%s", error)
            return None

    def _place(self, station: Station) -> Place:
        """The place the station has, or a new one at the end of the line."""
        timer = self._timers.pop(station.name, None)
        if timer:
            timer.cancel()
        place = self._places.get(station.name)
        if place is None or (place.offered.done() and place.offered.result().settled.done()):
            place = self._places[station.name] = self._broker.enter(station)
        return place

    def _keep(self, name: str) -> None:
        """Give the place up unless the station calls again soon."""
        before = self._timers.pop(name, None)
        if before:
            before.cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(self._keep_seconds, self._leave, name)

    def _leave(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer:
            timer.cancel()
        place = self._places.pop(name, None)
        if place:
            place.leave()


def tls_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """TLS with this host's certificate; stations may show one of `client_ca`'s. Raises InputError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for path, load in (
        (certificate, lambda: context.load_cert_chain(certificate, key)),
        (client_ca, lambda: context.load_verify_locations(client_ca)),
    ):
        if path is not None:
            _load(path, load)
    if client_ca:
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _load(path: Path, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(path, None, f"cannot be used: {error}", "see desk in the site file") from None
