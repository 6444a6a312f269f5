"""A small Debian made for real, as root and as an ordinary user: settings, overlays, scripts, a playbook."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdibuild import process, rootfs, tree
from vdibuild.disk import layout, seal
from vdibuild.errors import CommandError, InputError
from vdibuild.families import debian, systemd
from vdibuild.recipe import (
    Bootloader,
    Group,
    NetworkInterface,
    Packages,
    Password,
    Recipe,
    Repository,
    Script,
    SshKey,
    Storage,
    User,
    Volume,
)
from vdibuild.settings.images import Image
from vdibuild.tree import Tree

EPOCH = "1763000000"
HASH = "$6$salt$hash"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@example.org"

TEXT = """\
lang de_AT.UTF-8
services --enabled=ssh,mine --disabled=apt-daily.timer
%packages --nocore --excludedocs
systemd-sysv
openssh-server
locales
python3
fontconfig
-nano
%end
"""


def image() -> Image:
    return Image(family="debian", release="trixie", kickstart="small.ks", overlays=["mine"])


def recipe(**settings: Any) -> Recipe:
    names = ("systemd-sysv", "openssh-server", "locales", "python3", "fontconfig")
    values: dict[str, Any] = {
        "text": TEXT,
        "source": Path("small.ks"),
        "url": Repository("main", debian.family.mirrors(image())["main"], 1),
        "language": "de_AT.UTF-8",
        "keyboard": "de (nodeadkeys)",
        "timezone": "Etc/UTC",
        "hostname": "small.example.org",
        "root_password": Password("", locked=True),
        "groups": (Group("staffers", 5, gid=2000),),
        "users": (User("joe", Password(HASH, locked=False), 6, groups=("staffers",), uid=1234),),
        "ssh_keys": (SshKey("joe", KEY, 7),),
        "interfaces": (NetworkInterface("link", 8),),
        "services_enabled": ("ssh", "mine"),
        "services_disabled": ("apt-daily.timer",),
        "packages": Packages(names, excluded_names=("nano",), core=False, documentation=False),
    }
    return Recipe(**values | settings)


def make(directory: Path, downloads: Path) -> Tree:
    """Bootstrap, configure and seal the small system in directory/root."""
    unit = directory / "overlays/mine/etc/systemd/system/mine.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
    private = directory / "overlays/mine/home/joe/.profile"
    private.parent.mkdir(parents=True)
    private.write_text("umask 077\n")
    with process.variables(SOURCE_DATE_EPOCH=EPOCH):
        debian.family.bootstrap(recipe(), image(), directory / "root", downloads)
        made = Tree(directory / "root")
        rootfs.customise(made, debian.family, recipe(), image(), directory)
        seal.seal(made, debian.family)
    return made


def listing(made: Tree) -> str:
    """Everything of a tree that two builds have to have in common, as its own root sees it."""
    find = ["find", ".", "-xdev", "-printf", r"%p %y %m %U %G %T@ %l\n"]
    entries = process.run(tree.host_command(find), cwd=made.root, capture=True).stdout
    # Sizes and contents of files; a directory's size is its history.
    sums = ["find", ".", "-xdev", "-type", "f", "-exec", "sha256sum", "{}", "+"]
    contents = process.run(tree.host_command(sums), cwd=made.root, capture=True).stdout
    return "\n".join(sorted([*entries.splitlines(), *contents.splitlines()]))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that others can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="vdi-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def pristine(place: Path) -> Iterator[Tree]:
    """The small system; not to be changed."""
    made = make(place / "first", place / "downloads")
    yield made
    tree.remove(made.root)


@pytest.fixture(scope="module")
def system(pristine: Tree, place: Path) -> Iterator[Tree]:
    """A copy of it, which every test changes in a place of its own."""
    process.run(tree.host_command(["cp", "--archive", str(pristine.root), str(place / "changed")]))
    yield Tree(place / "changed")
    tree.remove(place / "changed")


class TestMade:
    def test_accounts(self, pristine: Tree) -> None:
        shadow = dict(line.split(":")[:2] for line in pristine.read("/etc/shadow").splitlines())
        assert (shadow["root"], shadow["joe"]) == ("!", HASH)
        assert "joe:x:1234:1234::/home/joe:/bin/bash" in pristine.read("/etc/passwd")
        assert "staffers:x:2000:joe" in pristine.read("/etc/group")
        seen = pristine.run(
            ["stat", "-c", "%a %u %n", "/home/joe/.ssh", "/home/joe/.ssh/authorized_keys"], capture=True
        )
        assert seen.stdout == "700 1234 /home/joe/.ssh\n600 1234 /home/joe/.ssh/authorized_keys\n"
        assert pristine.run(["cat", "/home/joe/.ssh/authorized_keys"], capture=True).stdout == f"{KEY}\n"

    def test_settings(self, pristine: Tree) -> None:
        assert pristine.read("/etc/hostname") == "small.example.org\n"
        assert pristine.run(["locale", "-a"], capture=True).stdout.split() == [
            "C",
            "C.utf8",
            "POSIX",
            "de_AT.utf8",
        ]
        assert pristine.read("/etc/default/locale") == "LANG=de_AT.UTF-8\n"
        assert 'XKBVARIANT="nodeadkeys"' in pristine.read("/etc/default/keyboard")
        assert "DHCP=yes" in pristine.read("/etc/systemd/network/20-wired.network")

    def test_services(self, pristine: Tree) -> None:
        asked = ["ssh.service", "mine.service", "systemd-networkd.service", "apt-daily.timer"]
        states = pristine.run(["systemctl", "--root=/", "is-enabled", *asked], capture=True, check=False)
        assert states.stdout.split() == ["enabled", "enabled", "enabled", "disabled"]

    def test_overlays_reach_a_users_directory(self, pristine: Tree) -> None:
        assert pristine.run(["cat", "/home/joe/.profile"], capture=True).stdout == "umask 077\n"

    def test_apt_knows_the_recipes_archives_and_their_keys(self, pristine: Tree) -> None:
        fields = dict(
            line.split(": ", 1)
            for line in pristine.read("/etc/apt/sources.list.d/debian.sources").splitlines()
        )
        assert (fields["Suites"], fields["Components"]) == ("trixie", "main")
        assert pristine.exists(fields["Signed-By"])

    def test_packages(self, pristine: Tree) -> None:
        installed = {package.name: package for package in debian.family.installed(pristine)}
        assert "openssh-server" in installed and "nano" not in installed
        assert installed["openssh-server"].source == "openssh"

    def test_documentation_is_left_out_licences_are_not(self, pristine: Tree) -> None:
        kept = {Path(name).name for name in pristine.glob("/usr/share/doc/*/*")}
        assert kept == {"copyright"}
        assert pristine.glob("/usr/share/man/man1/*") == []

    def test_nothing_of_the_build_is_left(self, pristine: Tree) -> None:
        for pattern in (
            "/etc/apt/apt.conf.d/*mmdebstrap*",
            "/etc/dpkg/dpkg.cfg.d/*mmdebstrap*",
            "/etc/apt/preferences.d/*",
            "/etc/resolv.conf",
            "/dev/*",
            "/run/*",
            "/tmp/*",  # noqa: S108 (the tree's)
            "/var/lib/apt/lists/*",
            "/var/cache/apt/archives/*",
            "/etc/ssh/ssh_host_*",
        ):
            assert pristine.glob(pattern) == [], pattern
        assert os.uname().nodename not in pristine.read("/etc/hosts")

    def test_packages_are_downloaded_once(self, pristine: Tree, place: Path) -> None:
        (store,) = (place / "downloads").iterdir()
        names = {path.name.partition("_")[0] for path in (store / "archives").iterdir()}
        assert {package.name for package in debian.family.installed(pristine)} <= names


def test_programs_take_the_fonts_from_the_cache(system: Tree) -> None:
    said = system.run(["fc-cache", "--system-only", "--verbose"], capture=True).stdout
    assert "/usr/share/fonts/truetype/dejavu: skipping, existing cache is valid" in said
    assert "caching, new cache contents" not in said
    assert "invalid" not in said


def test_an_ordinary_user_gets_the_same_tree(pristine: Tree, place: Path) -> None:
    """Also shows that two builds are the same: nothing of the first is used but its downloads."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    prefix: list[str] = []
    if os.geteuid() == 0:
        name = "vdibuild-test"
        process.run(["useradd", "--create-home", name])
        prefix = ["setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups", "--"]
    try:
        own = place / "second"
        own.mkdir()
        shutil.copytree(place / "downloads", own / "downloads")
        process.run(["chown", "--recursive", f"{name}:", str(own)])
        env = {"HOME": pwd.getpwnam(name).pw_dir}
        ended = subprocess.run(
            [*prefix, sys.executable, "-m", "tests.guest.test_rootfs", str(own)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        differing = set(json.loads(ended.stdout).splitlines()) ^ set(listing(pristine).splitlines())
        assert sorted(differing) == []
    finally:
        if os.geteuid() == 0:
            process.run(["userdel", "--remove", name], check=False)


class TestScripts:
    def script(self, text: str, **settings: Any) -> Script:
        return Script(text, 12, **settings)

    def run(self, system: Tree, text: str, **settings: Any) -> None:
        rootfs.run_script(system, self.script(text, **settings), Path("small.ks"))

    def test_in_the_tree(self, system: Tree) -> None:
        self.run(system, 'id -u > /etc/who; echo "$0" >> /etc/who; ls -d /work /home/* >> /etc/who || true')
        lines = system.read("/etc/who").splitlines()
        assert lines == ["0", "/run/vdibuild-post", "/home/joe"]
        assert system.glob("/run/*") == []

    def test_with_another_interpreter_and_a_log(self, system: Tree) -> None:
        self.run(
            system,
            "import sys\nprint('out')\nprint(sys.flags.utf8_mode, file=sys.stderr)\n",
            interpreter="/usr/bin/python3 -X utf8",
            log="/var/log/setup/post.log",
        )
        assert sorted(system.read("/var/log/setup/post.log").split()) == ["1", "out"]

    def test_a_log_does_not_leave_the_tree(self, system: Tree, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        system.link("/var/log/led-out", str(tmp_path / "outside"))
        self.run(system, "echo hello", log="/var/log/led-out/post.log")
        assert list((tmp_path / "outside").iterdir()) == []

    def test_failing(self, system: Tree) -> None:
        with pytest.raises(CommandError, match=r"small.ks:12: %post failed with status 3") as caught:
            self.run(system, "echo why >&2; exit 3", error_on_fail=True)
        assert caught.value.tail[-1] == "why"
        with pytest.raises(CommandError) as caught:
            self.run(system, "echo because; exit 3", error_on_fail=True, log="/root/log")
        assert caught.value.tail == ["because"]
        self.run(system, "exit 3")

    def test_on_the_host(self, system: Tree) -> None:
        self.run(
            system,
            'echo "$PWD" > "$ROOT/etc/from"; test "$ROOT" = "$ANA_INSTALL_PATH"',
            chroot=False,
            error_on_fail=True,
        )
        assert system.read("/etc/from").strip() == str(Path.cwd())

    def test_the_resolver_is_the_hosts_and_stays_out(self, system: Tree) -> None:
        script = self.script("cp /etc/resolv.conf /root/seen", error_on_fail=True)
        settings: dict[str, Any] = dict.fromkeys(("users", "groups", "ssh_keys", "interfaces"), ())
        again = recipe(scripts=(script,), services_enabled=(), services_disabled=(), **settings)
        bare = image().model_copy(update={"overlays": []})
        rootfs.customise(system, debian.family, again, bare, Path.cwd())
        assert system.path("/root/seen").read_bytes() == Path("/etc/resolv.conf").read_bytes()
        assert not system.exists("/etc/resolv.conf")


def test_programs_of_a_tree_know_nothing_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bin", "lib", "lib64"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    (tmp_path / "usr").mkdir()
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    printed = Tree(tmp_path).run(["env"], binds={Path("/usr"): "/usr"}, capture=True).stdout
    seen = dict(line.partition("=")[::2] for line in printed.splitlines())
    assert str(tmp_path) not in seen.values()
    assert seen["HOME"] == "/root"
    assert "USER" not in seen
    assert seen["https_proxy"] == "http://proxy.test:3128"


def test_a_service_that_is_not_there(system: Tree) -> None:
    bad = recipe(services_enabled=("mine", "sssh"), text=TEXT.replace("ssh,mine", "mine,sssh"))
    with pytest.raises(InputError, match=r"small.ks:2: cannot enable sssh: .*does not exist"):
        systemd.switch_services(system, bad)


def test_a_user_the_system_refuses(system: Tree) -> None:
    bad = recipe(groups=(), users=(User("new", Password("", locked=True), 9, groups=("nobodys",)),))
    with pytest.raises(InputError, match=r"small.ks:9: useradd: group 'nobodys' does not exist"):
        systemd.create_accounts(system, bad)


PLAYBOOK = """\
- hosts: all
  tasks:
    - copy:
        content: "by Ansible on {{ ansible_distribution }} {{ ansible_distribution_major_version }}"
        dest: /etc/motd
        mode: "0600"
    - copy:
        src: beside.txt
        dest: /etc/beside
    - command: id -u
      register: who
    - assert:
        that: who.stdout == "0"
    - user:
        name: ansible-made
"""


class TestPlaybook:
    def test_configures_the_tree(self, system: Tree, tmp_path: Path) -> None:
        (tmp_path / "site.yml").write_text(PLAYBOOK)
        (tmp_path / "beside.txt").write_text("beside")
        rootfs.run_playbook(system, tmp_path / "site.yml")
        assert system.read("/etc/motd") == "by Ansible on Debian 13"
        assert system.path("/etc/motd").stat().st_mode & 0o777 == 0o600
        assert system.read("/etc/beside") == "beside"
        assert "ansible-made:" in system.read("/etc/passwd")
        assert system.glob("/root/.ansible") == system.glob("/var/lib/vdibuild*") == []

    def test_failing(self, system: Tree, tmp_path: Path) -> None:
        (tmp_path / "site.yml").write_text("- hosts: all\n  tasks:\n    - command: /bin/false\n")
        with pytest.raises(CommandError, match="ansible-playbook failed with status 2"):
            rootfs.run_playbook(system, tmp_path / "site.yml")


class TestBoot:
    """With a stand-in for the kernel: what decides whether the initramfs is made again."""

    def plan(self) -> layout.Layout:
        volumes = (Volume("biosboot", "biosboot", 1, 1), Volume("/", "ext4", 500, 2, grow=True))
        return layout.plan(Storage(partitions=volumes), "bios", 1024, "gpt", "seed", Path("small.ks"))

    def prepare(self, system: Tree) -> int:
        """Prepare the tree for booting. Returns how many times an initramfs was made."""
        system.remove("/boot/made")
        system.write("/boot/vmlinuz-6.12", "kernel")
        system.write(
            "/usr/sbin/update-initramfs", '#!/bin/sh\necho "$*" >> /boot/made\ntouch /boot/initrd.img-6.12\n'
        )
        system.path("/usr/sbin/update-initramfs").chmod(0o755)
        debian.family.prepare_boot(
            system, recipe(bootloader=Bootloader("console=ttyS0", timeout=3)), self.plan(), Path()
        )
        return len(system.read("/boot/made").splitlines()) if system.exists("/boot/made") else 0

    def test_the_menu_and_fstab(self, system: Tree) -> None:
        assert self.prepare(system) == 1
        uuid = self.plan().mounts[0][1].uuid
        assert f"root=UUID={uuid} ro console=ttyS0" in system.read("/boot/grub/grub.cfg")
        assert f"UUID={uuid}" in system.read("/etc/fstab")
        assert system.run(["sh", "-n", "/etc/default/grub"]).status == 0

    def test_the_initramfs_is_made_when_something_changed(self, system: Tree) -> None:
        state = "/var/lib/initramfs-tools/vdibuild-inputs"
        system.write("/boot/initrd.img-6.12", "made in the bootstrap")
        system.write(state, debian._initramfs_inputs(system))
        assert self.prepare(system) == 0
        system.write("/etc/modprobe.d/mine.conf", "options mine x=1\n")
        assert self.prepare(system) == 1
        assert self.prepare(system) == 0


if __name__ == "__main__":
    # As another user: make the tree, and say what is in it.
    made_here = make(Path(sys.argv[1]), Path(sys.argv[1]) / "downloads")
    print(json.dumps(listing(made_here)))
    tree.remove(made_here.root)
