"""Machines on a hypervisor with LVM: one of our own images, started with a volume group on its second disk.

This host's kernel may have no device-mapper; the hypervisor's has. It may be an emulated guest itself, in
which a guest would take an hour to start: the machine that it made is started here, from its volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import vdibuild
from tests.guest.conftest import SITE, Built, built, cache, shared
from vdibuild import bootstrap, families, golden, host, machine, process, rootfs
from vdibuild import site as sites
from vdibuild.disk import bootloader, write
from vdibuild.machine import Hardware, Machine
from vdibuild.recipe import Recipe
from vdibuild.steps import Steps
from vdibuild.tree import remove

__all__ = ["built", "cache", "shared"]  # fixtures

RELEASES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""Debian's release by its Python: the hypervisor gets the packages that run these tests."""

HYPERVISOR = """
images:
  hypervisor:
    family: debian
    release: %(release)s
    kickstart: golden-debian.ks.j2
    overlays: [golden]
    disk: {size: 3GiB}
    packages:
      - lvm2
      - libvirt-daemon-system
      - libvirt-clients
      - dnsmasq-base
      - qemu-system-x86
      - qemu-utils
      - bubblewrap
      - fdisk
      - openssh-client
      - python3-cryptography
      - python3-dnspython
      - python3-libvirt
      - python3-yaml
"""
MACHINES = """
networks:
  default: {first: 192.168.122.10, last: 192.168.122.20, domain: example.org}
machines:
  web:
    image: small
    pool: machines
    size: 1300MiB
    address: next
    authorized_keys: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExampleExampleExampleExample admin]
"""
NOT_NEEDED = (
    "__pycache__",
    "mypy*",
    "ruff*",
    "pytest*",
    "_pytest",
    "hypothesis*",
    "psycopg*",
    "*editable*",
    "pip",
    "ast_serial*",
)
SECONDS = 1800.0
STORAGE = "vdibuild.install.storage"


@pytest.fixture(scope="module")
def hypervisor(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The hypervisor's disk, made from its recipe as every golden image is. Its use is what verifies it."""
    directory = tmp_path_factory.mktemp("hypervisor")
    text = HYPERVISOR % {"release": RELEASES[sys.version_info[:2]]}
    (directory / "vdibuild.yaml").write_text(f"cache: {cache}\n{text}")
    site = sites.load(directory / "vdibuild.yaml")
    planned = golden.plan(site)
    assert planned.layout is not None and isinstance(planned.recipe, Recipe)
    family = families.get(planned.image.family)
    steps = Steps(cache / "steps")
    content = bootstrap.run(steps, planned.content, planned.image, planned.recipe, cache)
    (directory / "system").mkdir()
    system = bootstrap.copy(content, directory / "system")
    rootfs.customise(system, family, planned.recipe, planned.image, directory)
    family.prepare_boot(system, planned.recipe, planned.layout, directory)
    bootloader.prepare(system, planned.layout, family.boot_files(system))
    disk = directory / "disk.raw"
    write.write(system, planned.layout, family.boot_files(system), disk, host.accelerator().name)
    remove(system.root)
    return disk


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory, built: Built) -> Path:
    """A disk with a site that has an image, this project, and the Python packages it needs."""
    directory = tmp_path_factory.mktemp("carried")
    root = directory / "root"
    project = Path(vdibuild.__file__).parent.parent
    without = shutil.ignore_patterns("__pycache__")
    for name in ("vdibuild", "templates", "kickstarts", "overlays"):
        shutil.copytree(project / name, root / name, symlinks=True, ignore=without)
    shutil.copyfile(Path(__file__).parent.parent / "guest/ending.py", root / "ending.py")
    packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copytree(packages, root / "packages", ignore=shutil.ignore_patterns(*NOT_NEEDED))
    for name in ("artifacts/small", "key"):
        shutil.copytree(built.site.path / name, root / "site" / name, symlinks=True)
    (root / "site/vdibuild.yaml").write_text(SITE + MACHINES)
    disk = directory / "carried.raw"
    process.run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), "1500M"])
    remove(root)
    return disk


@contextlib.asynccontextmanager
async def started(system: Path, disks: dict[str, Path], directory: Path) -> AsyncIterator[Machine]:
    """Start a hypervisor on a throw-away overlay of its image. disks: raw ones that it may write to."""
    overlay = directory / "overlay.qcow2"
    process.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(system), "-F", "raw", str(overlay)])
    drive = machine._writable(overlay)
    for name, disk in disks.items():
        file = f"file.driver=file,file.filename={disk}"
        drive += ["-blockdev", f"driver=raw,node-name={name},discard=unmap,{file}"]
        drive += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    hardware = Hardware("bios", 2048, host.accelerator().name)
    pairs = {channel: socket.socketpair() for channel in ("monitor", "agent", "console")}
    ends = {channel: theirs.fileno() for channel, (_, theirs) in pairs.items()}
    argv = machine.command(hardware, drive, directory, ends)
    with (directory / "qemu.log").open("wb") as log:
        qemu = process.start(argv, stdout=log, pass_fds=tuple(ends.values()))
    running = Machine("hypervisor", qemu, directory)
    try:
        for _, theirs in pairs.values():
            theirs.close()
        await running.connect(*(ours for ours, _ in pairs.values()))
        yield running
    finally:
        await running.disconnect()
        process.stop(qemu)
        for ours, _ in pairs.values():
            ours.close()


@dataclass
class Hypervisor:
    """A running hypervisor, and what is asked of it."""

    machine: Machine

    async def run(self, *argv: str, status: int = 0) -> str:
        """Run a command that has to end with that status; returns what it printed."""
        began = time.monotonic()
        done = await self.machine.agent.run(argv)
        print(f"{time.monotonic() - began:7.1f} s  {' '.join(argv)[-100:]}", flush=True)
        assert done.status == status, f"{argv}: {done.status}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    async def vdibuild(self, *arguments: str, status: int = 0, through: Sequence[str] = ()) -> str:
        """Run one of our commands in the site."""
        program = ["-c", "from vdibuild.console import program; program.run()"]
        environment = ["env", "--chdir=/carried/site", "HOME=/root", "PYTHONPATH=/carried:/carried/packages"]
        environment.append("PATH=/usr/sbin:/usr/bin:/sbin:/bin")
        return await self.run(*environment, "python3", *(through or program), *arguments, status=status)

    async def report(self, *argv: str) -> list[dict[str, str]]:
        """What a reporting command of LVM says."""
        said = await self.run(*argv, "--reportformat", "json", "--units", "b", "--nosuffix")
        (report,) = json.loads(said)["report"]
        (rows,) = report.values()
        return list(rows)

    async def names(self) -> list[str]:
        """The logical volumes and domains that there are."""
        volumes = [row["lv_name"] for row in await self.report("lvs", "--options", "lv_name")]
        return volumes + (await self.run("virsh", "list", "--all", "--name")).split()


async def prepare(hypervisor: Hypervisor) -> None:
    """What an administrator does once: a volume group, and a storage pool of it."""
    volumes, carried = (f"/dev/disk/by-id/virtio-{name}" for name in ("volumes", "carried"))
    await hypervisor.run("mkdir", "/carried")
    await hypervisor.run("mount", carried, "/carried")
    await hypervisor.run("pvcreate", "--quiet", volumes)
    await hypervisor.run("vgcreate", "--quiet", "machines", volumes)
    await hypervisor.run("virsh", "pool-define-as", "machines", "logical", "--source-name", "machines")
    await hypervisor.run("virsh", "pool-start", "machines")
    if "default" not in await hypervisor.run("virsh", "net-list", "--name"):
        await hypervisor.run("virsh", "net-start", "default")


async def place_of(hypervisor: Hypervisor, name: str) -> tuple[int, int]:
    """Where a logical volume lies on the disk `volumes`, in bytes, by LVM's own words."""
    options = "pe_start,vg_extent_size,seg_pe_ranges,lv_size"
    rows = await hypervisor.report("pvs", "--segments", "--options", f"lv_name,{options}")
    (row,) = [row for row in rows if row["lv_name"] == name]
    first = int(row["seg_pe_ranges"].rpartition(":")[2].partition("-")[0])
    return int(row["pe_start"]) + first * int(row["vg_extent_size"]), int(row["lv_size"])


def copied(disk: Path, offset: int, size: int, output: Path) -> None:
    """Copy a part of a disk that a machine has, but does not write to just now."""
    part = f"driver=raw,offset={offset},size={size},file.driver=file,file.filename={disk}"
    argv = ["qemu-img", "convert", "-U", "--image-opts", part, "-O", "qcow2", str(output)]
    subprocess.run(argv, check=True)


def holds_something(disk: Path, offset: int, size: int) -> bool:
    """Whether a part of a disk holds anything but zeros."""
    with disk.open("rb") as file:
        file.seek(offset)
        return any(file.read(1 << 20).strip(b"\0") for _ in range(size >> 20))


def test_a_machine_on_a_logical_volume(hypervisor: Path, carried: Path, tmp_path: Path) -> None:
    volumes = tmp_path / "volumes.raw"
    with volumes.open("wb") as file:
        file.truncate(4 << 30)
    asyncio.run(asyncio.wait_for(_provisioned(hypervisor, carried, volumes, tmp_path), SECONDS))
    asyncio.run(asyncio.wait_for(_boots(tmp_path / "web.qcow2", tmp_path), SECONDS))


async def _provisioned(system: Path, carried: Path, volumes: Path, directory: Path) -> None:
    """A hypervisor makes a machine on a logical volume, which is copied out, and removes it again."""
    async with started(system, {"volumes": volumes, "carried": carried}, directory) as running:
        await running.answering()
        hypervisor = Hypervisor(running)
        await prepare(hypervisor)
        full = await hypervisor.vdibuild("provision", "web", "--size", "9GiB", status=1)
        assert "a volume of 9216 MiB cannot be made in the pool machines" in " ".join(full.split())
        assert await hypervisor.names() == []
        # What a killed run leaves on LVM is taken back by the next.
        ending = ["/carried/ending.py", "9", f"{STORAGE}:make:1"]
        await hypervisor.vdibuild("provision", "web", "--no-start", through=ending, status=-9)
        assert await hypervisor.names() == ["web"]
        said = await hypervisor.vdibuild("provision", "web", "--no-start")
        assert "taking back the machine web" in said
        assert "copy (native)" in said
        assert await hypervisor.names() == ["web", "web"]
        assert "<source dev='/dev/machines/web'/>" in await hypervisor.run("virsh", "dumpxml", "web")
        assert "192.168.122.10" in await hypervisor.run("virsh", "net-dumpxml", "default")
        assert "there is a machine web" in await hypervisor.vdibuild("provision", "web", status=1)
        place = await place_of(hypervisor, "web")
        copied(volumes, *place, directory / "web.qcow2")
        assert holds_something(volumes, *place)
        said = await hypervisor.vdibuild("deprovision", "web")
        assert "web is gone, with its volume web in machines" in said
        assert not holds_something(volumes, *place), "the next machine could read what this one held"
        assert await hypervisor.names() == []
        assert "192.168.122.10" not in await hypervisor.run("virsh", "net-dumpxml", "default")
        left = await hypervisor.run("ls", "-A", "/carried/site/artifacts/.machines")
        assert {Path(name).suffix for name in left.split()} == {".lock"}


async def _boots(disk: Path, directory: Path) -> None:
    """The machine of that disk starts, and is the one that was ordered."""
    hardware = Hardware("bios", 1024, host.accelerator().name)
    async with machine.started(disk, "qcow2", hardware, directory, "web") as running:
        await running.answering()
        web = Hypervisor(running)
        assert await web.run("hostname", "--fqdn") == "web.example.org\n"
        assert "admin" in await web.run("cat", "/root/.ssh/authorized_keys")
        # The image's disk is 1 GiB.
        assert int((await web.run("findmnt", "-bno", "SIZE", "/")).strip()) > 1150 << 20
