"""What the station's guard takes for a medium that cannot be read; guest/test_live.py has what follows."""

from __future__ import annotations

import socket

import pytest

from vdibuild import station_guard


@pytest.mark.parametrize(
    ("record", "unreadable"),
    [
        (b"3,1093,29412,-;SQUASHFS error: Failed to read block 0x2c63a5: -5\n", True),
        (b"3,1094,29413,-;SQUASHFS error: Unable to read page, block 2c63a5, size 1d2c\n", True),
        (b"3,1094,29413,-;SQUASHFS error: unable to read inode lookup table\n", True),
        (b"3,9,1,-;device-mapper: verity: 254:0: data block 12 is corrupted\n SUBSYSTEM=block\n", True),
        (b'6,8,1,-;device-mapper: verity: sha256 using implementation "sha256-generic"\n', False),
        (b"3,7,1,-;I/O error, dev sdb, sector 0 op 0x0:(READ) flags 0x80700 phys_seg 1\n", False),
        # What programs write there is theirs: systemd's facility is 3, as whose error this is 27.
        (b"27,7,1,-;SQUASHFS error: Failed to read block 0x2c63a5: -5\n", False),
    ],
)
def test_records(record: bytes, unreadable: bool) -> None:
    assert station_guard.is_unreadable(record) == unreadable


def test_it_waits_for_one() -> None:
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernels:
        kernels.send(b"6,1,1,-;usb 1-1: new high-speed USB device number 2\n")
        kernels.send(b"3,2,1,-;SQUASHFS error: Failed to read block 0x2c63a5: -5\n")
        kernels.send(b"6,3,1,-;what comes later\n")
        station_guard.watch(ours.fileno(), "/sys")
        assert ours.recv(100).startswith(b"6,3")


def test_a_medium_that_is_gone_says_nothing() -> None:
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernels:
        station_guard.watch(ours.fileno(), "/sys/class/block/none")
