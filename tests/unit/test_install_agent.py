from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import re
import tarfile
from pathlib import Path

import pytest
import zstandard

from tests.conftest import FakeCommand
from vdibuild import install_agent, progress
from vdibuild.errors import HostError, InputError, VdibuildError
from vdibuild.install.watcher import Stage, Watcher
from vdibuild.install_agent import Port, PortReporter
from vdibuild.live import software
from vdibuild.recipe import LiveImage
from vdibuild.tree import Tree


def archive() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        member = tarfile.TarInfo("./etc/motd")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"hello\n"))
    return data.getvalue()


FORMS = {
    "plain": archive(),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress(archive()),
    "xz": lzma.compress(archive()),
    "gzip": gzip.compress(archive()),
}


def image(path: Path, checksum: str = "") -> LiveImage:
    return LiveImage(f"file://{path}", checksum, 3)


def test_the_kernels_arguments_are_an_order() -> None:
    order = install_agent.read_order(
        "quiet inst.ks=file:/a.ks vdibuild.disk=/dev/vdb vdibuild.release=sid ro\n"
    )
    assert (order.kickstart, order.disk, order.release) == ("file:/a.ks", "/dev/vdb", "sid")
    with pytest.raises(VdibuildError, match="name no kickstart"):
        install_agent.read_order("quiet ro\n")


def test_a_disk_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="there is no disk"):
        install_agent.find_disk(str(tmp_path / "disk"))


def test_what_the_agent_says_is_what_the_watcher_reads() -> None:
    said = io.StringIO()
    port = Port(said)
    with progress.reporting(PortReporter(port)), progress.logging_to(port):
        with progress.step("storage"), progress.step("partitions"):
            progress.log("+ sfdisk /dev/vda")
        progress.warn("take care")
    port.say("CRT", "failed: no disk\nhint: give it one")
    lines = said.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d,\d\d\d (DBG|INF|WRN|CRT) vdibuild: ", line) for line in lines)
    watcher = Watcher(60, 60, 0)
    _, findings = watcher.feed("log", said.getvalue().encode(), 0)
    assert [one.name for one in findings if isinstance(one, Stage)] == ["storage"]
    assert watcher.failure is not None
    assert watcher.failure.message == "no disk"


@pytest.mark.parametrize("form", FORMS)
def test_a_live_image_is_unpacked_whatever_its_compression(form: str, tmp_path: Path) -> None:
    source, target = tmp_path / "image", tmp_path / "target"
    target.mkdir()
    source.write_bytes(FORMS[form])
    install_agent.unpack(image(source, hashlib.sha256(FORMS[form]).hexdigest()), Tree(target))
    assert (target / "etc/motd").read_text() == "hello\n"


def test_a_bundle_on_a_disk_is_followed_by_zeros(tmp_path: Path) -> None:
    source, target = tmp_path / "image", tmp_path / "target"
    target.mkdir()
    data = FORMS["zstd"]
    source.write_bytes(data + bytes(-len(data) % 512))
    install_agent.unpack(image(source), Tree(target))
    assert (target / "etc/motd").exists()


@pytest.mark.parametrize("form", ["zstd", "xz", "gzip"])
def test_a_live_image_that_is_cut_off_is_an_error(form: str, tmp_path: Path) -> None:
    source, target = tmp_path / "image", tmp_path / "target"
    target.mkdir()
    source.write_bytes(FORMS[form][:-9])
    with pytest.raises(VdibuildError):
        install_agent.unpack(image(source), Tree(target))


def test_a_live_image_with_another_checksum_is_an_error(tmp_path: Path) -> None:
    source, target = tmp_path / "image", tmp_path / "target"
    target.mkdir()
    source.write_bytes(FORMS["zstd"])
    with pytest.raises(InputError, match=r"kickstart:3: liveimg: .*another checksum"):
        install_agent.unpack(image(source, "0" * 64), Tree(target))
    with pytest.raises(InputError, match="cannot be read"):
        install_agent.unpack(image(tmp_path / "missing"), Tree(target))


def test_a_full_disk_is_one_that_is_too_small(tmp_path: Path, fake_command: FakeCommand) -> None:
    fake_command("tar", "echo 'tar: ./usr: Cannot write: No space left on device' >&2; exit 2")
    (tmp_path / "image").write_bytes(FORMS["zstd"])
    (tmp_path / "target").mkdir()
    given = image(tmp_path / "image")
    with (
        pytest.raises(InputError, match="kickstart:3: the disk is too small") as caught,
        install_agent.fitting(3),
    ):
        install_agent.unpack(given, Tree(tmp_path / "target"))
    assert "larger `disk`" in caught.value.hint


def test_the_agent_brings_neither_libvirt_nor_qemu() -> None:
    from vdibuild import hashing

    brought = hashing.code("install_agent", "families.debian")
    assert {"kickstart.recipes", "disk.layout", "disk.bootloader", "archive"} <= brought.keys()
    assert not {"machine", "install", "disk.appliance", "golden", "tasks.command", "store"} & brought.keys()


def test_the_software_of_a_live_system_is_known_by_its_digest() -> None:
    assert software.digest(("install_agent",)) == software.digest(("install_agent",))
    assert software.digest(()) != software.digest(("install_agent",))
