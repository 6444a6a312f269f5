"""Tasks that take existing systems: small, or as an archive."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context

from vdibuild.tasks.command import SITE, command, load_site, mebibytes, out, shown_size


@command(
    {
        "source": "a disk image (raw or qcow2) or a block device; it is only read",
        "output": "the qcow2 to write",
        "headroom": "what each file system has free, such as 200MiB, or what it has now if that is less",
        "verify": "boot the result before it appears (--no-verify leaves that out)",
        "memory": "of the machine that boots it, such as 2GiB",
        "boot_seconds": "how long it may take to start",
    },
    positional=["source", "output"],
)
def shrink(
    context: Context,
    source: str,
    output: str,
    headroom: str = "64MiB",
    verify: bool = True,
    memory: str = "1GiB",
    boot_seconds: int = 600,
) -> None:
    """Make the smallest image that holds a Linux disk's content."""
    from vdibuild import host
    from vdibuild.disk import shrink

    done = shrink.shrink(
        Path(source),
        Path(output),
        headroom=mebibytes("headroom", headroom),
        accelerator=host.accelerator().name,
        boot_seconds=boot_seconds if verify else None,
        memory=mebibytes("memory", memory),
    )
    out.print(
        f"{output}: {shown_size(done.after)} instead of {shown_size(done.before)}, "
        f"stored in {shown_size(done.stored)}",
        highlight=False,
        soft_wrap=True,
    )
    for firmware, seconds in done.started.items():
        out.print(f"  starts with {firmware.upper()} in {seconds:.0f} s", highlight=False)


@command(
    {
        "source": "a disk image, a block device, or a directory; / for the running system",
        "output": "the new directory for bundle.tar.zst and bundle.json",
        "name": "the bundle's name; by default the output's",
        "exclude": "a path to leave out, which may have wildcards; may be given several times",
        "one_file_system": "leave out what is mounted below a directory",
    },
    positional=["source", "output"],
    iterable=["exclude"],
)
def bundle_create(
    context: Context,
    source: str,
    output: str,
    name: str = "",
    exclude: list[str] | None = None,
    one_file_system: bool = False,
) -> None:
    """Pack a system into a bundle."""
    from vdibuild import host, packing

    described = packing.pack(
        Path(source),
        Path(output),
        accelerator=host.accelerator().name,
        name=name,
        exclude=exclude or (),
        one_file_system=one_file_system,
    )
    out.print(f"{output}: {shown_size(described.size)}, {described.sha256}", highlight=False, soft_wrap=True)


@command(
    {"bundle": "the bundle's directory", "repository": "a directory, or the URL of a WebDAV server"},
    positional=["bundle", "repository"],
)
def bundle_publish(context: Context, bundle: str, repository: str, site: str = SITE) -> None:
    """Sign and publish a bundle: to a directory, or to a web server by PUT."""
    from vdibuild.repository import publish
    from vdibuild.settings.keys import Keys

    # A template that is packed as it runs has no site file.
    keys = load_site(site).keys if Path(site).exists() else Keys()
    described = publish(Path(bundle), repository, keys)
    out.print(f"{described.name} is published", highlight=False)


@command(
    {
        "name": "the bundle's name",
        "repository": "a directory, or the URL of a web server",
        "output": "the directory that gets it",
    },
    positional=["name", "repository", "output"],
)
def bundle_get(context: Context, name: str, repository: str, output: str) -> None:
    """Get a bundle; a download that broke off goes on."""
    from vdibuild.repository import get

    described = get(repository, name, Path(output))
    out.print(f"{output}: {described.name}, {shown_size(described.size)}", highlight=False, soft_wrap=True)


@command(
    {
        "bundle": "the bundle's directory",
        "directory": "where to; it is made",
        "devices": "the bundle may hold any device nodes",
    },
    positional=["bundle", "directory"],
)
def bundle_unpack(context: Context, bundle: str, directory: str, devices: bool = False) -> None:
    """Unpack a bundle, when it is whole and harmless."""
    from vdibuild.packing import unpack

    unpack(Path(bundle), Path(directory), devices=devices)
