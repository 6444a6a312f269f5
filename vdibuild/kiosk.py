"""The kiosk: what makes a live system a station, and the settings on its card.

overlays/kiosk and station.py are what runs in it; its settings are `client.conf` on the partition KIOSKCFG,
which is read and changed in place, by mtools: nothing is mounted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vdibuild import site, station
from vdibuild.live import build as live
from vdibuild.live.build import Built, Kind
from vdibuild.live.initramfs import Contents
from vdibuild.site import Site

# It starts from a CD, a USB stick or an SD card in any reader, of any machine; of its disks it wants nothing.
CONTENTS = Contents(
    modules=("pollcdrom",),
    drivers=(
        *("sr_mod", "sd_mod", "cdrom", "ahci", "ata_piix", "nvme"),
        *("usb_storage", "uas", "xhci_pci", "ehci_pci", "uhci_hcd", "ohci_pci"),
        *("mmc_block", "sdhci_pci", "sdhci_acpi", "rtsx_pci_sdmmc", "rtsx_usb_sdmmc"),
        *("virtio_blk", "virtio_pci", "virtio_scsi"),
    ),
    omitted=("btrfs", "crypt", "dmraid", "lvm", "mdraid", "multipath", "plymouth", "resume"),
)

KIND = Kind(
    title="Station",
    prefix="KIOSK",
    contents=CONTENTS,
    software=("station", "station_screen"),
)


_HEADER = """\
# The settings of this station: `./inv kiosk.configure` changes them, as does any editor. docs/kiosk.md
# explains them. Lines without a value are as good as none.
"""
_FIRST = ("server_ip", "vdi_signal_port", "vdi_spice_port", "animation_folder", "background_folder")


def client_conf(settings: Mapping[str, str]) -> str:
    """The text of a new client.conf: the keys of the old scripts, and what the site sets."""
    keys = dict.fromkeys([*_FIRST, *settings])
    return _HEADER + "".join(f"{key}={settings.get(key, '')}\n" for key in keys)


def build(loaded: Site, *, fresh: bool = False, keep: bool = False, promote: bool = True) -> Built:
    """Build the kiosk and publish it as a new version, or find that nothing changed.

    fresh: take no finished step of an earlier run. keep: leave the directory of a step that fails. promote:
    make the version the current one. Raises the errors of the parts.
    """
    kind = replace(KIND, settings={station.CLIENT_CONF: client_conf(loaded.kiosk.settings)})
    return live.build(loaded, site.KIOSK, loaded.kiosk, kind, fresh=fresh, keep=keep, promote=promote)
