"""A golden image by installation: our installer, virt-install, LVM and XFS as the first template had them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from tests.guest import libvirtd
from tests.guest.conftest import SITE, Built, SiteDirectory
from tests.guest.libvirtd import Libvirt

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

# The bundle is the shared small image's.
TEMPLATE = """
  template:
    family: debian
    release: trixie
    method: install
    kickstart: install-debian.ks.j2
    bundle: small
    overlays: [mine]
    disk: {size: 3GiB, layout: lvm-xfs, table: msdos}
    install: {memory: 1GiB}
keys:"""


@pytest.fixture(scope="module")
def libvirt_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    with libvirtd.system(tmp_path_factory.mktemp("libvirt")) as running:
        yield running


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("install-debian", "own", r"own\.ks\.j2:2: .*sitze"),
        ("size: 3GiB", "size: 600MiB", r"lvm-xfs\.ks\.j2:\d+|install-debian\.ks\.j2:\d+"),
        ("    bundle: small\n", "    mirror: http://127.0.0.1:9/debian\n", r"http://127\.0\.0\.1:9/debian"),
    ],
    ids=["syntax", "small disk", "no mirror"],
)
def test_what_can_be_known_is_said_before_anything_is_built(
    site: SiteDirectory, old: str, new: str, said: str
) -> None:
    assert old in TEMPLATE
    (site.path / "kickstarts").mkdir()
    (site.path / "kickstarts" / "own.ks.j2").write_text("liveimg --url=file:///dev/vdb\npart / --sitze=1\n")
    site.configure(SITE.replace("keys:", TEMPLATE[1:].replace(old, new)))
    status, output = site.run("build-golden", "--image", "template")
    assert status == 1
    assert re.search(said, output), output
    assert "Traceback" not in output
    assert sorted(path.name for path in (site.path / "artifacts").glob("[a-z]*")) == []


def test_an_installation_becomes_a_golden_image(
    site: SiteDirectory, built: Built, libvirt_host: Libvirt
) -> None:
    site.configure(f"{SITE.replace('keys:', TEMPLATE[1:])}libvirt: {libvirt_host.uri}\n")
    for place in (site.path, site.cache):
        place.chmod(0o700)
    status, output = site.run("build-golden", "--image", "template")
    # Said before minutes have gone into what could not be read.
    assert (status, "QEMU runs as libvirt-qemu, which cannot reach" in output) == (1, True), output
    assert site.versions() == []
    site.take_versions(built.site)
    for place in (site.path, site.cache):
        libvirtd.let_in(place)
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
    boot, physical = manifest["layout"]["partitions"]
    assert (boot["holds"]["mountpoint"], boot["holds"]["kind"], boot["size"]) == ("/boot", "xfs", 512)
    assert physical["holds"] == "system"
    # What was built on the way is there to be used again.
    assert (site.path / "artifacts" / "installer" / "current" / "image.iso").exists()
    assert (site.path / "artifacts" / "small" / "current" / "bundle.tar.zst").exists()

    status, output = site.run("build-golden", "--image", "template")
    assert status == 0
    assert "template is unchanged" in output
