"""The initramfs of a live system, made by the tree's own dracut, for any machine.

dracut's module dmsquash-live finds the medium by its label, mounts the squashfs on it, and lays an overlay
in memory over it (dracut.cmdline(7), "Booting live images").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vdibuild import progress
from vdibuild.errors import VdibuildError
from vdibuild.tree import Tree

_LIVE_MODULE = "dmsquash-live"
_FILE_SYSTEMS = ("squashfs", "overlay", "iso9660")
_LOOP = "loop"
_OVERLAY_RENAMED = 110  # dracut's version that calls rd.live.overlay.overlayfs rd.overlay


@dataclass(frozen=True)
class Contents:
    """What is in an initramfs, besides what every live system needs.

    modules: of dracut. drivers: of the kernel. alone: nothing else is in it, for a machine that is known;
    otherwise they are added to all that dracut puts in for machines that are not, but for file systems that a
    live system does not have. omitted: dracut's modules that stay out whatever asks for them. left_out: the
    kernel's drivers that do.
    """

    modules: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()
    alone: bool = False
    omitted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def make(tree: Tree, kernel: str, contents: Contents, output: str) -> None:
    """Make the initramfs for a kernel.

    kernel: its release, as in /lib/modules. output: the path of the tree that gets it. Raises VdibuildError
    when the tree lacks dracut, its module for live systems, the kernel's modules or zstd; CommandError.
    """
    _check(tree, kernel)
    modules = " ".join((_LIVE_MODULE, *contents.modules))
    drivers = " ".join((*_FILE_SYSTEMS, _LOOP, *contents.drivers))
    options = ["--force", "--no-hostonly", "--no-hostonly-cmdline", "--reproducible", "--kver", kernel]
    # Named, since without the program dracut would take gzip, and not say so. Level 19 would take a minute
    # of processor time to make it a tenth smaller.
    options += ["--compress", "zstd -9 -T0"]
    if contents.alone:
        options += ["--modules", modules, "--drivers", drivers]
    else:
        options += ["--add", modules, "--add-drivers", drivers, "--filesystems", " ".join(_FILE_SYSTEMS)]
    if contents.omitted:
        options += ["--omit", " ".join(contents.omitted)]
    if contents.left_out:
        options += ["--omit-drivers", " ".join(contents.left_out)]
    with progress.step("initramfs"):
        tree.run(["dracut", *options, output])
        # dracut's is for root alone, as hostonly ones hold secrets; this one is read by whoever boots it.
        tree.path(output).chmod(0o644)


def overlay_argument(tree: Tree) -> str:
    """The kernel argument by which the tree's dracut lays the overlay in memory over the squashfs."""
    said = tree.run(["dracut", "--version"], capture=True).stdout
    version = re.search(r"\d+", said)
    if version and int(version[0]) >= _OVERLAY_RENAMED:
        return "rd.overlay=1"
    return "rd.live.overlay.overlayfs=1"


def _check(tree: Tree, kernel: str) -> None:
    if not tree.glob(f"/usr/lib/dracut/modules.d/*{_LIVE_MODULE}"):
        raise VdibuildError(
            "the system has no dracut for live systems",
            "add to the kickstart's %packages: dracut and dracut-live (Debian), dracut-live (Fedora, EL)",
        )
    if not tree.exists("/usr/bin/zstd"):
        raise VdibuildError("the system cannot compress its initramfs", "add zstd to %packages")
    if not tree.exists(f"/usr/lib/modules/{kernel}/modules.dep"):
        raise VdibuildError(f"the system has no modules of the kernel {kernel}", "add them to %packages")
