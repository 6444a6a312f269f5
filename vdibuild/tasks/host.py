"""Tasks that look at a host, and set it up."""

from __future__ import annotations

import sys

from invoke.context import Context
from invoke.exceptions import Exit
from rich.markup import escape
from rich.table import Table

from vdibuild import progress
from vdibuild.errors import VdibuildError
from vdibuild.tasks.command import SITE, command, load_site, out


@command()
def doctor(context: Context, site: str = SITE) -> None:
    """Say what this host lacks, and what mends it."""
    from vdibuild import host

    table = Table("", "what", "found", "to mend it", box=None, pad_edge=False)
    checks = host.doctor(load_site(site))
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]no[/]" if check.required else "[yellow]--[/]"
        table.add_row(mark, escape(check.name), escape(check.detail), escape(check.mend))
    out.print(table)
    if any(check.required and not check.ok for check in checks):
        raise Exit("something that every build needs is missing", code=1)


@command({"yes": "make the changes without asking"})
def hypervisor_setup(context: Context, yes: bool = False, site: str = SITE) -> None:
    """Make this host one for pools: the stations' DHCP, time and firewall, the machines' networks."""
    from vdibuild import hypervisor

    changes = hypervisor.changes(load_site(site))
    if not changes:
        out.print("nothing has to be changed", highlight=False)
        return
    for change in changes:
        out.print(change.what, style="bold", highlight=False, markup=False, soft_wrap=True)
        sys.stdout.write(change.difference)
    sys.stdout.flush()
    if not yes and out.input("Type yes to make these changes: ").strip() != "yes":
        raise VdibuildError("nothing was changed")
    for change in changes:
        with progress.step(change.what):
            left = change.make()
        if left:
            out.print(left, highlight=False, markup=False, soft_wrap=True)
