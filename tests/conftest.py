"""Fixtures that every kind of test shares."""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from vdibuild.errors import VdibuildError

FakeCommand = Callable[..., Path]


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    """Put a real executable first on PATH that records its arguments, one line each, and then does `script`.

    Returns the file that gets the arguments.
    """
    directory = tmp_path / "fake-bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory), prepend=":")

    def make(name: str, script: str = "") -> Path:
        record = tmp_path / f"{name}.argv"
        command = directory / name
        command.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >>'{record}'\n{script}\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        return record

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With an error goes what the guest or the command said last: its message has no room for it."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, VdibuildError) and (tail := getattr(error, "tail", [])):
        report.sections.append(("what was said last", "\n".join(tail)))
    return report
