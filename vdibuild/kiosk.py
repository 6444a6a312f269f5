"""The kiosk: what makes a live system a station, and the settings on its card.

overlays/kiosk and station.py are what runs in it; its settings are `client.conf` on the partition KIOSKCFG,
which is read and changed in place, by mtools: nothing is mounted.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vdibuild import process, station
from vdibuild.errors import InputError, VdibuildError
from vdibuild.live import build as live
from vdibuild.live.build import Kind
from vdibuild.live.initramfs import Contents
from vdibuild.pipeline import Built
from vdibuild.settings.live_systems import KIOSK
from vdibuild.site import Site
from vdibuild.station import Span

# RAID controllers, SAS, Fibre Channel, iSCSI, InfiniBand, and disks on the network.
_SERVERS_DISKS = tuple(
    """
    3w_9xxx 3w_sas 3w_xxxx aacraid aic79xx aic94xx arcmsr esas2r hpsa hptiop ipr ips isci megaraid
    megaraid_mbox megaraid_mm megaraid_sas mpi3mr mpt3sas mtip32xx mvsas mvumi myrb myrs pm80xx pmcraid
    smartpqi stex bfa bnx2fc csiostor efct fcoe fnic libfc libfcoe lpfc mptfc qedf qla2xxx
    scsi_transport_fc snic nvme_fc nvme_fcloop nvmet_fc tcm_fc tcm_qla2xxx be2iscsi bnx2i cxgb3i cxgb4i
    iscsi_tcp libcxgbi libiscsi qedi qla4xxx ib_iser ib_isert ib_srp ib_srpt rnbd_client rnbd_server
    nvme_rdma nvmet_rdma aoe drbd nbd rbd nvme_tcp nvmet nvmet_tcp target_core_mod
    """.split()  # noqa: SIM905 (as a list it would be a page)
)

# It starts from a CD, a USB stick or an SD card in any reader, of any machine; of its disks it wants nothing.
CONTENTS = Contents(
    modules=("pollcdrom", "vdibuild-check", "vdibuild-coldplug"),
    drivers=(
        *("sr_mod", "sd_mod", "cdrom", "ahci", "ata_piix", "nvme"),
        *("usb_storage", "uas", "xhci_pci", "ehci_pci", "uhci_hcd", "ohci_pci"),
        *("mmc_block", "sdhci_pci", "sdhci_acpi", "rtsx_pci_sdmmc", "rtsx_usb_sdmmc"),
        *("virtio_blk", "virtio_pci", "virtio_scsi"),
    ),
    omitted=(
        *(
            "btrfs",
            "crypt",
            "dmraid",
            "hwdb",
            "kernel-modules-extra",
            "lunmask",
            "lvm",
            "mdraid",
            "multipath",
        ),
        # A systemd of its own takes as long to begin as the system's, and has nothing to do here.
        *("nvdimm", "plymouth", "resume", "shutdown", "systemd", "virtfs", "virtiofs"),
    ),
    left_out=_SERVERS_DISKS,
)

KIND = Kind(
    title="Station",
    prefix="KIOSK",
    contents=CONTENTS,
    closed=True,
    software=("station", "station_guard", "station_screen"),
    # The kernel keeps three blocks of small files: of large blocks it would unpack the same again and again.
    block=128,
    # What is on the medium beside it, and what udev's hwdb.bin was made of.
    left_out=("/usr/lib/grub", "/usr/lib/shim", "/usr/lib/udev/hwdb.d"),
)


_CHECK = "vdibuild.check"  # asks the dracut module vdibuild-check to compare the medium with its digests

_HEADER = """\
# The settings of this station: `./inv kiosk.configure` changes them, as does any editor. docs/kiosk.md
# explains them. Lines without a value are as good as none.
"""
_FIRST = ("server_ip", "vdi_signal_port", "vdi_spice_port", "animation_folder", "background_folder")


def client_conf(settings: Mapping[str, str]) -> str:
    """The text of a new client.conf: the keys of the old scripts, and what the site sets.

    Raises SettingsError for a setting that is wrong.
    """
    for key, value in settings.items():
        station.check(key, value)
    keys = dict.fromkeys([*_FIRST, *settings])
    return _HEADER + "".join(f"{key}={settings.get(key, '')}\n" for key in keys)


def build(loaded: Site, *, fresh: bool = False, keep: bool = False, promote: bool = True) -> Built:
    """Build the kiosk and publish it as a new version, or find that nothing changed.

    fresh: take no finished step of an earlier run. keep: leave the directory of a step that fails. promote:
    make the version the current one. Raises the errors of the parts.
    """
    # Not checked by the site's models: their code is part of what every image is made from.
    try:
        conf = client_conf(loaded.kiosk.settings)
    except station.SettingsError as error:
        raise InputError(loaded.source, None, f"kiosk.settings.{error.message}") from None
    kind = replace(
        KIND,
        arguments=_CHECK if loaded.kiosk.check == "medium" else "",
        verified=loaded.kiosk.check == "verity",
        settings={station.CLIENT_CONF: conf},
    )
    return live.build(loaded, KIOSK, loaded.kiosk, kind, fresh=fresh, keep=keep, promote=promote)


def settings(medium: Path) -> str:
    """The client.conf of an ISO or a card. Raises VdibuildError where there is none."""
    found = _of_medium(medium)
    if found is None:
        raise VdibuildError(f"{medium} has no settings: it is no kiosk, or a damaged one")
    return found


def configure(medium: Path, changes: Mapping[str, str], ca: Path | None = None) -> None:
    """Change settings of an ISO or a card, in place.

    changes: values by key; an empty one takes a setting back. ca: the certificates that the server is known
    by, PEM. Everything is checked before anything is changed. Raises InputError for a wrong setting,
    VdibuildError for a medium without a place for settings.
    """
    text = changed(settings(medium), changes, str(medium))
    _put(f"{medium}@@{place(medium).start}", text, ca)
    with medium.open("r+b") as file:
        os.fsync(file)


def partition_with(image: Path, changes: Mapping[str, str], ca: Path | None = None) -> tuple[Span, bytes]:
    """An image's partition for settings, as it is after `configure`: where it is, and its bytes."""
    text = changed(settings(image), changes, str(image))
    span = place(image)
    with tempfile.TemporaryDirectory(prefix="vdibuild-settings-") as private:
        copy = Path(private) / "settings.img"
        with image.open("rb") as file:
            file.seek(span.start)
            copy.write_bytes(file.read(span.length))
        _put(str(copy), text, ca)
        return span, copy.read_bytes()


def changed(text: str, changes: Mapping[str, str], source: str) -> str:
    """A client.conf with some values changed; its other lines stay as they are. Raises InputError."""
    lines = text.splitlines()
    for key, value in changes.items():
        try:
            if value or key not in station.KEYS:
                station.check(key, value)
        except station.SettingsError as error:
            raise InputError(f"--set {key}={value}", None, error.message) from None
        found = [number for number, line in enumerate(lines) if line.partition("=")[0].strip() == key]
        new = f"{key}={value}"
        if found:
            lines[found[0]] = new
        else:
            lines.append(new)
    result = "".join(f"{line}\n" for line in lines)
    try:
        station.read(station.Source(station.CLIENT_CONF, result))
    except station.SettingsError as error:
        raise InputError(f"{source}: {error.source}", error.line, error.message) from None
    return result


def _of_medium(medium: Path) -> str | None:
    try:
        return station.of_medium(medium, station.CLIENT_CONF)
    except station.SettingsError as error:
        raise VdibuildError(f"{medium}: {error}") from None


def place(medium: Path) -> Span:
    """Where a medium's settings are. Raises VdibuildError where there are none."""
    found = station.partition(medium, station.PARTITION)
    if found is None:
        raise VdibuildError(f"{medium} has no partition {station.PARTITION}")
    return found


def _put(image: str, text: str, ca: Path | None) -> None:
    """Put files into a FAT file system, by mtools. image: as mtools name it."""
    with tempfile.TemporaryDirectory(prefix="vdibuild-settings-") as private:
        file = Path(private) / station.CLIENT_CONF
        file.write_text(text, encoding="utf-8")
        files = [(file, station.CLIENT_CONF), *([(ca, station.CA)] if ca else [])]
        for source, name in files:
            argv = ["mcopy", "-i", image, "-o", "-Q", str(source), f"::/{name}"]
            process.run(argv, env={"MTOOLSRC": "/dev/null", "MTOOLS_SKIP_CHECK": "1"})
