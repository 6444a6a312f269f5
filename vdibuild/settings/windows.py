"""What Windows is told about itself, without what Windows would refuse."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    model_validator,
)

from vdibuild.settings.values import Settings

FILES = ("password_file", "virtio", "spice_tools", "drivers")
"""The settings that name files, which are relative to the site file."""

TAKEN_ACCOUNTS = ("administrator", "guest", "defaultaccount", "wdagutilityaccount", "system", "none")
"""Names that Windows itself uses, or that mean none to it; it does not tell capitals from small letters."""


def _printable(value: str) -> str:
    """Text for Windows: everything that is not printable is no XML, or cannot be typed at a logon."""
    if not value.isprintable():
        raise ValueError("has a character that cannot be printed, such as a line's end or a tab")
    return value


def _edition(value: str | int) -> str | int:
    if value == "" or (isinstance(value, int) and value < 1):
        raise ValueError(f"{value!r} is neither an image's name nor its number, which are counted from 1")
    return _printable(value) if isinstance(value, str) else value


def _secret(value: object) -> object:
    """A secret as text; a wrong one must not be shown, as pydantic's own errors would do."""
    if not isinstance(value, str | SecretStr):
        raise ValueError("is no text: put it between quotes")
    return value


def _product_key(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"([A-Z0-9]{5}-){4}[A-Z0-9]{5}", value.get_secret_value()):
        raise ValueError("is no product key: five groups of five capital letters and digits, with dashes")
    return value


def _password(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not 0 < len(text) <= 127:  # what Windows takes at its logon screen
        raise ValueError("is empty, or longer than the 127 characters that Windows takes")
    _printable(text)
    return value


def _language(value: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Z][a-z]{3})?-[A-Z]{2}", value):
        raise ValueError(f"{value!r} is no language tag; write it like en-US or nl-NL")
    return value


def _keyboard(value: str) -> str:
    if re.fullmatch(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{8}", value):
        return value.lower()
    try:
        return _language(value)
    except ValueError:
        raise ValueError(f"{value!r} is no keyboard: a language such as en-US, or 0409:00000409") from None


def _windows_timezone(value: str) -> str:
    """Windows' name of a time zone; the IANA name of one is translated by Unicode's table (CLDR)."""
    # The installer's machine reads these settings too, and has no tzlocal.
    from tzlocal.windows_tz import tz_win, win_tz

    name = tz_win.get(value, value)
    if name not in win_tz:
        near = difflib.get_close_matches(value, [*tz_win, *win_tz], 1, 0.6)
        raise ValueError(
            f"no time zone of Windows is called {value!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return name


def _computer_name(value: str) -> str:
    # A part of what Windows takes: names that are also host names, so that DNS and DHCP agree.
    if value != "*" and (not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,15}(?<!-)", value) or value.isdecimal()):
        raise ValueError(
            f"{value!r} is no computer name: at most 15 letters, digits and dashes, not digits alone; "
            "or * for a random one"
        )
    return value


def _account(value: str) -> str:
    _printable(value)
    if sign := re.search(r"""["/\\\[\]:;|=,+*?<>@%]""", value):
        raise ValueError(f"the name of a Windows account cannot have the character {sign[0]}")
    if not 0 < len(value) <= 20 or value != value.strip(" ") or value.endswith("."):
        raise ValueError("the name of a Windows account has 1 to 20 characters, no blank or dot at its end")
    if value.lower() in TAKEN_ACCOUNTS:
        raise ValueError(f"the account {value!r} is one of Windows' own")
    return value


Language = Annotated[str, AfterValidator(_language)]


class Windows(Settings):
    """What Windows is told about itself, and what is installed with it."""

    edition: Annotated[str | int, AfterValidator(_edition)]
    """Which image of the medium is installed: its name, such as Windows 11 Pro, or its number."""
    product_key: Annotated[SecretStr, BeforeValidator(_secret), AfterValidator(_product_key)] | None = None
    """The product key; a medium with more than one edition asks for it when it is missing."""
    language: Language = "en-US"
    """The language of the medium."""
    locale: Language | None = None
    """How dates and numbers are written; by default as in the language."""
    keyboard: Annotated[str, AfterValidator(_keyboard)] | None = None
    """The keyboard: a language such as nl-NL, or Windows' number of one; by default the language's."""
    timezone: Annotated[str, AfterValidator(_windows_timezone)] = "UTC"
    """The time zone: Windows' name or the usual one, such as Europe/Amsterdam."""
    computer_name: Annotated[str, AfterValidator(_computer_name)] = "*"
    """The name of the machine that is installed; its clones get random ones. * is a random one, too."""
    organization: Annotated[str, Field(max_length=63), AfterValidator(_printable)] = ""
    """Whose machine it is."""
    account: Annotated[str, AfterValidator(_account)] = "user"
    """The local account, an administrator."""
    password: Annotated[SecretStr, BeforeValidator(_secret), AfterValidator(_password)] | None = None
    """The account's password; better in a file of its own: password_file."""
    password_file: Path | None = None
    """A file whose first line is the account's password; relative to the site file."""
    auto_logon: bool = False
    """Whether clones log the account in by themselves."""
    virtio: Path
    """The virtio-win ISO: drivers and guest tools; relative to the site file."""
    spice_tools: Path | None = None
    """The installer of SPICE's guest tools (.exe) or agent (.msi); relative to the site file."""
    drivers: Path | None = None
    """A directory with further drivers for the installation; relative to the site file."""

    @model_validator(mode="after")
    def _one_password(self) -> Windows:
        if (self.password is None) == (self.password_file is None):
            raise ValueError("needs one of password and password_file")
        if self.account.lower() == self.computer_name.lower():
            raise ValueError("account and computer_name are the same, which Windows refuses")
        return self
