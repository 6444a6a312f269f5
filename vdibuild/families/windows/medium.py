"""The answer medium: a small CD-ROM that Windows Setup finds its answers on.

ISO 9660 with Joliet (Microsoft's extension, whose names Windows reads). Same content, same bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pycdlib
from pycdlib import dates, headervd, utils
from pycdlib import pycdlib as author
from pycdlib.pycdlibexception import PyCdlibException

from vdibuild.errors import InputError
from vdibuild.families.windows.answers import Answers, spice_tools_name
from vdibuild.site_windows import Windows

LABEL = "VDIBUILD"

_DRIVERS = "$WinPEDriver$"
"""The directory in whose tree Setup looks for drivers on every medium (Microsoft, KB 2686316)."""

_JOLIET_NAME = 64  # characters
_DEPTH = 8  # ISO 9660, section 6.8.2.1: levels of directories, the root included


def write(answers: Answers, windows: Windows, path: Path, epoch: int = 0) -> None:
    """Write the answer medium, readable by its owner only: it holds the account's password.

    answers: what render() made of these settings. epoch: the time its files get, in seconds since 1970.
    Raises InputError for files that are missing, or that a CD-ROM cannot hold, and for a path that cannot be
    written.
    """
    with contextlib.ExitStack() as stack:
        disc = pycdlib.PyCdlib()
        with _clock(epoch):
            disc.new(interchange_level=3, vol_ident=LABEL, joliet=3)
            stack.callback(disc.close)
            _text(disc, "Autounattend.xml", answers.setup)
            _text(disc, "clone.xml", answers.clone)
            _text(disc, "first-logon.cmd", answers.script)
            if name := spice_tools_name(windows):
                _file(disc, stack, windows.spice_tools or Path(), f"/{_iso_name(name)};1", f"/{name}")
            if windows.drivers:
                _add_drivers(disc, stack, windows.drivers)
            _save(disc, path)


def _save(disc: pycdlib.PyCdlib, path: Path) -> None:
    try:
        # Its mode is 0600.
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(path, None, f"cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w+b") as target:
            disc.write_fp(target)
            target.flush()
            os.fsync(target.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink()
        raise


@contextlib.contextmanager
def _clock(epoch: int) -> Iterator[None]:
    """Stop pycdlib's clock, and only its: it asks for the time at each file, and for this host's zone."""
    stopped = types.SimpleNamespace(
        time=lambda: epoch,
        localtime=time.gmtime,
        gmtime=time.gmtime,
        strftime=time.strftime,
        strptime=time.strptime,
        struct_time=time.struct_time,
    )
    modules = (author, dates, headervd, utils)
    for module in modules:
        vars(module)["time"] = stopped
    try:
        yield
    finally:
        for module in modules:
            vars(module)["time"] = time


def _text(disc: pycdlib.PyCdlib, name: str, text: str) -> None:
    data = text.encode()
    disc.add_fp(io.BytesIO(data), len(data), f"/{_iso_name(name)};1", joliet_path=f"/{name}")


def _iso_name(name: str) -> str:
    """A name as ISO 9660 can have it: capital letters, digits, low lines, one dot."""
    return name.upper().replace("-", "_")


def _file(
    disc: pycdlib.PyCdlib, stack: contextlib.ExitStack, source: Path, iso_path: str, joliet_path: str
) -> None:
    try:
        opened = stack.enter_context(source.open("rb"))
        disc.add_fp(opened, os.fstat(opened.fileno()).st_size, iso_path, joliet_path=joliet_path)
    except OSError as error:
        raise InputError(source, None, f"cannot be read: {error.strerror}") from None
    except PyCdlibException as error:
        raise InputError(source, None, f"cannot be put on a CD-ROM: {error}") from None


def _add_drivers(disc: pycdlib.PyCdlib, stack: contextlib.ExitStack, directory: Path) -> None:
    """Put a tree of drivers where Setup finds it.

    ISO 9660 gets numbers for names, as driver files have names that it cannot hold; Windows reads Joliet's.
    """
    if not directory.is_dir():
        raise InputError(directory, None, "there is no directory with drivers here")
    numbered = {directory: ("/DRIVERS", f"/{_DRIVERS}")}
    disc.add_directory("/DRIVERS", joliet_path=f"/{_DRIVERS}")
    for number, entry in enumerate(sorted(directory.rglob("*"))):
        above_iso, above_joliet = numbered[entry.parent]
        joliet = f"{above_joliet}/{entry.name}"
        if len(entry.name) > _JOLIET_NAME:
            raise InputError(
                entry, None, f"the name is longer than {_JOLIET_NAME}, which a CD-ROM cannot hold"
            )
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise InputError(entry, None, "is neither a file nor a directory", "drivers are plain files")
        if entry.is_dir():
            if joliet.count("/") >= _DEPTH:
                raise InputError(
                    entry, None, f"lies deeper than {_DEPTH} directories, which a CD-ROM cannot hold"
                )
            numbered[entry] = (f"{above_iso}/D{number:07}", joliet)
            disc.add_directory(numbered[entry][0], joliet_path=joliet)
        else:
            _file(disc, stack, entry, f"{above_iso}/F{number:07}.;1", joliet)
