"""What is told about a guest while it runs: its console, its log port, the changes of its state; and what
virt-install prints meanwhile.

libvirt calls back from a thread of its own; what it says is put into a queue, so that the driver reads
everything in one place and in the order it came.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import libvirt

from vdibuild import libvirt_connection, process

_CHUNK = 65536


@dataclass(frozen=True)
class Output:
    """What a guest wrote to one of its channels."""

    channel: Literal["console", "log"]
    data: bytes


@dataclass(frozen=True)
class Ended:
    """A guest is no more running. by_itself: it shut down, as opposed to QEMU's end for another reason."""

    by_itself: bool
    reason: str


@dataclass(frozen=True)
class Started:
    """A guest runs, from now on."""


@dataclass(frozen=True)
class Printed:
    """A line that the command printed."""

    text: str


@dataclass(frozen=True)
class CommandEnded:
    """The command is over."""

    status: int


Event = Output | Started | Ended | Printed | CommandEnded

_REASONS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "it shut down",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "somebody switched it off",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "it crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "QEMU ended unexpectedly",
}


class Events:
    """The events of the domain of one name on one connection (see `connected`)."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection = connection
        self._name = name
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._streams: list[Any] = []
        self._callback = connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._changed, None
        )
        connection.registerCloseCallback(self._closed, None)

    def next(self, seconds: float) -> Event | None:
        """The next event, or None when there is none within so many seconds."""
        try:
            return self._queue.get(timeout=max(seconds, 0))
        except queue.Empty:
            return None

    def follow(self, domain: Any, port: str) -> None:
        """Read a domain's console, and its virtio-serial port of that name, until it ends."""
        for channel, open_it in (
            ("console", functools.partial(domain.openConsole, None)),
            ("log", functools.partial(domain.openChannel, port)),
        ):
            stream = self._connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
            try:
                open_it(stream, 0)
            except libvirt.libvirtError:
                if domain.isActive():
                    raise
                return  # it has ended already, which is an event of its own
            wanted = libvirt.VIR_STREAM_EVENT_READABLE
            wanted |= libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP
            stream.eventAddCallback(wanted, self._readable, channel)
            self._streams.append(stream)

    @contextlib.contextmanager
    def running(self, argv: Sequence[str]) -> Iterator[None]:
        """Run a command beside; what it prints, and its end, are events. It is stopped with the block."""
        command = process.start(argv)

        def read() -> None:
            assert command.stdout is not None  # noqa: S101 (a pipe, by process.start's default)
            for line in command.stdout:
                # A bar redraws its line with carriage returns; only its last state is worth keeping.
                self._queue.put(Printed(line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]))
            self._queue.put(CommandEnded(command.wait()))

        reader = threading.Thread(target=read, name=argv[0], daemon=True)
        reader.start()
        try:
            yield
        finally:
            if command.poll() is None:
                command.terminate()
            reader.join()
            process.stop(command)

    def close(self) -> None:
        """Let everything go."""
        for stream in self._streams:
            # One whose guest has ended is closed already.
            with contextlib.suppress(libvirt.libvirtError):
                stream.eventRemoveCallback()
            with contextlib.suppress(libvirt.libvirtError):
                stream.abort()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.domainEventDeregisterAny(self._callback)
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.unregisterCloseCallback()

    def _readable(self, stream: Any, _events: int, channel: Literal["console", "log"]) -> None:
        try:
            data = stream.recv(_CHUNK)
        except libvirt.libvirtError:
            data = b""
        if data == -2:
            return  # nothing there after all
        if data:
            self._queue.put(Output(channel, data))
        else:
            with contextlib.suppress(libvirt.libvirtError):
                stream.eventRemoveCallback()

    def _changed(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: None) -> None:
        if domain.name() != self._name:
            return
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self._queue.put(Started())
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            by_itself = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN
            self._queue.put(Ended(by_itself, _REASONS.get(detail, "libvirt ended it")))
        elif event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            self._queue.put(Ended(False, "it crashed"))

    def _closed(self, _connection: Any, _reason: int, _opaque: None) -> None:
        self._queue.put(Ended(False, "libvirt went away"))


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """A connection to libvirt, whose events are delivered. Raises HostError when it does not answer."""
    _event_loop()
    with libvirt_connection.connected(uri) as connection:
        # A libvirtd that is gone is noticed, instead of waited for. A driver in this process is never gone.
        with contextlib.suppress(libvirt.libvirtError):
            connection.setKeepAlive(10, 5)
        yield connection


@functools.cache
def _event_loop() -> None:
    """Start libvirt's event loop, once in a program: it needs a thread that runs it."""
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()
