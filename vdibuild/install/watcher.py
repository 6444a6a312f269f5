"""Reads what an installer says, on its console and in its log, and tells how far it is and what went wrong.

Nothing here waits or touches a guest: lines and the time come in, stages and failures come out. All that a
guest says is untrusted; it is compared and quoted, never acted on.

The log has the form that Anaconda's rsyslog writes to the virtio-serial port (the template anaconda_syslog
in lorax: share/templates.d/99-generic/config_files/common/rsyslog.conf):
`HH:MM:SS,mmm SEVERITY PROGRAM:MESSAGE`, where rsyslog has written control characters as #NNN, octal. Our own
installer (see install_agent.py) writes the same, as PROGRAM `vdibuild`: `stage NAME`, `failed: MESSAGE`,
`hint: HINT`, `done`.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from vdibuild.machine import printable
from vdibuild.process import TAIL_LINES

Channel = Literal["console", "log"]

LOG_FAILURES = {
    r"Traceback \(most recent call last\)|traceback script\(s\) have been run": "the installer itself failed",
    r"Process \d+ \(anaconda\) of user \d+ dumped core|crashed on signal": "the installer crashed",
    r"following problem occurred on line \d+ of the kickstart file": "the kickstart is wrong",
    r"error running the kickstart script at line": "a script of the kickstart failed",
    r"The packages couldn't be resolved|NoSuchPackage|Packages, Groups or Modules missing": (
        "packages cannot be installed"
    ),
    r"error populating transaction after|An error occurred during the transaction": (
        "packages cannot be installed"
    ),
    r"Error in POSTIN scriptlet in rpm package": "the script of a package failed",
    r"[Nn]ot enough (?:disk )?space|insufficient disk space": "the disk is too small",
    r"error occurred while setting up the payload|base repo .* not valid": (
        "the installation source cannot be used"
    ),
    r"while installing the payload": "the software cannot be installed",
    r"error occurred while activating your storage|problem with your existing storage": (
        "the disk cannot be partitioned"
    ),
    r"while installing the boot loader": "the boot loader cannot be installed",
    r"This is a fatal error|error occurred during the installation:": "the installation failed",
    r"CmdlineError|mandatory spokes are not completed": "the kickstart leaves questions open",
    r"Out of memory: Kill": "the guest has too little memory",
}
"""What the log says when an installation has failed, as a pattern, and what that means."""

CONSOLE_FAILURES = {
    r"Kernel panic - not syncing": "the kernel panicked",
    r"installation was stopped due to an error": "an error stopped the installer",
    r"no interactive debugging allowed|An unknown error has occured": "the installer itself failed",
    r"failed to fetch (?:stage2|kickstart)|can't find /\S+\.ks|Media check failed": (
        "the installer did not find its medium or kickstart"
    ),
    r"dracut-emergency|Entering emergency mode|You are in (?:emergency|rescue) mode": (
        "the installer's system did not come up"
    ),
    r"installation cannot continue and the system will be rebooted": "the guest has too little memory",
    r"No bootable device|Boot failed: not a bootable disk|BdsDxe: No bootable option": (
        "the firmware found nothing to boot"
    ),
    r"Out of memory: Kill": "the guest has too little memory",
}
"""What the console shows when an installation has failed, as a pattern, and what that means."""

PROMPTS = {
    r"Please (?:make|respond|enter|choose|select)\b.*[:?] ?$|\[.*'[a-z]' to .*\]:? ?$": (
        "the installer asks for what the kickstart leaves open"
    ),
    r"Press (?:ENTER|Enter|any key)\b.*$": "the installer waits for a key",
    r"(?:[Pp]assword|[Pp]assphrase).*: ?$": "the installer asks for a password",
    r"\blogin: ?$": "a login prompt: the installer has ended, or never began",
    r"^\(initramfs\) ?$|^(?:dracut:\S*|(?:ba)?sh-[\d.]+)[#$] ?$": "a shell waits for commands",
    r"^\[?(?:anaconda )?[\w.-]+@[\w.-]+[ :]\S+?\]?[#$] ?$": "a shell waits for commands",
    r"[\[(][yY](?:es)?/[nN]o?[\])].*$": "the installer asks a question",
    r"grub(?: rescue)?> ?$": "GRUB waits for commands",
}
"""What the console's last, unfinished line is when somebody has to type, as a pattern, and what it means."""

PROMPT_SECONDS = 3.0
"""How long a prompt has to stand as the last thing on the console until it counts."""

_LINE = re.compile(r"(?P<time>\d\d:\d\d:\d\d),\d+ (?P<severity>[A-Z]+) (?P<program>[^:]+): ?(?P<message>.*)")
_ANACONDA = re.compile(r"anaconda|org\.fedoraproject\.Anaconda|packaging|program", re.IGNORECASE)
_QUEUE = re.compile(r"Queue started: (?P<name>.+?) \((?P<number>\d+)/(?P<total>\d+)\)")
_TASK = re.compile(r"Task started: (?P<name>.+?) \(\d+/\d+\)")
_SCRIPT = re.compile(r"Error code (\d+) running the kickstart script at line (\d+)")
_COUNTED = re.compile(r"(?:Installing|Verifying|Downloading) .*\((?P<number>\d+)/(?P<total>\d+)\)")
_KERNEL = re.compile(r"\[ *\d+\.\d{6}\] .*")
_CONTROL = re.compile(r"#(0[0-3][0-7])")
_LONGEST = 1 << 16  # characters of a line that does not end
_QUOTED = 500  # characters of a line in an error


@dataclass(frozen=True)
class Failure:
    """Why an installation has failed. kind: see errors.InstallationError."""

    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Stage:
    """The installer began a stage."""

    name: str


@dataclass(frozen=True)
class Note:
    """What the installer is at within its stage. done, total: of a count, 0 where there is none."""

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Warned:
    """Something went wrong that the installer goes on from."""

    text: str


Finding = Stage | Note | Warned


class Watcher:
    """Watches one installation.

    silence: seconds that the installer may say nothing; deadline: seconds that it may take. now: the present
    time, in the seconds of any clock, as in all methods here.
    """

    def __init__(self, silence: float, deadline: float, now: float) -> None:
        self.failure: Failure | None = None
        self.finished = False
        self._silence = silence
        self._deadline = deadline
        self._began = self._heard = now
        self._printed = now
        self._ours = False
        self._partial = {"console": b"", "log": b""}
        self._interrupted = ""  # what stood on the console when a message of the kernel came
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def feed(self, channel: Channel, data: bytes, now: float) -> tuple[list[str], list[Finding]]:
        """Take what came from a channel. Returns its whole lines, and what they say; see also `failure`."""
        self._heard = now
        if channel == "console":
            self._printed = now
        *lines, rest = (self._partial[channel] + data).split(b"\n")
        self._partial[channel] = rest[-_LONGEST:]
        texts = [printable(line) for line in lines]
        findings: list[Finding] = []
        for text in texts:
            if text.strip():
                self._tail.append(text)
            findings += self._console(text) if channel == "console" else self._log(text)
        return texts, findings

    def tail(self) -> list[str]:
        """The last lines of both channels, with the console's unfinished one."""
        return [*self._tail, *filter(None, [self._unfinished()])]

    def check(self, now: float) -> None:
        """See whether something is due: a prompt that stands, silence, the deadline."""
        if self.failure:
            return
        if now >= self._began + self._deadline:
            self.failure = Failure(
                "deadline",
                f"the installation did not end within {self._deadline:.0f} s",
                "deadline_seconds in the site file gives it more time",
            )
        elif now >= self._printed + PROMPT_SECONDS and (meaning := self._prompt()):
            self.failure = Failure(
                "prompt", f"{meaning}: {self._unfinished()[-_QUOTED:]}", "complete the kickstart"
            )
        elif now >= self._heard + self._silence:
            self.failure = Failure(
                "silence",
                f"the installer has said nothing for {self._silence:.0f} s",
                "its screen may tell more; silence_seconds in the site file gives it more time",
            )

    def wait(self, now: float) -> float:
        """The seconds until `check` may find something."""
        due = [self._began + self._deadline, self._heard + self._silence]
        if self._prompt():
            due.append(self._printed + PROMPT_SECONDS)
        return max(0.0, min(due) - now)

    def ended(self, by_itself: bool, reason: str) -> None:
        """The guest is no more running: is that how an installation ends?

        A restart is an end too (virt-install starts it with on_reboot=destroy), and looks like any other.
        """
        if self.failure:
            return
        if not by_itself:
            self.failure = Failure("gone", f"the guest is gone: {reason}")
        elif self._ours and not self.finished:
            self.failure = Failure("gone", "the installer ended before it was done")

    def _fail(self, kind: str, meaning: str, text: str) -> None:
        # The first failure is the cause of those that follow.
        if self.failure is None:
            self.failure = Failure(kind, f"{meaning}: {text.strip()[:_QUOTED]}")

    def _console(self, text: str) -> list[Finding]:
        match = _KERNEL.search(text)
        if match is None:
            self._interrupted = ""
        elif before := text[: match.start()].strip():
            self._interrupted = before
        for pattern, meaning in CONSOLE_FAILURES.items():
            if re.search(pattern, text):
                self._fail("panic" if "panic" in pattern else "log", meaning, text)
        if counted := _COUNTED.search(text):
            return [Note(text.strip(), int(counted["number"]), int(counted["total"]))]
        return []

    def _log(self, text: str) -> list[Finding]:
        match = _LINE.match(text)
        if match is None:
            return []
        message = _CONTROL.sub(lambda one: chr(int(one[1], 8)), match["message"])
        if match["program"] == "vdibuild":
            return self._our_log(match["severity"], message)
        if _ANACONDA.match(match["program"]) and "IGNORED" not in message:
            for pattern, meaning in LOG_FAILURES.items():
                if found := re.search(pattern, message):
                    self._fail("log", meaning, " ".join(message[found.start() :].split()))
        if found := _QUEUE.search(message):
            return [Stage(found["name"])]
        if found := _TASK.search(message):
            return [Note(found["name"])]
        if found := _SCRIPT.search(message):
            return [Warned(f"the script at line {found[2]} of the kickstart ended with status {found[1]}")]
        return []

    def _our_log(self, severity: str, message: str) -> list[Finding]:
        self._ours = True
        if severity == "CRT":
            self._our_end(message)
        elif severity == "WRN":
            return [Warned(message[:_QUOTED])]
        elif severity == "INF":
            if message.startswith("stage "):
                return [Stage(message.removeprefix("stage "))]
            if message != "done":
                return [Note(message)]
            self.finished = True
        return []

    def _our_end(self, message: str) -> None:
        """A line of our installer's last words: what failed, more of it, and hints."""
        text = message[:_QUOTED]
        if self.failure is None:
            self.failure = Failure("log", text.removeprefix("failed: "))
        elif self.failure.kind == "log" and len(self.failure.hint) < _QUOTED:
            if text.startswith("hint: "):
                lines = [*filter(None, [self.failure.hint]), text.removeprefix("hint: ")]
                self.failure = replace(self.failure, hint="\n  ".join(lines))
            elif not self.failure.hint and not text.startswith("failed: "):
                self.failure = replace(self.failure, message=f"{self.failure.message} {text}"[: 2 * _QUOTED])

    def _unfinished(self) -> str:
        return printable(self._partial["console"]).strip() or self._interrupted

    def _prompt(self) -> str:
        """What the console's unfinished line asks for, as a meaning; empty where it asks for nothing."""
        line = self._unfinished()
        return next(
            (meaning for pattern, meaning in PROMPTS.items() if line and re.search(pattern, line)), ""
        )
