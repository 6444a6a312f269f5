"""The relay with machines and clients that speak SPICE's opening, over real sockets and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from tests import spice as fakes
from tests.spice import DISPLAY, SASL, SELECTION, SPICE, USUAL, Broker, Site
from vdibuild.errors import HostError, InputError
from vdibuild.pool import control, handover, relay, spice, stream
from vdibuild.pool.control import Acknowledge, End, Ended, Error, Estate, GetState, Linked, Refused, Revoke
from vdibuild.pool.relay import Limits, Relay
from vdibuild.pool.spice import Capabilities, LinkError, LinkMessage

Scene = Callable[[Site], Coroutine[None, None, None]]


def play(directory: Path, scene: Scene, limits: Limits | None = None) -> None:
    """Run a scene with a relay."""

    async def run() -> None:
        async with fakes.site(directory, limits) as site:
            await scene(site)

    asyncio.run(run())


def test_an_old_client_gets_the_machine_offered_to_its_address(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station="127.0.0.2")
        await site.offer("two", station="127.0.0.1")
        main = await site.client("127.0.0.2").link()
        assert main.error == 0
        assert await main.echo(b"hello") == b"one:hello"
        assert await site.broker.hears() == Linked(number=1, lease="one", address="127.0.0.2")

    play(tmp_path, scene)


def test_further_channels_go_to_their_session_although_machines_draw_the_same_ids(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        for lease in ("one", "two"):
            await site.offer(lease)
        client = site.client()
        mains = [await client.link() for _ in range(2)]
        assert len({main.identifier for main in mains} | {fakes.SAME_IDENTIFIER}) == 3
        displays = [await client.link(main.identifier, DISPLAY) for main in mains]
        assert [await one.echo(b"x") for one in displays] == [b"one:x", b"two:x"]
        sessions = (await site.broker.state()).sessions
        assert [(one.lease, one.channels, one.bytes_in) for one in sessions] == [("one", 2, 1), ("two", 2, 1)]

    play(tmp_path, scene)


def test_a_ticket_lets_in_once_over_tls_from_anywhere(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station=None, ticket="ticket-1")
        await site.offer("two", station=None, ticket="ticket-2")
        client = site.client("127.0.0.3")
        main = await client.link(password="ticket-2", secure=True)
        assert await main.echo(b"x") == b"two:x"
        display = await client.link(main.identifier, DISPLAY, "ticket-2", secure=True)
        assert await display.echo(b"y") == b"two:y"
        # Replayed, guessed, and somebody else's.
        for password in ("ticket-2", "ticket-3", ""):
            assert (await client.link(password=password, secure=True)).error == LinkError.PERMISSION_DENIED
        wrong = await client.link(main.identifier, DISPLAY, "ticket-1", secure=True)
        assert wrong.error == LinkError.PERMISSION_DENIED
        for plain in (await client.link(password="ticket-1"), await client.link(main.identifier, DISPLAY)):
            assert plain.error == LinkError.NEED_SECURED

    play(tmp_path, scene)


def test_a_ticket_for_one_station_is_of_no_use_elsewhere(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station="127.0.0.2", ticket="ticket")
        stranger = await site.client("127.0.0.3").link(password="ticket", secure=True)
        assert stranger.error == LinkError.PERMISSION_DENIED
        assert (await site.client("127.0.0.2").link(password="ticket", secure=True)).error == 0

    play(tmp_path, scene)


def test_strays_are_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station="127.0.0.2")
        client, stranger = site.client("127.0.0.2"), site.client("127.0.0.3")
        assert (await stranger.link()).error == LinkError.PERMISSION_DENIED
        main = await client.link()
        for second in (await client.link(), await stranger.link()):
            assert second.error == LinkError.PERMISSION_DENIED
        for connection, channel in ((12345, DISPLAY), (0, DISPLAY), (main.identifier, spice.MAIN_CHANNEL)):
            assert (await client.link(connection, channel)).error == LinkError.BAD_CONNECTION_ID
        assert (await stranger.link(main.identifier, DISPLAY)).error == LinkError.BAD_CONNECTION_ID
        assert await main.echo(b"x") == b"one:x"
        assert isinstance(await site.broker.hears(), Linked)
        counted: Counter[tuple[str, str]] = Counter()
        while counted.total() < 7:
            refused = await site.broker.hears()
            assert isinstance(refused, Refused)
            counted[refused.address, refused.reason] += refused.times
        assert counted == {
            ("127.0.0.3", "nothing is offered to this address"): 2,
            ("127.0.0.2", "nothing is offered to this address"): 1,
            ("127.0.0.2", "an unknown session"): 2,
            ("127.0.0.2", "a main channel of a session that has one"): 1,
            ("127.0.0.3", "an unknown session"): 1,
        }

    play(tmp_path, scene)


def test_late_links_are_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station=None, ticket="ticket", expires=0.05)
        assert await site.broker.hears() == Ended(number=1, lease="one", reason="it expired")
        late = await site.client().link(password="ticket", secure=True)
        assert late.error == LinkError.PERMISSION_DENIED
        await site.offer("two")
        site.broker.tell(Revoke(lease="two"))
        assert await site.broker.hears() == Ended(number=2, lease="two", reason="it was revoked")
        assert (await site.client().link()).error == LinkError.PERMISSION_DENIED
        assert (await site.broker.state()).offers == []

    play(tmp_path, scene)


def test_an_offer_revoked_while_its_client_is_let_in_lets_nobody_in(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        machine = await site.offer("one")
        machine.pause = asyncio.Event()
        linking = asyncio.create_task(site.client().link())
        while len(machine.writers) < 2:  # the second one: the first asked what the machine can do
            await asyncio.sleep(0)
        site.broker.tell(Revoke(lease="one"))
        await site.broker.state()
        machine.pause.set()
        assert (await linking).error == LinkError.PERMISSION_DENIED
        assert await site.broker.hears() == Ended(number=1, lease="one", reason="it was revoked")

    play(tmp_path, scene)


def test_the_main_channel_ends_the_session(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        client = site.client()
        main = await client.link()
        displays = [await client.link(main.identifier, DISPLAY) for _ in range(3)]
        await displays[0].echo(b"1234")
        displays[1].close()
        assert await main.echo(b"x") == b"one:x"
        main.close()
        assert await displays[0].ended() and await displays[2].ended()
        await site.broker.hears()
        ended = await site.broker.hears()
        assert isinstance(ended, Ended)
        assert (ended.lease, ended.reason) == ("one", "the client ended it")
        assert (ended.bytes_in, ended.bytes_out) == (5, 5 + 8)
        assert (await client.link(main.identifier, DISPLAY)).error == LinkError.BAD_CONNECTION_ID

    play(tmp_path, scene)


def test_only_keyboard_and_mouse_are_use(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        client = site.client()
        main = await client.link()
        display = await client.link(main.identifier, DISPLAY)
        inputs = await client.link(main.identifier, spice.INPUTS_CHANNEL)

        async def idle() -> float:
            (session,) = (await site.broker.state()).sessions
            assert session.idle is not None
            return session.idle

        assert await idle() == 0
        await asyncio.sleep(0.02)
        await display.echo(b"drawn")
        assert await idle() >= 0.02
        await inputs.echo(b"typed")
        assert await idle() == 0
        (session,) = (await site.broker.state()).sessions
        assert session.bytes_in == len(b"drawntyped")

    play(tmp_path, scene)


def test_the_broker_ends_a_session(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        await site.offer("two", station="127.0.0.2")
        client, other = site.client(), await site.client("127.0.0.2").link()
        main = await client.link()
        display = await client.link(main.identifier, DISPLAY)
        site.broker.tell(End(lease="one", reason="time is up"))
        assert await main.ended() and await display.ended()
        assert await other.echo(b"x") == b"two:x"
        reports = [await site.broker.hears() for _ in range(3)]
        assert [one.reason for one in reports if isinstance(one, Ended)] == ["time is up"]

    play(tmp_path, scene)


def test_the_end_of_the_machine_ends_the_session(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        machine = await site.offer("one")
        main = await site.client().link()
        display = await site.clients[0].link(main.identifier, DISPLAY)
        await machine.stop()
        assert await main.ended() and await display.ended()

    play(tmp_path, scene)


def test_capabilities_pass_both_ways_but_for_sasl(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        theirs = Capabilities((SELECTION | SPICE | SASL, 0b101), (0b1001, 0b11))
        ours = Capabilities((SELECTION | SPICE, 0, 7), (1, 2, 3))
        machine = await site.machine("one", theirs)
        site.broker.tell(site.offering("one"))
        client = site.client(capabilities=ours)
        main = await client.link()
        display = await client.link(main.identifier, DISPLAY)
        for link in (main, display):
            assert link.reply.capabilities == theirs.without(spice.AUTH_SASL)
        assert [one.capabilities for one in machine.links] == [ours, ours]

    play(tmp_path, scene)


@pytest.mark.parametrize("common", [(), (SELECTION | SPICE,), (spice.MINI_HEADER,), (USUAL.common[0],)])
def test_any_combination_of_headers_and_ways_to_log_in(tmp_path: Path, common: tuple[int, ...]) -> None:
    async def scene(site: Site) -> None:
        for lease, theirs in (("one", USUAL), ("two", Capabilities((SPICE,)))):
            await site.machine(lease, theirs)
            site.broker.tell(site.offering(lease))
        client = site.client(capabilities=Capabilities(common))
        # Both stand while the first one links: what both can do is what it is told, and its machine as well.
        for expected in (b"one:x", b"two:x"):
            assert await (await client.link()).echo(b"x") == expected

    play(tmp_path, scene)


def test_another_way_to_log_in_is_refused(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        reader, writer = await site.client().connect()
        writer.write(spice.build_link(LinkMessage(0, spice.MAIN_CHANNEL, 0, USUAL)))
        await reader.readexactly(spice.parse_header(await reader.readexactly(16)))
        writer.write(spice.word(spice.AUTH_SASL))
        assert spice.parse_word(await reader.read()) == LinkError.PERMISSION_DENIED
        writer.close()

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", LinkError.INVALID_MAGIC),
        (b"REDQ" + bytes([3, 0, 0, 0, 0, 0, 0, 0, 18, 0, 0, 0]), LinkError.VERSION_MISMATCH),
        (b"REDQ" + bytes([2, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]), LinkError.INVALID_DATA),
        (b"REDQ" + bytes([2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 255]), LinkError.INVALID_DATA),
        (b"REDQ" + bytes([2, 0, 0, 0, 2, 0, 0, 0, 18, 0, 0, 0]) + b"\xff" * 18, LinkError.INVALID_DATA),
    ],
)
def test_garbage_gets_the_error_of_the_protocol(tmp_path: Path, data: bytes, code: LinkError) -> None:
    async def scene(site: Site) -> None:
        reader, writer = await site.client().connect()
        writer.write(data)
        size = spice.parse_header(await reader.readexactly(16))
        assert spice.parse_reply(await reader.readexactly(size)).error == code
        assert await reader.read() == b""
        writer.close()

    play(tmp_path, scene)


def test_what_opens_nothing_is_closed_in_time(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        client = site.client()
        main = await client.link()
        idle = [await client.connect(), await client.connect(secure=True)]
        half, writer = await client.connect()
        writer.write(spice.build_link(LinkMessage(main.identifier, DISPLAY, 0, USUAL)))
        silent, silent_writer = await asyncio.open_connection("127.0.0.1", site.ports["tls"])
        for reader in (*(one for one, _ in idle), silent):
            assert await reader.read() == b""
        assert await half.read()  # the reply, and then no more
        assert await main.echo(b"x") == b"one:x"
        for one in (writer, silent_writer, *(one for _, one in idle)):
            one.close()

    play(tmp_path, scene, Limits(link_seconds=0.3))


def test_a_link_that_drips_in_is_closed_in_time(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        main = await site.client().link()
        reader, writer = await site.client("127.0.0.2").connect()
        sent = 0
        for byte in spice.build_link(LinkMessage(0, spice.MAIN_CHANNEL, 0, USUAL)):
            writer.write(bytes([byte]))
            sent += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    assert not await reader.read(1)
                    break
        assert sent < 16
        assert await main.echo(b"x") == b"one:x"
        writer.close()

    play(tmp_path, scene, Limits(link_seconds=0.3))


def test_a_recorded_link_is_of_no_use(tmp_path: Path) -> None:
    """Its ticket was encrypted with a key that the relay still has, byte for byte."""

    async def scene(site: Site) -> None:
        await site.offer("one", station=None, ticket="ticket")
        context = site.certificates.trusting()
        link = spice.build_link(LinkMessage(0, spice.MAIN_CHANNEL, 0, USUAL))

        async def link_up(ticket: bytes = b"") -> tuple[bytes, int, asyncio.StreamWriter]:
            """The ticket that was sent, the relay's answer to it, and the connection."""
            reader, writer = await asyncio.open_connection("127.0.0.1", site.ports["tls"], ssl=context)
            writer.write(link)
            size = spice.parse_header(await reader.readexactly(16))
            reply = spice.parse_reply(await reader.readexactly(size))
            if reply.error:
                return ticket, reply.error, writer
            ticket = ticket or spice.encrypt_ticket("ticket", reply.key)
            writer.write(spice.word(spice.AUTH_SPICE) + ticket)
            return ticket, spice.parse_word(await reader.readexactly(4)), writer

        recorded, first, main = await link_up()
        _, again, other = await link_up(recorded)
        # And after its session, while another one is offered.
        await site.offer("two", station=None, ticket="another")
        main.close()
        other.close()
        while not isinstance(await site.broker.hears(), Ended):
            pass
        _, later, third = await link_up(recorded)
        third.close()
        assert (first, again, later) == (0, LinkError.PERMISSION_DENIED, LinkError.PERMISSION_DENIED)

    play(tmp_path, scene)


def test_a_flood_from_one_address_keeps_nobody_else_out(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station="127.0.0.9")
        floods = [site.client(f"127.0.0.{number}") for number in range(2, 6)]
        flood = [await client.connect() for client in floods for _ in range(10)]
        assert (await site.client("127.0.0.9").link()).error == 0
        for _, writer in flood:
            writer.close()

    play(tmp_path, scene, Limits(half_open=20, half_open_per_address=8))


def test_a_session_has_so_many_channels_at_most(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        client = site.client()
        main = await client.link()
        errors = [(await client.link(main.identifier, DISPLAY)).error for _ in range(4)]
        assert errors == [0, 0, LinkError.CHANNEL_NOT_AVAILABLE, LinkError.CHANNEL_NOT_AVAILABLE]

    play(tmp_path, scene, Limits(channels=3))


def test_one_slow_reader_holds_up_nobody(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        slow = await site.offer("one", station="127.0.0.2")
        await site.offer("two")
        main = await site.client("127.0.0.2").link()
        stuck = slow.writers[-1]
        block = bytes(1 << 20)
        taken = 0
        main.reader._transport.pause_reading()  # type: ignore[attr-defined]
        while not stuck.transport.get_write_buffer_size():
            stuck.write(block)
            taken += len(block)
            await asyncio.sleep(0.05)
        other = await site.client().link()
        assert await other.echo(b"x") == b"two:x"
        main.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert await main.reader.readexactly(taken) == bytes(taken)

    play(tmp_path, scene)


@pytest.mark.parametrize("secure", [False, True])
def test_much_arrives_whole_both_ways(tmp_path: Path, secure: bool) -> None:
    async def scene(site: Site) -> None:
        machine = await site.offer("one", ticket="ticket" if secure else None)
        received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        sent = bytes(range(251)) * (1 << 16)

        async def gather(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(sent)
            received.set_result(await reader.readexactly(len(sent)))

        machine.behave = gather
        main = await site.client().link(password="ticket" if secure else "", secure=secure)
        main.writer.write(sent)
        assert await main.reader.readexactly(len(sent)) == sent
        assert await received == sent

    play(tmp_path, scene)


def test_a_machine_that_refuses_its_own_password_is_told_of(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        machine = await site.offer("one")
        machine.password = "another"
        assert (await site.client().link()).error == LinkError.ERROR
        error = await site.broker.hears()
        assert isinstance(error, Error)
        assert (error.lease, error.message) == ("one", "the machine refuses its own password: error 7")
        machine.password = "one-real"
        assert (await site.client().link()).error == 0

    play(tmp_path, scene)


def test_a_machine_that_is_not_there_is_told_of_at_once(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        site.broker.tell(site.offering("one"))
        error = await site.broker.hears()
        assert isinstance(error, Error)
        assert error.message == "the machine cannot be reached: No such file or directory"
        assert (await site.client().link()).error == LinkError.ERROR

    play(tmp_path, scene)


def test_events_wait_for_a_broker_until_it_acknowledges_them(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        main = await site.client().link()
        await site.broker.hears()
        site.broker.close()
        main.close()
        told: list[list[str]] = []
        for acknowledged in (0, 1, 2):
            broker = await Broker.connect(site.config.control)
            while True:
                broker.tell(GetState())
                events: list[str] = []
                while (report := await broker.hears()).event != "state":
                    events.append(report.event)
                if report.event == "state" and not report.sessions:
                    break
            told.append(events)
            broker.tell(Acknowledge(number=acknowledged))
            await broker.state()
            broker.close()
        assert told == [["linked", "ended"], ["linked", "ended"], ["ended"]]

    play(tmp_path, scene)


def test_a_command_that_is_none_is_answered_without_its_secrets(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        site.broker.say(b'{"command": "offer", "lease": "x", "password": "hunter2 hunter2"}\n')
        answer = await site.broker.hears()
        assert isinstance(answer, Error)
        assert "socket: Field required" in answer.message and "hunter2" not in answer.message
        site.broker.tell(site.offering("one", expires=9))
        site.broker.tell(site.offering("one", expires=9))
        answers = [await site.broker.hears() for _ in range(2)]
        assert "lease one was offered before" in [one.message for one in answers if isinstance(one, Error)]
        site.broker.say(b"x" * (control.LINE_BYTES * 2) + b"\n")
        await site.broker.hung_up()

    play(tmp_path, scene)


def test_the_control_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        assert site.config.control.stat().st_mode & 0o777 == 0o600

    play(tmp_path, scene)
    assert not (tmp_path / "control").exists()


def test_no_secret_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one", station=None, ticket="ticket-1")
        await site.client().link(password="ticket-2", secure=True)
        (await site.client().link(password="ticket-1", secure=True)).close()
        while not isinstance(await site.broker.hears(), Ended):
            pass

    with caplog.at_level(logging.DEBUG):
        play(tmp_path, scene)
    assert "lease=one linked" in caplog.text and "lease=one ended" in caplog.text
    assert "ticket-" not in caplog.text and "-real" not in caplog.text


def test_a_successor_takes_everything_over(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        await site.offer("two", station=None, ticket="ticket")
        await site.offer("three", station="127.0.0.3", ticket="later")
        client = site.client()
        main = await client.link()
        ticketed = await client.link(password="ticket", secure=True)
        patient = site.client("127.0.0.3")
        old_ports = site.ports
        assert isinstance(site.relay, Relay)
        inherited = await asyncio.to_thread(handover.take, site.config.control)
        successor = Relay(site.config, inherited)
        serving = asyncio.create_task(successor.serve())
        await site.broker.hung_up()
        site.broker.close()
        assert successor.ports == old_ports
        site.broker = broker = await Broker.connect(site.config.control)
        state = await broker.state()
        assert [one.lease for one in state.sessions] == ["one", "two"]
        assert [one.lease for one in state.offers] == ["three"]
        # What has begun goes on in the old process; what comes is for the new one.
        assert await main.echo(b"x") == b"one:x"
        display = await client.link(main.identifier, DISPLAY)
        assert await display.echo(b"y") == b"one:y"
        late = await patient.link(password="later", secure=True)
        assert late.error == 0
        main.close()
        assert await display.ended()
        broker.tell(End(lease="two", reason="time is up"))
        assert await ticketed.ended()
        ended: dict[str, Ended] = {}
        while len(ended) < 2:
            if isinstance(report := await broker.hears(), Ended):
                ended[report.lease] = report
        assert (ended["one"].bytes_in, ended["one"].reason) == (2, "the client ended it")
        assert ended["two"].reason == "time is up"
        # The old one has nothing left, and has gone by itself.
        await asyncio.wait_for(site.relay._stopped.wait(), 5)
        assert await late.echo(b"z") == b"three:z"
        successor.stop()
        await serving

    play(tmp_path, scene)


@pytest.mark.parametrize("reads", [False, True])
def test_a_successor_that_dies_takes_nothing(tmp_path: Path, reads: bool) -> None:
    async def scene(site: Site) -> None:
        await site.offer("one")
        impostor = await Broker.connect(site.config.control)
        impostor.tell(control.Replace())
        if reads:
            await impostor.hears_length()
            assert isinstance(await impostor.hears(), Estate)
        impostor.close()
        assert (await site.client().link()).error == 0
        assert isinstance(await site.broker.hears(), Linked)

    play(tmp_path, scene)


def test_a_successor_that_cannot_listen_takes_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        site = await process(tmp_path)
        try:
            await site.offer("one")
            main = await site.client().link()
            assert site.config.plain is not None
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                plain = site.config.plain.model_copy(update={"port": taken.getsockname()[1]})
                wrong = fakes.RelayProcess(site.config.model_copy(update={"plain": plain}), tmp_path)
                wrong.start()
                assert await asyncio.to_thread(wrong.processes[0].wait, 30) == 1
            assert "Address already in use" in (tmp_path / "relay.log").read_text()
            display = await site.client().link(main.identifier, DISPLAY)
            assert await display.echo(b"x") == b"one:x"
        finally:
            await site.close()

    asyncio.run(scene())


def test_nothing_to_take_over(tmp_path: Path) -> None:
    assert handover.take(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"control": "c"}', "names no port"),
        ('{"control": "c", "plain": {"address": "x", "port": 1}}', "plain.address: "),
        ('{"control": "c", "plain": {"address": "::1", "port": 99999}}', "plain.port: "),
        ('{"control": "c", "plain": {"address": "::1", "port": 1}, "colour": 1}', "colour: "),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "relay.json").write_text(text)
    with pytest.raises(InputError, match=message):
        relay.load(tmp_path / "relay.json")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    async def scene(site: Site) -> None:
        plain = site.config.plain
        assert plain is not None
        taken = plain.model_copy(update={"port": site.ports["plain"]})
        other = site.config.model_copy(update={"plain": taken, "control": tmp_path / "other"})
        with pytest.raises(HostError, match="Address already in use"):
            Relay(other)

    play(tmp_path, scene)


async def process(directory: Path, descriptors: int | None = None) -> Site:
    """A relay that is a process of its own, where its memory and its files can be counted."""
    made = fakes.certificates(directory)
    config, ports = fakes.with_free_ports(fakes.configuration(directory, made))
    running = fakes.RelayProcess(config, directory, descriptors)
    running.start()
    site = Site(directory, config, running, await fakes.connected(config.control), made, ports)
    await site.broker.state()
    return site


def test_slow_readers_hold_one_buffer_each(tmp_path: Path) -> None:
    async def scene() -> None:
        site = await process(tmp_path)
        try:
            machine = await site.offer("one")
            client = site.client()
            main = await client.link()
            before = site.memory()
            number = 40
            for _ in range(number):
                display = await client.link(main.identifier, DISPLAY)
                display.reader._transport.pause_reading()  # type: ignore[attr-defined]
            for writer in machine.writers[-number:]:
                writer.write(bytes(8 << 20))
            moved = -1
            while moved != (moved := (await site.broker.state()).sessions[0].bytes_out):
                await asyncio.sleep(0.3)
            assert moved > number << 16
            assert site.memory() - before < number * stream.BUFFER_BYTES + (8 << 20)
            assert await main.echo(b"x") == b"one:x"
        finally:
            await site.close()

    asyncio.run(scene())


def test_a_flood_of_tls_costs_little_memory_and_disturbs_nobody(tmp_path: Path) -> None:
    async def scene() -> None:
        site = await process(tmp_path)
        try:
            await site.offer("one")
            main = await site.client().link()
            before = site.memory()
            with contextlib.ExitStack() as stack:
                for number in range(400):
                    source = (f"127.0.1.{number % 10 + 1}", 0)
                    address = ("127.0.0.1", site.ports["tls"])
                    held = stack.enter_context(socket.create_connection(address, source_address=source))
                    held.send(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a ClientHello
                async with asyncio.timeout(5):
                    assert await main.echo(b"x") == b"one:x"
                assert site.memory() - before < 64 << 20
        finally:
            await site.close()

    asyncio.run(scene())


def test_a_relay_without_free_descriptors_goes_on_when_there_are_some(tmp_path: Path) -> None:
    async def scene() -> None:
        site = await process(tmp_path, descriptors=24)
        try:
            await site.offer("one")
            client = site.client("127.0.0.2")
            held = [await client.connect() for _ in range(40)]
            for _, writer in held:
                writer.close()
            # One that was accepted with the last descriptor finds none for its way to the machine.
            while (error := (await site.client().link()).error) == LinkError.ERROR:
                site.clients[-1].close()
            assert error == 0
        finally:
            await site.close()
        assert "cannot accept connections just now" in (tmp_path / "relay.log").read_text()

    asyncio.run(scene())


def test_what_a_killed_relay_left_does_not_hinder(tmp_path: Path) -> None:
    async def scene() -> None:
        site = await process(tmp_path)
        try:
            await site.offer("one")
            main = await site.client().link()
            assert isinstance(site.relay, fakes.RelayProcess)
            site.relay.processes[0].kill()
            assert await main.ended()
            site.relay.processes[0].wait()
            site.relay.start()
            site.broker.close()
            site.broker = await fakes.connected(site.config.control)
            assert (await site.broker.state()).sessions == []
            await site.offer("two")
            assert (await site.client().link()).error == 0
            site.relay.processes[1].terminate()
            assert site.relay.processes[1].wait(10) == 0
        finally:
            await site.close()

    asyncio.run(scene())


@pytest.mark.parametrize("arguments", [[], ["none.json"]])
def test_started_wrongly(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert relay.main([str(tmp_path / one) for one in arguments]) == 1
    assert capsys.readouterr().err.startswith("error: ")
