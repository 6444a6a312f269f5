"""The disk of an installation: a volume in a libvirt storage pool, and the record that it is ours.

Volumes carry no metadata in libvirt. So what is made is written down first, in a file in the site's own
state; what stands there under our prefix is ours, and nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from vdibuild import progress
from vdibuild.disk import zeros
from vdibuild.errors import BusyError, HostError
from vdibuild.output import replace

PREFIX = "vdibuild-"
"""What the names of our pools and volumes begin with."""

_GONE = (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL)


@dataclass(frozen=True)
class Volume:
    """A volume. pool, name: as libvirt calls them. path: where this host has it: a file, or a device."""

    pool: str
    name: str
    path: Path


class Record:
    """What an installation of one name has made on a libvirt host: a file, locked while it is worked with."""

    def __init__(self, file: Path, uri: str) -> None:
        self._file = file
        self._uri = uri

    def read(self) -> tuple[str, str] | None:
        """The recorded pool and volume, or None."""
        try:
            made = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return (made["pool"], made["volume"]) if made["uri"] == self._uri else None

    def write(self, pool: str, volume: str) -> None:
        """Record a volume that will be made."""
        replace(self._file, json.dumps({"uri": self._uri, "pool": pool, "volume": volume}))

    def forget(self) -> None:
        """There is nothing any more."""
        self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def recorded(state: Path, name: str, uri: str) -> Iterator[Record]:
    """The record of the installations of that name. Raises BusyError while another run works with it."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another run installs {name}", "wait for it to end, or give the image another name"
            ) from None
        yield Record(state / f"{name}.json", uri)


@contextlib.contextmanager
def own_pool(connection: Any, name: str, directory: Path) -> Iterator[str]:
    """A pool for a directory, for as long as the block lasts; yields its name.

    virt-install makes, and leaves, a pool for the directory of each file it is given, unless there is one.
    """
    pool = PREFIX + name
    _remove_own_pool(connection, pool)
    root = ElementTree.Element("pool", type="dir")
    ElementTree.SubElement(root, "name").text = pool
    ElementTree.SubElement(ElementTree.SubElement(root, "target"), "path").text = str(directory)
    made = connection.storagePoolCreateXML(ElementTree.tostring(root, encoding="unicode"), 0)
    try:
        yield pool
    finally:
        made.destroy()


def _remove_own_pool(connection: Any, pool: str) -> None:
    """Remove the pool that a killed run left; its directory stays."""
    try:
        left = connection.storagePoolLookupByName(pool)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:
            return
        raise
    # Ours are never persistent.
    if left.isPersistent():
        raise HostError(
            f"there is a storage pool {pool} on {connection.getURI()}, and it is not vdibuild's",
            f"rename or remove it (virsh pool-undefine {pool}), or give the image another name",
        )
    left.destroy()


def remove_remains(connection: Any, record: Record) -> None:
    """Remove the volume that an earlier run left."""
    made = record.read()
    if made is not None:
        pool, volume = made
        if (found := find(connection, pool, volume)) is not None:
            progress.note(f"removing the volume {volume} of an earlier run")
            delete(found)
        record.forget()


def create(connection: Any, record: Record, pool: str, name: str, size: int) -> Volume:
    """Make a raw volume of `size` MiB. Raises HostError: no such pool, one of that name, no room."""
    storage = opened(connection, pool)
    volume = file_name(storage, f"{PREFIX}{name}")
    if find(connection, pool, volume) is not None:
        raise HostError(
            f"there is a volume {volume} in the pool {pool}, and it is not recorded as vdibuild's",
            f"remove it (virsh vol-delete --pool {pool} {volume}), or give the image another name",
        )
    record.write(pool, volume)
    try:
        return make(storage, volume, size)
    except HostError:
        record.forget()
        raise


def opened(connection: Any, pool: str) -> Any:
    """The storage pool of that name. Raises HostError: there is none, not started, of another type."""
    try:
        storage = connection.storagePoolLookupByName(pool)
    except libvirt.libvirtError:
        known = ", ".join(one.name() for one in connection.listAllStoragePools()) or "none"
        raise HostError(
            f"there is no storage pool {pool} on {connection.getURI()}", f"there are: {known}"
        ) from None
    if not storage.isActive():
        raise HostError(f"the storage pool {pool} is not started", f"virsh pool-start {pool}")
    _refresh(storage)
    if _kind(storage) not in ("dir", "logical"):
        raise HostError(
            f"the storage pool {pool} is of the type {_kind(storage)}", "name one of the type dir or logical"
        )
    return storage


def _refresh(storage: Any) -> None:
    """Let libvirt see what others have made in a pool. Raises HostError when it cannot be read."""
    try:
        storage.refresh(0)
    except libvirt.libvirtError as error:
        # While libvirt makes a volume, for another run perhaps, it does not look. What it knows has to do: a
        # file or logical volume that it does not know of is still none that it overwrites. A pool that it
        # cannot read it stops.
        if error.get_error_code() != libvirt.VIR_ERR_INTERNAL_ERROR or not _is_active(storage):
            raise HostError(
                f"the storage pool {storage.name()} cannot be read: {error}",
                f"mend that, then: virsh pool-start {storage.name()}",
            ) from None


def _is_active(storage: Any) -> bool:
    try:
        return bool(storage.isActive())
    except libvirt.libvirtError:
        return False  # a transient one is gone when it is stopped


def file_name(storage: Any, name: str) -> str:
    """What a raw volume is called in a pool: a file is known by its ending; a logical volume has none."""
    return name if _kind(storage) == "logical" else f"{name}.raw"


def make(storage: Any, volume: str, size: int) -> Volume:
    """Make a raw volume of `size` MiB in a pool that `opened` gave. Raises HostError when it cannot."""
    root = ElementTree.Element("volume")
    ElementTree.SubElement(root, "name").text = volume
    ElementTree.SubElement(root, "capacity", unit="MiB").text = str(size)
    if _kind(storage) == "dir":
        ElementTree.SubElement(root, "allocation").text = "0"
        ElementTree.SubElement(ElementTree.SubElement(root, "target"), "format", type="raw")
    try:
        made = storage.createXML(ElementTree.tostring(root, encoding="unicode"), 0)
    except libvirt.libvirtError as error:
        raise HostError(
            f"a volume of {size} MiB cannot be made in the pool {storage.name()}: {error}",
            f"virsh pool-info {storage.name()} tells its room",
        ) from None
    return Volume(storage.name(), volume, Path(made.path()))


def _kind(storage: Any) -> str | None:
    return ElementTree.fromstring(storage.XMLDesc(0)).get("type")  # noqa: S314 (libvirt's own output)


def remove(connection: Any, record: Record, volume: Volume) -> None:
    """Remove a volume of ours."""
    if (found := find(connection, volume.pool, volume.name)) is not None:
        delete(found)
    record.forget()


def delete(volume: Any) -> None:
    """Remove a volume with all that is on it. Raises HostError when that cannot be done.

    libvirt only gives a logical volume's extents back (lvremove), and the next volume has them as they are; a
    file's blocks come back as zeros from its file system. libvirt's own wiping writes all of it in small
    pieces, also where a device forgets by itself.
    """
    kind, _, _ = volume.info()
    if kind == libvirt.VIR_STORAGE_VOL_BLOCK:
        zeros.erase(Path(volume.path()))
    volume.delete(0)


def find(connection: Any, pool: str, volume: str) -> Any | None:
    """The volume of that name, or None."""
    try:
        return connection.storagePoolLookupByName(pool).storageVolLookupByName(volume)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:
            return None
        raise
