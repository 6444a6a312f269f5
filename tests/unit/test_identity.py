"""A machine's identity, in a tree and in an ext4 file system that nobody mounts: the same files."""

from __future__ import annotations

import os
import stat
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from vdibuild import families
from vdibuild.disk import ext4_files
from vdibuild.disk.ext4_files import Ext4Files
from vdibuild.errors import VdibuildError
from vdibuild.provision import identity
from vdibuild.provision.identity import Identity
from vdibuild.recipe import NetworkInterface
from vdibuild.tree import Tree

OFFSET = 1 << 20
GOLDEN = Path(__file__).parent / "golden/network"
MAC = "52:54:00:12:34:56"
STATIC = NetworkInterface(
    "link", 0, address="192.0.2.7", prefix=24, gateway="192.0.2.1", nameservers=("192.0.2.1", "2001:db8::1")
)
WEB = Identity("web.example.org", ("ssh-ed25519 AAAA one", "ssh-ed25519 AAAA two"), STATIC, MAC)


@dataclass(frozen=True)
class Service:
    """What configures a system's network. signs: files by which that is seen. theirs: what the image has of
    it. file, mode: where it is told of the interface.
    """

    family: str
    signs: tuple[str, ...]
    file: str
    mode: int = 0o644
    theirs: tuple[str, ...] = ()


_NETWORKD = "/usr/lib/systemd/system/systemd-networkd.service"
_MANAGER = "/usr/lib/systemd/system/NetworkManager.service"
_CONNECTIONS = "/etc/NetworkManager/system-connections"
_SCRIPTS = "/etc/sysconfig/network-scripts"
SERVICES = {
    "systemd-networkd": Service("debian", (_NETWORKD,), "/etc/systemd/network/20-wired.network"),
    "NetworkManager": Service("debian", (_MANAGER,), f"{_CONNECTIONS}/wired.nmconnection", 0o600),
    "NetworkManager-redhat": Service(
        "redhat", (_MANAGER, f"{_SCRIPTS}/readme-ifcfg-rh.txt"), f"{_CONNECTIONS}/wired.nmconnection", 0o600
    ),
    "ifupdown": Service("debian", ("/usr/sbin/ifup", _NETWORKD), "/etc/network/interfaces"),
    "netplan": Service(
        "debian",
        ("/usr/sbin/netplan", _NETWORKD),
        "/etc/netplan/20-wired.yaml",
        0o600,
        ("/etc/netplan/50-cloud-init.yaml",),
    ),
    "netplan-NetworkManager": Service(
        "debian",
        ("/usr/sbin/netplan", _NETWORKD, _MANAGER),
        "/etc/netplan/20-wired.yaml",
        0o600,
        ("/etc/netplan/01-network-manager-all.yaml", f"{_CONNECTIONS}/wired.nmconnection"),
    ),
    "ifcfg": Service(
        "redhat",
        (_MANAGER, f"{_SCRIPTS}/ifcfg-lo"),
        f"{_SCRIPTS}/ifcfg-wired",
        theirs=(f"{_SCRIPTS}/ifcfg-ens3",),
    ),
    "ifcfg-initscripts": Service("redhat", (f"{_SCRIPTS}/ifup",), f"{_SCRIPTS}/ifcfg-wired"),
}


def golden(name: str, given: str) -> str:
    """What the service of that name is told of an interface."""
    name = name.removesuffix("-redhat").removesuffix("-initscripts")
    return (GOLDEN / f"{name}-{given}").read_text()


def system(root: Path, service: Service) -> Tree:
    root.mkdir()
    tree = Tree(root)
    for path in (*service.signs, *service.theirs):
        tree.write(path, "")
    tree.make_directory("/usr/lib")
    tree.link("/lib", "usr/lib")
    tree.write("/etc/hostname", "golden\n")
    tree.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    tree.write("/etc/ssh/ssh_host_rsa_key", "secret", mode=0o600)
    tree.write("/etc/ssh/sshd_config", "")
    tree.write("/etc/udev/rules.d/70-persistent-net.rules", "")
    tree.write("/etc/cloud/cloud.cfg.d/05_logging.cfg", "")
    (root / "root").mkdir(mode=0o700)
    return tree


def packed(tree: Tree, disk: Path) -> AbstractContextManager[Ext4Files]:
    """The tree's files in an ext4 file system that begins in the middle of an image."""
    with disk.open("wb") as file:
        file.truncate(OFFSET + (16 << 20))
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree.root), "-E", f"offset={OFFSET}"]
    subprocess.run([*argv, str(disk), "16M"], check=True)
    return ext4_files.opened(disk, OFFSET, disk.parent)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_tree_and_a_file_system_alike(tmp_path: Path, name: str) -> None:
    service = SERVICES[name]
    tree = system(tmp_path / "tree", service)
    packing = packed(tree, tmp_path / "disk")
    identity.write(tree, families.get(service.family), WEB)
    with packing as files:
        identity.write(files, families.get(service.family), WEB)
    with ext4_files.opened(tmp_path / "disk", OFFSET, tmp_path) as files:
        for path, expected, mode in (
            ("/etc/hostname", "web.example.org\n", 0o644),
            ("/etc/machine-id", "", 0o444),
            ("/root/.ssh/authorized_keys", "ssh-ed25519 AAAA one\nssh-ed25519 AAAA two\n", 0o600),
            ("/etc/hosts", tree.read("/etc/hosts"), 0o644),
            ("/etc/cloud/cloud.cfg.d/99-network.cfg", "network: {config: disabled}\n", 0o644),
            (service.file, golden(name, "static"), service.mode),
        ):
            assert tree.read(path) == files.read(path) == expected
            assert stat.S_IMODE(tree.path(path).stat().st_mode) == files.mode(path) == mode
        assert files.mode("/root/.ssh") == 0o700
        gone = ("/etc/ssh/ssh_host_rsa_key", "/etc/udev/rules.d/70-persistent-net.rules", *service.theirs)
        for place in (tree, files):
            assert not [path for path in gone if place.exists(path)]
            assert not [path for path in (*service.signs, "/etc/ssh/sshd_config") if not place.exists(path)]
    checked = subprocess.run(["e2fsck", "-fn", f"{tmp_path / 'disk'}?offset={OFFSET}"], capture_output=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_network_that_gives_addresses(tmp_path: Path, name: str) -> None:
    service = SERVICES[name]
    tree = system(tmp_path / "tree", service)
    given = Identity("web", (), NetworkInterface("link", 0), MAC)
    identity.write(tree, families.get(service.family), given)
    assert tree.read(service.file) == golden(name, "dhcp")
    assert not tree.exists("/root/.ssh")


@pytest.mark.parametrize("family", ["debian", "redhat"])
def test_nothing_configures_the_network(tmp_path: Path, family: str) -> None:
    tree = system(tmp_path / "tree", Service(family, (), ""))
    with pytest.raises(VdibuildError, match="nothing in the system configures networks"):
        identity.write(tree, families.get(family), WEB)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"host": host}, "is no host name")
            for host in (
                "",
                "Web",
                "web..org",
                "-web",
                "web-",
                "w" * 64,
                "web\n127.0.0.1 bank",
                "web.",
                "wëb",
            )
        ),
        *(({"mac": mac}, "is no MAC address") for mac in ("", "52:54:00:12:34", "52:54:00:12:34:56\nX=1")),
        *(
            ({"authorized_keys": (key,)}, "is no public SSH key")
            for key in ("", "ssh-ed25519", "ssh-ed25519 AAAA\nssh-rsa BBBB", "ssh-ed25519 AAAA\0")
        ),
        *(
            ({"interface": interface}, "is no address")
            for interface in (
                replace(STATIC, address="192.0.2.7\n"),
                replace(STATIC, gateway="192.0.2.256"),
                replace(STATIC, nameservers=("192.0.2.1", "ns.example.org")),
            )
        ),
    ],
)
def test_hostile_identities(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(VdibuildError, match=said):
        replace(WEB, **changes)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sets labels")
def test_labels_are_kept_and_given(tmp_path: Path) -> None:
    tree = system(tmp_path / "tree", SERVICES["NetworkManager-redhat"])
    label = "security.selinux"
    for path, text in (("etc", "etc_t"), ("etc/hostname", "hostname_etc_t"), ("root", "admin_home_t")):
        os.setxattr(tree.root / path, label, f"system_u:object_r:{text}:s0\0".encode())
    with packed(tree, tmp_path / "disk") as files:
        identity.write(files, families.get("redhat"), WEB)
    volume = f"{tmp_path / 'disk'}?offset={OFFSET}"
    for path, text in (
        ("/etc/hostname", "hostname_etc_t"),
        ("/etc/NetworkManager", "etc_t"),
        ("/root/.ssh", "ssh_home_t"),
        ("/root/.ssh/authorized_keys", "ssh_home_t"),
    ):
        argv = ["debugfs", "-R", f"ea_get {path} {label}", volume]
        assert f"object_r:{text}:s0" in subprocess.run(argv, capture_output=True, text=True).stdout, path


def test_a_full_file_system(tmp_path: Path) -> None:
    with (
        packed(system(tmp_path / "tree", SERVICES["ifupdown"]), tmp_path / "disk") as files,
        pytest.raises(VdibuildError, match="could not be written"),
    ):
        files.write("/etc/large", "x" * (20 << 20))


def test_texts_and_names_that_look_like_debugfs(tmp_path: Path) -> None:
    """What a file says is not taken for an answer, and a name is never a command."""
    tree = system(tmp_path / "tree", SERVICES["ifupdown"])
    text = 'debugfs: cat "/etc/said"\n# 0123456789abcdef\nInode: 7\nno newline at the end'
    tree.write("/etc/said", text)
    tree.write('/etc/ssh/ssh_host_"\n!touch pwned', "")
    with packed(tree, tmp_path / "disk") as files:
        assert files.read("/etc/said") == text
        assert files.read("/etc/none") == ""
        assert not files.exists("/etc/none")
        for name in ('/etc/a"\nrm /etc/said', "/etc/a\nrm /etc/said", '/etc/a" "/etc/said'):
            with pytest.raises(VdibuildError, match="is no path that can be used"):
                files.write(name, "")
            with pytest.raises(VdibuildError, match="is no path that can be used"):
                files.remove(name)
        assert files.read("/etc/said") == text


def test_no_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(OFFSET * 2))
    with (
        pytest.raises(VdibuildError, match="there is no ext4 file system"),
        ext4_files.opened(disk, OFFSET, tmp_path),
    ):
        pass
