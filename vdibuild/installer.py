"""The installer: what makes a live system one that installs others by their kickstarts.

virt-install starts its kernel and initramfs, or its ISO; a kickstart that was put into the initramfs
(--initrd-inject) is in /run/install when the system runs, and is executed by install_agent.py.
"""

from __future__ import annotations

from vdibuild.live import build as live
from vdibuild.live import software
from vdibuild.live.build import Kind
from vdibuild.live.initramfs import Contents
from vdibuild.pipeline import Built
from vdibuild.settings.live_systems import INSTALLER
from vdibuild.site import Site
from vdibuild.store import Version

# It runs in machines that we define: virtio's devices, and a CD drive on SATA, IDE or SCSI. An initramfs with
# nothing else, and without a systemd of its own, is small and soon done, which counts under emulation.
CONTENTS = Contents(
    modules=(
        *("base", "bash", "fs-lib", "pollcdrom", "rootfs-block", "shutdown", "udev-rules"),
        "vdibuild-kickstart",
    ),
    drivers=(
        *("ahci", "ata_piix", "cdrom", "sd_mod", "sr_mod"),
        *("virtio_blk", "virtio_console", "virtio_pci", "virtio_scsi"),
    ),
    alone=True,
)

KIND = Kind(
    title="Install a system by its kickstart",
    prefix="INSTALL",
    contents=CONTENTS,
    software=("install_agent", "families.debian"),
    # It starts once and reads a little of many files; under emulation that is most of its time.
    block=128,
)


def current(version: Version) -> bool:
    """Whether a version of the installer runs the code that is here."""
    return version.described().inputs.get("software") == software.digest(KIND.software)


def build(loaded: Site, *, fresh: bool = False, keep: bool = False, promote: bool = True) -> Built:
    """Build the installer and publish it as a new version, or find that nothing changed.

    fresh: take no finished step of an earlier run. keep: leave the directory of a step that fails. promote:
    make the version the current one. Raises the errors of the parts.
    """
    return live.build(loaded, INSTALLER, loaded.installer, KIND, fresh=fresh, keep=keep, promote=promote)
