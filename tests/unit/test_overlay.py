"""Overlays: what is laid over a tree, and what cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vdibuild import overlay
from vdibuild.errors import InputError
from vdibuild.tree import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "root" / "etc").mkdir(parents=True)
    return Tree(tmp_path / "root")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "overlay" / "etc").mkdir(parents=True)
    return tmp_path / "overlay"


def test_files_directories_and_links(tree: Tree, source: Path) -> None:
    (source / "etc" / "motd").write_text("welcome")
    (source / "etc" / "motd").chmod(0o664)
    (source / "usr" / "bin").mkdir(parents=True)
    (source / "usr" / "bin" / "tool").write_text("#!/bin/sh\n")
    (source / "usr" / "bin" / "tool").chmod(0o775)
    (source / "etc" / "link").symlink_to("motd")
    (source / "empty").mkdir(mode=0o700)
    tree.write("/etc/motd", "old")
    overlay.lay(tree, source)
    assert tree.read("/etc/motd") == "welcome"
    assert tree.path("/etc/motd").stat().st_mode & 0o777 == 0o644
    assert tree.path("/usr/bin/tool").stat().st_mode & 0o777 == 0o755
    assert tree.path("/etc/link", follow=False).readlink() == Path("motd")
    assert tree.path("/empty").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_is_there_keeps_its_mode(tree: Tree, source: Path) -> None:
    tree.path("/etc").chmod(0o711)
    (source / "etc" / "x").touch()
    overlay.lay(tree, source)
    assert tree.path("/etc").stat().st_mode & 0o777 == 0o711


def test_directory_links_of_the_tree_are_followed_inside(tree: Tree, source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tree.root / "lib").symlink_to("usr/lib")
    (tree.root / "evil").symlink_to(tmp_path / "outside")
    tree.make_directory("/usr/lib")
    for name in ("lib", "evil"):
        (source / name).mkdir()
        (source / name / "file").write_text("laid")
    overlay.lay(tree, source)
    assert (tree.root / "usr" / "lib" / "file").read_text() == "laid"
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_in_a_files_place_is_replaced(tree: Tree, source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("the host's")
    (tree.root / "etc" / "motd").symlink_to(tmp_path / "outside")
    (source / "etc" / "motd").write_text("welcome")
    overlay.lay(tree, source)
    assert (tmp_path / "outside").read_text() == "the host's"
    assert tree.read("/etc/motd") == "welcome"


def test_a_file_where_a_directory_is(tree: Tree, source: Path) -> None:
    tree.write("/etc/conf.d/x", "")
    (source / "etc" / "conf.d").touch()
    with pytest.raises(InputError, match=r"etc/conf.d: the overlay has a file where .* /etc/conf.d"):
        overlay.lay(tree, source)


def test_a_directory_where_a_file_is(tree: Tree, source: Path) -> None:
    tree.write("/etc/conf.d", "")
    (source / "etc" / "conf.d").mkdir()
    with pytest.raises(InputError, match="the overlay has a directory where"):
        overlay.lay(tree, source)


def test_neither_file_nor_link(tree: Tree, source: Path) -> None:
    os.mkfifo(source / "etc" / "fifo")
    with pytest.raises(InputError, match="etc/fifo: an overlay has files, links and directories only"):
        overlay.lay(tree, source)
