"""What everything begins with that is made from packages: a recipe, and the cached tree of its packages."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vdibuild import families, hashing, kickstart, process, progress, resources, tree
from vdibuild.errors import VdibuildError
from vdibuild.families import InstalledPackage, RepositoryState
from vdibuild.recipe import Recipe
from vdibuild.settings.images import System
from vdibuild.site import Site
from vdibuild.steps import Planned, Steps
from vdibuild.tree import Tree

TREE = "tree"
"""The name of a system's tree in the directory of a finished step."""


def read_recipe(site: Site, name: str, image: System) -> Recipe:
    """An image's kickstart, rendered and checked. Raises InputError naming the file and the line."""
    if not image.kickstart:
        raise VdibuildError(
            f"image {name!r} has no kickstart", "Windows reads answers: ./inv windows.answers writes them"
        )
    family = families.get(image.family)
    source = resources.find("kickstarts", image.kickstart, site.directory)
    text = kickstart.render(source, image, name, family.mirrors(image), site.directory)
    return kickstart.parse(text, source, image)


def epoch(states: Sequence[RepositoryState]) -> int:
    """The time that a build's files get, in seconds since 1970: SOURCE_DATE_EPOCH, else the newest
    repository's. Raises VdibuildError for a SOURCE_DATE_EPOCH that is no such number.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given and not given.isdecimal():
        raise VdibuildError(f"SOURCE_DATE_EPOCH is {given!r}", "give it in seconds since 1970, or unset it")
    return int(given) if given else max(state.date for state in states)


def inputs(site: Site, image: System, kickstart: str) -> dict[str, str]:
    """Digests of what a system is made from, packages aside, by name. kickstart: the rendered text."""
    result = {
        "kickstart": hashing.of_text(kickstart),
        "authorized keys": hashing.of_text("\n".join(image.authorized_keys)),
    }
    for name in image.overlays:
        result[f"overlay {name}"] = hashing.of_tree(resources.find("overlays", name, site.directory))
    # What every system gets, whatever its overlays: boot menu, units.
    for number, path in enumerate(resources.directories("templates", site.directory), 1):
        result[f"templates {number}"] = hashing.of_tree(path)
    result["overlay ssh-host-keys"] = hashing.of_tree(resources.packaged() / "overlays" / "ssh-host-keys")
    if image.playbook:
        # A playbook refers to roles, files and variables beside it.
        result["playbook"] = hashing.of_tree(image.playbook.parent)
    return result


def plan(
    steps: Steps, image: System, recipe: Recipe, states: Sequence[RepositoryState], epoch: int
) -> Planned:
    """The step that installs an image's packages. states: of the recipe's repositories."""
    return steps.plan(
        "packages",
        {
            "family": image.family,
            "release": image.release,
            "components": image.components,
            "packages": asdict(replace(recipe.packages, line=0)),
            # The initramfs is made with the packages, for what it has to mount.
            "file systems": sorted(
                (volume.mountpoint, volume.filesystem)
                for volume in (*recipe.storage.partitions, *recipe.storage.logical)
            ),
            "more": image.packages,
            "repositories": [(one.name, one.url) for one in (recipe.url, *recipe.repositories) if one],
            "states": [asdict(state) for state in states],
            "keyring": hashing.of_file(image.keyring) if image.keyring else "",
            "epoch": epoch,
            "code": hashing.of_code(f"families.{image.family}"),
        },
    )


def run(steps: Steps, planned: Planned, image: System, recipe: Recipe, cache: Path) -> Path:
    """Install the packages, or find them installed; returns the step's directory. cache: the site's."""
    downloads = cache / "downloads" / f"{image.family}-{image.release}"

    def work(directory: Path) -> None:
        downloads.mkdir(parents=True, exist_ok=True)
        families.get(image.family).bootstrap(recipe, image, directory / TREE, downloads)

    return steps.run(planned, work)


def copy(source: Path, directory: Path) -> Tree:
    """Copy the tree of a finished step into the directory of another one, which may change it."""
    argv = ["cp", "--archive", "--reflink=auto", str(source / TREE), str(directory / TREE)]
    with progress.step("copy"):
        process.run(tree.host_command(argv))
    return Tree(directory / TREE)


def place(file: Path, target: Path) -> None:
    """Put a finished step's file into a version: as a second name for it, where the file system allows."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def architecture(packages: Sequence[InstalledPackage]) -> str:
    """The architecture that the packages with programs are for, as the distribution calls it."""
    counts = Counter(one.architecture for one in packages if one.architecture not in ("all", "noarch"))
    return counts.most_common(1)[0][0]
