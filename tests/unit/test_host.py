"""What a host can do: the accelerator's probe against programs that behave as QEMU does, and doctor."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import FakeCommand
from vdibuild import host
from vdibuild.errors import HostError
from vdibuild.host import Accelerator, Need
from vdibuild.settings.images import Image
from vdibuild.site import Site

PANIC = 'echo "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs"; exit 0'
ERROR = 'echo "KVM internal error. Suberror: 1" >&2; exec sleep 60'


def qemu(version: str, otherwise: str) -> str:
    return f'if [ "$1" = --version ]; then echo "QEMU emulator version {version}"; exit; fi\n{otherwise}'


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that has /dev/kvm, and a kernel."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(host, "KVM", device)
    image = tmp_path / "vmlinuz"
    image.touch()
    return image


def test_a_kernel_that_panics_under_kvm_proves_it_and_is_remembered(
    fake_command: FakeCommand, kernel: Path, tmp_path: Path
) -> None:
    record = fake_command("qemu-system-x86_64", qemu("7.2", PANIC))
    expected = Accelerator("kvm", "a kernel booted under KVM")
    assert host.accelerator(kernel, cache=tmp_path / "cache") == expected
    words = record.read_text().split("\n")
    assert words[words.index("-accel") + 1] == "kvm"
    assert words[words.index("-kernel") + 1] == str(kernel)
    assert "-no-reboot" in words

    record.unlink()
    assert host.accelerator(kernel, cache=tmp_path / "cache") == expected
    assert record.read_text() == "--version\n"
    # Another QEMU, or a person who wants to know, asks again.
    fake_command("qemu-system-x86_64", qemu("8.0", "exit 1"))
    assert host.accelerator(kernel, cache=tmp_path / "cache").name == "tcg"
    fake_command("qemu-system-x86_64", qemu("8.0", PANIC))
    assert host.accelerator(kernel, cache=tmp_path / "cache").name == "tcg"
    assert host.accelerator(kernel, cache=tmp_path / "cache", fresh=True).name == "kvm"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (ERROR, "KVM internal error"),
        ("exec sleep 60", "does not come up"),
        ("echo 'qemu: failed to set MSR' >&2; kill -ABRT $$", "failed to set MSR"),
        ("exit 0", "QEMU failed"),
        (f"{PANIC.removesuffix('exit 0')} exit 1", "does not boot"),
    ],
)
def test_kvm_that_opens_but_does_not_work_is_not_used(
    fake_command: FakeCommand,
    kernel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    reason: str,
) -> None:
    fake_command("qemu-system-x86_64", qemu("7.2", behaviour))
    monkeypatch.setattr(host, "_PROBE_SECONDS", 0.5)
    found = host.accelerator(kernel, cache=tmp_path / "cache")
    assert found.name == "tcg"
    assert reason in found.reason
    argument = f"{kernel}\0".encode()
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if argument in _read(entry)], (
        "the probe's QEMU still runs"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_without_kvm_nothing_is_tried(
    fake_command: FakeCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = fake_command("qemu-system-x86_64", qemu("7.2", PANIC))
    monkeypatch.setattr(host, "KVM", tmp_path / "none")
    assert host.accelerator(cache=tmp_path).reason == f"there is no {tmp_path / 'none'}"
    assert not record.exists()


def test_a_damaged_memory_is_written_again(fake_command: FakeCommand, kernel: Path, tmp_path: Path) -> None:
    fake_command("qemu-system-x86_64", qemu("7.2", PANIC))
    (tmp_path / "accelerator.json").write_text('{"boot":')
    assert host.accelerator(kernel, cache=tmp_path).name == "kvm"
    assert '"kvm"' in (tmp_path / "accelerator.json").read_text()


def test_no_qemu_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vdibuild.machine.EMULATORS", ("no-such-qemu",))
    with pytest.raises(HostError, match="QEMU for x86_64 is not installed"):
        host.accelerator(cache=tmp_path)


def test_the_table_of_packages_is_complete() -> None:
    table = host.needs()
    assert Need("qemu-img", "qemu-utils", "qemu-img", "every build") in table
    assert len({need.probe for need in table}) == len(table)
    assert all(need.debian or need.fedora for need in table)
    purposes = {need.purpose for need in table}
    assert host.EVERY_BUILD in purposes
    assert not [need for need in table if not need.purpose or "\t" in need.purpose]


@pytest.mark.parametrize(
    ("probe", "present"),
    [
        ("sh", True),
        ("no-such-command", False),
        ("/etc/pass*", True),
        ("/etc/no-such*", False),
        ("python:json", True),
        ("python:no_such_module", False),
    ],
)
def test_a_need_is_met_by_a_command_a_path_or_a_module(probe: str, present: bool) -> None:
    assert Need(probe, "package", "package", "every build").present() is present


def test_doctor_names_what_is_missing_and_the_command_that_mends_it(
    fake_command: FakeCommand, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_command("qemu-system-x86_64", qemu("7.2", "[ $1 != -spice ] || echo 'no such option group'; exit 1"))
    fake_command("apt-get")
    fake_command("virsh", "exit 1")
    table = "# what\tis\tneeded\nsh\tdash\tdash\tevery build\nno-such\tmissing\t-\tevery build\n"
    (tmp_path / "packages.txt").write_text(table + "none-such\t-\tother\tplaybooks\n")
    monkeypatch.setattr(host, "PACKAGES", tmp_path / "packages.txt")
    image = Image(family="debian", release="trixie", kickstart="x.ks.j2")
    site = Site(images={"one": image}, libvirt="qemu:///session", artifacts=tmp_path / "not" / "yet")
    checks = {check.name: check for check in host.doctor(site)}

    assert checks["package missing"].detail == "no-such is missing, for every build"
    assert checks["package missing"].mend == "sudo apt-get install missing"
    assert checks["package missing"].required
    assert "package other" not in checks
    assert not checks["accelerator"].ok
    assert "emulation only" in checks["accelerator"].detail
    assert not checks["accelerator"].required
    assert not checks["libvirt"].ok
    assert "qemu:///session" in checks["libvirt"].detail
    assert not checks["SPICE"].ok
    assert checks["space"].ok
    assert all(check.mend for check in checks.values() if not check.ok)
    assert not any(check.mend for check in checks.values() if check.ok)


def test_a_clock_that_is_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host._clock().ok
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert not host._clock().ok


def test_an_ordinary_user_needs_subordinate_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (tmp_path / "subuid", tmp_path / "subgid")
    monkeypatch.setattr(host, "SUBORDINATE_IDS", files)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert host._subordinate_ids() == []

    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    files[0].write_text("joanna:100000:65536\nanna:200000:65536\n")
    (check,) = host._subordinate_ids()
    assert not check.ok
    assert check.detail.startswith(f"{files[1]} give anna")
    assert "--add-subgids" in check.mend
    files[1].write_text("1234:200000:65536\n")
    (check,) = host._subordinate_ids()
    assert check.ok
