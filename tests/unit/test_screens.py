"""Whether two pictures are taken to show the same, on pictures made of blocks."""

from __future__ import annotations

import random
from pathlib import Path

from vdibuild.pool import screens

COLUMNS, ROWS = 60, 20


def picture(path: Path, seed: int, scale: int, light: int = 170, border: int = 0) -> Path:
    """Columns and rows of "letters", each `scale` pixels wide and high; border: grey lines at the top."""
    drawn = random.Random(seed)  # noqa: S311 (no secret)
    rows = [bytes(light if drawn.random() < 0.4 else 0 for _ in range(COLUMNS)) for _ in range(ROWS)]
    scaled = [bytes(value for value in row for _ in range(scale)) for row in rows for _ in range(scale)]
    margin = bytes([200] * COLUMNS * scale)
    lines = [margin] * border + [bytes(COLUMNS * scale)] * 3 + scaled
    path.write_bytes(b"P5 %d %d 255\n" % (COLUMNS * scale, len(lines)) + b"".join(lines))
    return path


def test_the_same_at_another_size_with_another_title(tmp_path: Path) -> None:
    machine = picture(tmp_path / "machine.pgm", seed=1, scale=8)
    viewer = picture(tmp_path / "viewer.pgm", seed=1, scale=11, light=160, border=64)
    assert screens.alike(machine, viewer, range(64, 4096))


def test_something_else(tmp_path: Path) -> None:
    one, other = (picture(tmp_path / f"{seed}.pgm", seed, scale=8) for seed in (1, 2))
    assert not screens.alike(one, other)


def test_nothing_is_like_nothing_else(tmp_path: Path) -> None:
    blank = picture(tmp_path / "blank.pgm", seed=1, scale=8, light=0)
    assert not screens.alike(blank, blank)
    assert screens.written(blank) == 0


def test_how_much_is_written(tmp_path: Path) -> None:
    drawn = picture(tmp_path / "drawn.pgm", seed=1, scale=8)
    assert screens.written(drawn) == sum(value == 170 for value in drawn.read_bytes()[-480 * 160 :])
