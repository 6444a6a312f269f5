"""Digests of a step's inputs: values, files and trees of files."""

from __future__ import annotations

import dis
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import CodeType


def of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, as hex."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tree(path: Path) -> str:
    """SHA-256 over the names, modes, link targets and contents below a directory (or of one file)."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(path, onerror=_raise):
        names.sort()
        for name in sorted([*files, *names]):
            entry = Path(directory) / name
            mode = entry.lstat().st_mode
            digest.update(f"{entry.relative_to(path)}\0{mode:o}\0".encode(errors="surrogateescape"))
            if stat.S_ISLNK(mode):
                digest.update(os.fsencode(entry.readlink()))
            elif stat.S_ISREG(mode):
                digest.update(of_file(entry).encode())
    return digest.hexdigest()


def of_values(values: Mapping[str, object]) -> str:
    """SHA-256 of JSON-like values, independent of their order, as hex."""
    return of_text(json.dumps(values, sort_keys=True))


def of_code(*modules: str) -> str:
    """SHA-256 of modules of this package, named like `disk.layout`, and of all that they import from it.

    The code that does a step is one of its inputs.
    """
    return of_values({name: of_file(file) for name, file in code(*modules).items()})


def code(*modules: str) -> dict[str, Path]:
    """The files of modules of this package, and of all that they import from it, by the modules' names."""
    pending = list(modules)
    found: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        file = _module_file(name)
        if name not in found and file is not None:
            found[name] = file
            pending += _imports(file)
    return found


def _module_file(name: str) -> Path | None:
    place = Path(__file__).parent.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _imports(file: Path) -> list[str]:
    """What a module imports from this package: modules, and names that may be modules."""
    package = f"{Path(__file__).parent.name}."
    pending = [compile(file.read_bytes(), str(file), "exec", dont_inherit=True)]
    found: list[str] = []
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        base = ""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                base = instruction.argval
                found.append(base)
            elif instruction.opname == "IMPORT_FROM":
                found.append(f"{base}.{instruction.argval}")
    # `from vdibuild import x` names the package itself, too.
    return [name.removeprefix(package) for name in found if name.startswith(package)]


def _raise(error: OSError) -> None:
    raise error
