"""SPICE's opening as bytes: what is built is read back, real bytes are understood, and no bytes do harm."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from vdibuild.pool import spice
from vdibuild.pool.spice import Capabilities, LinkError, LinkMessage, LinkReply, SpiceError, TicketKey

numbers = st.integers(0, 2**32 - 1)
words = st.lists(numbers, max_size=20).map(tuple)
capabilities = st.builds(Capabilities, words, words)
messages = st.builds(LinkMessage, numbers, st.integers(0, 255), st.integers(0, 255), capabilities)

# A link message as remote-viewer 11 sends it: a main channel, capabilities 0b1011 and 0b1011.
VIEWER = bytes.fromhex(
    "52454451 02000000 02000000 1a000000 00000000 01 00 01000000 01000000 12000000 0b000000 0b000000"
)
# The first message of QEMU 7.2's main channel, with a mini header.
MAIN_INIT = bytes.fromhex(
    "6700 20000000 f911d781 01000000 01000000 01000000 00000000 0a000000 2f35c800 00000001"
)


def test_a_viewers_link_message() -> None:
    size = spice.parse_header(VIEWER[:16])
    message = spice.parse_link(VIEWER[16 : 16 + size])
    assert message == LinkMessage(0, spice.MAIN_CHANNEL, 0, Capabilities((0b1011,), (0b1011,)))
    assert spice.build_link(message) == VIEWER


def test_a_machines_main_init() -> None:
    header = spice.parse_data_header(MAIN_INIT[:6], mini=True)
    assert (header.kind, header.size) == (spice.MAIN_INIT, len(MAIN_INIT) - 6)
    assert spice.parse_main_init(MAIN_INIT[6:]) == 0x81D711F9
    changed = spice.with_identifier(MAIN_INIT[6:], 7)
    assert spice.parse_main_init(changed) == 7 and changed[4:] == MAIN_INIT[10:]


def test_a_full_data_header() -> None:
    header = spice.parse_data_header(struct.pack("<QHII", 1, spice.MAIN_INIT, 32, 0), mini=False)
    assert (header.kind, header.size) == (spice.MAIN_INIT, 32)


@given(messages)
def test_a_link_message_is_read_back(message: LinkMessage) -> None:
    data = spice.build_link(message)
    assert spice.parse_header(data[:16]) == len(data) - 16
    assert spice.parse_link(data[16:]) == message


@given(capabilities)
def test_a_link_reply_is_read_back(theirs: Capabilities) -> None:
    reply = LinkReply(0, bytes(range(162)), theirs)
    data = spice.build_reply(reply)
    assert spice.parse_reply(data[16:]) == reply


@given(st.sampled_from(list(LinkError)[1:]))
def test_a_refusal_is_read_back(code: LinkError) -> None:
    data = spice.build_refusal(code)
    assert spice.parse_reply(data[16:]).error == code


@given(st.binary(min_size=16, max_size=16))
def test_no_header_does_harm(data: bytes) -> None:
    try:
        assert 18 <= spice.parse_header(data) <= spice.LINK_BYTES
    except SpiceError as error:
        assert error.code in (
            LinkError.INVALID_MAGIC,
            LinkError.VERSION_MISMATCH,
            LinkError.INVALID_DATA,
        )


def check_no_larger(found: Capabilities, data: bytes) -> None:
    assert 4 * (len(found.common) + len(found.channel)) <= len(data)


@given(st.binary(max_size=300))
def test_no_link_message_does_harm(data: bytes) -> None:
    try:
        check_no_larger(spice.parse_link(data).capabilities, data)
    except SpiceError as error:
        assert error.code is LinkError.INVALID_DATA


@given(numbers, numbers, numbers, st.binary(max_size=60))
def test_no_counts_of_capabilities_do_harm(commons: int, channels: int, offset: int, rest: bytes) -> None:
    data = struct.pack("<IBBIII", 0, 1, 0, commons, channels, offset) + rest
    try:
        check_no_larger(spice.parse_link(data).capabilities, data)
    except SpiceError as error:
        assert error.code is LinkError.INVALID_DATA


@given(st.binary(max_size=400))
def test_no_link_reply_does_harm(data: bytes) -> None:
    try:
        check_no_larger(spice.parse_reply(data).capabilities, data)
    except SpiceError as error:
        assert error.code is LinkError.INVALID_DATA


@given(words, words, st.integers(0, 200))
def test_capabilities_by_their_bit(one: tuple[int, ...], other: tuple[int, ...], bit: int) -> None:
    left, right = Capabilities(one, other), Capabilities(other, one)
    assert (left & right).has(bit) == (left.has(bit) and right.has(bit))
    without = left.without(bit)
    assert not without.has(bit)
    assert all(without.has(index) == left.has(index) for index in range(200) if index != bit)
    assert without.channel == left.channel


def test_the_password_of_a_ticket() -> None:
    key = TicketKey()
    assert len(key.public) == spice.KEY_BYTES
    for password in ("", "x" * spice.PASSWORD_BYTES):
        ticket = spice.encrypt_ticket(password, key.public)
        assert len(ticket) == spice.TICKET_BYTES
        assert key.decrypt(ticket) == password.encode()


@pytest.mark.parametrize("ticket", [bytes(128), b"\xff" * 128, spice.encrypt_ticket("x", TicketKey().public)])
def test_a_ticket_that_is_none(ticket: bytes) -> None:
    with pytest.raises(SpiceError) as caught:
        TicketKey().decrypt(ticket)
    assert caught.value.code is LinkError.PERMISSION_DENIED


def der(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


@pytest.mark.parametrize(
    "key",
    [
        bytes(162),
        b"",
        der(rsa.generate_private_key(65537, 2048)),
        der(ec.generate_private_key(ec.SECP256R1())),
        TicketKey().public[:-1],
    ],
    ids=["zeros", "nothing", "2048 bits", "elliptic curve", "cut off"],
)
def test_a_strange_key(key: bytes) -> None:
    with pytest.raises(SpiceError, match="no 1024-bit RSA key"):
        spice.encrypt_ticket("x", key)


@given(st.binary(min_size=162, max_size=162))
def test_no_key_does_harm(key: bytes) -> None:
    with pytest.raises(SpiceError):
        spice.encrypt_ticket("x", key)
