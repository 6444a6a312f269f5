"""Bundles, read back with Python's tarfile and zstandard, which did not write them."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from tests.conftest import FakeCommand
from vdibuild import bundle
from vdibuild.errors import CommandError
from vdibuild.tree import Tree

EPOCH = 1_700_000_000


def make(root: Path) -> Tree:
    for name in ("dev", "proc", "run", "etc", "usr/bin", "opt/proc"):
        (root / name).mkdir(parents=True)
    (root / "etc/hostname").write_text("desktop\n")
    (root / "etc/old").write_text("old\n")
    os.utime(root / "etc/old", (1_000_000_000, 1_000_000_000))
    (root / "usr/bin/run").write_text("#!/bin/sh\n")
    (root / "usr/bin/run").chmod(0o4755)
    os.link(root / "usr/bin/run", root / "usr/bin/same")
    (root / "etc/link").symlink_to("/etc/hostname")
    os.setxattr(root / "etc/hostname", "user.note", b"kept")
    (root / "opt/proc/mine").write_text("not the API file system\n")
    (root / "run/leftover").write_text("gone at boot\n")
    with (root / "etc/sparse").open("wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(root)  # a socket's address is at most 108 bytes
        try:
            unix.bind("etc/socket")
        finally:
            os.chdir(here)
    return Tree(root)


def members(archive: Path) -> dict[str, tarfile.TarInfo]:
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_everything_is_kept(tmp_path: Path) -> None:
    tree = make(tmp_path / "root")
    bundle.create(tree, tmp_path / "b.tar.zst", EPOCH)
    found = members(tmp_path / "b.tar.zst")
    assert list(found) == sorted(found, key=lambda name: name.split("/"))
    assert found["./usr/bin/run"].mode == 0o4755
    assert found["./usr/bin/same"].islnk() and found["./usr/bin/same"].linkname == "./usr/bin/run"
    assert found["./etc/link"].linkname == "/etc/hostname"
    assert found["./etc/hostname"].pax_headers["SCHILY.xattr.user.note"] == "kept"
    assert found["./etc/hostname"].mtime == EPOCH
    assert found["./etc/old"].mtime == 1_000_000_000
    assert (found["./etc"].uid, found["./etc"].uname) == (0, "")
    assert found["./etc/sparse"].issparse() and found["./etc/sparse"].size > 4 << 20


def test_what_is_not_the_systems_is_left_out(tmp_path: Path) -> None:
    bundle.create(make(tmp_path / "root"), tmp_path / "b.tar.zst", EPOCH)
    found = members(tmp_path / "b.tar.zst")
    assert {"./dev", "./proc", "./run", "./opt/proc/mine"} <= set(found)
    assert not {"./run/leftover", "./etc/socket"} & set(found)


def test_same_tree_same_bytes(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    second = make(tmp_path / "second")
    for path in second.root.rglob("*"):
        if path.name != "old":
            os.utime(path, (EPOCH + 1000, EPOCH + 1000), follow_symlinks=False)
    bundle.create(first, tmp_path / "1.tar.zst", EPOCH)
    bundle.create(second, tmp_path / "2.tar.zst", EPOCH)
    assert (tmp_path / "1.tar.zst").read_bytes() == (tmp_path / "2.tar.zst").read_bytes()


def test_number_of_cores_does_not_matter(tmp_path: Path) -> None:
    tree = make(tmp_path / "root")
    # More than one of the compressor's jobs, so that there is something for a second thread to do.
    (tree.root / "usr/large").write_bytes(os.urandom(1 << 20) * 64 + os.urandom(40 << 20))
    bundle.create(tree, tmp_path / "all.tar.zst", EPOCH)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        bundle.create(tree, tmp_path / "one.tar.zst", EPOCH)
    finally:
        os.sched_setaffinity(0, cores)
    assert (tmp_path / "all.tar.zst").read_bytes() == (tmp_path / "one.tar.zst").read_bytes()


def test_the_zstd_command_reads_it(tmp_path: Path) -> None:
    bundle.create(make(tmp_path / "root"), tmp_path / "b.tar.zst", EPOCH)
    subprocess.run(["zstd", "--quiet", "--test", tmp_path / "b.tar.zst"], check=True)


def test_failing_tar_is_an_error_and_leaves_nothing(tmp_path: Path, fake_command: FakeCommand) -> None:
    tree = make(tmp_path / "root")
    fake_command("tar", "echo some bytes; echo tar: ./etc/x: Cannot open >&2; exit 2")
    with pytest.raises(CommandError) as caught:
        bundle.create(tree, tmp_path / "b.tar.zst", EPOCH)
    assert caught.value.status == 2
    assert caught.value.tail == ["tar: ./etc/x: Cannot open"]
    assert not (tmp_path / "b.tar.zst").exists()


def test_full_disk_is_noticed_and_tar_ended(tmp_path: Path) -> None:
    tree = make(tmp_path / "root")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        bundle.create(tree, tmp_path / "full", EPOCH)
    assert not (tmp_path / "full").is_symlink()
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""
