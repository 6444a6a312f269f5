"""Bills of materials: read back as plain JSON, and by the parser and validator of spdx-tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from vdibuild import sbom
from vdibuild.families import Distribution, InstalledPackage

DEBIAN = Distribution("deb", "debian", "debian-13")
FEDORA = Distribution("rpm", "fedora", "fedora-43")
PACKAGES = (
    InstalledPackage("bash", "5.2.37-2+b5", "amd64", "bash", "GPL-3.0-or-later"),
    InstalledPackage("libstdc++6", "14.2.0-19", "amd64", "gcc-14", "GPLv3+ with exceptions"),
    InstalledPackage("libstdc--6", "14.2.0-19", "amd64", "", ""),
)


def written(path: Path, packages: tuple[InstalledPackage, ...] = PACKAGES, version: str = "1") -> Any:
    sbom.write(
        path,
        image="debian-13",
        version=version,
        packages=packages,
        distribution=DEBIAN,
        epoch=1_700_000_000,
        creator="vdibuild-0.1.0",
    )
    return json.loads(path.read_text())


def test_document(tmp_path: Path) -> None:
    document = written(tmp_path / "sbom.json")
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["creationInfo"]["created"] == "2023-11-14T22:13:20Z"
    bash, cxx, other = document["packages"][1:]
    assert bash["versionInfo"] == "5.2.37-2+b5"
    assert bash["licenseDeclared"] == "GPL-3.0-or-later"
    assert bash["externalRefs"][0]["referenceLocator"] == sbom.purl(PACKAGES[0], DEBIAN)
    assert cxx["licenseDeclared"] == "NOASSERTION"
    assert cxx["licenseComments"] == "the package says: GPLv3+ with exceptions"
    assert cxx["sourceInfo"] == "built from the source package gcc-14"
    assert cxx["SPDXID"] != other["SPDXID"]
    related = {(one["relationshipType"], one["relatedSpdxElement"]) for one in document["relationships"]}
    assert {("DESCRIBES", "SPDXRef-Image"), ("CONTAINS", bash["SPDXID"])} <= related
    assert len(related) == 1 + len(PACKAGES)


def test_another_reader_accepts_it(tmp_path: Path) -> None:
    written(tmp_path / "sbom.json")
    assert validate_full_spdx_document(parse_file(str(tmp_path / "sbom.json"))) == []


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    written(tmp_path / "1.json")
    written(tmp_path / "2.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    other = written(tmp_path / "3.json", version="2")["documentNamespace"]
    assert other != json.loads((tmp_path / "1.json").read_text())["documentNamespace"]


def test_one_package_twice(tmp_path: Path) -> None:
    document = written(tmp_path / "sbom.json", (PACKAGES[0], PACKAGES[0]))
    assert len({package["SPDXID"] for package in document["packages"]}) == 3


@pytest.mark.parametrize(
    ("package", "distribution", "expected"),
    [
        (
            InstalledPackage("libstdc++6", "1:14.2~rc1-19", "amd64", ""),
            DEBIAN,
            "pkg:deb/debian/libstdc%2B%2B6@1:14.2~rc1-19?arch=amd64&distro=debian-13",
        ),
        (
            InstalledPackage("bind-libs", "32:9.18.4-1.fc43", "x86_64", ""),
            FEDORA,
            "pkg:rpm/fedora/bind-libs@9.18.4-1.fc43?arch=x86_64&distro=fedora-43&epoch=32",
        ),
        (
            InstalledPackage("bash", "5.2.37-3.fc43", "x86_64", ""),
            FEDORA,
            "pkg:rpm/fedora/bash@5.2.37-3.fc43?arch=x86_64&distro=fedora-43",
        ),
    ],
)
def test_package_urls(package: InstalledPackage, distribution: Distribution, expected: str) -> None:
    assert sbom.purl(package, distribution) == expected
