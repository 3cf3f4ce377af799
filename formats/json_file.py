"""JSON files of a checkpoint, read defensively: bounded size, one object at the top, no key twice.

NaN and Infinity are let through, as real checkpoints hold them under keys nobody reads: readers of numbers check for
them. Standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formats.errors import FormatError, printable
from formats.files import open_regular

MAX_BYTES = 8 << 20


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in `path`. Raises FormatError and nothing else."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise FormatError(path.name, "", getattr(e, "strerror", None) or str(e)) from e
    if len(data) > max_bytes:
        raise FormatError(path.name, "", f"larger than {max_bytes} bytes")
    return parse_object(data, path.name)


def parse_object(data: bytes, file: str, where: str = "") -> dict[str, Any]:
    """One JSON object, UTF-8; FormatError naming `file` and `where` otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as e:
        raise FormatError(file, where, "nested too deeply") from e
    except ValueError as e:  # bad JSON, bad UTF-8, a number of thousands of digits
        raise FormatError(file, where, str(e)[:200]) from e
    if not isinstance(value, dict):
        raise FormatError(file, where, "the top level is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {printable(key)!r} appears twice")
        out[key] = value
    return out
