"""The command, ended by a signal at an exact place: `ending.py SIGNAL PLACES ARGUMENTS...`.

SIGNAL is a number. PLACES are functions, as `module:name:count`, separated by commas: when the first one has
returned that many times the second is waited for, and so on; at the last the process sends itself the signal.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

from vdibuild.console import program


def end_at(places: list[str], number: int) -> None:
    """Let this process end itself there."""
    module, name, left = places[0].split(":")
    count = int(left)

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        if (
            event == "return"
            and frame.f_code.co_qualname == name
            and frame.f_globals.get("__name__") == module
        ):
            count -= 1
            if count == 0:
                sys.setprofile(None)
                if places[1:]:
                    end_at(places[1:], number)
                else:
                    os.kill(os.getpid(), number)

    sys.setprofile(watch)


if __name__ == "__main__":
    end_at(sys.argv[2].split(","), int(sys.argv[1]))
    program.run(["vdibuild", *sys.argv[3:]])
