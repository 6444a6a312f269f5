"""A small live system from its kickstart to four boots: as CD and as USB stick, with BIOS and UEFI.

The kernel is the full one: the cloud kernel has no drivers for USB sticks.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import SITE, SiteDirectory
from vdibuild import families, host, process, site
from vdibuild.errors import VerificationError
from vdibuild.live import ISO, build, grub, iso, verification
from vdibuild.live import image as live
from vdibuild.live.build import Built, Kind
from vdibuild.live.initramfs import Contents
from vdibuild.live.iso import Content
from vdibuild.machine import Hardware, started
from vdibuild.manifest import LiveManifest
from vdibuild.site import Compression, LiveSystem
from vdibuild.store import Store
from vdibuild.tree import Tree

SECONDS = 300
KICKSTART = """\
{% include "common/repositories-debian.ks.j2" %}
{% include "common/system.ks.j2" %}
bootloader --timeout=0 --append="console=tty0 console=ttyS0,115200 lsm=yama"
poweroff
%packages --nocore --exclude-weakdeps --excludedocs --inst-langs=C
linux-image-amd64
systemd
systemd-sysv
udev
kmod
passwd
dracut
dracut-live
zstd
grub-common
grub-pc-bin
grub-efi-amd64-bin
%end
%post --erroronfail
cd /usr/lib/modules/*/kernel
rm -rf sound net drivers/gpu drivers/media drivers/net drivers/infiniband drivers/staging drivers/iio
depmod "$(basename "$(dirname "$PWD")")"
systemctl mask systemd-random-seed systemd-update-utmp systemd-journal-flush systemd-pstore
%end
"""
# What is really mounted, and the kickstart that came with the initramfs.
REPORT = """\
[Unit]
After=vdibuild-live-up.service
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'grep -E " (/|/run/rootfsbase|/run/initramfs/live) " /proc/mounts; \
touch /writable && echo "/ can be written to"; cat /run/install/*; echo "end of the report"'
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
"""
KIND = Kind(
    title="A tiny system",
    prefix="TINY",
    contents=Contents(
        modules=(
            *("base", "bash", "fs-lib", "pollcdrom", "rootfs-block", "shutdown", "udev-rules"),
            "vdibuild-kickstart",
        ),
        drivers=("ahci", "cdrom", "sd_mod", "sr_mod", "usb_storage", "virtio_pci", "xhci_pci"),
        alone=True,
    ),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[SiteDirectory]:
    made = SiteDirectory(tmp_path_factory.mktemp("live"), cache)
    # This process runs elsewhere than in the site's directory.
    made.configure(SITE.replace("key/", f"{made.path}/key/"))
    (made.path / "kickstarts").mkdir()
    (made.path / "kickstarts" / "tiny.ks.j2").write_text(KICKSTART)
    made.overlay("etc/systemd/system/report.service", REPORT)
    wants = made.path / "overlays/mine/etc/systemd/system/vdibuild-installer.target.wants"
    wants.mkdir()
    (wants / "report.service").symlink_to("../report.service")
    yield made
    made.close()


@pytest.fixture(scope="module")
def loaded(directory: SiteDirectory) -> site.Site:
    return site.load(directory.path / "vdibuild.yaml")


@pytest.fixture(scope="module")
def system() -> LiveSystem:
    return LiveSystem(
        family="debian",
        release="trixie",
        kickstart="tiny.ks.j2",
        overlays=["installer", "mine"],
        compression=Compression(level=3),
        boot_seconds=SECONDS,
    )


@pytest.fixture(scope="module")
def built(loaded: site.Site, system: LiveSystem) -> Built:
    """The live system, built, which means that it has come up from a CD with either firmware."""
    return build.build(loaded, "tiny", system, KIND)


@pytest.fixture(scope="module")
def image(built: Built) -> Path:
    return built.version.path / ISO


def report(image: Path, work: Path, firmware: str) -> str:
    """What the system says when it was started from a USB stick that is write-protected."""

    async def boot() -> str:
        hardware = Hardware(firmware, 1024, host.accelerator().name, medium="usb")  # type: ignore[arg-type]
        async with started(image, "raw", hardware, work) as guest:
            end = asyncio.create_task(guest.console.shows(re.compile(r"^end of the report", re.MULTILINE)))
            await asyncio.wait({end}, timeout=SECONDS)
            assert end.done(), "\n".join(guest.console.tail(40))
            return guest.console.text

    return asyncio.run(boot())


def test_it_is_a_version_like_any_other(
    built: Built, loaded: site.Site, system: LiveSystem, directory: SiteDirectory
) -> None:
    assert {path.name for path in built.version.path.iterdir()} == {
        *("image.iso", "vmlinuz", "initrd.img", "manifest.json", "sbom.spdx.json", "boot.png", "build.log"),
        *("SHA256SUMS", "SHA256SUMS.sig"),
    }
    described = built.version.described()
    assert isinstance(described, LiveManifest)
    assert set(described.verification.up_seconds) == {"bios", "uefi"}
    assert f"root=live:CDLABEL={described.label} " in described.arguments
    assert described.kernel.version
    assert Store(loaded.artifacts_directory, loaded.keys).verify("tiny").version.name == built.version.name
    # Nothing changed: nothing is done, and nothing is published.
    again = build.build(loaded, "tiny", system, KIND)
    assert again.unchanged
    assert again.version.name == built.version.name
    status, listed = directory.run("images")
    assert status == 0, listed
    assert re.search(rf"tiny +{re.escape(built.version.name)} +current .*live system", listed)
    assert directory.wait_until_clean() == []


def test_two_isos_of_one_tree_are_the_same_bytes(
    built: Built, loaded: site.Site, system: LiveSystem, image: Path, tmp_path: Path
) -> None:
    planned = build.plan(loaded, "tiny", system, KIND)
    tree = Tree(loaded.cache_directory / "steps" / planned.system.key / "tree")
    with process.variables(SOURCE_DATE_EPOCH=str(planned.epoch)):
        live.create(tree, families.get("debian"), planned.settings, planned.epoch, tmp_path, loaded.directory)
    assert subprocess.run(["cmp", image, tmp_path / ISO], check=False).returncode == 0


def test_from_a_usb_stick_with_bios_and_a_kickstart_in_the_initramfs(
    built: Built, image: Path, tmp_path: Path
) -> None:
    described = built.version.described()
    assert isinstance(described, LiveManifest)
    stick = with_kickstart(image, described.label, described.source_date_epoch, tmp_path)
    said = report(stick, tmp_path, "bios")
    # The stick itself, not a partition of it; the squashfs, and the overlay in memory.
    assert re.search(r"^/dev/sd[a-z] /run/initramfs/live iso9660 ro,", said, re.MULTILINE), said
    assert re.search(r"^/dev/loop\d /run/rootfsbase squashfs ro,", said, re.MULTILINE)
    assert re.search(r"^LiveOS_rootfs / overlay rw,", said, re.MULTILINE)
    assert "/ can be written to" in said
    assert "# the kickstart of this test" in said


def test_from_a_usb_stick_with_uefi_by_its_partition_table(image: Path, tmp_path: Path) -> None:
    stick = tmp_path / "stick.iso"
    shutil.copyfile(image, stick)
    with stick.open("r+b") as file:
        # OVMF starts a disk through El Torito, where there is one, and would hide a bad partition table.
        # The boot record is the second volume descriptor (El Torito 1.0, figure 7).
        file.seek(17 * 2048 + 7)
        assert file.read(23) == b"EL TORITO SPECIFICATION"
        file.seek(17 * 2048 + 7)
        file.write(bytes(23))
    said = report(stick, tmp_path, "uefi")
    assert re.search(r"^/dev/sd[a-z] /run/initramfs/live iso9660 ro,", said, re.MULTILINE), said


def test_an_iso_that_does_not_boot_is_said_at_once(image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.iso"
    files = {"/boot/grub/grub.cfg": tmp_path / "menu"}
    files["/boot/grub/grub.cfg"].write_text("linux /boot/nothing\n")
    boot = extract(image, "/boot/grub/eltorito.img", tmp_path)
    iso.write(Content("BROKEN", files=files, bios=boot), broken, 1_763_000_000)
    with pytest.raises(
        VerificationError, match="did not come up with BIOS: GRUB found no boot menu"
    ) as caught:
        hardware = Hardware("bios", 256, host.accelerator().name, medium="cdrom")
        up = re.compile(verification.UP)
        asyncio.run(verification.boot(broken, hardware, up, SECONDS, tmp_path / "boot.png", tmp_path))
    assert caught.value.tail


def with_kickstart(image: Path, label: str, epoch: int, work: Path) -> Path:
    """The same ISO with a kickstart in its initramfs, put there as virt-install --initrd-inject does."""
    (work / "test.ks").write_text("# the kickstart of this test\n")
    archive = subprocess.run(
        ["cpio", "-o", "--format=newc", "--quiet"],
        input=b"test.ks\n",
        cwd=work,
        check=True,
        capture_output=True,
    ).stdout
    names = (
        "/.disk/info",
        "/boot/grub/grub.cfg",
        "/boot/vmlinuz",
        "/boot/initrd.img",
        "/LiveOS/squashfs.img",
    )
    files = {name: extract(image, name, work) for name in names}
    with files["/boot/initrd.img"].open("ab") as file:
        # Compressed, as virt-install does: the kernel takes a plain archive at multiples of four bytes only.
        file.write(gzip.compress(archive))
    stick = work / "stick.iso"
    hybrid = Path("/usr/lib/grub/i386-pc/boot_hybrid.img")
    boot, esp = extract(image, "/boot/grub/eltorito.img", work), extract(image, "/boot/grub/efi.img", work)
    grub.write_fat(work / "settings.img", iso.SETTINGS, {"client.conf": b"\n"}, epoch)
    content = Content(label, files, boot, hybrid, esp, work / "settings.img")
    iso.write(content, stick, epoch)
    return stick


def extract(image: Path, name: str, work: Path) -> Path:
    target = work / name.replace("/", "_")
    with target.open("wb") as file:
        subprocess.run(["isoinfo", "-R", "-i", image, "-x", name], check=True, stdout=file)
    return target
