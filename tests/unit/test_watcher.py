"""What the watcher makes of an installer's words: logs in Anaconda's form, consoles, and silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdibuild.install.watcher import PROMPT_SECONDS, Channel, Failure, Note, Stage, Warned, Watcher

GOLDEN = Path(__file__).parent / "golden" / "install"
SILENCE, DEADLINE = 100.0, 1000.0


def watcher() -> Watcher:
    return Watcher(SILENCE, DEADLINE, now=0)


def failure(channel: Channel, text: str) -> Failure | None:
    """What a watcher says of a text that came in one piece, and a moment later."""
    watching = watcher()
    watching.feed(channel, text.encode(), now=1)
    watching.check(now=1 + PROMPT_SECONDS)
    return watching.failure


def test_the_stages_of_a_good_installation() -> None:
    watching = watcher()
    _, findings = watching.feed("log", (GOLDEN / "anaconda-success.log").read_bytes(), now=1)
    assert findings == [
        Stage("Installation environment setup"),
        Stage("Early storage configuration"),
        Note("Create storage layout"),
        Stage("Payload installation"),
        Stage("Bootloader installation"),
        Stage("Post installation scripts"),
        Warned("the script at line 44 of the kickstart ended with status 1"),
    ]
    watching.ended(by_itself=True, reason="it shut down")
    assert watching.failure is None


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        (
            "ERR anaconda:anaconda: core.threads: Traceback (most recent call last):#012  File x",
            "itself failed",
        ),
        (
            "ERR org.fedoraproject.Anaconda.Modules.Storage:Traceback (most recent call last):",
            "itself failed",
        ),
        (
            "ERR anaconda:anaconda: ui.tui: There was an error running the kickstart script at line 31.  "
            "This is a fatal error and installation will be aborted.#012#012no",
            "a script of the kickstart failed",
        ),
        (
            "ERR anaconda:anaconda: modules.payloads.payload.dnf.installation: The packages couldn't be "
            "resolved:#012#012Packages, Groups or Modules missing:#012#012no-such-package",
            "packages cannot be installed: The packages couldn't be resolved: Packages, Groups or Modules "
            "missing: no-such-package",
        ),
        (
            "ERR anaconda:anaconda: ui.tui: The following error occurred while setting up the payload. This "
            "is a fatal error and installation will be aborted.#012#012Failed to download metadata for repo",
            "source cannot be used",
        ),
        (
            "ERR anaconda:anaconda: ui.tui: The following error occurred while installing the payload. This "
            "is a fatal error and installation will be aborted.",
            "the software cannot be installed",
        ),
        (
            "ERR anaconda:anaconda: ui.tui: An error occurred while activating your storage configuration."
            "#012#012Process reported exit code 4",
            "the disk cannot be partitioned",
        ),
        (
            "ERR anaconda:anaconda: ui.tui: The following error occurred while installing the boot loader.",
            "boot loader cannot be installed",
        ),
        (
            "ERR anaconda:anaconda: ui.tui.hubs.summary: CmdlineError: The following mandatory spokes are "
            "not completed:#012Root password",
            "leaves questions open",
        ),
        ("ERR anaconda:packaging: Not enough disk space to download the packages", "the disk is too small"),
        (
            "ERR anaconda:packaging: Error in POSTIN scriptlet in rpm package dracut",
            "the script of a package",
        ),
        (
            "CRIT anaconda:anaconda: kickstart: The following problem occurred on line 12 of the kickstart "
            "file:#012#012Unknown command: instal",
            "the kickstart is wrong",
        ),
        ("INFO anaconda:Process 1483 (anaconda) of user 0 dumped core.", "the installer crashed"),
    ],
)
def test_a_failure_in_the_log(message: str, meaning: str) -> None:
    found = failure("log", f"12:00:00,123 {message}\n")
    assert found is not None
    assert found.kind == "log"
    assert meaning in found.message


@pytest.mark.parametrize(
    "message",
    [
        "ERR firewalld:Traceback (most recent call last):",
        "WARNING kernel:Call Trace:",
        "ERR anaconda:packaging: IGNORED: Error in POSTIN scriptlet in rpm package dracut",
        "ERR anaconda:anaconda: core.util: Error code 1 running the kickstart script at line 3",
        "INFO systemd:vdibuild: failed: this is not our program",
    ],
)
def test_what_is_no_failure(message: str) -> None:
    assert failure("log", f"12:00:00,123 {message}\n") is None


def test_our_own_installer() -> None:
    watching = watcher()
    said = b"12:00:00,123 INF vdibuild: stage storage\n12:00:01,000 INF vdibuild: copying 3 files\n"
    _, findings = watching.feed("log", said, now=1)
    assert findings == [Stage("storage"), Note("copying 3 files")]
    said = b"12:00:01,500 DBG vdibuild: stage of a log\n12:00:01,500 WRN vdibuild: no swap\n"
    assert watching.feed("log", said, now=1)[1] == [Warned("no swap")]
    watching.feed("log", b"12:00:02,000 CRT vdibuild: failed: the disk vda has 10 MiB\n", now=2)
    watching.feed("log", b"12:00:02,000 CRT vdibuild: and needs 20\n", now=2)
    watching.feed("log", b"12:00:02,000 CRT vdibuild: hint: give it more in the site file\n", now=2)
    watching.feed("log", b"12:00:02,000 CRT vdibuild: hint: or install less\n", now=2)
    watching.feed("log", b"12:00:03,000 CRT vdibuild: failed: and then something else\n", now=2)
    hint = "give it more in the site file\n  or install less"
    assert watching.failure == Failure("log", "the disk vda has 10 MiB and needs 20", hint)


def test_our_own_installer_has_to_say_that_it_is_done() -> None:
    for said, kind in ((b"stage write", "gone"), (b"done", None)):
        watching = watcher()
        watching.feed("log", b"12:00:00,123 INF vdibuild: " + said + b"\n", now=1)
        watching.ended(by_itself=True, reason="it shut down")
        assert (watching.failure.kind if watching.failure else None) == kind


@pytest.mark.parametrize(
    ("text", "kind", "meaning"),
    [
        ("[    1.9] Kernel panic - not syncing: Attempted to kill init!\n", "panic", "the kernel panicked"),
        (
            "The installation was stopped due to an error which occurred while running in\n",
            "log",
            "an error stopped the installer",
        ),
        (
            "[  12.1] dracut-initqueue[612]: Warning: anaconda: failed to fetch stage2 from x\n",
            "log",
            "medium",
        ),
        ("Entering emergency mode. Exit the shell to continue.\n", "log", "did not come up"),
        (
            "Please make a selection from the above ['c' to continue, 'q' to quit, 'r' to refresh]: ",
            "prompt",
            "asks for what the kickstart leaves open",
        ),
        (
            "Please make your choice from above ['q' to quit | 'b' to begin installation | 'r' to refresh]: ",
            "prompt",
            "asks for what the kickstart leaves open",
        ),
        ("Please respond 'yes' or 'no': ", "prompt", "asks for what the kickstart leaves open"),
        ("Installation complete. Press ENTER to quit: ", "prompt", "waits for a key"),
        ("Root password: ", "prompt", "asks for a password"),
        ("\r\nlocalhost login: ", "prompt", "a login prompt"),
        ("dracut:/# ", "prompt", "a shell waits"),
        ("(initramfs) ", "prompt", "a shell waits"),
        ("[anaconda root@localhost /]# ", "prompt", "a shell waits"),
        ("\x1b[1;37mgrub> \x1b[0m", "prompt", "GRUB waits"),
        ("Do you want to continue? [y/N] ", "prompt", "asks a question"),
    ],
)
def test_a_failure_on_the_console(text: str, kind: str, meaning: str) -> None:
    found = failure("console", text)
    assert found is not None
    assert (found.kind, meaning in found.message) == (kind, True), found


@pytest.mark.parametrize(
    "text",
    [
        "Please make a selection from the above ['c' to continue]: c\n",
        "localhost login: root\n",
        "Updating / installing...   ################ ",
        "Installing glibc.x86_64 (3/310)\n",
        "Downloading 12 % ",
    ],
)
def test_what_is_no_prompt(text: str) -> None:
    assert failure("console", text) is None


def test_a_prompt_counts_only_when_it_stands() -> None:
    watching = watcher()
    watching.feed("console", b"localhost login: ", now=1)
    watching.check(now=1 + PROMPT_SECONDS / 2)
    assert watching.failure is None
    assert watching.wait(now=1 + PROMPT_SECONDS / 2) == pytest.approx(PROMPT_SECONDS / 2)
    watching.feed("console", b"(automatic login)\r\n", now=2)
    watching.check(now=50)
    assert watching.failure is None


def test_a_prompt_stands_whatever_the_kernel_says_meanwhile() -> None:
    watching = watcher()
    watching.feed("console", b"localhost login: [    9.123456] random: crng init done\r\n", now=1)
    watching.feed("console", b"[   10.000001] tsc: Refined TSC clocksource calibration\r\n", now=2)
    watching.check(now=2 + PROMPT_SECONDS)
    assert watching.failure
    assert watching.failure.kind == "prompt"
    # Something else than the kernel goes on.
    watching = watcher()
    watching.feed("console", b"localhost login: [    9.123456] random: crng init done\r\nand on\r\n", now=1)
    watching.check(now=50)
    assert watching.failure is None


def test_a_count_becomes_a_bar() -> None:
    _, findings = watcher().feed("console", b"Installing glibc.x86_64 (3/310)\r\n", now=1)
    assert findings == [Note("Installing glibc.x86_64 (3/310)", 3, 310)]


def test_silence_and_the_deadline() -> None:
    watching = watcher()
    assert watching.wait(now=0) == SILENCE
    watching.feed("log", b"x", now=50)
    watching.check(now=149)
    assert watching.failure is None
    watching.check(now=150)
    assert watching.failure and watching.failure.kind == "silence"
    watching = watcher()
    for now in range(0, 1000, 90):
        watching.feed("console", b".", now)
        watching.check(now)
        assert watching.failure is None
    assert watching.wait(now=990) == 10
    watching.check(now=1000)
    assert watching.failure and watching.failure.kind == "deadline"


def test_a_guest_may_not_end_otherwise() -> None:
    watching = watcher()
    watching.ended(by_itself=False, reason="QEMU ended unexpectedly")
    assert watching.failure == Failure("gone", "the guest is gone: QEMU ended unexpectedly")


def test_the_tail_has_both_channels_and_the_unfinished_line() -> None:
    watching = watcher()
    watching.feed("console", b"one\r\n\r\ntw", now=1)
    watching.feed("log", b"12:00:00,123 INFO kernel:three\n", now=1)
    assert watching.tail() == ["one", "12:00:00,123 INFO kernel:three", "tw"]


@given(st.lists(st.tuples(st.sampled_from(["console", "log"]), st.binary(max_size=200)), max_size=20))
def test_hostile_output_is_taken(chunks: list[tuple[Channel, bytes]]) -> None:
    watching = watcher()
    for now, (channel, data) in enumerate(chunks):
        watching.feed(channel, data, now)
        watching.check(now)
    assert all(len(line) < 70000 for line in watching.tail())


def test_a_line_without_an_end_takes_no_memory_without_end() -> None:
    watching = watcher()
    for now in range(100):
        watching.feed("console", b"x" * 65536, now)
    watching.feed("console", b"\n", now=100)
    assert sum(map(len, watching.tail())) <= 2 * 65536


def test_lines_are_put_together_from_pieces() -> None:
    watching = watcher()
    findings = []
    for number, byte in enumerate(b"12:00:00,123 INF vdibuild: stage storage\n"):
        _, found = watching.feed("log", bytes([byte]), now=number)
        findings += found
    assert findings == [Stage("storage")]
