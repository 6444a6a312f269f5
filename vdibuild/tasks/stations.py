"""Tasks for stations: the cards that they start from, and their settings."""

from __future__ import annotations

import sys
from pathlib import Path

from invoke.context import Context

from vdibuild.errors import VdibuildError
from vdibuild.tasks.command import SITE, command, open_store, out

_SETTINGS = {
    "set": "KEY=VALUE, a setting of the station; may be given several times",
    "ca": "the certificates (PEM) that the server is known by",
}


@command(
    {
        "medium": "an ISO, or the device of a card",
        **_SETTINGS,
        "login": "ask for the password that a person begins a session with",
        "technician": "ask for the password of the station's technician",
    },
    positional=["medium"],
    iterable=["set"],
)
def kiosk_configure(
    context: Context,
    medium: str,
    set: list[str] | None = None,
    ca: str | None = None,
    login: bool = False,
    technician: bool = False,
) -> None:
    """Show a station's settings, or change them in place."""
    from vdibuild import kiosk, station

    changes = _changes(set)
    for key, wanted in zip(station.PASSWORDS, (login, technician), strict=True):
        if wanted:
            password = out.input(f"The password for {key} (empty: none is asked for): ", password=True)
            changes[key] = station.hashed(password) if password else ""
    if changes or ca:
        kiosk.configure(Path(medium), changes, Path(ca) if ca else None)
    sys.stdout.write(kiosk.settings(Path(medium)))


@command()
def kiosk_cards(context: Context) -> None:
    """List the cards that can be written, by model, size and serial number."""
    from vdibuild.live import card

    for one in card.candidates(1):
        out.print(str(one), highlight=False, soft_wrap=True)


@command(
    {
        "device": "the card's device, or several, parted by commas; kiosk.cards lists them",
        "image": "the ISO; by default the current version of the kiosk",
        **_SETTINGS,
        "verify_only": "write nothing: compare the cards with their version, but for their settings",
        "internal": "write also to a device that cannot be taken out",
    },
    positional=["device"],
    iterable=["set"],
)
def write_card(
    context: Context,
    device: str,
    image: str = "",
    set: list[str] | None = None,
    ca: str | None = None,
    verify_only: bool = False,
    internal: bool = False,
    site: str = SITE,
) -> None:
    """Write the kiosk to cards, all at once, and read them back."""
    from vdibuild import kiosk
    from vdibuild.live import ISO, card
    from vdibuild.settings.live_systems import KIOSK

    found = {one.path: one for one in (card.find(Path(word)) for word in device.split(","))}
    if verify_only:
        _verify_cards([*found], Path(image) if image else None, site)
        return
    source = Path(image) if image else open_store(site)[1].verify(KIOSK).version.path / ISO
    size = source.stat().st_size
    for one in found.values():
        if refused := card.refusal(one, size, internal=internal):
            raise VdibuildError(f"{one}", refused)
    span, settings = kiosk.partition_with(source, _changes(set), Path(ca) if ca else None)
    for one in found.values():
        out.print(f"{one}", highlight=False, soft_wrap=True)
    names = [path.name for path in found]
    it, its_name, its_switch = ("it", "its name", "its switch")
    if len(names) > 1:
        it, its_name, its_switch = ("them", "their names", "their switches")
    out.print(f"All that is on {it} will be lost.")
    if sorted(out.input(f"Type {its_name} ({' '.join(names)}) to go on: ").split()) != sorted(names):
        raise VdibuildError("nothing was written")
    card.write(source, [*found], {span: settings})
    written = f"{', '.join(map(str, found))} {'is' if len(names) == 1 else 'are'} written and read back"
    out.print(f"{written}: take {it} out, and push {its_switch} to LOCK", highlight=False, soft_wrap=True)


def _verify_cards(cards: list[Path], image: Path | None, site: str) -> None:
    """Compare cards with an image, or each with the version that it was written from."""
    from vdibuild import kiosk
    from vdibuild.live import ISO, card, iso
    from vdibuild.settings.live_systems import KIOSK

    sources: dict[Path, list[Path]] = {}
    for path in cards:
        source = image
        if source is None:
            store = open_store(site)[1]
            version = store.labelled(KIOSK, iso.label(path))
            source = version.path / ISO
            if source not in sources:
                store.verify(KIOSK, version.name)
        sources.setdefault(source, []).append(path)
    for source, paths in sources.items():
        card.verify(source, paths, [kiosk.place(source)])
        for path in paths:
            out.print(f"{path} holds {source}; its settings are:", highlight=False, soft_wrap=True)
            sys.stdout.write(kiosk.settings(path))


def _changes(words: list[str] | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in words or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise VdibuildError(f"--set {key}: give a value: --set {key}=VALUE")
    return {key: value for key, _, value in pairs}
