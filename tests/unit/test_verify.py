"""What is made of a guest's words, of its screen, and of the firmware's own descriptions."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vdibuild import machine, verify
from vdibuild.errors import HostError
from vdibuild.machine import Console, Hardware

GOLDEN = Path(__file__).parent / "golden"


def read(*chunks: bytes) -> Console:
    """A console that printed these."""

    async def follow() -> Console:
        console, output = Console("test"), asyncio.StreamReader()
        for chunk in chunks:
            output.feed_data(chunk)
        output.feed_eof()
        await console.follow(output)
        return console

    return asyncio.run(follow())


@pytest.mark.parametrize(
    ("printed", "meaning"),
    [
        ("[    1.9] Kernel panic - not syncing: VFS: Unable to mount root fs\n", "the kernel panicked"),
        ("error: no such partition.\nEntering rescue mode...\ngrub rescue> ", "did not find its own files"),
        ("   Minimal BASH-like line editing is supported.\n\ngrub> ", "found no boot menu"),
        ("Booting from Hard Disk...\nBoot failed: not a bootable disk\n", "nothing to boot"),
        ("No bootable device.\n", "nothing to boot"),
        ("BdsDxe: No bootable option or device was found.\n", "nothing to boot"),
        ("\x1b[=3hUEFI Interactive Shell v2.2\r\n", "nothing to boot"),
        ("[    5.9] dracut: FATAL: Failed to mount block device of live image\n", "gave up"),
        ("dracut Warning: Boot has failed. To debug this issue add\n", "gave up"),
        ("You are in emergency mode. After logging in\n", "emergency mode"),
        ("[  OK  ] Reached target emergency.target - Emergency Mode.\n", "emergency mode"),
        ("dracut-initqueue[391]: Warning: dracut-initqueue: timeout, still waiting\n", "root file system"),
        ("Please configure your system!\n\n-- Press any key to proceed --\n", "waits for a person"),
        ("ALERT!  UUID=0815 does not exist.  Dropping to a shell!\n", "root file system"),
    ],
)
def test_a_failed_boot_is_recognised_on_the_console(printed: str, meaning: str) -> None:
    match = verify._FAILURE.search(read(b"SeaBIOS\r\n", printed.encode()).text)
    assert match
    assert meaning in verify._meaning(match[0])


@pytest.mark.parametrize(
    "printed",
    [
        "[    0.0] Kernel command line: root=UUID=1 ro panic=30 systemd.unit=multi-user.target\n",
        "[  OK  ] Finished systemd-tmpfiles-setup.service\nstation login: ",
        "Welcome to GRUB!\nBooting `Debian GNU/Linux'\n",
    ],
)
def test_an_ordinary_boot_is_no_failure(printed: str) -> None:
    assert not verify._FAILURE.search(printed)


def test_the_console_is_free_of_escapes_also_where_a_read_cuts_them() -> None:
    console = read(
        b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n[\x1b[0;3", b"2m  OK  \x1b[0m] up\r\n\x1b]0;t\x07log", b"in: "
    )
    assert console.text == "SeaBIOS\n[  OK  ] up\nlogin: "
    assert console.tail(2) == ["[  OK  ] up", "login: "]


def test_a_guest_that_prints_for_ever_does_not_fill_the_memory() -> None:
    console = read(*[b"x" * 100_000] * 30, b"\n", *[b"y" * 99 + b"\n"] * 30_000)
    assert len(console.text) < 3 << 20
    assert console.tail(1) == ["y" * 99]


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        (
            "Startup finished in 8.359s (kernel) + 51.082s (userspace) = 59.441s \ngraphical.target reached",
            {"kernel": 8.359, "userspace": 51.082},
        ),
        (
            "Startup finished in 1.2s (firmware) + 950ms (loader) + 2s (kernel) + 1min 3.5s (userspace) = 7s",
            {"firmware": 1.2, "loader": 0.95, "kernel": 2.0, "userspace": 63.5},
        ),
        ("Bootup is not yet finished", {}),
    ],
)
def test_the_start_is_told_in_seconds(said: str, parts: dict[str, float]) -> None:
    assert verify._startup(said) == parts


def test_a_blank_screen_and_a_changing_one_are_told_apart() -> None:
    black = bytes(1000)
    cursor = bytes(999) + b"\xff"
    desktop = bytes(600) + b"\x80" * 400
    assert verify._covered(b"") == verify._covered(black) == 0
    assert verify._covered(cursor) == pytest.approx(0.001)
    assert verify._covered(desktop) == pytest.approx(0.4)
    assert verify._changed(desktop, desktop) == 0
    assert verify._changed(black, cursor) == pytest.approx(0.001)
    assert verify._changed(b"", desktop) == 1


def descriptor(directory: Path, name: str, **changes: Any) -> None:
    described = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": f"/fw/{name}-code", "format": "raw"},
            "nvram-template": {"filename": f"/fw/{name}-vars", "format": "qcow2"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3"],
    }
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(described | changes))


def test_firmware_is_chosen_by_its_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, distribution = tmp_path / "etc", tmp_path / "usr"
    monkeypatch.setattr(machine, "FIRMWARE_DIRECTORIES", (own, distribution))
    descriptor(distribution, "10-enrolled", features=["requires-smm", "enrolled-keys", "secure-boot"])
    descriptor(distribution, "20-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    descriptor(distribution, "30-bios", **{"interface-types": ["bios"]})
    descriptor(distribution, "40-rom", mapping={"device": "memory", "filename": "/fw/rom"})
    with pytest.raises(HostError, match="no UEFI firmware"):
        machine.uefi_firmware()
    descriptor(distribution, "50-masked")
    descriptor(distribution, "60-plain")
    assert machine.uefi_firmware().code == Path("/fw/50-masked-code")
    # An administrator's empty file takes the distribution's of the same name away.
    own.mkdir()
    (own / "50-masked.json").touch()
    found = machine.uefi_firmware()
    assert (found.code, found.code_format) == (Path("/fw/60-plain-code"), "raw")
    assert (found.variables, found.variables_format) == (Path("/fw/60-plain-vars"), "qcow2")


def test_the_machine_is_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "emulator", lambda: "qemu-system-x86_64")
    channels = {"monitor": 7, "agent": 8, "console": 9}
    drive = machine._writable(Path("/work/overlay"))
    argv = machine.command(Hardware("bios", 1024, "tcg"), drive, tmp_path, channels)
    lines = (
        "\n".join(argv).replace("\n-", "\n\n-").replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n")
    )
    assert f"{lines}\n" == (GOLDEN / "machine-bios.txt").read_text()


def test_memory_and_processors_decide_whether_two_boot_at_a_time() -> None:
    assert not verify._room_for_two(Hardware("bios", 1 << 40, "tcg"))
    assert not verify._room_for_two(Hardware("bios", 1, "tcg", cores=100_000))
