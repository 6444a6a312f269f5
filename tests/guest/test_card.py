"""Cards: loop devices, good ones and such whose disk, behind nbdkit, forgets what is written, or fails."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
from rich.console import Console

from tests.conftest import FakeCommand
from tests.guest.conftest import SiteDirectory
from tests.unit.test_station import EPOCH
from tests.waiting import until
from vdibuild import kiosk, progress, station
from vdibuild.errors import InputError, VdibuildError
from vdibuild.live import card, grub, iso
from vdibuild.live.iso import Content
from vdibuild.progress import Step

MIB = 1 << 20
SIZE = 16 * MIB
FIRST = b"# the first settings\nserver_ip=192.0.2.1\nlanguage=de\n"

Faulty = Callable[..., Path]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kiosk of 10 MiB, but for the kiosk in it."""
    place = tmp_path_factory.mktemp("image")
    (place / "squashfs.img").write_bytes(os.urandom(6 * MIB))
    grub.write_fat(place / "esp.img", "ESP", {"EFI/BOOT/BOOTX64.EFI": bytes(1000)}, EPOCH)
    grub.write_fat(place / "settings.img", iso.SETTINGS, {station.CLIENT_CONF: FIRST}, EPOCH)
    files = {"/LiveOS/squashfs.img": place / "squashfs.img"}
    content = Content("KIOSK_1", files, esp=place / "esp.img", settings=place / "settings.img")
    iso.write(content, place / "image.iso", EPOCH)
    return place / "image.iso"


@contextlib.contextmanager
def looped(file: Path) -> Iterator[Path]:
    argv = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def sound(tmp_path: Path) -> Iterator[Path]:
    """A card as it should be; what it holds is the file `card` beside it."""
    with (tmp_path / "card").open("wb") as file:
        file.truncate(SIZE)
    with looped(tmp_path / "card") as device:
        yield device


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    """Make a card with a fault: nbdkit's options, and its plugin with what it is told.

    nbdkit's disk becomes a file by QEMU's FUSE export, and that a loop device, which keeps no cache of it.
    """
    with contextlib.ExitStack() as stack:

        def start(*argv: str) -> None:
            process = subprocess.Popen(argv, cwd=tmp_path)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        def make(*options: str) -> Path:
            start("nbdkit", "--foreground", "--unix", "socket", *options)
            until(lambda: (tmp_path / "socket").exists())
            (tmp_path / "disk").touch()
            start(
                "qemu-storage-daemon",
                *("--blockdev", "nbd,node-name=card,server.type=unix,server.path=socket"),
                *("--export", "fuse,id=card,node-name=card,mountpoint=disk,writable=on"),
            )
            until(lambda: (tmp_path / "disk").stat().st_size == SIZE)
            device = stack.enter_context(looped(tmp_path / "disk"))
            subprocess.run(["losetup", "--direct-io=on", device], check=True)
            # Larger ones than pages are damaged on the way from a loop device to FUSE (Linux 6.18).
            (Path("/sys/block") / device.name / "queue/max_sectors_kb").write_text("4")
            return device

        yield make


def test_a_card_is_written_compared_and_holds_its_settings(image: Path, sound: Path, tmp_path: Path) -> None:
    ca = tmp_path / "certificates"
    ca.write_text("certificates\n")
    span, settings = kiosk.partition_with(image, {"server_ip": "192.0.2.9", "start": "at-once"}, ca)
    card.write(image, [sound], {span: settings})
    # Read by others: cmp, mtools.
    size = image.stat().st_size
    compare = ["cmp", "--bytes", str(span.start), str(image), str(sound)]
    assert subprocess.run(compare, check=False).returncode == 0
    rest = span.start + span.length
    compare = ["cmp", "--ignore-initial", str(rest), "--bytes", str(size - rest), str(image), str(sound)]
    assert subprocess.run(compare, check=False).returncode == 0
    text = ""
    for name in ("::/client.conf", "::/ca.pem"):
        read = ["mtype", "-i", f"{sound}@@{span.start}", name]
        text += subprocess.run(read, check=True, capture_output=True, text=True).stdout
    assert text == "# the first settings\nserver_ip=192.0.2.9\nlanguage=de\nstart=at-once\ncertificates\n"
    card.verify(image, [sound], [span])


def test_one_byte_that_changed_is_found(image: Path, sound: Path, tmp_path: Path) -> None:
    card.write(image, [sound], {})
    with (tmp_path / "card").open("r+b") as file:
        file.seek(5 * MIB)
        byte = file.read(1)
        file.seek(5 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(VdibuildError, match=r"1 of 3 ranges differ, the first at 4 MiB"):
        card.verify(image, [sound], [kiosk.place(image)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["null", f"size={SIZE}"], "does not hold the image: 3 of 3 ranges differ, the first at 0 MiB"),
        (
            ["--filter=truncate", "memory", f"size={6 * MIB}", f"truncate={SIZE}"],
            "failed after .* MiB: ",
        ),
        (
            ["--filter=error", "memory", f"size={SIZE}", "error-pwrite=EIO", "error-pwrite-rate=100%"],
            "failed after .* Input/output error",
        ),
        (
            ["--filter=error", "memory", f"size={SIZE}", "error-pread=EIO", "error-pread-rate=100%"],
            "failed after .* Input/output error",
        ),
    ],
    ids=["drops all writes", "is smaller than it says", "fails to write", "fails to read"],
)
def test_a_card_with_a_fault(image: Path, faulty: Faulty, options: list[str], said: str) -> None:
    with pytest.raises(VdibuildError, match=said) as caught:
        card.write(image, [faulty(*options)], {})
    assert "take another card" in caught.value.hint


def test_a_card_behind_the_same_chain_without_a_fault(image: Path, faulty: Faulty) -> None:
    card.write(image, [faulty("memory", f"size={SIZE}")], {})


def test_a_card_that_ends_too_soon(image: Path, tmp_path: Path) -> None:
    """Its writes are short, then fail."""
    (tmp_path / "card").write_bytes(bytes(5 * MIB))
    with looped(tmp_path / "card") as device:
        found = card.find(device)
        assert "it is too small: 5 MB" in card.refusal(found, image.stat().st_size, internal=True)
        with pytest.raises(VdibuildError, match="No space left on device"):
            card.write(image, [device], {})


class Interrupting(progress.Reporter):
    """Interrupts as soon as a step of that name has done something, and lets it go on when that was heard."""

    def __init__(self, name: str) -> None:
        super().__init__(Console(file=io.StringIO()))
        self._name = name
        self._heard = threading.Event()

    def changed(self, step: Step) -> None:
        """See Reporter."""
        if step.name == self._name:
            os.kill(os.getpid(), signal.SIGINT)
            assert self._heard.wait(20)

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        def hear(_signal: int, _frame: FrameType | None) -> None:
            threading.Timer(0.1, self._heard.set).start()  # until then the error is where it is heard
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, hear)
        try:
            with progress.reporting(self):
                yield
        finally:
            signal.signal(signal.SIGINT, before)


def test_an_interrupted_card_does_not_start(image: Path, sound: Path) -> None:
    with (
        Interrupting(f"write {sound}").hearing(),
        pytest.raises(VdibuildError, match=rf"interrupted: {sound} holds 4 of \d+ MiB, unchecked, and does"),
    ):
        card.write(image, [sound], {})
    assert station.partition(sound, station.PARTITION) is None


def test_a_card_that_was_written_when_it_was_interrupted(image: Path, sound: Path) -> None:
    with (
        Interrupting(f"read {sound} back").hearing(),
        pytest.raises(VdibuildError, match=f"interrupted: {sound} holds the image, unchecked"),
    ):
        card.write(image, [sound], {})
    card.verify(image, [sound], [])


def test_cards_are_written_at_once_and_each_for_itself(image: Path, sound: Path, tmp_path: Path) -> None:
    """The second ends too soon; the first and the third are finished all the same."""
    size = image.stat().st_size
    devices = [sound]
    with contextlib.ExitStack() as stack:
        for name, length in {"short": 5 * MIB, "third": SIZE}.items():
            (tmp_path / name).write_bytes(bytes(length))
            devices.append(stack.enter_context(looped(tmp_path / name)))
        shown = io.StringIO()
        good = f"{devices[0]} is written and read back; {devices[1]} failed after .*; {devices[2]} is written"
        with (
            progress.reporting(Console(file=shown, width=200)),
            progress.step("cards"),
            pytest.raises(VdibuildError, match=good),
        ):
            card.write(image, devices, {})
        # Side by side, and one no deeper than the other.
        assert sorted(re.findall(r"^  ✓ read (\S+) back", shown.getvalue(), re.MULTILINE)) == sorted(
            str(device) for device in (devices[0], devices[2])
        )
        for device in (devices[0], devices[2]):
            subprocess.run(["cmp", "--bytes", str(size), image, device], check=True)
        card.verify(image, [devices[0], devices[2]], [])
        with pytest.raises(
            VdibuildError, match=f"{devices[0]} holds it; {devices[1]} does not hold the image"
        ):
            card.verify(image, devices[:2], [])


def test_what_is_refused(image: Path, sound: Path, tmp_path: Path) -> None:
    found = card.find(sound)
    assert (found.size, found.removable, found.used) == (SIZE, False, "")
    assert "cannot be taken out" in card.refusal(found, 1, internal=False)
    assert card.refusal(found, 1, internal=True) == ""
    assert "push its switch" in card.refusal(replace(found, protected=True), 1, internal=True)
    assert found not in card.candidates(1)
    subprocess.run(["mke2fs", "-q", sound], check=True)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", sound, tmp_path / "mounted"], check=True)
    try:
        said = card.refusal(card.find(sound), 1, internal=True)
        assert said == f"it is in use: {sound} is mounted at {tmp_path}/mounted"
        # Nor by accident, between the look and the writing.
        with pytest.raises(VdibuildError, match="Device or resource busy"):
            card.write(image, [sound], {})
    finally:
        subprocess.run(["umount", sound], check=True)
    with pytest.raises(VdibuildError, match="is no block device"):
        card.find(image)
    with pytest.raises(VdibuildError, match="No such file"):
        card.find(tmp_path / "nothing")


def test_lsblks_cards(fake_command: FakeCommand) -> None:
    """What a USB reader, a reader on PCI, a disk with a mounted partition and one with LVM look like."""
    common = '"serial": "S1", "ro": false, "mountpoints": [null]'
    fake_command(
        "lsblk",
        f"""cat <<'EOF'
{{"blockdevices": [
 {{"path": "/dev/sdb", "type": "disk", "model": "Multi-Card ", "size": 8000000000, "rm": true,
   "hotplug": true, "tran": "usb", {common}}},
 {{"path": "/dev/mmcblk0", "type": "disk", "model": null, "size": 16000000000, "rm": false,
   "hotplug": true, "tran": "mmc", {common}}},
 {{"path": "/dev/sdc", "type": "disk", "model": "Reader", "size": 0, "rm": true, "hotplug": true,
   "tran": "usb", {common}}},
 {{"path": "/dev/sdd", "type": "disk", "model": "Stick", "size": 8000000000, "rm": true, "hotplug": true,
   "tran": "usb", {common}, "children": [
    {{"path": "/dev/sdd1", "type": "part", "mountpoints": ["/media/stick"]}}]}},
 {{"path": "/dev/sde", "type": "disk", "model": "Backup", "size": 8000000000, "rm": true, "hotplug": true,
   "tran": "usb", {common}, "children": [
    {{"path": "/dev/mapper/a-b", "type": "lvm", "mountpoints": [null]}}]}},
 {{"path": "/dev/sda", "type": "disk", "model": "Disk", "size": 8000000000, "rm": false, "hotplug": false,
   "tran": "sata", {common}}}]}}
EOF""",
    )
    assert [str(one) for one in card.candidates(400 * MIB)] == [
        "/dev/sdb: Multi-Card, 8.0 GB, serial S1",
        "/dev/mmcblk0: no model, 16.0 GB, serial S1",
    ]
    assert [one.used for one in card._cards([]) if one.used] == [
        "/dev/sdd1 is mounted at /media/stick",
        "/dev/mapper/a-b (lvm) is active on it",
    ]


class TestCommands:
    """As a technician runs them."""

    def test_a_card_is_asked_for_by_name(self, site: SiteDirectory, image: Path, sound: Path) -> None:
        command = [
            "write-card",
            str(sound),
            "--image",
            str(image),
            "--set",
            "server_ip=192.0.2.5",
            "--internal",
        ]
        before = sound.read_bytes()
        status, said = run(site, command, "no\n")
        assert status != 0
        assert "nothing was written" in said
        assert sound.read_bytes() == before
        status, said = run(site, command, f"{sound.name}\n")
        assert status == 0, said
        assert re.search(r"no model, 0\.0 GB, serial unknown\nAll that is on it will be lost", said), said
        assert "push its switch to LOCK" in said
        assert "server_ip=192.0.2.5\n" in kiosk.settings(sound)
        status, said = run(site, ["write-card", str(sound), "--image", str(image), "--verify-only"])
        assert status == 0, said
        assert "server_ip=192.0.2.5\n" in said
        status, said = run(site, ["write-card", str(sound), "--verify-only"])
        assert status == 1
        assert "no version of kiosk here has the label KIOSK_1" in said

    def test_two_cards_are_asked_for_once(
        self, site: SiteDirectory, image: Path, sound: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "second").write_bytes(bytes(SIZE))
        with looped(tmp_path / "second") as second:
            command = ["write-card", f"{sound},{second}", "--image", str(image), "--internal"]
            status, said = run(site, command, f"{second.name} {sound.name}\n")
            assert status == 0, said
            assert "All that is on them will be lost" in said
            assert f"{sound}, {second} are written and read back: take them out" in said
            status, said = run(
                site, ["write-card", f"{sound},{second}", "--image", str(image), "--verify-only"]
            )
            assert status == 0, said
            assert said.count("its settings are:") == 2

    def test_settings_are_shown_and_changed(self, site: SiteDirectory, image: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.iso"
        copy.write_bytes(image.read_bytes())
        status, said = run(site, ["kiosk.configure", str(copy)])
        assert (status, said.encode()) == (0, FIRST)
        change = ["--set", "server_ip=2001:db8::1", "--set", "language="]
        status, said = run(site, ["kiosk.configure", str(copy), *change])
        assert status == 0
        assert said == "# the first settings\nserver_ip=2001:db8::1\nlanguage=\n"
        status, said = run(site, ["kiosk.configure", str(copy), "--set", "vdi_port=1"])
        assert status == 1
        assert "--set vdi_port=1: vdi_port: unknown; is" in said
        status, said = run(site, ["kiosk.configure", str(copy), "--set", "sound"])
        assert "give a value: --set sound=VALUE" in said


def run(site: SiteDirectory, arguments: list[str], answers: str = "") -> tuple[int, str]:
    process = site.start(*arguments, through=["sh", "-c", 'printf "%s" "$0" | "$@"', answers])
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


class TestConfigure:
    def test_only_the_partition_changes(self, image: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.iso"
        copy.write_bytes(image.read_bytes())
        kiosk.configure(copy, {"language": "en"})
        assert kiosk.settings(copy) == FIRST.decode().replace("=de", "=en")
        place = kiosk.place(image)
        before, after = image.read_bytes(), copy.read_bytes()
        assert before[: place.start] == after[: place.start]
        assert before[place.start + place.length :] == after[place.start + place.length :]

    def test_what_was_wrong_before_is_said_with_its_line(self, image: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"image\.iso: client\.conf:2: serverip: unknown"):
            kiosk.changed("\nserverip=192.0.2.1\n", {"language": "en"}, "image.iso")

    def test_media_without_settings(self, tmp_path: Path) -> None:
        (tmp_path / "disk").write_bytes(bytes(MIB))
        with pytest.raises(VdibuildError, match="has no settings"):
            kiosk.configure(tmp_path / "disk", {"language": "en"})
        with pytest.raises(VdibuildError, match="cannot be read: No such file"):
            kiosk.settings(tmp_path / "nothing")
