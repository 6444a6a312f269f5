"""Debian's live-build, given the same task as `build-kiosk-iso`: the peer of bench.kiosk.

It runs as root, in mount and process namespaces of its own, and leaves nothing behind. live-build knows
live-boot only, so that takes dracut's place; what it adds of its own accord beside that (live-config, a boot
menu that waits for a person, all fonts and modules of GRUB stay) is left out where its configuration can.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import peers
from vdibuild import process
from vdibuild.live.squashfs import Compression
from vdibuild.recipe import Recipe
from vdibuild.tree import host_command

NAME = "live-build"

_COMMANDS = {"lb": "live-build", "debootstrap": "debootstrap", "xorriso": "xorriso", "cpio": "cpio"}
_TEMPLATES = "live-build"
_REPLACED = ("dracut", "dracut-live")
"""The kickstart's packages whose work live-boot and initramfs-tools do."""
_OWN = ("live-boot", "live-boot-initramfs-tools", "initramfs-tools")
_IMAGE = "live-image-amd64.hybrid.iso"


@dataclass(frozen=True)
class Task:
    """What is to be built. recipe: what build-kiosk-iso builds. mirror, security: where the release's
    packages and its security updates come from. packages: in addition to the recipe's. trees: directories
    that are laid over the system, in this order. excluded_paths, kept_paths: see peers.Task.
    """

    recipe: Recipe
    release: str
    mirror: str
    security: str
    packages: tuple[str, ...]
    trees: tuple[Path, ...]
    compression: Compression
    excluded_paths: tuple[str, ...]
    kept_paths: tuple[str, ...]


def missing() -> list[str]:
    """The packages that this host lacks to run it."""
    return sorted({package for command, package in _COMMANDS.items() if not process.find(command)})


def version() -> str:
    """The version of its package."""
    return peers.package_version(NAME)


def build(task: Task, work: Path) -> Path:
    """Build the ISO in `work`, an empty directory; returns it."""
    process.run(["lb", "config", "--no-color", *_options(task)], cwd=work)
    config = work / "config"
    # live-build would add live-config, which sets up a desktop's user.
    names = [name for name in task.recipe.packages.names if name not in _REPLACED]
    _write(config / "package-lists/live.list.chroot", [*_OWN, *names, *task.packages])
    # It would take the programs' compiled code away, and they would be compiled at every start.
    (config / "hooks/normal/9010-remove-python-pyc.hook.chroot").unlink()
    # Kernel and initramfs are on the ISO beside the squashfs, as ours are.
    _write(config / "rootfs/excludes", ["boot/*"])
    for tree in task.trees:
        shutil.copytree(tree, config / "includes.chroot_after_packages", symlinks=True, dirs_exist_ok=True)
    for template, target in {
        "dpkg.cfg": "config/includes.chroot_before_packages/etc/dpkg/dpkg.cfg.d/bench",
        f"{_TEMPLATES}/grub.cfg": "config/bootloaders/grub-pc/grub.cfg",
        f"{_TEMPLATES}/station.sh": "config/hooks/normal/9900-station.hook.chroot",
    }.items():
        peers.render(task, work, template, target)
    block = {"MKSQUASHFS_OPTIONS": f"-b {task.compression.block}K"}
    process.run(host_command(["lb", "build", "--no-color"]), cwd=work, env=block)
    return work / _IMAGE


def _options(task: Task) -> list[str]:
    """live-build's settings (lb_config(1))."""
    compression = task.compression
    settings = {
        "distribution": task.release,
        "architecture": "amd64",
        "archive-areas": "main",
        "mirror-bootstrap": task.mirror,
        "mirror-chroot": task.mirror,
        "mirror-chroot-security": task.security,
        "mirror-binary": task.mirror,
        "mirror-binary-security": task.security,
        "security": "true" if task.security else "false",
        "debootstrap-options": "--variant=minbase",
        "apt-recommends": "false",
        "apt-indices": "false",
        "apt-source-archives": "false",
        # Keeping packages for another build takes time, and a build from nothing is what is measured.
        "cache": "false",
        "firmware-chroot": "false",
        "firmware-binary": "false",
        "bootloaders": "grub-pc,grub-efi",
        "uefi-secure-boot": "enable",
        "binary-image": "iso-hybrid",
        "chroot-squashfs-compression-type": compression.method,
        "iso-volume": "LIVE_BUILD",
        "bootappend-live": f"boot=live panic=30 {task.recipe.bootloader.append}",
        "bootappend-live-failsafe": "none",
        "zsync": "false",
    }
    if compression.method == "zstd":
        settings["chroot-squashfs-compression-level"] = str(compression.level)
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
