from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdibuild import site
from vdibuild.errors import InputError

GOOD = """\
images:
  small:
    family: debian
    release: trixie
    kickstart: small.ks.j2
    disk: {size: 1.5GiB}
"""


def load(tmp_path: Path, text: str) -> site.Site:
    path = tmp_path / "vdibuild.yaml"
    path.write_text(text)
    return site.load(path)


def test_the_example_site_file_is_valid() -> None:
    loaded = site.load(Path(__file__).parents[2] / "vdibuild.yaml")
    assert loaded.image(None)[0] == "debian-13"


def test_sizes_are_in_mebibytes(tmp_path: Path) -> None:
    image = load(tmp_path, GOOD).images["small"]
    assert image.disk.size == 1536
    assert image.memory == 1024


def test_paths_start_from_the_site_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + "artifacts: out\n")
    assert loaded.artifacts_directory == tmp_path / "out"
    assert loaded.cache_directory == tmp_path / "out/.cache"
    named = load(tmp_path, GOOD + "    playbook: plays/site.yml\n    keyring: /etc/keys.gpg\n").images[
        "small"
    ]
    assert named.playbook == tmp_path / "plays/site.yml"
    assert named.keyring == Path("/etc/keys.gpg")


def test_the_installer_needs_no_settings(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert (loaded.installer.family, loaded.installer.overlays) == ("debian", ["installer"])
    named = load(tmp_path, GOOD + "installer: {release: forky, keyring: own.gpg}\n").installer
    assert (named.release, named.keyring) == ("forky", tmp_path / "own.gpg")
    assert named.kickstart == loaded.installer.kickstart


def test_the_kiosk_needs_no_settings_either(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).kiosk.overlays == ["kiosk"]
    named = load(tmp_path, GOOD + "kiosk: {settings: {server_ip: 192.0.2.1}, keyring: own.gpg}\n").kiosk
    assert (named.settings, named.keyring) == ({"server_ip": "192.0.2.1"}, tmp_path / "own.gpg")


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        (GOOD.replace("release", "relase"), 4, "images.small.relase: unknown key", "'release'"),
        (GOOD + "artefacts: x\n", 7, "artefacts: unknown key", "'artifacts'"),
        (GOOD.replace("size: 1.5GiB", "size: 8"), 6, "give a unit", "8GiB"),
        (GOOD.replace("1.5GiB", "huge"), 6, "'huge' is no size", ""),
        (GOOD.replace("1.5GiB", "0.3MiB"), 6, "not a whole number of MiB", ""),
        (GOOD.replace("family: debian", "family: beos"), 3, "'debian', 'redhat' or 'windows'", "family"),
        (GOOD.replace("    kickstart: small.ks.j2\n", ""), 2, "kickstart: is missing", "recipe"),
        (GOOD.replace("small:", "Small One:"), 2, "is no name", ""),
        (GOOD + "    release: bookworm\n", 7, "already given in line 4", ""),
        (GOOD.replace("small:", "installer:"), 1, "no image can be called installer", ""),
        (GOOD.replace("small:", "kiosk:"), 1, "no image can be called kiosk", ""),
        (GOOD + "installer: {disk: {size: 1GiB}}\n", 7, "installer.disk: unknown key", ""),
        (GOOD + "installer: {compression: {level: 23}}\n", 7, "less than or equal to 22", ""),
        ("", None, "is empty", ""),
        ("images: [\n", 2, "is no YAML", ""),
        ("images: {}\n", 1, "at least 1 item", ""),
    ],
)
def test_errors_name_line_and_key(
    tmp_path: Path, text: str, line: int | None, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert caught.value.line == line
    assert message in caught.value.message
    assert hint in str(caught.value)


def test_a_missing_site_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--site"):
        site.load(tmp_path / "vdibuild.yaml")


def test_an_unknown_image_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'small'"):
        load(tmp_path, GOOD).image("smal")


def test_the_schema_describes_every_setting() -> None:
    schema = site.schema()
    json.dumps(schema)
    for model in [schema, *schema["$defs"].values()]:
        for name, setting in model["properties"].items():
            assert setting.get("description") or "$ref" in setting, name


def test_a_key_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = "images: {small: {family: debian, release: sid, kickstart: a}}\n"
    path = tmp_path / "vdibuild.yaml"
    path.write_text(f"{images}keys: {{signing: key/mine}}\n")
    assert site.load(path).keys.signing == tmp_path / "key" / "mine"
    path.write_text(images)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert site.load(path).keys.signing == Path("/home/somebody/.config/vdibuild/signing_key")
