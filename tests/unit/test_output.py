from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vdibuild import output


def test_a_file_is_replaced_whole_with_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    output.under_way(file).write_text("what a killed run left, and longer than the new text")
    output.replace(file, "new\n", 0o600)
    assert file.read_text() == "new\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_run_leaves_the_old_text(tmp_path: Path) -> None:
    """It is killed when the new one is written, before it has the name."""
    file = tmp_path / "file"
    file.write_text("old")
    script = f"""
import os, signal, sys
from pathlib import Path
from vdibuild import output

def watch(frame, event, argument):
    if event == "c_return" and argument.__name__ == "fsync":
        os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(watch)
output.replace(Path({str(file)!r}), "new")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert file.read_text() == "old"
    output.replace(file, "newer")
    assert file.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [file]
