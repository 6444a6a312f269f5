"""The one way a command is run: an argument list, a closed standard input, its output in the log."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from vdibuild import progress
from vdibuild.errors import CommandError, DeadlineError, HostError

TAIL_LINES = 25
"""How many of a command's last lines go into an error."""

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Completed:
    """A command that ended. stdout: what it printed there when that was asked for, else empty."""

    argv: tuple[str, ...]
    status: int
    stdout: str


_variables: ContextVar[Mapping[str, str]] = ContextVar("variables", default={})  # noqa: B039 (never changed)


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Give these environment variables to every command that is run in the block."""
    token = _variables.set({**_variables.get(), **values})
    try:
        yield
    finally:
        _variables.reset(token)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment commands get: only what they need, in the C locale.

    extra: variables to add. Proxy settings and SOURCE_DATE_EPOCH are passed through.
    """
    kept = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_RUNTIME_DIR", "SOURCE_DATE_EPOCH")
    proxies = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    result = {name: os.environ[name] for name in (*kept, *proxies) if name in os.environ}
    # An unprivileged user's PATH lacks the directories where mke2fs, sfdisk and their like are.
    result["PATH"] = f"{result.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"
    result["LC_ALL"] = "C.UTF-8"
    result["DEBIAN_FRONTEND"] = "noninteractive"
    result.update(_variables.get())
    result.update(extra or {})
    return result


def _die_with_parent(argv: Sequence[str]) -> list[str]:
    # A killed run (kill -9) cannot clean up; the kernel ends its commands with it. A run that was killed
    # before setpriv told the kernel so is not the parent that the shell finds.
    whole = ["sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()), *argv]
    return ["setpriv", "--pdeathsig", "KILL", "--", *whole]


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.STDOUT,
    pass_fds: Sequence[int] = (),
    outlives: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own that dies with this process.

    env: variables added to `environment()`. pass_fds: descriptors it inherits. outlives: it goes on when
    this process ends.
    Raises HostError when the command does not exist. On Ctrl-C nothing is left of it.
    """
    full = environment(env)
    if _find(argv[0], full["PATH"]) is None:
        raise HostError(f"command not found: {argv[0]}", "`./inv doctor` names the package to install")
    progress.log("+ " + " ".join(argv))
    process = None
    try:
        with _interrupts_later():
            process = subprocess.Popen(
                argv if outlives else _die_with_parent(argv),
                env=full,
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                process_group=0,
                pass_fds=pass_fds,
            )
    except BaseException:
        if process is not None:
            stop(process)
        raise
    return process


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block has ended.

    Python's handlers raise exceptions between any two instructions; one between fork(2) and the moment when
    somebody knows the child's number would leave a child that nobody can end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[tuple[signal.Signals, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((signal.Signals(number), frame))

    # What is ignored, or ends this process at once, stays so.
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    capture: bool = False,
    check: bool = True,
    deadline: float | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a command to its end; what it prints goes to the log, line by line.

    argv: the command and its arguments. env: variables added to `environment()`. stdin: text for its
    standard input, which is otherwise empty. capture: return standard output instead of logging it
    (standard error is logged all the same). check: raise CommandError unless the status is 0.
    deadline: seconds after which it is ended. pass_fds: descriptors it inherits. Raises HostError (no such
    command), DeadlineError. On Ctrl-C, or any exception, the whole process group is ended first.
    """
    with contextlib.ExitStack() as stack:
        source: int | IO[bytes] = subprocess.DEVNULL
        if stdin is not None:
            source = stack.enter_context(_filled(stdin))
        process = start(
            argv,
            env=env,
            cwd=cwd,
            stdin=source,
            stderr=subprocess.PIPE if capture else subprocess.STDOUT,
            pass_fds=pass_fds,
        )
        stack.callback(stop, process)
        output, tail = _collect(process, capture, deadline, argv)
        status = process.wait()
    if status != 0 and check:
        raise CommandError(argv, status, tail)
    return Completed(tuple(argv), status, output)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a started command and its process group, gently first; close its pipes."""
    if process.poll() is None:
        for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _find(command: str, path: str) -> str | None:
    if "/" in command:
        return command if os.access(command, os.X_OK) else None
    for directory in path.split(":"):
        candidate = Path(directory) / command
        if os.access(candidate, os.X_OK):
            return str(candidate)
    return None


def find(command: str) -> str | None:
    """The full path of a command as `run` would find it, or None."""
    return _find(command, environment()["PATH"])


@contextlib.contextmanager
def _filled(text: str) -> Iterator[IO[bytes]]:
    with os.fdopen(os.memfd_create("stdin"), "w+b") as memory:
        memory.write(text.encode())
        memory.flush()
        memory.seek(0)
        yield memory


def _collect(
    process: subprocess.Popen[bytes], capture: bool, deadline: float | None, argv: Sequence[str]
) -> tuple[str, list[str]]:
    """Read the pipes until they close. Returns the captured output and the last lines."""
    captured = bytearray()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    partial = bytearray()
    end = None if deadline is None else time.monotonic() + deadline
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = selector.select(left)
            if end is not None and time.monotonic() >= end:
                raise DeadlineError(f"{argv[0]} did not end within {deadline:.0f} s")
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif capture and key.fileobj is process.stdout:
                    captured += data
                else:
                    partial += data
                    *lines, rest = partial.split(b"\n")
                    partial = bytearray(rest)
                    for line in lines:
                        _record(line, tail)
    if partial:
        _record(partial, tail)
    return captured.decode(errors="replace"), list(tail)


def _record(line: bytes | bytearray, tail: deque[str]) -> None:
    text = line.decode(errors="replace").rstrip("\r")
    # A bar redraws its line with carriage returns; only its last state is worth keeping.
    text = text.rsplit("\r", 1)[-1]
    tail.append(text)
    progress.log(text)


def logged(messages: IO[bytes]) -> list[str]:
    """The lines that a command wrote to a file, from its beginning; they go to the log."""
    messages.seek(0)
    lines = messages.read().decode(errors="replace").splitlines()
    for line in lines:
        progress.log(line)
    return lines


def interact(argv: Sequence[str]) -> int:
    """Run a command that a person talks to, on this terminal; returns its exit status."""
    progress.log("+ " + " ".join(argv))
    return subprocess.call(
        _die_with_parent(argv), env={**environment(), "TERM": os.environ.get("TERM", "dumb")}
    )
