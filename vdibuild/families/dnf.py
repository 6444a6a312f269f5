"""RPM repositories: where this host gets them from, what state they are in, and a system from them.

The system is made by dnf (4 or 5), whose options are all in one configuration file that the two read alike.
Scriptlets run chrooted: the new root gets /proc, /dev and /run in a mount namespace that ends with dnf.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import fnmatch
import hashlib
import platform
import re
import shutil
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from vdibuild import process, progress
from vdibuild.errors import CommandError, HostError, InputError, SpaceError, VdibuildError
from vdibuild.families import RepositoryState
from vdibuild.recipe import Packages, Recipe, Repository, package_line
from vdibuild.settings.images import System
from vdibuild.tree import Tree, host_command, without_callers_variables

_TIMEOUT = 20
"""Seconds a mirror may take to answer."""

_MIRRORS_ASKED = 3
"""How many mirrors of a list are asked before it counts as unreachable."""

_ETC = Path("/etc")
_SHARED_KEYS = Path("/usr/share/distribution-gpg-keys")

# What rpm's plugins do to a running system is wrong for a tree: labels by this host's policy, its journal,
# its audit trail, its shutdown.
_PLUGINS = ("audit", "dbus_announce", "fapolicyd", "ima", "selinux", "syslog", "systemd_inhibit")

# The initramfs is made when it is known what belongs into it; kernel-install(8) skips what is masked so.
_MASKED = ("50-dracut.install", "51-dracut-rescue.install")
_KERNEL_INSTALL = "/etc/kernel/install.d"

# dnf 4 and dnf 5 keep their caches within the installroot, in /var/cache.
_CACHES = ("dnf", "libdnf5")

_METALINK = {"m": "http://www.metalinker.org/", "mm0": "http://fedorahosted.org/mirrormanager"}
_REPOMD = {"r": "http://linux.duke.edu/metadata/repo"}


@dataclass(frozen=True)
class Release:
    """A release of Fedora or EL. vendor: `fedora` or `el`. version: $releasever."""

    vendor: str
    version: str

    @property
    def database(self) -> str:
        """Where its rpm keeps its database; Fedora moved it in release 36, EL in 10."""
        new = int(self.version) >= (36 if self.vendor == "fedora" else 10)
        return "/usr/lib/sysimage/rpm" if new else "/var/lib/rpm"


def release(image: System) -> Release:
    """The image's release (`fedora43`, `el10`). Raises VdibuildError for any other."""
    match = re.fullmatch(r"(fedora|el)(\d+)", image.release)
    # EL 8's rpm cannot read the SQLite database that every newer rpm writes.
    if not match or int(match[2]) < {"fedora": 36, "el": 9}[match[1]]:
        raise VdibuildError(
            f"release {image.release!r} is none that family redhat knows",
            "set `release` in the site file to one such as fedora43 (36 or newer) or el10 (9 or newer)",
        )
    return Release(match[1], match[2])


class Mirrors(dict[str, str]):
    """Values for a kickstart's template; asking for one that there is not says what to set."""

    def __missing__(self, role: str) -> str:
        raise HostError(
            f"this host's dnf knows no repository for mirror.{role}",
            "set the image's `mirror` in the site file: for Fedora the directory with releases/ and"
            " updates/ in it, for EL the one with BaseOS/ and AppStream/",
        )


# By vendor: the roles, the identifiers they have on such a host, and their places on a mirror.
_ROLES = {
    "fedora": {
        "main": ("fedora", "releases/{version}/Everything/{architecture}/os/"),
        "updates": ("updates", "updates/{version}/Everything/{architecture}/"),
    },
    "el": {
        "main": ("baseos", "BaseOS/{architecture}/os/"),
        "appstream": ("appstream", "AppStream/{architecture}/os/"),
    },
}


def mirrors(image: System, etc: Path = _ETC) -> Mirrors:
    """Where an image's packages come from, by role: `main`, and `updates` (Fedora) or `appstream` (EL).

    With each, ROLE_kind says how kickstart's `url` and `repo` are told of it: `baseurl` (for `url` this is
    `url`), `mirrorlist` or `metalink`. The image's own mirror first, else this host's dnf configuration in
    `etc`, as it stands there, where the host is of the image's distribution and release.
    """
    wanted = release(image)
    found = Mirrors()
    configured = {} if image.mirror else _configured(etc, wanted)
    for role, (identifier, place) in _ROLES[wanted.vendor].items():
        if image.mirror:
            below = place.format(version=wanted.version, architecture=platform.machine())
            kind, url = "baseurl", f"{image.mirror.rstrip('/')}/{below}"
        elif identifier in configured:
            kind, url = configured[identifier]
        else:
            continue
        found[role] = url
        found[f"{role}_kind"] = "url" if role == "main" and kind == "baseurl" else kind
    return found


def _configured(etc: Path, wanted: Release) -> dict[str, tuple[str, str]]:
    """The enabled repositories of a host of that release: kind and URL by identifier."""
    os_release = etc / "os-release"
    if not os_release.is_file():
        return {}
    pairs = (line.partition("=") for line in os_release.read_text(encoding="utf-8").splitlines())
    identity = {name: value.strip("\"'") for name, _, value in pairs}
    names = [identity.get("ID", ""), *identity.get("ID_LIKE", "").split()]
    vendor = "fedora" if names[0] == "fedora" else "el" if {"rhel", "centos"} & set(names) else ""
    if Release(vendor, identity.get("VERSION_ID", "").partition(".")[0]) != wanted:
        return {}
    variables = {path.name: path.read_text().strip() for path in (etc / "dnf" / "vars").glob("*")}
    found: dict[str, tuple[str, str]] = {}
    for path in sorted((etc / "yum.repos.d").glob("*.repo")):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.read_string(path.read_text(encoding="utf-8"))
        for identifier in parser.sections():
            section = parser[identifier]
            if section.get("enabled", "1").strip().lower() in ("0", "no", "false", "off"):
                continue
            for kind in ("baseurl", "mirrorlist", "metalink"):
                # A base URL may be a list of several; they are copies of each other.
                if section.get(kind, "").strip():
                    found[identifier] = (kind, _expanded(section[kind].split()[0], variables))
                    break
    return found


def _expanded(url: str, variables: Mapping[str, str]) -> str:
    """A URL with dnf's variables ($name, ${name}) put in; one that is not known stays (dnf.conf(5))."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: variables.get(m[1] or m[2], m[0]), url)


def repositories(recipe: Recipe, image: System) -> list[Repository]:
    """The recipe's repositories, the one of `url` first, under that name, and dnf's variables put in.

    Raises InputError for none at all, and for a name that dnf would take for another's.
    """
    if recipe.url is None:
        raise InputError(recipe.source, None, "the recipe does not say where packages come from", "add `url`")
    wanted = release(image)
    architecture = platform.machine()
    variables = {"releasever": wanted.version, "basearch": architecture, "arch": architecture}
    result: list[Repository] = []
    for entry in (recipe.url, *recipe.repositories):
        name = "url" if entry is recipe.url else re.sub(r"[^A-Za-z0-9_.:-]", "-", entry.name)
        if name in ("main", *(one.name for one in result)):
            message = f"a repository cannot be called {entry.name!r} here: the name is taken"
            raise InputError(recipe.source, entry.line, message)
        url = _expanded(entry.url, variables)
        result.append(Repository(name, url, entry.line, entry.mirrorlist, entry.metalink))
    return result


def states(recipe: Recipe, image: System) -> list[RepositoryState]:
    """Ask each of the recipe's repositories for its index. Raises HostError naming the one that fails."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(_state, repositories(recipe, image)))


def _state(repository: Repository) -> RepositoryState:
    if repository.metalink:
        return _metalink_state(repository.url, _fetch(repository.url))
    if not repository.mirrorlist:
        return _repomd_state(repository.url, repository.url)
    lines = _fetch(repository.url).decode(errors="replace").split()
    servers = [line for line in lines if "://" in line][:_MIRRORS_ASKED]
    failure = HostError(f"the list of mirrors {_shown(repository.url)} is empty", "is it a mirror list?")
    for server in servers:
        try:
            return _repomd_state(repository.url, server)
        except HostError as error:
            failure = error
    raise failure


def _repomd_state(url: str, server: str) -> RepositoryState:
    text = _fetch(f"{server.rstrip('/')}/repodata/repomd.xml")
    stamps = _parsed(url, text).findall("r:data/r:timestamp", _REPOMD)
    dates = [int(float(stamp.text)) for stamp in stamps if stamp.text]
    if not dates:
        raise HostError(
            f"the repository {_shown(url)} has an index without dates", "is it an RPM repository?"
        )
    return RepositoryState(_shown(url), hashlib.sha256(text).hexdigest(), max(dates))


def _metalink_state(url: str, text: bytes) -> RepositoryState:
    """What a metalink says of the newest repomd.xml: its hash there is the one that dnf checks."""
    root = _parsed(url, text)
    digest = root.findtext("m:files/m:file/m:verification/m:hash[@type='sha256']", "", _METALINK)
    date = root.findtext("m:files/m:file/mm0:timestamp", "", _METALINK)
    if not digest or not date:
        raise HostError(f"the metalink {_shown(url)} names no repomd.xml", "is its address right?")
    return RepositoryState(_shown(url), digest.strip(), int(date))


def _parsed(url: str, text: bytes) -> ElementTree.Element:
    try:
        # Expat resolves no external entities, and refuses those that multiply.
        return ElementTree.fromstring(text)  # noqa: S314
    except ElementTree.ParseError as error:
        message = f"the repository {_shown(url)} has a damaged index: {error}"
        raise HostError(message, "is it an RPM repository?") from None


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 (the recipe's own)
            data: bytes = answer.read()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise HostError(
            f"cannot read the package repository {_shown(url)}: {reason}",
            "check the address, the network and the proxy, or set another `mirror` in the site file",
        ) from None
    return data


def _shown(url: str) -> str:
    """A URL without the password it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)


def keyrings(image: System, etc: Path = _ETC, shared: Path = _SHARED_KEYS) -> list[Path]:
    """The files with the keys that may sign the image's packages. Raises HostError where there is none."""
    if image.keyring:
        if not image.keyring.is_file():
            raise HostError(f"the image's keyring {image.keyring} is not there")
        return [image.keyring]
    wanted = release(image)
    directory = etc / "pki" / "rpm-gpg"
    if wanted.vendor == "fedora":
        name = f"RPM-GPG-KEY-fedora-{wanted.version}-primary"
        found = [path for path in (directory / name, shared / "fedora" / name) if path.is_file()][:1]
    else:
        # EL has several vendors: only a host of the same release says whose keys count.
        found = sorted(directory.glob("RPM-GPG-KEY-*")) if _configured(etc, wanted) else []
    if not found:
        raise HostError(
            f"no keys to check the packages of {image.release} with",
            "set the image's `keyring` in the site file to a file with the public keys of its repositories",
        )
    return found


def bootstrap(recipe: Recipe, image: System, root: Path, downloads: Path) -> None:
    """Install the recipe's packages, and the image's own, into the new directory `root`.

    downloads: keeps packages between runs; a run waits for another that uses it. Every package must be
    signed by a key of the image's keyring. Raises InputError naming the recipe's line for a package or
    group that cannot be had, HostError for a repository, a missing program or a full disk.
    """
    for program in ("dnf", "bwrap"):
        if process.find(program) is None:
            raise HostError(f"command not found: {program}", f"install {program}; see `./inv doctor`")
    wanted = _wanted(recipe, image)
    sources = repositories(recipe, image)
    keys = keyrings(image)
    root.mkdir(parents=True)
    new = Tree(root)
    for name in _MASKED:
        new.link(f"{_KERNEL_INSTALL}/{name}", "/dev/null")
    for name in ("/proc", "/dev", "/run", *(f"/var/cache/{cache}" for cache in _CACHES)):
        new.make_directory(name)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="dnf-") as private, _exclusive(downloads):
        home = Path(private)
        (home / "none").mkdir()
        (home / ".rpmmacros").write_text(_macros(release(image), recipe.packages))
        configuration = home / "dnf.conf"
        configuration.write_text(_configuration(recipe, sources, keys, home / "none"))
        # The index is asked for in each run; metadata_expire=0 would take one of the same second for good.
        command = ["dnf", "--assumeyes", "--refresh", f"--config={configuration}"]
        command += [f"--installroot={new.root}", f"--releasever={release(image).version}", "install", *wanted]
        try:
            process.run(host_command(_with_file_systems(command, new.root, downloads)), env={"HOME": private})
        except CommandError as error:
            raise _explained(error, recipe, image, sources, root) from error
    _check_exclusions(recipe, new)
    _finish(new)


def _wanted(recipe: Recipe, image: System) -> list[str]:
    packages = recipe.packages
    for group in packages.excluded_groups:
        line = package_line(recipe, f"-@{group}")
        raise InputError(recipe.source, line, f"the group {group!r} cannot be left out as a whole")
    for name in (*packages.names, *packages.groups, packages.environment, *image.packages):
        if name.startswith("-") or re.search(r"[\s/]", name):
            raise InputError(recipe.source, package_line(recipe, name), f"{name!r} names no package")
    groups = ["core"] if packages.core and "core" not in packages.groups else []
    groups += [packages.environment] if packages.environment else []
    groups += packages.groups
    wanted = [*(f"@{group}" for group in groups), *packages.names, *image.packages]
    if not wanted:
        raise InputError(recipe.source, packages.line or None, "%packages asks for no package")
    return list(dict.fromkeys(wanted))


def _macros(wanted: Release, packages: Packages) -> str:
    """rpm's macros for this run: Debian's rpm has another place for the database (Debian bug 1004863)."""
    lines = [f"%_dbpath {wanted.database}", "%_db_backend sqlite"]
    if packages.translations is not None:
        lines.append(f"%_install_langs {':'.join(packages.catalogues) or 'C'}")
    return "\n".join([*lines, *(f"%__transaction_{name} %{{nil}}" for name in _PLUGINS)]) + "\n"


def _configuration(recipe: Recipe, sources: Sequence[Repository], keys: Sequence[Path], none: Path) -> str:
    """dnf.conf(5), dnf5.conf(5). none: an empty directory, instead of this host's repositories."""
    packages = recipe.packages
    lines = [
        "[main]",
        "gpgcheck=1",
        f"install_weak_deps={int(packages.weak_dependencies)}",
        f"tsflags={'' if packages.documentation else 'nodocs'}",
        f"excludepkgs={','.join(packages.excluded_names)}",
        "best=1",
        "keepcache=1",
        "skip_if_unavailable=0",
        "plugins=0",
        f"timeout={_TIMEOUT}",
        "retries=3",
        f"reposdir={none}",
        f"varsdir={none}",
    ]
    for source in sources:
        kind = "metalink" if source.metalink else "mirrorlist" if source.mirrorlist else "baseurl"
        lines += ["", f"[{source.name}]", f"name={source.name}", f"{kind}={source.url}"]
        lines.append(f"gpgkey={' '.join(path.resolve().as_uri() for path in keys)}")
    return "\n".join(lines) + "\n"


def _with_file_systems(command: Sequence[str], root: Path, downloads: Path) -> list[str]:
    """The command in a mount namespace in which `root` has what scriptlets need, and dnf its downloads."""
    sandbox = ["bwrap", "--dev-bind", "/", "/", "--die-with-parent", "--cap-add", "ALL"]
    # Scriptlets get dnf's environment.
    sandbox += without_callers_variables()
    sandbox += ["--proc", f"{root}/proc", "--dev", f"{root}/dev", "--tmpfs", f"{root}/run"]
    for name in _CACHES:
        (downloads / name).mkdir(exist_ok=True)
        sandbox += ["--bind", str(downloads.resolve() / name), f"{root}/var/cache/{name}"]
    return [*sandbox, "--", *command]


@contextlib.contextmanager
def _exclusive(downloads: Path) -> Iterator[None]:
    """Have the downloads for this run alone.

    dnf's own locks are files with process ids, which mean nothing in another PID namespace.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    with (downloads / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"waiting for another run that uses {downloads}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in downloads.glob("*/*.pid"):
            stale.unlink()
        yield


def _check_exclusions(recipe: Recipe, new: Tree) -> None:
    """What dnf reports as left out by a glob of ours is not there; what was needed failed before."""
    names = [name for name, *_ in query(new, "%{NAME}")]
    for glob in recipe.packages.excluded_names:
        for name in fnmatch.filter(names, glob):
            line = package_line(recipe, f"-{glob}")
            raise InputError(recipe.source, line, f"{name} cannot be excluded: the system needs it")


def _finish(new: Tree) -> None:
    """Take out what was there for the bootstrap only, and put rpm's and dnf's databases to rest."""
    for name in _MASKED:
        new.remove(f"{_KERNEL_INSTALL}/{name}")
    for name in _CACHES:
        new.remove(f"/var/cache/{name}")
    new.path("/proc").chmod(0o555)
    for pattern in ("/usr/lib/sysimage/rpm/*.sqlite", "/var/lib/rpm/*.sqlite", "/var/lib/dnf/*.sqlite"):
        for name in new.glob(pattern):
            # Closing the last connection writes the log of SQLite into the database and removes it.
            with contextlib.closing(sqlite3.connect(new.path(name))) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def query(tree: Tree, *tags: str) -> list[list[str]]:
    """What rpm's database in a tree says of each package: the tags (rpm's query format) of each, sorted.

    Keys that rpm keeps like packages are left out. Raises VdibuildError when the tree has no database.
    """
    places = ("/usr/lib/sysimage/rpm", "/var/lib/rpm")
    place = next((place for place in places if tree.exists(f"{place}/rpmdb.sqlite")), None)
    if place is None:
        raise VdibuildError(f"there is no rpm database in {tree.root}")
    wanted = "\\t".join(("%{NAME}", *tags))
    with tempfile.TemporaryDirectory(prefix="rpm-", dir=tree.root.parent) as private:
        # A copy: rpm opens the database for writing, and would leave its lock in the tree.
        for name in tree.glob(f"{place}/rpmdb.sqlite*"):
            shutil.copyfile(tree.path(name), Path(private) / Path(name).name)
        argv = ["rpm", f"--define=_dbpath {private}", "--define=_db_backend sqlite"]
        argv += ["--query", "--all", f"--queryformat={wanted}\\n"]
        text = process.run(argv, capture=True, env={"HOME": private}).stdout
    rows = sorted(line.split("\t") for line in text.splitlines())
    return [row[1:] for row in rows if row[0] != "gpg-pubkey"]


def _explained(
    error: CommandError, recipe: Recipe, image: System, sources: Sequence[Repository], root: Path
) -> Exception:
    """What dnf's last words mean to the person who wrote the recipe; dnf 4's and dnf 5's."""
    said = "\n".join(error.tail)
    if re.search(r"No space left on device|more space (?:is )?needed on the|needs .* more space", said):
        return SpaceError(f"no space left on the disk of {root}", "make room there, and run again")
    match = re.search(r"filtered out by exclude filtering for argument: (\S+)", said)
    if match:
        line = package_line(recipe, match[1])
        return InputError(recipe.source, line, f"package {match[1]!r} is both wanted and excluded")
    match = re.search(r"Module or Group '(\S+)' is not available|No match for argument: (\S+)", said)
    if match:
        return _missing(recipe, image, match[1] or match[2])
    match = re.search(r"[Ff]ailed to download metadata[^\n]*?(?:repo|repository) ['\"]([^'\"]+)", said)
    if match:
        url = next((_shown(source.url) for source in sources if source.name == match[1]), match[1])
        reason = re.search(r"Curl error \(\d+\): [^\n]*|Status code: \d+[^\n]*", said)
        return HostError(
            f"cannot read the package repository {url}: {reason[0] if reason else 'no answer'}",
            "check the network and the proxy, or set another `mirror` in the site file",
        )
    match = re.search(r"(\S+) is not signed|[Pp]ublic key for (\S+) is not installed|GPG check FAILED", said)
    match = match or re.search(r"(?:OpenPGP|PGP|GPG) (?:check|verification)[^\n]*failed", said, re.IGNORECASE)
    if match:
        name = next((group for group in match.groups() if group), "a package")
        hint = "set the image's `keyring` in the site file to the public keys of its repositories"
        return HostError(f"{name} is not signed by a key of the image's keyring", hint)
    match = re.search(r"package (\S+)-[^-\s]+-[^-\s]+ .*?is filtered out by exclude filtering", said)
    if match:
        return _excluded_but_needed(recipe, match[1], said)
    problem = re.search(r"Problem(?: \d+)?: (.+(?:\n {2,}- .+)*)", said)
    if problem:
        reason_text = re.sub(r"\s*\n\s*- ", "; ", problem[1])
        line = recipe.packages.line or None
        return InputError(recipe.source, line, f"the packages cannot be installed: {reason_text}")
    return CommandError(error.argv, error.status, error.tail, "dnf failed")


def _missing(recipe: Recipe, image: System, name: str) -> InputError:
    entries = [name, f"@{name}", f"@^{name.removeprefix('@')}"]
    line = next((found for entry in entries if (found := package_line(recipe, entry))), None)
    groups = {*recipe.packages.groups, recipe.packages.environment, "core"}
    if name.removeprefix("@") in groups - {""} and name not in recipe.packages.names:
        what = f"group {name.removeprefix('@')!r}"
    else:
        what = f"package {name!r}"
    if line is None and name in image.packages:
        what += " (of the image's `packages` in the site file)"
    return InputError(
        recipe.source, line or recipe.packages.line or None, f"no {what} in the recipe's repositories"
    )


def _excluded_but_needed(recipe: Recipe, needed: str, said: str) -> InputError:
    wanting = re.search(r"package (\S+)-[^-\s]+-[^-\s]+ .*?requires", said)
    by = f"{wanting[1]} needs it" if wanting else "the system needs it"
    for glob in recipe.packages.excluded_names:
        if fnmatch.fnmatchcase(needed, glob):
            line = package_line(recipe, f"-{glob}")
            return InputError(recipe.source, line, f"{needed} is excluded, but {by}")
    line = recipe.packages.line or None
    return InputError(recipe.source, line, f"{needed} is excluded by its repository, but {by}")
