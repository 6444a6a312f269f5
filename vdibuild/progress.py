"""The one way anything is shown: nested, timed steps; bars where there is a total; a log of everything.

The library reports to whatever `reporting()` has set up, and to nobody otherwise, so that a program that
imports vdibuild sees nothing it did not ask for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


@dataclass
class Step:
    """A piece of work that is under way.

    name: what it does. detail: what it is at just now. total, done: how far it is, in any unit, where
    that is known. seconds: how long it took, set when it ended. cached: its result was there already. depth:
    in how many others it is.
    """

    name: str
    total: float | None = None
    done: float = 0
    detail: str = ""
    cached: bool = False
    seconds: float = 0
    steps: list[Step] = field(default_factory=list)
    depth: int = 0
    _reporter: Reporter | None = None

    def advance(self, amount: float = 1) -> None:
        """Say that `amount` more of the total is done."""
        self.done += amount
        if self._reporter:
            self._reporter.changed(self)

    def note(self, detail: str) -> None:
        """Say what the step is at; goes to the log as well."""
        self.detail = detail
        log(f"  {detail}")
        if self._reporter:
            self._reporter.changed(self)

    def timings(self) -> dict[str, float]:
        """Seconds by step name, this one's children first to last, nested names joined by a slash."""
        result: dict[str, float] = {}
        for child in self.steps:
            result[child.name] = round(child.seconds, 2)
            result |= {f"{child.name}/{name}": seconds for name, seconds in child.timings().items()}
        return result


class Reporter:
    """Shows steps on a console: live lines on a terminal, one plain line per step elsewhere.

    Threads may run steps side by side.

    console: where to. live: redraw running steps; by default where the console is a terminal.
    """

    def __init__(self, console: Console, live: bool | None = None) -> None:
        self.console = console
        self.live = console.is_terminal if live is None else live
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._lock = threading.RLock()

    def started(self, step: Step) -> None:
        """A step begins."""
        if not self.live:
            return
        with self._lock:
            if self._bars is None:
                self._bars = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    TextColumn("[dim]{task.fields[detail]}"),
                    TimeElapsedColumn(),
                    console=self.console,
                    transient=True,
                )
                self._bars.start()
            name = "  " * step.depth + escape(step.name)
            self._tasks[id(step)] = self._bars.add_task(name, total=step.total, detail="")

    def changed(self, step: Step) -> None:
        """A step's detail or count changed."""
        with self._lock:
            if self._bars and id(step) in self._tasks:
                detail = escape(step.detail[-60:])
                self._bars.update(self._tasks[id(step)], completed=step.done, total=step.total, detail=detail)

    def ended(self, step: Step, failed: bool) -> None:
        """A step is over."""
        with self._lock:
            if self._bars and id(step) in self._tasks:
                self._bars.remove_task(self._tasks.pop(id(step)))
                if not self._tasks:
                    self.close()
        mark = "[red]✗[/]" if failed else "[dim]=[/]" if step.cached else "[green]✓[/]"
        took = "cached" if step.cached else f"{step.seconds:.1f} s"
        indent = "  " * step.depth
        detail = f"  [dim]{escape(step.detail)}[/]" if step.detail else ""
        self.console.print(f"{indent}{mark} {escape(step.name)}  [dim]{took}[/]{detail}", highlight=False)

    def message(self, text: str) -> None:
        """Show a line at once, above the running steps."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live display away."""
        if self._bars:
            self._bars.stop()
            self._bars = None


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)
_current: ContextVar[Step | None] = ContextVar("current", default=None)
_log: ContextVar[Log | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def reporting(to: Console | Reporter | None = None) -> Iterator[Reporter]:
    """Show steps on a console (by default standard error), or as a reporter does, while the block runs."""
    reporter = to if isinstance(to, Reporter) else Reporter(to or Console(stderr=True))
    token = _reporter.set(reporter)
    try:
        yield reporter
    finally:
        reporter.close()
        _reporter.reset(token)


class Log(Protocol):
    """Where a log goes."""

    def write(self, text: str) -> None:
        """Keep these lines."""


@contextlib.contextmanager
def logging_to(place: Path | Log) -> Iterator[None]:
    """Give a log, or a new file of lines with their time, everything that `log` gets while the block runs."""
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            file = stack.enter_context(place.open("w", encoding="utf-8", errors="replace"))
            place = _Stamped(file, time.monotonic())
        token = _log.set(place)
        stack.callback(_log.reset, token)
        yield


class _Stamped:
    """A text file whose lines begin with the seconds since `began`."""

    def __init__(self, file: IO[str], began: float) -> None:
        self._file = file
        self._began = began

    def write(self, text: str) -> None:
        stamp = f"{time.monotonic() - self._began:8.2f} "
        self._file.write("".join(f"{stamp}{line}\n" for line in text.splitlines() or [""]))
        self._file.flush()


@contextlib.contextmanager
def step(name: str, total: float | None = None) -> Iterator[Step]:
    """A timed step; steps begun inside it are its children."""
    parent = _current.get()
    reporter = _reporter.get()
    current = Step(name, total, depth=parent.depth + 1 if parent else 0, _reporter=reporter)
    if parent is not None:
        parent.steps.append(current)
    token = _current.set(current)
    log(f"== {name}")
    if reporter:
        reporter.started(current)
    began = time.monotonic()
    failed = True
    try:
        yield current
        failed = False
    finally:
        current.seconds = time.monotonic() - began
        _current.reset(token)
        log(f"== {name}: {'failed after' if failed else 'done in'} {current.seconds:.2f} s")
        if reporter:
            reporter.ended(current, failed)


def log(line: str) -> None:
    """Put a line into the log, and nowhere else."""
    file = _log.get()
    if file is not None:
        file.write(line)


def warn(text: str) -> None:
    """Show a warning at once, and log it."""
    log(f"warning: {text}")
    reporter = _reporter.get()
    if reporter:
        reporter.message(f"warning: {text}")


def note(detail: str) -> None:
    """Say what the current step is at."""
    current = _current.get()
    if current is not None:
        current.note(detail)
    else:
        log(detail)
