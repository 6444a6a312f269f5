"""The argument list of virt-install: what a guest that runs an installer is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdibuild import machine, processor
from vdibuild.machine import Hardware
from vdibuild.settings.images import Network

LOG_PORT = "org.fedoraproject.anaconda.log.0"
"""The virtio-serial port that Anaconda writes its log to when it is there (Anaconda's boot option
inst.virtiolog, its default); our own installer uses it as well."""

MARK = "urn:vdibuild:install"
"""The namespace of the metadata element that says that a domain is ours."""

_ANY_LINUX = "linux2022"


@dataclass(frozen=True)
class Media:
    """What the installer is started from. location: an ISO, or a tree's URL, or empty. kernel, initrd: paths
    in the location, or on this host where there is none; empty where virt-install has to find them.
    """

    location: str = ""
    kernel: str = ""
    initrd: str = ""


@dataclass(frozen=True)
class ExtraDisk:
    """A raw image the installer may read. serial: names it in the guest: /dev/disk/by-id/virtio-SERIAL."""

    path: Path
    serial: str


@dataclass(frozen=True)
class Guest:
    """A guest that runs an installer.

    owner: who made it, for the mark. kickstart: the file; the installer has it in the root of its initramfs.
    volume: its disk, as POOL/VOLUME. disks: what else it can read. hardware: memory in MiB. osinfo: its
    system's name, empty to have it found. arguments: more words for the kernel.
    """

    name: str
    owner: str
    media: Media
    kickstart: Path
    volume: str
    hardware: Hardware
    network: Network
    disks: Sequence[ExtraDisk] = ()
    osinfo: str = ""
    arguments: Sequence[str] = ()


def command(guest: Guest, uri: str) -> list[str]:
    """The argument list that makes the guest and starts it; virt-install then ends, and the guest runs on.

    uri: the libvirt connection. Raises HostError when UEFI firmware is wanted and missing.
    """
    hardware = guest.hardware
    return [
        *("virt-install", "--connect", uri, "--name", guest.name),
        *("--memory", str(hardware.memory), "--vcpus", str(hardware.cores)),
        *("--virt-type", "kvm" if hardware.accelerator == "kvm" else "qemu"),
        *("--arch", "x86_64", "--machine", "q35"),
        *processor.virt_install(hardware.accelerator),
        *("--osinfo", f"name={guest.osinfo}" if guest.osinfo else f"detect=on,name={_ANY_LINUX}"),
        *_installer(guest.media),
        *("--initrd-inject", str(guest.kickstart)),
        *("--extra-args", " ".join(_kernel_arguments(guest))),
        *_firmware(hardware),
        *("--disk", f"vol={guest.volume},device=disk,bus=virtio,cache=unsafe,driver.discard=unmap"),
        *(word for disk in guest.disks for word in _extra_disk(disk)),
        *("--network", _network(guest.network)),
        *("--channel", f"unix,target.type=virtio,target.name={LOG_PORT}"),
        *("--serial", "pty", "--rng", "/dev/urandom"),
        # A screen for the picture of a failure, which nobody can connect to.
        *("--graphics", "none", "--video", "vga"),
        *("--xml", f"./metadata/build/@xmlns={MARK}"),
        *("--xml", f"./metadata/build/@name={guest.name}"),
        *("--xml", f"./metadata/build/@owner={guest.owner}"),
        *("--noautoconsole", "--noreboot"),
    ]


def _installer(media: Media) -> list[str]:
    pair = f"kernel={_escaped(media.kernel)},initrd={_escaped(media.initrd)}"
    if not media.location:
        return ["--install", pair]
    return ["--location", f"{_escaped(media.location)},{pair}" if media.kernel else media.location]


def _kernel_arguments(guest: Guest) -> list[str]:
    """The kernel's arguments: Anaconda's are documented as its boot options; ours reads the same ones."""
    # The last console is the one the installer talks on; the other one is in the picture.
    consoles = ["console=tty0", "console=ttyS0"]
    # Without tmux, which would redraw the console.
    anaconda = [f"inst.ks=file:/{guest.kickstart.name}", "inst.text", "inst.cmdline", "inst.notmux"]
    return [*anaconda, *consoles, *guest.arguments]


def _firmware(hardware: Hardware) -> list[str]:
    if hardware.firmware == "bios":
        return []
    # libvirt's own choice may be one that enforces Secure Boot, and is slow under emulation.
    found = machine.uefi_firmware()
    loader = [
        f"loader={_escaped(str(found.code))}",
        "loader.readonly=yes",
        "loader.type=pflash",
        "loader.secure=no",
        f"nvram.template={_escaped(str(found.variables))}",
    ]
    formats = []
    if found.code_format != "raw":
        formats = [
            *("--xml", f"./os/loader/@format={found.code_format}"),
            *("--xml", f"./os/nvram/@format={found.variables_format}"),
            *("--xml", f"./os/nvram/@templateFormat={found.variables_format}"),
        ]
    return ["--boot", ",".join(loader), *formats]


def _extra_disk(disk: ExtraDisk) -> list[str]:
    options = f"path={_escaped(str(disk.path))},device=disk,bus=virtio,format=raw,readonly=yes"
    return ["--disk", f"{options},serial={_escaped(disk.serial)}"]


def _network(network: Network) -> str:
    source = {"user": "user", "nat": f"network={network.name}", "bridge": f"bridge={network.name}"}
    mac = f",mac={network.hardware_address}" if network.hardware_address else ""
    return f"{source[network.kind]},model=virtio{mac}"


def _escaped(value: str) -> str:
    """A value among comma-separated options, which virt-install takes apart as a shell would."""
    if re.fullmatch(r"[\w@%+=:./-]*", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
