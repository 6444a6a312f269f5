"""The errors a caller can act on: each says what happened, and what to do now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class VdibuildError(Exception):
    """Something that a person has to mend.

    message: one line: what happened, to which file, line or machine.
    hint: what to do now; empty where the message already says it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class InputError(VdibuildError):
    """A file that a person wrote is wrong; found before anything was changed.

    source: the file. line: its line, counted from 1, or None where the whole file is meant.
    """

    def __init__(self, source: Path | str, line: int | None, message: str, hint: str = "") -> None:
        where = f"{source}:{line}" if line else str(source)
        super().__init__(f"{where}: {message}", hint)
        self.source = source
        self.line = line


_WRAPPERS = ("unshare", "bwrap")


def _wrapped(argv: Sequence[str]) -> list[str]:
    """The command that runs in our namespaces (see tree.py), without what leads into them."""
    argv = list(argv)
    while argv[0] in _WRAPPERS and "--" in argv:
        argv = argv[argv.index("--") + 1 :]
    return argv


class CommandError(VdibuildError):
    """A command failed.

    argv: the command, without our namespaces around it. status: its exit status, or minus the number of the
    signal that ended it. tail: the last lines it printed.
    """

    def __init__(
        self, argv: Sequence[str], status: int, tail: Sequence[str], message: str = "", hint: str = ""
    ) -> None:
        ended = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        self.argv = _wrapped(argv)
        super().__init__(message or f"{self.argv[0]} {ended}", hint)
        self.status = status
        self.tail = list(tail)


class DeadlineError(VdibuildError):
    """A command or a guest took longer than it was given."""


class HostError(VdibuildError):
    """This host lacks something: a package, a permission, space, a usable feature."""


class SpaceError(HostError):
    """A disk is full."""


class BusyError(VdibuildError):
    """Another run is working on the same thing."""


class VerificationError(VdibuildError):
    """What was built did not stand its test: it did not boot, or did not answer as it should.

    tail: the last lines on the guest's console.
    """

    def __init__(self, message: str, hint: str = "", tail: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.tail = list(tail)


class InstallationError(VdibuildError):
    """An unattended installation failed, or did not come to its end.

    kind: how that was seen: "log" (the installer said so), "panic", "prompt" (it waits for a person),
    "silence", "deadline", "gone" (the guest ended, but not as it should), or "marker" (not the kickstart).
    tail: the last lines of the guest's console and of the installer's log.
    """

    def __init__(self, kind: str, message: str, hint: str = "", tail: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.tail = list(tail)


class StoreError(VdibuildError):
    """A stored version is missing, damaged, unsigned, or in use."""


class BundleError(VdibuildError):
    """A bundle is missing, damaged, or holds what nobody should unpack."""
