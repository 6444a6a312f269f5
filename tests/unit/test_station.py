"""The station's program, run as it is: against the pool's real ports; viewer and screen only note."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import pool as pools
from tests.conftest import FakeCommand
from tests.unit import test_desk, test_signal_port
from tests.unit.test_desk import certificates
from vdibuild import kiosk, resources, site, station
from vdibuild.errors import InputError
from vdibuild.live import grub, iso
from vdibuild.live.iso import Content
from vdibuild.pool.broker import Limits

__all__ = ["certificates"]  # a fixture

PROGRAM = [sys.executable, str(Path(station.__file__))]
EPOCH = 1_763_000_000
RULES = "0x08,-1,-1,-1,1|0x07,-1,-1,-1,1|-1,-1,-1,-1,0"
SCREEN = """\
echo shown
[ -e {directory}/absent ] || echo pressed
while read -r line; do printf "%s\n" "$line" >>{directory}/screens; done
"""


class Running:
    """The program, started. directory: of its settings, its screens, and what its viewer was given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = directory / "log"
        with self._log.open("w") as log:
            argv = [*PROGRAM, "run", "--directory", str(directory), "--session", str(directory)]
            # Where it is killed it leaves its files.
            self.process = subprocess.Popen(argv, stderr=log, env={**os.environ, "TMPDIR": str(directory)})

    @property
    def screens(self) -> list[str]:
        """The titles of the screens, and their texts."""
        file = self.directory / "screens"
        lines = file.read_text().splitlines() if file.exists() else []
        return ["{title} | {text}".format(**json.loads(line)) for line in lines]

    def shows(self, text: str) -> bool:
        return any(text in screen for screen in self.screens)

    def logged(self, text: str) -> bool:
        return text in self._log.read_text()

    async def until(self, text: str, seconds: float = 20) -> None:
        await pools.eventually(lambda: self.shows(text), seconds)

    async def ended(self) -> tuple[int, str]:
        """Its exit status and its log."""
        status = await asyncio.to_thread(self.process.wait, 30)
        return status, self._log.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def place(tmp_path: Path, fake_command: FakeCommand) -> Path:
    """A directory for the settings, with a screen whose person presses a key at once."""
    directory = tmp_path / "station"
    directory.mkdir()
    fake_command("vdibuild-station-screen", SCREEN.format(directory=directory))
    # Its last argument is a file.
    fake_command(
        "remote-viewer", f'for last; do :; done; cp "$last" {directory}/vv; touch {directory}/viewer'
    )
    return directory


@contextlib.contextmanager
def running(place: Path, **settings: object) -> Iterator[Running]:
    write(place, **settings)
    started = Running(place)
    try:
        yield started
    finally:
        started.stop()


def write(place: Path, **settings: object) -> None:
    lines = {"server_ip": "127.0.0.1", **settings}
    new = place / "new"
    new.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    new.replace(place / station.CLIENT_CONF)


def viewed(place: Path) -> list[str]:
    """The viewer's arguments."""
    file = place.parent / "remote-viewer.argv"
    return file.read_text().splitlines() if file.exists() else []


@contextlib.asynccontextmanager
async def scripted(answers: list[bytes], hold: bool = True) -> AsyncIterator[tuple[int, list[float]]]:
    """A signal port that says one thing to each client. Gives its number, and when clients came."""
    came: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers[min(len(came), len(answers) - 1)]
        came.append(asyncio.get_running_loop().time())
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if hold:
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], came


class TestSignalPort:
    def test_from_the_line_to_the_machine(self, tmp_path: Path, place: Path) -> None:
        async def run() -> None:
            there = pools.desk(tmp_path)
            async with test_signal_port.serving(there) as port:
                with running(
                    place, vdi_signal_port=port, vdi_spice_port=59123, usb="storage,printer"
                ) as started:
                    await started.until("You are number 1 in line")
                    machine = there.clean()
                    await pools.eventually((place / "viewer").exists)
                    there.broker.linked(machine.lease, "127.0.0.1")
                    status, log = await started.ended()
            assert status == 0, log
            assert viewed(place)[:-1] == [
                *("--full-screen", "--kiosk", "--kiosk-quit=on-disconnect"),
                *("--spice-disable-effects=animation", "--spice-preferred-compression=auto-glz"),
                "--spice-disable-audio",
                f"--spice-usbredir-redirect-on-connect={RULES}",
                "--",
            ]
            assert (place / "vv").read_text() == (
                "[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport=59123\n\n"
                f"[virt-viewer]\nenable-usbredir=1\nenable-usb-autoshare=1\nusb-filter={RULES}\n"
            )
            assert [screen.partition(" | ")[0] for screen in started.screens] == [
                *("Welcome", "One moment", "All computers are in use"),
            ]
            assert log.count(station.UP) == 1

        asyncio.run(run())

    def test_an_offer_that_the_viewer_does_not_take(
        self, tmp_path: Path, place: Path, fake_command: FakeCommand
    ) -> None:
        """It hangs, as virt-viewer does that cannot connect: it is ended, and the next try begins."""
        fake_command("remote-viewer", f"echo $$ >>{place}/pids; touch {place}/viewer; exec sleep 600")

        async def run() -> None:
            there = pools.desk(tmp_path, Limits(offer_seconds=1))
            async with test_signal_port.serving(there) as port:
                with running(place, vdi_signal_port=port) as started:
                    there.clean()
                    await started.until("the viewer did not connect")
                    pids = [int(line) for line in (place / "pids").read_text().split()]
                    await pools.eventually(lambda: not Path(f"/proc/{pids[0]}").exists())

        asyncio.run(run())

    def test_the_end_of_the_signal_connection_does_not_end_the_session(
        self, place: Path, fake_command: FakeCommand
    ) -> None:
        fake_command(
            "remote-viewer", f"touch {place}/viewer; while [ ! -e {place}/over ]; do sleep 0.05; done"
        )

        async def run() -> None:
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"], hold=False) as (port, came):
                with running(place, vdi_signal_port=port) as started:
                    await pools.eventually((place / "viewer").exists)
                    (place / "over").touch()
                    status, log = await started.ended()
                    assert (status, len(came)) == (0, 1), log

        asyncio.run(run())

    def test_a_viewer_that_fails_at_once_was_no_session(self, place: Path, fake_command: FakeCommand) -> None:
        fake_command("remote-viewer", "exit 1")

        async def run() -> None:
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"]) as (port, came):
                with running(place, vdi_signal_port=port) as started:
                    await started.until("the viewer failed with status 1")
                    await pools.eventually(lambda: len(came) > 1)

        asyncio.run(run())

    def test_pauses_grow_where_nothing_answers(self, place: Path) -> None:
        async def run() -> None:
            async with scripted([b""], hold=False) as (port, came):
                # Nobody is there: the pauses are as long as they are.
                (place / "absent").touch()
                with running(place, vdi_signal_port=port, start="at-once") as started:
                    await pools.eventually(lambda: len(came) >= 3, 20)
                    assert started.shows("The server cannot be reached | Trying again in 1 s.")
                    assert started.shows("the server hung up")
                pauses = [later - earlier for earlier, later in itertools.pairwise(came)]
                assert 0.8 <= pauses[0] <= 1.4
                assert 1.6 <= pauses[1] <= 2.6

        asyncio.run(run())

    @pytest.mark.parametrize(
        ("answer", "screen"),
        [
            (b"COME BACK LATER: too many wait\n", "No computer can be given out now"),
            (b"x" * 100_000, "the server hung up"),
            (b"\xff\xfe RULE ADDED\n", "the server hung up"),
        ],
    )
    def test_hostile_and_unwilling_servers(self, place: Path, answer: bytes, screen: str) -> None:
        async def run() -> None:
            async with scripted([answer], hold=False) as (port, _):
                with running(place, vdi_signal_port=port) as started:
                    await started.until(screen)
                    assert not viewed(place)

        asyncio.run(run())

    def test_a_server_that_is_not_there_comes_back(self, place: Path) -> None:
        async def run() -> None:
            with socket.create_server(("127.0.0.1", 0)) as unused:
                port = unused.getsockname()[1]
            with running(place, vdi_signal_port=port, language="de") as started:
                await started.until("Der Server ist nicht erreichbar")
                assert started.shows(f"127.0.0.1 port {port}: Connection refused")
                server = await asyncio.start_server(
                    lambda _, writer: writer.write(b"RULE ADDED, CONNECT NOW!\n"), "127.0.0.1", port
                )
                async with server:
                    status, log = await started.ended()
                assert status == 0, log

        asyncio.run(run())


class TestDesk:
    def settings(self, there: test_desk.There, place: Path, **others: object) -> dict[str, object]:
        (place / station.CA).write_bytes(there.ca.read_bytes())
        port = re.findall(r":(\d+)/", there.url)[0]
        return {"server_name": "localhost", "token": there.token, "vdi_desk_port": port, **others}

    def test_a_vv_file_is_given_to_the_viewer(
        self, tmp_path: Path, place: Path, certificates: Path, fake_command: FakeCommand
    ) -> None:
        # Its last argument is the file, which it removes, as the file asks for.
        take = f'for last; do :; done; stat -c %a "$(dirname "$last")" >{place}/mode; mv "$last" {place}/vv'
        fake_command("remote-viewer", take)

        async def run() -> None:
            async with test_desk.serving(tmp_path, certificates, answer_seconds=0.2) as there:
                with running(place, **self.settings(there, place, sound="yes", usb="no")) as started:
                    await started.until("You are number 1 in line")
                    there.pool.clean()
                    status, log = await started.ended()
                    assert status == 0, log
            assert (place / "vv").read_text().startswith("[virt-viewer]\ntype=spice\n")
            assert (place / "mode").read_text() == "700\n"
            assert "--spice-disable-audio" not in viewed(place)
            assert not [word for word in viewed(place) if "usbredir" in word]
            assert (place / "vv").read_text().endswith("\n[virt-viewer]\nenable-usbredir=0\n")
            assert there.token not in log

        asyncio.run(run())

    def test_a_viewer_that_hangs_is_ended(
        self, tmp_path: Path, place: Path, certificates: Path, fake_command: FakeCommand
    ) -> None:
        """In kiosk mode virt-viewer shows nothing and stays, when it cannot connect."""
        fake_command("remote-viewer", "exec sleep 600")

        async def run() -> None:
            async with test_desk.serving(tmp_path, certificates) as there:
                there.pool.clean()
                with running(place, **self.settings(there, place)) as started:
                    await started.until("127.0.0.1 port 5907: the viewer did not connect")

        asyncio.run(run())

    def test_a_token_that_is_not_known(self, tmp_path: Path, place: Path, certificates: Path) -> None:
        async def run() -> None:
            async with test_desk.serving(tmp_path, certificates) as there:
                with running(place, **self.settings(there, place, token="unknown-token")) as started:
                    await started.until("The server does not know this station")

        asyncio.run(run())

    def test_a_server_with_another_certificate(self, tmp_path: Path, place: Path, certificates: Path) -> None:
        async def run() -> None:
            async with test_desk.serving(tmp_path, certificates) as there:
                there.pool.clean()
                with running(place, **self.settings(there, place, server_name="pool.test")) as started:
                    await started.until("certificate verify failed: Hostname mismatch")
                assert not viewed(place)

        asyncio.run(run())


class TestConnections:
    @pytest.mark.parametrize(
        ("family", "host", "server"),
        [
            (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
            (socket.AF_INET6, "::1", "::1"),
            (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
        ],
    )
    def test_those_of_the_viewer_are_found(
        self, family: socket.AddressFamily, host: str, server: str
    ) -> None:
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
            port = listening.getsockname()[1]
            assert not station._is_connected(server, port)
            with socket.socket(family) as viewer:
                viewer.connect((host, port))
                assert station._is_connected(server, port)
                assert not station._is_connected("192.0.2.1", port)
            listening.accept()[0].close()
            assert not station._is_connected(server, port)


class TestScreens:
    def test_nothing_is_asked_for_before_a_key_is_pressed(self, place: Path) -> None:
        async def run() -> None:
            (place / "absent").touch()
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"]) as (port, came):
                with running(place, vdi_signal_port=port) as started:
                    await started.until("Press any key to begin")
                    # It looks at its settings from time to time, and speaks another language at once.
                    write(place, vdi_signal_port=port, language="de")
                    await started.until("Drücken Sie eine beliebige Taste")
                    assert not came

        asyncio.run(run())

    def test_settings_that_are_wrong_until_they_are_right(self, place: Path) -> None:
        async def run() -> None:
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"]) as (port, _):
                with running(place, vdi_signal_prot=port) as started:
                    await started.until(
                        "client.conf, line 2: vdi_signal_prot: unknown; is vdi_signal_port meant?"
                    )
                    write(place, vdi_signal_port=port, start="at-once")
                    status, log = await started.ended()
                    assert status == 0, log

        asyncio.run(run())

    def test_a_screen_that_dies_ends_the_session(self, place: Path, fake_command: FakeCommand) -> None:
        """systemd begins a new one."""
        fake_command("vdibuild-station-screen", "exit 3")

        async def run() -> None:
            with running(place) as started:
                status, log = await started.ended()
                assert status == 1
                assert "the screen ended with status 3" in log

        asyncio.run(run())

    def test_its_end_is_the_screens_and_the_viewers(self, place: Path, fake_command: FakeCommand) -> None:
        fake_command("remote-viewer", f"echo $$ >{place}/pid; touch {place}/viewer; exec sleep 600")

        async def run() -> None:
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"]) as (port, _):
                with running(place, vdi_signal_port=port) as started:
                    # It is there, and the station knows it: where this host is busy, that is not the same.
                    await pools.eventually(lambda: started.logged("the viewer begins"))
                    await pools.eventually((place / "viewer").exists)
                    started.process.send_signal(signal.SIGTERM)
                    assert (await started.ended())[0] == 0
                    assert not Path(f"/proc/{(place / 'pid').read_text().strip()}").exists()

        asyncio.run(run())

    def test_every_language_says_everything(self) -> None:
        for texts in station._TEXTS.values():
            assert len(texts) == len(station._LANGUAGES)
            fields = [set(re.findall(r"{(\w+)}", title + text)) for title, text in texts]
            assert all(found == fields[0] for found in fields)


class TestTechnician:
    """The screen's person answers what is asked for; see ANSWERS."""

    ANSWERS = """\
        echo shown; echo technician
        while read -r line; do
            printf "%s\n" "$line" >>{directory}/screens
            case $line in
                *'"entry": "hidden"'*) echo "entered {password}" ;;
                *'"entry": "shown"'*) echo "entered {wish}" ;;
            esac
        done
    """

    def screen(self, fake: FakeCommand, place: Path, password: str, wish: str = "") -> None:
        fake("vdibuild-station-screen", self.ANSWERS.format(directory=place, password=password, wish=wish))

    @pytest.mark.parametrize(("wish", "file"), [("restart", "restart"), (" OFF ", "power-off")])
    def test_who_knows_the_password_has_wishes(
        self, place: Path, fake_command: FakeCommand, wish: str, file: str
    ) -> None:
        self.screen(fake_command, place, "öffne dich", wish)

        async def run() -> None:
            with running(place, technician=station.hashed("öffne dich")) as started:
                status, log = await started.ended()
                assert status == 0, log
                assert started.shows(
                    "This station | address: 127.0.0.1\nserver: 127.0.0.1, ports 5905, 5906\n"
                )
                assert started.shows("the technician is there")

        asyncio.run(run())
        assert [path.name for path in place.glob("*") if path.name in ("restart", "power-off")] == [file]
        assert not viewed(place)

    def test_nothing_wished_is_back_to_the_first_screen(self, place: Path, fake_command: FakeCommand) -> None:
        self.screen(fake_command, place, "secret")

        async def run() -> None:
            with running(place, technician=station.hashed("secret")) as started:
                await pools.eventually(
                    lambda: (
                        [screen.partition(" | ")[0] for screen in started.screens]
                        == ["Welcome", "For the technician", "This station", "Welcome"]
                    )
                )

        asyncio.run(run())

    def test_a_wrong_password(self, place: Path, fake_command: FakeCommand) -> None:
        self.screen(fake_command, place, "guessed", "off")

        async def run() -> None:
            with running(place, technician=station.hashed("secret")) as started:
                await pools.eventually(lambda: started.logged("somebody gave a wrong password"))
                assert not started.shows("This station")

        asyncio.run(run())
        assert not (place / "power-off").exists()

    def test_without_a_password_nobody_is_a_technician(self, place: Path, fake_command: FakeCommand) -> None:
        self.screen(fake_command, place, "", "off")

        async def run() -> None:
            with running(place, start="at-once") as started:
                await started.until("The server cannot be reached")
                assert not started.shows("For the technician")

        asyncio.run(run())

    @pytest.mark.parametrize("start", ["press", "at-once"])
    def test_a_login_before_the_session(self, place: Path, fake_command: FakeCommand, start: str) -> None:
        # A wrong password first, and then the right one.
        fake_command(
            "vdibuild-station-screen",
            f"""\
            echo shown; echo pressed
            while read -r line; do
                printf "%s\n" "$line" >>{place}/screens
                case $line in *'"entry": "hidden"'*) break ;; esac
            done
            echo "entered wrong"
            sleep 1  # a person types the next one
            echo "entered secret"
            cat >>{place}/screens
            """,
        )

        async def run() -> None:
            async with scripted([b"RULE ADDED, CONNECT NOW!\n"]) as (port, came):
                with running(
                    place, vdi_signal_port=port, start=start, login=station.hashed("secret")
                ) as started:
                    status, log = await started.ended()
                    assert status == 0, log
                    assert started.shows("Log in | The password of this station, please.")
                    assert started.shows("Wrong password | Try again in a moment.")
                    assert log.count("somebody gave a wrong password") == 1
                    assert len(came) == 1

        asyncio.run(run())

    def test_a_password_is_kept_as_a_salted_digest(self) -> None:
        first, second = station.hashed("secret"), station.hashed("secret")
        assert first != second
        assert "secret" not in first
        for one in (first, second):
            assert station.check("technician", one) == one
            assert station.is_password("secret", one)
            assert not station.is_password("Secret", one)


class TestUsb:
    def rules(self, usb: str, medium: tuple[int, int] | None = None) -> list[str]:
        return station.usb_rules(station.Settings("192.0.2.1", usb=usb), medium).split("|")

    def test_what_is_not_named_stays(self) -> None:
        assert self.rules("smartcard") == ["0x0b,-1,-1,-1,1", "-1,-1,-1,-1,0"]
        usual = self.rules(station.Settings("192.0.2.1").usb)
        assert len(usual) == 8
        assert not any(rule.startswith(("0x03", "0x09", "0x02", "0xe0")) for rule in usual)

    def test_what_the_station_was_started_from_stays(self, tmp_path: Path) -> None:
        """sysfs: the link to a block device leads below its USB device."""
        device = tmp_path / "devices/usb2/2-1"
        (device / "2-1:1.0/host0/block/sdb").mkdir(parents=True)
        (device / "idVendor").write_text("058f\n")
        (device / "idProduct").write_text("6366\n")
        (tmp_path / "block").mkdir()
        (tmp_path / "block/sdb").symlink_to("../devices/usb2/2-1/2-1:1.0/host0/block/sdb")
        medium = tmp_path / "livedev"
        medium.symlink_to(tmp_path / "dev/sdb")
        found = station.usb_device(medium, tmp_path / "block")
        assert found == (0x058F, 0x6366)
        assert self.rules("storage", found)[0] == "-1,0x058f,0x6366,-1,0"
        (tmp_path / "block/sdb").unlink()
        (tmp_path / "block/sr0").mkdir()
        assert station.usb_device(medium, tmp_path / "block") is None


class TestSettings:
    def problem(self, *texts: str) -> str:
        with pytest.raises(station.SettingsError) as caught:
            station.merged([station.Source(f"source {number}", text) for number, text in enumerate(texts, 1)])
        return str(caught.value)

    def test_the_old_scripts_file(self) -> None:
        text = (
            "server_ip=192.0.2.7\nvdi_signal_port=5905\nvdi_spice_port=5906\n"
            "animation_folder=/usr/share/backgrounds/animation\n"
            "background_folder=/usr/share/backgrounds2/fedora-workstation\n"
        )
        settings = station.merged([station.Source("client.conf", text)])
        assert settings.server_ip == "192.0.2.7"
        assert settings.ports == (5905, 5906)
        assert settings.background_folder == "/usr/share/backgrounds2/fedora-workstation"
        assert station.merged([station.Source("again", station.written(settings))]) == settings

    def test_later_sources_count_more_and_empty_values_nothing(self) -> None:
        texts = [
            "\ufeffserver_ip = 192.0.2.1\r\nlanguage=de\r\n# a remark\r\n\r\n",
            "server_ip=192.0.2.2",
            "language=",
        ]
        settings = station.merged([station.Source("", text) for text in texts])
        assert (settings.server_ip, settings.language) == ("192.0.2.2", "de")

    @pytest.mark.parametrize(
        ("texts", "said"),
        [
            (["\nserver_ip=192.0.2"], "source 1, line 2: server_ip: '192.0.2' is no IP address"),
            (["server_ip=0.0.0.0"], "source 1, line 1: server_ip: 0.0.0.0 is the address of no host"),
            (
                ["server_ip=192.0.2.1", "vdi_spice_port=65536"],
                "source 2, line 1: vdi_spice_port: '65536' is no",
            ),
            (["server_ip=192.0.2.1\nserver_ip=192.0.2.1"], "line 2: server_ip: already given in line 1"),
            (["192.0.2.1"], "line 1: '192.0.2.1' is no setting: write key=value"),
            (["language=fr"], "line 1: language: 'fr' is none of: en, de"),
            (
                ["usb=storage,keyboard"],
                "line 1: usb: 'keyboard' is no class of USB devices; known are: no, a",
            ),
            (["technician=secret"], "line 1: technician: is no password as kiosk.configure --technician"),
            (["zzz=1"], "line 1: zzz: unknown; known are: server_ip, vdi_signal_port"),
            (["animation_folder=pictures"], "'pictures' is no absolute path"),
            (["server_ip=192.0.2.1\ntoken=abcdefghijk"], "source 1: token and server_name go together"),
            (["server_name=a b"], "'a b' is no name of a host"),
            (["language=en"], "source 1: server_ip is missing: the address of the pool's host"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_line(self, texts: list[str], said: str) -> None:
        assert said in self.problem(*texts)


class TestSite:
    def test_a_new_card_says_what_the_site_says(self) -> None:
        text = kiosk.client_conf({"server_ip": "192.0.2.1", "language": "de"})
        settings = station.merged([station.Source("client.conf", text)])
        assert settings == station.Settings("192.0.2.1", language="de")
        assert "\nvdi_spice_port=\n" in kiosk.client_conf({})

    def test_a_wrong_setting_is_found_before_anything_is_built(self, tmp_path: Path) -> None:
        text = "images: {a: {family: debian, release: trixie, kickstart: a.ks}}\n"
        text += "kiosk: {settings: {server: a}}\n"
        (tmp_path / "vdibuild.yaml").write_text(text)
        with pytest.raises(InputError, match=r"vdibuild\.yaml: kiosk\.settings\.server: unknown"):
            kiosk.build(site.load(tmp_path / "vdibuild.yaml"))
        assert not (tmp_path / "artifacts").exists()


class TestPrepare:
    @pytest.fixture
    def medium(self, tmp_path: Path) -> Path:
        return self.make(tmp_path, b"server_ip=192.0.2.1\nlanguage=de\n")

    def make(self, directory: Path, conf: bytes, **others: bytes) -> Path:
        """An ISO with a partition for settings."""
        files = {station.CLIENT_CONF: conf, **{name.replace("_", "."): text for name, text in others.items()}}
        grub.write_fat(directory / "settings.img", iso.SETTINGS, files, EPOCH)
        esp = directory / "esp.img"
        grub.write_fat(esp, "ESP", {"EFI/BOOT/BOOTX64.EFI": bytes(1000)}, EPOCH)
        content = Content("KIOSK_1", esp=esp, settings=directory / "settings.img")
        iso.write(content, directory / "kiosk.iso", EPOCH)
        return directory / "kiosk.iso"

    def prepare(self, medium: Path, arguments: str = "", **leases: str) -> Path:
        directory = medium.parent
        (directory / "leases").mkdir(exist_ok=True)
        for name, text in leases.items():
            (directory / "leases" / name).write_text(text)
        (directory / "cmdline").write_text(f"root=live:CDLABEL=KIOSK_1 quiet {arguments}\n")
        places = {"medium": medium}
        places |= {name: directory / name for name in ("directory", "leases", "hosts")}
        options = [f"--{name}={path}" for name, path in places.items()]
        argv = [*PROGRAM, "prepare", *options, f"--command-line={directory / 'cmdline'}"]
        subprocess.run(argv, check=True, env=os.environ)
        return directory / "directory"

    def test_card_then_dhcp_then_kernel(
        self, medium: Path, fake_command: FakeCommand, tmp_path: Path
    ) -> None:
        told = tmp_path / "told"
        fake_command("nft", f"cat >{told}")
        assert station.load(self.prepare(medium)) == station.Settings("192.0.2.1", language="de")
        option = b"server_ip=192.0.2.2;vdi_spice_port=6000".hex()
        lease = f"# of systemd-networkd\nADDRESS=192.0.2.99\nOPTION_224={option}\n"
        with_lease = station.load(self.prepare(medium, l2=lease))
        assert with_lease == station.Settings("192.0.2.2", language="de", vdi_spice_port=6000)
        last = station.load(
            self.prepare(medium, "station.server_ip=2001:db8::3 station.syslog_server=192.0.2.4")
        )
        assert (last.server_ip, last.vdi_spice_port) == ("2001:db8::3", 6000)
        assert told.read_text().splitlines() == [
            "flush set inet station server4",
            "flush set inet station server6",
            "flush set inet station log4",
            "flush set inet station log6",
            "add element inet station server6 { 2001:db8::3 . 5905, 2001:db8::3 . 6000 }",
            "add element inet station log4 { 192.0.2.4 }",
        ]

    def test_the_ca_and_the_servers_name(self, tmp_path: Path, fake_command: FakeCommand) -> None:
        fake_command("nft")
        conf = b"server_ip=192.0.2.1\nserver_name=pool.test\ntoken=0123456789\n"
        medium = self.make(tmp_path, conf, ca_pem=b"certificates\n")
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
        for _ in range(2):
            directory = self.prepare(medium)
        assert (directory / station.CA).read_text() == "certificates\n"
        assert (directory / station.CLIENT_CONF).stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "hosts").read_text() == "192.0.2.1 pool.test\n127.0.0.1 localhost\n"
        without = self.make(tmp_path, conf)
        with pytest.raises(station.SettingsError, match=r"ca\.pem: is missing on the card"):
            station.load(self.prepare(without))

    def test_what_is_wrong_is_kept_for_the_screen(self, medium: Path, fake_command: FakeCommand) -> None:
        record = fake_command("nft")
        directory = self.prepare(medium, "station.server_pi=192.0.2.3")
        with pytest.raises(station.SettingsError, match="the kernel's arguments, line 1: server_pi: unknown"):
            station.load(directory)
        assert not record.exists()

    def test_they_are_collected_anew_when_dhcp_says_something_else(
        self, medium: Path, fake_command: FakeCommand
    ) -> None:
        fake_command("nft")
        directory, leases = medium.parent / "directory", medium.parent / "leases"
        script = resources.packaged() / "overlays/kiosk/usr/lib/vdibuild/settings-changed"

        def changed() -> bool:
            return subprocess.run([script, leases, directory], check=False).returncode == 0

        assert changed()
        self.prepare(medium)
        assert not changed()
        (leases / "2").write_text("ADDRESS=192.0.2.99\n")
        assert not changed()
        option = f"OPTION_224={b'vdi_spice_port=6000'.hex()}\n"
        (leases / "2").write_text(f"ADDRESS=192.0.2.99\n{option}")
        assert changed()
        self.prepare(medium)
        assert not changed()
        # What is wrong with the settings is wrong until somebody says something else.
        (leases / "3").write_text(f"OPTION_224={b'server=a'.hex()}\n")
        assert changed()
        self.prepare(medium)
        assert not changed()
        (leases / "3").unlink()
        assert changed()
        # A card that did not answer may do so the next time.
        medium.unlink()
        self.prepare(medium)
        assert changed()

    @pytest.mark.parametrize("damage", ["no table", "no partition", "not there", "huge", "endless"])
    def test_media_that_are_damaged(self, medium: Path, damage: str, fake_command: FakeCommand) -> None:
        fake_command("nft")
        with medium.open("r+b") as file:
            if damage == "no table":
                file.seek(512)
                file.write(bytes(8))
            elif damage == "no partition":
                file.seek(1024 + 128)
                file.write(bytes(128))
            elif damage in ("huge", "endless"):
                file.seek(512 + 72)
                file.write(b"\xff" * (8 if damage == "huge" else 16))
        if damage == "not there":
            medium.unlink()
        with pytest.raises(station.SettingsError, match=r"server_ip is missing|cannot be read"):
            station.load(self.prepare(medium))


def test_the_firewalls_sets_are_those_that_are_filled() -> None:
    rules = (resources.packaged() / "overlays/kiosk/etc/nftables.conf").read_text()
    told = station.rules(station.Settings("192.0.2.1", syslog_server="192.0.2.2"))
    # In a network namespace of its own, by the real nft.
    argv = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), "nft", "-f", "-"]
    ended = subprocess.run(argv, input=rules + told, text=True, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
