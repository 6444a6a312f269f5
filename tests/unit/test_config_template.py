from __future__ import annotations

from pathlib import Path

import pytest

from vdibuild import config_template
from vdibuild.errors import VdibuildError


def test_values_stay_text_in_xml_and_are_themselves_elsewhere(tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    templates.mkdir()
    for name in ("own.xml.j2", "own.conf.j2"):
        (templates / name).write_text("<name>{{ name }}</name>\n")
    name = "R&D</name>"
    assert config_template.render("own.xml.j2", tmp_path, name=name) == "<name>R&amp;D&lt;/name&gt;</name>\n"
    assert config_template.render("own.conf.j2", tmp_path, name=name) == f"<name>{name}</name>\n"


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VdibuildError, match=r"template 'own\.xml\.j2' not found"):
        config_template.render("own.xml.j2", tmp_path)
