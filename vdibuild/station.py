"""The station's own program: it asks for a machine, shows how that goes, and starts the viewer.

    prepare     as root: puts the settings together in /run/vdibuild, and opens the firewall for them
    run         as the station's user, in its X session: one session from the first screen to the end

It runs in the live system with nothing but Python's standard library. The settings are lines `key=value`,
each source overriding those before it: `client.conf` on the medium's partition KIOSKCFG; option 224 of the
DHCP server's answer; the kernel's arguments, as `station.key=value`.

With a token it asks the pool's HTTPS desk for a .vv file; without one it speaks the signal port's old
protocol (see pool/desk.py, pool/signal_port.py). It never falls back from the one to the other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import logging.handlers
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import ssl

CLIENT_CONF = "client.conf"
"""The file of settings, on the card and in the station's directory."""

CA = "ca.pem"
"""The certificates that the desk and the relay are checked by, beside it."""

PARTITION = "KIOSKCFG"
"""The name of the card's partition for them."""

UP = "vdibuild: the live system is up"
"""What is logged when the first screen is seen; live/verification.py waits for it."""

DIRECTORY = Path("/run/vdibuild")
_MEDIUM = Path("/run/initramfs/livedev")  # a link to it, made by dracut's dmsquash-live
_BLOCK = Path("/sys/class/block")
_EFI_VARIABLES = Path("/sys/firmware/efi/efivars")
_SECURE_BOOT = _EFI_VARIABLES / "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_LEASES = Path("/run/systemd/netif/leases")
_COMMAND_LINE = Path("/proc/cmdline")
_HOSTS = Path("/etc/hosts")
_PROBLEM = "problem.json"
_ARGUMENT = "station."
_DHCP_OPTION = 224  # the first of those that RFC 3942 keeps for the use of a site
_DHCP_LINE = f"OPTION_{_DHCP_OPTION}="
_CARD = "the card"
_DHCP_SAID = "dhcp"  # the lines that the settings were made of; overlays/kiosk: settings-changed

_SIGNAL = b"RULE ADDED, CONNECT NOW!"
_WITHDRAWN = b"NO CONNECTION CAME"
_PLACE = re.compile(rb"YOUR PLACE IN LINE IS (\d+)")
_LATER = b"COME BACK LATER"
_LONGEST_LINE = 4096
_CONNECT_SECONDS = 10
_SILENCE_SECONDS = 10  # the server says something every half second
_DESK_SECONDS = 60  # it answers within 25 s, whether a machine is free or not
_LARGEST_ANSWER = 1 << 20
_FARTHEST = 1 << 40  # sectors; a table further out is nonsense
_PAUSES = (1, 2, 4, 8, 15, 30)
_LOOK_SECONDS = 2  # how soon changed settings are seen
_STARTED_SECONDS = 3  # a viewer that fails sooner had no session
_LINK_SECONDS = 10  # a viewer without a connection for so long will not get one
_ESTABLISHED = "01"

_LANGUAGES = ("en", "de")
_TEXTS = {
    "standby": (
        ("Welcome", "Press any key to begin."),
        ("Willkommen", "Drücken Sie eine beliebige Taste."),
    ),
    "connecting": (
        ("One moment", "You are being connected to a computer of your own."),
        ("Einen Augenblick", "Sie werden mit einem eigenen Computer verbunden."),
    ),
    "waiting": (
        ("All computers are in use", "You are number {place} in line. This screen changes by itself."),
        ("Alle Computer sind belegt", "Sie sind Nummer {place} in der Reihe. Es geht von selbst weiter."),
    ),
    "busy": (
        ("No computer can be given out now", "Trying again in {seconds} s."),
        ("Zurzeit ist kein Computer verfügbar", "Neuer Versuch in {seconds} s."),
    ),
    "unreachable": (
        ("The server cannot be reached", "Trying again in {seconds} s.\n{why}"),
        ("Der Server ist nicht erreichbar", "Neuer Versuch in {seconds} s.\n{why}"),
    ),
    "no network": (
        ("There is no network", "Is the cable plugged in? Trying again in {seconds} s."),
        ("Kein Netz", "Steckt das Kabel? Neuer Versuch in {seconds} s."),
    ),
    "refused": (
        (
            "The server does not know this station",
            "Its token has to be renewed. Trying again in {seconds} s.",
        ),
        (
            "Der Server kennt diese Station nicht",
            "Sie braucht ein neues Token. Neuer Versuch in {seconds} s.",
        ),
    ),
    "login": (
        ("Log in", "The password of this station, please."),
        ("Anmelden", "Das Passwort dieser Station, bitte."),
    ),
    "wrong": (
        ("Wrong password", "Try again in a moment."),
        ("Falsches Passwort", "Gleich noch einmal."),
    ),
    "password": (
        ("For the technician", "The password, please."),
        ("Für die Technik", "Das Passwort, bitte."),
    ),
    "technician": (
        ("This station", "{what}\n\nType restart or off, or nothing to go back."),
        ("Diese Station", "{what}\n\nrestart: Neustart, off: Ausschalten, nichts: zurück."),
    ),
    "broken": (
        ("The settings of this station are wrong", "{why}"),
        ("Die Einstellungen dieser Station sind falsch", "{why}"),
    ),
}

_HASHED = re.compile(r"scrypt:[0-9a-f]{32}:[0-9a-f]{64}")
_TYPING_SECONDS = 60  # then whoever was asked has gone
_TRIES = 3
_SESSION = Path("/run/station")  # station.service makes it, and looks into it at the session's end
_WISHES = {"restart": "restart", "off": "power-off"}  # what the technician types, and the file it becomes
_WRONG_SECONDS = 2
_KEPT_LINES = 8
_KEPT_WIDTH = 120

_log = logging.getLogger("station")


class SettingsError(Exception):
    """A setting is wrong. source: where it is given. line: counted from 1; 0 where the whole is meant."""

    def __init__(self, source: str, line: int, message: str) -> None:
        super().__init__(f"{source}, line {line}: {message}" if line else f"{source}: {message}")
        self.source = source
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Settings:
    """What a station is told, under the keys of client.conf; the first five are those of the old scripts.

    server_ip: the pool's host. animation_folder: pictures that are shown while one waits for a machine;
    background_folder: those before. server_name, token: for the desk: the host's name in its certificate,
    and who this station is. start: press, or at-once without a first screen. sound: yes or no. usb: the
    classes of USB devices that go over to the machine, parted by commas, or no. login, technician: see
    `hashed`; with a login, a person who begins is asked for it. syslog_server: the address that gets the log
    by UDP, too.
    """

    server_ip: str
    vdi_signal_port: int = 5905
    vdi_spice_port: int = 5906
    animation_folder: str = "/usr/share/backgrounds/animation"
    background_folder: str = "/usr/share/backgrounds/standby"
    vdi_desk_port: int = 5908
    vdi_tls_port: int = 5907
    server_name: str = ""
    token: str = ""
    language: str = "en"
    start: str = "press"
    sound: str = "no"
    login: str = ""
    usb: str = "storage,printer,image,video,audio,smartcard,vendor"
    technician: str = ""
    syslog_server: str = ""

    @property
    def ports(self) -> tuple[int, ...]:
        """The server's TCP ports that the station uses."""
        if self.token:
            return (self.vdi_desk_port, self.vdi_tls_port)
        return (self.vdi_signal_port, self.vdi_spice_port)


KEYS = tuple(entry.name for entry in dataclasses.fields(Settings))
"""The keys of client.conf."""

PASSWORDS = ("login", "technician")
"""The settings that are passwords; see `hashed`."""

USB_CLASSES = {
    "audio": 0x01,
    "communication": 0x02,
    "hid": 0x03,
    "image": 0x06,
    "printer": 0x07,
    "storage": 0x08,
    "smartcard": 0x0B,
    "video": 0x0E,
    "wireless": 0xE0,
    "vendor": 0xFF,
}
"""Classes of USB devices by the names that the setting `usb` has for them (usb.org, "Defined Class Codes").
Scanners often are of their vendors' own."""

_CHOICES = {"language": _LANGUAGES, "start": ("press", "at-once"), "sound": ("yes", "no")}


def check(key: str, value: str) -> str | int:
    """The value of a setting as `Settings` holds it. Raises SettingsError, without source and line."""
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, 1)
        raise SettingsError("", 0, f"{key}: unknown; " + (f"is {near[0]} meant?" if near else _known()))
    problem = _problem(key, value)
    if problem:
        raise SettingsError("", 0, f"{key}: {problem}")
    return int(value) if key.endswith("_port") else value


def _known() -> str:
    return f"known are: {', '.join(KEYS)}"


def hashed(password: str) -> str:
    """A password as the settings hold it: scrypt (RFC 7914), salt and digest in hexadecimal."""
    salt = os.urandom(16)
    return f"scrypt:{salt.hex()}:{_scrypt(password, salt).hex()}"


def is_password(password: str, given: str) -> bool:
    """Whether a password is the one that `hashed` made `given` of."""
    _, salt, digest = given.split(":")
    return hmac.compare_digest(_scrypt(password, bytes.fromhex(salt)), bytes.fromhex(digest))


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32)


def _problem(key: str, value: str) -> str:
    if key in ("server_ip", "syslog_server"):
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            return f"{value!r} is no IP address"
        if address.is_unspecified or address.is_multicast:
            return f"{value} is the address of no host"
    elif key.endswith("_port"):
        if not re.fullmatch(r"[0-9]{1,5}", value) or not 0 < int(value) < 65536:
            return f"{value!r} is no port: a number from 1 to 65535"
    elif key.endswith("_folder"):
        if not value.startswith("/"):
            return f"{value!r} is no absolute path"
    elif key == "server_name":
        if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*", value):
            return f"{value!r} is no name of a host"
    elif key == "token":
        if not re.fullmatch(r"[\x21-\x7e]{8,256}", value):
            return "is no token, as pool.enrol prints it"
    elif key == "usb":
        wrong = [] if value == "no" else [name for name in value.split(",") if name not in USB_CLASSES]
        if wrong:
            return f"{wrong[0]!r} is no class of USB devices; known are: no, {', '.join(USB_CLASSES)}"
    elif key in PASSWORDS:
        if not _HASHED.fullmatch(value):
            return f"is no password as kiosk.configure --{key} writes it"
    elif value not in _CHOICES[key]:
        return f"{value!r} is none of: {', '.join(_CHOICES[key])}"
    return ""


@dataclass(frozen=True)
class Source:
    """Where settings are given. name: as a person knows it. text: lines `key=value`, and comments."""

    name: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A setting as it is given. line: counted from 1."""

    value: str
    source: str
    line: int


def read(source: Source) -> dict[str, Entry]:
    """The settings of a source, by key, each checked; those without a value are left out.

    Raises SettingsError naming the line.
    """
    found: dict[str, Entry] = {}
    for number, text in enumerate(source.text.lstrip("\ufeff").splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise SettingsError(source.name, number, f"{line[:60]!r} is no setting: write key=value")
        if key in found:
            raise SettingsError(source.name, number, f"{key}: already given in line {found[key].line}")
        try:
            if value or key not in KEYS:
                check(key, value)
        except SettingsError as error:
            raise SettingsError(source.name, number, error.message) from None
        found[key] = Entry(value, source.name, number)
    return {key: entry for key, entry in found.items() if entry.value}


def merged(sources: Sequence[Source]) -> Settings:
    """The settings of all sources together, the last one counting most. Raises SettingsError."""
    entries: dict[str, Entry] = {}
    for source in sources:
        entries |= read(source)
    first = sources[0].name if sources else CLIENT_CONF
    if "server_ip" not in entries:
        raise SettingsError(first, 0, "server_ip is missing: the address of the pool's host")
    if ("token" in entries) != ("server_name" in entries):
        raise SettingsError(first, 0, "token and server_name go together")
    return Settings(**{key: check(key, entry.value) for key, entry in entries.items()})  # type: ignore[arg-type]


def written(settings: Settings) -> str:
    """The text of a client.conf that says the same."""
    return "".join(f"{key}={value}\n" for key, value in dataclasses.asdict(settings).items())


@dataclass(frozen=True)
class Span:
    """A partition: where it begins, and how long it is, in bytes."""

    start: int
    length: int


def partition(medium: Path, name: str) -> Span | None:
    """The first partition of that name in a medium's GUID partition table, or None (UEFI 2.10, 5.3).

    Addresses are in sectors of 512 bytes, also on a CD. Raises OSError.
    """
    with medium.open("rb") as file:
        file.seek(512)
        header = file.read(92)
        if len(header) < 92 or header[:8] != b"EFI PART":
            return None
        first, count, size = struct.unpack_from("<QII", header, 72)
        if not 128 <= size <= 4096 or count > 1024 or first > _FARTHEST:
            return None
        file.seek(first * 512)
        table = file.read(count * size)
    for place in range(0, len(table) - size + 1, size):
        begin, end = struct.unpack_from("<QQ", table, place + 32)
        found = table[place + 56 : place + 128].decode("utf-16-le", "replace").partition("\0")[0]
        if any(table[place : place + 16]) and found == name and 34 <= begin <= end:
            return Span(begin * 512, (end - begin + 1) * 512)
    return None


def of_medium(medium: Path, name: str) -> str | None:
    """A file of a medium's partition KIOSKCFG, or None where either is missing. Raises SettingsError."""
    try:
        found = partition(medium, PARTITION)
    except OSError as error:
        raise SettingsError(_CARD, 0, f"cannot be read: {error.strerror}") from None
    if found is None:
        return None
    argv = ["mtype", "-i", f"{medium.resolve()}@@{found.start}", f"::/{name}"]
    done = subprocess.run(argv, env={**os.environ, "MTOOLSRC": "/dev/null"}, capture_output=True, check=False)
    if done.returncode != 0:
        return None
    try:
        return done.stdout.decode()
    except UnicodeDecodeError:
        raise SettingsError(name, 0, "is no text in UTF-8") from None


def of_leases(directory: Path) -> list[str]:
    """The lines with option 224 of systemd-networkd's leases, in the order of their names."""
    leases = sorted(directory.glob("*")) if directory.is_dir() else []
    lines = [line for lease in leases for line in lease.read_text(errors="replace").splitlines()]
    return [line for line in lines if line.startswith(_DHCP_LINE)]


def of_dhcp(lines: Sequence[str]) -> str:
    """What DHCP servers say in such lines; `;` may part settings, too."""
    texts = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = bytes.fromhex(line.removeprefix(_DHCP_LINE))
            texts.append(value.rstrip(b"\0").decode(errors="replace"))
    return "\n".join(texts).replace(";", "\n")


def of_command_line(text: str) -> str:
    """What the kernel's arguments say."""
    words = (word.removeprefix(_ARGUMENT) for word in text.split() if word.startswith(_ARGUMENT))
    return "\n".join(words)


def prepare(directory: Path, medium: Path, leases: Path, command_line: Path, hosts: Path) -> None:
    """Collect the settings into `directory`, open the firewall for them, and name the server in `hosts`.

    What is wrong goes into the directory as well, for the station to show.
    """
    directory.mkdir(mode=0o755, exist_ok=True)
    (directory / _DHCP_SAID).unlink(missing_ok=True)
    said = of_leases(leases)
    try:
        settings, ca = _collected(medium, of_dhcp(said), command_line.read_text())
    except SettingsError as error:
        _replace(
            directory / _PROBLEM,
            json.dumps({"source": error.source, "line": error.line, "message": error.message}),
        )
        (directory / CLIENT_CONF).unlink(missing_ok=True)
        _log.error("%s", error)
        if error.source == _CARD:
            return  # it may answer the next time
    else:
        _take(settings, ca, directory, hosts)
    _replace(directory / _DHCP_SAID, "".join(f"{line}\n" for line in said))


def _collected(medium: Path, by_dhcp: str, command_line: str) -> tuple[Settings, str]:
    """The settings, and the certificates of the card. Raises SettingsError."""
    sources = [
        Source(CLIENT_CONF, of_medium(medium, CLIENT_CONF) or ""),
        Source(f"DHCP option {_DHCP_OPTION}", by_dhcp),
        Source("the kernel's arguments", of_command_line(command_line)),
    ]
    settings = merged(sources)
    ca = of_medium(medium, CA) or ""
    if settings.token and not ca:
        raise SettingsError(CA, 0, "is missing on the card: what the server is known by")
    return settings, ca


def _take(settings: Settings, ca: str, directory: Path, hosts: Path) -> None:
    _replace(directory / CA, ca)
    _replace(directory / CLIENT_CONF, written(settings))
    (directory / _PROBLEM).unlink(missing_ok=True)
    if settings.server_name:
        entry = f"{settings.server_ip} {settings.server_name}"
        known = hosts.read_text().splitlines() if hosts.exists() else []
        if entry not in known:
            _replace(hosts, "".join(f"{line}\n" for line in [entry, *known]), 0o644)
    subprocess.run(["nft", "-f", "-"], input=rules(settings), text=True, check=True)
    _log.info("the server is %s", settings.server_ip)


def rules(settings: Settings) -> str:
    """What nft is told: the servers that /etc/nftables.conf lets the station reach."""
    lines = [f"flush set inet station {name}{version}" for name in ("server", "log") for version in (4, 6)]
    version = ipaddress.ip_address(settings.server_ip).version
    members = ", ".join(f"{settings.server_ip} . {port}" for port in settings.ports)
    lines.append(f"add element inet station server{version} {{ {members} }}")
    if settings.syslog_server:
        version = ipaddress.ip_address(settings.syslog_server).version
        lines.append(f"add element inet station log{version} {{ {settings.syslog_server} }}")
    return "".join(f"{line}\n" for line in lines)


def _replace(path: Path, text: str, mode: int = 0o640) -> None:
    """Put a file in place in one step; in the station's own directory its group may read it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(mode)
    if os.geteuid() == 0:
        os.chown(new, 0, path.parent.stat().st_gid)
    new.replace(path)


def load(directory: Path) -> Settings:
    """The settings that `prepare` collected. Raises SettingsError, also for what `prepare` found wrong."""
    problem = directory / _PROBLEM
    try:
        if problem.exists():
            raise SettingsError(**json.loads(problem.read_text()))
        return merged([Source(CLIENT_CONF, (directory / CLIENT_CONF).read_text())])
    except FileNotFoundError:
        raise SettingsError(CLIENT_CONF, 0, "is not there") from None


class ScreenError(Exception):
    """Nothing can be shown."""


class Screen:
    """What a person sees: a program that is told in lines of JSON what to show (see station_screen.py)."""

    def __init__(self) -> None:
        self._language = 0
        self._has_technician = False
        self._shown: dict[str, object] = {}
        self._seen = False
        self._unread = b""
        # A session of its own would not get the terminal's signals; this program ends it.
        self._process = subprocess.Popen(
            ["vdibuild-station-screen"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def use(self, settings: Settings) -> None:
        """Speak the language of the settings, and hear the technician's keys when there is a password."""
        self._language = _LANGUAGES.index(settings.language)
        self._has_technician = bool(settings.technician)

    def show(self, name: str, pictures: str = "", each: int = 10, entry: str = "", **values: object) -> None:
        """Show a screen. pictures: a folder of them; each: for so many seconds. entry: a line to type in,
        `shown` or `hidden`. values: for the text.
        """
        title, text = (part.format(**values) for part in _TEXTS[name][self._language])
        wanted: dict[str, object] = {"title": title, "text": text, "pictures": pictures, "seconds": each}
        wanted["entry"] = entry
        if wanted == self._shown:
            return
        self._shown = wanted
        _log.info("screen: %s | %s", title, text.replace("\n", " | "))
        assert self._process.stdin  # noqa: S101 (it is a pipe)
        try:
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        except BrokenPipeError:
            raise ScreenError(f"the screen ended with status {self._process.wait()}") from None

    def pressed(self, seconds: float) -> bool:
        """Wait that long for somebody who presses a key. Raises CalledError for the technician's keys,
        ScreenError when the screen is gone.
        """
        end = time.monotonic() + seconds
        while said := self._said(end):
            if "technician" in said and self._has_technician:
                raise CalledError
            if "pressed" in said:
                return True
        return False

    def entered(self, seconds: float) -> str:
        """Wait that long for what somebody types; empty where nothing was. Raises ScreenError."""
        end = time.monotonic() + seconds
        while said := self._said(end):
            for line in said:
                if line == "left":
                    return ""
                if line.startswith("entered "):
                    return line.removeprefix("entered ")
        return ""

    def _said(self, end: float) -> list[str]:
        """The lines that the screen says next, at least one; none when none came until then."""
        assert self._process.stdout  # noqa: S101 (it is a pipe)
        while select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            more = os.read(self._process.stdout.fileno(), 4096)
            if not more:
                raise ScreenError(f"the screen ended with status {self._process.wait()}")
            *lines, self._unread = (self._unread + more).split(b"\n")
            said = [line.decode(errors="replace") for line in lines]
            if "shown" in said and not self._seen:
                self._seen = True
                _log.info(UP)
            if said:
                return said
        return []

    def close(self) -> None:
        """Take it away."""
        self._process.terminate()
        self._process.wait()


class CalledError(Exception):
    """The technician's keys were pressed."""


class TryError(Exception):
    """This try came to nothing. screen: what says so. why: for whoever looks after the station."""

    def __init__(self, screen: str, why: str) -> None:
        super().__init__(why)
        self.screen = screen
        self.why = why


class Station:
    """One session, from the first screen to its end.

    directory: where `prepare` has put the settings. session: gets what the technician wishes. medium: what
    was booted from.
    """

    def __init__(self, directory: Path, screen: Screen, session: Path, medium: Path) -> None:
        self._directory = directory
        self._screen = screen
        self._session = session
        self._medium = medium
        self._last = _LastLines()
        _log.addHandler(self._last)

    def run(self) -> None:
        """Wait for somebody, and try until a session was there, or a technician ended it, and is over."""
        while True:
            try:
                self._serve()
                return
            except CalledError:
                if self._technician():
                    return

    def _serve(self) -> None:
        settings = self._begin()
        for pause in _growing():
            try:
                self._screen.use(settings)
                self._screen.show("connecting", settings.animation_folder, 1)
                self._screen.pressed(0)
                if settings.token:
                    self._by_desk(settings)
                else:
                    self._by_signal(settings)
                return
            except TryError as failure:
                _log.warning("%s; the next try is in %.0f s", failure, pause)
                self._screen.show(failure.screen, why=failure.why, seconds=round(pause))
            self._rest(pause)
            settings = self._settings()

    def _begin(self) -> Settings:
        """Show the first screen until a key is pressed, and who did it has logged in, where that is asked."""
        while True:
            settings = self._settings()
            if settings.start == "press":
                self._screen.show("standby", settings.background_folder, 10)
                if not self._screen.pressed(_LOOK_SECONDS):
                    continue
            if not settings.login or self._knows("login", settings.login):
                return settings

    def _settings(self) -> Settings:
        """The settings, as soon as they are right."""
        while True:
            try:
                settings = load(self._directory)
            except SettingsError as error:
                self._screen.show("broken", why=error)
                self._screen.pressed(_LOOK_SECONDS)
            else:
                self._screen.use(settings)
                return settings

    def _technician(self) -> bool:
        """Show a technician, who knows the password, how the station is. Returns whether it shall end."""
        settings = self._settings()
        if not self._knows("password", settings.technician):
            return False
        _log.info("the technician is there")
        self._screen.show("technician", entry="shown", what=self._state(settings))
        wish = self._screen.entered(_TYPING_SECONDS)
        file = _WISHES.get(wish.strip().lower())
        if file is None:
            return False
        _log.info("the technician wants it: %s", file)
        (self._session / file).touch()
        return True

    def _knows(self, screen: str, hashed_password: str) -> bool:
        """Whether a person who is asked knows a password."""
        for _ in range(_TRIES):
            self._screen.show(screen, entry="hidden")
            given = self._screen.entered(_TYPING_SECONDS)
            if not given:
                return False
            if is_password(given, hashed_password):
                return True
            _log.warning("somebody gave a wrong password")
            self._screen.show("wrong")
            time.sleep(_WRONG_SECONDS)
        return False

    def _state(self, settings: Settings) -> str:
        """What a technician wants to know."""
        card = re.search(r"root=live:CDLABEL=(\S+)", _COMMAND_LINE.read_text())
        lines = [
            f"address: {_own_address(settings.server_ip) or 'none'}",
            f"server: {settings.server_ip}, ports {', '.join(map(str, settings.ports))}",
            f"card: {card[1] if card else 'unknown'}, Linux {os.uname().release}, {_firmware()}",
        ]
        shown = "\n".join([*lines, "", *self._last.lines])
        _log.info("%s", "; ".join(lines))
        return shown

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._screen.pressed(left):
                return  # somebody is impatient; the pauses have grown all the same

    def _by_signal(self, settings: Settings) -> None:
        """Wait at the signal port, and start the viewer when it calls. Raises TryError."""
        with _connected(settings.server_ip, settings.vdi_signal_port) as connection:
            lines = _Lines(connection)
            while True:
                line = lines.next(_SILENCE_SECONDS)
                if _SIGNAL in line:
                    break
                self._screen.pressed(0)
                _log.info("server: %s", line.decode("ascii", "replace"))
                if place := _PLACE.search(line):
                    self._screen.show("waiting", settings.animation_folder, 1, place=int(place[1]))
                elif _LATER in line:
                    raise TryError("busy", line.decode("ascii", "replace"))
            where = f"host={settings.server_ip}\nport={settings.vdi_spice_port}\n"
            self._view(settings, f"[virt-viewer]\ntype=spice\n{where}", lines)

    def _by_desk(self, settings: Settings) -> None:
        """Ask the desk until it has a machine, and start the viewer with it. Raises TryError."""
        # Not before: whoever waits for the first screen waits for what is imported.
        import ssl

        tls = ssl.create_default_context(cafile=str(self._directory / CA))
        while True:
            began = time.monotonic()
            status, body = _asked(settings, tls)
            if status == 200:
                break
            if status == 202:
                place = _place(body)
                self._screen.show("waiting", settings.animation_folder, 1, place=place)
                # It waits itself, and answers at once only when something is wrong with it.
                self._screen.pressed(max(0.0, 1 - (time.monotonic() - began)))
            elif status == 401:
                raise TryError("refused", "the desk does not know the token")
            else:
                raise TryError("busy", f"the desk answers {status}")
        try:
            machine = body.decode()
        except UnicodeDecodeError:
            raise TryError("busy", "the desk's answer is no text") from None
        self._view(settings, machine, None)

    def _view(self, settings: Settings, machine: str, lines: _Lines | None) -> None:
        """Show a machine. machine: the text of its .vv file. Raises TryError when there was no session."""
        argv = ["remote-viewer", "--full-screen", "--kiosk", "--kiosk-quit=on-disconnect"]
        argv += ["--spice-disable-effects=animation", "--spice-preferred-compression=auto-glz"]
        if settings.sound == "no":
            argv.append("--spice-disable-audio")
        if settings.usb != "no":
            rules = usb_rules(settings, usb_device(self._medium))
            argv.append(f"--spice-usbredir-redirect-on-connect={rules}")
            usb = f"enable-usbredir=1\nenable-usb-autoshare=1\nusb-filter={rules}\n"
        else:
            usb = "enable-usbredir=0\n"
        with tempfile.TemporaryDirectory() as private:
            file = Path(private) / "machine.vv"
            # Only a file has the viewer take what is plugged in during a session; no argument does. Groups of
            # one name are one, and of a key the last value counts (GLib, GKeyFile).
            file.write_text(f"{machine}\n[virt-viewer]\n{usb}")
            self._run_viewer(settings, [*argv, "--", str(file)], lines)

    def _run_viewer(self, settings: Settings, argv: Sequence[str], lines: _Lines | None) -> None:
        """Run a viewer to its end. Raises TryError when it had no session."""
        port = settings.vdi_tls_port if settings.token else settings.vdi_spice_port
        began = time.monotonic()
        viewer = subprocess.Popen(argv)
        connected = hung = False
        try:
            _log.info("the viewer begins")
            connected = _watched(viewer, lines, settings.server_ip, port)
            hung = viewer.poll() is None
        finally:
            if viewer.poll() is None:
                viewer.terminate()
            status = viewer.wait()
        took = time.monotonic() - began
        _log.info("the viewer ended with status %d after %.0f s", status, took)
        if not connected and hung:
            raise TryError("unreachable", f"{settings.server_ip} port {port}: the viewer did not connect")
        if not connected and status != 0 and took < _STARTED_SECONDS:
            raise TryError("unreachable", f"the viewer failed with status {status}")


def usb_rules(settings: Settings, medium: tuple[int, int] | None) -> str:
    """Which USB devices go over, as spice-gtk reads it: class, vendor, product, version, and 1 or 0 for yes
    or no, the first rule that fits being the one that counts. -1 fits everything. medium: vendor and product
    of what the station was started from, which stays.
    """
    rules = [f"-1,0x{medium[0]:04x},0x{medium[1]:04x},-1,0"] if medium else []
    rules += [f"0x{USB_CLASSES[name]:02x},-1,-1,-1,1" for name in settings.usb.split(",")]
    return "|".join([*rules, "-1,-1,-1,-1,0"])


def usb_device(medium: Path, block: Path = _BLOCK) -> tuple[int, int] | None:
    """Vendor and product of the USB device that a medium is, or that its reader is; None for others.

    block: sysfs's directory of block devices.
    """
    for directory in (block / medium.resolve().name).resolve().parents:
        if (directory / "idVendor").exists():
            vendor, product = (int((directory / name).read_text(), 16) for name in ("idVendor", "idProduct"))
            return vendor, product
    return None


class _LastLines(logging.Handler):
    """Keeps the log's last lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{time.strftime('%H:%M:%S')} {record.getMessage()}"[:_KEPT_WIDTH])


class _Lines:
    """The lines that a server sends."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._unread = b""

    def next(self, seconds: float) -> bytes:
        """The next line. Raises TryError when none comes in time, or no more at all."""
        while b"\n" not in self._unread:
            self.connection.settimeout(seconds)
            try:
                more = self.connection.recv(4096)
            except OSError as error:
                raise TryError("unreachable", f"the server fell silent: {error}") from None
            if not more:
                raise TryError("unreachable", "the server hung up")
            self._unread = (self._unread + more)[-_LONGEST_LINE:]
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def ready(self) -> list[bytes] | None:
        """The lines that are there now; None when the server hung up."""
        try:
            more = self.connection.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not more:
            return None
        *lines, self._unread = (self._unread + more)[-_LONGEST_LINE:].split(b"\n")
        return lines


def _watched(viewer: subprocess.Popen[bytes], lines: _Lines | None, server: str, port: int) -> bool:
    """Wait until the viewer ends, or hangs: in kiosk mode it stays when it cannot connect.

    Returns whether it ever was connected to the server's port.
    """
    ended = os.pidfd_open(viewer.pid)
    connected = False
    seen = time.monotonic()
    try:
        while time.monotonic() - seen < _LINK_SECONDS:
            watched: list[int | socket.socket] = [ended, *([lines.connection] if lines else [])]
            readable, _, _ = select.select(watched, [], [], _LOOK_SECONDS)
            if _is_connected(server, port):
                connected = True
                seen = time.monotonic()
            if ended in readable:
                return connected
            if lines and lines.connection in readable:
                said = lines.ready()
                if said is None:
                    lines = None  # the end of the signal connection is not the session's
                elif any(_WITHDRAWN in line for line in said):
                    break
    finally:
        os.close(ended)
    _log.warning("the viewer has no connection, and is ended")
    return connected


def _is_connected(server: str, port: int) -> bool:
    """Whether any program of this machine has a connection to that port (proc_pid_net(5), tcp)."""
    address = ipaddress.ip_address(server).packed
    wanted = {f"{_words(address)}:{port:04X}"}
    if len(address) == 4:  # as a socket for both families shows it
        wanted.add(f"{_words(bytes(10) + bytes([255, 255]) + address)}:{port:04X}")
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            if fields[2] in wanted and fields[3] == _ESTABLISHED:
                return True
    return False


def _words(address: bytes) -> str:
    """An address as the kernel prints it: 32-bit words of this machine's byte order, in hexadecimal."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(address) // 4}I", address))


def _firmware() -> str:
    """What the station was started by."""
    if not _EFI_VARIABLES.parent.exists():
        return "BIOS"
    # Four bytes of attributes are before the value (kernel: Documentation/filesystems/efivarfs.rst).
    is_secure = _SECURE_BOOT.exists() and _SECURE_BOOT.read_bytes()[4:] == b"\1"
    return "UEFI with Secure Boot" if is_secure else "UEFI"


def _own_address(server: str) -> str:
    """The address of this machine that a server sees; empty without a network."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as unused:
        try:
            unused.connect((server, 9))  # nothing is sent
        except OSError:
            return ""
        address: str = unused.getsockname()[0]
        return address


def _connected(host: str, port: int) -> socket.socket:
    """A connection to the server. Raises TryError."""
    try:
        return socket.create_connection((host, port), _CONNECT_SECONDS)
    except OSError as error:
        lost = error.errno == errno.ENETUNREACH
        why = f"{host} port {port}: {error.strerror or error}"
        raise TryError("no network" if lost else "unreachable", why) from None


def _asked(settings: Settings, tls: ssl.SSLContext) -> tuple[int, bytes]:
    """Ask the desk for a machine. Returns HTTP's status and the answer. Raises TryError."""
    import http.client

    connection = http.client.HTTPSConnection(settings.server_name, settings.vdi_desk_port)
    try:
        plain = _connected(settings.server_ip, settings.vdi_desk_port)
        with plain:
            plain.settimeout(_DESK_SECONDS)
            connection.sock = tls.wrap_socket(plain, server_hostname=settings.server_name)
            headers = {"Authorization": f"Bearer {settings.token}"}
            connection.request("POST", "/v1/machine", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_LARGEST_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise TryError("unreachable", f"{settings.server_name}: {error}") from None
    finally:
        connection.close()


def _place(body: bytes) -> int:
    """The place in line that the desk's answer names."""
    try:
        return int(json.loads(body)["place"])
    except (ValueError, KeyError, TypeError):
        raise TryError("busy", "the desk's answer is not understood") from None


def _growing() -> Iterator[float]:
    """Pauses between tries, in seconds; no two stations keep the same time."""
    for number in range(sys.maxsize):
        longest = _PAUSES[min(number, len(_PAUSES) - 1)]
        yield longest * random.uniform(0.8, 1.2)  # noqa: S311 (no secret)


def _log_to(settings: Settings) -> None:
    """Send the log to a syslog server as well (RFC 5424's UDP transport, RFC 5426)."""
    if settings.syslog_server:
        handler = logging.handlers.SysLogHandler((settings.syslog_server, 514))
        handler.setFormatter(logging.Formatter(f"{socket.gethostname()} station: %(message)s"))
        _log.addHandler(handler)


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def main(arguments: Sequence[str]) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="vdibuild-station", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="the settings' (default: %(default)s)"
    )
    parser.add_argument("--medium", type=Path, default=_MEDIUM, help="what was booted from")
    parser.add_argument("--leases", type=Path, default=_LEASES, help="systemd-networkd's")
    parser.add_argument("--command-line", type=Path, default=_COMMAND_LINE, help="the kernel's")
    parser.add_argument("--session", type=Path, default=_SESSION, help="the session's own directory")
    parser.add_argument("--hosts", type=Path, default=_HOSTS, help="names of hosts")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, _terminated)
    if given.what == "prepare":
        prepare(given.directory, given.medium, given.leases, given.command_line, given.hosts)
        return 0
    screen = Screen()
    try:
        with contextlib.suppress(SettingsError):
            _log_to(load(given.directory))
        Station(given.directory, screen, given.session, given.medium).run()
    except ScreenError as error:
        _log.error("%s", error)
        return 1
    finally:
        screen.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
