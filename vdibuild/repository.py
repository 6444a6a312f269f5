"""Where bundles are published: a directory, or a web server that takes files (WebDAV's PUT and MKCOL).

A bundle is a directory of the repository, named as the bundle. Its description comes last: a bundle without
one is not there.
"""

from __future__ import annotations

import http.client
import netrc
import os
import re
import shutil
import ssl
import tempfile
from base64 import b64encode
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

from vdibuild import bundle, hashing, progress
from vdibuild.bundle import ARCHIVE, DESCRIPTION, Description
from vdibuild.errors import BundleError, HostError
from vdibuild.scratch import beside

_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 20
_LARGEST_DESCRIPTION = 16 << 20


class Repository(Protocol):
    """A place for bundles."""

    def describe(self, name: str) -> Description | None:
        """A bundle's description, or None where there is no such bundle."""

    def put(self, directory: Path, described: Description) -> None:
        """Publish a bundle; it is not there until it is whole."""

    def get(self, described: Description, directory: Path) -> None:
        """Copy a bundle into an existing directory."""


def at(place: str) -> Repository:
    """The repository at a directory's path, or at an http or https URL."""
    return Web(place) if re.match(r"https?://", place) else Directory(Path(place))


def publish(directory: Path, place: str) -> Description:
    """Publish the bundle in a directory, unless it is there already.

    Raises BundleError when it is damaged, or another one of its name is there.
    """
    described = bundle.describe(directory / DESCRIPTION)
    with progress.step("check the bundle"):
        if hashing.of_file(directory / ARCHIVE) != described.sha256:
            raise BundleError(
                f"{directory / ARCHIVE} is not what {DESCRIPTION} says", "make the bundle again"
            )
    repository = at(place)
    there = repository.describe(described.name)
    if there is None:
        repository.put(directory, described)
    elif there.sha256 != described.sha256:
        raise BundleError(
            f"another bundle {described.name} is in {_shown(place)}", "give the new one a name of its own"
        )
    return described


def get(place: str, name: str, directory: Path) -> Description:
    """Copy a bundle of a repository into a directory. Raises BundleError where it is missing or damaged."""
    repository = at(place)
    described = repository.describe(name)
    if described is None:
        raise BundleError(f"there is no bundle {name} in {_shown(place)}")
    directory.mkdir(parents=True, exist_ok=True)
    repository.get(described, directory)
    if hashing.of_file(directory / ARCHIVE) != described.sha256:
        (directory / ARCHIVE).unlink()
        raise BundleError(f"the archive of {name} in {_shown(place)} is not what its description says")
    text = described.model_dump_json(indent=2, warnings="error") + "\n"
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")
    return described


class Directory:
    """A repository in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self, name: str) -> Description | None:
        """See Repository."""
        file = self._path / name / DESCRIPTION
        return bundle.describe(file) if file.exists() else None

    def put(self, directory: Path, described: Description) -> None:
        """See Repository."""
        with beside(self._path / described.name) as scratch:
            staging = scratch / described.name
            staging.mkdir()
            for name in (ARCHIVE, DESCRIPTION):
                shutil.copyfile(directory / name, staging / name)
                with (staging / name).open("rb") as file:
                    os.fsync(file.fileno())
            staging.rename(self._path / described.name)

    def get(self, described: Description, directory: Path) -> None:
        """See Repository."""
        shutil.copyfile(self._path / described.name / ARCHIVE, directory / ARCHIVE)


class Web:
    """A repository on a web server. Names and passwords for it are in ~/.netrc (netrc(5))."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise BundleError("the repository's URL holds a password", "put it into ~/.netrc (mode 0600)")
        self._url = url.rstrip("/")
        self._host, self._secure = parts.netloc, parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._headers = _authorization(parts.hostname or "")

    def describe(self, name: str) -> Description | None:
        """See Repository."""
        status, data = self._ask("GET", f"{name}/{DESCRIPTION}")
        if status == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise self._failed(name, status)
        with tempfile.NamedTemporaryFile(suffix=f"-{DESCRIPTION}") as file:
            file.write(data)
            file.flush()
            return bundle.describe(Path(file.name))

    def put(self, directory: Path, described: Description) -> None:
        """See Repository."""
        status, _ = self._ask("MKCOL", f"{described.name}/")
        if status not in (HTTPStatus.CREATED, HTTPStatus.METHOD_NOT_ALLOWED):  # 405: it is there
            raise self._failed(described.name, status)
        for name in (ARCHIVE, DESCRIPTION):
            file = directory / name
            with progress.step(f"upload {name}", total=file.stat().st_size) as step:
                status, _ = self._ask("PUT", f"{described.name}/{name}", file, step.advance)
            if status not in (HTTPStatus.CREATED, HTTPStatus.NO_CONTENT, HTTPStatus.OK):
                raise self._failed(described.name, status)

    def get(self, described: Description, directory: Path) -> None:
        """See Repository. A download that broke off goes on where it stopped."""
        from vdibuild import media

        url = f"{self._url}/{quote(described.name)}/{ARCHIVE}"
        file = media.fetch(url, described.sha256, directory / ".download")
        file.rename(directory / ARCHIVE)
        shutil.rmtree(directory / ".download")

    def _ask(
        self, method: str, path: str, file: Path | None = None, sent: Callable[[float], None] | None = None
    ) -> tuple[int, bytes]:
        """Ask the server; returns the status and the body, which has to be small."""
        headers = dict(self._headers)
        if file:
            headers["Content-Length"] = str(file.stat().st_size)
        if self._secure:
            context = ssl.create_default_context()
            server: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, timeout=_TIMEOUT_SECONDS, context=context
            )
        else:
            server = http.client.HTTPConnection(self._host, timeout=_TIMEOUT_SECONDS)
        try:
            server.putrequest(method, f"{self._path}/{quote(path)}")
            for name, value in headers.items():
                server.putheader(name, value)
            server.endheaders()
            if file:
                with file.open("rb") as source:
                    while data := source.read(_CHUNK):
                        server.send(data)
                        if sent:
                            sent(len(data))
            answer = server.getresponse()
            return answer.status, answer.read(_LARGEST_DESCRIPTION)
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"{_shown(self._url)} does not answer: {error}", "is the URL right?") from error
        finally:
            server.close()

    def _failed(self, name: str, status: int) -> BundleError:
        hints: dict[int, str] = {
            HTTPStatus.UNAUTHORIZED: "put name and password into ~/.netrc",
            HTTPStatus.FORBIDDEN: "the server does not allow it",
            HTTPStatus.METHOD_NOT_ALLOWED: "the server takes no files: nginx needs `dav_methods PUT MKCOL`",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "nginx needs `client_max_body_size 0`",
            HTTPStatus.CONFLICT: "the directory of the URL is not there",
        }
        return BundleError(f"{_shown(self._url)} answers {status} for {name}", hints.get(status, ""))


def _authorization(host: str) -> dict[str, str]:
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        found = None
    if found is None:
        return {}
    return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}


def _shown(place: str) -> str:
    """A repository's place without what may be secret in it."""
    return re.sub(r"//[^/@]*@", "//", place)
