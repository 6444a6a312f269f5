"""Ansible's connection to a root file system: each command runs in a sandbox whose root it is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

from ansible.errors import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    AnsibleError,
)
from ansible.plugins.connection import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    ConnectionBase,
)

DOCUMENTATION = """
name: vdibuild_tree
short_description: run in a root file system that vdibuild makes
description: The command that enters it is a JSON list in the environment variable VDIBUILD_TREE_COMMAND.
author: vdibuild
options:
  remote_addr:
    description: The name of the host; not used.
    default: inventory_hostname
    vars:
      - name: inventory_hostname
"""


class Connection(ConnectionBase):  # type: ignore[misc,unused-ignore]
    """See ansible.plugins.connection.ConnectionBase."""

    transport = "vdibuild_tree"
    has_pipelining = True

    def _connect(self) -> Connection:
        self._connected = True
        return self

    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        """Run a shell command. Returns its status, standard output and standard error."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._run(["/bin/sh", "-c", cmd], in_data)

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file of the host into the tree."""
        super().put_file(in_path, out_path)
        self._check(f"cat > {shlex.quote(out_path)}", Path(in_path).read_bytes())

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file of the tree to the host."""
        super().fetch_file(in_path, out_path)
        Path(out_path).write_bytes(self._check(f"cat {shlex.quote(in_path)}"))

    def close(self) -> None:
        """Nothing stays open."""
        self._connected = False

    def _check(self, cmd: str, in_data: bytes | None = None) -> bytes:
        status, output, errors = self._run(["/bin/sh", "-c", cmd], in_data)
        if status != 0:
            raise AnsibleError(f"{cmd}: {errors.decode(errors='replace')}")
        return output

    def _run(self, argv: list[str], in_data: bytes | None) -> tuple[int, bytes, bytes]:
        enter: list[str] = json.loads(os.environ["VDIBUILD_TREE_COMMAND"])
        done = subprocess.run([*enter, *argv], input=in_data or b"", capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr
