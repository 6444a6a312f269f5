"""File trees laid over a system: overlays/NAME/etc/motd becomes /etc/motd."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from vdibuild.errors import InputError
from vdibuild.tree import Tree

_PLACE = "/run/vdibuild-overlay"


def lay(tree: Tree, source: Path) -> None:
    """Copy the files and links below the directory `source` into the tree, replacing what is there.

    All of it belongs to root; modes are kept but for writing by others (a checkout's umask decides those).
    A directory that is there keeps its mode and owner. A link in a file's place is replaced, one on the way
    to it is followed within the tree. Raises InputError for what is neither file, link nor directory, and
    where a file would replace a directory or the other way round.
    """
    for directory, names, files in os.walk(source):
        names.sort()
        for name in sorted([*names, *files]):
            entry = Path(directory) / name
            inside = f"/{entry.relative_to(source)}"
            try:
                _lay_entry(tree, entry, inside)
            except PermissionError:
                # The directory is one of the tree's users' own: only the tree's root may enter it.
                _lay_as_root(tree, entry, inside, source)


def _lay_entry(tree: Tree, entry: Path, inside: str) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISDIR(mode):
        place = tree.path(inside)
        if place.exists() and not place.is_dir():
            raise InputError(
                entry, None, f"the overlay has a directory where the system has the file {inside}"
            )
        tree.make_directory(inside, _shared(mode))
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise InputError(entry, None, "an overlay has files, links and directories only")
    place = tree.path(inside, follow=False)
    if place.is_dir() and not place.is_symlink():
        raise InputError(entry, None, f"the overlay has a file where the system has the directory {inside}")
    place.unlink(missing_ok=True)
    shutil.copyfile(entry, place, follow_symlinks=False)
    if stat.S_ISREG(mode):
        place.chmod(_shared(mode))


def _lay_as_root(tree: Tree, entry: Path, inside: str, source: Path) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISDIR(mode):
        tree.run(["mkdir", "--parents", f"--mode={_shared(mode):o}", "--", inside])
        return
    options = ["--no-dereference", "--no-target-directory", "--remove-destination"]
    tree.run(["cp", *options, "--", f"{_PLACE}{inside}", inside], binds={source: _PLACE})
    if stat.S_ISREG(mode):
        tree.run(["chmod", f"{_shared(mode):o}", "--", inside])


def _shared(mode: int) -> int:
    """A file's permissions as a checkout has them, whatever the umask there was."""
    return stat.S_IMODE(mode) & ~0o022
