"""Debian's package archives: where this host gets them from, what state they are in, who signs them."""

from __future__ import annotations

import csv
import email.utils
import hashlib
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vdibuild import process
from vdibuild.errors import HostError, InputError
from vdibuild.families import RepositoryState
from vdibuild.recipe import Recipe, Repository
from vdibuild.settings.images import System

_TIMEOUT = 20
"""Seconds a mirror may take to answer."""

_ETC = Path("/etc")
_DISTRO_INFO = Path("/usr/share/distro-info")
_KEYRINGS = Path("/usr/share/keyrings")


@dataclass(frozen=True)
class Source:
    """An entry of apt's sources: one archive with its suites (sources.list(5))."""

    uri: str
    suites: tuple[str, ...]


def host_sources(directory: Path) -> list[Source]:
    """The binary package archives that the apt configuration in `directory` names, in apt's order."""
    found: list[Source] = []
    for path in [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]:
        # apt reads a deb822 text in sources.list as well.
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if re.search(r"^types:", text, re.IGNORECASE | re.MULTILINE):
            found += _deb822(text)
        else:
            found += _one_line(text)
    return found


def _deb822(text: str) -> Iterator[Source]:
    # A comment line may stand anywhere, also within a field of several lines.
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", bare):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.lower()
                fields[name] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
            for uri in fields.get("uris", "").split():
                yield Source(uri.rstrip("/"), tuple(fields.get("suites", "").split()))


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)", line)
        if match:
            yield Source(match[1].rstrip("/"), (match[2],))


def vendor(release: str) -> str:
    """Who makes a release (`trixie`, `noble`): debian or ubuntu. Debian for a name nobody knows."""
    table = _DISTRO_INFO / "ubuntu.csv"
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            if any(row.get("series") == release for row in csv.DictReader(file)):
                return "ubuntu"
    return "debian"


def mirrors(image: System, etc: Path = _ETC) -> dict[str, str]:
    """Where an image's packages come from, by role: `main`, and `security` where there is one.

    The image's own mirrors first, else those of this host, whose configuration is in `etc`. Raises HostError
    where that has none for the image's distribution.
    """
    main, security = image.mirror or "", image.security_mirror or ""
    if not main:
        main, host_security = _host_mirrors(image, etc)
        security = security or host_security
    found = {"main": main, "security": security}
    return {role: url.rstrip("/") for role, url in found.items() if url}


def _host_mirrors(image: System, etc: Path) -> tuple[str, str]:
    identity = _os_release(etc)
    wanted = vendor(image.release)
    codename = identity.get("VERSION_CODENAME", "")
    main = security = ""
    if wanted in (identity.get("ID"), identity.get("UBUNTU_CODENAME") and "ubuntu"):
        codename = identity.get("UBUNTU_CODENAME") or codename
        for source in host_sources(etc / "apt"):
            # An unreleased Debian has no code name in os-release, but its suites do.
            if not main and {codename, "sid", "unstable", "testing"} & set(source.suites):
                main = source.uri
            if not security and any(suite.endswith(("-security", "/updates")) for suite in source.suites):
                security = source.uri
    if not main:
        raise HostError(
            f"this host's apt knows no mirror of {wanted.capitalize()}, which {image.release} comes from",
            "set the image's `mirror` (and `security_mirror`) in the site file",
        )
    return main, security


def _os_release(etc: Path) -> dict[str, str]:
    text = (etc / "os-release").read_text(encoding="utf-8")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, _, value in pairs}


def repositories(recipe: Recipe, image: System) -> list[Repository]:
    """The recipe's archives, each under the name of its suite; the release itself is the first.

    Raises InputError when there is none, or one is of a kind that apt does not know.
    """
    if recipe.url is None:
        raise InputError(recipe.source, None, "the recipe does not say where packages come from", "add `url`")
    main = Repository(image.release, recipe.url.url.rstrip("/"), recipe.url.line)
    rest = []
    for entry in (recipe.url, *recipe.repositories):
        if entry.mirrorlist or entry.metalink:
            raise InputError(
                recipe.source, entry.line, "a Debian archive has a plain URL, no list of mirrors"
            )
    for entry in recipe.repositories:
        rest.append(Repository(entry.name, entry.url.rstrip("/"), entry.line))
    return [main, *rest]


def states(recipe: Recipe, image: System) -> list[RepositoryState]:
    """Ask each of the recipe's archives for its index. Raises HostError naming the one that fails."""
    asked = repositories(recipe, image)
    with ThreadPoolExecutor(max_workers=8) as pool:
        texts = list(pool.map(_in_release, asked))
    return [_state(entry, text) for entry, text in zip(asked, texts, strict=True)]


def _in_release(repository: Repository) -> bytes:
    url = f"{repository.url}/dists/{repository.name}/InRelease"
    # apt's copy: is file: without the link into the archive.
    opened = re.sub(r"^copy:/*", "file:///", url)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies()))
    try:
        with opener.open(opened, timeout=_TIMEOUT) as answer:
            text: bytes = answer.read()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        missing = isinstance(error, urllib.error.HTTPError) and error.code == 404
        raise HostError(
            f"cannot read the package archive {shown(url)}: {reason}",
            f"does it have the suite {repository.name!r}?"
            if missing
            else "check the address, the network and the proxy, or set another `mirror` in the site file",
        ) from None
    return text


def _state(repository: Repository, text: bytes) -> RepositoryState:
    date = re.search(rb"^Date:\s*(.+)$", text, re.MULTILINE)
    url = f"{shown(repository.url)} {repository.name}"
    if not date:
        raise HostError(f"the package archive {url} has an index without a date", "is it a Debian archive?")
    made = email.utils.parsedate_to_datetime(date[1].decode().strip().replace("UTC", "+0000"))
    return RepositoryState(url, hashlib.sha256(text).hexdigest(), int(made.timestamp()))


def shown(url: str) -> str:
    """A URL without the password it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)


def proxies() -> dict[str, str]:
    """The proxies to use, by protocol: the environment's, else those of this host's apt."""
    found = urllib.request.getproxies()
    if "http" not in found and process.find("apt-config"):
        argv = ["apt-config", "dump", "--no-empty", "--format", "%f=%v%n"]
        for line in process.run([*argv, "Acquire"], capture=True).stdout.splitlines():
            match = re.match(r"Acquire::(https?)::Proxy=(.+)", line, re.IGNORECASE)
            if match and match[2] != "DIRECT":
                found.setdefault(match[1].lower(), match[2])
    return found


def keyrings(image: System) -> list[Path]:
    """The files with the keys that may sign the image's archives, on this host.

    Raises HostError where there is none.
    """
    usual = _KEYRINGS / f"{vendor(image.release)}-archive-keyring.gpg"
    found = [path for path in (usual, image.keyring) if path and path.is_file()]
    if image.keyring and image.keyring not in found:
        raise HostError(f"the image's keyring {image.keyring} is not there")
    if not found:
        raise HostError(
            f"no keys for {image.release}: {usual} is not there",
            f"install {vendor(image.release)}-archive-keyring, or set the image's `keyring`",
        )
    return found


def sources(recipe: Recipe, image: System) -> list[tuple[Repository, tuple[str, ...]]]:
    """The recipe's archives with the components to use of each: the image's, as far as it has them."""
    asked = repositories(recipe, image)
    if image.components == ["main"]:
        return [(entry, ("main",)) for entry in asked]
    with ThreadPoolExecutor(max_workers=8) as pool:
        texts = list(pool.map(_in_release, asked))
    result = []
    for entry, text in zip(asked, texts, strict=True):
        match = re.search(rb"^Components:\s*(.+)$", text, re.MULTILINE)
        has = [name.rpartition("/")[2] for name in match[1].decode().split()] if match else image.components
        # apt's update fails where an archive lacks a component that it is asked for.
        result.append((entry, tuple(name for name in image.components if name in has)))
    return result


def sources_text(sources: Iterable[tuple[Repository, Sequence[str]]], signed_by: Sequence[str]) -> str:
    """Archives with their components in deb822 form (sources.list(5)). signed_by: paths of keyrings."""
    return "\n".join(
        f"Types: deb\nURIs: {entry.url}\nSuites: {entry.name}\n"
        f"Components: {' '.join(components)}\nSigned-By: {' '.join(signed_by)}\n"
        for entry, components in sources
    )
