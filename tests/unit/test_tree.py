"""Paths in a tree never lead out of it, whatever links the tree has."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdibuild.errors import InputError
from vdibuild.tree import Tree, remove


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("the host's")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    return Tree(root)


def outside(tree: Tree) -> Path:
    return tree.root.parent / "outside"


def untouched(tree: Tree) -> bool:
    entries = [(path.name, path.read_text()) for path in outside(tree).iterdir()]
    return entries == [("secret", "the host's")]


class TestPath:
    def test_absolute_links_begin_at_the_trees_root(self, tree: Tree) -> None:
        (tree.root / "var").symlink_to("/usr/var")
        assert tree.path("/var/log") == tree.root / "usr" / "var" / "log"

    def test_two_slashes_are_no_other_root(self, tree: Tree) -> None:
        (tree.root / "var").symlink_to("//usr")
        assert tree.path("/var/x") == tree.root / "usr" / "x"
        assert tree.path("//etc") == tree.root / "etc"

    def test_dots_end_at_the_trees_root(self, tree: Tree) -> None:
        (tree.root / "up").symlink_to("../../../outside")
        assert tree.path("/up/secret") == tree.root / "outside" / "secret"
        assert tree.path("../../outside") == tree.root / "outside"
        assert tree.path("etc/../..") == tree.root

    def test_links_to_links(self, tree: Tree) -> None:
        (tree.root / "one").symlink_to("etc/two")
        (tree.root / "etc" / "two").symlink_to("../three")
        assert tree.path("one") == tree.root / "three"

    def test_the_last_component_can_stay_a_link(self, tree: Tree) -> None:
        (tree.root / "etc" / "link").symlink_to("/elsewhere")
        assert tree.path("/etc/link", follow=False) == tree.root / "etc" / "link"

    def test_a_loop_is_an_error(self, tree: Tree) -> None:
        (tree.root / "a").symlink_to("b")
        (tree.root / "b").symlink_to("a")
        with pytest.raises(InputError, match="too many symbolic links"):
            tree.path("/a/file")

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_never_leaves_the_tree(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        names = st.sampled_from(["a", "b", "c", "..", ".", "/"])
        paths = st.lists(names, min_size=1, max_size=6).map("/".join)
        tree = Tree(tmp_path_factory.mktemp("tree"))
        for name in ("a", "b", "c", "a/b", "b/c"):
            place = tree.root / name
            if not place.parent.is_dir() or place.parent.is_symlink():
                continue
            if data.draw(st.booleans()):
                place.symlink_to(data.draw(paths))
            else:
                place.mkdir()
        for follow in (True, False):
            try:
                found = tree.path(data.draw(paths), follow=follow)
            except InputError:
                continue
            assert found.is_relative_to(tree.root)
            # What is left to resolve is the last component at most: the kernel would end inside as well.
            assert found.parent.resolve().is_relative_to(tree.root) or found == tree.root


class TestWrite:
    def test_a_link_is_replaced_not_followed(self, tree: Tree) -> None:
        (tree.root / "etc" / "motd").symlink_to(outside(tree) / "secret")
        tree.write("/etc/motd", "welcome", mode=0o600)
        assert untouched(tree)
        assert tree.read("/etc/motd") == "welcome"
        assert (tree.root / "etc" / "motd").stat().st_mode & 0o777 == 0o600

    def test_a_directory_link_leads_to_the_trees_own(self, tree: Tree) -> None:
        (tree.root / "evil").symlink_to(outside(tree))
        tree.write("/evil/secret", "mine")
        assert untouched(tree)
        assert (tree.root / str(outside(tree)).lstrip("/") / "secret").read_text() == "mine"

    def test_links_are_written_as_they_are(self, tree: Tree) -> None:
        tree.write("/etc/localtime", "a file")
        tree.link("/etc/localtime", "../usr/share/zoneinfo/Etc/UTC")
        assert (tree.root / "etc" / "localtime").readlink() == Path("../usr/share/zoneinfo/Etc/UTC")

    def test_new_directories_can_be_entered_by_all(self, tree: Tree) -> None:
        made = tree.make_directory("/srv/a/b")
        assert [path.stat().st_mode & 0o777 for path in (made, made.parent)] == [0o755, 0o755]


class TestRead:
    def test_a_link_out_of_the_tree_is_read_inside(self, tree: Tree) -> None:
        (tree.root / "etc" / "shadow").symlink_to(outside(tree) / "secret")
        assert not tree.exists("/etc/shadow")
        with pytest.raises(FileNotFoundError):
            tree.read("/etc/shadow")


class TestRemove:
    def test_a_link_goes_its_target_stays(self, tree: Tree) -> None:
        (tree.root / "etc" / "link").symlink_to(outside(tree))
        tree.remove("/etc/link")
        assert untouched(tree)
        assert not (tree.root / "etc" / "link").is_symlink()

    def test_below_a_link_to_the_host(self, tree: Tree) -> None:
        (tree.root / "evil").symlink_to(outside(tree))
        tree.remove("/evil/secret")
        assert untouched(tree)

    def test_a_directory_and_nothing(self, tree: Tree) -> None:
        (tree.root / "etc" / "deep" / "er").mkdir(parents=True)
        (tree.root / "etc" / "deep" / "link").symlink_to(outside(tree))
        tree.remove("/etc/deep")
        tree.remove("/etc/deep")
        assert untouched(tree)
        assert list((tree.root / "etc").iterdir()) == []

    def test_of_a_whole_tree(self, tree: Tree) -> None:
        (tree.root / "link").symlink_to(outside(tree))
        remove(tree.root)
        remove(tree.root)
        assert not tree.root.exists()
        assert untouched(tree)


class TestGlob:
    def test_finds_paths_of_the_tree(self, tree: Tree) -> None:
        tree.write("/etc/ssh/b_key", "")
        tree.write("/etc/ssh/a_key", "")
        assert tree.glob("/etc/ssh/*_key") == ["/etc/ssh/a_key", "/etc/ssh/b_key"]

    def test_follows_the_fixed_beginning_inside(self, tree: Tree) -> None:
        tree.write("/usr/lib/x", "")
        (tree.root / "lib").symlink_to("usr/lib")
        assert tree.glob("/lib/*") == ["/usr/lib/x"]

    def test_sees_nothing_of_the_host(self, tree: Tree) -> None:
        (tree.root / "evil").symlink_to(outside(tree))
        assert tree.glob("/evil/*") == []

    def test_a_dangling_link_is_there(self, tree: Tree) -> None:
        (tree.root / "dangling").symlink_to("/nowhere")
        assert tree.glob("/dangling") == ["/dangling"]
        assert tree.glob("/missing") == []
