"""The way to the relay, with a relay at the other end that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.pool import eventually
from vdibuild.errors import HostError
from vdibuild.pool.broker import RelayAwayError
from vdibuild.pool.clones import Endpoint
from vdibuild.pool.relay_link import RelayLink


@dataclass
class Heard:
    """A listener that notes what it hears. soon: what it answers to a state."""

    said: list[tuple[Any, ...]] = field(default_factory=list)
    soon: bool = False

    def linked(self, lease: str, address: str) -> None:
        self.said.append(("linked", lease, address))

    def ended(self, lease: str, reason: str, bytes_in: int, bytes_out: int) -> None:
        self.said.append(("ended", lease, reason, bytes_in, bytes_out))

    def refused(self, address: str, reason: str, times: int) -> None:
        self.said.append(("refused", address, reason, times))

    def machine_failed(self, lease: str, message: str) -> None:
        self.said.append(("failed", lease, message))

    def idle(self, seconds: dict[str, float]) -> None:
        self.said.append(("idle", seconds))

    def relay_state(self, sessions: dict[str, str], offers: set[str]) -> bool:
        self.said.append(("state", sessions, offers))
        return self.soon


@dataclass
class ScriptedRelay:
    """Answers `state`; notes every command."""

    path: Path
    commands: list[dict[str, Any]] = field(default_factory=list)
    greeting: list[dict[str, Any]] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._attend, str(self.path))
        try:
            yield
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()
            self.writers.clear()
            await asyncio.sleep(0)

    def say(self, message: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(json.dumps(message).encode() + b"\n")

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        for message in self.greeting:
            self.say(message)
        while line := await reader.readline():
            command = json.loads(line)
            self.commands.append(command)
            if command["command"] == "state":
                self.say(STATE)


SESSION = {
    "lease": "one",
    "address": "10.0.0.1",
    "seconds": 1.5,
    "bytes_in": 1,
    "bytes_out": 2,
    "channels": 3,
    "idle": 4.5,
}
OFFER = {"lease": "two", "station": None, "ticketed": True, "expires": 3.0}
STATE: dict[str, Any] = {"event": "state", "sessions": [SESSION], "offers": [OFFER]}
LINKED = {"event": "linked", "number": 7, "lease": "two", "address": "10.0.0.2"}
ENDED = {
    "event": "ended",
    "number": 8,
    "lease": "one",
    "reason": "it left",
    "seconds": 2.0,
    "bytes_in": 3,
    "bytes_out": 4,
}


def test_events_state_and_acknowledgements(tmp_path: Path) -> None:
    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock", greeting=[LINKED])
        heard = Heard()
        link = RelayLink(relay.path)
        async with relay.running(), link.running(heard):
            await eventually(lambda: link.connected)
            assert heard.said == [
                ("linked", "two", "10.0.0.2"),
                ("idle", {"one": 4.5}),
                ("state", {"one": "10.0.0.1"}, {"two"}),
            ]
            relay.say(ENDED)
            relay.say({"event": "error", "number": 9, "lease": "two", "message": "no answer"})
            relay.say({"event": "refused", "number": 10, "address": "10.0.0.9", "reason": "why", "times": 5})
            await eventually(lambda: len(heard.said) == 6)
            assert heard.said[3:] == [
                ("ended", "one", "it left", 3, 4),
                ("failed", "two", "no answer"),
                ("refused", "10.0.0.9", "why", 5),
            ]
            await eventually(lambda: {"command": "ack", "number": 10} in relay.commands)
            acknowledged = [one["number"] for one in relay.commands if one["command"] == "ack"]
            assert acknowledged == [7, 8, 9, 10]

    asyncio.run(run())


def test_what_could_not_be_noted_is_told_again(tmp_path: Path) -> None:
    """A database whose disk is full, for a moment."""

    class Forgetful(Heard):
        def linked(self, lease: str, address: str) -> None:
            super().linked(lease, address)
            if len(self.said) == 1:
                raise HostError("the pool's database failed")

    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock", greeting=[LINKED])
        heard = Forgetful()
        link = RelayLink(relay.path)
        async with relay.running(), link.running(heard):
            await eventually(lambda: link.connected)
            await eventually(lambda: {"command": "ack", "number": 7} in relay.commands)
        assert [said[0] for said in heard.said] == ["linked", "linked", "idle", "state"]

    asyncio.run(run())


def test_commands(tmp_path: Path) -> None:
    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock")
        link = RelayLink(relay.path)
        async with relay.running(), link.running(Heard()):
            await eventually(lambda: link.connected)
            link.offer("three", Endpoint(Path("/run/spice.sock"), "secret"), "10.0.0.1", None, 10)
            link.revoke("three")
            link.end("three", "x" * 300)
            await eventually(lambda: len(relay.commands) == 4)
            assert relay.commands[1:] == [
                {
                    "command": "offer",
                    "lease": "three",
                    "socket": "/run/spice.sock",
                    "password": "secret",
                    "station": "10.0.0.1",
                    "ticket": None,
                    "expires": 10.0,
                },
                {"command": "revoke", "lease": "three"},
                {"command": "end", "lease": "three", "reason": "x" * 200},
            ]

    asyncio.run(run())


def test_a_relay_that_comes_and_goes(tmp_path: Path) -> None:
    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock")
        heard = Heard()
        link = RelayLink(relay.path)
        async with link.running(heard):
            with pytest.raises(RelayAwayError, match=r"relay\.sock"):
                link.revoke("three")
            for _ in range(2):
                async with relay.running():
                    await eventually(lambda: link.connected)
                await eventually(lambda: not link.connected)
            with pytest.raises(RelayAwayError):
                link.end("three", "why")
        assert [said[0] for said in heard.said] == ["idle", "state"] * 2

    asyncio.run(run())


def test_a_relay_that_talks_nonsense(tmp_path: Path) -> None:
    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock", greeting=[{"event": "nonsense"}])
        link = RelayLink(relay.path)
        async with relay.running(), link.running(Heard()):
            await eventually(lambda: len(relay.commands) >= 2)  # it connected again
            assert not link.connected

    asyncio.run(run())


def test_state_is_asked_again_soon_when_something_is_missing(tmp_path: Path) -> None:
    async def run() -> None:
        relay = ScriptedRelay(tmp_path / "relay.sock")
        heard = Heard(soon=True)
        async with relay.running(), RelayLink(relay.path).running(heard):
            await eventually(lambda: len(heard.said) >= 4)

    asyncio.run(run())
