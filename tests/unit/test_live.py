"""The parts of a live system: squashfs, initramfs, boot menu, manifest. The ISO is in test_iso.py."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.conftest import FakeCommand
from tests.damage import flip
from tests.unit.test_store import described as described_disk
from vdibuild import manifest, process, resources
from vdibuild.errors import CommandError, HostError, StoreError, VdibuildError
from vdibuild.families import BootFiles
from vdibuild.live import ISO, grub, initramfs, software, squashfs, verity
from vdibuild.live.initramfs import Contents
from vdibuild.live.squashfs import Compression
from vdibuild.live.verification import LiveVerification
from vdibuild.manifest import Described, LiveManifest
from vdibuild.settings.keys import Keys
from vdibuild.store import Store
from vdibuild.tree import Tree

EPOCH = 1_763_000_000  # 2025-11-13 02:13:20 UTC
KERNEL = "6.12.1-amd64"
MENU = """\
# Written by vdibuild. All that it uses is built into GRUB's core image: nothing has to be loaded to show it.
set default=0
set timeout=3
# Without a serial port the machine's own screen is enough; a graphical terminal would need a VGA device.
if serial --unit=0 --speed=115200; then
  terminal_input console serial
  terminal_output console serial
fi

menuentry 'The station'\\''s system' --id live {
  echo 'Loading the live system ...'
  linux /boot/vmlinuz root=live:CDLABEL=KIOSK_1 rd.live.image 'dyndbg=+p;'
  initrd /boot/initrd.img
}
"""

CLOSED_MENU = """\
# Written by vdibuild. All that it uses is built into GRUB's core image: nothing has to be loaded to show it.
set default=0
set timeout=0
# Nobody is a superuser: entries are started, and neither changed nor left for GRUB's own shell.
set superusers=""
# The key C, pressed before, has the medium checked. To look for one on the serial port would take seconds.
set timeout_style=hidden
# Without a serial port the machine's own screen is enough; a graphical terminal would need a VGA device.
if serial --unit=0 --speed=115200; then
  terminal_output console serial
fi

menuentry Station --id live --unrestricted {
  echo 'Loading the live system ...'
  linux /boot/vmlinuz quiet
  initrd /boot/initrd.img
}

menuentry 'Station, its medium checked' --id check --hotkey c --unrestricted {
  echo 'Loading the live system ...'
  linux /boot/vmlinuz quiet vdibuild.check
  initrd /boot/initrd.img
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree with a shell, a dracut that records its arguments, and something of everything."""
    (tmp_path / "tree").mkdir()
    made = Tree(tmp_path / "tree")
    for name in ("dev", "proc", "sys", "run", "tmp", "var/tmp"):
        made.make_directory(f"/{name}")
    made.write("/usr/bin/busybox", "")
    shutil.copyfile("/bin/busybox", made.path("/usr/bin/busybox"))
    made.path("/usr/bin/busybox").chmod(0o755)
    made.link("/bin", "usr/bin")
    made.link("/usr/bin/sh", "busybox")
    dracut = '#!/bin/sh\n[ "$1" = --version ] && { echo "dracut 106-6"; exit; }\n'
    dracut += 'for word; do echo "$word"; done >/argv\nfor output; do :; done\necho made >"$output"\n'
    made.write("/usr/bin/dracut", dracut, mode=0o755)
    made.write("/usr/bin/zstd", "")
    made.write("/usr/lib/dracut/modules.d/90dmsquash-live/module-setup.sh", "")
    made.write(f"/usr/lib/modules/{KERNEL}/modules.dep", "")
    return made


class TestSquashfs:
    def fill(self, tree: Tree) -> None:
        tree.write("/etc/shadow", "root:!\n", mode=0o640)
        tree.link("/etc/link", "../usr")
        tree.write("/boot/vmlinuz", "kernel")
        tree.write("/tmp/.hidden", "left by the build")  # noqa: S108 (the tree's)
        tree.path("/tmp").chmod(0o1777)  # noqa: S108
        os.setxattr(tree.path("/etc/shadow"), "user.mark", b"kept")

    def extracted(self, image: Path, place: Path) -> Path:
        subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", place, image], check=True)
        return place

    @pytest.mark.parametrize("compression", [Compression(), Compression("xz"), Compression("zstd", 1, 128)])
    def test_what_is_in_it(self, tree: Tree, tmp_path: Path, compression: Compression) -> None:
        self.fill(tree)
        squashfs.create(tree, tmp_path / "squashfs.img", compression)
        said = subprocess.run(
            ["unsquashfs", "-s", tmp_path / "squashfs.img"], check=True, capture_output=True, text=True
        ).stdout
        assert re.search(rf"^Compression {compression.method}$", said, re.MULTILINE)
        assert f"Block size {compression.block << 10}" in said
        place = self.extracted(tmp_path / "squashfs.img", tmp_path / "out")
        assert (place / "etc/shadow").read_text() == "root:!\n"
        assert (place / "etc/shadow").stat().st_mode & 0o7777 == 0o640
        assert os.getxattr(place / "etc/shadow", "user.mark") == b"kept"
        assert (place / "etc/link").readlink() == Path("../usr")
        assert (place / "tmp").stat().st_mode & 0o7777 == 0o1777
        assert [list((place / name).iterdir()) for name in ("boot", "tmp", "dev", "run")] == [[], [], [], []]

    def test_what_is_left_out(self, tree: Tree, tmp_path: Path) -> None:
        for name in ("grub/i386-pc/normal.mod", "grub/.hidden", "grubs"):
            tree.write(f"/usr/lib/{name}", "")
        squashfs.create(tree, tmp_path / "squashfs.img", Compression(), ("/usr/lib/grub", "/usr/lib/shim"))
        place = self.extracted(tmp_path / "squashfs.img", tmp_path / "out")
        assert list((place / "usr/lib/grub").iterdir()) == []
        assert (place / "usr/lib/grubs").exists()
        assert not (place / "usr/lib/shim").exists()

    def test_the_same_tree_gives_the_same_bytes(self, tree: Tree, tmp_path: Path) -> None:
        self.fill(tree)
        with process.variables(SOURCE_DATE_EPOCH=str(EPOCH)):
            squashfs.create(tree, tmp_path / "one", Compression())
            copy = tmp_path / "copy"
            subprocess.run(["cp", "--archive", tree.root, copy], check=True)
            squashfs.create(Tree(copy), tmp_path / "two", Compression())
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        place = self.extracted(tmp_path / "one", tmp_path / "out")
        assert (place / "etc/shadow").stat().st_mtime == EPOCH

    def test_a_level_that_zstd_does_not_have(self, tree: Tree, tmp_path: Path) -> None:
        with pytest.raises(VdibuildError, match="zstd has no level 23"):
            squashfs.create(tree, tmp_path / "o", Compression(level=23))

    @pytest.mark.parametrize(
        ("said", "error"),
        [("Write failed because No space left on device", HostError), ("Bus error", CommandError)],
    )
    def test_a_failure_leaves_nothing(
        self, tree: Tree, tmp_path: Path, fake_command: FakeCommand, said: str, error: type[Exception]
    ) -> None:
        fake_command("mksquashfs", f'echo half >"$2"; echo "{said}"; exit 1')
        with pytest.raises(error):
            squashfs.create(tree, tmp_path / "squashfs.img", Compression())
        assert not (tmp_path / "squashfs.img").exists()


class TestInitramfs:
    def options(self, tree: Tree, contents: Contents) -> list[str]:
        initramfs.make(tree, KERNEL, contents, "/boot/live/initrd.img")
        return tree.read("/argv").splitlines()

    def test_for_a_machine_that_is_known(self, tree: Tree) -> None:
        tree.make_directory("/boot/live")
        contents = Contents(("base", "bash"), ("virtio_blk", "sr_mod"), alone=True, omitted=("crypt",))
        assert self.options(tree, contents) == [
            *("--force", "--no-hostonly", "--no-hostonly-cmdline", "--reproducible", "--kver", KERNEL),
            *("--compress", "zstd -9 -T0"),
            *("--modules", "dmsquash-live base bash"),
            *("--drivers", "squashfs overlay iso9660 loop virtio_blk sr_mod"),
            *("--omit", "crypt"),
            "/boot/live/initrd.img",
        ]
        assert tree.path("/boot/live/initrd.img").stat().st_mode & 0o777 == 0o644

    def test_for_any_machine(self, tree: Tree) -> None:
        tree.make_directory("/boot/live")
        options = self.options(tree, Contents(("pollcdrom",), ("usb_storage",), left_out=("lpfc", "drbd")))
        assert options[options.index("--add") + 1] == "dmsquash-live pollcdrom"
        assert options[options.index("--add-drivers") + 1] == "squashfs overlay iso9660 loop usb_storage"
        assert options[options.index("--filesystems") + 1] == "squashfs overlay iso9660"
        assert options[options.index("--omit-drivers") + 1] == "lpfc drbd"
        assert not {"--modules", "--drivers", "--omit"} & set(options)

    @pytest.mark.parametrize(
        ("missing", "said", "hint"),
        [
            ("/usr/lib/dracut", "no dracut for live systems", "dracut-live"),
            ("/usr/bin/zstd", "cannot compress its initramfs", "add zstd"),
            ("/usr/lib/modules", f"no modules of the kernel {KERNEL}", "%packages"),
        ],
    )
    def test_what_the_tree_lacks_is_said(self, tree: Tree, missing: str, said: str, hint: str) -> None:
        tree.remove(missing)
        with pytest.raises(VdibuildError, match=said) as caught:
            initramfs.make(tree, KERNEL, Contents(), "/boot/initrd.img")
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        ("version", "argument"),
        [
            ("dracut 106-6", "rd.live.overlay.overlayfs=1"),
            ("dracut 059", "rd.live.overlay.overlayfs=1"),
            ("dracut 110", "rd.overlay=1"),
            ("dracut-111-1.fc45", "rd.overlay=1"),
        ],
    )
    def test_the_overlays_argument_is_that_of_the_trees_dracut(
        self, tree: Tree, version: str, argument: str
    ) -> None:
        tree.write("/usr/bin/dracut", f'#!/bin/sh\necho "{version}"\n', mode=0o755)
        assert initramfs.overlay_argument(tree) == argument


class TestSoftware:
    PLACE = "/usr/lib/python3/dist-packages"

    def laid(self, tree: Tree, *modules: str) -> set[str]:
        """The names beside and in the package; what is compiled is noted by a Python that only does that."""
        tree.make_directory(self.PLACE)
        tree.write("/usr/bin/python3", '#!/bin/sh\nfor word; do echo "$word"; done >/compiled\n', mode=0o755)
        software.lay(tree, modules)
        found = [*tree.path(self.PLACE).iterdir(), *tree.path(f"{self.PLACE}/vdibuild").iterdir()]
        return {path.name for path in found}

    def test_a_stations_needs_nothing_but_itself(self, tree: Tree) -> None:
        names = self.laid(tree, "station", "station_screen")
        assert names == {"vdibuild", "__init__.py", "station.py", "station_screen.py"}
        assert tree.read("/compiled").splitlines()[-1] == f"{self.PLACE}/vdibuild"

    def test_what_reads_kickstarts_brings_pykickstart(self, tree: Tree) -> None:
        names = self.laid(tree, "install_agent")
        assert {"pykickstart", "resources", "install_agent.py", "kickstart"} <= names
        assert tree.read("/compiled").splitlines()[-2:] == [
            f"{self.PLACE}/vdibuild",
            f"{self.PLACE}/pykickstart",
        ]

    def test_fedoras_python_has_another_place(self, tree: Tree) -> None:
        tree.write("/usr/bin/python3", "#!/bin/sh\n", mode=0o755)
        tree.make_directory("/usr/lib/python3.14/site-packages")
        software.lay(tree, ("station",))
        assert tree.exists("/usr/lib/python3.14/site-packages/vdibuild/station.py")

    def test_a_system_without_python(self, tree: Tree) -> None:
        with pytest.raises(VdibuildError, match="no Python"):
            software.lay(tree, ("station",))

    def test_without_modules_nothing_is_made(self, tree: Tree) -> None:
        software.lay(tree, ())
        assert not tree.exists(self.PLACE)
        assert software.digest(()) != software.digest(("station",))


class TestKickstartHook:
    """The script of the installer's dracut module, in a root directory like the initramfs's."""

    HOOK = resources.packaged() / (
        "overlays/installer/usr/lib/dracut/modules.d/95vdibuild-kickstart/keep-kickstart.sh"
    )

    def run(self, tree: Tree) -> str:
        tree.write("/hook", self.HOOK.read_text())
        # As dracut does: hooks are read by its shell, not started.
        look = ". /hook; cd /run; for file in install/*; do echo $file; done"
        for applet in ("mkdir", "cp"):
            tree.link(f"/usr/bin/{applet}", "busybox")
        return tree.run(["sh", "-e", "-c", look], capture=True).stdout

    def test_what_was_put_into_the_initramfs_is_kept(self, tree: Tree) -> None:
        for name in ("/own name.ks", "/second.ks.cfg", "/not-one.txt", "/etc/deeper.ks"):
            tree.write(name, "lang C\n")
        tree.make_directory("/directory.ks")
        assert self.run(tree).splitlines() == ["install/own name.ks", "install/second.ks.cfg"]

    def test_without_one_nothing_is_made(self, tree: Tree) -> None:
        assert self.run(tree).splitlines() == ["install/*"]


class Hooks:
    """The scripts of the kiosk's dracut module: what they mount, they find in place."""

    MODULE = resources.packaged() / "overlays/kiosk/usr/lib/dracut/modules.d/95vdibuild-check"
    LABEL = "KIOSK_1"
    FUNCTIONS = (
        'getarg() { for word in $(cat /proc-cmdline); do case $word in "$1"*) '
        'echo "${word#"$1"}"; return 0;; esac; done; return 1; }; '
        'getargbool() { getarg "$2" >/dev/null; }; sleep() { :; }; '
        'mount() { echo mount "$@" >>/mounts; }; umount() { echo umount "$@" >>/mounts; }; '
    )

    def hook(self, tree: Tree, name: str, argument: str, times: int = 1, functions: str = "") -> str:
        """Run one as dracut does, which reads hooks. Returns what is on the screens then."""
        for file, place in ((name, "/hook"), ("damaged.sh", "/lib/vdibuild-damaged.sh")):
            # The tree's own /dev, /proc and /run are not there while something runs in it.
            tree.write(place, re.sub(r"/(dev|proc|run)/", r"/the-\1/", (self.MODULE / file).read_text()))
        tree.make_directory("/the-dev")
        tree.make_directory("/the-proc")
        tree.write("/proc-cmdline", f"root=live:CDLABEL={self.LABEL} {argument}")
        for applet in ("mkdir", "sha256sum", "sed", "cat"):
            tree.link(f"/usr/bin/{applet}", "busybox")
        tree.run(["sh", "-c", self.FUNCTIONS + functions + ". /hook; " * times])
        return tree.read("/the-dev/tty0") if tree.exists("/the-dev/tty0") else ""


class TestCheckHook(Hooks):
    def run(self, tree: Tree, argument: str = "vdibuild.check", times: int = 1) -> str:
        return self.hook(tree, "check-medium.sh", argument, times)

    @pytest.fixture
    def medium(self, tree: Tree) -> str:
        place = "/the-run/vdibuild-check/medium"
        tree.write(f"/the-dev/disk/by-label/{self.LABEL}", "")
        tree.write(f"{place}/LiveOS/squashfs.img", "all programs")
        digest = hashlib.sha256(b"all programs").hexdigest()
        tree.write(f"{place}/LiveOS/SHA256SUMS", f"{digest}  LiveOS/squashfs.img\n")
        return place

    def test_a_medium_as_it_was_made(self, tree: Tree, medium: str) -> None:
        assert "The card is as it was made." in self.run(tree, times=3)
        # Once, however often it is read.
        assert tree.read("/mounts").splitlines() == [
            f"mount -t iso9660 -o ro /the-dev/disk/by-label/{self.LABEL} {medium}",
            f"umount {medium}",
        ]
        assert not tree.exists("/the-proc/sysrq-trigger")

    def test_a_flipped_bit(self, tree: Tree, medium: str) -> None:
        tree.write(f"{medium}/LiveOS/squashfs.img", "all programz")
        screen = self.run(tree)
        assert "THIS CARD IS DAMAGED" in screen
        assert "LiveOS/squashfs.img: FAILED" in screen
        assert tree.read("/the-proc/sysrq-trigger") == "b\n"

    def test_only_when_asked_for_and_there(self, tree: Tree, medium: str) -> None:
        assert self.run(tree, "quiet") == ""
        tree.remove(f"/the-dev/disk/by-label/{self.LABEL}")
        assert self.run(tree) == ""


class TestVerityHooks(Hooks):
    ARGUMENT = "vdibuild.verity=5:abcd:0123"
    PROGRAMS = 'losetup() { echo /dev/loop7; }; dmsetup() { echo "$@" >>/tables; }; '
    SYSTEM = "/the-run/vdibuild-verity/system"

    @pytest.fixture
    def medium(self, tree: Tree) -> None:
        tree.write(f"/the-dev/disk/by-label/{self.LABEL}", "")

    @pytest.mark.usefixtures("medium")
    def test_the_device_is_made_once(self, tree: Tree) -> None:
        tree.make_directory(f"{self.SYSTEM}/usr")
        assert self.hook(tree, "open-verified.sh", self.ARGUMENT, 2, self.PROGRAMS) == ""
        # Five blocks of eight sectors; the hashes begin after them and their superblock.
        table = "0 40 verity 1 /dev/loop7 /dev/loop7 4096 4096 5 6 sha256 abcd 0123"
        assert tree.read("/tables") == f"create --readonly vdibuild-system --table {table}\n"

    @pytest.mark.usefixtures("medium")
    @pytest.mark.parametrize("broken", ["losetup", "dmsetup"])
    def test_without_a_device_there_is_no_start(self, tree: Tree, broken: str) -> None:
        failing = f'{self.PROGRAMS}{broken}() {{ echo "{broken} failed" >&2; return 1; }}; '
        screen = self.hook(tree, "open-verified.sh", self.ARGUMENT, 1, failing)
        assert "THIS CARD IS DAMAGED" in screen
        assert f"{broken} failed" in screen
        assert tree.read("/the-proc/sysrq-trigger") == "b\n"

    @pytest.mark.usefixtures("medium")
    def test_only_when_asked_for(self, tree: Tree) -> None:
        assert self.hook(tree, "open-verified.sh", "quiet", 1, self.PROGRAMS) == ""
        assert self.hook(tree, "begin-verified.sh", "quiet", 1, self.PROGRAMS) == ""
        assert not tree.exists("/tables")

    @pytest.mark.parametrize(("status", "good"), [("V", True), ("V -", True), ("C", False)])
    def test_nothing_begins_when_something_was_wrong(self, tree: Tree, status: str, good: bool) -> None:
        tree.make_directory("/the-run/vdibuild-verity")
        told = f'NEWROOT=/sysroot; dmsetup() {{ echo "0 40 verity {status}"; }}; '
        screen = self.hook(tree, "begin-verified.sh", self.ARGUMENT, 1, told)
        assert ("DAMAGED" not in screen) == good


class TestVerity:
    def image(self, file: Path) -> Path:
        file.write_bytes(b"hsqs" + bytes(range(256)) * 160 + bytes(4092))
        return file

    def verified(self, image: Path, hashed: verity.Verity) -> bool:
        offset = f"--hash-offset={hashed.blocks * 4096}"
        argv = ["veritysetup", "verify", str(image), str(image), hashed.root, offset]
        return subprocess.run(argv, check=False, capture_output=True).returncode == 0

    def test_each_bit_counts(self, tmp_path: Path) -> None:
        image = self.image(tmp_path / "squashfs.img")
        whole = image.read_bytes()
        hashed = verity.append(image, "KIOSK_1")
        assert hashed.blocks == 11
        assert image.read_bytes()[: len(whole)] == whole
        assert self.verified(image, hashed)
        flip(image, 20_000, bit=8)
        assert not self.verified(image, hashed)

    def test_the_same_gives_the_same(self, tmp_path: Path) -> None:
        one, two, other = (self.image(tmp_path / name) for name in ("one", "two", "other"))
        hashed = verity.append(one, "KIOSK_1")
        assert verity.append(two, "KIOSK_1") == hashed
        assert two.read_bytes() == one.read_bytes()
        assert verity.append(other, "KIOSK_2") != hashed

    def test_what_the_kernel_is_told(self) -> None:
        assert verity.Verity(5, "abcd", "0123").arguments == (
            "rd.live.squashimg=../../../../dev/mapper/vdibuild-system",
            "vdibuild.verity=5:abcd:0123",
        )

    def test_half_a_block_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "odd").write_bytes(bytes(5000))
        with pytest.raises(VdibuildError, match="5000 bytes"):
            verity.append(tmp_path / "odd", "KIOSK_1")


class TestIsMedium:
    """The script by which udev knows what the station was started from."""

    SCRIPT = resources.packaged() / "overlays/kiosk/usr/lib/vdibuild/is-medium"

    @pytest.mark.parametrize(
        ("device", "is_medium"),
        [("usb2/2-1", True), ("usb2/2-1/2-1.4", False), ("usb2/2-10", False), ("usb1/1-1", False)],
    )
    def test_the_mediums_device_and_no_other(self, tree: Tree, device: str, is_medium: bool) -> None:
        # The tree's own /run and /sys are not there while something runs in it.
        tree.write("/script", re.sub(r"/(run|sys)/", r"/the-\1/", self.SCRIPT.read_text()))
        disk = "/the-sys/devices/usb2/2-1/2-1:1.0/host0/block/sdb"
        tree.make_directory(disk)
        tree.make_directory(f"/the-sys/devices/{device}")
        tree.write("/devices/sdb", "")
        tree.link("/the-run/initramfs/livedev", "/devices/sdb")
        tree.link("/the-sys/class/block/sdb", disk)
        tree.link("/usr/bin/readlink", "busybox")
        argv = ["sh", "-c", f"sh /script /the-sys/devices/{device}; echo $?"]
        assert tree.run(argv, capture=True).stdout == f"{int(not is_medium)}\n"


class TestGrub:
    def test_menu(self) -> None:
        arguments = "root=live:CDLABEL=KIOSK_1 rd.live.image dyndbg=+p;"
        assert grub.menu("The station's system", arguments, 3, Path()) == MENU

    def test_a_closed_menu(self) -> None:
        assert grub.menu("Station", "quiet", 0, Path(), closed=True) == CLOSED_MENU

    def test_signed_programs_go_with_a_menu_for_each(self, tree: Tree) -> None:
        tree.write("/usr/lib/shim.efi", "shim")
        tree.write("/usr/lib/grub.efi", "signed")
        live = {"EFI/BOOT/BOOTX64.EFI": "/usr/lib/shim.efi", "EFI/BOOT/grubx64.efi": "/usr/lib/grub.efi"}
        grub.prepare(tree, BootFiles("/boot/grub", "", "", {}, live), "KIOSK_1", EPOCH)
        made = grub.programs(tree)
        assert (made.bios, made.hybrid) == (None, None)
        assert made.esp

        def read(name: str) -> str:
            argv = ["mtype", "-i", str(made.esp), f"::/EFI/BOOT/{name}"]
            return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

        assert (read("BOOTX64.EFI"), read("grubx64.efi")) == ("shim", "signed")
        assert read("grub.cfg") == (
            "search.fs_label KIOSK_1 root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
        )

    def test_a_tree_without_grub(self, tree: Tree) -> None:
        with pytest.raises(VdibuildError, match="no GRUB to make an ISO with") as caught:
            grub.prepare(tree, BootFiles("/boot/grub", "", "", {}), "KIOSK_1", EPOCH)
        assert "grub-pc-bin" in caught.value.hint


class TestStore:
    @pytest.fixture
    def there(self, tmp_path: Path) -> Store:
        return Store(tmp_path / "artifacts", Keys(signing=tmp_path / "keys/key"))

    def publish(self, there: Store) -> str:
        with there.staging("installer") as staging:
            (staging.path / ISO).write_bytes(b"iso")
            disk = described_disk(staging)
            common = {name: getattr(disk, name) for name in Described.model_fields}
            described = LiveManifest(
                **common,
                label="INSTALL_1",
                arguments="root=live:CDLABEL=INSTALL_1",
                verification=LiveVerification(accelerator="tcg", up_seconds={"bios": 30.0, "uefi": 40.5}),
            )
            return there.publish(staging, described).name

    def test_a_live_system_is_stored_and_checked_like_a_disk(self, there: Store) -> None:
        name = self.publish(there)
        assert there.promote("installer", name).promoted
        assert there.verify("installer").version.name == name
        described = there.get("installer").described()
        assert isinstance(described, LiveManifest)
        assert described.verification.running_seconds == 40.5
        assert described.created == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def test_whoever_wants_a_disk_is_told(self, there: Store) -> None:
        self.publish(there)
        (version,) = there.versions("installer")
        with pytest.raises(StoreError, match="is a live system: it has no disk"):
            version.manifest()

    def test_damage_is_found(self, there: Store) -> None:
        name = self.publish(there)
        path = there.artifacts / "installer" / name / ISO
        path.chmod(0o644)
        path.write_bytes(b"ISO")
        with pytest.raises(StoreError, match=r"is damaged: image\.iso"):
            there.verify("installer", name)

    def test_a_manifest_of_no_known_kind(self, there: Store, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text('{"kind": "tape"}')
        with pytest.raises(StoreError, match="is not a manifest"):
            manifest.read(tmp_path / "manifest.json")
