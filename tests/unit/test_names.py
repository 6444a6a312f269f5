"""Names in a name server, with a TSIG key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nameserver
from tests.nameserver import found
from vdibuild.errors import HostError, InputError
from vdibuild.provision import names
from vdibuild.provision.journal import DnsEntry


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnsEntry]:
    """A running name server, and an entry that it takes."""
    if shutil.which("named") is None:
        pytest.skip("bind9 is not installed")
    with nameserver.serving(tmp_path_factory.mktemp("named")) as entry:
        yield entry


def test_entered_and_removed(server: DnsEntry) -> None:
    names.check(server)
    names.enter(server)
    assert found(server, "web.example.org", "A") == ["192.0.2.7"]
    assert found(server, "7.2.0.192.in-addr.arpa", "PTR") == ["web.example.org."]
    with pytest.raises(HostError, match=r"web\.example\.org in example\.org is there already"):
        names.enter(server.model_copy(update={"address": "192.0.2.8"}))
    with pytest.raises(HostError, match="is there already"):
        names.check(server)
    elsewhere = server.model_copy(update={"name": "db.example.org"})
    with pytest.raises(HostError, match=r"192\.0\.2\.7 in 2\.0\.192\.in-addr\.arpa is there already"):
        names.check(elsewhere)
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
    with pytest.raises(HostError, match="is refused"):
        names.check(server.model_copy(update={"zone": "example.net", "name": "web.example.net"}))
    with pytest.raises(InputError, match="cannot be read"):
        names.check(server.model_copy(update={"key": str(tmp_path / "none")}))
    assert found(server, "web.example.org", "A") == []
