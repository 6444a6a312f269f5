"""Reads a kickstart through pykickstart, and refuses all of it that would be ignored.

pykickstart knows every command and option that Anaconda ever had. Our builders honour some of them; what
stands in a kickstart beside these is an error that names the line, here, before pykickstart sees it.
https://pykickstart.readthedocs.io/en/latest/kickstart-docs.html describes the format.
"""

from __future__ import annotations

import difflib
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykickstart import version
from pykickstart.errors import KickstartError, KickstartParseWarning, KickstartVersionError
from pykickstart.handlers.control import commandMap
from pykickstart.parser import KickstartParser, Packages, Script
from pykickstart.sections import PackageSection, PostScriptSection

from vdibuild.errors import InputError

_VOLUME = ("--fstype", "--size", "--grow", "--maxsize", "--fsoptions", "--label")
_PARTITION = (*_VOLUME, "--type", "--ondisk", "--ondrive", "--asprimary")

HONOURED: dict[str, tuple[str, ...]] = {
    "url": ("--url", "--mirrorlist", "--metalink"),
    "repo": ("--name", "--baseurl", "--mirrorlist", "--metalink"),
    "liveimg": ("--url", "--checksum", "--proxy", "--noverifyssl"),
    "lang": (),
    "keyboard": ("--vckeymap",),
    "timezone": ("--utc", "--isUtc"),
    "rootpw": ("--lock", "--iscrypted", "--plaintext"),
    "user": (
        *("--name", "--groups", "--gecos", "--homedir", "--shell", "--uid", "--gid"),
        *("--password", "--iscrypted", "--plaintext", "--lock"),
    ),
    "group": ("--name", "--gid"),
    "sshkey": ("--username",),
    "network": (
        *("--hostname", "--bootproto", "--device", "--ip", "--netmask", "--gateway", "--nameserver"),
        *("--noipv6", "--mtu", "--onboot", "--activate"),
    ),
    "services": ("--enabled", "--disabled"),
    "selinux": ("--enforcing", "--permissive", "--disabled"),
    "bootloader": ("--append", "--timeout", "--location", "--boot-drive"),
    "zerombr": (),
    "clearpart": ("--all", "--initlabel", "--disklabel", "--drives"),
    "part": _PARTITION,
    "partition": _PARTITION,
    "volgroup": ("--pesize",),
    "logvol": (*_VOLUME, "--vgname", "--name"),
    "poweroff": (),
}
"""The commands that are honoured, each with its options."""

HONOURED_SECTIONS: dict[str, tuple[str, ...]] = {
    "%packages": (
        *("--excludedocs", "--exclude-weakdeps", "--excludeWeakdeps", "--nocore", "--inst-langs"),
        "--instLangs",
    ),
    "%post": ("--nochroot", "--interpreter", "--log", "--logfile", "--erroronfail"),
}
"""The sections that are honoured, each with the options of its first line."""

REPEATABLE = ("repo", "user", "group", "sshkey", "network", "services", "part", "volgroup", "logvol")
"""Commands that may be given more than once; of any other, the last would replace the first."""

_INSTALLER = "it steers the installer, and there is none: remove it"
_REMEDIES = {
    "autopart": "write the partitions out, or include one of kickstarts/layouts",
    "reqpart": "write the partitions out, or include one of kickstarts/layouts",
    "reboot": "use poweroff",
    "halt": "use poweroff",
    "shutdown": "use poweroff",
    "firewall": "install a firewall in %packages, and enable it with services",
    "%include": 'use Jinja\'s {% include "NAME.ks.j2" %}',
    "%ksappend": 'use Jinja\'s {% include "NAME.ks.j2" %}',
    "%pre": "compute it in the template, from variables of the image",
    "%pre-install": "use %post --nochroot",
    "--ignoremissing": "remove it: an image that lacks a package it asks for is a failed build",
    "--onpart": "the disk is a new one, so nothing is on it",
    "--percent": "give --size, and --grow where it takes what is left",
    "--recommended": "give --size",
    "--xlayouts": "keyboard LAYOUT is for consoles and desktops",
    **dict.fromkeys(("text", "cmdline", "graphical", "skipx", "firstboot", "eula", "vnc", "rdp"), _INSTALLER),
}

# What Python's splitlines, and so pykickstart, takes for the end of a line, and editors do not.
_STRANGE = re.compile("[\0\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
_QUOTED = re.compile(r"""\\.|"(?:\\.|[^"\\])*"|'[^']*'""")


@dataclass(frozen=True)
class Command:
    """A command. options: those given. value: pykickstart's object, with its attributes."""

    line: int
    name: str
    options: frozenset[str]
    value: Any


@dataclass(frozen=True)
class Kickstart:
    """A kickstart, read. packages_line: of the %packages section, 0 where there is none."""

    commands: tuple[Command, ...]
    packages: Packages
    packages_line: int
    scripts: tuple[Script, ...]

    def given(self, name: str) -> list[Command]:
        """The commands of that name, in order."""
        return [command for command in self.commands if command.name == name]

    def only(self, name: str) -> Command | None:
        """The command of that name, which can be there only once."""
        return next(iter(self.given(name)), None)


class Reader:
    """Reads one kickstart, and makes its errors.

    source: the file that is named in errors. release: as settings.images.Image.release.
    """

    def __init__(self, source: Path, family: str, release: str) -> None:
        self.source = source
        self.family = family
        self.release = release

    def error(self, line: int | None, message: str, hint: str = "") -> InputError:
        """An error in a line of the rendered kickstart."""
        return InputError(self.source, line or None, message, self.place(line, hint))

    def place(self, line: int | None, hint: str) -> str:
        """A hint that says which line is meant: an error names the template, but a rendered line."""
        if not line:
            return hint
        place = f"line {line} is that of the rendered kickstart: ./inv kickstart --image NAME prints it"
        return f"{hint}\n  {place}" if hint else place

    def read(self, text: str) -> Kickstart:
        """Read the text. Raises InputError."""
        packages_line = self._guard(text)
        handler = self.handler(HONOURED)
        parser = _HonouredParser(handler, self.error)
        self.parse(parser, text)
        return Kickstart(tuple(parser.read), handler.packages, packages_line, tuple(handler.scripts))

    def parse(self, parser: Parser, text: str) -> None:
        """Let pykickstart read the text. Raises InputError for its errors, and for its warnings."""
        # A warning is about something that is ignored: a deprecated option, a second definition.
        with warnings.catch_warnings():
            warnings.simplefilter("error", KickstartParseWarning)
            try:
                parser.readKickstartFromString(text)
            except KickstartParseWarning as warning:
                line = re.search(r"\bline (\d+)", str(warning))
                raise self.error(int(line[1]) if line else None, _sentence(str(warning))) from None
            except KickstartError as error:
                raise self.error(error.lineno, _sentence(error.message)) from None

    def handler(self, only: Iterable[str] = ()) -> Any:
        """pykickstart's commands as the release has them: those named in `only`, or all.

        Debian has none of its own: its kickstarts are written in the newest form that pykickstart knows.
        Raises InputError for a release that pykickstart does not know.
        """
        name = re.sub("^FEDORA", "F", re.sub("^EL", "RHEL", self.release.upper()))
        try:
            handler = version.returnClassForVersion(version.DEVEL if self.family == "debian" else name)
        except (KickstartVersionError, ImportError):
            raise self.error(
                None,
                f"pykickstart does not know the release {self.release!r}",
                "write it like fedora43 or el10 in vdibuild.yaml; a newer one needs a newer pykickstart",
            ) from None
        commands = commandMap[handler.version]
        # Making the parsers of all its commands takes longer than reading a kickstart.
        return handler(mapping={name: commands[name] for name in only or commands})

    # Before pykickstart sees it

    def _guard(self, text: str) -> int:
        """Refuse what would be ignored. Returns the line of the %packages section, 0 where there is none."""
        section, began = "", 0
        seen: dict[str, int] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            self.refuse_strange(number, line)
            word = next(iter(line.split()), "")
            if word in ("%include", "%ksappend"):
                raise self._not_honoured(number, word)
            if not section:
                section = self._guard_command(number, line, seen)
                began = number
            elif word == "%end":
                if not all(rest.startswith("#") for rest in self.split(number, line)[1:2]):
                    raise self.error(number, "only a comment can follow %end")
                section = ""
            elif word in HONOURED_SECTIONS:
                raise self.error(began, f"{section} has no %end before the {word} in line {number}")
            elif section == "%packages" and word and not word.startswith("#"):
                self._guard_package(number, line.partition("#")[0].strip())
        if section:
            raise self.error(began, f"{section} has no %end")
        return seen.get("%packages", 0)

    def refuse_strange(self, number: int, line: str) -> None:
        """Refuse a character at which pykickstart begins a new line, and editors do not."""
        if strange := _STRANGE.search(line):
            raise self.error(
                number, f"the line contains the character {strange[0]!r}", "end lines as Unix does"
            )

    def _guard_command(self, number: int, line: str, seen: dict[str, int]) -> str:
        """Check a line outside of sections. Returns the name of the section that it opens, or nothing."""
        words = self.words(number, line)
        if not words:
            return ""
        name = words[0]
        known = HONOURED_SECTIONS if name.startswith("%") else HONOURED
        if name not in known:
            raise self._not_honoured(number, name, known)
        if name in seen and name not in (*REPEATABLE, "partition", "%post"):
            raise self.error(number, f"{name} is given twice, first in line {seen[name]}")
        seen.setdefault(name, number)
        self._guard_options(number, name, words[1:], known[name])
        return name if name.startswith("%") else ""

    def words(self, number: int, line: str) -> list[str]:
        """The words of a line outside of sections, as pykickstart takes it apart. Raises InputError."""
        words = self.split(number, line, comments=True)
        # For shlex a comment begins at any `#` that is not quoted, also within a word.
        comment = _QUOTED.sub("_", line).partition("#")
        if comment[1] and comment[0] and not comment[0][-1].isspace():
            raise self.error(number, "a # within a word begins a comment", "quote the word, or write a blank")
        return words

    def _guard_options(self, number: int, name: str, words: Sequence[str], known: Sequence[str]) -> None:
        # argparse also takes the beginning of an option for the whole; here an option is its full name.
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        for option in given:
            if option not in known:
                raise self._not_honoured(number, f"{name} {option}", [f"{name} {one}" for one in known])
            if given.count(option) > 1:
                raise self.error(number, f"{name} {option} is given twice")

    def _guard_package(self, number: int, entry: str) -> None:
        name = entry.removeprefix("-")
        group = name.startswith("@")
        if entry.startswith("@^") and self.family == "debian":
            raise self.error(number, f"{entry}: Debian has no environments", "name a task, or the packages")
        if group and re.search(r"\s--", name):
            raise self.error(number, f"{entry}: options of a group are not honoured", "name the packages")
        if entry.startswith("-@^"):
            raise self.error(number, f"{entry}: an environment cannot be left out", "do not ask for it")
        # Group names may have blanks. A package: its name, also with a version or globs, or a file in it.
        legal = r"@\^?\w[\w .+/:-]*" if group else r"[A-Za-z0-9/*?\[][A-Za-z0-9._+:~=/*?\[\]!-]*"
        if not re.fullmatch(legal, name):
            raise self.error(number, f"{entry!r} is no name of a package", "write one to a line")

    def split(self, number: int, line: str, *, comments: bool = False) -> list[str]:
        """The words of a line. comments: whether a # begins one. Raises InputError."""
        try:
            words = shlex.split(line, comments=comments)
        except ValueError as error:
            raise self.error(number, f"cannot be read: {_sentence(str(error))}") from None
        if words and not words[0]:
            raise self.error(number, "begins with an empty word")
        return words

    def _not_honoured(self, number: int, what: str, known: Iterable[str] = ()) -> InputError:
        # Not split(): a no-break space is a blank to it, but a word of the kickstart.
        hint = _REMEDIES.get(what.rpartition(" ")[2], "")
        close = difflib.get_close_matches(what, list(known), 1, 0.8)
        if not hint and close:
            hint = f"did you mean {close[0]}?"
        return self.error(
            number,
            f"{what if what.isprintable() else repr(what)} is not honoured here",
            hint or "docs/kickstart.md says what can be written here",
        )


class Parser(KickstartParser):  # type: ignore[misc]  # pykickstart has no types
    """pykickstart's parser, which keeps each command with its line."""

    def __init__(self, handler: Any, error: Callable[[int | None, str], InputError], **options: bool) -> None:
        self.read: list[Command] = []
        self._error = error
        super().__init__(handler, **options)

    def handleCommand(self, lineno: int, args: list[str]) -> None:  # noqa: N802 (pykickstart's name)
        """Read a command; pykickstart calls this for each."""
        try:
            value = super().handleCommand(lineno, args)
        except KickstartParseWarning as warning:
            raise self._error(lineno, _sentence(str(warning))) from None
        except KickstartError as error:
            raise self._error(error.lineno or lineno, _sentence(error.message)) from None
        options = frozenset(word.partition("=")[0] for word in args[1:] if word.startswith("-"))
        name = args[0]
        self.read.append(Command(lineno, "part" if name == "partition" else name, options, value))


class _HonouredParser(Parser):
    """Knows only the sections that are honoured."""

    def setupSections(self) -> None:  # noqa: N802 (pykickstart's name)
        self._sections: dict[str, Any] = {}
        self.registerSection(PackageSection(self.handler))
        self.registerSection(PostScriptSection(self.handler, dataObj=Script))

    def handleCommand(self, lineno: int, args: list[str]) -> None:  # noqa: N802 (pykickstart's name)
        # Each line is read by itself: pykickstart would mix the values of two `services`.
        self.handler.resetCommand(args[0])
        super().handleCommand(lineno, args)


def _sentence(message: object) -> str:
    """pykickstart's message in one line, as errors here are written."""
    text = " ".join(str(message).split()).rstrip(".")
    return text[:1].lower() + text[1:]
