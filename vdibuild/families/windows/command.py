"""The argument list of virt-install for a machine that Windows installs itself in.

Setup restarts the machine several times. virt-install defines it so that the first restart ends it; whoever
drives the installation starts the domain again, and it then runs until sysprep shuts it down. What the script
of the first logon says arrives on the serial port (answers.SAYS); the proof is answers.MARKER on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdibuild import processor
from vdibuild.machine import Hardware

PROMPT_SECONDS = 30
"""For how long after its start somebody has to press a key in a UEFI machine, or it does not boot from the
medium ("Press any key to boot from CD or DVD"); with BIOS, nothing asks while the disk is empty."""

# What Windows runs faster with under KVM, as libvirt's documentation of <hyperv> has them: virt-install knows
# the first ones by name. None of them exists under emulation.
_ENLIGHTENMENTS = ("relaxed", "vapic", "synic")
_MORE_ENLIGHTENMENTS = ("vpindex", "runtime", "stimer", "frequencies", "tlbflush", "ipi")


@dataclass(frozen=True)
class Guest:
    """A machine that Windows is installed in.

    release: win10 or win11. medium: Windows' ISO; answers: see medium.write; virtio: the virtio-win ISO.
    volume: its disk, as POOL/VOLUME. hardware: memory in MiB. network: what virt-install's --network gets,
    the model aside. more: further arguments, such as the driver's own marks.
    """

    name: str
    release: str
    medium: Path
    answers: Path
    virtio: Path
    volume: str
    hardware: Hardware
    network: str = "user"
    more: Sequence[str] = ()


def command(guest: Guest, uri: str) -> list[str]:
    """The argument list that makes the machine and starts it; virt-install then ends, and Setup runs on.

    uri: the libvirt connection. There is no secret in it: those are on the answer medium.
    """
    hardware = guest.hardware
    return [
        *("virt-install", "--connect", uri, "--name", guest.name),
        *("--memory", str(hardware.memory), "--vcpus", _processors(hardware.cores)),
        *("--virt-type", "kvm" if hardware.accelerator == "kvm" else "qemu"),
        *("--arch", "x86_64", "--machine", "q35"),
        *processor.virt_install(hardware.accelerator),
        *("--osinfo", f"name={guest.release}"),
        *("--cdrom", str(guest.medium)),
        *_firmware(guest),
        *_features(guest),
        *("--disk", f"vol={guest.volume},device=disk,bus=virtio,cache=unsafe,driver.discard=unmap"),
        *_cdrom(guest.answers),
        *_cdrom(guest.virtio),
        *("--network", f"{guest.network},model=virtio"),
        # The devices of the clones: sysprep keeps the drivers that were installed for them.
        *("--graphics", "spice,listen=none", "--video", "qxl"),
        *("--channel", "spicevmc"),
        *("--channel", "unix,target.type=virtio,target.name=org.qemu.guest_agent.0"),
        *("--serial", "pty", "--rng", "/dev/urandom"),
        *guest.more,
        *("--noautoconsole", "--noreboot"),
    ]


def press_key(name: str, uri: str) -> list[str]:
    """The argument list that presses a key: the blank bar, which nothing else takes for a yes."""
    return ["virsh", "--connect", uri, "send-key", name, "KEY_SPACE"]


def _processors(cores: int) -> str:
    """Windows 11 wants two at least; the editions for desktops use no more than one or two sockets."""
    cores = max(2, cores)
    return f"{cores},sockets=1,cores={cores},threads=1"


def _firmware(guest: Guest) -> list[str]:
    """Secure Boot with Microsoft's keys, and a TPM 2.0: Windows 11 asks for both."""
    if guest.hardware.firmware == "bios":
        return []
    wanted = [
        f"firmware.feature{number}.{word}"
        for number, feature in enumerate(("secure-boot", "enrolled-keys"))
        for word in (f"name={feature}", "enabled=yes")
    ]
    return [
        *("--boot", ",".join(["firmware=efi", *wanted])),
        *("--tpm", "model=tpm-crb,backend.type=emulator,backend.version=2.0"),
    ]


def _features(guest: Guest) -> list[str]:
    state = "on" if guest.hardware.accelerator == "kvm" else "off"
    words = [f"hyperv.{name}.state={state}" for name in _ENLIGHTENMENTS]
    words.append(f"hyperv.spinlocks.state={state}")
    more: list[str] = []
    if state == "on":
        words.append("hyperv.spinlocks.retries=8191")
        more = [
            word for name in _MORE_ENLIGHTENMENTS for word in ("--xml", f"./features/hyperv/{name}/@state=on")
        ]
    if guest.hardware.firmware == "uefi":
        words.append("smm.state=on")  # what protects the variables of Secure Boot
    clock = "offset=localtime,rtc_tickpolicy=catchup,pit_tickpolicy=delay,hpet_present=no"
    clock += f",hypervclock_present={'yes' if state == 'on' else 'no'}"
    return ["--features", ",".join(words), *more, "--clock", clock]


def _cdrom(path: Path) -> list[str]:
    return ["--disk", f"path={_escaped(str(path))},device=cdrom,bus=sata,readonly=yes"]


def _escaped(value: str) -> str:
    """A value among comma-separated options, which virt-install takes apart as a shell would."""
    if re.fullmatch(r"[\w@%+=:./-]*", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
