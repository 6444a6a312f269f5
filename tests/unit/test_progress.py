from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from vdibuild import progress


def plain() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100), text


def test_without_a_terminal_each_step_is_one_line() -> None:
    console, text = plain()
    with progress.reporting(console), progress.step("outer"), progress.step("inner", total=3) as inner:
        inner.advance()
        inner.note("half way")
    lines = text.getvalue().splitlines()
    assert re.fullmatch(r"  ✓ inner  \d+\.\d s  half way", lines[0])
    assert re.fullmatch(r"✓ outer  \d+\.\d s", lines[1])


def test_a_failed_step_is_marked_and_the_error_goes_on() -> None:
    console, text = plain()
    with pytest.raises(ValueError), progress.reporting(console), progress.step("work"):
        raise ValueError
    assert text.getvalue().startswith("✗ work")


def test_a_cached_step_says_so() -> None:
    console, text = plain()
    with progress.reporting(console), progress.step("work") as step:
        step.cached = True
    assert "= work  cached" in text.getvalue()


def test_names_with_brackets_are_shown_as_they_are() -> None:
    console, text = plain()
    with progress.reporting(console), progress.step("copy [bold]x[/]") as step:
        step.note("[red]y")
    assert "copy [bold]x[/]" in text.getvalue()
    assert "[red]y" in text.getvalue()


def test_on_a_terminal_running_steps_are_redrawn_and_nothing_is_left() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with progress.reporting(console), progress.step("outer"), progress.step("inner"):
        pass
    assert "✓" in text.getvalue()
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h")


def test_timings_are_by_step_and_nested() -> None:
    with progress.step("outer") as outer, progress.step("inner"), progress.step("innermost"):
        pass
    assert list(outer.timings()) == ["inner", "inner/innermost"]


def test_the_log_gets_everything_with_the_time(tmp_path: Path) -> None:
    with progress.logging_to(tmp_path / "log"), progress.step("outer") as outer:
        outer.note("detail")
        progress.warn("careful")
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(r" +\d+\.\d\d ", line) for line in lines)
    assert [line[9:].strip() for line in lines[:3]] == ["== outer", "detail", "warning: careful"]


def test_without_a_reporter_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("outer"):
        progress.warn("careful")
    assert capsys.readouterr() == ("", "")
