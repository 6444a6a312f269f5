"""Kickstarts that Anaconda itself executes, in a machine: `method: install` of Fedora and EL.

Anaconda honours more than our own builders do, so the text is checked by pykickstart as the release has it,
and for what an installation needs that nobody watches: where something is missing, Anaconda asks a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pykickstart.constants import FIRSTBOOT_DEFAULT, FIRSTBOOT_RECONFIG

from vdibuild import families, progress, recipe, resources
from vdibuild.kickstart import liveimg, templates
from vdibuild.kickstart.syntax import Command, Parser, Reader
from vdibuild.settings.images import Image
from vdibuild.site import Site

_NEEDED = {
    "lang": "lang en_US.UTF-8",
    "keyboard": "keyboard us",
    "timezone": "timezone Etc/UTC --utc",
    "zerombr": "zerombr",
    "clearpart": "clearpart --all --initlabel",
    "bootloader": "bootloader --location=mbr",
}
"""What Anaconda would ask for, or refuse to go on without, each with a line that answers it."""

_SECTIONS = (
    *("%end", "%include", "%packages", "%pre", "%pre-install", "%post", "%onerror", "%traceback"),
    *("%certificate", "%addon", "%anaconda"),
)
"""What pykickstart looks for at the beginning of a line within a section."""

_STORAGE = ("part", "autopart", "mount", "btrfs", "logvol", "raid")
_SYSTEMS = ("liveimg", "ostreesetup", "ostreecontainer", "bootc")  # in place of packages
_ENDS = ("poweroff", "shutdown")  # two names of the same
_OTHER_ENDS = ("reboot", "halt")


@dataclass(frozen=True)
class Installation:
    """A kickstart for Anaconda, checked.

    text: the rendered kickstart; source: the template it came from. live_image: what is installed in place of
    packages, if anything is.
    """

    text: str
    source: Path
    live_image: recipe.LiveImage | None = None


def executes(image: Image) -> bool:
    """Whether it is Anaconda that reads an image's kickstart."""
    return image.family == "redhat" and image.method == "install"


def read(of: Site, name: str, image: Image) -> Installation:
    """An image's kickstart, rendered and checked. Raises InputError naming the file and the line."""
    source = resources.find("kickstarts", image.kickstart, of.directory)
    mirrors = families.get(image.family).mirrors(image)
    return check(templates.render(source, image, name, mirrors, of.directory), source, image)


def check(text: str, source: Path, image: Image) -> Installation:
    """Check a rendered kickstart for an image that Anaconda installs.

    source: the template it came from. Raises InputError naming the source and the line of the rendered text:
    for what the release's Anaconda does not know, or ignores as deprecated, and for what would make it wait.
    """
    reader = Reader(source, image.family, image.release)
    _refuse_unreadable(reader, text)
    handler = reader.handler()
    # What %pre writes can be included; it is not here yet.
    parser = Parser(handler, reader.error, followIncludes=False)
    reader.parse(parser, text)
    _refuse_waiting(reader, parser.read, bool(handler.packages.seen))
    _warn_of_passwords(parser.read)
    images = [command for command in parser.read if command.name == "liveimg"]
    return Installation(text, source, liveimg.read(images[-1], reader.error) if images else None)


def _refuse_unreadable(reader: Reader, text: str) -> None:
    """Refuse lines that pykickstart would fall over, or read as something else than it seems."""
    inside = False
    for number, line in enumerate(text.split("\n"), start=1):
        reader.refuse_strange(number, line)
        word = next(iter(line.split()), "")
        if not inside:
            reader.words(number, line)
            inside = word.startswith("%") and word not in ("%include", "%ksappend")
        elif word in _SECTIONS:
            reader.split(number, line)
            inside = word != "%end"


def _refuse_waiting(reader: Reader, commands: list[Command], packages: bool) -> None:
    """Refuse a kickstart with which Anaconda, or the system at its first start, would wait for a person."""
    for command in commands:
        if command.name in _OTHER_ENDS:
            raise reader.error(
                command.line,
                f"{command.name} does not end the machine",
                "use poweroff: its end is waited for",
            )
        if command.name == "firstboot" and command.value.firstboot in (FIRSTBOOT_DEFAULT, FIRSTBOOT_RECONFIG):
            raise reader.error(
                command.line,
                "firstboot waits for a person when the system starts",
                "write: firstboot --disable",
            )
    given = {command.name for command in commands}
    missing = {name: line for name, line in _NEEDED.items() if name not in given}
    if not given.intersection(_STORAGE):
        missing["the disk's layout"] = "autopart, or one of kickstarts/layouts"
    if not given.intersection(_ENDS):
        missing["poweroff"] = "poweroff"
    if not packages and not given.intersection(_SYSTEMS):
        missing["%packages or liveimg"] = "%packages … %end"
    if not any(_can_administer(command) for command in commands):
        missing["rootpw or an administrator"] = "rootpw --lock"
    if missing:
        raise reader.error(
            None,
            f"lacks {', '.join(missing)}: Anaconda would wait for a person",
            f"add: {'; '.join(missing.values())}",
        )


def _can_administer(command: Command) -> bool:
    """Whether Anaconda takes it for an administrator (its module users: check_admin_user_exists)."""
    value = command.value
    return command.name == "rootpw" or (command.name == "user" and not value.lock and "wheel" in value.groups)


def _warn_of_passwords(commands: list[Command]) -> None:
    for command in commands:
        if command.name in ("rootpw", "user") and command.value.password and not command.value.isCrypted:
            whose = "root" if command.name == "rootpw" else command.value.name
            progress.warn(
                f"the kickstart has {whose}'s password in plain text (line {command.line}), and so has the "
                "installed system; write its hash instead: openssl passwd -6, and --iscrypted"
            )
