"""The signal port, with real sockets, and with the seed's own client: ncat and a shell."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.pool import Desk, desk, eventually, lapsing
from vdibuild.pool.broker import Limits
from vdibuild.pool.leases import State
from vdibuild.pool.signal_port import PHRASE, SignalPort

# The client's loop as it was written (remote.sh of the seed), with what it runs and logs to made parameters;
# its `nc` was ncat, which is not so everywhere.
CLIENT = """
while true
do
    ncat -i 1 127.0.0.1 {port} | while read line
    do
        if echo "$line" | grep "RULE ADDED, CONNECT NOW!"
        then
            {viewer}
            exit
        else
            echo $line >> {log}
        fi
    done
    echo RECONNECT >> {log}
    {after}
done
"""

WAITING = re.compile(rb"NO CLEAN MACHINE YET, YOUR PLACE IN LINE IS (\d+)")


@contextlib.asynccontextmanager
async def serving(there: Desk) -> AsyncIterator[int]:
    """Serve the signal port; gives its number."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        async with SignalPort(there.broker).serving(listening), lapsing(there.broker):
            yield port
    there.leases.close()


class Station:
    """A client that notes every line and when it came."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.lines: list[bytes] = []
        self.times: list[float] = []

    async def line(self) -> bytes:
        line = await asyncio.wait_for(self.reader.readline(), 20)
        self.lines.append(line)
        self.times.append(time.monotonic())
        return line

    async def until(self, text: str) -> bytes:
        while text.encode() not in (line := await self.line()):
            assert line, f"the server closed before {text!r}: {self.lines}"
        return line

    async def to_the_end(self) -> list[bytes]:
        while await self.line():
            pass
        return self.lines

    def leave(self) -> None:
        self.writer.transport.abort()


async def connect(port: int, address: str = "127.0.0.1") -> Station:
    return Station(*await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0)))


def test_a_clean_machine_is_called_at_once_and_byte_for_byte(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        machine = there.clean()
        async with serving(there) as port:
            station = await connect(port)
            began = time.monotonic()
            assert await station.line() == b"RULE ADDED, CONNECT NOW!\n"
            assert time.monotonic() - began < 0.5
            # The relay knows before the station does.
            assert there.relay.offers == {machine.lease: ("127.0.0.1", None)}
            there.broker.linked(machine.lease, "127.0.0.1")
            lines = await station.to_the_end()
            assert lines[-2:] == [f"{machine.name} IS IN USE\n".encode(), b""]
            assert there.leases.get(machine.lease).state == State.IN_USE

    asyncio.run(run())


def test_the_phrase_is_repeated_until_the_offer_lapses(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(offer_seconds=3))
        machine = there.clean()
        async with serving(there) as port:
            station = await connect(port)
            lines = await station.to_the_end()
            calls = [at for line, at in zip(lines, station.times, strict=True) if PHRASE.encode() in line]
            assert len(calls) == 3
            assert all(0.8 < later - earlier < 1.3 for earlier, later in itertools.pairwise(calls))
            gaps = [later - earlier for earlier, later in itertools.pairwise(station.times)]
            assert max(gaps) < 0.9
            assert there.leases.get(machine.lease).state == State.DIRTY
            assert there.relay.told == [("offer", machine.lease), ("revoke", machine.lease)]

    asyncio.run(run())


def test_waiting_stations_hear_their_place_and_never_the_phrase_early(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        async with serving(there) as port:
            stations = []
            for number in range(1, 4):
                stations.append(await connect(port))
                match = WAITING.search(await stations[-1].line())
                assert match
                assert int(match[1]) == number
            there.clean()
            await stations[0].until(PHRASE)
            await stations[1].until("IS 1")
            await stations[2].until("IS 2")
            stations[1].leave()
            await stations[2].until("IS 1")
            there.clean()
            await stations[2].until(PHRASE)
            for station in stations:
                assert all(line.endswith(b"\n") and b"\\" not in line for line in station.lines)
                calls = [line for line in station.lines if PHRASE.encode() in line]
                assert calls in ([], [f"{PHRASE}\n".encode()])

    asyncio.run(run())


def test_a_line_at_least_every_half_second(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        async with serving(there) as port:
            station = await connect(port)
            for _ in range(6):
                await station.line()
            gaps = [later - earlier for earlier, later in itertools.pairwise(station.times)]
            assert sum(gaps) / len(gaps) <= 0.5

    asyncio.run(run())


def test_a_machine_for_each_station(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(waiting_per_address=100))
        machines = [there.clean() for _ in range(30)]
        async with serving(there) as port:
            stations = await asyncio.gather(*(connect(port) for _ in range(40)))
            await eventually(lambda: len(there.relay.offers) == 30 and there.broker.waiting == 10)
            offers = [lease for message, lease in there.relay.told if message == "offer"]
            assert sorted(offers) == sorted(machine.lease for machine in machines)
            for station in stations:
                station.leave()

    asyncio.run(run())


def test_a_station_that_asks_a_thousand_times_does_not_get_all_machines(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(offer_seconds=300))
        for _ in range(50):
            there.clean()
        async with serving(there) as port:
            for _ in range(1000):
                (await connect(port)).leave()
            await eventually(lambda: there.broker.waiting == 0)
            assert 1 <= len(there.relay.offers) <= there.broker.limits.waiting_per_address

    asyncio.run(run())


def test_many_at_one_address_leave_room_for_others(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(waiting_per_address=3))
        async with serving(there) as port:
            greedy = [await connect(port, "127.0.0.2") for _ in range(3)]
            for station in greedy:
                await station.until("YOUR PLACE")
            refused = await connect(port, "127.0.0.2")
            began = time.monotonic()
            lines = await refused.to_the_end()
            assert lines == [b"COME BACK LATER: 3 stations wait at 127.0.0.2 already\n", b""]
            assert time.monotonic() - began >= 0.3
            other = await connect(port, "127.0.0.3")
            await other.until("YOUR PLACE IN LINE IS 4")
            for station in [*greedy, other]:
                station.leave()

    asyncio.run(run())


def test_a_station_that_asks_again_gets_what_it_was_offered(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        machine = there.clean()
        there.clean()
        async with serving(there) as port:
            station = await connect(port)
            await station.until(PHRASE)
            station.leave()
            await eventually(lambda: not there.broker._offers[machine.lease].held)
            again = await connect(port)
            await again.until(PHRASE)
            assert list(there.relay.offers) == [machine.lease]
            again.leave()

    asyncio.run(run())


def test_a_station_whose_client_never_comes_waits_behind_the_others(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(offer_seconds=0.2))
        there.clean()
        async with serving(there) as port:
            broken = await connect(port, "127.0.0.2")
            await broken.to_the_end()
            again = await connect(port, "127.0.0.2")
            await again.until("YOUR PLACE IN LINE IS 1")
            there.clean()
            other = await connect(port, "127.0.0.3")
            await other.until(PHRASE)
            assert not any(PHRASE.encode() in line for line in again.lines)
            for station in (again, other):
                station.leave()

    asyncio.run(run())


def test_an_offer_that_expired_at_the_relay(tmp_path: Path) -> None:
    """The relay, which says so first, is believed; that station waits behind the others too."""

    async def run() -> None:
        there = desk(tmp_path, Limits(offer_seconds=0.2))
        machine = there.clean()
        async with serving(there) as port:
            broken = await connect(port, "127.0.0.2")
            await broken.until(PHRASE)
            await asyncio.sleep(0.25)
            there.broker.ended(machine.lease, "it expired", 0, 0)
            await broken.until("NO CONNECTION CAME")
            ended = there.leases.get(machine.lease)
            assert (ended.state, ended.reason) == (State.DIRTY, "it expired")
            there.clean()
            again = await connect(port, "127.0.0.2")
            await again.until("YOUR PLACE IN LINE IS 1")
            other = await connect(port, "127.0.0.3")
            await other.until(PHRASE)
            assert not any(PHRASE.encode() in line for line in again.lines)
            for station in (again, other):
                station.leave()

    asyncio.run(run())


def test_a_station_whose_machine_is_lost_has_the_next_one(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        machine = there.clean()
        async with serving(there) as port:
            unlucky = await connect(port, "127.0.0.2")
            await unlucky.until(PHRASE)
            patient = await connect(port, "127.0.0.3")
            await patient.until("YOUR PLACE IN LINE IS 1")
            there.broker.end(machine.lease, "its QEMU was killed")
            await unlucky.to_the_end()
            again = await connect(port, "127.0.0.2")
            await again.until("YOUR PLACE IN LINE IS 1")
            await patient.until("YOUR PLACE IN LINE IS 2")
            there.clean()
            await again.until(PHRASE)
            # Once: whoever comes a third time is the last.
            third = await connect(port, "127.0.0.2")
            await third.until("YOUR PLACE IN LINE IS 2")
            for station in (again, patient, third):
                station.leave()

    asyncio.run(run())


def test_nothing_is_offered_while_the_relay_is_away(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        there.relay.connected = False
        machine = there.clean()
        async with serving(there) as port:
            station = await connect(port)
            await station.until("YOUR PLACE IN LINE IS 1")
            assert there.leases.get(machine.lease).state == State.CLEAN
            there.relay.connected = True
            there.broker.match()
            await station.until(PHRASE)
            station.leave()

    asyncio.run(run())


def test_a_station_is_not_to_blame_for_a_relay_that_is_away(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(offer_seconds=0.2))
        there.clean()
        async with serving(there) as port:
            station = await connect(port)
            await station.until(PHRASE)
            there.relay.connected = False
            await asyncio.sleep(0.3)
            there.relay.connected = True
            await station.to_the_end()
            there.clean()
            again = await connect(port)
            await again.until(PHRASE)
            again.leave()

    asyncio.run(run())


def test_a_client_that_never_reads_disturbs_nobody(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        machine = there.clean()
        async with serving(there) as port:
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                deaf.connect(("127.0.0.1", port))
                await eventually(lambda: machine.lease in there.relay.offers)
                station = await connect(port)
                for _ in range(5):
                    await station.until("YOUR PLACE")
                there.broker.linked(machine.lease, "127.0.0.1")
                assert there.leases.get(machine.lease).state == State.IN_USE
            # Its end does not end the session.
            for _ in range(3):
                await station.line()
            assert there.leases.get(machine.lease).state == State.IN_USE
            station.leave()

    asyncio.run(run())


def test_many_clients_that_never_read_hold_nobody_up(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path, Limits(waiting_per_address=300))
        async with serving(there) as port:
            with contextlib.ExitStack() as stack:
                deaf = [stack.enter_context(socket.socket()) for _ in range(200)]
                for one in deaf:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                    one.bind(("127.0.0.2", 0))
                    one.connect(("127.0.0.1", port))
                await eventually(lambda: there.broker.waiting == len(deaf))
                station = await connect(port)
                for _ in range(3):
                    await station.until(f"YOUR PLACE IN LINE IS {len(deaf) + 1}")
                # Whoever is first in line is offered the machine, and loses it again; nobody waits for them.
                for one in deaf:
                    one.close()
                await eventually(lambda: there.broker.waiting == 1)
                there.clean()
                await station.until(PHRASE)
                station.leave()

    asyncio.run(run())


def test_a_client_that_talks_is_not_heard(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        async with serving(there) as port:
            station = await connect(port)
            station.writer.write(b"x" * 10_000_000)
            for _ in range(3):
                await station.until("YOUR PLACE")
            station.leave()
            await eventually(lambda: there.broker.waiting == 0)

    asyncio.run(run())


def test_a_client_that_goes_leaves_the_line(tmp_path: Path) -> None:
    async def run() -> None:
        there = desk(tmp_path)
        async with serving(there) as port:
            station = await connect(port)
            await station.until("YOUR PLACE")
            station.writer.close()
            await eventually(lambda: there.broker.waiting == 0)
            machine = there.clean()
            assert there.leases.get(machine.lease).state == State.CLEAN

    asyncio.run(run())


@pytest.mark.parametrize("standard_input", [asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE])
def test_the_old_client(tmp_path: Path, standard_input: int) -> None:
    """The seed's loop waits for over a second, hears the phrase once, runs its viewer, and is done.

    standard_input: closed, as in a session without a terminal; or open, but silent.
    """
    log, viewed = tmp_path / "remote.log", tmp_path / "viewed"

    async def run() -> None:
        there = desk(tmp_path)
        async with serving(there) as port:
            viewer = f"echo {port} >> {viewed}; sleep 2.5"
            script = CLIENT.format(port=port, viewer=viewer, log=log, after="exit 0")
            client = await asyncio.create_subprocess_exec("sh", "-c", script, stdin=standard_input)
            await eventually(lambda: log.exists() and len(log.read_text().splitlines()) >= 5)
            machine = there.clean()
            await eventually(viewed.exists)
            there.broker.linked(machine.lease, "127.0.0.1")
            assert await asyncio.wait_for(client.wait(), 20) == 0
        assert viewed.read_text() == f"{port}\n"
        heard = log.read_text().splitlines()
        assert heard[-1] == "RECONNECT"
        assert all(WAITING.fullmatch(line.encode()) for line in heard[:-1]), heard

    asyncio.run(run())
