"""vdibuild itself, in a live system: the modules that run there, and the library that no package brings."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

import pykickstart

from vdibuild import hashing, progress, resources
from vdibuild.errors import VdibuildError
from vdibuild.tree import Tree

_PLACES = ("/usr/lib/python3/dist-packages", "/usr/lib/python3.*/site-packages")
"""Where Debian's Python looks for packages, and everybody else's."""
_RECIPES = "kickstart"  # the module that asks for pykickstart and for these
_RESOURCES = ("templates", "overlays/ssh-host-keys")


def digest(modules: Sequence[str]) -> str:
    """What `lay` puts into a tree, as a SHA-256."""
    recipes = _RECIPES in hashing.code(*modules)
    versions = {"pykickstart": importlib.metadata.version("pykickstart")} if recipes else {}
    brought = {name: hashing.of_tree(resources.packaged() / name) for name in _RESOURCES if recipes}
    return hashing.of_values({"code": hashing.of_code(*modules), **versions, **brought})


def lay(tree: Tree, modules: Sequence[str]) -> None:
    """Put modules of this package into a tree, with all that they import from it, and pykickstart for those
    that read kickstarts.

    Nothing but the interpreter and the packages that pyproject.toml names has to be there: what is brought
    is pure Python. It is compiled at once, since a live system would do it at every start.
    """
    if not modules:
        return
    with progress.step("software"):
        package = Path(__file__).parent.parent
        place = _place(tree)
        code = hashing.code(*modules)
        files = set(code.values())
        for module in list(files):
            files |= {parent / "__init__.py" for parent in module.parents if parent.is_relative_to(package)}
        for file in sorted(files):
            tree.write(f"{place}/vdibuild/{file.relative_to(package)}", file.read_text(encoding="utf-8"))
        compiled = [f"{place}/vdibuild"]
        if _RECIPES in code:
            for name in _RESOURCES:
                _copy(resources.packaged() / name, tree, f"{place}/vdibuild/resources/{name}")
            _copy(Path(pykickstart.__file__).parent, tree, f"{place}/pykickstart")
            compiled.append(f"{place}/pykickstart")
        # Known to be of these sources, whatever their times: a start compares nothing.
        mode = ["--invalidation-mode", "unchecked-hash"]
        tree.run(["python3", "-m", "compileall", "-q", *mode, *compiled])


def _place(tree: Tree) -> str:
    found = [path for pattern in _PLACES for path in tree.glob(pattern)]
    if not found:
        raise VdibuildError("the system has no Python to run vdibuild", "add python3 to %packages")
    return found[0]


def _copy(source: Path, tree: Tree, inside: str) -> None:
    target = tree.make_directory(inside)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
