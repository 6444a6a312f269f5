"""The other builders of images that the golden pipeline is measured against, from Debian's packages.

Each gets the same task and gives back a raw disk; the recipes are the templates in
recipes/. They run as root, in mount and process namespaces of their own, and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2

from vdibuild import process
from vdibuild.recipe import Packages
from vdibuild.tree import host_command

_TEMPLATES = Path(__file__).parent / "recipes"
_DOCUMENTATION = ("doc", "doc-base", "groff", "info", "linda", "lintian", "man")


@dataclass(frozen=True)
class Source:
    """A Debian archive's suite."""

    url: str
    suite: str


@dataclass(frozen=True)
class Task:
    """What every builder is to build: a disk of `size` MiB that boots from BIOS, with one ext4 file system.

    mirror: where the release itself comes from; sources: all suites. append: the kernel's arguments.
    excluded_paths, kept_paths: what dpkg leaves out of packages, and what of that it does not (dpkg(1),
    --path-exclude).
    """

    release: str
    mirror: str
    sources: tuple[Source, ...]
    packages: tuple[str, ...]
    size: int
    hostname: str
    append: str
    services: tuple[str, ...]
    excluded_paths: tuple[str, ...]
    kept_paths: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """Another builder.

    package: Debian's package of it; commands: what it needs on PATH, each with the package that has it.
    note: what a reader of the figures should know.
    """

    name: str
    package: str
    commands: dict[str, str]
    build: Callable[[Task, Path], Path]
    note: str

    def missing(self) -> list[str]:
        """The packages that this host lacks to run it."""
        return sorted({package for command, package in self.commands.items() if not process.find(command)})

    def version(self) -> str:
        """The version of its package."""
        return package_version(self.package)


def package_version(name: str) -> str:
    """The version of an installed Debian package; empty when it is not there."""
    asked = ["dpkg-query", "--show", "--showformat=${Version}", name]
    return process.run(asked, capture=True, check=False).stdout.strip()


def left_out(packages: Packages) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a kickstart leaves out of packages, and what of that it does not, as in a Task."""
    excluded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    if not packages.documentation:
        excluded = tuple(f"/usr/share/{kind}/*" for kind in _DOCUMENTATION)
        kept = ("/usr/share/doc/*/copyright",)
    if packages.translations is not None:
        excluded += ("/usr/share/locale/*",)
        kept += ("/usr/share/locale/locale.alias",)
    return excluded, kept


def render(task: object, work: Path, template: str, target: str, **values: object) -> Path:
    """Write a recipe for a builder: a template of recipes/, as a file of its directory. Returns the file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 (no HTML)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    path = work / target
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(f"{template}.j2").render(task=task, work=work, **values))
    return path


def _mkosi(task: Task, work: Path) -> Path:
    (work / "workspace").mkdir()
    (work / "cache").mkdir()
    render(task, work, "mkosi.default", "mkosi.default")
    # mkosi writes a release's security archive itself, at its own address; the late skeleton replaces that.
    for source in task.sources:
        if source.suite != task.release:
            name = f"skeleton/etc/apt/sources.list.d/{source.suite}.list"
            render(task, work, "source.list", name, source=source)
    render(task, work, "mkosi.finalize", "finalize").chmod(0o755)
    render(task, work, "finish.sh", "finish.sh")
    argv = ["mkosi", "--directory", str(work), "--default", "mkosi.default", "--bios-size=1M"]
    if not Path("/run/systemd/system").exists():
        argv.append("--nspawn-keep-unit")  # nobody is there to ask for a unit of its own
    argv.append("build")
    process.run(host_command(argv), cwd=work)
    return work / f"debian~{task.release}" / "disk.raw"


def _vmdb2(task: Task, work: Path) -> Path:
    disk = work / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(task.size << 20)
    with _loop(disk) as device:
        render(task, work, "dpkg.cfg", "dpkg.cfg")
        render(task, work, "sources.list", "sources.list")
        render(task, work, "finish.sh", "finish.sh")
        recipe = render(task, work, "vmdb2.yaml", "vmdb2.yaml", device=device)
        argv = ["vmdb2", "--image", device, "--log", "/dev/stdout", str(recipe)]
        # finish.sh makes the initramfs, once; the kernel's package and a trigger would each make one.
        process.run(host_command(argv), cwd=work, env={"INITRD": "No"})
    return disk


def _debos(task: Task, work: Path) -> Path:
    render(task, work, "dpkg.cfg", "overlay/etc/dpkg/dpkg.cfg.d/bench")
    render(task, work, "sources.list", "sources.list")
    render(task, work, "finish.sh", "finish.sh")
    render(task, work, "debos.yaml", "debos.yaml")
    argv = ["debos", "--disable-fakemachine", "--artifactdir", str(work), "debos.yaml"]
    with _udev(work) as path:
        process.run(host_command(argv), cwd=work, env={"PATH": path})
    return work / "disk.raw"


@contextlib.contextmanager
def _udev(work: Path) -> Iterator[str]:
    """debos on a host without udev: gives the PATH to run it with.

    It shows /dev/disk to its containers, which has to be there, and calls `udevadm trigger --settle`, which
    waits without end for a daemon that does not run; the kernel itself makes the device nodes.
    """
    path = process.environment()["PATH"]
    if Path("/run/udev/control").exists():
        yield path
        return
    stand_in = work / "bin/udevadm"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\nexit 0\n")
    stand_in.chmod(0o755)
    links = Path("/dev/disk")
    made = not links.exists()
    links.mkdir(exist_ok=True)
    try:
        yield f"{stand_in.parent}:{path}"
    finally:
        if made:
            links.rmdir()


@contextlib.contextmanager
def _loop(image: Path) -> Iterator[str]:
    device = process.run(["losetup", "--find", "--show", str(image)], capture=True).stdout.strip()
    try:
        yield device
    finally:
        process.run(["losetup", "--detach", device])


@contextlib.contextmanager
def working(directory: Path) -> Iterator[Path]:
    """A new directory for a peer's build; it goes away afterwards with every loop device on its files.

    The peers' own mounts have ended with their mount namespace.
    """
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        listed = process.run(
            ["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"], capture=True
        ).stdout
        for device, backing in re.findall(r"^(\S+)\s+(.+?)(?: \(deleted\))?$", listed, re.MULTILINE):
            if Path(backing).is_relative_to(directory):
                process.run(["losetup", "--detach", device], check=False)
        shutil.rmtree(directory)


_COMMON = {
    "losetup": "mount",
    "findmnt": "util-linux",
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "mkfs.ext4": "e2fsprogs",
    "parted": "parted",
}

PEERS = (
    Peer(
        "mkosi",
        "mkosi",
        {"mkosi": "mkosi", **_COMMON},
        _mkosi,
        "GPT, GRUB by a finalize script (it has UEFI boot loaders only); leaves out translations as well",
    ),
    Peer(
        "vmdb2",
        "vmdb2",
        {"vmdb2": "vmdb2", **_COMMON},
        _vmdb2,
        "on a loop device made beforehand; its apt step adds eatmydata to the image",
    ),
    Peer(
        "debos",
        "debos",
        {"debos": "debos", **_COMMON},
        _debos,
        "with --disable-fakemachine, its fastest way according to its manual",
    ),
)
