"""A system from Debian's packages: mmdebstrap does the work, and what it says becomes an error with a line.

What is added is the recipe's meaning (exclusions, documentation, weak dependencies), and packages that are
kept between runs.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vdibuild import process, tree, unsynced
from vdibuild.errors import CommandError, HostError, InputError, SpaceError
from vdibuild.families import apt
from vdibuild.recipe import Recipe, Repository, package_line
from vdibuild.settings.images import System

# Debian Policy 5.6.7; `=version`, `/suite` and `:architecture` as apt-get(8) takes them, and globs.
# A minus at the end would remove a package.
_PACKAGE = re.compile(
    r"[a-z0-9*](?:[a-z0-9+.*?-]*[a-z0-9+.*?])?(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+|/[a-z-]+)?"
)

_EXCLUSIONS = "etc/apt/preferences.d/vdibuild-exclusions"
_TRANSLATIONS = "/usr/share/locale"
_DOCUMENTATION = ("doc", "doc-base", "info", "man", "groff", "linda", "lintian")


# apt would wait for minutes for an archive that has stopped to answer.
_PATIENCE = (
    '--aptopt=Acquire::http::Timeout "10"',
    '--aptopt=Acquire::https::Timeout "10"',
    '--aptopt=Acquire::Retries "1"',
)

# How apt-get says that there is no package of a name.
_NO_PACKAGE = (
    r"^E: Unable to locate package (\S+)",
    r"^E: Package '(\S+)' has no installation candidate",
    r"^E: Couldn't find any package by \w+ '(\S+)'",
)


def bootstrap(recipe: Recipe, image: System, root: Path, downloads: Path) -> None:
    """Install the recipe's packages, and the image's own, into `root`, with mmdebstrap.

    root: a directory, made where it is missing, that holds nothing but mounted file systems, just as empty.
    There are always the essential packages, and apt unless it is excluded; @core adds those of priority
    required. No initramfs is made. downloads: keeps archives and indices between runs; several runs may
    share it. Raises InputError naming the recipe's line for a package that cannot be had, HostError for an
    archive that cannot, or a full disk.
    """
    wanted = _wanted(recipe, image)
    keys = apt.keyrings(image)
    excluded = [*recipe.packages.excluded_names, *_tasks(recipe.packages.excluded_groups)]
    root.mkdir(parents=True, exist_ok=True)
    store = downloads / re.sub(r"[^A-Za-z0-9.-]+", "_", apt.shown(apt.repositories(recipe, image)[0].url))
    _prepare(root, recipe, excluded)
    archives = apt.sources(recipe, image)
    with tempfile.TemporaryDirectory(prefix="apt-", dir=root.parent) as private, _kept(root, store):
        listed = Path(private) / "vdibuild.sources"
        # dpkg, in the tree, does not see the files of a file: archive; apt copies those of a copy: one.
        text = apt.sources_text(archives, [str(path) for path in keys])
        listed.write_text(re.sub(r"^URIs: file:", "URIs: copy:", text, flags=re.MULTILINE))
        argv = ["mmdebstrap", "--mode=root", "--format=directory", "--verbose"]
        argv += _PATIENCE
        argv += ["--skip=check/empty,essential/unlink,cleanup/apt/cache,cleanup/apt/lists"]
        if recipe.packages.weak_dependencies:
            argv.append('--aptopt=APT::Install-Recommends "true"')
        argv.append("--variant=essential")
        argv += [f"--include={name}" for name in wanted]
        if not any(fnmatch.fnmatchcase("apt", glob) for glob in excluded):
            argv.append("--include=apt")
        if recipe.packages.core:
            argv.append(_by_priority(["required"], image.release, excluded))
        if "standard" in recipe.packages.groups:
            argv.append(_by_priority(["important", "standard"], image.release, excluded))
        proxy = {f"{name}_proxy": value for name, value in apt.proxies().items()}
        # The kernel's packages would each make an initramfs, before there is all that belongs into it.
        env = {"INITRD": "No", **proxy}
        try:
            argv += [image.release, str(root), str(listed)]
            process.run(tree.host_command(unsynced.command(argv)), env=env)
        except CommandError as error:
            raise _explained(error, recipe, image, root) from error
    _check_exclusions(recipe, root, excluded)
    _finish(root, recipe, image, keys, archives)


def _wanted(recipe: Recipe, image: System) -> list[str]:
    for name in (*recipe.packages.names, *image.packages):
        if not _PACKAGE.fullmatch(name):
            hint = "a package's name is lower-case letters, digits, + - . and globs"
            raise InputError(recipe.source, package_line(recipe, name), f"{name!r} names no package", hint)
    if recipe.packages.environment:
        line = package_line(recipe, f"@^{recipe.packages.environment}")
        hint = "list its packages, or a task such as @xfce-desktop"
        raise InputError(recipe.source, line, "Debian has no environment groups", hint)
    names = [*recipe.packages.names, *_tasks(recipe.packages.groups), *image.packages]
    return list(dict.fromkeys(names))


def _tasks(groups: Iterable[str]) -> list[str]:
    """Groups as packages: tasksel's tasks are packages named task-NAME. @core, @standard are priorities."""
    return [f"task-{group}" for group in groups if group not in ("core", "standard")]


def _by_priority(priorities: Sequence[str], release: str, excluded: Sequence[str]) -> str:
    """The option for a release's packages of these priorities that are not excluded, by apt-patterns(7)."""
    suite = f"?or(?archive(^{release}$),?codename(^{release}$))"
    chosen = f"?or({','.join(f'?priority({priority})' for priority in priorities)})"
    without = "".join(f",?not(?name(^{_expression(glob)}$))" for glob in excluded)
    return f"--include=?narrow({suite},?and({chosen},?not(?essential){without}))"


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
    if recipe.packages.translations is not None:
        kept = ["locale.alias", *(f"{name}/*" for name in recipe.packages.catalogues)]
        (root / "etc/dpkg/dpkg.cfg.d/translations").write_text(
            f"path-exclude={_TRANSLATIONS}/*\n"
            + "".join(f"path-include={_TRANSLATIONS}/{path}\n" for path in kept)
        )


@contextlib.contextmanager
def _kept(root: Path, store: Path) -> Iterator[None]:
    """Give apt the archives and indices of earlier runs, and keep the new ones; by links where that goes.

    A link appears whole or not at all, and no run changes a kept file: runs need not wait for each other. An
    archive's time becomes that of the last run that got or installed it (cache.clear).
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
        installed = _archives(root)
        for inside, name in places:
            for path in inside.iterdir() if inside.is_dir() else ():
                if path.is_file() and path.name != "lock":
                    kept = store / name / path.name
                    new = not kept.exists()
                    if name == "lists" or new:
                        _link(path, kept)
                    if name == "archives" and (new or path.name in installed):
                        os.utime(kept)
                    path.unlink()


def _archives(root: Path) -> set[str]:
    """What apt calls the archives of the installed packages (pkgAcqArchive in apt-pkg/acquire-item.cc)."""
    try:
        status = tree.Tree(root).read("/var/lib/dpkg/status")
    except FileNotFoundError:
        return set()  # it failed before there was one
    fields = re.findall(r"^(Package|Version|Architecture): (\S+)$", status, re.MULTILINE)
    names = set()
    paragraph: dict[str, str] = {}
    for key, value in fields:
        paragraph = {key: value} if key == "Package" else paragraph | {key: value.replace(":", "%3a")}
        if len(paragraph) == 3:
            names.add("{Package}_{Version}_{Architecture}.deb".format(**paragraph))
    return names


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
                line = package_line(recipe, f"-{glob}")
                raise InputError(recipe.source, line, f"{name} is excluded, but the system needs it")


def _finish(
    root: Path,
    recipe: Recipe,
    image: System,
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
    if recipe.packages.translations is not None:
        kept = {"locale.alias", *recipe.packages.catalogues}
        for name in new.glob(f"{_TRANSLATIONS}/*"):
            if name.rpartition("/")[2] not in kept:
                new.remove(name)
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
    new.write(
        f"/etc/apt/sources.list.d/{apt.vendor(image.release)}.sources", apt.sources_text(archives, signed_by)
    )


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


def _explained(error: CommandError, recipe: Recipe, image: System, root: Path) -> Exception:
    """What apt's and dpkg's last words mean to the person who wrote the recipe."""
    said = "\n".join(error.tail)

    def find(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, said, re.MULTILINE)

    if "No space left on device" in said or "You don't have enough free space" in said:
        return SpaceError(f"no space left on the disk of {root}", "make room there, and run again")
    if match := find(r"^E: Version '(\S+)' for '(\S+)' was not found"):
        line = package_line(recipe, f"{match[2]}={match[1]}")
        return InputError(recipe.source, line, f"no version {match[1]} of {match[2]} in {image.release}")
    for pattern in _NO_PACKAGE:
        if match := find(pattern):
            return _no_package(recipe, image, root, match[1])
    if match := find(r"^ (\S+) : (?:Pre-)?Depends: (\S+).* but it is not"):
        return _no_dependency(recipe, match[1], match[2], match[0].strip())
    if match := find(r"The repository '(\S+) (\S+) Release' does not have a Release file"):
        hint = "check the recipe's `url` and `repo`, and the image's `release`"
        return HostError(f"there is no Debian archive with {match[2]!r} at {apt.shown(match[1])}", hint)
    if match := find(r"E: Failed to fetch (\S+)\s+(.*)") or find(r"Err:\d+ (\S+ \S+)\s*(.*)"):
        hint = "check the network and the proxy, or set another `mirror` in the site file"
        return HostError(f"cannot fetch {apt.shown(match[1])}: {match[2].strip() or 'no answer'}", hint)
    if find(r"NO_PUBKEY|is not signed|not available: |EXPKEYSIG|BADSIG|Missing key"):
        asked = ", ".join(apt.shown(entry.url) for entry in apt.repositories(recipe, image))
        hint = "update this host's keyring package, or set the image's `keyring`"
        return HostError(f"an archive's signature does not count: {asked}", hint)
    match = find(r"error processing (?:package|archive) (\S+)")
    failed = f"package {match[1]} could not be installed" if match else "mmdebstrap failed"
    return CommandError(error.argv, error.status, error.tail, failed)


def _no_package(recipe: Recipe, image: System, root: Path, name: str) -> InputError:
    for glob in recipe.packages.excluded_names:
        if fnmatch.fnmatchcase(name, glob):
            why = "also wanted" if name in recipe.packages.names else "the system needs it"
            return InputError(
                recipe.source, package_line(recipe, f"-{glob}"), f"{name} is excluded, but {why}"
            )
    shown = f"@{name.removeprefix('task-')}" if name.startswith("task-") else name
    line = package_line(recipe, name) or package_line(recipe, shown)
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
            line = package_line(recipe, f"-{glob}")
            return InputError(recipe.source, line, f"{needed} is excluded, but {name} needs it")
    hint = "does an archive of the recipe lack it, or exclude it?"
    return InputError(recipe.source, package_line(recipe, name), f"cannot install {said}", hint)
