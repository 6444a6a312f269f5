"""Bundles that nobody has vouched for: damaged ones, bombs, and ones that reach out of their directory."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.conftest import FakeCommand
from vdibuild import bundle, packing
from vdibuild.bundle import ARCHIVE, DESCRIPTION
from vdibuild.errors import BundleError, CommandError, HostError, InputError
from vdibuild.tree import Tree

LIMIT = 10 << 20


def packed(directory: Path, *members: tarfile.TarInfo, compress: bool = True) -> Path:
    """An archive with these members; a regular file's size of content."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(os.urandom(member.size)) if member.isreg() else None)
    file = directory / ARCHIVE
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    file.write_bytes(compressor.compress(data.getvalue()) if compress else data.getvalue())
    return file


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **values: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    for key, value in values.items():
        setattr(member, key, value)
    return member


HARMLESS = (
    entry("./etc", tarfile.DIRTYPE, mode=0o755),
    entry("./etc/hostname", size=9),
    entry("./etc/same", tarfile.LNKTYPE, "./etc/hostname"),
    entry("./etc/link", tarfile.SYMTYPE, "/etc/hostname"),
    entry("./etc/up", tarfile.SYMTYPE, "../../../usr"),
    entry("./dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3),
    entry("./layer/gone", tarfile.CHRTYPE),
    entry("./run/pipe", tarfile.FIFOTYPE),
)


def test_a_harmless_one_passes(tmp_path: Path) -> None:
    file = packed(tmp_path, *HARMLESS)
    assert bundle.check(file, limit=LIMIT) == 10240


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([entry("/etc/passwd", size=3)], "absolute name"),
        ([entry("../../etc/passwd", size=3)], "leads out"),
        ([entry("./a/../../b", size=3)], "leads out"),
        ([entry("./same", tarfile.LNKTYPE, "/etc/shadow")], "absolute name"),
        ([entry("./same", tarfile.LNKTYPE, "../etc/shadow")], "leads out"),
        ([entry("./same", tarfile.LNKTYPE, "./not-there")], "not in it"),
        (
            [entry("./out", tarfile.SYMTYPE, "/etc"), entry("./out/passwd", size=3)],
            "behind the symbolic link out",
        ),
        (
            [
                entry("./a", tarfile.SYMTYPE, "/etc"),
                entry("./b", tarfile.LNKTYPE, "./a"),
                entry("./a/x", size=3),
            ],
            "behind the symbolic link a",
        ),
        ([entry("./disk", tarfile.BLKTYPE, devmajor=8, devminor=0)], r"device \(8:0\)"),
        ([entry("./mem", tarfile.CHRTYPE, devmajor=1, devminor=1)], r"device \(1:1\)"),
    ],
)
def test_what_reaches_out_is_refused(members: list[tarfile.TarInfo], reason: str, tmp_path: Path) -> None:
    file = packed(tmp_path, *HARMLESS, *members)
    with pytest.raises(BundleError, match=reason) as caught:
        bundle.check(file, limit=LIMIT)
    assert str(file) in caught.value.message


def test_device_nodes_pass_where_they_are_allowed(tmp_path: Path) -> None:
    file = packed(tmp_path, entry("./disk", tarfile.BLKTYPE, devmajor=8, devminor=0))
    bundle.check(file, limit=LIMIT, devices=True)


def test_a_directory_may_replace_a_link(tmp_path: Path) -> None:
    file = packed(
        tmp_path,
        entry("./lib", tarfile.SYMTYPE, "/usr/lib"),
        entry("./lib", tarfile.DIRTYPE, mode=0o755),
        entry("./lib/file", size=1),
    )
    bundle.check(file, limit=LIMIT)


def cut_off(data: bytes) -> bytes:
    return data[:-5]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def followed(data: bytes) -> bytes:
    return data + data


@pytest.mark.parametrize("damage", [cut_off, flipped, followed, lambda _: b"", lambda _: b"no archive"])
def test_damage_is_found(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = packed(tmp_path, *HARMLESS, entry("./large", size=300_000))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BundleError, match=r"damaged|cut off"):
        bundle.check(file, limit=LIMIT)


def test_an_archive_that_is_whole_for_zstd_but_not_for_tar_is_damaged(tmp_path: Path) -> None:
    plain = packed(tmp_path, entry("./large", size=300_000), compress=False).read_bytes()[:100_000]
    file = tmp_path / ARCHIVE
    file.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(plain))
    with pytest.raises(BundleError, match="damaged"):
        bundle.check(file, limit=LIMIT)


def test_a_bomb_is_stopped_at_its_declared_size(tmp_path: Path) -> None:
    file = tmp_path / ARCHIVE
    member = entry("./zeros", size=1 << 40)
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    with file.open("wb") as output:
        output.write(compressor.compress(member.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(200):
            output.write(compressor.compress(bytes(1 << 20)))
        output.write(compressor.flush())
    assert file.stat().st_size < 100_000
    with pytest.raises(BundleError, match="larger than it says: more than 10 MiB"):
        bundle.check(file, limit=LIMIT)


def made(directory: Path) -> Path:
    """A bundle of a small directory."""
    tree = directory / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="A system"\n')
    (tree / "etc/hostname").write_text("desktop\n")
    (tree / "lost+found").mkdir()
    (tree / "var/cache").mkdir(parents=True)
    (tree / "var/cache/much").write_text("much")
    packing.pack(tree, directory / "small", accelerator="tcg", exclude=["var/cache/*"])
    return directory / "small"


def test_packed_and_unpacked(tmp_path: Path) -> None:
    bundled = made(tmp_path)
    assert {path.name for path in bundled.iterdir()} == {ARCHIVE, DESCRIPTION}
    described = packing.unpack(bundled, tmp_path / "out")
    assert described.name == "small"
    assert described.os["ID"] == "debian"
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert found == {"etc", "etc/os-release", "etc/hostname", "var", "var/cache"}
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left over"


def test_same_directory_same_bundle(tmp_path: Path) -> None:
    first = made(tmp_path)
    packing.pack(
        tmp_path / "tree", tmp_path / "again", accelerator="tcg", name="small", exclude=["var/cache/*"]
    )
    for name in (ARCHIVE, DESCRIPTION):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_archive_that_is_not_the_described_one_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    bundled = made(tmp_path)
    packed(bundled, *HARMLESS)
    with pytest.raises(BundleError, match=f"{ARCHIVE} is not what {DESCRIPTION} says"):
        packing.unpack(bundled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_unpacked_into_a_new_directory_only(tmp_path: Path) -> None:
    bundled = made(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(InputError, match="not empty"):
        packing.unpack(bundled, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}', '{"name": "../x"}'])
def test_a_description_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(BundleError, match="no bundle's description"):
        bundle.describe(tmp_path / DESCRIPTION)
    with pytest.raises(BundleError, match="is missing"):
        bundle.describe(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("source", "output", "reason"),
    [
        ("no-such-file", "new", "cannot be read"),
        ("tree", "small", "is there already"),
        ("tree", "a b", "no name"),
    ],
)
def test_what_cannot_be_packed(source: str, output: str, reason: str, tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(InputError, match=reason):
        packing.pack(tmp_path / source, tmp_path / output, accelerator="tcg")


def test_an_attribute_that_the_directory_cannot_hold_is_an_error(tmp_path: Path) -> None:
    member = entry("./file", size=1)
    # tar only warns of that.
    member.pax_headers = {"SCHILY.xattr.user.large": "x" * 60_000}
    file = packed(tmp_path, member)
    (tmp_path / "out").mkdir()
    with pytest.raises(HostError, match="cannot hold an extended attribute"):
        bundle.unpack(file, tmp_path / "out")


def test_a_bundle_written_into_the_directory_it_is_made_of_is_not_in_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "var").mkdir(parents=True)
    (tree / "file").write_text("content")
    packing.pack(tree, tree / "var/bundle", accelerator="tcg")
    packing.unpack(tree / "var/bundle", tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert found == ["file", "var"]


@pytest.mark.parametrize("live", [True, False])
def test_a_running_systems_files_may_change_while_they_are_read(
    live: bool, tmp_path: Path, fake_command: FakeCommand
) -> None:
    (tmp_path / "tree").mkdir()
    fake_command("tar", "echo bytes; echo 'tar: ./x: file changed as we read it' >&2; exit 1")
    output = tmp_path / ARCHIVE
    if live:
        assert bundle.create(Tree(tmp_path / "tree"), output, None, live=True) == 6
    else:
        with pytest.raises(CommandError):
            bundle.create(Tree(tmp_path / "tree"), output, None)
    assert output.exists() == live
