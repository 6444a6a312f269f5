"""Renders a program's configuration from a template."""

from __future__ import annotations

from pathlib import Path

import jinja2

from vdibuild import resources


def render(template: str, site_directory: Path, **values: object) -> str:
    """The configuration as text. template: its name; site_directory: where templates/ is looked for first."""
    path = resources.find("templates", template, site_directory)
    environment = jinja2.Environment(  # noqa: S701 (no HTML; values come from the checked site file)
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(path.read_text(encoding="utf-8")).render(**values)
