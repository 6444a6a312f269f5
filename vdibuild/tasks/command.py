"""What every task is made of: help, progress, one message for a failure."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from invoke.exceptions import Exit
from invoke.tasks import task
from rich.console import Console

from vdibuild import progress
from vdibuild.errors import CommandError, InstallationError, VdibuildError, VerificationError

if TYPE_CHECKING:
    from vdibuild.site import Site
    from vdibuild.store import Store


SITE = os.environ.get("VDIBUILD_SITE", "vdibuild.yaml")
HELP = {
    "image": "the image's name; by default the first one of the site file",
    "pool": "the pool's name; by default the first one of the site file",
    "site": "the site file (also: $VDIBUILD_SITE)",
    "version": "the version; by default the promoted one",
}

out = Console()
"""Where tasks print what was asked for; progress and failures go to standard error."""

_TAILED = (CommandError, InstallationError, VerificationError)


def terminated(_signal: int, _frame: FrameType | None) -> None:
    """A handler of SIGTERM that has what is under way removed, as Ctrl-C does."""
    raise KeyboardInterrupt


def _reported(body: Callable[..., None]) -> Callable[..., None]:
    """Show progress, and a failure as one message for a person, with the failing command's last lines."""

    @functools.wraps(body)
    def run(*args: Any, **options: Any) -> None:
        # A stopped service manager or CI sends SIGTERM; it deserves the same tidying as Ctrl-C.
        signal.signal(signal.SIGTERM, terminated)
        console = Console(stderr=True)
        try:
            with progress.reporting(console):
                body(*args, **options)
        except VdibuildError as error:
            for line in error.tail if isinstance(error, _TAILED) else ():
                console.print(f"  | {line}", highlight=False, markup=False)
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            raise Exit(f"error: {error}{notes}", code=1) from None
        except KeyboardInterrupt:
            raise Exit("interrupted; what was under way has been removed", code=130) from None

    return run


def command(help: dict[str, str] | None = None, **options: Any) -> Callable[[Callable[..., None]], Any]:
    """Make a function a task, whose options may name a site, an image, a pool, a version as all others do.

    help: of its own options. options: for invoke.
    """

    def decorate(body: Callable[..., None]) -> Any:
        # Invoke wants help only for parameters that exist.
        names = body.__code__.co_varnames[1 : body.__code__.co_argcount]
        texts = {**{name: HELP[name] for name in names if name in HELP}, **(help or {})}
        return task(help=texts, **options)(_reported(body))

    return decorate


def load_site(path: str) -> Site:
    """The site of an option `site`. Raises InputError."""
    from vdibuild import site

    return site.load(Path(path))


def open_store(path: str) -> tuple[Site, Store]:
    """The site of an option `site`, and its store. Raises InputError."""
    from vdibuild.store import Store

    site = load_site(path)
    return site, Store(site.artifacts_directory, site.keys)


def mebibytes(option: str, text: str) -> int:
    """An option's size, such as 2GiB, in MiB. Raises VdibuildError."""
    from pydantic import TypeAdapter, ValidationError

    from vdibuild.settings.values import Size

    try:
        return TypeAdapter[int](Size).validate_python(text)
    except ValidationError as error:
        raise VdibuildError(f"--{option}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def shown_size(size: int) -> str:
    """A number of bytes, for a person."""
    return f"{size / (1 << 20):.0f} MiB"


def shown_duration(duration: timedelta) -> str:
    """A time that has passed, for a person."""
    return str(timedelta(seconds=max(0, int(duration.total_seconds()))))
