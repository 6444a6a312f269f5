"""The domain of a machine, compared with a file that a person can read; images that are refused."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest

from vdibuild.errors import StoreError
from vdibuild.machine import uefi_firmware
from vdibuild.manifest import Devices
from vdibuild.pool.hypervisor import Hypervisor
from vdibuild.pool.leases import Machine, State
from vdibuild.pool.overlay_clones import Hardware, OverlayCloner, refuse_chains
from vdibuild.settings.keys import Keys
from vdibuild.store import Store

GOLDEN = Path(__file__).parent / "golden"

MACHINE = Machine(
    lease="5e9f4c6e-0f5c-4b8e-9a3c-1d2e3f405162",
    pool="desktop",
    state=State.STARTING,
    image="debian-13",
    version="20260101.1",
    mac="52:54:00:01:02:03",
    station=None,
    address=None,
    reason=None,
    failed=False,
    started=datetime(2026, 1, 1, tzinfo=UTC),
    cleaned=None,
    paused=None,
    offered=None,
    linked=None,
    ended=None,
    removed=None,
    bytes_in=None,
    bytes_out=None,
)


def cloner(directory: Path, **changes: Any) -> OverlayCloner:
    values: dict[str, Any] = {
        "memory": 2048,
        "cores": 2,
        "disk": 4096,
        "video": "virtio",
        "network": None,
        "accelerator": "kvm",
        "boot_seconds": 600,
        "reserve_memory": 1024,
        "reserve_disk": 1024,
    }
    images = Store(directory / "artifacts", Keys())
    hardware = Hardware(**(values | changes))
    hypervisor = Hypervisor("test:///default")
    return OverlayCloner("desktop", "debian-13", directory, hardware, images, hypervisor, directory)


@pytest.mark.parametrize(
    ("name", "firmware", "changes"),
    [
        ("pool-domain-bios", "bios", {"network": "vdibuild-desktop"}),
        ("pool-domain-uefi", "uefi", {"accelerator": "tcg", "video": "qxl"}),
    ],
)
def test_domain(
    name: str, firmware: Literal["bios", "uefi"], changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = Path("/var/lib/vdibuild/pools/desktop")
    xml = cloner(directory, **changes).domain(MACHINE, firmware, "secret")
    found = uefi_firmware()
    general = xml.replace(str(found.code), "CODE").replace(str(found.variables), "VARIABLES")
    assert general == (GOLDEN / f"{name}.xml").read_text()
    file = tmp_path / "domain.xml"
    file.write_text(xml)
    subprocess.run(["virt-xml-validate", str(file), "domain"], check=True)


def test_domain_of_an_adopted_machine(tmp_path: Path) -> None:
    directory = Path("/var/lib/vdibuild/pools/desktop")
    devices = Devices(chipset="pc", disk="ide", network="e1000", clock="localtime")
    xml = cloner(directory, network="desktops").domain(MACHINE, "bios", "secret", devices)
    assert xml == (GOLDEN / "pool-domain-adopted.xml").read_text()
    file = tmp_path / "domain.xml"
    file.write_text(xml)
    subprocess.run(["virt-xml-validate", str(file), "domain"], check=True)


def test_names_are_escaped(tmp_path: Path) -> None:
    xml = cloner(tmp_path / "a'b<ill", network="x'/><evil").domain(MACHINE, "bios", "secret")
    root = ElementTree.fromstring(xml)  # noqa: S314 (it is ours)
    source = root.find("./devices/interface/source")
    assert source is not None
    assert source.get("network") == "x'/><evil"


@pytest.mark.parametrize("lease", ["../../etc", "x", "", "5E9F4C6E0F5C4B8E9A3C1D2E3F405162/.."])
def test_a_lease_is_no_path(tmp_path: Path, lease: str) -> None:
    with pytest.raises(ValueError, match="badly formed"):
        cloner(tmp_path)._place(lease)


def test_images_that_do_not_stand_alone(tmp_path: Path) -> None:
    base, clone = tmp_path / "base.qcow2", tmp_path / "clone.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "1M"], check=True)
    refuse_chains(base)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(clone)], check=True
    )
    with pytest.raises(StoreError, match=r"clone\.qcow2 is itself a clone, of .*base\.qcow2"):
        refuse_chains(clone)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", str(base)], check=True)
    with pytest.raises(StoreError, match="has snapshots"):
        refuse_chains(base)
