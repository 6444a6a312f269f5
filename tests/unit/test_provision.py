"""What provision decides: machines of the site file, their domains, addresses, journals."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import pytest

from vdibuild import site
from vdibuild.disk.layout import FileSystem, Layout, LogicalVolume, Partition, VolumeGroup
from vdibuild.errors import BusyError, InputError, VdibuildError
from vdibuild.provision import anew, domain, journal, network, ways
from vdibuild.provision.anew import Disk
from vdibuild.provision.domain import Hardware
from vdibuild.provision.journal import Made
from vdibuild.settings.machines import Machine
from vdibuild.site import Site
from vdibuild.tree import Tree

GOLDEN = Path(__file__).parent / "golden"
SITE = """
images:
  debian-13: {family: debian, release: trixie, kickstart: golden-debian.ks.j2}
networks:
  office: {kind: bridge, name: br0, first: 192.0.2.10, last: 192.0.2.20, gateway: 192.0.2.1}
machines:
  web: {image: debian-13, size: 20GiB, network: office, address: 192.0.2.7, memory: 2GiB}
"""
MADE = Made(
    name="web",
    uuid=str(uuid.UUID(int=7)),
    uri="qemu:///system",
    image="debian-13",
    version="20260102.1",
    pool="default",
    volume="web.raw",
    network="default",
    mac="52:54:c0:a8:7a:04",
    address="192.168.122.4",
    host="web.example.org",
    dns=None,
    parts=("volume", "network", "domain"),
)


def loaded(tmp_path: Path, text: str = SITE) -> Site:
    (tmp_path / "vdibuild.yaml").write_text(text)
    return site.load(tmp_path / "vdibuild.yaml")


def test_options_come_before_the_site_file(tmp_path: Path) -> None:
    described = loaded(tmp_path)
    machine = described.machine("web", {"memory": "4GiB", "cpus": 2})
    assert (machine.size, machine.memory, machine.cpus) == (20480, 4096, 2)
    assert machine.address == IPv4Address("192.0.2.7")
    assert described.machine("db", {"image": "debian-13", "network": "office"}) == Machine(
        image="debian-13", network="office"
    )


def test_an_image_or_a_bundle(tmp_path: Path) -> None:
    described = loaded(
        tmp_path, f"{SITE}  db: {{bundle: db-1, swap: 1GiB, network: office}}\nbundles: repository\n"
    )
    machine = described.machine("web", {"bundle": "web-1"})
    assert (machine.image, machine.bundle, machine.size, machine.new_disk) == (None, "web-1", 20480, False)
    machine = described.machine("db", {"filesystem": "xfs"})
    assert (machine.bundle, machine.filesystem, machine.swap) == ("db-1", "xfs", 1024)
    machine = described.machine("db", {"image": "debian-13", "version": "20260102.1"})
    assert (machine.image, machine.version, machine.bundle) == ("debian-13", "20260102.1", None)
    with pytest.raises(VdibuildError, match="a bundle has no versions"):
        described.machine("db", {"version": "20260102.1"})
    assert described.bundle_repository == str(tmp_path / "repository")
    web = described.model_copy(update={"bundles": "https://bundles.example.org/all"})
    assert web.bundle_repository == "https://bundles.example.org/all"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("db", {}, "there is no machine 'db'"),
        ("web", {"size": "20"}, "size: '20' is no size"),
        ("web", {"address": "office"}, "address: "),
        ("web", {"mac": "53:54:00:00:00:01"}, "mac: '53:54:00:00:00:01' is a multicast address"),
        ("web", {"network": "offce"}, "did you mean 'office'"),
        ("web", {"image": "debian-14"}, "did you mean 'debian-13'"),
        ("web", {"image": "debian-13", "bundle": "web-1"}, "name one of the two"),
        ("web", {"bundle": "web-1", "version": "20260102.1"}, "a bundle has no versions"),
        ("web", {"bundle": "../web-1"}, "bundle: '../web-1' is no name of a bundle"),
        ("web", {"filesystem": "ntfs"}, "filesystem: "),
        ("web", {"swap": "much"}, "swap: 'much' is no size"),
    ],
)
def test_wrong_options(tmp_path: Path, name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(VdibuildError, match=said):
        loaded(tmp_path).machine(name, options)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("network: office", "network: offce", "machines: web: there is no network 'offce'"),
        ("last: 192.0.2.20", "last: 192.0.2.1", "the last address is before the first"),
        ("last: 192.0.2.20, ", "", "first and last go together"),
        ("kind: bridge", "domain: Example", "'Example' is no domain"),
        ("image: debian-13, size", "image: debian, size", "there is no image 'debian'"),
        ("image: debian-13, size", "size", "name one of the two"),
        ("memory: 2GiB", 'authorized_keys: ["ssh-ed25519 AAAA\\nssh-rsa BBBB"]', "is no public SSH key"),
    ],
)
def test_a_wrong_site_file(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SITE
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, SITE.replace(old, new))


@pytest.mark.parametrize("kind", ["nat", "bridge"])
def test_the_domain(tmp_path: Path, kind: Literal["nat", "bridge"]) -> None:
    volume = Path("/var/lib/libvirt/images/web.raw")
    hardware = Hardware("bios", "kvm", 2048, 2, volume, kind, "default" if kind == "nat" else "br0")
    assert domain.describe(MADE, hardware, tmp_path) == (GOLDEN / f"machine-{kind}.xml").read_text()


def test_the_first_free_address() -> None:
    first, last = IPv4Address("192.0.2.254"), IPv4Address("192.0.3.1")
    assert network.choose(first, last, {first}) == IPv4Address("192.0.2.255")
    with pytest.raises(VdibuildError, match="are taken"):
        network.choose(first, first, {first})


def test_a_journal_is_kept_and_locked(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with journal.opened(state, "web") as record:
        record.write(MADE)
        with (
            pytest.raises(BusyError, match="another run works on the machine web"),
            journal.opened(state, "web"),
        ):
            pass
    assert journal.unfinished(state) == ["web"]
    assert list(journal.under_way(state)) == [MADE]
    (state / "web.json").write_text("{}")
    with journal.opened(state, "web") as record:
        with pytest.raises(InputError, match="is damaged"):
            record.read()
        record.forget()
        assert record.read() is None


def layout(kind: str, group: str = "") -> Layout:
    root = FileSystem(kind, "", "/")
    part = Partition(1, 1, 1023, "83", "", group or root)
    if not group:
        return Layout("msdos", "bios", 1024, "0x1", (part,))
    volume = LogicalVolume(group, "root", 1020, "", root)
    return Layout("msdos", "bios", 1024, "0x1", (part,), (VolumeGroup(group, 4, ""),), (volume,))


@pytest.mark.parametrize(
    ("planned", "size", "name", "by", "reason"),
    [
        (layout("ext4"), 1024, "copy", "native", "allocated blocks"),
        (layout("ext4"), 4096, "copy", "native", "ext4 is changed where it lies"),
        (layout("xfs"), 4096, "copy", "appliance", "xfs on /"),
        (layout("btrfs"), 4096, "copy", "appliance", "btrfs on /"),
        (layout("ext4", "system"), 1024, "copy", "appliance", "LVM"),
        (
            layout("ext4"),
            512,
            "unpack",
            "mount" if os.geteuid() == 0 else "native",
            "512 MiB are less than the image's 1024",
        ),
        (layout("btrfs"), 512, "unpack", "native", "512 MiB are less"),
        (layout("ext4", "system"), 512, "unpack", "appliance", "512 MiB are less"),
    ],
)
def test_the_fastest_way(planned: Layout, size: int, name: str, by: str, reason: str) -> None:
    way = ways.choose(System(planned), size, None)
    assert (way.name, way.by, way.layout.size, way.anew) == (name, by, size, False)
    assert reason in way.reason


@dataclass
class System:
    """A Source, of an image or of a bundle."""

    layout: Layout | None
    disk: tuple[Path, str] | None = (Path("disk.qcow2"), "0" * 64)
    sealed: bool = True
    archive: Path = Path("bundle.tar.zst")
    name: str = "debian-13"
    version: str = "20260102.1"
    family: str = "debian"
    size: int = 1 << 20

    def trust(self, *, archive: bool) -> None:
        """It is not looked at."""


def test_a_bundle_on_the_disk_it_came_from() -> None:
    way = ways.choose(System(layout("ext4"), disk=None, sealed=False), 2048, None)
    assert (way.name, way.by, way.layout.size, way.anew) == ("unpack", "native", 2048, False)
    assert way.layout.root == layout("ext4").root
    assert ways.choose(System(layout("ext4"), disk=None), None, None).layout.size == 1024


@pytest.mark.parametrize(
    ("source", "disk", "kinds"),
    [
        (System(None, None, sealed=False), None, ["biosboot", "ext4"]),
        (System(None, None, sealed=False), Disk("xfs", 512), ["biosboot", "swap", "xfs"]),
        (System(layout("ext4")), Disk("btrfs", 0), ["biosboot", "btrfs"]),
        (System(replace(layout("ext4"), firmware="uefi")), Disk("ext4", 256), ["vfat", "swap", "ext4"]),
    ],
)
def test_a_disk_that_is_laid_out_anew(source: System, disk: Disk | None, kinds: list[str]) -> None:
    way = ways.choose(source, 4096, disk)
    assert (way.name, way.by, way.anew) == ("unpack", "appliance" if "xfs" in kinds else "native", True)
    holds = [one.holds for one in way.layout.partitions if isinstance(one.holds, FileSystem)]
    assert [fs.kind for fs in holds] == kinds
    if disk and disk.swap:
        assert way.layout.partitions[1].size == disk.swap
    # The last one grows with a volume that is larger than asked for.
    assert way.layout.root == way.layout.partitions[-1].holds
    again = ways.choose(source, 4096, disk)
    assert again.layout.root.uuid != way.layout.root.uuid


def test_a_disk_of_no_size_and_of_too_little() -> None:
    with pytest.raises(VdibuildError, match="debian-13 was on no disk that says how large it is"):
        ways.choose(System(None, None, sealed=False), None, None)
    with pytest.raises(VdibuildError, match="swap does not fit"):
        ways.choose(System(None, None, sealed=False), 512, Disk("ext4", 1024))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (None, []),
        ('GRUB_CMDLINE_LINUX=""\n', []),
        (
            "GRUB_CMDLINE_LINUX='console=ttyS0 \"dyndbg=file a.c +p\"'\n"
            'GRUB_CMDLINE_LINUX_DEFAULT="quiet" # the rest\n',
            ["console=ttyS0", "dyndbg=file a.c +p", "quiet"],
        ),
        (
            'GRUB_CMDLINE_LINUX="rd.lvm.lv=rhel/root resume=/dev/mapper/rhel-swap rhgb root=/dev/sda1 ro"\n',
            ["rhgb"],
        ),
    ],
)
def test_a_moved_systems_kernel_arguments(tmp_path: Path, text: str | None, arguments: list[str]) -> None:
    tree = Tree(tmp_path)
    if text is not None:
        tree.write("/etc/default/grub", text)
    assert anew.kernel_arguments(tree) == arguments
