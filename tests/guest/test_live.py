"""A small live system from its kickstart to five boots: as CD and as USB stick, with BIOS and UEFI.

The kernel is the full one: the cloud kernel has no drivers for USB sticks. Like a station it reads its medium
through dm-verity, and has a guard; the live systems of test_install.py and test_live_redhat.py have neither.
"""

from __future__ import annotations

import asyncio
import gzip
import mmap
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damage import flip
from tests.guest.conftest import SITE, SiteDirectory
from vdibuild import families, host, process, resources, site
from vdibuild.errors import VerificationError
from vdibuild.live import ISO, build, grub, iso, verification
from vdibuild.live import image as live
from vdibuild.live.build import Kind
from vdibuild.live.initramfs import Contents
from vdibuild.live.iso import Content
from vdibuild.machine import Hardware, started
from vdibuild.manifest import LiveManifest
from vdibuild.pipeline import Built
from vdibuild.settings.live_systems import Compression, LiveSystem
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
python3
%end
%post --erroronfail
cd /usr/lib/modules/*/kernel
rm -rf sound net drivers/gpu drivers/media drivers/net drivers/infiniband drivers/staging drivers/iio
depmod "$(basename "$(dirname "$PWD")")"
systemctl mask systemd-random-seed systemd-update-utmp systemd-journal-flush systemd-pstore
%end
"""
REPORT = """\
[Unit]
After=vdibuild-live-up.service station-guard.service station-watchdog.service
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh /usr/share/report
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
"""
# What is really mounted; the kickstart that came with the initramfs; whether guard and watchdog are there.
SCRIPT = """\
grep -E " (/|/run/rootfsbase|/run/initramfs/live) " /proc/mounts
touch /writable && echo "/ can be written to"
cat /run/install/*
until grep "VmLck:.*[1-9]" "/proc/$(systemctl show --property=MainPID --value station-guard)/status" &&
    grep . /sys/class/watchdog/watchdog0/* | grep "state:active"; do
    sleep 2
done 2>/dev/null
grep -H . /sys/class/watchdog/watchdog0/identity /sys/class/watchdog/watchdog0/timeout
echo "end of the report"
cat /usr/share/last >/dev/null && echo "the last file is as it was made"
"""
KIND = Kind(
    title="A tiny system",
    prefix="TINY",
    contents=Contents(
        modules=(
            *("base", "bash", "fs-lib", "pollcdrom", "rootfs-block", "shutdown", "udev-rules"),
            *("vdibuild-check", "vdibuild-kickstart"),
        ),
        drivers=("ahci", "cdrom", "sd_mod", "sr_mod", "usb_storage", "virtio_pci", "xhci_pci"),
        alone=True,
    ),
    verified=True,
    software=("station_guard",),
)
# A file that cannot be compressed, of two of the squashfs's blocks: they are found in it as they are.
LAST = random.Random(5).randbytes(2 << 20)  # noqa: S311 (nothing is secret)
# In the place of a session: it begins again as soon as it ends.
SESSION = """\
[Unit]
DefaultDependencies=no
[Service]
ExecCondition=/usr/bin/test ! -e /run/vdibuild-unreadable
ExecStart=/bin/sh -c 'echo "a session begins"; exec sleep infinity'
ExecStopPost=echo "a session ends"
Restart=always
StandardOutput=tty
TTYPath=/dev/console
"""
KIOSK = (
    "usr/lib/dracut/modules.d/95vdibuild-check",
    "usr/lib/systemd/system/station-guard.service",
    "usr/lib/systemd/system/station-watchdog.service",
    "etc/systemd/system.conf.d/station.conf",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[SiteDirectory]:
    made = SiteDirectory(tmp_path_factory.mktemp("live"), cache)
    # This process runs elsewhere than in the site's directory.
    made.configure(SITE.replace("key/", f"{made.path}/key/"))
    (made.path / "kickstarts").mkdir()
    (made.path / "kickstarts" / "tiny.ks.j2").write_text(KICKSTART)
    made.overlay("etc/systemd/system/report.service", REPORT)
    made.overlay("usr/lib/systemd/system/station.service", SESSION)
    made.overlay("usr/share/report", SCRIPT)
    mine = made.path / "overlays/mine"
    (mine / "usr/share/last").write_bytes(LAST)
    for name in KIOSK:
        source = resources.packaged() / "overlays/kiosk" / name
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, mine / name)
        else:
            shutil.copy(source, mine / name)
    wants = mine / "etc/systemd/system/vdibuild-installer.target.wants"
    wants.mkdir()
    (wants / "report.service").symlink_to("../report.service")
    for name in ("station", "station-guard", "station-watchdog"):
        (wants / f"{name}.service").symlink_to(f"/usr/lib/systemd/system/{name}.service")
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


def report(image: Path, work: Path, firmware: str, last: str = "^the last file is as it was made") -> str:
    """What the system says, until it says `last`, when it was started from a write-protected USB stick."""

    async def boot() -> str:
        hardware = Hardware(firmware, 1024, host.accelerator().name, medium="usb")  # type: ignore[arg-type]
        async with started(image, "raw", hardware, work) as guest:
            end = asyncio.create_task(guest.console.shows(re.compile(last, re.MULTILINE)))
            await asyncio.wait({end}, timeout=SECONDS)
            assert end.done(), "\n".join(guest.console.tail(40))
            return guest.console.text

    return asyncio.run(boot())


def found(image: Path, content: bytes) -> int:
    """Where in a file some bytes are."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        place = whole.find(content)
    assert place >= 0
    return place


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
    # In what is read last.
    flip(stick, found(stick, LAST[-4096:]))
    said = report(stick, tmp_path, "bios", "a session ends")
    # The stick itself, not a partition of it; the squashfs, checked at each read; the overlay in memory.
    assert re.search(r"^/dev/sd[a-z] /run/initramfs/live iso9660 ro,", said, re.MULTILINE), said
    assert re.search(r"^/dev/mapper/vdibuild-system /run/rootfsbase squashfs ro,", said, re.MULTILINE)
    assert re.search(r"^LiveOS_rootfs / overlay rw,", said, re.MULTILINE)
    assert "/ can be written to" in said
    assert "# the kickstart of this test" in said
    assert "watchdog0/identity:" in said
    # With the first block that is not what it was, all ends.
    assert "cat: /usr/share/last: Input/output error" in said
    assert "the last file is as it was made" not in said
    assert "THIS CARD CANNOT BE READ" in said.partition("end of the report")[2]


def test_a_damaged_stick_does_not_start(image: Path, tmp_path: Path) -> None:
    stick = tmp_path / "stick.iso"
    shutil.copyfile(image, stick)
    system = found(stick, b"hsqs")
    with stick.open("rb") as file:
        # squashfs's superblock: a u64 at 32 is the root directory's inode, a block's place among the inodes
        # shifted by 16; one at 64 is where these begin (kernel: fs/squashfs/squashfs_fs.h).
        file.seek(system)
        root, inodes = struct.unpack("<32xQ24xQ", file.read(72))
    flip(stick, system + inodes + (root >> 16) + 8)
    said = report(stick, tmp_path, "bios", "THIS CARD IS DAMAGED")
    assert "a session begins" not in said


def test_its_hashes_are_those_that_the_kernel_is_told(built: Built, image: Path, tmp_path: Path) -> None:
    described = built.version.described()
    assert isinstance(described, LiveManifest)
    told = re.search(r" vdibuild\.verity=(\d+):(\w+):\w+", described.arguments)
    assert told
    system = extract(image, "/LiveOS/squashfs.img", tmp_path)
    argv = [
        "veritysetup",
        "verify",
        str(system),
        str(system),
        told[2],
        f"--hash-offset={int(told[1]) * 4096}",
    ]
    subprocess.run(argv, check=True)


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
