"""virt-install's argument list, and the settings it is made from."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from pydantic import ValidationError

from vdibuild import machine
from vdibuild.install.command import ExtraDisk, Guest, Media, command
from vdibuild.machine import Hardware
from vdibuild.settings.images import Install, Network

GOLDEN = Path(__file__).parent / "golden" / "install"
HERE = Path("/srv/vdibuild/work")


def guest(**changes: object) -> Guest:
    values: dict[str, object] = {
        "name": "office",
        "owner": "0123456789abcdef",
        "media": Media(location=str(HERE / "office.iso")),
        "kickstart": HERE / "office.ks",
        "volume": "os/vdibuild-office",
        "hardware": Hardware("bios", 3072, "kvm", 2),
        "network": Network(kind="nat", name="default", address=IPv4Address("192.168.122.4")),
    }
    return Guest(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("iso-nat", {}),
        (
            "tree-bridge",
            {
                "media": Media(location="https://mirror.example.org/fedora/43/Server/x86_64/os/"),
                "network": Network(kind="bridge", name="br0", mac="52:54:00:AA:bb:cc"),
                "osinfo": "fedora-unknown",
                "arguments": ["inst.sshd"],
            },
        ),
        (
            "kernel-user",
            {
                "media": Media(kernel=str(HERE / "a kernel"), initrd=str(HERE / "initrd,1")),
                "hardware": Hardware("bios", 1024, "tcg", 1),
                "network": Network(),
                "disks": [ExtraDisk(HERE / "bundle.img", "bundle")],
            },
        ),
        (
            "iso-with-kernel",
            {
                "media": Media(
                    location=str(HERE / "office.iso"), kernel="live/vmlinuz", initrd="live/initrd.img"
                )
            },
        ),
    ],
)
def test_the_command(name: str, changes: dict[str, object]) -> None:
    """Golden files: a line for an argument."""
    made = "".join(f"{word}\n" for word in command(guest(**changes), "qemu:///system"))
    assert made == (GOLDEN / f"{name}.txt").read_text()


def test_uefi_names_firmware_without_secure_boot() -> None:
    argv = command(guest(hardware=Hardware("uefi", 3072, "kvm")), "qemu:///system")
    boot = argv[argv.index("--boot") + 1]
    found = machine.uefi_firmware()
    assert boot == (
        f"loader={found.code},loader.readonly=yes,loader.type=pflash,loader.secure=no,"
        f"nvram.template={found.variables}"
    )


def test_the_address_gives_the_mac_address_of_the_seed() -> None:
    # printf "52:54:%2.2x:%2.2x:%2.2x:%2.2x\n" 192 168 122 3
    assert Network(address=IPv4Address("192.168.122.3")).hardware_address == "52:54:c0:a8:7a:03"
    assert (
        Network(address=IPv4Address("192.168.122.3"), mac="52:54:00:00:00:01").hardware_address
        == "52:54:00:00:00:01"
    )
    assert Network().hardware_address is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": "vmlinuz"}, "kernel and initrd go together"),
        ({"location": "https://example.org/a.iso"}, "needs its sha256"),
        ({"location": "a.iso", "sha256": "12"}, "is no SHA-256"),
        ({"location": "a.iso", "keep": True}, "keep needs a pool"),
        ({"location": "a.iso", "autostart": True}, "autostart is for a machine that is kept"),
        ({"location": "a.iso", "network": {"mac": "53:54:00:00:00:01"}}, "multicast"),
        ({"location": "a.iso", "network": {"mac": "52:54"}}, "is no MAC address"),
        ({"location": "a.iso", "network": {"address": "192.168.122.300"}}, "address"),
        ({"location": "a.iso", "deadline_seconds": 0}, "greater than 0"),
        ({"location": "a.iso", "locatoin": "x"}, "locatoin"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Install.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"location": "https://example.org/43/os/"},
        {"location": "media/a.iso"},
        {"location": "https://example.org/a.iso?token=1", "sha256": "AB" * 32},
        {"location": "a.iso", "pool": "os", "keep": True, "autostart": True},
        {"kernel": "vmlinuz", "initrd": "initrd.img"},
    ],
)
def test_settings_that_can_be(settings: dict[str, object]) -> None:
    assert Install.model_validate(settings).memory == 3072
