"""The answer medium: a small CD-ROM that Windows Setup finds its answers on.

Windows reads the names of Joliet, Microsoft's extension of ISO 9660.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vdibuild.errors import InputError
from vdibuild.families.windows.answers import Answers, spice_tools_name
from vdibuild.live import iso
from vdibuild.settings.windows import Windows

LABEL = "VDIBUILD"

_DRIVERS = "$WinPEDriver$"
"""The directory in whose tree Setup looks for drivers on every medium (Microsoft, KB 2686316)."""

_JOLIET_NAME = 64  # characters


def write(answers: Answers, windows: Windows, path: Path, epoch: int = 0) -> None:
    """Write the answer medium, readable by its owner only: it holds the account's password.

    answers: what render() made of these settings. epoch: the time its files get, in seconds since 1970; with
    the same one, the same content is the same bytes. Raises InputError for files that are missing or that a
    CD-ROM cannot hold, and for a path that cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = {f"/{_DRIVERS}/{place}": file for place, file in _drivers(windows).items()}
        texts = {
            "Autounattend.xml": answers.setup,
            "clone.xml": answers.clone,
            "first-logon.cmd": answers.script,
        }
        for name, text in texts.items():
            files[f"/{name}"] = Path(directory, name)
            files[f"/{name}"].write_bytes(text.encode())
        if windows.spice_tools:
            if not windows.spice_tools.is_file():
                raise InputError(windows.spice_tools, None, "there is no installer of SPICE's tools here")
            files[f"/{spice_tools_name(windows)}"] = windows.spice_tools
        try:
            # Its mode is 0600, which it keeps.
            descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise InputError(path, None, f"cannot be written: {error.strerror}") from None
        os.close(descriptor)
        iso.write(iso.Content(LABEL, files), Path(partial), epoch)
        Path(partial).replace(path)


def _drivers(windows: Windows) -> dict[str, Path]:
    """The files of the directory with further drivers, by their paths in it."""
    directory = windows.drivers
    if directory is None:
        return {}
    if not directory.is_dir():
        raise InputError(directory, None, "there is no directory with drivers here")
    found = {}
    for entry in sorted(directory.rglob("*")):
        if len(entry.name) > _JOLIET_NAME:
            raise InputError(
                entry, None, f"a CD-ROM cannot hold a name of more than {_JOLIET_NAME} characters"
            )
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise InputError(entry, None, "is neither a file nor a directory", "drivers are plain files")
        if entry.is_file():
            found[entry.relative_to(directory).as_posix()] = entry
    return found
