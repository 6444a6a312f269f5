"""The libvirt domain of an installation: our mark on it, its picture, its end, and what is left of it."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from vdibuild import progress
from vdibuild.errors import HostError
from vdibuild.install.command import LOG_PORT, MARK


def find(connection: Any, name: str) -> Any | None:
    """The domain of that name, or None."""
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def owner(domain: Any) -> str:
    """Who marked a domain as theirs (see command.MARK), or an empty text."""
    try:
        element = ElementTree.fromstring(  # noqa: S314 (libvirt's own output)
            domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, MARK, 0)
        )
    except libvirt.libvirtError:
        return ""
    # A copy that somebody made of it under another name keeps the element, and is theirs.
    return element.get("owner", "") if element.get("name") == domain.name() else ""


def remove_remains(connection: Any, name: str, us: str) -> None:
    """Remove what an earlier run left under that name. Raises HostError for a domain that is not ours.

    us: the owner in our marks.
    """
    domain = find(connection, name)
    if domain is None:
        return
    if owner(domain) != us:
        whose = "another site's" if owner(domain) else "not vdibuild's"
        raise HostError(
            f"there is a domain {name} on {connection.getURI()}, and it is {whose}",
            f"rename or remove it (virsh undefine {name}), or give the image another name",
        )
    progress.note(f"removing the domain {name} of an earlier run")
    remove(domain)


def remove(domain: Any) -> None:
    """Switch a domain off at once, and remove its definition with everything libvirt keeps for it."""
    # It may end by itself just now; and one that was not defined yet is gone with its QEMU.
    with _unless(libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
        domain.destroy()
    with _unless(libvirt.VIR_ERR_NO_DOMAIN):
        kept = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        if "<nvram" in domain.XMLDesc(0):
            kept |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        domain.undefineFlags(kept)


@contextlib.contextmanager
def _unless(*codes: int) -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() not in codes:
            raise


def finish(connection: Any, domain: Any, disk: Path, autostart: bool) -> None:
    """Make an installed machine one that can be used: only its own disk, no installer's medium, no log port.

    autostart: start it with its host.
    """
    text = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    tree = ElementTree.fromstring(text)  # noqa: S314 (libvirt's own output)
    devices = tree.find("devices")
    assert devices is not None  # noqa: S101 (every domain has them)
    for element in devices.findall("disk"):
        source = element.find("source")
        if source is None or str(disk) not in (source.get("file"), source.get("dev")):
            devices.remove(element)
        elif (driver := element.find("driver")) is not None:
            # What is written from now on has to last.
            driver.attrib.pop("cache", None)
    for element in devices.findall("channel"):
        target = element.find("target")
        if target is not None and target.get("name") == LOG_PORT:
            devices.remove(element)
    connection.defineXML(ElementTree.tostring(tree, encoding="unicode"))
    domain.setAutostart(int(autostart))


def screenshot(connection: Any, domain: Any, file: Path) -> bool:
    """Save a running domain's screen as PNG. Returns False when it cannot be had."""
    received = bytearray()
    stream = connection.newStream(0)
    try:
        kind = domain.screenshot(stream, 0, 0)
        stream.recvAll(lambda _stream, data, _opaque: received.extend(data), None)
        stream.finish()
    except libvirt.libvirtError as error:
        progress.log(f"no picture of {domain.name()}: {error}")
        return False
    file.write_bytes(bytes(received) if kind == "image/png" else _png(bytes(received)))
    return True


def _png(ppm: bytes) -> bytes:
    """A binary PPM (`P6 WIDTH HEIGHT 255`, three bytes a pixel) as PNG (RFC 2083: 8 bits, true colour)."""
    magic, width, height, depth, pixels = ppm.split(maxsplit=4) if ppm[:2] == b"P6" else [b""] * 5
    if magic != b"P6" or depth != b"255":
        raise HostError("libvirt's picture of the screen is no PPM")
    line = int(width) * 3
    # White space may be a pixel's value too: the pixels are counted from the end.
    pixels = ppm[len(ppm) - line * int(height) :]
    rows = b"".join(b"\0" + pixels[at : at + line] for at in range(0, len(pixels), line))
    header = struct.pack(">IIBBBBB", int(width), int(height), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
