"""This very host, asked for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdibuild import host, machine, process
from vdibuild.settings.images import Image
from vdibuild.site import Site


def test_a_kernel_boots_with_the_accelerator_that_was_found(tmp_path: Path) -> None:
    found = host.accelerator(cache=tmp_path)
    kernel = host.readable_kernel()
    assert kernel, "a kernel in /boot is needed"
    argv = [
        machine.emulator(),
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35",
        "-m",
        "512M",
    ]
    argv += ["-accel", found.name, "-cpu", "max", "-serial", "stdio", "-kernel", str(kernel)]
    printed = process.run([*argv, "-append", "console=ttyS0 panic=-1"], capture=True, deadline=180).stdout
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in printed


def test_this_host_can_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = Image(family="debian", release="trixie", kickstart="x.ks.j2", firmware="uefi")
    checks = host.doctor(Site(images={"one": image}, artifacts=tmp_path))
    assert [check for check in checks if check.required and not check.ok] == []
    assert {"accelerator", "sandbox", "space", "clock", "UEFI", "libvirt", "SPICE"} <= {
        check.name for check in checks
    }
