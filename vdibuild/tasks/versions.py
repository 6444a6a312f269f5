"""Tasks that look after what was built: verify, promote, roll back, collect."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.context import Context
from rich.markup import escape
from rich.table import Table

from vdibuild.errors import StoreError
from vdibuild.tasks.command import SITE, command, load_site, open_store, out, shown_size

if TYPE_CHECKING:
    from vdibuild.manifest import AnyManifest


@command()
def images(context: Context, site: str = SITE) -> None:
    """List the images and their versions."""
    _, store = open_store(site)
    table = Table("image", "version", "", "size", "built", "boots in", "by", box=None, pad_edge=False)
    for image in store.images():
        for version in store.versions(image):
            state = "current" if version.promoted else ""
            try:
                described = version.stored()
            except StoreError as error:
                table.add_row(image, version.name, state, "", "", "", escape(f"damaged: {error.message}"))
                continue
            table.add_row(
                image,
                version.name,
                state,
                shown_size(version.size),
                f"{described.created:%Y-%m-%d %H:%M}",
                *_booted(described),
            )
    out.print(table if table.row_count else "no image was built yet: build-golden builds one")


def _booted(described: AnyManifest) -> tuple[str, str]:
    """How long a version took to boot, and what made it."""
    if described.kind == "adopted":
        return "", f"adopted from {described.domain}"
    verification = described.verification
    seconds = f"{verification.running_seconds:.0f} s, {verification.accelerator}"
    return seconds, described.method if described.kind == "disk" else "live system"


@command({"domain": "the machine, by its name in libvirt; it has to be shut down"}, positional=["domain"])
def images_adopt(
    context: Context, domain: str, image: str | None = None, promote: bool = True, site: str = SITE
) -> None:
    """Make an existing machine's disk a version of an image, for pools to clone."""
    from vdibuild import adopt

    version = adopt.adopt(load_site(site), image, domain, promote=promote)
    state = " is current" if version.promoted else ""
    out.print(f"{version.image} {version.name}{state}: {shown_size(version.size)}", highlight=False)


@command()
def images_show(
    context: Context, image: str | None = None, version: str | None = None, site: str = SITE
) -> None:
    """Show a version's manifest."""
    loaded, store = open_store(site)
    found = store.get(image or loaded.image(None)[0], version)
    sys.stdout.write(found.stored().model_dump_json(indent=2) + "\n")


@command()
def images_verify(
    context: Context, image: str | None = None, version: str | None = None, site: str = SITE
) -> None:
    """Check a version's signature and every byte."""
    loaded, store = open_store(site)
    verified = store.verify(image or loaded.image(None)[0], version)
    out.print(
        f"{verified.version.image} {verified.version.name}: {shown_size(verified.size)} intact, "
        f"signed by {verified.signer}",
        highlight=False,
    )


@command()
def images_promote(context: Context, version: str, image: str | None = None, site: str = SITE) -> None:
    """Make a version the current one."""
    loaded, store = open_store(site)
    promoted = store.promote(image or loaded.image(None)[0], version)
    out.print(f"{promoted.image}: {promoted.name} is current", highlight=False)


@command()
def images_rollback(context: Context, image: str | None = None, site: str = SITE) -> None:
    """Make the version before current again."""
    loaded, store = open_store(site)
    promoted = store.rollback(image or loaded.image(None)[0])
    out.print(f"{promoted.image}: {promoted.name} is current", highlight=False)


@command({"keep": "how many of the newest versions of each image stay"})
def images_gc(context: Context, image: str | None = None, keep: int = 3, site: str = SITE) -> None:
    """Remove old versions that nobody uses, and, for all images, what nobody misses in the cache."""
    from vdibuild import cache

    loaded, store = open_store(site)
    for entry in store.gc(image, keep):
        done = "removed" if entry.removed else "kept"
        out.print(
            f"{done} {entry.image} {entry.name} ({shown_size(entry.size)}): {entry.reason}", highlight=False
        )
    for gone in cache.clear(loaded.cache_directory, store) if image is None else ():
        out.print(
            f"removed {gone.name} ({shown_size(gone.size)}) from the cache: {gone.reason}", highlight=False
        )
