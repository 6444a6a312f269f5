"""Where bundles are published: a directory, or a web server that takes files (WebDAV's PUT and MKCOL).

A bundle is a directory of the repository, named as the bundle: archive and description, and who vouches for
them. The description comes last: a bundle without one is not there.

    REPOSITORY/NAME/bundle.tar.zst
    REPOSITORY/NAME/bundle.json
    REPOSITORY/NAME/SHA256SUMS       of these two, as sha256sum writes it
    REPOSITORY/NAME/SHA256SUMS.sig   its signature (see signature)
"""

from __future__ import annotations

import hashlib
import http.client
import netrc
import re
import shutil
import ssl
import tempfile
from base64 import b64encode
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

from vdibuild import bundle, hashing, progress, signature
from vdibuild.bundle import ARCHIVE, DESCRIPTION, Description
from vdibuild.errors import BundleError, HostError
from vdibuild.output import sync
from vdibuild.scratch import beside
from vdibuild.settings.keys import Keys
from vdibuild.store import SIGNATURE, SUMS

_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 20
_LARGEST_DESCRIPTION = 16 << 20
_DOWNLOAD = ".download"


class Repository(Protocol):
    """A place for bundles."""

    def read(self, name: str, file: str) -> bytes | None:
        """A small file of a bundle, or None where it is not there."""

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """Publish a bundle's files, in this order; it is not there until it is whole."""

    def archive(self, described: Description, cache: Path) -> Path:
        """Where a bundle's archive is on this host; where that is not the repository itself, in the cache."""


def at(place: str) -> Repository:
    """The repository at a directory's path, or at an http or https URL."""
    return Web(place) if re.match(r"https?://", place) else Directory(Path(place))


def publish(directory: Path, place: str, keys: Keys) -> Description:
    """Sign and publish the bundle in a directory, unless it is there already. keys: who signs.

    Raises BundleError when it is damaged, or another one of its name is there.
    """
    described = bundle.describe(directory / DESCRIPTION)
    with progress.step("check the bundle"):
        if hashing.of_file(directory / ARCHIVE) != described.sha256:
            raise BundleError(
                f"{directory / ARCHIVE} is not what {DESCRIPTION} says", "make the bundle again"
            )
    repository = at(place)
    there = _described(repository, place, described.name)
    if there is not None and there.sha256 != described.sha256:
        raise BundleError(
            f"another bundle {described.name} is in {_shown(place)}", "give the new one a name of its own"
        )
    if there is None or repository.read(described.name, SIGNATURE) is None:
        with tempfile.TemporaryDirectory(prefix="vdibuild-") as scratch:
            sums, signed = Path(scratch) / SUMS, Path(scratch) / SIGNATURE
            text = (
                f"{described.sha256}  {ARCHIVE}\n{hashing.of_file(directory / DESCRIPTION)}  {DESCRIPTION}\n"
            )
            sums.write_text(text, encoding="ascii")
            signed.write_text(signature.sign(text, keys), encoding="ascii")
            files = {ARCHIVE: directory / ARCHIVE, SUMS: sums, SIGNATURE: signed}
            repository.put(described.name, {**files, DESCRIPTION: directory / DESCRIPTION})
    return described


def get(place: str, name: str, directory: Path) -> Description:
    """Copy a bundle of a repository into a directory. Raises BundleError where it is missing or damaged."""
    repository = at(place)
    described = _described(repository, place, name)
    if described is None:
        raise _missing(place, name)
    directory.mkdir(parents=True, exist_ok=True)
    archive = repository.archive(described, directory / _DOWNLOAD)
    if archive.is_relative_to(directory):
        archive.rename(directory / ARCHIVE)
        shutil.rmtree(directory / _DOWNLOAD)
    else:
        shutil.copyfile(archive, directory / ARCHIVE)
    if hashing.of_file(directory / ARCHIVE) != described.sha256:
        (directory / ARCHIVE).unlink()
        raise BundleError(f"the archive of {name} in {_shown(place)} is not what its description says")
    for file in (SUMS, SIGNATURE, DESCRIPTION):
        if (data := repository.read(name, file)) is not None:
            (directory / file).write_bytes(data)
    return described


def signed(place: str, name: str, keys: Keys) -> Description:
    """The description of a bundle that somebody signed whose signature counts.

    Nothing of the bundle is looked at before its signature, and the description vouches for the archive.
    Raises BundleError where there is no such bundle, or it is another one, StoreError for its signature.
    """
    repository = at(place)
    data = repository.read(name, DESCRIPTION)
    if data is None:
        raise _missing(place, name)
    with tempfile.TemporaryDirectory(prefix="vdibuild-") as scratch:
        for file in (SUMS, SIGNATURE):
            part = repository.read(name, file)
            if part is None:
                raise BundleError(
                    f"the bundle {name} in {_shown(place)} is not signed: {file} is missing",
                    "publish it again, with bundle.publish",
                )
            (Path(scratch) / file).write_bytes(part)
        signer = signature.verify(Path(scratch) / SUMS, Path(scratch) / SIGNATURE, keys)
        progress.note(f"{name} is signed by {signer}")
        lines = (Path(scratch) / SUMS).read_text(encoding="ascii").splitlines()
    if f"{hashlib.sha256(data).hexdigest()}  {DESCRIPTION}" not in lines:
        raise BundleError(f"{DESCRIPTION} of {name} in {_shown(place)} is not what was signed")
    described = bundle.description(data, _name_of_description(place, name))
    if described.name != name:
        # Signed as another one, and put in this one's place.
        raise BundleError(f"the bundle {name} in {_shown(place)} is {described.name}", "do not use it")
    return described


def _described(repository: Repository, place: str, name: str) -> Description | None:
    data = repository.read(name, DESCRIPTION)
    if data is None:
        return None
    return bundle.description(data, _name_of_description(place, name))


def _name_of_description(place: str, name: str) -> str:
    return f"{_shown(place)}/{name}/{DESCRIPTION}"


def _missing(place: str, name: str) -> BundleError:
    return BundleError(f"there is no bundle {name} in {_shown(place)}")


class Directory:
    """A repository in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str, file: str) -> bytes | None:
        """See Repository."""
        try:
            return (self._path / name / file).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """See Repository."""
        with beside(self._path / name) as scratch:
            staging = scratch / name
            staging.mkdir()
            for file, source in files.items():
                shutil.copyfile(source, staging / file)
                sync(staging / file)
            if (place := self._path / name).exists():
                for file in files:
                    (staging / file).rename(place / file)
            else:
                staging.rename(place)

    def archive(self, described: Description, cache: Path) -> Path:
        """See Repository."""
        return self._path / described.name / ARCHIVE


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

    def read(self, name: str, file: str) -> bytes | None:
        """See Repository."""
        status, data = self._ask("GET", f"{name}/{file}")
        if status == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise self._failed(name, status)
        return data

    def put(self, name: str, files: Mapping[str, Path]) -> None:
        """See Repository."""
        status, _ = self._ask("MKCOL", f"{name}/")
        if status not in (HTTPStatus.CREATED, HTTPStatus.METHOD_NOT_ALLOWED):  # 405: it is there
            raise self._failed(name, status)
        for file, source in files.items():
            with progress.step(f"upload {file}", total=source.stat().st_size) as step:
                status, _ = self._ask("PUT", f"{name}/{file}", source, step.advance)
            if status not in (HTTPStatus.CREATED, HTTPStatus.NO_CONTENT, HTTPStatus.OK):
                raise self._failed(name, status)

    def archive(self, described: Description, cache: Path) -> Path:
        """See Repository. A download that broke off goes on where it stopped."""
        from vdibuild import media

        return media.fetch(f"{self._url}/{quote(described.name)}/{ARCHIVE}", described.sha256, cache)

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
