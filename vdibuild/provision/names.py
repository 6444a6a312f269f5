"""A machine's names in a name server, by dynamic update (RFC 2136), signed with TSIG (RFC 8945)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.exception
import dns.name
import dns.query
import dns.rcode
import dns.reversename
import dns.tsig
import dns.tsigkeyring
import dns.update

from vdibuild.errors import HostError, InputError
from vdibuild.provision.journal import DnsEntry

_SECONDS = 10.0

_REFUSED = {
    dns.rcode.YXDOMAIN: ("is there already", "it is somebody's: give the machine another name"),
    dns.rcode.YXRRSET: ("is there already", "it is somebody's: give the machine another name"),
    dns.rcode.NOTAUTH: ("is refused: the key, or the zone, is not the server's", "see `key` and `zone`"),
    dns.rcode.NOTZONE: ("is refused: the name is in no such zone", "see `zone` in the site file"),
    dns.rcode.REFUSED: ("is refused", "let the key update the zone: allow-update or update-policy"),
}


def enter(entry: DnsEntry) -> None:
    """Enter a machine's address by its name, and its name by its address where there is a zone for that.

    Raises HostError when the server refuses, does not answer, or knows the name already: nobody's entry is
    ever replaced.
    """
    for record in _records(entry):
        update = dns.update.UpdateMessage(record.zone, **_key(entry))
        update.absent(record.name)
        update.add(record.name, entry.ttl, record.kind, record.value)
        _send(entry, update, f"the entry of {record.said} in {record.zone}")


def leave(entry: DnsEntry) -> None:
    """Remove a machine's entries, and no other's: those with its name and its address. Raises HostError."""
    for record in _records(entry):
        update = dns.update.UpdateMessage(record.zone, **_key(entry))
        update.delete(record.name, record.kind, record.value)
        _send(entry, update, f"the removal of {record.said} from {record.zone}")


def check(entry: DnsEntry) -> None:
    """Raise what `enter` would raise, before anything is made.

    So an entry that is somebody's is not taken for one of a machine that could not be finished.
    """
    for record in _records(entry):
        update = dns.update.UpdateMessage(record.zone, **_key(entry))
        update.absent(record.name)
        _send(entry, update, f"the entry of {record.said} in {record.zone}")


@dataclass(frozen=True)
class _Record:
    """A record of a zone. said: what it is of, for people."""

    zone: str
    name: dns.name.Name
    kind: str
    value: str
    said: str


def _records(entry: DnsEntry) -> Iterator[_Record]:
    yield _Record(entry.zone, dns.name.from_text(entry.name), "A", entry.address, entry.name)
    if entry.reverse:
        pointer = dns.reversename.from_address(entry.address)
        yield _Record(entry.reverse, pointer, "PTR", f"{entry.name}.", entry.address)


def _send(entry: DnsEntry, update: dns.update.UpdateMessage, what: str) -> None:
    where = f"{entry.server} port {entry.port}"
    try:
        answer = dns.query.tcp(update, entry.server, timeout=_SECONDS, port=entry.port)
    except dns.tsig.PeerError as error:
        raise HostError(f"{what}: {where} does not accept the key: {error}", "see `key`") from None
    except (dns.exception.DNSException, OSError, EOFError) as error:
        raise HostError(f"{what}: {where} does not answer: {error}", "see `dns` in the site file") from None
    code = answer.rcode()
    if code != dns.rcode.NOERROR:
        said, hint = _REFUSED.get(code, (f"failed: {dns.rcode.to_text(code)}", "the server's log says why"))
        raise HostError(f"{what} {said} ({where})", hint)


def _key(entry: DnsEntry) -> dict[str, Any]:
    """The key in a file as tsig-keygen(8) writes it, as arguments of an update."""
    file = Path(entry.key)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(file, None, f"the TSIG key cannot be read: {error.strerror}") from None
    name = re.search(r'key\s+"?([^\s"{]+)"?\s*\{', text)
    algorithm = re.search(r'algorithm\s+"?([\w.-]+)"?\s*;', text)
    secret = re.search(r'secret\s+"?([A-Za-z0-9+/=]+)"?\s*;', text)
    if not (name and algorithm and secret):
        raise InputError(file, None, "holds no TSIG key", "`tsig-keygen NAME > FILE` makes one")
    if dns.name.from_text(algorithm[1].lower()) not in dns.tsig.mac_sizes:
        raise InputError(file, None, f"{algorithm[1]} is no algorithm for TSIG", "use hmac-sha256")
    try:
        keyring = dns.tsigkeyring.from_text({name[1]: (algorithm[1].lower(), secret[1])})
    except (dns.exception.DNSException, ValueError) as error:
        raise InputError(file, None, f"the TSIG key cannot be used: {error}") from None
    return {"keyring": keyring, "keyname": name[1]}
