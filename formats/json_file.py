"""JSON files of a checkpoint, read defensively: bounded size, one object at the top, no key twice.

NaN and Infinity are let through, as real checkpoints hold them under keys nobody reads: readers of numbers check for
them. Standard library only.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from formats.errors import FormatError, printable

MAX_BYTES = 8 << 20


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in `path`. Raises FormatError and nothing else."""

    def refuse(reason: str) -> NoReturn:
        raise FormatError(path.name, "", reason)

    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                refuse("not a regular file")
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            refuse(f"larger than {max_bytes} bytes")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as e:
        refuse(e.strerror or str(e))
    except RecursionError:
        refuse("nested too deeply")
    except ValueError as e:  # bad JSON, bad UTF-8, a number of thousands of digits
        refuse(str(e)[:200])
    if not isinstance(value, dict):
        refuse("the top level is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {printable(key)!r} appears twice")
        out[key] = value
    return out
