"""Fedora and EL without packages: mirrors, repositories, settings, the boot menu, dnf's complaints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.conftest import FakeCommand
from vdibuild.disk import layout
from vdibuild.errors import HostError, InputError, VdibuildError
from vdibuild.families import Distribution, Kernel, dnf, redhat
from vdibuild.recipe import Bootloader, NetworkInterface, Packages, Recipe, Repository, Storage, Volume
from vdibuild.settings.images import Image
from vdibuild.tree import Tree

KS = Path("fedora.ks.j2")


def image(**settings: object) -> Image:
    return Image.model_validate(
        {"family": "redhat", "release": "fedora43", "kickstart": "fedora.ks.j2"} | settings
    )


def recipe(text: str = "", **settings: Any) -> Recipe:
    return Recipe(text=text, source=KS, **settings)


def host(etc: Path, os_release: str, repositories: str) -> Path:
    (etc / "yum.repos.d").mkdir(parents=True)
    (etc / "dnf" / "vars").mkdir(parents=True)
    (etc / "dnf" / "vars" / "stream").write_text("10-stream\n")
    (etc / "os-release").write_text(os_release)
    (etc / "yum.repos.d" / "host.repo").write_text(repositories)
    return etc


class TestMirrors:
    def test_the_images_own(self) -> None:
        found = dnf.mirrors(image(mirror="https://mirror.example.org/fedora/linux/"))
        assert found["main"].startswith("https://mirror.example.org/fedora/linux/releases/43/Everything/")
        assert found["updates"].startswith("https://mirror.example.org/fedora/linux/updates/43/Everything/")
        assert (found["main_kind"], found["updates_kind"]) == ("url", "baseurl")

    def test_el_has_its_own_places(self) -> None:
        found = dnf.mirrors(image(release="el10", mirror="https://mirror.example.org/almalinux/10"))
        assert found["main"].startswith("https://mirror.example.org/almalinux/10/BaseOS/")
        assert found["appstream"].startswith("https://mirror.example.org/almalinux/10/AppStream/")

    def test_this_hosts(self, tmp_path: Path) -> None:
        etc = host(
            tmp_path,
            'ID="centos"\nID_LIKE="rhel fedora"\nVERSION_ID="10"\n',
            "[baseos]\nmetalink=https://example.org/metalink?repo=baseos-$stream&arch=$basearch\n"
            "[appstream]\nbaseurl=https://example.org/$releasever/AppStream/\nenabled=1\n"
            "[extras]\nbaseurl=https://example.org/extras/\nenabled=0\n",
        )
        assert dnf.mirrors(image(release="el10"), etc) == {
            "main": "https://example.org/metalink?repo=baseos-10-stream&arch=$basearch",
            "main_kind": "metalink",
            "appstream": "https://example.org/$releasever/AppStream/",
            "appstream_kind": "baseurl",
        }

    def test_a_template_that_asks_for_what_nobody_knows_says_what_to_set(self, tmp_path: Path) -> None:
        etc = host(tmp_path, "ID=fedora\nVERSION_ID=42\n", "[fedora]\nbaseurl=https://example.org/\n")
        template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(  # noqa: S701
            "url --{{ mirror.main_kind }}={{ mirror.main }}"
        )
        with pytest.raises(HostError, match=r"mirror\.main_kind") as caught:
            template.render(mirror=dnf.mirrors(image(), etc))
        assert "`mirror` in the site file" in caught.value.hint

    @pytest.mark.parametrize("release", ["trixie", "el8", "fedora35", "43"])
    def test_a_release_that_is_none(self, release: str) -> None:
        with pytest.raises(VdibuildError, match=release):
            dnf.mirrors(image(release=release, mirror="https://example.org"))

    def test_the_database_is_where_the_release_has_it(self) -> None:
        assert dnf.release(image(release="el9")).database == "/var/lib/rpm"
        assert dnf.release(image(release="el10")).database == "/usr/lib/sysimage/rpm"


REPOMD = """<repomd xmlns="http://linux.duke.edu/metadata/repo"><revision>7</revision>
<data type="primary"><timestamp>1700000000</timestamp></data>
<data type="group"><timestamp>1700000009</timestamp></data></repomd>"""

METALINK = """<metalink xmlns="http://www.metalinker.org/" xmlns:mm0="http://fedorahosted.org/mirrormanager">
<files><file name="repomd.xml"><mm0:timestamp>1700000042</mm0:timestamp>
<verification><hash type="md5">aa</hash><hash type="sha256">bb</hash></verification>
</file></files></metalink>"""


class TestRepositories:
    @pytest.fixture
    def served(self, tmp_path: Path) -> Path:
        repodata = tmp_path / "fedora43" / "repodata"
        repodata.mkdir(parents=True)
        (repodata / "repomd.xml").write_text(REPOMD)
        (tmp_path / "list").write_text(f"# mirrors\nfile:///nowhere\n{tmp_path.as_uri()}/fedora43/\n")
        (tmp_path / "metalink").write_text(METALINK)
        return tmp_path

    def test_states_of_all_kinds(self, served: Path) -> None:
        base = served.as_uri()
        asked = recipe(
            url=Repository("", f"{base}/fedora$releasever", 1),
            repositories=(
                Repository("updates", f"{base}/list", 2, mirrorlist=True),
                Repository("more", f"{base}/metalink", 3, metalink=True),
            ),
        )
        first, second, third = dnf.states(asked, image())
        digest = hashlib.sha256(REPOMD.encode()).hexdigest()
        assert (first.url, first.digest, first.date) == (f"{base}/fedora43", digest, 1700000009)
        assert (second.url, second.digest) == (f"{base}/list", digest)
        assert (third.digest, third.date) == ("bb", 1700000042)

    def test_an_unreachable_one_is_named_without_its_password(self) -> None:
        asked = recipe(url=Repository("", "http://me:secret@127.0.0.1:9/os", 1))
        with pytest.raises(HostError, match=r"http://127\.0\.0\.1:9/os/repodata") as caught:
            dnf.states(asked, image())
        assert "secret" not in str(caught.value)

    def test_what_is_no_repository(self, served: Path) -> None:
        (served / "fedora43" / "repodata" / "repomd.xml").write_text("<html><p></html>")
        with pytest.raises(HostError, match="damaged index"):
            dnf.states(recipe(url=Repository("", f"{served.as_uri()}/fedora43", 1)), image())

    def test_a_name_that_is_taken(self) -> None:
        twice = (Repository("extra", "file:///a", 4), Repository("extra", "file:///b", 5))
        with pytest.raises(InputError, match=r"fedora\.ks\.j2:5: .*'extra'"):
            dnf.repositories(recipe(url=Repository("", "file:///", 1), repositories=twice), image())

    def test_without_keys_nothing_is_installed(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="no keys") as caught:
            dnf.keyrings(image(), tmp_path, tmp_path)
        assert "`keyring`" in caught.value.hint

    def test_this_hosts_keys(self, tmp_path: Path) -> None:
        shared = tmp_path / "fedora"
        shared.mkdir()
        (shared / "RPM-GPG-KEY-fedora-43-primary").touch()
        assert dnf.keyrings(image(), tmp_path / "etc", tmp_path) == [shared / "RPM-GPG-KEY-fedora-43-primary"]


COMPLAINTS = {
    "dnf5: a package": (
        "Failed to resolve the transaction:\nNo match for argument: nosuch",
        InputError,
        r"fedora\.ks\.j2:3: no package 'nosuch'",
    ),
    "dnf5: a group": (
        "Failed to resolve the transaction:\nNo match for argument: odd",
        InputError,
        r"fedora\.ks\.j2:4: no group 'odd'",
    ),
    "dnf5: a repository": (
        ">>> Curl error (6): Could not resolve hostname\nFailed to download metadata (baseurl:"
        ' "http://example.org/os") for repository "url"',
        HostError,
        r"http://example\.org/os: Curl error \(6\)",
    ),
    "a full disk": (
        "Error: Transaction test error:\n  installing package glibc needs 5MB more space on the / filesystem",
        HostError,
        "no space left",
    ),
    "a conflict": (
        "Error: \n Problem: conflicting requests\n  - nothing provides libodd needed by bash-5-1.noarch\n(",
        InputError,
        r"fedora\.ks\.j2:1: .*nothing provides libodd needed by bash",
    ),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_what_dnf_complains_about(case: str, fake_command: FakeCommand, tmp_path: Path) -> None:
    said, kind, message = COMPLAINTS[case]
    (tmp_path / "said").write_text(said)
    fake_command("dnf", f"cat '{tmp_path}/said'; exit 1")
    (tmp_path / "key").touch()
    asked = recipe(
        "%packages\nbash\nnosuch\n@odd\n%end\n",
        url=Repository("", "http://example.org/os", 1),
        packages=Packages(names=("bash", "nosuch"), groups=("odd",), line=1),
    )
    with pytest.raises(kind, match=message):
        dnf.bootstrap(asked, image(keyring=tmp_path / "key"), tmp_path / "root", tmp_path / "downloads")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "root").mkdir()
    system = Tree(tmp_path / "root")
    system.write("/etc/os-release", 'NAME=Fedora\nPRETTY_NAME="Fedora Linux 43"\n')
    return system


def planned(*volumes: Volume, firmware: str = "bios") -> layout.Layout:
    partitions = volumes or (Volume("/", "ext4", 1000, 1, grow=True),)
    return layout.plan(Storage(partitions), firmware, 2048, "msdos", "seed", KS)


KERNEL = Kernel("6.17.1-300.fc43.x86_64", "/boot/vmlinuz-6.17.1-300.fc43.x86_64", "")


class TestBoot:
    def prepare(self, tree: Tree, disk: layout.Layout, **settings: Any) -> None:
        for version in ("6.9.9-1.fc43.x86_64", KERNEL.version):
            tree.write(f"/usr/lib/modules/{version}/vmlinuz", f"kernel {version}")
            tree.write(f"/boot/initramfs-{version}.img", "")
        if not tree.exists("/lib"):
            tree.link("/lib", "usr/lib")
        append = Bootloader(append='console=ttyS0 quiet="a b"', timeout=3)
        redhat.family.prepare_boot(tree, recipe(bootloader=append, **settings), disk, Path())

    def test_entries(self, tree: Tree) -> None:
        tree.write("/boot/loader/entries/0123-old.conf", "stale")
        tree.write("/usr/lib/grub/i386-pc/blscfg.mod", "")
        disk = planned()
        self.prepare(tree, disk)
        names = [name.rpartition("/")[2] for name in tree.glob("/boot/loader/entries/*")]
        assert names == [f"{'f' * 32}-6.17.1-300.fc43.x86_64.conf", f"{'f' * 32}-6.9.9-1.fc43.x86_64.conf"]
        assert tree.read(f"/boot/loader/entries/{names[0]}") == (
            "title Fedora Linux 43 (6.17.1-300.fc43.x86_64)\n"
            "version 6.17.1-300.fc43.x86_64\n"
            "linux /boot/vmlinuz-6.17.1-300.fc43.x86_64\n"
            "initrd /boot/initramfs-6.17.1-300.fc43.x86_64.img\n"
            f'options root=UUID={disk.root.uuid} ro console=ttyS0 quiet="a b"\n'
            "grub_users $grub_users\n"
            "grub_arg --unrestricted\n"
            "grub_class fedora\n"
        )
        assert tree.read("/etc/kernel/cmdline") == (
            f'root=UUID={disk.root.uuid} ro console=ttyS0 quiet="a b"\n'
        )
        assert "GRUB_ENABLE_BLSCFG=true\n" in tree.read("/etc/default/grub")
        assert f"UUID={disk.root.uuid}" in tree.read("/etc/fstab")
        assert tree.read(f"/boot/vmlinuz-{KERNEL.version}") == f"kernel {KERNEL.version}"

    def test_the_menu_with_a_separate_boot(self, tree: Tree) -> None:
        disk = planned(Volume("/boot", "ext4", 300, 1), Volume("/", "ext4", 1000, 2))
        tree.write("/usr/lib/grub/i386-pc/blscfg.mod", "")
        self.prepare(tree, disk)
        menu = tree.read("/boot/grub2/grub.cfg")
        assert f"search --no-floppy --fs-uuid --set=root {disk.boot.uuid}\n" in menu
        assert "set timeout=3\n" in menu
        assert menu.endswith("set blsdir=/loader/entries\ninsmod blscfg\nblscfg\n")
        entry = tree.read(tree.glob("/boot/loader/entries/*6.17*")[0])
        assert "\nlinux /vmlinuz-6.17.1" in entry
        assert f"options root=UUID={disk.root.uuid} ro" in entry

    def test_a_grub_that_cannot_read_entries_gets_a_plain_menu(self, tree: Tree) -> None:
        self.prepare(tree, planned())
        menu = tree.read("/boot/grub2/grub.cfg")
        assert "blscfg" not in menu
        assert menu.index("6.17.1") < menu.index("6.9.9")

    def test_selinux_turned_off_is_told_to_the_kernel(self, tree: Tree) -> None:
        self.prepare(tree, planned(), selinux="disabled")
        assert tree.read("/etc/kernel/cmdline").endswith(" selinux=0\n")

    def test_without_an_initramfs_nothing_boots(self, tree: Tree) -> None:
        tree.write("/usr/lib/modules/6.1/vmlinuz", "")
        tree.link("/lib", "usr/lib")
        with pytest.raises(InputError, match=r"fedora\.ks\.j2:7: .*initramfs.* 6\.1") as caught:
            redhat.family.prepare_boot(tree, recipe(packages=Packages(line=7)), planned(), Path())
        assert "dracut" in caught.value.hint

    def test_distribution(self, tree: Tree) -> None:
        tree.write("/etc/os-release", 'ID="almalinux"\nVERSION_ID="10.1"\n')
        assert redhat.family.distribution(tree) == Distribution("rpm", "almalinux", "almalinux-10.1")

    def test_rescue_kernels_are_no_kernels(self, tree: Tree) -> None:
        tree.write("/boot/vmlinuz-0-rescue-0123", "")
        with pytest.raises(VdibuildError, match="no kernel"):
            redhat.family.kernels(tree)

    def test_signed_programs(self, tree: Tree) -> None:
        for name in ("BOOT/BOOTX64.EFI", "fedora/shimx64.efi", "fedora/grubx64.efi", "fedora/grub.cfg"):
            tree.write(f"/boot/efi/EFI/{name}", "")
        boot = redhat.family.boot_files(tree)
        assert boot.grub_directory == "/boot/grub2"
        assert boot.signed == {
            "EFI/BOOT/BOOTX64.EFI": "/boot/efi/EFI/BOOT/BOOTX64.EFI",
            "EFI/BOOT/grubx64.efi": "/boot/efi/EFI/fedora/grubx64.efi",
            "EFI/fedora/grubx64.efi": "/boot/efi/EFI/fedora/grubx64.efi",
            "EFI/fedora/shimx64.efi": "/boot/efi/EFI/fedora/shimx64.efi",
        }
        (tree.root / "boot/efi/EFI/BOOT/BOOTX64.EFI").unlink()
        assert redhat.family.boot_files(tree).signed == {}


class TestSettings:
    @pytest.fixture
    def system(self, tree: Tree) -> Tree:
        """A tree whose only program is chpasswd, which keeps what it is told."""
        tree.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
        (tree.root / "usr/bin").mkdir(parents=True)
        shell = tree.root / "usr/bin/sh"
        shell.write_bytes(Path("/bin/busybox").read_bytes())
        shell.chmod(0o755)
        tree.link("/bin", "usr/bin")
        tree.write("/usr/bin/chpasswd", "#!/bin/sh\nread line; echo $line >/etc/chpasswd\n", mode=0o755)
        return tree

    def test_language_and_keyboard(self, system: Tree) -> None:
        (system.root / "usr/lib/locale/de_DE.utf8").mkdir(parents=True)
        wanted = recipe(language="de_DE.UTF-8", keyboard="de (nodeadkeys)", hostname="machine.example.org")
        redhat.family.configure(system, wanted, image())
        assert system.read("/etc/locale.conf") == "LANG=de_DE.UTF-8\n"
        assert system.read("/etc/vconsole.conf") == (
            'KEYMAP="de-nodeadkeys"\nXKBLAYOUT="de"\nXKBVARIANT="nodeadkeys"\n'
        )
        assert 'Option "XkbLayout" "de"\n' in system.read("/etc/X11/xorg.conf.d/00-keyboard.conf")
        assert system.read("/etc/hostname") == "machine.example.org\n"
        assert system.read("/etc/chpasswd").startswith("root:!")

    @pytest.mark.parametrize(
        ("text", "settings", "message", "hint"),
        [
            ("\nlang fr_FR.UTF-8\n", {"language": "fr_FR.UTF-8"}, ":2: no language", "glibc-langpack-fr"),
            ("selinux --enforcing\n", {"selinux": "enforcing"}, ":1: .*no SELinux policy", "selinux-policy"),
            ("\n", {"interfaces": (NetworkInterface("link", 9),)}, ":9: nothing", "NetworkManager"),
        ],
    )
    def test_what_the_system_lacks(
        self, system: Tree, text: str, settings: dict[str, Any], message: str, hint: str
    ) -> None:
        with pytest.raises(InputError, match=message) as caught:
            redhat.family.configure(system, recipe(text, **settings), image())
        assert hint in caught.value.hint

    def test_selinux_is_as_the_recipe_says(self, system: Tree) -> None:
        system.write("/etc/selinux/config", "# comment\nSELINUX=enforcing\nSELINUXTYPE=targeted\n")
        redhat.family.configure(system, recipe(), image())
        assert "SELINUX=enforcing\n" in system.read("/etc/selinux/config")
        redhat.family.configure(system, recipe(selinux="permissive"), image())
        assert system.read("/etc/selinux/config") == ("# comment\nSELINUXTYPE=targeted\nSELINUX=permissive\n")

    def test_labels_are_set_at_the_first_boot_where_they_cannot_be_now(self, tree: Tree) -> None:
        redhat.family.seal(tree)
        assert not tree.exists("/.autorelabel")
        tree.write("/etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=targeted\n")
        tree.write("/etc/selinux/targeted/contexts/files/file_contexts", "/.* system_u:object_r:etc_t:s0\n")
        redhat.family.seal(tree)
        assert tree.read("/.autorelabel") == "-F\n"

    def test_seal_takes_logs_and_caches(self, tree: Tree) -> None:
        for name in ("/var/log/dnf.rpm.log", "/var/log/anaconda/anaconda.log", "/var/lib/rpm/.rpm.lock"):
            tree.write(name, "")
        tree.write("/var/cache/dnf/x/y.rpm", "")
        tree.write("/var/log/other.log", "")
        redhat.family.seal(tree)
        left = sorted(str(path.relative_to(tree.root)) for path in tree.root.rglob("*") if path.is_file())
        assert left == ["etc/os-release", "var/log/other.log"]
