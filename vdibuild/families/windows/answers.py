"""What Windows Setup is told: the answer files and the script of the first logon.

Source of all names, passes and values: Microsoft's Unattended Windows Setup Reference. Setup reads
`Autounattend.xml` at the root of a CD-ROM ("Windows Setup Automation Overview", implicit search); the script
it starts at the first logon installs the guest tools and runs sysprep, which keeps the clones' own answers.
"""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass
from pathlib import Path

from vdibuild import config_template
from vdibuild.errors import InputError
from vdibuild.settings.images import Image
from vdibuild.settings.windows import Windows

MARKER = "Windows/System32/Sysprep/Sysprep_succeeded.tag"
"""What sysprep leaves on the Windows partition when it succeeded: without it nothing was installed."""

SAYS = "vdibuild: "
"""How each line begins that the script of the first logon writes to the first serial port."""

_DRIVERS = ("vioscsi", "viostor", "NetKVM")  # directories of the virtio-win ISO: disks, network
_DRIVER_RELEASES = {"win10": "w10", "win11": "w11"}  # directories below these
_SETUP_LETTERS = "CDEFG"  # which a CD-ROM can get while Setup runs, when the disk has no volumes yet
_LETTERS = "DEFGH"  # and afterwards


@dataclass(frozen=True)
class Partition:
    """A partition of the disk. size: MiB; 0 for what is left. format: empty for none."""

    number: int
    type: str
    size: int
    format: str = ""
    label: str = ""
    letter: str = ""
    active: bool = False


# Microsoft's "BIOS/MBR-based" and "UEFI/GPT-based hard drive partitions": the layouts it recommends, without
# a recovery partition. A virtual disk can have sectors of 4 KiB, for which the ESP has to be 260 MiB or more.
_PARTITIONS = {
    "bios": (
        Partition(1, "Primary", 500, "NTFS", "System", active=True),
        Partition(2, "Primary", 0, "NTFS", "Windows", "C"),
    ),
    "uefi": (
        Partition(1, "EFI", 300, "FAT32", "System"),
        Partition(2, "MSR", 16),
        Partition(3, "Primary", 0, "NTFS", "Windows", "C"),
    ),
}


@dataclass(frozen=True)
class Answers:
    """What is put on the answer medium. setup: Autounattend.xml; clone: sysprep's answer file for the clones;
    script: what runs at the first logon. All hold secrets, or where they are."""

    setup: str
    clone: str
    script: str


def render(image: Image, name: str, site_directory: Path) -> Answers:
    """The answers for an image of the family windows.

    name: the image's. site_directory: where templates are looked for first. Raises InputError when the
    password's file cannot be read, or holds what Windows does not take.
    """
    windows = image.windows
    if windows is None:
        raise ValueError("not an image of the family windows")
    environment = config_template.environment(site_directory)
    environment.globals.update(
        name=name,
        windows=windows,
        encoded_password=encoded(_password(windows)),
        product_key=windows.product_key.get_secret_value() if windows.product_key else "",
        partitions=_PARTITIONS[image.firmware],
        driver_places=list(itertools.product(_SETUP_LETTERS, _DRIVERS)),
        drivers_release=_DRIVER_RELEASES[image.release],
        letters=_LETTERS,
        spice_tools=spice_tools_name(windows),
    )
    setup, clone, script = (
        environment.get_template(f"windows/{template}.j2").render()
        for template in ("autounattend.xml", "clone.xml", "first-logon.cmd")
    )
    # cmd.exe wants the line ends of Windows: with others it can miss a label it jumps to.
    return Answers(setup, clone, script.replace("\n", "\r\n"))


def encoded(password: str) -> str:
    """A password as Windows System Image Manager writes it: hidden from a glance, and no more than that.

    The word "Password" is appended (the name of the element), the whole in UTF-16 and base64.
    """
    return base64.b64encode(f"{password}Password".encode("utf-16-le")).decode("ascii")


def spice_tools_name(windows: Windows) -> str:
    """What the installer of SPICE's tools is called on the answer medium; empty when there is none.

    Raises InputError when the file is neither a program nor an installer package.
    """
    if windows.spice_tools is None:
        return ""
    ending = windows.spice_tools.suffix.lower()
    if ending not in (".exe", ".msi"):
        raise InputError(
            windows.spice_tools,
            None,
            "is no installer of SPICE's tools",
            "name spice-guest-tools-….exe or spice-vdagent-….msi",
        )
    return f"spice-tools{ending}"


def _password(windows: Windows) -> str:
    if windows.password is not None:
        return windows.password.get_secret_value()
    path = windows.password_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise InputError(str(path), None, f"the password cannot be read: {reason}") from None
    text = lines[0] if lines else ""
    if not 0 < len(text) <= 127 or not text.isprintable():
        raise InputError(
            str(path), 1, "is no password for Windows", "1 to 127 characters that can be printed, on one line"
        )
    return text
