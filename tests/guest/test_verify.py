"""Verification of images that are broken in one way each: what it says, how soon, and what it leaves.

The image is the one that the golden pipeline's tests build, so what is broken is a system that boots.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.guest.conftest import Built
from tests.waiting import until
from vdibuild import host, verify
from vdibuild.disk.layout import FileSystem
from vdibuild.errors import VerificationError
from vdibuild.machine import Hardware
from vdibuild.manifest import Manifest
from vdibuild.store import DISK
from vdibuild.verify import Verification

SECONDS = 400
BAKED_ID = "0123456789abcdef0123456789abcdef"
BROKEN_UNIT = """\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo the disk is on fire; exit 3'
[Install]
WantedBy=multi-user.target
"""


@dataclass
class Image:
    """A raw image and where its root file system, an ext4, begins (bytes)."""

    path: Path
    root: int

    def write(self, inside: str, text: str) -> None:
        """Put a file into the image, replacing what is there."""
        source = self.path.with_suffix(".file")
        source.write_text(text)
        self.debugfs(f"rm {inside}")
        self.debugfs(f"write {source} {inside}")
        assert self.read(inside) == text

    def read(self, inside: str) -> str:
        return self.debugfs(f"cat {inside}")

    def debugfs(self, request: str) -> str:
        """Run a request of debugfs, which reports errors on standard error only."""
        argv = ["debugfs", "-w", "-R", request, f"{self.path}?offset={self.root}"]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def version(built: Built) -> Path:
    """The version that all golden tests share."""
    return built.site.path / "artifacts" / "small" / built.site.versions()[-1]


@pytest.fixture(scope="module")
def manifest(version: Path) -> Manifest:
    return Manifest.model_validate_json((version / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def good(version: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image as a raw file, to break copies of."""
    raw = tmp_path_factory.mktemp("good") / "good.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", version / DISK, raw], check=True)
    for partition in manifest.layout.partitions:
        if isinstance(partition.holds, FileSystem) and partition.holds.mountpoint == "/":
            return Image(raw, partition.start << 20)
    raise AssertionError("the image has no plain root partition")


@pytest.fixture
def image(good: Image, tmp_path: Path) -> Iterator[Image]:
    copy = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", good.path, copy], check=True)
    yield Image(copy, good.root)
    copy.unlink()


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return Hardware("bios", 768, host.accelerator().name)


def check(image: Image, hardware: Hardware, seconds: float = SECONDS) -> Verification:
    """Verify an image; nothing may be left whatever comes of it."""
    work, output = image.path.parent / "work", image.path.parent / "output"
    work.mkdir()
    output.mkdir()
    try:
        return verify.verify(image.path, "raw", hardware, seconds=seconds, output=output, work=work)
    finally:
        assert list(work.iterdir()) == []
        assert running(image.path.parent) == []


def running(directory: Path) -> list[str]:
    """Commands whose arguments name something in that directory."""
    mark = f"{directory}/".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = entry.read_bytes()
        except OSError:
            continue
        if b"overlay.qcow2" in argv and mark in argv:
            found.append(argv.replace(b"\0", b" ").decode())
    return found


def test_a_good_image_is_described_as_it_is(version: Path, manifest: Manifest) -> None:
    seen = manifest.verification
    assert seen.accelerator == host.accelerator().name
    assert (seen.os_id, seen.os_version) == ("debian", "13")
    assert seen.kernel == manifest.kernel.version
    assert seen.failed_units == ()
    assert 0 < seen.agent_seconds <= seen.running_seconds
    assert {"kernel", "userspace"} <= set(seen.startup)
    assert "/etc/machine-id" in seen.differing
    assert [path for path in seen.differing if re.fullmatch(r"/etc/ssh/ssh_host_\w+_key\.pub", path)]
    assert seen.session == ""
    assert (version / "boot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_copies_that_share_an_identity_are_refused(image: Image, hardware: Hardware) -> None:
    key = image.path.with_name("key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    image.write("/etc/ssh/ssh_host_ed25519_key", key.read_text())
    image.debugfs("set_inode_field /etc/ssh/ssh_host_ed25519_key mode 0100600")
    image.write("/etc/ssh/ssh_host_ed25519_key.pub", key.with_suffix(".pub").read_text())
    image.write("/etc/machine-id", f"{BAKED_ID}\n")
    with pytest.raises(VerificationError, match="two copies of the image have the same") as caught:
        check(image, hardware)
    assert caught.value.message.endswith("/etc/machine-id, /etc/ssh/ssh_host_ed25519_key.pub")


def test_a_failed_unit_is_named_with_its_last_words(image: Image, hardware: Hardware) -> None:
    wants = "/etc/systemd/system/multi-user.target.wants"
    image.write("/etc/systemd/system/broken.service", BROKEN_UNIT)
    image.debugfs(f"mkdir {wants}")
    image.debugfs(f"symlink {wants}/broken.service /etc/systemd/system/broken.service")
    with pytest.raises(
        VerificationError, match=r"units failed on the \w+ machine: broken\.service\n"
    ) as caught:
        check(image, hardware)
    assert "broken.service: the disk is on fire" in caught.value.hint
    assert (image.path.parent / "output" / "boot.png").exists()


def test_a_panic_ends_it_at_once(image: Image, hardware: Hardware) -> None:
    menu = image.read("/boot/grub/grub.cfg")
    image.write("/boot/grub/grub.cfg", re.sub(r"(?m)^\s*initrd .*$", "", menu))
    with pytest.raises(VerificationError, match="the kernel panicked: Kernel panic - not syncing") as caught:
        check(image, hardware)
    assert any("Unable to mount root fs" in line for line in caught.value.tail)
    assert "boot.png" in caught.value.hint


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("menu", "GRUB found no boot menu"),
        ("sector", "the firmware found nothing to boot"),
        ("reboot", r"it ended by itself \(guest-reset\)"),
    ],
)
def test_what_does_not_come_to_a_kernel_ends_it_at_once(
    image: Image, hardware: Hardware, break_it: str, message: str
) -> None:
    if break_it == "menu":
        image.debugfs("rm /boot/grub/grub.cfg")
    elif break_it == "reboot":
        image.write("/boot/grub/grub.cfg", "reboot\n")
    else:
        with image.path.open("r+b") as disk:
            disk.write(bytes(440))
            disk.seek(510)
            disk.write(bytes(2))
    with pytest.raises(VerificationError, match=message):
        check(image, hardware)


def test_a_disk_without_an_efi_partition_does_not_boot_with_uefi(image: Image, hardware: Hardware) -> None:
    with pytest.raises(VerificationError, match="the firmware found nothing to boot: UEFI Interactive Shell"):
        check(image, replace(hardware, firmware="uefi"))


def test_emergency_mode_ends_it_at_once(image: Image, hardware: Hardware) -> None:
    lost = "LABEL=lost /srv ext4 defaults,x-systemd.device-timeout=1s 0 2\n"
    image.write("/etc/fstab", image.read("/etc/fstab") + lost)
    with pytest.raises(VerificationError, match="it ended in emergency mode"):
        check(image, hardware)


def test_a_guest_without_an_agent_runs_into_the_deadline(image: Image, hardware: Hardware) -> None:
    image.debugfs("rm /usr/sbin/qemu-ga")
    with pytest.raises(VerificationError, match="its guest agent did not answer within 15 s") as caught:
        check(image, hardware, seconds=15)
    assert "qemu-guest-agent" in caught.value.hint
    assert caught.value.tail


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_verification_that_is_stopped_leaves_no_machine(
    good: Image, hardware: Hardware, tmp_path: Path, number: signal.Signals
) -> None:
    program = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from vdibuild import verify\n"
        "from vdibuild.tasks import command\n"
        "from vdibuild.machine import Hardware\n"
        "signal.signal(signal.SIGTERM, command.terminated)\n"
        "disk, work, accelerator = sys.argv[1:]\n"
        "verify.verify(Path(disk), 'raw', Hardware('bios', 768, accelerator), seconds=300,\n"
        "              output=Path(work), work=Path(work))\n"
    )
    argv = [sys.executable, "-c", program, str(good.path), str(tmp_path), hardware.accelerator]
    verifying = subprocess.Popen(argv, start_new_session=True, stderr=subprocess.PIPE)
    try:
        until(lambda: len(running(tmp_path)) == 2)
        os.killpg(verifying.pid, number)
        _, said = verifying.communicate(timeout=60)
    finally:
        verifying.kill()
        verifying.wait()
    assert verifying.returncode != 0
    until(lambda: running(tmp_path) == [])
    if number != signal.SIGKILL:
        # The directory of a run that was killed is swept by the next one.
        assert list(tmp_path.iterdir()) == []
        assert said.splitlines()[-1].startswith(b"KeyboardInterrupt")
