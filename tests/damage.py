"""What goes wrong with a medium."""

from __future__ import annotations

from pathlib import Path


def flip(image: Path, place: int, bit: int = 1) -> None:
    """Flip a bit of the byte at that place. bit: its value."""
    with image.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))
