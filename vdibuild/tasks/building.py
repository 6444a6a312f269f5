"""Tasks that build images and ISOs, and show what they are built from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from rich.markup import escape
from rich.table import Table

from vdibuild.tasks.command import SITE, command, load_site, out

if TYPE_CHECKING:
    from vdibuild.golden import Plan
    from vdibuild.store import Version

_BUILD = {
    "fresh": "take no finished step of an earlier run",
    "keep": "leave the directory of a step that fails, and say where",
    "promote": "make the new version the current one",
}


@command(
    {
        **_BUILD,
        "shell": "open a shell in the system whose step failed",
        "plan": "print what would run and what is cached; change nothing",
    }
)
def build_golden(
    context: Context,
    image: str | None = None,
    site: str = SITE,
    fresh: bool = False,
    keep: bool = False,
    shell: bool = False,
    plan: bool = False,
    promote: bool = True,
) -> None:
    """Build an image: sealed, booted, signed, versioned."""
    from vdibuild import golden

    loaded = load_site(site)
    if plan:
        _print_plan(golden.plan(loaded, image))
        return
    opened = golden.open_shell if shell else None
    built = golden.build(loaded, image, fresh=fresh, keep=keep, promote=promote, on_failure=opened)
    _say_built(built.version, "disk.qcow2", built.unchanged)


@command(_BUILD)
def build_installer(
    context: Context, site: str = SITE, fresh: bool = False, keep: bool = False, promote: bool = True
) -> None:
    """Build the ISO that installs systems by their kickstarts: booted, signed, versioned."""
    from vdibuild import installer
    from vdibuild.live import ISO

    built = installer.build(load_site(site), fresh=fresh, keep=keep, promote=promote)
    _say_built(built.version, ISO, built.unchanged)


@command(_BUILD)
def build_kiosk_iso(
    context: Context, site: str = SITE, fresh: bool = False, keep: bool = False, promote: bool = True
) -> None:
    """Build the ISO of stations: booted, signed, versioned."""
    from vdibuild import kiosk
    from vdibuild.live import ISO

    built = kiosk.build(load_site(site), fresh=fresh, keep=keep, promote=promote)
    _say_built(built.version, ISO, built.unchanged)


def _say_built(version: Version, file: str, unchanged: bool) -> None:
    """Say which version there is now. file: of it, the one that a user wants."""
    said = "is unchanged" if unchanged else "is built"
    out.print(f"{version.image} {said}: version {version.name}", highlight=False)
    out.print(f"  {version.path / file}", highlight=False, soft_wrap=True)
    if not version.promoted:
        command = f"./inv images.promote --image {version.image} --version {version.name}"
        out.print(f"  it is not the current version: {command}", highlight=False, soft_wrap=True)


def _print_plan(planned: Plan) -> None:
    table = Table("step", "result", "how", box=None, pad_edge=False)
    for step in planned.steps:
        table.add_row(step.title, "cached" if step.cached else "to do", escape(step.detail))
    out.print(table)


@command()
def show_kickstart(context: Context, image: str | None = None, site: str = SITE) -> None:
    """Print an image's kickstart, rendered and checked."""
    from vdibuild import bootstrap
    from vdibuild.kickstart import anaconda

    loaded = load_site(site)
    name, settings = loaded.image(image)
    if anaconda.executes(settings):
        sys.stdout.write(anaconda.read(loaded, name, settings).text)
    else:
        sys.stdout.write(bootstrap.read_recipe(loaded, name, settings).text)


@command({"output": "the file to write"})
def windows_answers(context: Context, output: str, image: str | None = None, site: str = SITE) -> None:
    """Write a Windows image's answers as a CD-ROM: Setup reads them from it."""
    from vdibuild.families import windows

    loaded = load_site(site)
    name, settings = loaded.image(image)
    windows.write_medium(loaded, name, settings, Path(output))
    out.print(f"{output}: attach it beside Windows' ISO; it holds the account's password", highlight=False)


@command()
def site_schema(context: Context) -> None:
    """Print the site file's JSON Schema."""
    from vdibuild import site

    sys.stdout.write(json.dumps(site.schema(), indent=2) + "\n")
