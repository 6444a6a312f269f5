"""What is installed where there is no checkout."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_in_the_wheel() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [place.parent.relative_to(ROOT) for place in (ROOT / "vdibuild").rglob("__init__.py")]
    assert {".".join(place.parts) for place in there} <= set(described)
