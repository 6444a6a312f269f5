"""Makes the disk of a machine that somebody else made a version of an image, for pools to clone.

The machine stays as it is; its disk is copied. Nothing is known of its content, so such a version can be
cloned, verified, promoted and rolled back, and not provisioned or bundled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import libvirt
from pydantic import ValidationError

from vdibuild import __version__, process, progress, store
from vdibuild.disk.image import Image
from vdibuild.errors import HostError, InputError, StoreError
from vdibuild.libvirt_connection import connected
from vdibuild.manifest import AdoptedManifest, Devices
from vdibuild.pool.overlay_clones import refuse_chains
from vdibuild.site import Site
from vdibuild.store import Store, Version


@dataclass(frozen=True)
class Source:
    """A machine that can be adopted. disk: its only one. form: how libvirt reads it, raw or qcow2."""

    domain: str
    disk: Path
    form: str
    firmware: Literal["bios", "uefi"]
    devices: Devices


def adopt(site: Site, name: str | None, domain: str, *, promote: bool = True) -> Version:
    """Copy a machine's disk into the store, as a new version of an image.

    name: the image, whose method is adopt; by default the site's first. domain: the machine's name in
    libvirt. promote: make the version the current one. Raises InputError, HostError, StoreError when the
    machine cannot be adopted as it is.
    """
    name, image = site.image(name)
    if image.method != "adopt":
        raise InputError(
            site.source,
            None,
            f"the image {name} is built, not adopted",
            f"write images: {name}: method: adopt",
        )
    images = Store(site.artifacts_directory, site.keys)
    with progress.step(f"adopt {domain} as {name}"), images.staging(name) as staging:
        source = find(site.libvirt, domain)
        with progress.step("look at its disk") as step:
            if source.form == "qcow2":
                refuse_chains(source.disk)
            disk = Image(source.disk, staging.path)
            if disk.form != source.form:
                # What the guest wrote must not decide which files of this host are read.
                raise StoreError(
                    f"{source.disk} is {disk.form}, and libvirt reads it as {source.form}",
                    f"make the driver's type right: virsh edit {domain}",
                )
            step.note(f"{source.disk}, {disk.form}")
        with progress.step("copy its disk"):
            argv = [
                "qemu-img",
                "convert",
                "-f",
                disk.form,
                "-O",
                "qcow2",
                "-c",
                "-o",
                "compression_type=zstd",
            ]
            process.run([*argv, "-m", "4", str(disk.path), str(staging.path / store.DISK)])
        with progress.step("publish"):
            version = images.publish(
                staging,
                AdoptedManifest(
                    image=name,
                    version=staging.version,
                    created=datetime.now(UTC),
                    vdibuild=__version__,
                    domain=domain,
                    firmware=source.firmware,
                    devices=source.devices,
                    virtual_size=disk.size,
                ),
            )
            return images.promote(name, version.name) if promote else version


def find(uri: str, name: str) -> Source:
    """A machine of libvirt. Raises HostError when it is missing or runs, StoreError if it has no clones."""
    with connected(uri) as connection:
        return _source(connection, _shut_down(connection, name), name)


def _shut_down(connection: Any, name: str) -> Any:
    """A domain whose disk nobody writes."""
    try:
        domain = connection.lookupByName(name)
    except libvirt.libvirtError:
        there = ", ".join(sorted(one.name() for one in connection.listAllDomains())) or "none"
        raise HostError(
            f"there is no machine {name} on {connection.getURI()}", f"there are: {there}"
        ) from None
    if domain.isActive():
        raise HostError(f"the machine {name} runs", f"shut it down: virsh shutdown {name}")
    if domain.hasManagedSaveImage(0):
        raise HostError(f"the machine {name} sleeps", f"start it and shut it down: virsh start {name}")
    if domain.snapshotNum(0):
        raise StoreError(
            f"the machine {name} has snapshots", f"remove them: virsh snapshot-delete {name} SNAPSHOT"
        )
    return domain


def _source(connection: Any, domain: Any, name: str) -> Source:
    root = ElementTree.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314 (libvirt's)
    disks = [one for one in root.iterfind("devices/disk") if one.get("device", "disk") == "disk"]
    if len(disks) != 1:
        raise StoreError(
            f"the machine {name} has {len(disks)} disks", "clones have one: detach the others, if it boots so"
        )
    (disk,) = disks
    uefi = _said(root, "os", "firmware") == "efi" or _said(root, "os/loader", "type") == "pflash"
    return Source(
        domain=name,
        disk=_place(connection, disk, name),
        form=_said(disk, "driver", "type") or "raw",
        firmware="uefi" if uefi else "bios",
        devices=_devices(root, disk, name),
    )


def _place(connection: Any, disk: ElementTree.Element, name: str) -> Path:
    """Where a disk is: a file, a block device, or a volume of a storage pool."""
    if _said(disk, "source", "volume"):
        try:
            pool = connection.storagePoolLookupByName(_said(disk, "source", "pool"))
            return Path(pool.storageVolLookupByName(_said(disk, "source", "volume")).path())
        except libvirt.libvirtError as error:
            raise HostError(f"the disk of {name}: {error.get_error_message()}") from None
    place = _said(disk, "source", "file") or _said(disk, "source", "dev")
    if not place:
        raise StoreError(f"the disk of {name} is neither a file nor a block device of this host")
    return Path(place)


def _devices(root: ElementTree.Element, disk: ElementTree.Element, name: str) -> Devices:
    try:
        return Devices.model_validate(
            {
                "chipset": "q35" if "q35" in _said(root, "os/type", "machine") else "pc",
                "disk": _said(disk, "target", "bus"),
                "network": _said(root, "devices/interface/model", "type") or "virtio",
                "clock": _said(root, "clock", "offset") or "utc",
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(
            f"clones cannot have the {first['loc'][0]} of {name}: {first['input']!r}", first["msg"]
        ) from None


def _said(root: ElementTree.Element, path: str, name: str) -> str:
    """An attribute in libvirt's description, or an empty text."""
    element = root.find(path)
    return "" if element is None else element.get(name, "")
