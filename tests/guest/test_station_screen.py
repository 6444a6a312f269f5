"""The station's screens, on an X server without a monitor: what is told is what is to be seen."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdibuild import station
from vdibuild.pool.screens import HEIGHT, WIDTH, x_server

PROGRAM = str(Path(station.__file__).with_name("station_screen.py"))
GREEN, RED = b"\x00\x80\x00", b"\xff\x00\x00"
BACKGROUND = b"\x16\x22\x2e"
WHITE = b"\xff\xff\xff"


class Screen:
    """The program, started by the system's Python, which has GTK."""

    def __init__(self, display: str) -> None:
        self._environment = {**os.environ, "DISPLAY": display, "NO_AT_BRIDGE": "1"}
        self.process = subprocess.Popen(
            ["/usr/bin/python3", PROGRAM],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def show(self, title: str, pictures: str = "", entry: str = "") -> None:
        assert self.process.stdin
        wanted = {"title": title, "text": "Text", "pictures": pictures, "seconds": 1, "entry": entry}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()

    def said(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def keys(self, *names: str) -> None:
        """Press keys, one after the other, by X's names."""
        subprocess.run(["xdotool", "key", *names], env=self._environment, check=True)

    def colours(self) -> Counter[bytes]:
        """How many pixels have which colour."""
        shot = ["import", "-window", "root", "-depth", "8", "rgb:-"]
        pixels = subprocess.run(shot, env=self._environment, check=True, capture_output=True).stdout
        assert len(pixels) == WIDTH * HEIGHT * 3
        return Counter(pixels[place : place + 3] for place in range(0, len(pixels), 3))

    def until(self, colour: bytes, pixels: int = 1000) -> Counter[bytes]:
        """Wait for more than so many pixels of a colour."""
        for _ in range(100):
            found = self.colours()
            if found[colour] > pixels:
                return found
        raise AssertionError(f"never was anything {colour.hex()}: {found.most_common(5)}")


@pytest.fixture
def screen() -> Iterator[Screen]:
    with x_server() as display:
        started = Screen(display)
        yield started
        started.process.kill()
        started.process.wait()
    for pipe in (started.process.stdin, started.process.stdout):
        assert pipe
        pipe.close()


def picture(path: Path, colour: str) -> None:
    subprocess.run(["convert", "-size", "640x480", f"xc:{colour}", path], check=True)


def test_it_says_when_it_is_seen(screen: Screen) -> None:
    screen.show("Title")
    assert screen.said() == "shown\n"
    # It is all there by then: the background, and the white letters.
    colours = screen.colours()
    assert colours[BACKGROUND] > WIDTH * HEIGHT // 3
    assert colours[WHITE] > 100


def test_pictures_follow_each_other_and_damaged_ones_are_left_out(screen: Screen, tmp_path: Path) -> None:
    picture(tmp_path / "1.png", "#008000")
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    picture(tmp_path / "3.png", "#ff0000")
    (tmp_path / "4.txt").write_text("no picture either")
    screen.show("Title", str(tmp_path))
    assert screen.said() == "shown\n"
    screen.until(GREEN)
    screen.until(RED)
    screen.until(GREEN)
    screen.show("Another", str(tmp_path / "nowhere"))
    screen.until(BACKGROUND)


def test_it_ends_with_its_input(screen: Screen) -> None:
    screen.show("Title")
    assert screen.said() == "shown\n"
    assert screen.process.stdin
    screen.process.stdin.close()
    assert screen.process.wait(20) == 0


def test_keys_and_what_is_typed(screen: Screen) -> None:
    screen.show("Title")
    assert screen.said() == "shown\n"
    # A modifier alone is no key.
    screen.keys("shift", "Return")
    assert screen.said() == "pressed\n"
    screen.keys("ctrl+alt+t")
    assert screen.said() == "technician\n"
    screen.show("Password", entry="hidden")
    screen.until(WHITE, 5000)  # the line's field
    screen.keys("s", "e", "space", "Return")
    assert screen.said() == "entered se \n"
    screen.keys("t", "Escape")
    assert screen.said() == "left\n"
    screen.show("Title")
    screen.until(BACKGROUND)
    screen.keys("t")
    assert screen.said() == "pressed\n"
