"""The opening of a SPICE channel, as bytes: link messages, tickets, the message that names a session.

Sources: "The SPICE protocol" (spice-space.org, sections "Link Stage" and "Main Channel"), and protocol.h and
enums.h of spice-protocol, whose names are given where they differ. All numbers are little endian. Whatever
is parsed here is hostile: nothing raises anything but SpiceError, and nothing grows beyond the given bytes.

The opening: the client sends a header and a LinkMessage; the server a header and a LinkReply with an RSA
key; the client, if both sides can choose (AUTH_SELECTION), the number of the mechanism, and the ticket: its
password, encrypted with that key; the server a result, 0 or an error. Then the channel's own messages begin.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from vdibuild.errors import VdibuildError

MAGIC = b"REDQ"
VERSION = (2, 2)
HEADER_BYTES = 16
LINK_BYTES = 4096
"""How long a link message or reply may be; spice-server's own limit is the same."""
KEY_BYTES = 162
"""A 1024-bit RSA key as a DER SubjectPublicKeyInfo (SPICE_TICKET_PUBKEY_BYTES)."""
TICKET_BYTES = 128
PASSWORD_BYTES = 60
"""SPICE_MAX_PASSWORD_LENGTH."""

MAIN_CHANNEL = 1
INPUTS_CHANNEL = 3
MAIN_INIT = 103
"""SPICE_MSG_MAIN_INIT: the first thing a server says on the main channel; begins with the session's id."""

AUTH_SELECTION, AUTH_SPICE, AUTH_SASL, MINI_HEADER = range(4)
"""Common capabilities, by their bit (SPICE_COMMON_CAP_...); AUTH_SPICE is also the mechanism's number."""

_KEY_BITS = 1024
_HEADER = struct.Struct("<4sIII")
_LINK = struct.Struct("<IBBIII")
_REPLY = struct.Struct(f"<I{KEY_BYTES}sIII")
_MINI_DATA = struct.Struct("<HI")
_FULL_DATA = struct.Struct("<QHII")
_WORD = struct.Struct("<I")
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303 (the protocol's choice)


class LinkError(IntEnum):
    """Why a link is refused (SPICE_LINK_ERR_...)."""

    OK = 0
    ERROR = 1
    INVALID_MAGIC = 2
    INVALID_DATA = 3
    VERSION_MISMATCH = 4
    NEED_SECURED = 5
    NEED_UNSECURED = 6
    PERMISSION_DENIED = 7
    BAD_CONNECTION_ID = 8
    CHANNEL_NOT_AVAILABLE = 9


class SpiceError(VdibuildError):
    """Bytes that are no SPICE. code: what the other side is told."""

    def __init__(self, message: str, code: LinkError = LinkError.INVALID_DATA) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Capabilities:
    """What a side can do: bits in 32-bit words, those of every channel and those of this kind of channel."""

    common: tuple[int, ...] = ()
    channel: tuple[int, ...] = ()

    def has(self, bit: int) -> bool:
        """Whether a common capability is there."""
        return bit // 32 < len(self.common) and bool(self.common[bit // 32] >> bit % 32 & 1)

    def without(self, bit: int) -> Capabilities:
        """These, but for one common capability."""
        words = (
            word & ~(1 << bit % 32) if number == bit // 32 else word
            for number, word in enumerate(self.common)
        )
        return Capabilities(tuple(words), self.channel)

    def __and__(self, other: Capabilities) -> Capabilities:
        return Capabilities(_both(self.common, other.common), _both(self.channel, other.channel))


@dataclass(frozen=True)
class LinkMessage:
    """What a client asks for (SpiceLinkMess). connection: the session's id, 0 to begin one."""

    connection: int
    channel: int
    number: int
    capabilities: Capabilities


@dataclass(frozen=True)
class LinkReply:
    """What a server answers (SpiceLinkReply). key: its public key, DER."""

    error: int
    key: bytes
    capabilities: Capabilities


@dataclass(frozen=True)
class DataHeader:
    """The header of a channel's message. size: bytes that follow it."""

    kind: int
    size: int


def parse_header(data: bytes) -> int:
    """The first 16 bytes of either side; returns how many follow. Raises SpiceError."""
    magic, major, _minor, size = _HEADER.unpack(data)
    if magic != MAGIC:
        raise SpiceError("no SPICE: another magic number", LinkError.INVALID_MAGIC)
    if major != VERSION[0]:
        raise SpiceError(f"SPICE version {major}", LinkError.VERSION_MISMATCH)
    if not _LINK.size <= size <= LINK_BYTES:
        raise SpiceError(f"a link message of {size} bytes")
    return int(size)


def parse_link(data: bytes) -> LinkMessage:
    """What follows a client's header. Raises SpiceError."""
    if len(data) < _LINK.size:
        raise SpiceError("a link message that is too short")
    connection, channel, number, commons, channels, offset = _LINK.unpack_from(data)
    capabilities = _capabilities(data, commons, channels, offset, _LINK.size)
    return LinkMessage(connection, channel, number, capabilities)


def parse_reply(data: bytes) -> LinkReply:
    """What follows a server's header. Raises SpiceError."""
    if len(data) < _REPLY.size:
        raise SpiceError("a link reply that is too short")
    error, key, commons, channels, offset = _REPLY.unpack_from(data)
    # A reply that refuses need not have capabilities, nor a sensible place for them.
    capabilities = Capabilities() if error else _capabilities(data, commons, channels, offset, _REPLY.size)
    return LinkReply(error, key, capabilities)


def build_link(message: LinkMessage) -> bytes:
    """A header and a LinkMessage."""
    words = message.capabilities
    body = _LINK.pack(
        message.connection,
        message.channel,
        message.number,
        len(words.common),
        len(words.channel),
        _LINK.size,
    )
    return _framed(body + _packed(words))


def build_reply(reply: LinkReply) -> bytes:
    """A header and a LinkReply."""
    words = reply.capabilities
    body = _REPLY.pack(reply.error, reply.key, len(words.common), len(words.channel), _REPLY.size)
    return _framed(body + _packed(words))


def build_refusal(code: LinkError) -> bytes:
    """The reply that refuses a link."""
    return build_reply(LinkReply(code, bytes(KEY_BYTES), Capabilities()))


def data_header_bytes(mini: bool) -> int:
    """How long the header of a channel's message is. mini: both sides can MINI_HEADER."""
    return _MINI_DATA.size if mini else _FULL_DATA.size


def parse_data_header(data: bytes, mini: bool) -> DataHeader:
    """The header of a channel's message, of exactly its length."""
    if mini:
        return DataHeader(*_MINI_DATA.unpack(data))
    _serial, kind, size, _sub_list = _FULL_DATA.unpack(data)
    return DataHeader(kind, size)


def word(number: int) -> bytes:
    """A number as it is sent: a result, a mechanism."""
    return _WORD.pack(number)


def parse_word(data: bytes) -> int:
    """A result or a mechanism: 4 bytes."""
    return int(_WORD.unpack(data)[0])


def parse_main_init(body: bytes) -> int:
    """The session's id in the body of a MAIN_INIT. Raises SpiceError."""
    if len(body) < _WORD.size:
        raise SpiceError("a MAIN_INIT without a session's id")
    return parse_word(body[: _WORD.size])


def with_identifier(body: bytes, identifier: int) -> bytes:
    """The body of a MAIN_INIT with another session's id."""
    return word(identifier) + body[_WORD.size :]


class TicketKey:
    """The key with which a server lets its clients encrypt their passwords."""

    def __init__(self) -> None:
        # The protocol has room for no larger key; what a ticket of ours opens is inside TLS anyway.
        self._key = rsa.generate_private_key(65537, _KEY_BITS)
        self.public = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def decrypt(self, ticket: bytes) -> bytes:
        """The password in a ticket, without the zero byte that ends it. Raises SpiceError."""
        try:
            text = self._key.decrypt(ticket, _OAEP)
        except ValueError:
            raise SpiceError("a ticket for another key", LinkError.PERMISSION_DENIED) from None
        return text.split(b"\0", 1)[0]


def encrypt_ticket(password: str, key: bytes) -> bytes:
    """A password, encrypted with the public key of a link reply. Raises SpiceError for a strange key."""
    try:
        public = serialization.load_der_public_key(key)
        if isinstance(public, rsa.RSAPublicKey) and public.key_size == _KEY_BITS:
            return public.encrypt(password.encode() + b"\0", _OAEP)
    except (ValueError, UnsupportedAlgorithm):
        pass
    raise SpiceError("the key of the link reply is no 1024-bit RSA key")


def _capabilities(data: bytes, commons: int, channels: int, offset: int, least: int) -> Capabilities:
    end = offset + (commons + channels) * _WORD.size
    if offset < least or end > len(data):
        raise SpiceError("capabilities outside of the message")
    words = struct.unpack_from(f"<{commons + channels}I", data, offset)
    return Capabilities(words[:commons], words[commons:])


def _packed(capabilities: Capabilities) -> bytes:
    words = (*capabilities.common, *capabilities.channel)
    return struct.pack(f"<{len(words)}I", *words)


def _framed(body: bytes) -> bytes:
    return _HEADER.pack(MAGIC, *VERSION, len(body)) + body


def _both(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(left & right for left, right in zip(one, other, strict=False))
