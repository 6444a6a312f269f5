"""Renders a program's configuration from a template. In one that ends with .xml.j2 values stay text."""

from __future__ import annotations

from pathlib import Path

import jinja2

from vdibuild import resources


def render(template: str, site_directory: Path, **values: object) -> str:
    """The configuration as text. template: its name; site_directory: where templates/ is looked for first."""
    resources.find("templates", template, site_directory)  # says where it looked
    return environment(site_directory).get_template(template).render(**values)


def environment(site_directory: Path) -> jinja2.Environment:
    """In which templates are rendered that include others. site_directory: as for `render`."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.directories("templates", site_directory)),
        undefined=jinja2.StrictUndefined,
        # Nothing else is XML; that values fit there, the site file's types see to.
        autoescape=jinja2.select_autoescape(["xml.j2"], default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
