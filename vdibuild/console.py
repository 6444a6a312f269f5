"""The `vdibuild` command: the same tasks as `./inv`, for hosts without a checkout."""

from __future__ import annotations

from invoke.program import Program

from vdibuild import __version__
from vdibuild.tasks import namespace

program = Program(name="vdibuild", binary="vdibuild", version=__version__, namespace=namespace)
