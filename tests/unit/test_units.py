"""The pools' units: systemd understands them, they allow little; what it and a process tell each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vdibuild.pool import service_manager

TEMPLATES = Path(__file__).parents[2] / "templates"
PROGRAM = "/usr/local/bin/vdibuild"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Instances of the units, whose program is there."""
    for file in TEMPLATES.glob("vdibuild-*@.*"):
        text = file.read_text()
        assert file.suffix == ".socket" or PROGRAM in text
        (tmp_path / file.name.replace("@", "@desktop")).write_text(text.replace(PROGRAM, "/bin/true"))
    return tmp_path


def test_systemd_understands_them(units: Path) -> None:
    files = sorted(units.iterdir())
    assert len(files) == 3
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, "")


@pytest.mark.parametrize(("unit", "tenths"), [("pool", 25), ("relay", 17)])
def test_they_allow_little(units: Path, unit: str, tenths: int) -> None:
    """Exposure in tenths, of at most 100; what is left of it is the network, and for the pool KVM and nft."""
    security = ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={tenths}"]
    file = units / f"vdibuild-{unit}@desktop.service"
    said = subprocess.run([*security, str(file)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{path}" if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{path}" if abstract else path)
        service_manager.ready()
        assert manager.recv(100) == f"READY=1\nMAINPID={os.getpid()}".encode()


def test_nobody_is_told_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service_manager.ready()


@pytest.mark.parametrize(("pid", "there"), [("$$", True), ("1", False), ("", False)])
def test_the_socket_that_systemd_listens_on(tmp_path: Path, pid: str, there: bool) -> None:
    """For this process only: what it starts in turn has the variables too, and other descriptors."""
    path = tmp_path / "socket"
    look = "from vdibuild.pool import service_manager as manager; print(manager.listening())"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        script = f'exec 3<&0; LISTEN_PID={pid} LISTEN_FDS=1 exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", sys.executable, "-c", look],
            stdin=listening.fileno(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert (str(path) in done.stdout, done.stdout == "None\n", done.stderr) == (there, not there, "")
