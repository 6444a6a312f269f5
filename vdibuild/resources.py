"""Finds kickstarts, templates and overlays: the site's own first, those that come with vdibuild second."""

from __future__ import annotations

from pathlib import Path

from vdibuild.errors import VdibuildError

KINDS = ("kickstarts", "templates", "overlays")


def packaged() -> Path:
    """Where the files that come with vdibuild are: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "resources"
    return inside if inside.is_dir() else Path(__file__).parent.parent


def directories(kind: str, site: Path) -> list[Path]:
    """The directories to search for a kind ("kickstarts", "templates", "overlays"), best first.

    site: the directory of the site file.
    """
    return [path for path in dict.fromkeys((site / kind, packaged() / kind)) if path.is_dir()]


def find(kind: str, name: str, site: Path) -> Path:
    """The file or directory of that kind and name. Raises VdibuildError, naming where it was looked for."""
    searched = directories(kind, site)
    for directory in searched:
        candidate = directory / name
        if candidate.exists():
            return candidate
    there = sorted({entry.name for directory in searched for entry in directory.iterdir()})
    raise VdibuildError(
        f"{kind[:-1]} {name!r} not found in {' or '.join(map(str, searched)) or site / kind}",
        f"there are: {', '.join(there) or 'none'}",
    )
