"""The console script `numbatch`. First of all it makes sure that every room comes from the folder this file lies in.

The rooms' names (config, api, text, ...) are common words: another package of that name, installed or in the working
directory, would be imported in a room's place and fail in strange ways. Imports nothing of ours before it knows.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading

ROOMS = ("api", "bench", "config", "engine", "formats", "quant", "text", "server", "numbatch")


def strangers() -> list[str]:
    """`name: where it would come from` for every room that is not beside this one."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    found = []
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        origin = os.path.realpath(spec.origin) if spec is not None and spec.origin else "nowhere"
        if os.path.dirname(origin) not in (home, os.path.join(home, room)):
            found.append(f"{room}: {origin}")
    return found


def program() -> None:
    """Run the command, then end the process, whatever threads are still in native code."""
    wrong = strangers()
    if wrong:
        sys.exit(f"numbatch: another package stands in the place of one of its own ({'; '.join(wrong)}); remove it from the path.")
    from cli.main import main

    code = main()
    if threading.active_count() > 1:
        from server import finish

        finish(code)
    sys.exit(code)
