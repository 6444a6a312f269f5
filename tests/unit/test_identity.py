"""A machine's identity, in a tree and in an ext4 file system that nobody mounts: the same files."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

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
STATIC = NetworkInterface(
    "link", 0, address="192.0.2.7", prefix=24, gateway="192.0.2.1", nameservers=("192.0.2.1", "2001:db8::1")
)
WEB = Identity("web.example.org", ("ssh-ed25519 AAAA one", "ssh-ed25519 AAAA two"), STATIC)
UNITS = {
    "systemd-networkd": "/usr/lib/systemd/system/systemd-networkd.service",
    "NetworkManager": "/usr/lib/systemd/system/NetworkManager.service",
    "ifupdown": "/usr/sbin/ifup",
}
EXPECTED = {
    "systemd-networkd": ("/etc/systemd/network/20-wired.network", 0o644, "Address=192.0.2.7/24\n"),
    "NetworkManager": (
        "/etc/NetworkManager/system-connections/wired.nmconnection",
        0o600,
        "address1=192.0.2.7/24,192.0.2.1\n",
    ),
    "ifupdown": ("/etc/network/interfaces", 0o644, "    address 192.0.2.7/24\n"),
}


def system(root: Path, unit: str) -> Tree:
    root.mkdir()
    tree = Tree(root)
    tree.write(unit, "")
    tree.link("/lib", "usr/lib")
    tree.write("/etc/hostname", "golden\n")
    tree.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    tree.write("/etc/ssh/ssh_host_rsa_key", "secret", mode=0o600)
    tree.write("/etc/ssh/sshd_config", "")
    (root / "root").mkdir(mode=0o700)
    return tree


def packed(tree: Tree, disk: Path) -> AbstractContextManager[Ext4Files]:
    """The tree's files in an ext4 file system that begins in the middle of an image."""
    with disk.open("wb") as file:
        file.truncate(OFFSET + (16 << 20))
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree.root), "-E", f"offset={OFFSET}"]
    subprocess.run([*argv, str(disk), "16M"], check=True)
    return ext4_files.opened(disk, OFFSET, disk.parent)


@pytest.fixture(params=sorted(UNITS))
def service(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_a_tree_and_a_file_system_alike(tmp_path: Path, service: str) -> None:
    tree = system(tmp_path / "tree", UNITS[service])
    packing = packed(tree, tmp_path / "disk")
    identity.write(tree, families.get("debian"), WEB)
    with packing as files:
        identity.write(files, families.get("debian"), WEB)
    path, mode, text = EXPECTED[service]
    assert text in tree.read(path)
    assert stat.S_IMODE(tree.path(path).stat().st_mode) == mode
    with ext4_files.opened(tmp_path / "disk", OFFSET, tmp_path) as files:
        for name, expected in (
            ("/etc/hostname", "web.example.org\n"),
            ("/etc/machine-id", ""),
            ("/root/.ssh/authorized_keys", "ssh-ed25519 AAAA one\nssh-ed25519 AAAA two\n"),
            ("/etc/hosts", tree.read("/etc/hosts")),
            (path, tree.read(path)),
        ):
            assert tree.read(name) == files.read(name) == expected
            assert stat.S_IMODE(tree.path(name).stat().st_mode) == files.mode(name)
        assert files.mode("/root/.ssh") == 0o700
        for place in (tree, files):
            assert not place.exists("/etc/ssh/ssh_host_rsa_key")
            assert place.exists("/etc/ssh/sshd_config")
    checked = subprocess.run(["e2fsck", "-fn", f"{tmp_path / 'disk'}?offset={OFFSET}"], capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_red_hat_and_nothing(tmp_path: Path) -> None:
    tree = system(tmp_path / "tree", UNITS["ifupdown"])
    with pytest.raises(VdibuildError, match="nothing in the system configures networks"):
        identity.write(tree, families.get("redhat"), WEB)
    tree.write(UNITS["NetworkManager"], "")
    identity.write(tree, families.get("redhat"), Identity("web", (), NetworkInterface("link", 0)))
    assert "method=auto" in tree.read(EXPECTED["NetworkManager"][0])
    assert tree.read("/etc/hostname") == "web\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sets labels")
def test_labels_are_kept_and_given(tmp_path: Path) -> None:
    tree = system(tmp_path / "tree", UNITS["NetworkManager"])
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
        packed(system(tmp_path / "tree", UNITS["ifupdown"]), tmp_path / "disk") as files,
        pytest.raises(VdibuildError, match="could not be written"),
    ):
        files.write("/etc/large", "x" * (20 << 20))


def test_texts_and_names_that_look_like_debugfs(tmp_path: Path) -> None:
    """What a file says is not taken for an answer, and a name is never a command."""
    tree = system(tmp_path / "tree", UNITS["ifupdown"])
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
