"""What a pool's machines can reach, tried over cables (veth) in network namespaces of the test's own.

guest a ──┐
          ├── bridge virbr0 ── host 10.30.0.1 ── 10.20.0.0/24 ── proxy 10.20.0.5, other 10.20.0.6
guest b ──┘   (also: stranger)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.pool import eventually
from vdibuild import hypervisor, site
from vdibuild.pool import firewall
from vdibuild.pool.firewall import Firewall, interface_name
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.settings.pools import Reach

# Answers on TCP and UDP ports of its addresses.
SERVER = """
import json, socket, socketserver, sys, threading
class Stream(socketserver.BaseRequestHandler):
    def handle(self): self.request.sendall(b"here")
class Datagram(socketserver.BaseRequestHandler):
    def handle(self): self.request[1].sendto(b"here", self.client_address)
socketserver.TCPServer.allow_reuse_address = True
for address, port in json.loads(sys.argv[1]):
    for kind, handler in ((socketserver.TCPServer, Stream), (socketserver.UDPServer, Datagram)):
        server = kind((address, port), handler)
        threading.Thread(target=server.serve_forever).start()
print("ready", flush=True)
"""
# Tries them all at once; prints those that answered.
CLIENT = """
import json, socket, sys, threading
def attempt(kind, address, port):
    with socket.socket(type=socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as one:
        one.settimeout(1)
        try:
            one.connect((address, port))
            one.send(b"?")
            if one.recv(9) == b"here": found.append(f"{kind} {address}:{port}")
        except OSError:
            pass
found = []
threads = [threading.Thread(target=attempt, args=one) for one in json.loads(sys.argv[1])]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(sorted(found)))
"""
# Says what a DHCP server says to everybody on the network: whose the address is.
GIVER = """
import socket, sys
answer = bytearray(240)
answer[0] = 2
answer[16:20] = socket.inet_aton(sys.argv[1])
answer[28:34] = bytes.fromhex(sys.argv[2].replace(":", ""))
with socket.socket(type=socket.SOCK_DGRAM) as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"virbr0")
    one.bind(("", 67))
    one.sendto(answer, ("255.255.255.255", 68))
"""
# Sends frames as they are.
SENDER = """
import json, socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
    one.bind(("eth0", 0))
    for frame in json.loads(sys.argv[1]): one.send(bytes.fromhex(frame))
"""
# Prints the marks <...> of the frames that come to this host over the bridge, up to <the last>.
LISTENER = """
import json, re, socket
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as one:
    one.bind(("virbr0", 3))
    one.settimeout(10)
    print("ready", flush=True)
    found = []
    while found[-1:] != ["the last"]:
        found += [mark.decode() for mark in re.findall(rb"<(.+?)>", one.recv(2000))]
print(json.dumps(found))
"""
PORTS = (53, 3128, 22)
HOST, ROUTED, PROXY, OTHER = "10.30.0.1", "10.20.0.1", "10.20.0.5", "10.20.0.6"
GUESTS = {"a": "10.30.0.11", "b": "10.30.0.12", "stranger": "10.30.0.13"}
NOBODY = str(IPv4Address(0))
MACS = {"a": "52:54:00:00:00:0a", "b": "52:54:00:00:00:0b"}


class Networks:
    """Network namespaces by name, and what runs in them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._holders: dict[str, int] = {}

    def add(self, name: str) -> None:
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._stack.callback(end, holder)
        while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        self._holders[name] = holder.pid
        self.ip(name, "link set lo up")

    def within(self, name: str, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holders[name]}/ns/net", "--", *argv]

    def ip(self, name: str, command: str) -> None:
        subprocess.run(self.within(name, "ip", *command.split()), check=True)

    def cable(self, host_end: str, name: str, address: str, gateway: str) -> None:
        """Between the host and a network."""
        peer = f"type veth peer name eth0 netns {self._holders[name]}"
        self.ip("host", f"link add {host_end} {peer}")
        self.ip("host", f"link set {host_end} up")
        self.ip(name, f"address add {address}/24 dev eth0")
        self.ip(name, "link set eth0 up")
        self.ip(name, f"route add default via {gateway}")

    def serve(self, places: Mapping[str, Sequence[str]]) -> None:
        """Answer in these networks on these addresses."""
        servers = []
        for name, addresses in places.items():
            argument = json.dumps([(address, port) for address in addresses for port in PORTS])
            argv = self.within(name, sys.executable, "-c", SERVER, argument)
            servers.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
            self._stack.callback(end, servers[-1])
        for server in servers:
            assert server.stdout
            assert server.stdout.readline() == b"ready\n"

    def reached(self, name: str) -> list[str]:
        """What answers to somebody, of everything there is."""
        targets = [
            (kind, address, port)
            for address in (HOST, ROUTED, PROXY, OTHER, *GUESTS.values())
            if address != {**GUESTS, "proxy": PROXY, "other": OTHER}[name]
            for port in PORTS
            for kind in ("tcp", "udp")
        ]
        argv = self.within(name, sys.executable, "-c", CLIENT, json.dumps(targets))
        found: list[str] = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return found

    def give(self, name: str, mac: str = "") -> None:
        """Tell everybody, as a DHCP server, that a machine has its address. mac: another one's hardware."""
        argv = self.within("host", sys.executable, "-c", GIVER, GUESTS[name], mac or MACS[name])
        subprocess.run(argv, check=True)

    def heard(self, name: str, frames: Sequence[bytes]) -> list[str]:
        """The marks of the frames of a machine that come to the host; the last one's is `<the last>`."""
        argv = self.within("host", sys.executable, "-c", LISTENER)
        listener = subprocess.Popen(argv, stdout=subprocess.PIPE)
        self._stack.callback(end, listener)
        assert listener.stdout
        assert listener.stdout.readline() == b"ready\n"
        sent = json.dumps([frame.hex() for frame in frames])
        subprocess.run(self.within(name, sys.executable, "-c", SENDER, sent), check=True)
        found: list[str] = json.loads(listener.stdout.readline())
        return found


class Network(Hypervisor):
    """A libvirt with one network, on the bridge virbr0. leases: what its DHCP server has given."""

    def __init__(self) -> None:
        super().__init__("test:///default")
        self.leases: list[dict[str, object]] = []

    async def call(self, work: Callable[[Any], Any]) -> Any:
        return work(self)

    def networkLookupByName(self, _name: str) -> Network:  # noqa: N802 (libvirt's)
        return self

    def bridgeName(self) -> str:  # noqa: N802 (libvirt's)
        return "virbr0"

    def DHCPLeases(self) -> list[dict[str, object]]:  # noqa: N802 (libvirt's)
        return self.leases


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Networks]:
    with contextlib.ExitStack() as stack:
        there = Networks(stack)
        for name in ("host", "proxy", "other", *GUESTS):
            there.add(name)
        # As with libvirt's networks: the bridge has an address, and this host forwards.
        for bridge, address in (("virbr0", HOST), ("lan", ROUTED)):
            there.ip("host", f"link add {bridge} type bridge")
            there.ip("host", f"address add {address}/24 dev {bridge}")
            there.ip("host", f"link set {bridge} up")
        forward = "echo 1 >/proc/sys/net/ipv4/ip_forward"
        subprocess.run(there.within("host", "sh", "-c", forward), check=True)
        for name, address in GUESTS.items():
            tap = interface_name(tmp_path, MACS[name]) if name in MACS else "vnet7"
            there.cable(tap, name, address, HOST)
            there.ip("host", f"link set {tap} master virbr0")
            if name in MACS:
                there.ip(name, f"link set eth0 address {MACS[name]}")
        for name, address in (("proxy", PROXY), ("other", OTHER)):
            there.cable(name, name, address, ROUTED)
            there.ip("host", f"link set {name} master lan")
        own = {name: (address,) for name, address in GUESTS.items()}
        there.serve({"host": (HOST, ROUTED), "proxy": (PROXY,), "other": (OTHER,), **own})
        # nft and ip look at that host instead of this one.
        programs = tmp_path / "programs"
        programs.mkdir()
        for program in ("nft", "ip"):
            entered = " ".join(there.within("host", f"/usr/sbin/{program}"))
            (programs / program).write_text(f'#!/bin/sh\nexec {entered} "$@"\n')
            (programs / program).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield there


def everything(*addresses: str) -> list[str]:
    return sorted(
        f"{kind} {address}:{port}" for kind in ("tcp", "udp") for address in addresses for port in PORTS
    )


def fence(directory: Path, *reach: dict[str, object]) -> Firewall:
    allowed = tuple(Reach.model_validate(one) for one in reach)
    return Firewall("desktop", directory, allowed, directory)


def test_machines_reach_what_is_allowed_and_nothing_else(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without rules everybody reaches everything.
    others = (GUESTS["b"], GUESTS["stranger"])
    assert networks.reached("a") == everything(HOST, ROUTED, PROXY, OTHER, *others)
    # By default machines reach nothing.
    nothing = fence(tmp_path)
    nothing.load(nothing.rules("virbr0", firewall.host_interfaces()))
    assert networks.reached("a") == []
    rules = fence(
        tmp_path,
        {"address": PROXY, "tcp": [3128]},
        {"address": HOST, "udp": [53]},
        # Neither the host nor another machine is opened by what is that wide.
        {"address": "10.0.0.0/8", "tcp": [22]},
    )
    monkeypatch.setattr(firewall, "LOOK_SECONDS", 0.2)

    async def run() -> None:
        hypervisor = Network()
        try:
            async with rules.kept(hypervisor, "default") as let_in:
                # Who has no address says nothing; what one got is no other's.
                assert networks.reached("a") == []
                networks.give("a")
                assert networks.reached("b") == []
                allowed = [f"tcp {PROXY}:22", f"tcp {PROXY}:3128", f"tcp {OTHER}:22", f"udp {HOST}:53"]
                assert networks.reached("a") == sorted(allowed)
                # Nobody else on the bridge is touched; a machine answers nobody.
                assert networks.reached("stranger") == everything(HOST, ROUTED, PROXY, OTHER)
                # Rules that somebody threw away are there again, and the addresses that libvirt knows.
                hypervisor.leases.append({"mac": MACS["b"], "ipaddr": GUESTS["b"], "type": 0})
                subprocess.run(["nft", "flush", "ruleset"], check=True)
                async with asyncio.timeout(20):
                    while not rules.stands():
                        await asyncio.sleep(0.05)
                async with asyncio.timeout(20):
                    while networks.reached("b") != sorted(allowed):
                        await asyncio.sleep(0.1)
                # Rules that are replaced do not take the addresses along.
                networks.ip("host", "address add 10.30.0.2/24 dev virbr0")
                await let_in()
                assert networks.reached("b") == sorted(allowed)
        finally:
            hypervisor.close()

    asyncio.run(run())
    # They outlive whoever loaded them, as machines do, and go with the pool.
    assert rules.stands()
    rules.remove()
    rules.remove()
    assert not rules.stands()
    # Whom it could not ask for before, it may ask for again only after a while.
    asyncio.run(eventually(lambda: f"tcp {GUESTS['b']}:22" in networks.reached("a"), 20))


def test_a_machine_speaks_for_itself_only(networks: Networks, tmp_path: Path) -> None:
    """Frames that a machine makes up: whose they say they are decides."""
    rules = fence(tmp_path, {"address": HOST, "udp": [53]})
    rules.load(rules.rules("virbr0", firewall.host_interfaces()))
    for name in MACS:
        networks.give(name)
    # Whoever asks in another's name gets nothing by it.
    networks.give("stranger", MACS["b"])
    own, other, stranger = GUESTS["a"], GUESTS["b"], GUESTS["stranger"]
    frames = {
        "its own ARP": arp(MACS["a"], MACS["a"], own),
        "another's address by ARP": arp(MACS["a"], MACS["a"], other),
        "the host's address by ARP": arp(MACS["a"], MACS["a"], HOST),
        "another's hardware by ARP": arp(MACS["a"], MACS["b"], own),
        "another's hardware that sends ARP": arp(MACS["b"], MACS["a"], own),
        "is this address free": arp(MACS["a"], MACS["a"], NOBODY),
        "its own UDP": udp(MACS["a"], own),
        "another's address": udp(MACS["a"], other),
        "an address that another was given": udp(MACS["a"], stranger),
        "another's hardware": udp(MACS["b"], own),
        "no address": udp(MACS["a"], NOBODY),
        "IPv6": frame(MACS["a"], 0x86DD, bytes(40)),
        "the last": udp(MACS["a"], own),
    }
    heard = networks.heard("a", [made + f"<{mark}>".encode().ljust(40) for mark, made in frames.items()])
    assert heard == ["its own ARP", "is this address free", "its own UDP", "the last"]


def frame(source: str, kind: int, body: bytes) -> bytes:
    """An Ethernet frame to everybody."""
    return bytes.fromhex("ff" * 6 + source.replace(":", "")) + kind.to_bytes(2, "big") + body


def arp(source: str, hardware: str, address: str) -> bytes:
    """Says that an address is at a hardware address (RFC 826)."""
    sender = bytes.fromhex(hardware.replace(":", "")) + socket.inet_aton(address)
    operation = 1 if address == NOBODY else 2
    body = bytes.fromhex("000108000604") + operation.to_bytes(2, "big") + sender + bytes(6)
    return frame(source, 0x0806, body + socket.inet_aton(HOST))


def udp(source: str, address: str) -> bytes:
    """A datagram to the host's port 53, with 40 bytes behind it (RFC 791, 768)."""
    header = bytearray.fromhex("45000044000000004011") + bytes(2)
    header += socket.inet_aton(address) + socket.inet_aton(HOST)
    total = sum(int.from_bytes(header[place : place + 2], "big") for place in range(0, 20, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header[10:12] = (total ^ 0xFFFF).to_bytes(2, "big")
    ports = (1024).to_bytes(2, "big") + (53).to_bytes(2, "big")
    return frame(source, 0x0800, bytes(header) + ports + (48).to_bytes(2, "big") + bytes(2))


def test_stations_reach_the_pool_and_nothing_else(networks: Networks, tmp_path: Path) -> None:
    """The firewall of hypervisor.setup, with the proxy as the station of an administrator."""
    described = {
        "images": {"small": {"family": "debian", "release": "trixie", "kickstart": "small.ks.j2"}},
        "pools": {"desktop": {"image": "small", "signal_port": 3128}},
        "hypervisor": {
            "stations": {
                "interface": "lan",
                "address": f"{ROUTED}/24",
                "names": ["pool.example.org"],
                "administrators": [PROXY],
            }
        },
    }
    (tmp_path / "vdibuild.yaml").write_text(json.dumps(described))
    loaded = site.load(tmp_path / "vdibuild.yaml")
    assert loaded.hypervisor.stations
    rules = tmp_path / "firewall.nft"
    rules.write_text(hypervisor.configurations(loaded, loaded.hypervisor.stations)["firewall.nft.j2"])
    subprocess.run(["nft", "-f", str(rules)], check=True)
    stations = [f"{kind} {address}:53" for kind in ("tcp", "udp") for address in (HOST, ROUTED)]
    stations += [f"tcp {address}:3128" for address in (HOST, ROUTED)]
    # Whether they reach each other is their switch's matter, here that of the kernel's br_netfilter.
    each_other = {*everything(PROXY), *everything(OTHER)}
    assert set(networks.reached("other")) - each_other == set(stations)
    administrator = {f"tcp {address}:22" for address in (HOST, ROUTED)}
    assert set(networks.reached("proxy")) - each_other == {*stations, *administrator}
    assert networks.reached("stranger") == everything(HOST, ROUTED, GUESTS["a"], GUESTS["b"])
