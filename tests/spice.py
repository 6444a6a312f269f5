"""A machine and a client that speak SPICE as far as opening channels goes; then they carry any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vdibuild.pool import control, spice
from vdibuild.pool.control import Offer
from vdibuild.pool.relay import Config, Limits, Listener, Relay, SecureListener
from vdibuild.pool.spice import Capabilities, LinkMessage, LinkReply, TicketKey

SELECTION, SASL, MINI = (1 << bit for bit in (spice.AUTH_SELECTION, spice.AUTH_SASL, spice.MINI_HEADER))
SPICE = 1 << spice.AUTH_SPICE
USUAL = Capabilities((SELECTION | SPICE | MINI,), (0b1111,))
DISPLAY = 2
SAME_IDENTIFIER = 1804289383
"""What a machine that never seeded its random numbers draws first; so do all others."""


class FakeMachine:
    """A SPICE server; what it was asked is in `links`. Its open channels do what `behave` does."""

    def __init__(self, path: Path, password: str, capabilities: Capabilities = USUAL) -> None:
        self.path = path
        self.password = password
        self.capabilities = capabilities
        self.links: list[LinkMessage] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.pause: asyncio.Event | None = None
        self.behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = self.echo
        self._key = TicketKey()
        self._server: asyncio.Server | None = None

    async def start(self) -> FakeMachine:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        for writer in self.writers:
            if not writer.is_closing():
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(OSError, EOFError):
            await self._talk(reader, writer)
        writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = spice.parse_header(await reader.readexactly(16))
        message = spice.parse_link(await reader.readexactly(size))
        writer.write(spice.build_reply(LinkReply(0, self._key.public, self.capabilities)))
        if message.capabilities.has(spice.AUTH_SELECTION) and self.capabilities.has(spice.AUTH_SELECTION):
            assert spice.parse_word(await reader.readexactly(4)) == spice.AUTH_SPICE
        password = self._key.decrypt(await reader.readexactly(128)).decode()
        if self.pause:
            await self.pause.wait()
        if password != self.password:
            writer.write(spice.word(7))
            return
        if message.channel != spice.MAIN_CHANNEL and message.connection != SAME_IDENTIFIER:
            writer.write(spice.word(8))
            return
        self.links.append(message)
        writer.write(spice.word(0))
        if message.channel == spice.MAIN_CHANNEL:
            mini = message.capabilities.has(spice.MINI_HEADER) and self.capabilities.has(spice.MINI_HEADER)
            writer.write(main_init(mini))
        await self.behave(reader, writer)

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer everything with the machine's name and what was sent."""
        while data := await reader.read(65536):
            writer.write(self.path.name.encode() + b":" + data)
            await writer.drain()


def main_init(mini: bool) -> bytes:
    body = spice.word(SAME_IDENTIFIER) + bytes(range(28))
    kind, size = spice.MAIN_INIT.to_bytes(2, "little"), len(body).to_bytes(4, "little")
    return kind + size + body if mini else bytes(8) + kind + size + bytes(4) + body


@dataclass
class Link:
    """A client's channel. error: how the server refused it, 0 if it did not."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    reply: LinkReply
    error: int = 0
    identifier: int = 0

    async def echo(self, data: bytes) -> bytes:
        """Send something; returns what comes back for it."""
        self.writer.write(data)
        return await self.reader.readuntil(data)

    async def ended(self) -> bool:
        """Wait for the server's end of the channel."""
        try:
            return not await self.reader.read()
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()


@dataclass
class Client:
    """Links to a relay as a viewer does."""

    ports: dict[str, int]
    context: ssl.SSLContext
    source: str = "127.0.0.1"
    capabilities: Capabilities = USUAL
    links: list[Link] = field(default_factory=list)
    host: str = "127.0.0.1"

    async def connect(self, secure: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(
            self.host,
            self.ports["tls" if secure else "plain"],
            local_addr=(self.source, 0),
            ssl=self.context if secure else None,
        )
        return reader, writer

    async def link(
        self, connection: int = 0, channel: int = spice.MAIN_CHANNEL, password: str = "", secure: bool = False
    ) -> Link:
        """Open a channel, or be refused."""
        reader, writer = await self.connect(secure)
        writer.write(spice.build_link(LinkMessage(connection, channel, 0, self.capabilities)))
        size = spice.parse_header(await reader.readexactly(16))
        link = Link(reader, writer, spice.parse_reply(await reader.readexactly(size)))
        self.links.append(link)
        if link.reply.error:
            link.error = link.reply.error
            return link
        theirs = link.reply.capabilities
        if self.capabilities.has(spice.AUTH_SELECTION) and theirs.has(spice.AUTH_SELECTION):
            writer.write(spice.word(spice.AUTH_SPICE))
        writer.write(spice.encrypt_ticket(password, link.reply.key))
        link.error = spice.parse_word(await reader.readexactly(4))
        if not link.error and channel == spice.MAIN_CHANNEL:
            mini = self.capabilities.has(spice.MINI_HEADER) and theirs.has(spice.MINI_HEADER)
            header = await reader.readexactly(spice.data_header_bytes(mini))
            data = spice.parse_data_header(header, mini)
            assert data.kind == spice.MAIN_INIT
            link.identifier = spice.parse_main_init(await reader.readexactly(data.size))
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()


class Broker:
    """The broker's end of the control socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Broker:
        return cls(*await asyncio.open_unix_connection(path))

    def tell(self, command: control.Command) -> None:
        self._writer.write(command.line())

    def say(self, line: bytes) -> None:
        self._writer.write(line)

    async def hears(self) -> control.Report:
        """The next report."""
        line = await self._reader.readline()
        assert line, "the relay hung up"
        return control.report(line)

    async def hears_length(self) -> None:
        """The announcement of an estate, without the sockets that came with it."""
        await self._reader.readexactly(8)

    async def state(self) -> control.State:
        """Ask for the state; events that come before it are dropped."""
        self.tell(control.GetState())
        while True:
            report = await self.hears()
            if isinstance(report, control.State):
                return report

    async def hung_up(self) -> None:
        """Wait for the relay's end of the connection; what it still says is dropped."""
        while await self._reader.read(65536):
            pass

    def close(self) -> None:
        self._writer.close()


@dataclass
class Site:
    """A running relay with its broker. directory: of the sockets."""

    directory: Path
    config: Config
    relay: Relay | RelayProcess
    broker: Broker
    certificates: Certificates
    ports: dict[str, int]
    machines: list[FakeMachine] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def machine(self, lease: str, capabilities: Capabilities = USUAL) -> FakeMachine:
        """Start a machine for a lease; its password is the lease's name with `-real`."""
        machine = FakeMachine(self.directory / lease, f"{lease}-real", capabilities)
        self.machines.append(await machine.start())
        return machine

    async def offer(
        self, lease: str, station: str | None = "127.0.0.1", ticket: str | None = None, expires: float = 30
    ) -> FakeMachine:
        """Start a machine and offer it."""
        machine = await self.machine(lease)
        self.broker.tell(self.offering(lease, station, ticket, expires))
        await self.broker.state()
        return machine

    def offering(
        self, lease: str, station: str | None = "127.0.0.1", ticket: str | None = None, expires: float = 30
    ) -> Offer:
        return Offer.model_validate(
            {
                "lease": lease,
                "socket": self.directory / lease,
                "password": f"{lease}-real",
                "station": station,
                "ticket": ticket,
                "expires": expires,
            }
        )

    def client(self, source: str = "127.0.0.1", capabilities: Capabilities = USUAL) -> Client:
        client = Client(self.ports, self.certificates.trusting(), source, capabilities)
        self.clients.append(client)
        return client

    def memory(self) -> int:
        """The relay's, in bytes."""
        assert isinstance(self.relay, RelayProcess)
        return self.relay.memory()

    async def close(self) -> None:
        """Let everything go."""
        for client in self.clients:
            client.close()
        self.broker.close()
        self.relay.stop()
        for machine in self.machines:
            await machine.stop()


@dataclass(frozen=True)
class Certificates:
    """A CA and a server's certificate for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


def certificates(directory: Path) -> Certificates:
    """Make a CA and a certificate that lasts a day."""
    made = Certificates(directory / "ca.pem", directory / "relay.pem", directory / "relay.key")
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relay")])
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for path, subject, public, extension in (
        (made.ca, ca_name, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=None)),
        (made.certificate, name, key.public_key(), addresses),
    ):
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    made.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return made


def configuration(directory: Path, made: Certificates, limits: Limits | None = None) -> Config:
    """A relay's configuration with any free ports of the loopback."""
    loopback = ipaddress.ip_address("127.0.0.1")
    return Config(
        control=directory / "control",
        plain=Listener(address=loopback, port=0),
        tls=SecureListener(address=loopback, port=0, certificate=made.certificate, key=made.key),
        limits=limits or Limits(),
    )


@contextlib.asynccontextmanager
async def site(directory: Path, limits: Limits | None = None) -> AsyncIterator[Site]:
    """A relay that runs in this process, with a broker that has asked for the state."""
    made = certificates(directory)
    config = configuration(directory, made, limits)
    relay = Relay(config)
    serving = asyncio.create_task(relay.serve())
    # Listening from the start: the socket is there before the task has run.
    broker = await Broker.connect(config.control)
    running = Site(directory, config, relay, broker, made, relay.ports)
    try:
        await broker.state()
        async with asyncio.timeout(60):
            yield running
    finally:
        await running.close()
        await serving


def with_free_ports(config: Config) -> tuple[Config, dict[str, int]]:
    """The configuration with ports that are free just now, and these."""
    assert config.plain and config.tls
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = {"plain": int(one.getsockname()[1]), "tls": int(other.getsockname()[1])}
    update = {
        "plain": config.plain.model_copy(update={"port": ports["plain"]}),
        "tls": config.tls.model_copy(update={"port": ports["tls"]}),
    }
    return config.model_copy(update=update), ports


async def connected(control: Path) -> Broker:
    """A connection to a relay that is about to serve."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await Broker.connect(control)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.02)


class RelayProcess:
    """The relay as a process of its own. descriptors: how many files it may have open."""

    def __init__(self, config: Config, directory: Path, descriptors: int | None = None) -> None:
        self.config = config
        self.log = directory / "relay.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        file = directory / "relay.json"
        file.write_text(config.model_dump_json())
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        self._argv = [*limit, sys.executable, "-m", "vdibuild.pool.relay", str(file)]

    def start(self) -> None:
        """Start one, or the successor of the last one."""
        with self.log.open("ab") as log:
            self.processes.append(subprocess.Popen(self._argv, stderr=log, stdin=subprocess.DEVNULL))

    def memory(self) -> int:
        """The newest process's memory in bytes."""
        status = Path(f"/proc/{self.processes[-1].pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def stop(self) -> None:
        """End all of them; returns when they have ended."""
        for process in self.processes:
            process.terminate()
            process.wait()
