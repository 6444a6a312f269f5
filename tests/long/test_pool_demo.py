"""pool.demo as a user runs it, and as one who has seen enough interrupts it: minutes of guests each.

`pytest tests/long/test_pool_demo.py`, as root.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import SiteDirectory, small_site

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the demo needs root")

PICTURES = {
    "station-1.png",
    "station-2.png",
    "station-1-types.png",
    "station-2-sees-nothing-of-it.png",
    "station-1-goes-on.png",
    "station-2-goes-on.png",
    "next-person.png",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteDirectory]:
    """A site whose image is not built yet."""
    directory = small_site(tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache"))
    yield directory
    directory.close()


def nothing_is_left(site: SiteDirectory) -> None:
    assert site.wait_until_clean() == []
    assert [path.name for path in Path(site.path / "tmp").iterdir()] == []


def test_from_nothing_to_its_end(site: SiteDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, output = site.run("pool.demo", "--pictures", "pictures")
    assert status == 0, output
    assert {path.name for path in (site.path / "pictures").iterdir()} == PICTURES
    # Who had what: two at once, of whom any may be the first, and then somebody else.
    history = [line.split()[2] for line in output.splitlines() if " 10.9.0.1" in line]
    assert history[0] == "10.9.0.11", output
    assert sorted(history[1:]) == ["10.9.0.11", "10.9.0.12"], output
    nothing_is_left(site)


def test_with_a_station_from_the_kiosks_iso(site: SiteDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, output = site.run("build-kiosk-iso")
    assert status == 0, output
    status, output = site.run("pool.demo", "--kiosk", "--pictures", "with-kiosk")
    assert status == 0, output
    assert {path.name for path in (site.path / "with-kiosk").iterdir()} > PICTURES
    assert re.search(r"kiosk sees demo-[0-9a-f]{8}", output), output
    assert any(line.split()[2] == "10.9.0.13" for line in output.splitlines() if " 10.9.0.1" in line), output
    nothing_is_left(site)


def test_ctrl_c_with_people_at_the_stations(site: SiteDirectory) -> None:
    demo = site.start("pool.demo")
    assert demo.stdout
    said = []
    for line in demo.stdout:
        said.append(line)
        if "two people sit down at once" in line:
            break
    os.killpg(demo.pid, signal.SIGINT)
    rest, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, "".join(said) + rest
    assert "interrupted; what was under way has been removed" in rest
    nothing_is_left(site)
