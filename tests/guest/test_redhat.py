"""Fedora's way to a system with real tools: rpmbuild's packages, dnf, and a disk that boots with them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import rpmrepo
from vdibuild import hashing, process
from vdibuild.disk import bootloader, layout, write
from vdibuild.disk.layout import Layout
from vdibuild.errors import HostError, InputError
from vdibuild.families import dnf, redhat
from vdibuild.recipe import Bootloader, Packages, Recipe, Repository, Storage, Volume
from vdibuild.settings.images import Image
from vdibuild.tree import Tree

KS = Path("fedora.ks.j2")
PROBE = """\
{ echo root: $(ls /); echo null: $(stat -c %F /dev/null); echo shell: $(cat /proc/self/comm); } >/etc/probe
"""


class Server:
    """Serves a directory on the loopback interface, and remembers what was asked for.

    stalls: keep those who ask for a package waiting until the end; `stalled` says that somebody did.
    """

    def __init__(self, directory: Path, stalls: bool = False) -> None:
        self.asked: list[str] = []
        self.stalled = threading.Event()
        self._released = threading.Event()
        asked, stalled, released = self.asked, self.stalled, self._released

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                if stalls and self.path.endswith(".rpm"):
                    stalled.set()
                    released.wait()
                super().do_GET()

            def log_request(self, code: object = "-", size: object = "-") -> None:
                asked.append(self.path)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self._released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def packages() -> list[rpmrepo.Package]:
    return [
        *rpmrepo.minimal(),
        rpmrepo.Package("probe", requires=("/bin/sh",), post=PROBE),
        rpmrepo.Package("wanting", requires=("needed",)),
        rpmrepo.Package("needed"),
        rpmrepo.Package("recommending", recommends=("recommended",)),
        rpmrepo.Package("recommended"),
        rpmrepo.Package("documented", documentation={"/usr/share/doc/documented/README": "Read me.\n"}),
    ]


GROUPS = [
    rpmrepo.Group("core", ("busybox", "testos-release"), ("recommended",)),
    rpmrepo.Group("extras", ("documented",)),
]
ENVIRONMENTS = [rpmrepo.Environment("whole-environment", ("core", "extras"))]


@pytest.fixture(scope="module")
def key() -> Iterator[rpmrepo.Key]:
    # The socket of GnuPG's agent has a path of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vdi-") as short, rpmrepo.signing_key(Path(short)) as made:
        yield made


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, key: rpmrepo.Key) -> Path:
    return rpmrepo.build(tmp_path_factory.mktemp("signed"), packages(), GROUPS, ENVIRONMENTS, key)


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    running = Server(repository)
    yield running
    running.stop()


@pytest.fixture
def image(key: rpmrepo.Key) -> Image:
    return Image(family="redhat", release="fedora43", kickstart=str(KS), keyring=key.public)


def asking(url: str, *entries: str, **options: bool) -> Recipe:
    """A recipe for these entries of %packages, the first on line 3."""
    named = [entry for entry in entries if entry[0] not in "-@"]
    wanted = Packages(
        names=tuple(named),
        groups=tuple(entry[1:] for entry in entries if entry[0] == "@" and entry[1] != "^"),
        environment=next((entry[2:] for entry in entries if entry.startswith("@^")), ""),
        excluded_names=tuple(entry[1:] for entry in entries if entry[0] == "-"),
        core=options.get("core", False),
        documentation=options.get("documentation", True),
        weak_dependencies=options.get("weak", False),
        line=2,
    )
    text = "\n".join(["", "%packages", *entries, "%end", ""])
    return Recipe(text=text, source=KS, url=Repository("", url, 1), packages=wanted)


def names(root: Path) -> set[str]:
    return {package.name for package in redhat.family.installed(Tree(root))}


def test_groups_scriptlets_and_nothing_left_behind(repository: Path, image: Image, tmp_path: Path) -> None:
    root = tmp_path / "root"
    wanted = asking(
        repository.as_uri(), "probe", "documented", "-recommended", core=True, documentation=False
    )
    redhat.family.bootstrap(wanted, image, root, tmp_path / "downloads")
    assert names(root) == {"filesystem", "setup", "busybox", "testos-release", "probe", "documented"}
    probe = dict(line.split(": ") for line in (root / "etc/probe").read_text().splitlines())
    assert set(probe["root"].split()) <= {path.name for path in root.iterdir()}, (
        "the scriptlet ran in the tree"
    )
    assert probe["null"] == "character special file"
    assert probe["shell"] == "cat", "/proc is that of the scriptlet"
    assert not (root / "usr/share/doc/documented/README").exists()
    for empty in ("dev", "proc", "run", "var/cache", "tmp", "var/tmp"):
        assert list((root / empty).iterdir()) == [], empty
    database = root / "usr/lib/sysimage/rpm"
    assert sorted(path.name for path in database.iterdir()) == [".rpm.lock", "rpmdb.sqlite"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("dnf-")] == []
    assert f" {tmp_path}/" not in Path("/proc/self/mounts").read_text()


def test_the_targets_own_rpm_finds_its_database(repository: Path, image: Image, tmp_path: Path) -> None:
    for release, place in (("el9", "var/lib/rpm"), ("el10", "usr/lib/sysimage/rpm")):
        root = tmp_path / release
        wanted = asking(repository.as_uri(), "setup")
        redhat.family.bootstrap(
            wanted, image.model_copy(update={"release": release}), root, tmp_path / "downloads"
        )
        argv = ["rpm", f"--root={root}", f"--define=_dbpath /{place}", "--query", "--all", "--qf=%{NAME}\n"]
        listed = process.run(argv, capture=True).stdout.split()
        assert sorted(listed) == ["filesystem", "gpg-pubkey", "setup"]


def test_environments_and_weak_dependencies(repository: Path, image: Image, tmp_path: Path) -> None:
    url, downloads = repository.as_uri(), tmp_path / "downloads"
    redhat.family.bootstrap(asking(url, "@^whole-environment"), image, tmp_path / "1", downloads)
    assert {"busybox", "documented", "recommended"} <= names(tmp_path / "1")
    redhat.family.bootstrap(asking(url, "recommending"), image, tmp_path / "2", downloads)
    assert "recommended" not in names(tmp_path / "2")
    redhat.family.bootstrap(asking(url, "recommending", weak=True), image, tmp_path / "3", downloads)
    assert "recommended" in names(tmp_path / "3")


def test_installed_says_what_an_sbom_needs(repository: Path, image: Image, tmp_path: Path) -> None:
    redhat.family.bootstrap(asking(repository.as_uri(), "needed"), image, tmp_path / "root", tmp_path / "d")
    (package,) = redhat.family.installed(Tree(tmp_path / "root"))
    assert (package.name, package.version, package.source, package.license) == (
        "needed",
        rpmrepo.VERSION,
        "testos",
        "MIT",
    )


def test_the_same_packages_give_the_same_files(
    repository: Path, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    wanted, made = asking(repository.as_uri(), "probe", core=True), []
    for name in ("1", "2"):
        redhat.family.bootstrap(wanted, image, tmp_path / name, tmp_path / "downloads")
        redhat.family.seal(Tree(tmp_path / name))
        made.append(hashing.of_tree(tmp_path / name))
    assert made[0] == made[1]


def test_packages_are_downloaded_once(server: Server, image: Image, tmp_path: Path) -> None:
    wanted, downloads = asking(server.url, "probe"), tmp_path / "downloads"
    redhat.family.bootstrap(wanted, image, tmp_path / "1", downloads)
    assert sum(path.endswith(".rpm") for path in server.asked) == 4
    server.asked.clear()
    # What a killed run leaves: the process id is that of some process in the next run's namespace.
    (downloads / "dnf" / "metadata_lock.pid").write_text("1")
    (downloads / "dnf" / "download_lock.pid").write_text("1")
    redhat.family.bootstrap(wanted, image, tmp_path / "2", downloads)
    assert names(tmp_path / "2") == names(tmp_path / "1")
    assert set(server.asked) == {"/repodata/repomd.xml"}


def test_a_new_version_is_seen_at_once(
    key: rpmrepo.Key, image: Image, tmp_path: Path, repository: Path
) -> None:
    own = tmp_path / "repository"
    shutil.copytree(repository, own)
    wanted, downloads = asking(own.as_uri(), "needed"), tmp_path / "downloads"
    before = redhat.family.repository_states(wanted, image)
    redhat.family.bootstrap(wanted, image, tmp_path / "1", downloads)
    (own / f"needed-{rpmrepo.VERSION}.x86_64.rpm").unlink()
    rpmrepo.index(own, GROUPS)
    assert redhat.family.repository_states(wanted, image) != before
    with pytest.raises(InputError, match="no package 'needed'"):
        redhat.family.bootstrap(wanted, image, tmp_path / "2", downloads)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("setup", "nosuch"), r"fedora\.ks\.j2:4: no package 'nosuch'"),
        (("@odd", "setup"), r"fedora\.ks\.j2:3: no group 'odd'"),
        (("@^odd-environment",), r"fedora\.ks\.j2:3: no group 'odd-environment'"),
        (("setup", "-setup"), r"fedora\.ks\.j2:3: package 'setup' is both wanted and excluded"),
        (("wanting", "-need*"), r"fedora\.ks\.j2:4: needed is excluded, but wanting needs it"),
        (("--installroot=/x",), r"fedora\.ks\.j2:3: '--installroot=/x' names no package"),
        ((), r"fedora\.ks\.j2:2: %packages asks for no package"),
    ],
)
def test_what_cannot_be_had_is_named_with_its_line(
    repository: Path, image: Image, tmp_path: Path, entries: tuple[str, ...], message: str
) -> None:
    wanted = asking(repository.as_uri(), *entries)
    if entries == ("--installroot=/x",):
        wanted = replace(wanted, packages=replace(wanted.packages, names=entries, excluded_names=()))
    with pytest.raises(InputError, match=message):
        redhat.family.bootstrap(wanted, image, tmp_path / "root", tmp_path / "downloads")


def test_a_package_of_the_site_file(repository: Path, image: Image, tmp_path: Path) -> None:
    more = image.model_copy(update={"packages": ["nosuch"]})
    with pytest.raises(InputError, match=r"'nosuch' \(of the image's `packages` in the site file\)"):
        redhat.family.bootstrap(asking(repository.as_uri(), "setup"), more, tmp_path / "r", tmp_path / "d")


def test_unsigned_packages_are_refused(image: Image, tmp_path: Path) -> None:
    unsigned = rpmrepo.build(tmp_path / "unsigned", rpmrepo.minimal())
    with pytest.raises(HostError, match="is not signed by a key of the image's keyring"):
        redhat.family.bootstrap(
            asking(unsigned.as_uri(), "setup"), image, tmp_path / "root", tmp_path / "downloads"
        )
    assert not (tmp_path / "root/etc/passwd").exists()


def test_packages_of_another_signer_are_refused(repository: Path, image: Image, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="vdi-") as short, rpmrepo.signing_key(Path(short)) as other:
        trusting = image.model_copy(update={"keyring": other.public})
        with pytest.raises(HostError, match="is not signed by a key of the image's keyring"):
            redhat.family.bootstrap(
                asking(repository.as_uri(), "setup"), trusting, tmp_path / "root", tmp_path / "downloads"
            )
    assert not (tmp_path / "root/etc/passwd").exists()


def test_a_repository_that_does_not_answer(image: Image, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"http://127\.0\.0\.1:9/os: Curl error \(7\)"):
        dnf.bootstrap(asking("http://127.0.0.1:9/os", "setup"), image, tmp_path / "root", tmp_path / "d")


ELSEWHERE = """
import json, sys
from pathlib import Path
from vdibuild.errors import VdibuildError
from vdibuild.families import redhat
from vdibuild.recipe import Packages, Recipe, Repository
from vdibuild.settings.images import Image
from vdibuild.tree import Tree, remove

url, keyring, directory = sys.argv[1:]
image = Image(family="redhat", release="fedora43", kickstart="x", keyring=Path(keyring))
packages = Packages(names=("probe", "needed"), core=False)
recipe = Recipe(text="", source=Path("x"), url=Repository("", url, 1), packages=packages)
root = Path(directory) / "root"
try:
    redhat.family.bootstrap(recipe, image, root, Path(directory) / "downloads")
    names = [package.name for package in redhat.family.installed(Tree(root))]
    print(json.dumps([names, (root / "etc/probe").read_text()]))
    remove(root)
except VdibuildError as error:
    print(json.dumps(error.message))
"""


def elsewhere(prefix: list[str], url: str, keyring: Path, directory: Path) -> Any:
    """What ELSEWHERE prints when it is run behind `prefix`."""
    checkout = Path(__file__).parents[2]
    argv = [*prefix, sys.executable, "-c", ELSEWHERE, url, str(keyring), str(directory)]
    ended = subprocess.run(argv, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout)


def ordinary_user() -> str | None:
    """Somebody with subordinate ids."""
    accounts = {entry.pw_name for entry in pwd.getpwall()}
    lines = Path("/etc/subuid").read_text().splitlines() if Path("/etc/subuid").exists() else []
    names = (line.partition(":")[0] for line in lines)
    return next((name for name in names if name in accounts and name != "root"), None)


def test_an_ordinary_user_needs_no_root(server: Server, key: rpmrepo.Key) -> None:
    name = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() else ordinary_user()
    if name is None:
        pytest.skip("no user on this host has subordinate ids (/etc/subuid)")
    with tempfile.TemporaryDirectory(prefix="vdi-") as directory:
        own = Path(directory)
        shutil.copyfile(key.public, own / "key")
        prefix = []
        if os.geteuid() == 0:
            shutil.chown(own, name)
            prefix = ["setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups", "--"]
        listed, probe = elsewhere(prefix, server.url, own / "key", own)
    assert {"busybox", "probe", "needed"} <= set(listed)
    assert "null: character special file" in probe


def test_a_full_disk(repository: Path, key: rpmrepo.Key, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # Room for dnf's index, not for the packages too.
    mounting = ["unshare", "--mount", "--", "sh", "-euc", 'mount -t tmpfs -o size=2m none "$0"; exec "$@"']
    if os.geteuid() != 0:
        mounting[1:1] = ["--user", "--map-root-user"]
    message = elsewhere([*mounting, str(small)], repository.as_uri(), key.public, small)
    assert message == f"no space left on the disk of {small}/root"


def processes_of(directory: Path) -> list[int]:
    """The processes whose home is below a directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"HOME={directory}/".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def test_a_killed_run_leaves_no_processes_and_no_mounts(
    repository: Path, key: rpmrepo.Key, tmp_path: Path
) -> None:
    stalling = Server(repository, stalls=True)
    argv = [sys.executable, "-c", ELSEWHERE, stalling.url, str(key.public), str(tmp_path)]
    try:
        with subprocess.Popen(argv, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as running:
            assert stalling.stalled.wait(60)
            assert processes_of(tmp_path)
            running.kill()
        end = time.monotonic() + 10
        while processes_of(tmp_path) and time.monotonic() < end:
            time.sleep(0.05)
        assert processes_of(tmp_path) == []
        assert f" {tmp_path}/" not in Path("/proc/self/mounts").read_text()
    finally:
        stalling.stop()
    shutil.rmtree(tmp_path / "root")
    listed, _ = elsewhere([], repository.as_uri(), key.public, tmp_path)
    assert "probe" in listed


INITRAMFS = """\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
for module in $(cat /modules); do insmod /$module; done
for word in $(cat /proc/cmdline); do case $word in root=UUID=*) uuid=${word#root=} ;; esac; done
while ! disk=$(findfs $uuid); do sleep 1; done
mount -t ext4 -o ro $disk /root
exec switch_root /root /usr/sbin/init
"""

INIT = """\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
echo "booted $(cat /etc/hostname) with $(cat /proc/cmdline)" >/dev/ttyS0
poweroff -f
"""


def kernel_version() -> str:
    """The newest kernel's of this host."""
    return max(path.name.removeprefix("vmlinuz-") for path in Path("/boot").glob("vmlinuz-*"))


def make_initramfs(directory: Path, script: str, drivers: Sequence[str]) -> Path:
    """An initramfs of busybox with a script as its init, and this host's drivers, in order in /modules."""
    version = kernel_version()
    initramfs = directory / "initramfs"
    for name in ("bin", "dev", "proc", "root"):
        (initramfs / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", initramfs / "bin/busybox")
    for applet in ("sh", "mount", "cat", "insmod", "findfs", "sleep", "switch_root", "mkdir"):
        (initramfs / "bin" / applet).symlink_to("busybox")
    modules: list[str] = []
    for wanted in drivers:
        argv = ["modprobe", "--ignore-install", "-S", version, "--show-depends", wanted]
        for line in process.run(argv, capture=True).stdout.splitlines():
            module = Path(line.split()[1])
            # It needs a processor's own instruction; the generic one is there too.
            if module.name not in (*modules, "crc32c-intel.ko"):
                shutil.copy(module, initramfs / module.name)
                modules.append(module.name)
    (initramfs / "modules").write_text("\n".join(modules))
    (initramfs / "init").write_text(script)
    (initramfs / "init").chmod(0o755)
    files = "".join(f"{path.relative_to(initramfs)}\n" for path in sorted(initramfs.rglob("*")))
    archive = directory / "initramfs.img"
    argv = ["cpio", "--quiet", "--create", "--format=newc", f"--file={archive}"]
    process.run(argv, cwd=initramfs, stdin=files)
    return archive


def kernel_packages(directory: Path) -> list[rpmrepo.Package]:
    """This host's kernel and GRUB as RPMs, with an initramfs that mounts the root file system."""
    version = kernel_version()
    archive = make_initramfs(directory, INITRAMFS, ("virtio_pci", "virtio_blk", "ext4"))
    grub = {str(path): path for path in Path("/usr/lib/grub/i386-pc").iterdir() if path.is_file()}
    return [
        rpmrepo.Package(
            "kernel-core",
            files={
                f"/usr/lib/modules/{version}/vmlinuz": Path(f"/boot/vmlinuz-{version}"),
                f"/boot/initramfs-{version}.img": archive,
            },
        ),
        rpmrepo.Package("grub2-pc-modules", files=grub),
        rpmrepo.Package(
            "init",
            requires=("/bin/sh",),
            files={"/usr/sbin/init": INIT, "/usr/bin/poweroff": "-> busybox"},
            executables=("/usr/sbin/init",),
        ),
        rpmrepo.Package(
            "shadow-utils",
            requires=("/bin/sh",),
            files={"/usr/bin/chpasswd": "#!/bin/sh\ncat >/etc/chpasswd\n"},
            executables=("/usr/bin/chpasswd",),
        ),
    ]


def disk_of_packages(key: rpmrepo.Key, image: Image, directory: Path, size: int) -> tuple[Path, Layout]:
    """A raw disk of `size` MiB with a system from packages.

    Not with boot loader entries: Debian's GRUB cannot read them, so the system gets a plain menu.
    """
    made = [*rpmrepo.minimal(), *kernel_packages(directory)]
    repository = rpmrepo.build(directory / "rpms", made, GROUPS, key=key)
    wanted = replace(
        asking(
            repository.as_uri(),
            "kernel-core",
            "grub2-pc-modules",
            "init",
            "shadow-utils",
            "busybox",
            "testos-release",
        ),
        hostname="from-rpms",
        bootloader=Bootloader(append="console=ttyS0 panic=-1", timeout=0),
        storage=Storage((Volume("/", "ext4", 200, 1, grow=True),)),
    )
    disk = layout.plan(wanted.storage, "bios", size, "msdos", "seed", KS)
    redhat.family.bootstrap(wanted, image, directory / "root", directory / "downloads")
    tree = Tree(directory / "root")
    redhat.family.configure(tree, wanted, image)
    redhat.family.prepare_boot(tree, wanted, disk, directory)
    redhat.family.seal(tree)
    boot = redhat.family.boot_files(tree)
    bootloader.prepare(tree, disk, boot)
    raw = directory / "disk.raw"
    write.write(tree, disk, boot, raw, "tcg")
    return raw, disk


def boots(disk: Path, form: str, planned: Layout) -> None:
    """Start a disk of packages, which turns itself off, and see that it is the one."""
    console = disk.with_name("console")
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-vga", "std"]
    argv += ["-display", "none", "-serial", f"file:{console}"]
    argv += ["-drive", f"file={disk},format={form},if=virtio,snapshot=on"]
    process.run(argv, deadline=300)
    said = console.read_text(errors="replace")
    assert "booted from-rpms with " in said, said[-2000:]
    assert f"root=UUID={planned.root.uuid} ro console=ttyS0 panic=-1" in said


def test_from_packages_to_a_disk_that_boots(key: rpmrepo.Key, image: Image, tmp_path: Path) -> None:
    raw, planned = disk_of_packages(key, image, tmp_path, 300)
    boots(raw, "raw", planned)
