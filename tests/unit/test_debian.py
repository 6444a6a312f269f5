"""Debian without packages: mirrors, archives' states, settings, the boot menu, what apt says."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FakeCommand
from vdibuild.errors import CommandError, HostError, InputError, SpaceError, VdibuildError
from vdibuild.families import apt, debian, systemd
from vdibuild.recipe import NetworkInterface, Packages, Recipe, Repository
from vdibuild.settings.images import Image
from vdibuild.tree import Tree

KS = Path("golden.ks.j2")

OS_RELEASE = "ID=debian\nVERSION_CODENAME=bookworm\n"

DEB822 = """\
# A comment.
Types: deb
# Another, within a stanza.
URIs: http://mirror.example.org/debian/
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example.org/
Suites: bookworm
"""


def image(**settings: object) -> Image:
    return Image.model_validate({"family": "debian", "release": "trixie", "kickstart": "x"} | settings)


def recipe(text: str = "", **settings: Any) -> Recipe:
    return Recipe(text=text, source=KS, **settings)


def host(etc: Path, name: str, sources: str, os_release: str = OS_RELEASE) -> Path:
    (etc / "apt" / "sources.list.d").mkdir(parents=True)
    (etc / "apt" / name).write_text(sources)
    (etc / "os-release").write_text(os_release)
    return etc


class TestMirrors:
    def test_the_images_own(self, tmp_path: Path) -> None:
        own = image(mirror="http://own.example.org/debian/", security_mirror="http://own.example.org/sec")
        found = apt.mirrors(own, tmp_path)
        assert found == {"main": "http://own.example.org/debian", "security": "http://own.example.org/sec"}

    def test_none_for_security_is_none(self, tmp_path: Path) -> None:
        assert apt.mirrors(image(mirror="http://own.example.org/debian"), tmp_path) == {
            "main": "http://own.example.org/debian"
        }

    def test_this_hosts_in_stanzas(self, tmp_path: Path) -> None:
        etc = host(tmp_path, "sources.list.d/debian.sources", DEB822)
        assert apt.mirrors(image(), etc) == {
            "main": "http://mirror.example.org/debian",
            "security": "http://mirror.example.org/debian-security",
        }

    def test_this_hosts_in_lines(self, tmp_path: Path) -> None:
        etc = host(
            tmp_path,
            "sources.list",
            "# deb http://old.example.org/debian bookworm main\n"
            "deb-src http://src.example.org/debian bookworm main\n"
            "deb https://other.example.org/apt cloud main\n"
            "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example.org/debian bookworm main contrib\n"
            "deb http://mirror.example.org/debian-security bookworm-security main\n",
        )
        assert apt.mirrors(image(), etc) == {
            "main": "http://mirror.example.org/debian",
            "security": "http://mirror.example.org/debian-security",
        }

    def test_a_host_of_another_distribution(self, tmp_path: Path) -> None:
        etc = host(tmp_path, "sources.list", "", 'ID="fedora"\nVERSION_ID="43"\n')
        with pytest.raises(HostError, match="knows no mirror of Debian, which trixie comes from"):
            apt.mirrors(image(), etc)

    def test_ubuntu_on_debian(self, tmp_path: Path) -> None:
        etc = host(tmp_path, "sources.list.d/debian.sources", DEB822)
        with pytest.raises(HostError, match="no mirror of Ubuntu"):
            apt.mirrors(image(release="noble"), etc)


class TestStates:
    def archive(self, directory: Path, date: str = "Date: Sat, 15 Nov 2025 09:41:01 UTC\n") -> Recipe:
        suite = directory / "dists" / "trixie"
        suite.mkdir(parents=True)
        (suite / "InRelease").write_text(f"Origin: Test\n{date}")
        return recipe(url=Repository("main", directory.as_uri(), 3))

    def test_digest_and_date(self, tmp_path: Path) -> None:
        (state,) = apt.states(self.archive(tmp_path), image())
        content = (tmp_path / "dists" / "trixie" / "InRelease").read_bytes()
        assert state.digest == hashlib.sha256(content).hexdigest()
        assert state.date == 1763199661
        assert state.url == f"{tmp_path.as_uri()} trixie"

    def test_the_one_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        asked = recipe(url=Repository("main", (tmp_path / "nowhere").as_uri(), 3))
        with pytest.raises(HostError, match=f"{tmp_path}/nowhere/dists/trixie/InRelease: .*No such file"):
            apt.states(asked, image())

    def test_one_that_takes_the_question_and_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(apt, "_TIMEOUT", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            asked = recipe(url=Repository("main", f"http://127.0.0.1:{silent.getsockname()[1]}/debian", 3))
            with pytest.raises(HostError, match=r"cannot read the package archive .*timed out"):
                apt.states(asked, image())

    def test_a_page_that_is_no_index(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="has an index without a date"):
            apt.states(self.archive(tmp_path, "<html>"), image())

    def test_passwords_are_not_shown(self) -> None:
        asked = recipe(url=Repository("main", "http://me:secret@127.0.0.1:9/debian", 3))
        with pytest.raises(HostError) as caught:
            apt.states(asked, image())
        assert "secret" not in str(caught.value)
        assert "http://127.0.0.1:9/debian" in str(caught.value)

    def test_a_recipe_without_url(self) -> None:
        with pytest.raises(InputError, match="does not say where packages come from"):
            apt.states(recipe(), image())


class TestSources:
    def test_as_a_person_writes_them(self) -> None:
        archives = [
            (Repository("trixie", "http://mirror.example.org/debian", 1), ("main", "contrib")),
            (Repository("trixie-security", "http://mirror.example.org/security", 2), ("main",)),
        ]
        assert apt.sources_text(archives, ["/usr/share/keyrings/debian-archive-keyring.gpg"]) == (
            "Types: deb\n"
            "URIs: http://mirror.example.org/debian\n"
            "Suites: trixie\n"
            "Components: main contrib\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            "\n"
            "Types: deb\n"
            "URIs: http://mirror.example.org/security\n"
            "Suites: trixie-security\n"
            "Components: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        )

    def test_only_components_that_are_there(self, tmp_path: Path) -> None:
        (tmp_path / "dists" / "trixie").mkdir(parents=True)
        (tmp_path / "dists" / "trixie" / "InRelease").write_text("Components: updates/main contrib\n")
        asked = recipe(url=Repository("main", tmp_path.as_uri(), 3))
        ((_, components),) = apt.sources(asked, image(components=["main", "non-free-firmware"]))
        assert components == ("main",)


WANTED = """\
lang C.UTF-8
%packages --nocore
openssh-servr
-bash
bind9=9.9
%end
"""

SAID = {
    "E: Unable to locate package openssh-servr": (
        InputError,
        "golden.ks.j2:3: no package openssh-servr in trixie\n  did you mean openssh-server?",
    ),
    "E: Package 'bash' has no installation candidate": (
        InputError,
        "golden.ks.j2:4: bash is excluded, but the system needs it",
    ),
    "E: Version '9.9' for 'bind9' was not found": (
        InputError,
        "golden.ks.j2:5: no version 9.9 of bind9 in trixie",
    ),
    " openssh-servr : Depends: bash (>= 5) but it is not installable": (
        InputError,
        "golden.ks.j2:4: bash is excluded, but openssh-servr needs it",
    ),
    "E: Failed to fetch http://me:pw@mirror.example.org/x.deb  404  Not Found [IP: 192.0.2.1 80]": (
        HostError,
        "cannot fetch http://mirror.example.org/x.deb: 404  Not Found [IP: 192.0.2.1 80]",
    ),
    "dpkg: error: cannot write: No space left on device": (SpaceError, "no space left on the disk of "),
    "W: GPG error: http://mirror.example.org trixie InRelease: NO_PUBKEY 0123": (
        HostError,
        "an archive's signature does not count: http://mirror.example.org/debian",
    ),
    "dpkg: error processing package tzdata (--configure):": (
        CommandError,
        "package tzdata could not be installed",
    ),
}


class TestBootstrap:
    """A fake mmdebstrap: what it is asked for, and what becomes of what it says."""

    @pytest.fixture
    def signed(self, tmp_path: Path) -> Image:
        (tmp_path / "key.gpg").touch()
        return image(keyring=tmp_path / "key.gpg", packages=["git"])

    def wanting(self, **packages: Any) -> Recipe:
        main = Repository("main", "http://mirror.example.org/debian", 1)
        return recipe(WANTED, url=main, packages=Packages(core=False, **packages))

    @pytest.mark.parametrize("said", SAID)
    def test_complaints(self, said: str, tmp_path: Path, fake_command: FakeCommand, signed: Image) -> None:
        kind, message = SAID[said]
        index = tmp_path / "root/var/lib/apt/lists/mirror_main_Packages"
        fake_command(
            "mmdebstrap",
            f"printf 'Package: openssh-server\\nPackage: bash\\n' > {index}\n"
            f'echo "{said}"\necho "E: mmdebstrap failed to run"\nexit 25',
        )
        asked = self.wanting(names=("openssh-servr", "bind9=9.9"), excluded_names=("bash",))
        with pytest.raises(VdibuildError) as caught:
            debian.family.bootstrap(asked, signed, tmp_path / "root", tmp_path / "downloads")
        assert type(caught.value) is kind
        assert str(caught.value).startswith(message)

    def test_what_mmdebstrap_is_asked_for(
        self, tmp_path: Path, fake_command: FakeCommand, signed: Image
    ) -> None:
        record = fake_command("mmdebstrap", "exit 1")
        asked = self.wanting(
            names=("zstd",), groups=("standard", "ssh-server"), excluded_names=("nano", "vim*", "g++")
        )
        with pytest.raises(CommandError):
            debian.family.bootstrap(asked, signed, tmp_path / "root", tmp_path / "downloads")
        arguments = record.read_text().splitlines()
        assert [word for word in arguments if word.startswith("--include")] == [
            "--include=zstd",
            "--include=task-ssh-server",
            "--include=git",
            "--include=apt",
            "--include=?narrow(?or(?archive(^trixie$),?codename(^trixie$)),?and(?or(?priority(important),"
            "?priority(standard)),?not(?essential),?not(?name(^nano$)),?not(?name(^vim.*$)),"
            "?not(?name(^g\\+\\+$))))",
        ]
        assert "--variant=essential" in arguments
        # An archive that has stopped to answer is given up within a minute.
        assert '--aptopt=Acquire::http::Timeout "10"' in arguments
        assert not any("Recommends" in word for word in arguments)
        pins = (tmp_path / "root/etc/apt/preferences.d/vdibuild-exclusions").read_text()
        assert pins == "Package: nano vim* g++\nPin: release *\nPin-Priority: -1\n"

    @pytest.mark.parametrize("name", ["--help", "Zstd", "foo-", "/etc/passwd", "?essential", "a b"])
    def test_what_is_no_package(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="names no package"):
            debian.family.bootstrap(self.wanting(names=(name,)), image(), tmp_path / "root", tmp_path)
        assert not (tmp_path / "root").exists()

    def test_packages_are_kept_when_it_fails(
        self, tmp_path: Path, fake_command: FakeCommand, signed: Image
    ) -> None:
        archives = tmp_path / "root/var/cache/apt/archives"
        fake_command("mmdebstrap", f"ls {archives} > {tmp_path}/there; echo deb > {archives}/new.deb; exit 1")
        store = tmp_path / "downloads" / "http_mirror.example.org_debian"
        (store / "archives").mkdir(parents=True)
        (store / "archives" / "old.deb").write_text("old")
        (store / "archives" / ".1.half.deb").write_text("ha")
        with pytest.raises(CommandError):
            debian.family.bootstrap(self.wanting(), signed, tmp_path / "root", tmp_path / "downloads")
        assert (tmp_path / "there").read_text() == "old.deb\n"
        assert (store / "archives" / "new.deb").read_text() == "deb\n"
        assert (store / "archives" / "old.deb").read_text() == "old"

    def test_archives_that_were_installed_are_young_again(
        self, tmp_path: Path, fake_command: FakeCommand, signed: Image
    ) -> None:
        paragraph = "Package: used\nStatus: install ok installed\nArchitecture: all\nVersion: 1:2.0~rc-1\n\n"
        status = tmp_path / "root/var/lib/dpkg/status"
        fake_command("mmdebstrap", f"mkdir -p {status.parent}; printf '{paragraph}' > {status}; exit 1")
        archives = tmp_path / "downloads" / "http_mirror.example.org_debian" / "archives"
        archives.mkdir(parents=True)
        for name in ("used_1%3a2.0~rc-1_all.deb", "used_1%3a1.0-1_all.deb"):
            (archives / name).write_text("deb")
            os.utime(archives / name, (0, 0))
        with pytest.raises(CommandError):
            debian.family.bootstrap(self.wanting(), signed, tmp_path / "root", tmp_path / "downloads")
        young = [path.name for path in archives.iterdir() if path.stat().st_mtime > 0]
        assert young == ["used_1%3a2.0~rc-1_all.deb"]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root = tmp_path / "tree"
    for name in ("etc/default", "usr/share/zoneinfo/Europe", "usr/lib/systemd/system"):
        (root / name).mkdir(parents=True)
    (root / "usr/share/zoneinfo/Europe/Vienna").write_text("TZif")
    return Tree(root)


class TestSettings:
    def test_hostname(self, tree: Tree) -> None:
        systemd.set_hostname(tree, recipe(hostname="web.example.org"))
        assert tree.read("/etc/hostname") == "web.example.org\n"
        assert "127.0.1.1 web.example.org web\n" in tree.read("/etc/hosts")

    def test_no_hostname(self, tree: Tree) -> None:
        tree.write("/etc/hostname", "the-build-host\n")
        systemd.set_hostname(tree, recipe())
        assert not tree.exists("/etc/hostname")
        assert "127.0.1.1" not in tree.read("/etc/hosts")

    def test_timezone(self, tree: Tree) -> None:
        systemd.set_timezone(tree, recipe(timezone="Europe/Vienna", utc=False))
        assert tree.path("/etc/localtime").read_text() == "TZif"
        assert tree.read("/etc/adjtime").splitlines()[2] == "LOCAL"

    @pytest.mark.parametrize("zone", ["Europe/Wien", "../../../etc/passwd", "Europe"])
    def test_no_timezone_of_that_name(self, tree: Tree, zone: str) -> None:
        with pytest.raises(InputError, match=r"golden.ks.j2:2: no time zone"):
            systemd.set_timezone(tree, recipe(f"lang C\ntimezone {zone} --utc\n", timezone=zone))

    def test_utc_needs_no_table(self, tree: Tree) -> None:
        systemd.set_timezone(tree, recipe(timezone="Etc/UTC"))
        assert not tree.exists("/etc/localtime")

    def test_a_language_nobody_can_make(self, tree: Tree) -> None:
        tree.write("/usr/share/i18n/SUPPORTED", "de_AT.UTF-8 UTF-8\nde_AT ISO-8859-1\n")
        with pytest.raises(InputError, match=r"golden.ks.j2:1: no language 'de_XX.UTF-8'"):
            debian._set_language(tree, recipe("lang de_XX.UTF-8\n", language="de_XX.UTF-8"))

    def test_a_language_without_locales(self, tree: Tree) -> None:
        with pytest.raises(InputError, match="add the package locales"):
            debian._set_language(tree, recipe("lang de_AT.UTF-8\n", language="de_AT.UTF-8"))

    @pytest.mark.parametrize(
        ("keyboard", "layout", "variant"),
        [
            ("us", "us", ""),
            ("de-latin1", "de", ""),
            ("de (nodeadkeys)", "de", "nodeadkeys"),
            ("uk", "gb", ""),
        ],
    )
    def test_keyboard(self, tree: Tree, keyboard: str, layout: str, variant: str) -> None:
        debian._set_keyboard(tree, recipe(keyboard=keyboard))
        text = tree.read("/etc/default/keyboard")
        assert f'XKBLAYOUT="{layout}"\nXKBVARIANT="{variant}"\n' in text

    def test_no_keyboard_of_that_name(self, tree: Tree) -> None:
        tree.write("/usr/share/X11/xkb/symbols/us", "")
        with pytest.raises(InputError, match=r"golden.ks.j2:1: no keyboard layout 'xx'"):
            debian._set_keyboard(tree, recipe("keyboard --vckeymap=xx", keyboard="xx"))

    def test_selinux_without_a_policy(self, tree: Tree) -> None:
        with pytest.raises(InputError, match=r"golden.ks.j2:1: .* no SELinux policy"):
            debian._set_selinux(tree, recipe("selinux --enforcing\n", selinux="enforcing"))


STATIC = NetworkInterface(
    "ens3",
    7,
    address="192.0.2.10",
    prefix=24,
    gateway="192.0.2.1",
    nameservers=("192.0.2.53", "2001:db8::53"),
    ipv6=False,
    mtu=1400,
)


class TestNetwork:
    def test_networkd_dhcp_on_any_wired(self) -> None:
        assert systemd.networkd_file(NetworkInterface("link", 1)) == (
            "20-wired.network",
            "[Match]\nType=ether\nKind=!*\n\n[Network]\nDHCP=yes\n",
        )

    def test_networkd_static(self) -> None:
        assert systemd.networkd_file(STATIC) == (
            "20-ens3.network",
            "[Match]\nName=ens3\n\n[Link]\nMTUBytes=1400\n\n[Network]\nAddress=192.0.2.10/24\n"
            "Gateway=192.0.2.1\nDNS=192.0.2.53\nDNS=2001:db8::53\n"
            "LinkLocalAddressing=ipv4\nIPv6AcceptRA=no\n",
        )

    def test_networkmanager(self) -> None:
        assert systemd.keyfile(STATIC) == (
            "ens3.nmconnection",
            "[connection]\nid=ens3\ntype=ethernet\ninterface-name=ens3\n\n[ethernet]\nmtu=1400\n\n"
            "[ipv4]\nmethod=manual\naddress1=192.0.2.10/24,192.0.2.1\ndns=192.0.2.53;\n\n"
            "[ipv6]\nmethod=disabled\n",
        )

    def test_networkmanager_by_address(self) -> None:
        name, text = systemd.keyfile(NetworkInterface("52:54:00:AA:BB:CC", 1))
        assert name == "52-54-00-aa-bb-cc.nmconnection"
        assert "[ethernet]\nmac-address=52:54:00:AA:BB:CC\n\n[ipv4]\nmethod=auto\n" in text

    def test_ifupdown(self) -> None:
        assert debian._interfaces(recipe(interfaces=(STATIC, NetworkInterface("link", 8)))) == (
            "auto lo\niface lo inet loopback\n\n"
            "auto ens3\niface ens3 inet static\n    address 192.0.2.10/24\n    gateway 192.0.2.1\n"
            "    dns-nameservers 192.0.2.53 2001:db8::53\n    mtu 1400\n\n"
            "auto /en*=wired\niface wired inet dhcp\n"
        )

    def test_ifupdown_knows_no_addresses(self) -> None:
        with pytest.raises(InputError, match=r"golden.ks.j2:4: ifupdown knows interfaces by name"):
            debian._interfaces(recipe(interfaces=(NetworkInterface("52:54:00:aa:bb:cc", 4),)))

    def test_nothing_that_configures(self, tree: Tree) -> None:
        with pytest.raises(InputError, match=r"golden.ks.j2:1: nothing in the system"):
            debian._set_network(tree, recipe(interfaces=(NetworkInterface("link", 1),)))


class TestBoot:
    def test_kernels_newest_first(self, tree: Tree) -> None:
        for version in ("6.9.1-amd64", "6.12.3-amd64", "6.12.10-amd64"):
            tree.write(f"/boot/vmlinuz-{version}", "")
        assert [kernel.version for kernel in debian.family.kernels(tree)] == [
            "6.12.10-amd64",
            "6.12.3-amd64",
            "6.9.1-amd64",
        ]

    def test_no_kernel(self, tree: Tree) -> None:
        with pytest.raises(VdibuildError, match="the system has no kernel"):
            debian.family.kernels(tree)

    def test_secure_boot_needs_both(self, tree: Tree) -> None:
        tree.write("/etc/os-release", "ID=debian\n")
        tree.write("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", "")
        assert debian.family.boot_files(tree).signed == {}
        tree.write("/usr/lib/shim/shimx64.efi.signed", "")
        assert debian.family.boot_files(tree).signed["EFI/BOOT/BOOTX64.EFI"].endswith("shimx64.efi.signed")
        assert "EFI/debian/grubx64.efi" in debian.family.boot_files(tree).signed

    def test_initramfs_inputs(self, tree: Tree) -> None:
        tree.write("/etc/fstab", "UUID=1 / ext4 defaults 0 1\n")
        before = debian._initramfs_inputs(tree)
        tree.write("/etc/motd", "changes nothing")
        tree.write("/etc/fstab", "UUID=2 / xfs defaults 0 0\n")
        assert debian._initramfs_inputs(tree) == before
        tree.write("/etc/modprobe.d/blacklist.conf", "blacklist floppy\n")
        after = debian._initramfs_inputs(tree)
        assert after != before
        tree.write("/usr/lib/modules/6.12/extra/new.ko", "")
        assert debian._initramfs_inputs(tree) != after

    def test_grub_defaults_are_a_shells(self, tree: Tree) -> None:
        debian._write_grub_defaults(tree, 'console=ttyS0 dyndbg="file a +p" x=it\'s', 3)
        text = tree.read("/etc/default/grub")
        assert "GRUB_TIMEOUT=3\n" in text
        assert "GRUB_CMDLINE_LINUX='console=ttyS0 dyndbg=\"file a +p\" x=it'\"'\"'s'\n" in text
