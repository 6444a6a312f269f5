"""Writes what is in an image as a software bill of materials: SPDX 2.3, as JSON (see spdx.dev)."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from spdx_tools.common.spdx_licensing import spdx_licensing
from spdx_tools.spdx.model.actor import Actor, ActorType
from spdx_tools.spdx.model.document import CreationInfo, Document
from spdx_tools.spdx.model.package import (
    ExternalPackageRef,
    ExternalPackageRefCategory,
    Package,
    PackagePurpose,
)
from spdx_tools.spdx.model.relationship import Relationship, RelationshipType
from spdx_tools.spdx.model.spdx_no_assertion import SpdxNoAssertion
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
from spdx_tools.spdx.writer.json import json_writer

from vdibuild.families import Distribution, InstalledPackage


def write(
    path: Path,
    *,
    image: str,
    version: str,
    packages: tuple[InstalledPackage, ...],
    distribution: Distribution,
    epoch: int,
    creator: str,
) -> None:
    """Write the bill of materials of a version of an image.

    epoch: when it was made, in seconds since 1970. creator: what made it, such as vdibuild-0.1.0. Same
    arguments, same bytes. Raises ValueError when the result would not be valid SPDX.
    """
    content = f"{image} {version} {epoch} {creator} {distribution} {packages}"
    document = Document(
        CreationInfo(
            spdx_version="SPDX-2.3",
            spdx_id="SPDXRef-DOCUMENT",
            name=f"{image}-{version}",
            document_namespace="https://spdx.org/spdxdocs/"
            f"{image}-{version}-{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
            creators=[Actor(ActorType.TOOL, creator)],
            created=datetime.fromtimestamp(epoch, UTC).replace(tzinfo=None),  # spdx-tools writes a Z
        )
    )
    system = Package(
        spdx_id="SPDXRef-Image",
        name=image,
        version=version,
        download_location=SpdxNoAssertion(),
        files_analyzed=False,
        primary_package_purpose=PackagePurpose.OPERATING_SYSTEM,
    )
    contained = [_package(package, distribution) for package in packages]
    identifiers = _identifiers(packages)
    for package, identifier in zip(contained, identifiers, strict=True):
        package.spdx_id = identifier
    document.packages = [system, *contained]
    document.relationships = [
        Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, system.spdx_id),
        *(Relationship(system.spdx_id, RelationshipType.CONTAINS, identifier) for identifier in identifiers),
    ]
    problems = validate_full_spdx_document(document)
    if problems:
        raise ValueError(f"{path.name}: {problems[0].validation_message}")
    json_writer.write_document_to_file(document, str(path), validate=False)


def purl(package: InstalledPackage, distribution: Distribution) -> str:
    """A package's URL, such as pkg:deb/debian/bash@5.2.37-2?arch=amd64&distro=debian-13."""
    version = package.version
    qualifiers = {"arch": package.architecture, "distro": distribution.release}
    if distribution.type == "rpm" and ":" in version:
        # The rpm type has the epoch apart, the deb type has it in the version.
        qualifiers["epoch"], version = version.split(":", 1)
    path = "/".join(quote(part, safe="") for part in (distribution.namespace, package.name))
    query = "&".join(f"{key}={quote(value, safe=':')}" for key, value in sorted(qualifiers.items()) if value)
    return f"pkg:{distribution.type}/{path}@{quote(version, safe=':')}?{query}"


def _package(package: InstalledPackage, distribution: Distribution) -> Package:
    # Old packages declare their license in words of their own.
    in_spdx = bool(package.license) and not spdx_licensing.validate(package.license).errors
    return Package(
        spdx_id="",
        name=package.name,
        version=package.version,
        download_location=SpdxNoAssertion(),
        files_analyzed=False,
        license_concluded=SpdxNoAssertion(),
        license_declared=spdx_licensing.parse(package.license) if in_spdx else SpdxNoAssertion(),
        license_comment=None if in_spdx or not package.license else f"the package says: {package.license}",
        copyright_text=SpdxNoAssertion(),
        source_info=f"built from the source package {package.source}" if package.source else None,
        external_references=[
            ExternalPackageRef(
                ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", purl(package, distribution)
            )
        ],
    )


def _identifiers(packages: tuple[InstalledPackage, ...]) -> list[str]:
    """An SPDX identifier for each package (letters, digits, dots and dashes), all different."""
    result: list[str] = []
    taken: set[str] = set()
    for package in packages:
        base = re.sub(r"[^A-Za-z0-9.-]", "-", f"{package.name}-{package.version}-{package.architecture}")
        number = 1
        identifier = f"SPDXRef-Package-{base}"
        while identifier in taken:
            number += 1
            identifier = f"SPDXRef-Package-{base}-{number}"
        taken.add(identifier)
        result.append(identifier)
    return result
