"""Debian's bind9 on this host's loopback address, with zones for names and addresses, and a TSIG key."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dns.message
import dns.query

from vdibuild.provision.journal import DnsEntry

ZONE = """
$TTL 60
@ IN SOA ns.example.org. admin.example.org. 1 3600 600 86400 60
@ IN NS ns.example.org.
"""


@contextlib.contextmanager
def serving(directory: Path, reverse: str = "2.0.192.in-addr.arpa") -> Iterator[DnsEntry]:
    """A running name server, and an entry that it takes; `directory/other` is a key that it does not know.

    reverse: the zone for addresses.
    """
    for name in ("key", "other"):
        made = subprocess.run(["tsig-keygen", "machines"], check=True, capture_output=True, text=True).stdout
        (directory / name).write_text(made)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    zones = ""
    for zone, text in (("example.org", "ns IN A 127.0.0.1\n"), (reverse, "")):
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
        reverse=reverse,
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
