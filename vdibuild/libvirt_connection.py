"""A connection to libvirt, whose errors are raised and not printed too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import libvirt

from vdibuild.errors import HostError

libvirt.registerErrorHandler(lambda _context, _error: None, None)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """libvirt at `uri`, such as qemu:///system, for as long as the block runs.

    Raises HostError when it cannot be reached, and in place of an error of libvirt's in the block.
    """
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        message = f"libvirt at {uri} cannot be reached: {error}"
        raise HostError(message, "`./inv doctor` says what mends it") from None
    try:
        yield connection
    except libvirt.libvirtError as error:
        raise HostError(f"libvirt at {uri} failed: {error}", "its own log may tell more") from error
    finally:
        connection.close()
