"""A root file system in a directory: safe paths into it, commands in it, and its removal.

Everything in a tree is untrusted: a symbolic link in it may point anywhere, so no path of the tree is ever
opened as it stands. `Tree.path` resolves links as a chroot would.

A tree needs no root. An ordinary user's tree belongs to a user namespace in which the user is root and the
user's subordinate ids (/etc/subuid) are everybody else; what root owns inside, the user owns outside, so
plain Python reads and writes it. What needs the other ids, or runs programs of the tree, is a command:
`host_command` (a program of this host that sees the tree's ids) or `Tree.run` (a program of the tree).
All of them run in PID and mount namespaces of their own, which the kernel takes down with them: a killed
run leaves neither processes nor mounts.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from vdibuild import process
from vdibuild.errors import CommandError, InputError

_MAX_LINKS = 40  # as Linux: more symbolic links than this in one path is ELOOP

_CALLERS_OWN = ("TMPDIR", "XDG_RUNTIME_DIR", "USER", "LOGNAME")
"""Variables that say who runs the build and where that user's directories are: wrong in every tree."""


def without_callers_variables() -> list[str]:
    """Bubblewrap's options that keep from a tree's programs what only holds on this host."""
    return [option for name in _CALLERS_OWN for option in ("--unsetenv", name)]


def host_command(argv: Sequence[str]) -> list[str]:
    """A command of this host, made to run as root over trees: as itself for root, else in a user namespace.

    Its mounts and its children end with it. The network is the host's.
    """
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    if os.geteuid() != 0:
        namespace += ["--user", "--map-root-user", "--map-auto"]
    return [*namespace, "--", *argv]


def remove(path: Path) -> None:
    """Remove a directory and all in it, whoever of the tree's users owns it. No error when it is gone."""
    if path.is_symlink() or not path.exists():
        return
    if os.geteuid() == 0:
        shutil.rmtree(path)
    else:
        process.run(host_command(["rm", "-rf", "--one-file-system", "--", str(path)]))


def _parts(path: str) -> list[str]:
    """A path's components. Not pathlib's: for it the `//` of `//etc` is a root of its own, and stays one."""
    return [part for part in path.split("/") if part not in ("", ".")]


class Files(Protocol):
    """The files of a system, however they are reached; links are resolved within the system."""

    def exists(self, inside: str) -> bool:
        """Whether there is something at that path."""

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a text file as root, replacing a link by a file; missing directories are made (0755)."""

    def make_directory(self, inside: str, mode: int = 0o755) -> object:
        """Make a directory and its parents, as root; one that is there keeps its mode."""

    def remove(self, inside: str) -> None:
        """Remove a file or a link; no error when there is none."""

    def glob(self, pattern: str) -> list[str]:
        """The paths that match; only the last component has wildcards."""


class Tree:
    """A root file system in the directory `root`, which must exist."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve(strict=True)

    def path(self, inside: str | PurePosixPath, *, follow: bool = True) -> Path:
        """Where the tree's path `inside` is on this host.

        Links are resolved within the tree, also absolute ones and `..`; the last component is kept as it
        is with follow=False. Raises InputError on a loop of links.
        """
        pending = _parts(str(inside))[::-1]
        resolved: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":
                if resolved:
                    resolved.pop()
                continue
            candidate = self.root.joinpath(*resolved, part)
            if candidate.is_symlink() and (follow or pending):
                links += 1
                if links > _MAX_LINKS:
                    raise InputError(self.root, None, f"too many symbolic links in {inside}")
                target = str(candidate.readlink())
                if target.startswith("/"):
                    resolved = []
                pending += _parts(target)[::-1]
                continue
            resolved.append(part)
        return self.root.joinpath(*resolved)

    def exists(self, inside: str) -> bool:
        """Whether the tree has something at that path (a dangling link counts as nothing)."""
        return self.path(inside).exists()

    def read(self, inside: str) -> str:
        """A text file of the tree."""
        return self.path(inside).read_text(encoding="utf-8", errors="surrogateescape")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a text file as root, replacing a link by a file; missing directories are made (0755)."""
        target = self.path(inside, follow=False)
        self.make_directory(str(PurePosixPath(inside).parent))
        if target.is_symlink():
            target.unlink()
        target.write_text(text, encoding="utf-8", errors="surrogateescape")
        target.chmod(mode)

    def link(self, inside: str, target: str) -> None:
        """Make `inside` a symbolic link with that target, replacing what is there."""
        place = self.path(inside, follow=False)
        self.make_directory(str(PurePosixPath(inside).parent))
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    def make_directory(self, inside: str, mode: int = 0o755) -> Path:
        """Make a directory and its parents, as root; one that is there keeps its mode."""
        place = self.path(inside)
        # Links are resolved: what is missing of the path has none in it.
        missing = [directory for directory in (place, *place.parents) if not directory.is_dir()]
        for directory in reversed(missing):
            directory.mkdir()
            directory.chmod(mode)
        return place

    def remove(self, inside: str) -> None:
        """Remove a file, a link or a whole directory; no error when there is none."""
        place = self.path(inside, follow=False)
        try:
            kind = place.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(kind):
            remove(place)
        else:
            place.unlink()

    def glob(self, pattern: str) -> list[str]:
        """The tree's paths (beginning with a slash) that match; links are not followed in the directories
        that the pattern's fixed beginning does not name. Sorted.
        """
        fixed: list[str] = []
        parts = _parts(pattern)
        while parts and not any(sign in parts[0] for sign in "*?["):
            fixed.append(parts.pop(0))
        if not parts:
            return (
                [f"/{'/'.join(fixed)}"] if os.path.lexists(self.path("/".join(fixed), follow=False)) else []
            )
        base = self.path("/".join(fixed))
        return sorted(f"/{found.relative_to(self.root)}" for found in base.glob("/".join(parts)))

    def date_back(self, epoch: str, *places: str, kinds: str = "bcdflps") -> None:
        """Give what is younger than a time in these directories that time; mounts in them are left alone.

        epoch: seconds since 1970. kinds: of file, as find's -type names them; d are directories. Raises
        CommandError.
        """
        chosen = ["-xdev", "-type", ",".join(kinds), "-newermt", f"@{epoch}"]
        touch = ["touch", "--no-dereference", f"--date=@{epoch}", "--", "{}", "+"]
        argv = ["find", "-P", *(str(self.path(place)) for place in places), *chosen, "-exec", *touch]
        process.run(host_command(argv))

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        network: bool = False,
        capture: bool = False,
        check: bool = True,
        binds: Mapping[Path, str] | None = None,
    ) -> process.Completed:
        """Run a program of the tree, as its root, seeing nothing of the host but /dev's harmless nodes.

        stdin, env, capture, check: as for process.run; of its environment what belongs to the caller on this
        host, such as TMPDIR, stays outside. network: with the host's network and resolver. binds: host paths
        to show read-only at paths of the tree. Raises CommandError.
        """
        command = self.command(argv, network=network, binds=binds)
        try:
            return process.run(command, stdin=stdin, env=env, capture=capture, check=check)
        except CommandError as error:
            if error.tail[-1:] == [f"bwrap: execvp {argv[0]}: No such file or directory"]:
                raise CommandError(
                    argv,
                    error.status,
                    error.tail,
                    f"the system has no command {argv[0]}",
                    "add the package that has it to the recipe's %packages",
                ) from None
            raise

    def command(
        self, argv: Sequence[str], *, network: bool = False, binds: Mapping[Path, str] | None = None
    ) -> list[str]:
        """The host's argument list that runs `argv` in the tree (bubblewrap's; see `run`)."""
        sandbox = ["bwrap", "--bind", str(self.root), "/", "--dev", "/dev", "--proc", "/proc"]
        sandbox += ["--tmpfs", "/run", "--tmpfs", "/tmp", "--tmpfs", "/var/tmp"]  # noqa: S108 (the tree's own)
        sandbox += [
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--die-with-parent",
            "--cap-add",
            "ALL",
        ]
        sandbox += [*without_callers_variables(), "--chdir", "/", "--setenv", "HOME", "/root"]
        sandbox += ["--setenv", "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        if network:
            resolver = Path("/etc/resolv.conf").resolve()
            if resolver.exists():
                # The tree's own resolv.conf is often a link into /run: show the host's where it leads.
                inside = self.path("/etc/resolv.conf").relative_to(self.root)
                sandbox += ["--ro-bind", str(resolver), f"/{inside}"]
        else:
            sandbox.append("--unshare-net")
        for source, target in (binds or {}).items():
            sandbox += ["--ro-bind", str(source), target]
        return host_command([*sandbox, "--", *argv])
