"""Makes a small, real RPM repository with rpmbuild, rpmsign and createrepo_c.

All its packages are subpackages of one source package, `testos`, so that one run of rpmbuild makes them.
Every command runs with a home of its own: neither the host's RPM macros nor its GnuPG keys are touched.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vdibuild import process

VERSION = "1.0-1"


@dataclass(frozen=True)
class Package:
    """A package. files: text, or a host file to copy, by absolute path; a value of None is a directory,
    `-> TARGET` a symbolic link. configuration: %config(noreplace) files. documentation: %doc files.
    post: a /bin/sh scriptlet.
    """

    name: str
    files: Mapping[str, str | Path | None] = field(default_factory=dict)
    configuration: dict[str, str] = field(default_factory=dict)
    documentation: dict[str, str] = field(default_factory=dict)
    executables: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    recommends: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    post: str = ""


@dataclass(frozen=True)
class Group:
    """A comps group with its mandatory packages; default: those that come with it unless excluded."""

    name: str
    mandatory: tuple[str, ...]
    default: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """A comps environment and its mandatory groups."""

    name: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """A signing key. home: GnuPG's; public: the ASCII-armoured public key."""

    home: Path
    public: Path


@contextlib.contextmanager
def signing_key(directory: Path, user: str = "testos@example.org") -> Iterator[Key]:
    """A fresh key in `directory`, which must be short (GnuPG's agent keeps a socket there)."""
    home = directory / "gnupg"
    home.mkdir(mode=0o700)
    env = {"GNUPGHOME": str(home)}
    generate = ["gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", "", "--quick-gen-key"]
    try:
        process.run([*generate, user, "rsa2048", "sign", "never"], env=env)
        public = directory / "RPM-GPG-KEY-test"
        process.run(["gpg", "--batch", "--armor", "--output", str(public), "--export", user], env=env)
        yield Key(home, public)
    finally:
        process.run(["gpgconf", "--kill", "all"], env=env)


def build(
    directory: Path,
    packages: Sequence[Package],
    groups: Sequence[Group] = (),
    environments: Sequence[Environment] = (),
    key: Key | None = None,
) -> Path:
    """Build the packages, sign them where a key is given, and index them. Returns the repository."""
    home, sources, repository = directory / "home", directory / "sources", directory / "repository"
    for made in (home, sources, repository):
        made.mkdir(parents=True)
    spec = directory / "testos.spec"
    spec.write_text(_spec(packages, sources))
    env = {"HOME": str(home)}
    # Nothing of the payload is to be stripped or byte-compiled, and the fastest compression will do.
    process.run(
        [
            "rpmbuild",
            "-bb",
            "--quiet",
            f"--define=_topdir {directory / 'build'}",
            f"--define=_rpmdir {repository}",
            "--define=_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
            "--define=_binary_payload w1.gzdio",
            "--define=debug_package %{nil}",
            "--define=__os_install_post %{nil}",
            "--define=_build_id_links none",
            str(spec),
        ],
        env=env,
    )
    shutil.rmtree(directory / "build")
    if key:
        signed = [str(path) for path in sorted(repository.glob("*.rpm"))]
        gpg = str(process.find("gpg"))
        command = ["rpmsign", f"--define=__gpg {gpg}", "--define=_gpg_name testos@example.org", "--addsign"]
        process.run([*command, *signed], env=env | {"GNUPGHOME": str(key.home)})
    index(repository, groups, environments)
    return repository


def index(repository: Path, groups: Sequence[Group] = (), environments: Sequence[Environment] = ()) -> None:
    """Make the index of a directory of packages anew."""
    shutil.rmtree(repository / "repodata", ignore_errors=True)
    comps = repository.parent / "comps.xml"
    comps.write_text(_comps(groups, environments))
    process.run(["createrepo_c", "--quiet", f"--groupfile={comps}", str(repository)])


def _spec(packages: Sequence[Package], sources: Path) -> str:
    lines = ["Name: testos", f"Version: {VERSION.split('-')[0]}", f"Release: {VERSION.split('-')[1]}"]
    lines += ["Summary: A test system", "License: MIT", "AutoReqProv: no", "%description", "Test.", ""]
    install = ["%install", "rm -rf %{buildroot}"]
    sections: list[str] = []
    for package in packages:
        lines += [f"%package -n {package.name}", f"Summary: {package.name}", "AutoReqProv: no"]
        lines += [f"Requires: {name}" for name in package.requires]
        lines += [f"Recommends: {name}" for name in package.recommends]
        lines += [f"Provides: {name}" for name in package.provides]
        lines += [f"%description -n {package.name}", "Test.", ""]
        sections += [f"%files -n {package.name}"]
        for place, content in {**package.files, **package.configuration, **package.documentation}.items():
            install.append(_installed(place, content, sources, place in package.executables))
            kind = "%dir " if content is None else ""
            kind = "%config(noreplace) " if place in package.configuration else kind
            kind = "%doc " if place in package.documentation else kind
            mode = "%attr(1777,root,root) " if place in ("/tmp", "/var/tmp") else ""  # noqa: S108
            sections.append(f"{mode}{kind}{place}")
        if package.post:
            sections += [f"%post -n {package.name}", package.post]
        sections.append("")
    return "\n".join([*lines, *install, "", *sections]) + "\n"


def _installed(place: str, content: str | Path | None, sources: Path, executable: bool) -> str:
    target = f"%{{buildroot}}{place}"
    if content is None:
        return f"mkdir -p {target}"
    if isinstance(content, str) and content.startswith("-> "):
        return f"mkdir -p $(dirname {target}); ln -s {content[3:]} {target}"
    source = content
    if isinstance(source, str):
        written = sources / place.replace("/", "_")
        written.write_text(source)
        source = written
    return f"install -D -m {'755' if executable else '644'} {source} {target}"


def _comps(groups: Sequence[Group], environments: Sequence[Environment]) -> str:
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<comps>"]
    for group in groups:
        lines += [f"<group><id>{group.name}</id><name>{group.name}</name><description/>"]
        lines += ["<default>true</default><uservisible>true</uservisible><packagelist>"]
        lines += [f'<packagereq type="mandatory">{name}</packagereq>' for name in group.mandatory]
        lines += [f'<packagereq type="default">{name}</packagereq>' for name in group.default]
        lines += ["</packagelist></group>"]
    for environment in environments:
        lines += [f"<environment><id>{environment.name}</id><name>{environment.name}</name>"]
        lines += ["<description/><display_order>1</display_order><grouplist>"]
        lines += [f"<groupid>{name}</groupid>" for name in environment.groups]
        lines += ["</grouplist><optionlist/></environment>"]
    return "\n".join([*lines, "</comps>"]) + "\n"


def minimal() -> list[Package]:
    """A system small enough for a test: Fedora's directories, accounts, busybox as its shell."""
    directories = ["/etc", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/root", "/home", "/run"]
    directories += ["/tmp", "/var/tmp", "/var/log", "/var/lib/rpm", "/usr/lib/sysimage/rpm", "/boot"]  # noqa: S108
    links: dict[str, str | Path | None] = {
        f"/{name}": f"-> usr/{name}" for name in ("bin", "sbin", "lib", "lib64")
    }
    busybox = Path("/bin/busybox").resolve()
    applets = ("sh", "cat", "ls", "test", "rm", "mkdir", "chroot", "id", "ln", "true", "stat", "mount")
    return [
        Package(
            "filesystem",
            files=links | dict.fromkeys(directories),
        ),
        Package(
            "setup",
            requires=("filesystem",),
            configuration={
                "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
                "/etc/group": "root:x:0:\nwheel:x:10:\n",
                "/etc/shadow": "root:*:20000:0:99999:7:::\n",
            },
        ),
        Package(
            "busybox",
            requires=("setup",),
            provides=("/bin/sh", "/usr/bin/sh"),
            files={"/usr/bin/busybox": busybox} | {f"/usr/bin/{name}": "-> busybox" for name in applets},
            executables=("/usr/bin/busybox",),
        ),
        Package(
            "testos-release",
            requires=("setup",),
            provides=("system-release",),
            files={
                "/usr/lib/os-release": 'ID=fedora\nVERSION_ID=43\nPRETTY_NAME="Test 43"\n',
                "/etc/os-release": "-> ../usr/lib/os-release",
            },
        ),
    ]
