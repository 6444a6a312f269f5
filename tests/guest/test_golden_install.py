"""A golden image by installation: our installer, virt-install, LVM and XFS as the first template had them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.guest import libvirtd
from tests.guest.conftest import SiteDirectory
from tests.guest.libvirtd import Libvirt

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

SITE = """
images:
  storage:
    family: debian
    release: trixie
    kickstart: golden-debian.ks.j2
    packages: [lvm2, xfsprogs]
    overlays: [golden]
    disk: {size: 1GiB}
  template:
    family: debian
    release: trixie
    method: install
    kickstart: install-debian.ks.j2
    bundle: storage
    overlays: [mine]
    disk: {size: 3GiB, layout: lvm-xfs, table: msdos}
    install: {memory: 1GiB}
keys: {signing: key/signing}
"""


@pytest.fixture(scope="module")
def libvirt_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    with libvirtd.system(tmp_path_factory.mktemp("libvirt")) as running:
        yield running


def test_an_installation_becomes_a_golden_image(site: SiteDirectory, libvirt_host: Libvirt) -> None:
    libvirtd.let_in(site.path)
    site.configure(f"{SITE}libvirt: {libvirt_host.uri}\n")
    status, output = site.run("build-golden", "--image", "template")
    assert status == 0, output
    assert libvirt_host.leftovers() == []
    (version,) = (site.path / "artifacts" / "template").glob("2*")
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["method"] == "install"
    assert manifest["verification"]["failed_units"] == []
    assert manifest["verification"]["host_name"] == "template"
    assert [group["name"] for group in manifest["layout"]["groups"]] == ["system"]
    volumes = {one["name"]: one["holds"]["kind"] for one in manifest["layout"]["logical"]}
    assert volumes == {"swap": "swap", "root": "xfs"}
    assert [one["holds"]["mountpoint"] for one in manifest["layout"]["partitions"][:1]] == ["/boot"]
    # What was built on the way is there to be used again.
    assert (site.path / "artifacts" / "installer" / "current" / "image.iso").exists()
    assert (site.path / "artifacts" / "storage" / "current" / "bundle.tar.zst").exists()

    status, output = site.run("build-golden", "--image", "template")
    assert status == 0
    assert "template is unchanged" in output
