"""A machine that is not finished leaves nothing: `provision` with libvirt's test driver, interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import libvirt
import pytest

from tests.unit.test_store import described
from vdibuild import provision, resources
from vdibuild import site as sites
from vdibuild.disk import write
from vdibuild.disk.layout import FileSystem, Layout, Partition
from vdibuild.errors import VdibuildError
from vdibuild.site import Site
from vdibuild.store import DISK, Store
from vdibuild.tree import Tree

URI = "test:///default"
SITE = f"""
images:
  debian-13: {{family: debian, release: trixie, kickstart: golden-debian.ks.j2}}
keys: {{signing: keys/key}}
libvirt: {URI}
machines:
  web: {{image: debian-13, pool: machines, address: dhcp}}
"""
ROOT = FileSystem("ext4", "5e9f4c6e-0f5c-4b8e-9a3c-1d2e3f405162", "/")
LAYOUT = Layout("msdos", "bios", 32, "0x4f3a2b1c", (Partition(1, 1, 31, "83", "", ROOT),))


@dataclass
class Host:
    """A site with an image, and a libvirt host that has no guests."""

    site: Site
    connection: Any

    def provision(self) -> None:
        provision.provision(self.site, "web", self.site.machine("web", {}), start=False, wait=False)

    def found(self) -> list[str]:
        """Machines, volumes and journals."""
        pool = self.connection.storagePoolLookupByName("machines")
        names = [one.name() for one in self.connection.listAllDomains() if one.name() != "test"]
        state = self.site.artifacts_directory / ".machines"
        journals = [path.name for path in state.glob("*") if path.suffix != ".lock"]
        return [*names, *pool.listVolumes(), *journals]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with an image of one small file system, which nothing starts."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "vdibuild.yaml").write_text(SITE)
    template = (resources.packaged() / "templates/domain.xml.j2").read_text()
    (directory / "templates").mkdir()
    # The test driver has one kind of machine, of one sort of processor.
    template = template.replace("<domain type='{{ accelerator }}'>", "<domain type='test'>")
    (directory / "templates/domain.xml.j2").write_text(template.replace("arch='x86_64' machine='q35'", ""))
    site = sites.load(directory / "vdibuild.yaml")
    store = Store(site.artifacts_directory, site.keys)
    with store.staging("debian-13") as staging:
        (directory / "tree").mkdir()
        tree = Tree(directory / "tree")
        tree.write("/etc/hostname", "golden\n")
        tree.write("/usr/lib/systemd/system/systemd-networkd.service", "")
        write.write(tree, LAYOUT, None, directory / "raw", "tcg")
        write.compress(directory / "raw", staging.path / DISK)
        version = store.publish(staging, described(staging, layout=LAYOUT))
    store.promote("debian-13", version.name)
    return site


@pytest.fixture
def host(site: Site, tmp_path: Path) -> Iterator[Host]:
    # What the test driver makes is in no file: this is the volume's.
    with (tmp_path / "web.raw").open("wb") as file:
        file.truncate(32 << 20)
    connection = libvirt.open(URI)  # the test driver forgets all when nobody has it open
    pool = f"<pool type='dir'><name>machines</name><target><path>{tmp_path}</path></target></pool>"
    made = connection.storagePoolCreateXML(pool, 0)
    yield Host(site, connection)
    made.destroy()
    connection.close()


def interrupted_at(module: str, name: str) -> None:
    """Have the function raise KeyboardInterrupt when it returns next, as Ctrl-C just then does."""

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "return" and code.co_qualname == name and frame.f_globals.get("__name__") == module:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(watch)


def test_a_machine_comes_and_goes(host: Host) -> None:
    host.provision()
    assert host.found() == ["web", "web.raw"]
    with pytest.raises(VdibuildError, match="there is a machine web"):
        host.provision()
    assert host.found() == ["web", "web.raw"]
    provision.deprovision(host.site, "web")
    assert host.found() == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vdibuild.provision", "_Run._plan"),
        ("vdibuild.provision.journal", "Journal.write"),
        ("vdibuild.install.storage", "make"),
        ("vdibuild.process", "start"),
        ("vdibuild.provision.ways", "Placement.put"),
        ("vdibuild.provision.domain", "define"),
        ("vdibuild.provision.journal", "Journal.forget"),
        ("vdibuild.provision", "_Run.run"),
    ],
)
def test_an_interrupt_leaves_nothing(host: Host, module: str, name: str) -> None:
    interrupted_at(module, name)
    with pytest.raises(KeyboardInterrupt):
        host.provision()
    assert host.found() == []
    host.provision()
    assert host.found() == ["web", "web.raw"]
    provision.deprovision(host.site, "web")
