"""Names in a name server: Debian's bind9 on this host's loopback address, with a TSIG key."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from vdibuild.errors import HostError, InputError
from vdibuild.provision import names
from vdibuild.provision.journal import DnsEntry

ZONE = """
$TTL 60
@ IN SOA ns.example.org. admin.example.org. 1 3600 600 86400 60
@ IN NS ns.example.org.
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnsEntry]:
    """A running name server, and an entry that it takes."""
    if shutil.which("named") is None:
        pytest.skip("bind9 is not installed")
    directory = tmp_path_factory.mktemp("named")
    for name in ("key", "other"):
        made = subprocess.run(["tsig-keygen", "machines"], check=True, capture_output=True, text=True).stdout
        (directory / name).write_text(made)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    zones = ""
    for zone, text in (("example.org", "ns IN A 127.0.0.1\n"), ("2.0.192.in-addr.arpa", "")):
        (directory / zone).write_text(ZONE + text)
        zones += f'zone "{zone}" {{ type primary; file "{zone}"; allow-update {{ key machines; }}; }};\n'
    (directory / "named.conf").write_text(f"""
        include "{directory}/key";
        options {{
            directory "{directory}"; listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }};
            pid-file "{directory}/pid"; session-keyfile "{directory}/session"; recursion no;
            dnssec-validation no;
        }};
        controls {{ }};
        // It asks nobody, the root servers neither.
        zone "." {{ type hint; file "/dev/null"; }};
        {zones}
    """)
    with (directory / "log").open("w") as log:
        argv = ["named", "-g", "-c", str(directory / "named.conf"), "-n", "1"]
        daemon = subprocess.Popen(argv, stdout=log, stderr=log)
    entry = DnsEntry(
        server="127.0.0.1",
        port=port,
        zone="example.org",
        reverse="2.0.192.in-addr.arpa",
        key=str(directory / "key"),
        name="web.example.org",
        address="192.0.2.7",
        ttl=300,
    )
    try:
        end = time.monotonic() + 60
        while "all zones loaded" not in (directory / "log").read_text():
            assert daemon.poll() is None and time.monotonic() < end, (directory / "log").read_text()
            time.sleep(0.02)
        yield entry
    finally:
        daemon.terminate()
        daemon.wait()


def found(server: DnsEntry, name: str, kind: str) -> list[str]:
    """What the server answers."""
    answer = dns.query.tcp(dns.message.make_query(name, kind), server.server, port=server.port, timeout=10)
    return [str(record) for rrset in answer.answer for record in rrset]


def test_entered_and_removed(server: DnsEntry) -> None:
    names.enter(server)
    assert found(server, "web.example.org", "A") == ["192.0.2.7"]
    assert found(server, "7.2.0.192.in-addr.arpa", "PTR") == ["web.example.org."]
    with pytest.raises(HostError, match=r"web\.example\.org in example\.org is there already"):
        names.enter(server.model_copy(update={"address": "192.0.2.8"}))
    # Another's entry of the same name is not removed.
    names.leave(server.model_copy(update={"address": "192.0.2.8"}))
    assert found(server, "web.example.org", "A") == ["192.0.2.7"]
    names.leave(server)
    names.leave(server)
    assert found(server, "web.example.org", "A") == []
    assert found(server, "7.2.0.192.in-addr.arpa", "PTR") == []


def test_what_the_server_refuses(server: DnsEntry, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not accept the key"):
        names.enter(server.model_copy(update={"key": server.key.replace("/key", "/other")}))
    with pytest.raises(HostError, match="is refused"):
        names.enter(server.model_copy(update={"zone": "example.net", "name": "web.example.net"}))
    with pytest.raises(HostError, match="does not answer"):
        names.enter(server.model_copy(update={"port": 1}))
    for text in (
        "",
        'key "a" { algorithm hmac-sha256; secret "="; };',
        "key a { algorithm x; secret AAAA; };",
    ):
        (tmp_path / "key").write_text(text)
        with pytest.raises((InputError, HostError)):
            names.enter(server.model_copy(update={"key": str(tmp_path / "key")}))
    with pytest.raises(InputError, match="cannot be read"):
        names.check(server.model_copy(update={"key": str(tmp_path / "none")}))
    assert found(server, "web.example.org", "A") == []
