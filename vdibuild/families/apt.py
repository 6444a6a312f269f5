"""Debian's package archives: where this host gets them from, what state they are in, and a system from them.

The system is made by mmdebstrap, whose apt and dpkg do the work; what is added here is the recipe's meaning
(exclusions, documentation, weak dependencies), packages kept between runs, and errors that name a line.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import email.utils
import errno
import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vdibuild import process, tree, unsynced
from vdibuild.errors import CommandError, HostError, InputError
from vdibuild.families import RepositoryState
from vdibuild.recipe import Recipe, Repository
from vdibuild.site import Image

_TIMEOUT = 20
"""Seconds a mirror may take to answer."""

_ETC_APT = Path("/etc/apt")
_DISTRO_INFO = Path("/usr/share/distro-info")
_KEYRINGS = Path("/usr/share/keyrings")

# Debian Policy 5.6.7; `=version`, `/suite` and `:architecture` as apt-get(8) takes them, and globs.
_PACKAGE = re.compile(r"[a-z0-9*?][a-z0-9+.*?-]*(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+|/[a-z-]+)?")

_EXCLUSIONS = "etc/apt/preferences.d/vdibuild-exclusions"
_DOCUMENTATION = ("doc", "doc-base", "info", "man", "groff", "linda", "lintian")


@dataclass(frozen=True)
class Source:
    """An entry of apt's sources: one archive with its suites (sources.list(5))."""

    uri: str
    suites: tuple[str, ...]


def host_sources(directory: Path = _ETC_APT) -> list[Source]:
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


def mirrors(image: Image) -> dict[str, str]:
    """Where an image's packages come from, by role: `main`, and `security` where there is one.

    The image's own mirrors first, else those of this host. Raises HostError where this host has none for
    the image's distribution.
    """
    main, security = image.mirror or "", image.security_mirror or ""
    if not main:
        main, host_security = _host_mirrors(image)
        security = security or host_security
    found = {"main": main, "security": security}
    return {role: url.rstrip("/") for role, url in found.items() if url}


def _host_mirrors(image: Image) -> tuple[str, str]:
    identity = _os_release()
    wanted = vendor(image.release)
    codename = identity.get("VERSION_CODENAME", "")
    main = security = ""
    if wanted in (identity.get("ID"), identity.get("UBUNTU_CODENAME") and "ubuntu"):
        codename = identity.get("UBUNTU_CODENAME") or codename
        for source in host_sources():
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


def _os_release() -> dict[str, str]:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, _, value in pairs}


def repositories(recipe: Recipe, image: Image) -> list[Repository]:
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


def states(recipe: Recipe, image: Image) -> list[RepositoryState]:
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
            f"cannot read the package archive {_shown(url)}: {reason}",
            f"does it have the suite {repository.name!r}?"
            if missing
            else "check the address, the network and the proxy, or set another `mirror` in the site file",
        ) from None
    return text


def _state(repository: Repository, text: bytes) -> RepositoryState:
    date = re.search(rb"^Date:\s*(.+)$", text, re.MULTILINE)
    url = f"{_shown(repository.url)} {repository.name}"
    if not date:
        raise HostError(f"the package archive {url} has an index without a date", "is it a Debian archive?")
    made = email.utils.parsedate_to_datetime(date[1].decode().strip().replace("UTC", "+0000"))
    return RepositoryState(url, hashlib.sha256(text).hexdigest(), int(made.timestamp()))


def _shown(url: str) -> str:
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


def keyrings(image: Image) -> list[Path]:
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


def sources(recipe: Recipe, image: Image) -> list[tuple[Repository, tuple[str, ...]]]:
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


def bootstrap(recipe: Recipe, image: Image, root: Path, downloads: Path) -> None:
    """Install the recipe's packages, and the image's own, into the new directory `root`, with mmdebstrap.

    There are always the essential packages, and apt unless it is excluded; @core adds those of priority
    required. No initramfs is made. downloads: keeps archives and indices between runs; several runs may
    share it. Raises InputError naming the recipe's line for a package that cannot be had, HostError for an
    archive that cannot, or a full disk.
    """
    wanted = _wanted(recipe, image)
    keys = keyrings(image)
    excluded = [*recipe.packages.excluded_names, *_tasks(recipe.packages.excluded_groups)]
    root.mkdir(parents=True)
    store = downloads / re.sub(r"[^A-Za-z0-9.-]+", "_", _shown(repositories(recipe, image)[0].url))
    _prepare(root, recipe, excluded)
    archives = sources(recipe, image)
    with tempfile.TemporaryDirectory() as private, _kept(root, store):
        listed = Path(private) / "vdibuild.sources"
        # dpkg, in the tree, does not see the files of a file: archive; apt copies those of a copy: one.
        text = sources_text(archives, [str(path) for path in keys])
        listed.write_text(re.sub(r"^URIs: file:", "URIs: copy:", text, flags=re.MULTILINE))
        argv = ["mmdebstrap", "--mode=root", "--format=directory", "--verbose"]
        argv += ["--skip=check/empty,essential/unlink,cleanup/apt/cache,cleanup/apt/lists"]
        if recipe.packages.weak_dependencies:
            argv.append('--aptopt=APT::Install-Recommends "true"')
        argv.append("--variant=essential")
        argv += [f"--include={name}" for name in wanted]
        if not any(fnmatch.fnmatchcase("apt", glob) for glob in excluded):
            argv.append("--include=apt")
        if recipe.packages.core:
            argv.append(f"--include={_by_priority('required', image.release, excluded)}")
        for group in recipe.packages.groups:
            if group == "standard":
                argv.append(f"--include={_by_priority('standard', image.release, excluded)}")
        proxy = {f"{name}_proxy": value for name, value in proxies().items()}
        # The kernel's packages would each make an initramfs, before there is all that belongs into it.
        env = {"INITRD": "No", **proxy}
        try:
            argv += [image.release, str(root), str(listed)]
            process.run(tree.host_command(unsynced.command(argv)), env=env)
        except CommandError as error:
            raise _explained(error, recipe, image, root) from error
    _check_exclusions(recipe, root, excluded)
    _finish(root, recipe, image, keys, archives)


def _wanted(recipe: Recipe, image: Image) -> list[str]:
    for name in (*recipe.packages.names, *image.packages):
        if not _PACKAGE.fullmatch(name):
            hint = "a package's name is lower-case letters, digits, + - . and globs"
            raise InputError(recipe.source, _package_line(recipe, name), f"{name!r} names no package", hint)
    if recipe.packages.environment:
        line = _package_line(recipe, f"@^{recipe.packages.environment}")
        hint = "list its packages, or a task such as @xfce-desktop"
        raise InputError(recipe.source, line, "Debian has no environment groups", hint)
    names = [*recipe.packages.names, *_tasks(recipe.packages.groups), *image.packages]
    return list(dict.fromkeys(names))


def _tasks(groups: Iterable[str]) -> list[str]:
    """Groups as packages: tasksel's tasks are packages named task-NAME. @core, @standard are priorities."""
    return [f"task-{group}" for group in groups if group not in ("core", "standard")]


def _by_priority(priority: str, release: str, excluded: Sequence[str]) -> str:
    """apt-patterns(7) for the packages of a priority in a release that are not excluded."""
    kinds = ["required"] if priority == "required" else ["important", "standard"]
    chosen = (
        f"?or({','.join(f'?priority({kind})' for kind in kinds)})" if kinds[1:] else "?priority(required)"
    )
    without = "".join(f",?not(?name(^{_expression(glob)}$))" for glob in excluded)
    suite = f"?or(?archive(^{release}$),?codename(^{release}$))"
    return f"?narrow({suite},?and({chosen},?not(?essential){without}))"


def _expression(glob: str) -> str:
    """A package glob as a POSIX extended regular expression."""
    return re.sub(r"[.+]", r"\\\g<0>", glob).replace("*", ".*").replace("?", ".")


def _prepare(root: Path, recipe: Recipe, excluded: Sequence[str]) -> None:
    """Put into the empty tree what apt and dpkg have to know from their first step on."""
    for name in ("etc/apt/preferences.d", "etc/dpkg/dpkg.cfg.d"):
        (root / name).mkdir(parents=True)
    if excluded:
        (root / _EXCLUSIONS).write_text(f"Package: {' '.join(excluded)}\nPin: release *\nPin-Priority: -1\n")
    if not recipe.packages.documentation:
        (root / "etc/dpkg/dpkg.cfg.d/excludedocs").write_text(
            "".join(f"path-exclude=/usr/share/{name}/*\n" for name in _DOCUMENTATION)
            + "path-include=/usr/share/doc/*/copyright\n"
        )


@contextlib.contextmanager
def _kept(root: Path, store: Path) -> Iterator[None]:
    """Give apt the archives and indices of earlier runs, and keep the new ones; by links where that goes.

    A link appears whole or not at all, and no run changes a kept file: runs need not wait for each other.
    """
    places = ((root / "var/cache/apt/archives", "archives"), (root / "var/lib/apt/lists", "lists"))
    for inside, name in places:
        (store / name).mkdir(parents=True, exist_ok=True)
        inside.mkdir(parents=True)
        for path in (store / name).iterdir():
            if not path.name.startswith("."):
                _link(path, inside / path.name)
    try:
        yield
    finally:
        for inside, name in places:
            for path in inside.iterdir() if inside.is_dir() else ():
                if path.is_file() and path.name != "lock":
                    if name == "lists" or not (store / name / path.name).exists():
                        _link(path, store / name / path.name)
                    path.unlink()


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, at once; a copy where they are on two file systems."""
    beside = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        os.link(source, beside)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy2(source, beside)
    beside.replace(target)
    # rename(2) does nothing, and leaves both names, when they are links to one file.
    beside.unlink(missing_ok=True)


def _check_exclusions(recipe: Recipe, root: Path, excluded: Sequence[str]) -> None:
    """An essential package is installed whatever the pins say."""
    status = tree.Tree(root).read("/var/lib/dpkg/status")
    for name in re.findall(r"^Package: (\S+)$", status, re.MULTILINE):
        for glob in excluded:
            if fnmatch.fnmatchcase(name, glob):
                line = _package_line(recipe, f"-{glob}")
                raise InputError(recipe.source, line, f"{name} cannot be excluded: the system needs it")


def _finish(
    root: Path,
    recipe: Recipe,
    image: Image,
    keys: Sequence[Path],
    archives: Sequence[tuple[Repository, Sequence[str]]],
) -> None:
    """Take out what was there for the bootstrap only, and put in the sources for the system's own use."""
    new = tree.Tree(root)
    temporary = ("/etc/apt/apt.conf.d/99mmdebstrap", "/etc/dpkg/dpkg.cfg.d/99mmdebstrap")
    for name in (*temporary, f"/{_EXCLUSIONS}", "/etc/hostname", "/etc/resolv.conf"):
        new.remove(name)
    # The kernel fills /dev; device nodes made by root would not be there in a user's tree.
    for name in new.glob("/dev/*"):
        new.remove(name)
    if not recipe.packages.documentation:
        _remove_documentation(new)
    new.remove("/etc/apt/sources.list")
    for name in new.glob("/etc/apt/sources.list.d/*"):
        new.remove(name)
    if not new.exists("/usr/bin/apt-get"):
        return
    signed_by = []
    for path in keys:
        if path != image.keyring and new.exists(str(path)):
            signed_by.append(str(path))
        else:
            signed_by.append(f"/etc/apt/keyrings/{path.name}")
            new.make_directory("/etc/apt/keyrings")
            shutil.copyfile(path, new.path(signed_by[-1], follow=False))
    new.write(f"/etc/apt/sources.list.d/{vendor(image.release)}.sources", sources_text(archives, signed_by))


def _remove_documentation(new: tree.Tree) -> None:
    """Remove what was extracted of the essential packages before dpkg knew what to leave out."""
    for kind in _DOCUMENTATION:
        for name in new.glob(f"/usr/share/{kind}/*"):
            if kind != "doc":
                new.remove(name)
                continue
            for inner in new.glob(f"{name}/*"):
                if not inner.endswith("/copyright"):
                    new.remove(inner)


def _package_line(recipe: Recipe, entry: str) -> int | None:
    """The line of %packages that has this entry (`name`, `-name`, `@group`)."""
    inside = False
    for number, text in enumerate(recipe.text.splitlines(), start=1):
        word = text.split("#")[0].strip()
        if word.startswith("%"):
            inside = word.split()[0] == "%packages"
        elif inside and word == entry:
            return number
    return None


def _explained(error: CommandError, recipe: Recipe, image: Image, root: Path) -> Exception:
    """What apt's and dpkg's last words mean to the person who wrote the recipe."""
    said = "\n".join(error.tail)
    if "No space left on device" in said or "You don't have enough free space" in said:
        return HostError(f"no space left on the disk of {root}", "make room there, and run again")
    match = re.search(
        r"E: (?:Unable to locate package|Package) '?([^\s']+)'?(?: has no installation|$)", said
    )
    match = match or re.search(r"E: (?:Couldn't find any package by \w+|Version '\S+' for) '([^\s']+)'", said)
    if match:
        return _no_package(recipe, image, root, match[1])
    match = re.search(r"^ (\S+) : (?:Pre-)?Depends: (\S+).* but it is not", said, re.MULTILINE)
    if match:
        return _no_dependency(recipe, match[1], match[2], match[0].strip())
    if re.search(r"NO_PUBKEY|is not signed|not available: |EXPKEYSIG|BADSIG|Missing key", said):
        asked = ", ".join(_shown(entry.url) for entry in repositories(recipe, image))
        hint = "update this host's keyring package, or set the image's `keyring`"
        return HostError(f"an archive's signature does not count: {asked}", hint)
    match = re.search(r"E: Failed to fetch (\S+)\s+(.*)", said) or re.search(
        r"Err:\d+ (\S+ \S+)\s*(.*)", said
    )
    if match:
        hint = "check the network and the proxy, or set another `mirror` in the site file"
        return HostError(f"cannot fetch {_shown(match[1])}: {match[2].strip() or 'no answer'}", hint)
    match = re.search(r"error processing (?:package|archive) (\S+)", said)
    failed = f"package {match[1]} could not be installed" if match else "mmdebstrap failed"
    return CommandError(error.argv, error.status, error.tail, failed)


def _no_package(recipe: Recipe, image: Image, root: Path, name: str) -> InputError:
    shown = f"@{name.removeprefix('task-')}" if name.startswith("task-") else name
    line = _package_line(recipe, name) or _package_line(recipe, shown)
    excluded = [glob for glob in recipe.packages.excluded_names if fnmatch.fnmatchcase(name, glob)]
    if excluded:
        message = f"package {name!r} is both wanted and excluded (-{excluded[0]})"
        return InputError(recipe.source, line, message)
    if line is None and name in image.packages:
        shown = f"{name} (of the image's `packages` in the site file)"
    near = difflib.get_close_matches(name, _offered(root), n=3, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    return InputError(recipe.source, line, f"no package {shown} in {image.release}", hint)


def _offered(root: Path) -> set[str]:
    """The names of the packages in the indices that apt has fetched."""
    names: set[str] = set()
    for path in (root / "var/lib/apt/lists").glob("*_Packages"):
        names.update(re.findall(r"^Package: (\S+)$", path.read_text(errors="replace"), re.MULTILINE))
    return names


def _no_dependency(recipe: Recipe, name: str, needed: str, said: str) -> InputError:
    for glob in recipe.packages.excluded_names:
        if fnmatch.fnmatchcase(needed, glob):
            line = _package_line(recipe, f"-{glob}")
            return InputError(recipe.source, line, f"{needed} is excluded, but {name} needs it")
    hint = "does an archive of the recipe lack it, or exclude it?"
    return InputError(recipe.source, _package_line(recipe, name), f"cannot install {said}", hint)
