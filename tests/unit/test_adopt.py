"""Existing machines of libvirt's test driver, adopted or refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import libvirt
import pytest

from vdibuild import adopt, golden, site
from vdibuild.errors import HostError, InputError, StoreError, VdibuildError
from vdibuild.manifest import AdoptedManifest, Devices
from vdibuild.store import DISK, Store

SITE = """\
images:
  office: {family: windows, release: win10, method: adopt}
  small: {family: debian, release: trixie, kickstart: small.ks.j2}
libvirt: test://NODE
keys: {signing: key/signing}
"""
SHUT_OFF, RUNNING = 5, 1
# The states of https://libvirt.org/drvtest.html: 5 is VIR_DOMAIN_SHUTOFF.
DOMAIN = """
  <domain type="test" xmlns:test="http://libvirt.org/schemas/domain/test/1.0">
    <name>windows</name>
    <memory>1048576</memory>
    <os><type machine="pc-i440fx-7.2">hvm</type>OS</os>
    <clock offset="localtime"/>
    <devices>
      DISKS
      <disk type="file" device="cdrom"><target dev="hdc" bus="ide"/></disk>
      <interface type="network">
        <mac address="52:54:00:00:00:01"/><source network="default"/><model type="e1000"/>
      </interface>
    </devices>
    <test:runstate>STATE</test:runstate>
  </domain>
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "windows.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 64k", str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def described(path: Path, form: str = "qcow2", bus: str = "ide", dev: str = "hda") -> str:
    return (
        f'<disk type="file" device="disk"><driver name="qemu" type="{form}"/>'
        f'<source file="{path}"/><target dev="{dev}" bus="{bus}"/></disk>'
    )


def load(tmp_path: Path, disks: str, state: int = SHUT_OFF, os: str = "") -> site.Site:
    node = tmp_path / "node.xml"
    domain = DOMAIN.replace("DISKS", disks).replace("STATE", str(state)).replace("OS", os)
    pool = f"<pool type='dir'><name>machines</name><target><path>{tmp_path}</path></target></pool>"
    node.write_text(f"<node>{domain}{pool}</node>")
    (tmp_path / "vdibuild.yaml").write_text(SITE.replace("NODE", str(node)))
    return site.load(tmp_path / "vdibuild.yaml")


def test_a_machine_is_adopted(tmp_path: Path, disk: Path) -> None:
    before = disk.read_bytes()
    version = adopt.adopt(load(tmp_path, described(disk)), "office", "windows")
    assert version.promoted
    stored = version.stored()
    assert isinstance(stored, AdoptedManifest)
    assert (stored.domain, stored.firmware, stored.virtual_size) == ("windows", "bios", 4 << 20)
    assert stored.devices == Devices(chipset="pc", disk="ide", network="e1000", clock="localtime")
    compared = ["qemu-img", "compare", str(disk), str(version.path / DISK)]
    assert subprocess.run(compared, capture_output=True, check=False).returncode == 0
    assert disk.read_bytes() == before
    images = Store(tmp_path / "artifacts", site.load(tmp_path / "vdibuild.yaml").keys)
    assert images.verify("office").version.name == version.name
    with pytest.raises(StoreError, match="was adopted: nobody knows what is in it"):
        version.manifest()


def test_what_uefi_is_seen_by(tmp_path: Path, disk: Path) -> None:
    loader = '<loader type="pflash">/usr/share/OVMF/OVMF_CODE.fd</loader>'
    uri = load(tmp_path, described(disk), os=loader).libvirt
    assert adopt.find(uri, "windows").firmware == "uefi"


def test_a_volume_of_a_storage_pool(tmp_path: Path, disk: Path) -> None:
    volume = described(disk).replace('type="file"', 'type="volume"')
    volume = volume.replace(f'file="{disk}"', 'pool="machines" volume="none.qcow2"')
    with pytest.raises(HostError, match=r"the disk of windows: .*none\.qcow2"):
        adopt.find(load(tmp_path, volume).libvirt, "windows")


def refuse(tmp_path: Path, disks: str, error: type[VdibuildError], said: str, state: int = SHUT_OFF) -> None:
    with pytest.raises(error, match=said):
        adopt.adopt(load(tmp_path, disks, state), "office", "windows")
    assert [entry.name for entry in (tmp_path / "artifacts/office").iterdir()] == [".build.lock"]


def test_a_machine_that_runs(tmp_path: Path, disk: Path) -> None:
    refuse(tmp_path, described(disk), HostError, "the machine windows runs", RUNNING)


def test_a_disk_with_snapshots(tmp_path: Path, disk: Path) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "before", str(disk)], check=True)
    refuse(tmp_path, described(disk), StoreError, "has snapshots")


def test_a_linked_clone(tmp_path: Path, disk: Path) -> None:
    clone = tmp_path / "clone.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(disk), str(clone)]
    subprocess.run(create, check=True)
    refuse(tmp_path, described(clone), StoreError, "is itself a clone, of")


def test_a_raw_disk_on_which_a_guest_wrote_the_header_of_a_qcow2(tmp_path: Path, disk: Path) -> None:
    refuse(tmp_path, described(disk, form="raw"), StoreError, "is qcow2, and libvirt reads it as raw")


def test_two_disks_and_none(tmp_path: Path, disk: Path) -> None:
    two = described(disk) + described(disk, dev="hdb")
    refuse(tmp_path, two, StoreError, "the machine windows has 2 disks")
    refuse(tmp_path, "", StoreError, "the machine windows has 0 disks")


def test_a_disk_that_clones_cannot_have(tmp_path: Path, disk: Path) -> None:
    refuse(
        tmp_path,
        described(disk, bus="scsi", dev="sda"),
        StoreError,
        "cannot have the disk of windows: 'scsi'",
    )


def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    refuse(tmp_path, described(tmp_path / "none.raw", form="raw"), InputError, "cannot be read")


def test_a_machine_with_snapshots_of_libvirt(tmp_path: Path, disk: Path) -> None:
    loaded = load(tmp_path, described(disk))
    connection = libvirt.open("test:///default")
    try:
        domain = connection.lookupByName("test")
        domain.snapshotCreateXML("<domainsnapshot/>", 0)
        domain.destroy()
        with pytest.raises(StoreError, match="the machine test has snapshots"):
            adopt.find("test:///default", "test")
    finally:
        connection.close()
    with pytest.raises(HostError, match="there is no machine office-1 on test") as caught:
        adopt.find(loaded.libvirt, "office-1")
    assert caught.value.hint == "there are: windows"


def test_an_image_that_is_built(tmp_path: Path, disk: Path) -> None:
    with pytest.raises(InputError, match="the image small is built, not adopted"):
        adopt.adopt(load(tmp_path, described(disk)), "small", "windows")
    with pytest.raises(InputError, match="the image office is not built"):
        golden.build(site.load(tmp_path / "vdibuild.yaml"), "office")
