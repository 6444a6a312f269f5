"""What a bootstrapped tree becomes by its kickstart and image: settings, overlays, scripts, a playbook."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vdibuild import fonts, overlay, process, progress, resources
from vdibuild.errors import CommandError, HostError
from vdibuild.families import Family, systemd
from vdibuild.recipe import Recipe, Script
from vdibuild.settings.images import System
from vdibuild.tree import Tree, host_command

_SCRIPT = "/run/vdibuild-post"
_PLAYBOOK_FILES = "/var/lib/vdibuild-playbook"
# Runs "$@" with its output in the file "$0".
_LOGGED = 'exec "$@" >"$0" 2>&1'


def customise(tree: Tree, family: Family, recipe: Recipe, image: System, site_directory: Path) -> None:
    """Make a bootstrapped tree what the recipe and the image want it to be.

    In this order: the recipe's settings, the image's overlays, the recipe's services, its %post scripts, the
    image's playbook, the cache of its fonts. site_directory: where overlays are looked for first, and the
    playbook. Raises InputError naming what is wrong, CommandError for a failing script or playbook.
    """
    with progress.step("settings"):
        family.configure(tree, recipe, image)
    lay_overlays(tree, image, site_directory)
    if recipe.services_enabled or recipe.services_disabled:
        with progress.step("services"):
            systemd.switch_services(tree, recipe)
    # Where the tree has no resolv.conf, showing it the host's leaves an empty file there.
    resolver = tree.path("/etc/resolv.conf")
    resolved = resolver.exists()
    for script in recipe.scripts:
        with progress.step(f"%post of line {script.line}"):
            run_script(tree, script, recipe.source)
    play(tree, image, site_directory)
    fonts.make_cache(tree)
    if not resolved and resolver.is_file() and resolver.stat().st_size == 0:
        resolver.unlink()


def lay_overlays(tree: Tree, image: System, site_directory: Path) -> None:
    """Lay the image's overlays over the tree, in order. Raises VdibuildError for one that is missing."""
    for name in image.overlays:
        with progress.step(f"overlay {name}"):
            overlay.lay(tree, resources.find("overlays", name, site_directory))


def play(tree: Tree, image: System, site_directory: Path) -> None:
    """Run the image's playbook, if it has one."""
    if image.playbook:
        with progress.step(f"playbook {image.playbook.name}"):
            run_playbook(tree, site_directory / image.playbook)


def run_script(tree: Tree, script: Script, source: Path) -> None:
    """Run a %post section: in the tree, or with chroot=False on this host, with the tree's path in $ROOT.

    What runs in the tree sees the host's network. A script on this host runs as the tree's root, also gets
    the path as $ANA_INSTALL_PATH, as Anaconda's do, and its `log` is a path of this host. source: the
    kickstart, for messages. Raises CommandError when the script fails and was said to be erroronfail;
    otherwise a failure is a warning.
    """
    with tempfile.TemporaryDirectory(prefix="post-", dir=tree.root.parent) as private:
        file = Path(private) / "post"
        file.write_text(script.text)
        file.chmod(0o700)
        interpreter = shlex.split(script.interpreter)
        argv = [*interpreter, _SCRIPT if script.chroot else str(file)]
        if script.log:
            argv = ["/bin/sh", "-c", _LOGGED, script.log, *argv]
            if script.chroot:
                tree.make_directory(str(Path(script.log).parent))
            else:
                Path(script.log).parent.mkdir(parents=True, exist_ok=True)
        try:
            if script.chroot:
                tree.run(argv, network=True, binds={file: _SCRIPT})
            else:
                env = {"ROOT": str(tree.root), "ANA_INSTALL_PATH": str(tree.root)}
                process.run(host_command(argv), env=env)
        except CommandError as error:
            tail = _logged(tree, script) if script.log else error.tail
            message = f"{source}:{script.line}: %post failed with status {error.status}"
            if script.error_on_fail:
                raise CommandError(argv, error.status, tail, message, _hint(script)) from error
            progress.warn(f"{message}; it is not --erroronfail, so the build goes on")
    if script.log:
        for line in _logged(tree, script):
            progress.log(line)


def _logged(tree: Tree, script: Script) -> list[str]:
    """The last lines of a script's log."""
    path = tree.path(script.log) if script.chroot else Path(script.log)
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-process.TAIL_LINES :]


def _hint(script: Script) -> str:
    place = "in the system" if script.chroot else "on this host"
    return f"all it printed is in {script.log} {place}" if script.log else ""


def run_playbook(tree: Tree, playbook: Path, extra: Sequence[str] = ()) -> None:
    """Configure the tree with an Ansible playbook; its only host is called `image`.

    Needs ansible-playbook on this host, and Python in the tree for most modules. extra: further arguments
    of ansible-playbook. Raises HostError where one of them is missing, CommandError when the playbook fails.
    """
    if not playbook.is_file():
        raise HostError(f"the playbook {playbook} is not there", "correct the image's `playbook`")
    if process.find("ansible-playbook") is None:
        raise HostError("ansible-playbook is not installed", "install ansible-core")
    if not tree.exists("/usr/bin/python3"):
        progress.warn("the system has no python3, which most of Ansible's modules need")
    env = {
        "ANSIBLE_CONNECTION_PLUGINS": str(Path(__file__).parent / "ansible"),
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        # Each command has a /tmp and /run of its own: what Ansible copies in has to be elsewhere.
        "ANSIBLE_REMOTE_TEMP": _PLAYBOOK_FILES,
        # The connection cannot import this package: Ansible runs on a Python of its own.
        "VDIBUILD_TREE_COMMAND": json.dumps(tree.command([], network=True)),
    }
    argv = ["ansible-playbook", "--inventory", "image,", "--connection", "vdibuild_tree", *extra]
    try:
        process.run([*argv, "--", str(playbook)], env=env, cwd=playbook.parent)
    finally:
        tree.remove(_PLAYBOOK_FILES)
