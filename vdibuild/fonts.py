"""fontconfig's cache of a system's fonts: without it every program that shows text reads all fonts first.

Packages make it when they are installed. But where SOURCE_DATE_EPOCH is set and earlier than the fonts'
directories, as in every reproducible build, fontconfig throws away what it has just made; and it takes no
cache for a directory of another time than the cache says (fontconfig, src/fccache.c).
"""

from __future__ import annotations

from vdibuild import process, progress
from vdibuild.tree import Tree

_DIRECTORIES = ("/usr/share/fonts", "/usr/local/share/fonts")


def make_cache(tree: Tree) -> None:
    """Make the cache for the times that the fonts' directories will have in the image.

    Those are SOURCE_DATE_EPOCH at most; nothing is done where that is not set, or there are no fonts or no
    fontconfig. Raises CommandError.
    """
    epoch = process.environment().get("SOURCE_DATE_EPOCH")
    places = [place for place in _DIRECTORIES if tree.exists(place)]
    if not epoch or not places or not tree.exists("/usr/bin/fc-cache"):
        return
    with progress.step("fonts"):
        tree.date_back(epoch, *places, kinds="d")
        tree.run(["fc-cache", "--force", "--system-only"])
