"""Debian installed of packages by our installer, and how that fails: minutes for each, so it runs on request.

It needs nothing but root: `pytest tests/long/test_package_install.py`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench import mirror
from tests.bench.mirror import Mirror
from tests.guest import libvirtd
from tests.guest.conftest import SiteDirectory, small_site
from tests.guest.libvirtd import Libvirt
from vdibuild import families, host, install, installer, site
from vdibuild.disk import inspection
from vdibuild.errors import InstallationError
from vdibuild.install import MARKER, ExtraDisk, Job, Media
from vdibuild.live import INITRAMFS, ISO, KERNEL
from vdibuild.machine import Hardware
from vdibuild.manifest import LiveManifest
from vdibuild.settings.images import Image, Install
from vdibuild.store import Version

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirt of the tests' own needs root")

# QEMU's own network: the host's loopback is there under this address.
HOST = "10.0.2.2"
KICKSTART = """\
url --url=http://{address}
lang C.UTF-8
rootpw --lock
bootloader --location=mbr --timeout=0 --append="console=ttyS0"
zerombr
clearpart --all --initlabel --disklabel=msdos
part / --fstype=ext4 --size=200 --grow
poweroff
%packages --nocore --exclude-weakdeps --excludedocs
linux-image-cloud-amd64
passwd
systemd-sysv
initramfs-tools
zstd
grub-pc-bin
{package}
%end
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def libvirt_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    with libvirtd.system(tmp_path_factory.mktemp("libvirt")) as running:
        yield running


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[SiteDirectory]:
    made = small_site(tmp_path_factory.mktemp("site"), cache)
    for place in (made.path, cache):
        libvirtd.let_in(place)
    yield made
    made.close()


@pytest.fixture(scope="module")
def medium(directory: SiteDirectory) -> Version:
    return installer.build(site.load(directory.path / "vdibuild.yaml")).version


@pytest.fixture(scope="module")
def archive(cache: Path) -> Iterator[Mirror]:
    image = Image(family="debian", release="trixie", kickstart="x")
    with mirror.serving(
        {"debian": families.get("debian").mirrors(image)["main"]}, cache / "mirror"
    ) as serving:
        yield serving


@dataclass
class Place:
    """What a job is made of, and what it leaves."""

    job: Job
    libvirt: Libvirt

    def leftovers(self) -> list[str]:
        found = self.libvirt.leftovers()
        return found + [str(path) for path in (*self.job.work.iterdir(), *self.job.state.glob("*.json"))]


@pytest.fixture
def place(tmp_path: Path, libvirt_host: Libvirt, medium: Version) -> Iterator[Place]:
    libvirtd.let_in(tmp_path)
    for name in ("state", "output", "work"):
        (tmp_path / name).mkdir()
    described = medium.described()
    assert isinstance(described, LiveManifest)
    job = Job(
        name="packages",
        uri=libvirt_host.uri,
        kickstart="",
        media=Media(kernel=str(medium.path / KERNEL), initrd=str(medium.path / INITRAMFS)),
        size=1536,
        hardware=Hardware("bios", 1536, host.accelerator().name),
        settings=Install(arguments=[*described.arguments.split(), "vdibuild.release=trixie"]),
        state=tmp_path / "state",
        work=tmp_path / "work",
        output=tmp_path / "output",
        disks=[ExtraDisk(medium.path / ISO, "vdibuild-installer")],
    )
    made = Place(job, libvirt_host)
    yield made
    assert made.leftovers() == []


def ordered(place: Place, address: str, package: str = "", size: int = 1536) -> Job:
    text = KICKSTART.format(address=address, package=package)
    values = {**vars(place.job), "kickstart": text, "size": size}
    return Job(**values)


def reached(archive: Mirror) -> str:
    """The archive's address as the guest sees it."""
    return archive.urls["debian"].removeprefix("http://").replace("127.0.0.1", HOST)


def test_a_package_that_does_not_exist(place: Place, archive: Mirror) -> None:
    job = ordered(place, reached(archive), "no-such-package")
    with (
        pytest.raises(InstallationError, match=r"packages\.ks:16: no package no-such-package") as caught,
        install.run(job),
    ):
        raise AssertionError
    assert caught.value.kind == "log"


def test_a_disk_that_the_packages_do_not_fit_on(place: Place, archive: Mirror) -> None:
    job = ordered(place, reached(archive), size=256)
    with (
        pytest.raises(InstallationError, match="the disk is too small for the system") as caught,
        install.run(job),
    ):
        raise AssertionError
    assert "larger `disk`" in caught.value.hint


def test_a_mirror_that_takes_questions_and_does_not_answer(place: Place) -> None:
    asked: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held = []

        def take() -> None:
            try:
                while True:
                    held.append(silent.accept()[0])
                    asked.append(time.monotonic())
            except OSError:
                return

        threading.Thread(target=take, daemon=True).start()
        job = ordered(place, f"{HOST}:{silent.getsockname()[1]}")
        with (
            pytest.raises(InstallationError, match=f"cannot read the package archive http://{HOST}"),
            install.run(job),
        ):
            raise AssertionError
        took = time.monotonic() - asked[0]
        silent.shutdown(socket.SHUT_RDWR)
    assert took < 60


def test_an_installation_of_packages(place: Place, archive: Mirror, tmp_path: Path) -> None:
    with install.run(ordered(place, reached(archive))) as installed:
        with inspection.opened(installed.disk, tmp_path, place.job.hardware.accelerator) as disk:
            system = disk.extract(tmp_path / "tree")
        assert system.read(MARKER).strip() == installed.nonce
        assert system.glob("/boot/vmlinuz-*") and system.glob("/boot/initrd.img-*")
