"""Talks to the QEMU guest agent: the service inside a guest that runs commands for its host.

The protocol is QMP's without greeting and negotiation; commands are those of `qapi/schema.json` in QEMU's
qga directory ("QEMU Guest Agent Protocol Reference").
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from vdibuild.errors import VerificationError

CHANNEL = "org.qemu.guest_agent.0"
"""The name of the virtio-serial port the agent listens on."""

_POLL_SECONDS = 0.1
_MAX_POLL_SECONDS = 1.0

# The client logs what it also raises; a library must not print it.
logging.getLogger("qemu").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Executed:
    """A command that ended in the guest. status: its exit status, or minus the signal that ended it."""

    status: int
    stdout: str
    stderr: str


class Agent:
    """The agent of one guest. Everything it says is the guest's word, and untrusted."""

    def __init__(self, name: str) -> None:
        self._client = QMPClient(f"{name}-agent")
        self._client.await_greeting = False
        self._client.negotiate = False

    async def connect(self, channel: socket.socket) -> None:
        """Take over the host's end of the agent's channel; the agent need not run yet."""
        await self._client.connect(channel)

    async def close(self) -> None:
        """Let the channel go."""
        # What ended the connection was raised by the command that noticed it.
        try:
            await self._client.disconnect()
        except (QMPError, EOFError, OSError):
            return

    async def synchronise(self) -> None:
        """Wait until the agent answers."""
        number = random.randrange(1 << 30)  # noqa: S311 (a serial number, no secret)
        answer = await self.ask("guest-sync", id=number)
        if answer != number:
            raise VerificationError("the guest agent answers out of order")

    async def ask(self, command: str, **arguments: object) -> Any:
        """Run an agent's command and return its result. Raises VerificationError when it refuses."""
        try:
            return await self._client.execute(command, dict(arguments))
        except ExecuteError as error:
            if error.error_class != "CommandNotFound" and "disabled" not in str(error):
                raise VerificationError(f"the guest agent refused {command}: {error}") from None
            raise VerificationError(
                f"the guest agent does not allow {command}",
                f"allow it in the image: /etc/sysconfig/qemu-ga on Fedora and EL (FILTER_RPC_ARGS, "
                f"BLOCK_RPCS or BLACKLIST_RPC must not exclude {command}), /etc/qemu/qemu-ga.conf elsewhere",
            ) from None
        except (QMPError, EOFError, OSError) as error:
            raise VerificationError(f"the guest agent went away during {command}: {error}") from None

    async def run(self, argv: Sequence[str]) -> Executed:
        """Run a command in the guest to its end, whatever its status."""
        program, *arguments = argv
        started = await self.ask("guest-exec", path=program, arg=arguments, **{"capture-output": True})
        pause = _POLL_SECONDS
        while True:
            state = await self.ask("guest-exec-status", pid=started["pid"])
            if state["exited"]:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _MAX_POLL_SECONDS)
        status = -int(state["signal"]) if "signal" in state else int(state.get("exitcode", 0))
        return Executed(status, _text(state.get("out-data", "")), _text(state.get("err-data", "")))


def _text(data: str) -> str:
    return base64.b64decode(data).decode(errors="replace")
