"""What identifies a machine is gone after sealing, what was configured is there, and links lead nowhere."""

# ruff: noqa: S108 (paths of a tree)

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vdibuild import process
from vdibuild.disk import seal
from vdibuild.families import debian
from vdibuild.tree import Tree

EPOCH = 1763000000

GONE = (
    "/etc/ssh/ssh_host_ed25519_key",
    "/etc/ssh/ssh_host_ed25519_key.pub",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/dhcp/dhclient.eth0.leases",
    "/var/lib/NetworkManager/internal-1-eth0.lease",
    "/var/lib/NetworkManager/secret_key",
    "/etc/lvm/devices/system.devices",
    "/etc/udev/rules.d/70-persistent-net.rules",
    "/var/lib/cloud/instances/i-1/user-data.txt",
    "/var/lib/cloud/instance",
    "/root/.bash_history",
    "/home/joe/.python_history",
    "/home/joe/.ssh/known_hosts",
    "/etc/passwd-",
    "/etc/.pwd.lock",
    "/var/mail/joe",
    "/var/log/syslog.1",
    "/var/log/journal/0123/system.journal",
    "/var/log/apt/term.log.1.xz",
    "/tmp/x",
    "/tmp/.X11-unix/y",
    "/var/tmp/z",
    "/run/lock/w",
    "/var/cache/ldconfig/aux-cache",
    "/var/lib/apt/lists/mirror_InRelease",
    "/var/cache/apt/archives/zstd_1.deb",
    "/var/lib/dpkg/status-old",
    "/etc/default/keyboard.dpkg-old",
)

KEPT = (
    "/etc/ssh/sshd_config",
    "/etc/hostname",
    "/etc/fstab",
    "/home/joe/.ssh/authorized_keys",
    "/var/lib/NetworkManager/NetworkManager-intern.conf",
    "/etc/NetworkManager/system-connections/wired.nmconnection",
    "/var/spool/cron/crontabs/joe",
    "/var/lib/dpkg/status",
    "/etc/lvm/lvm.conf",
    "/etc/cloud/cloud.cfg",
)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root = tmp_path / "root"
    root.mkdir()
    tree = Tree(root)
    for name in (*GONE, *KEPT):
        tree.write(name, "text\n")
    tree.write("/var/log/wtmp", "logins")
    tree.write("/var/log/auth.log", "logins", mode=0o640)
    tree.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    tree.link("/var/lib/dbus/machine-id", "/etc/machine-id")
    return tree


def test_the_machine_is_gone_the_configuration_stays(tree: Tree) -> None:
    seal.seal(tree, debian.family)
    assert [name for name in GONE if tree.exists(name)] == []
    assert [name for name in KEPT if not tree.exists(name)] == []
    assert all(tree.path(name).is_dir() for name in ("/tmp", "/var/tmp", "/run", "/var/lib/dhcp"))


def test_the_machine_id_is_made_at_boot(tree: Tree) -> None:
    seal.seal(tree, debian.family)
    assert tree.read("/etc/machine-id") == ""
    assert tree.path("/var/lib/dbus/machine-id", follow=False).readlink() == Path("/etc/machine-id")


def test_logs_are_emptied_and_keep_their_modes(tree: Tree) -> None:
    seal.seal(tree, debian.family)
    log = tree.path("/var/log/auth.log").stat()
    assert (log.st_size, log.st_mode & 0o777) == (0, 0o640)


def test_links_to_the_host_are_not_followed(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("ssh_host_rsa_key", "x.lease", "a.log", "file"):
        (outside / name).parent.mkdir(exist_ok=True)
        (outside / name).write_text("the host's")
    for name in ("/etc/ssh", "/var/lib/dhcp", "/var/log", "/var/tmp", "/etc/lvm/devices"):
        tree.remove(name)
        tree.link(name, str(outside))
    tree.link("/home/evil", str(outside))
    tree.link("/home/joe/.bash_history", str(outside / "file"))
    seal.seal(tree, debian.family)
    assert sorted(path.name for path in outside.iterdir()) == ["a.log", "file", "ssh_host_rsa_key", "x.lease"]
    assert {path.read_text() for path in outside.iterdir()} == {"the host's"}


def test_what_the_build_wrote_gets_the_builds_time(tree: Tree) -> None:
    old = tree.path("/etc/fstab")
    os.utime(old, (EPOCH - 1000, EPOCH - 1000))
    tree.link("/etc/link", "nowhere")
    with process.variables(SOURCE_DATE_EPOCH=str(EPOCH)):
        seal.seal(tree, debian.family)
    assert old.stat().st_mtime == EPOCH - 1000
    times = {path.lstat().st_mtime for path in tree.root.rglob("*") if path != old}
    assert times == {EPOCH}


def test_debian_makes_host_keys_at_the_first_boot(tree: Tree) -> None:
    tree.write("/usr/lib/systemd/system/ssh.service", "[Service]\n")
    seal.seal(tree, debian.family)
    drop_in = tree.read("/etc/systemd/system/ssh.service.d/host-keys.conf")
    assert "After=ssh-host-key@ed25519.service ssh-host-key@ecdsa.service\n" in drop_in
    assert tree.exists("/etc/systemd/system/ssh-host-key@.service")
