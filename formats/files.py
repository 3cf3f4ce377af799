"""Opening a file that a stranger may have prepared. Standard library only."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from formats.errors import FormatError


def map_file(path: Path, smallest: int) -> mmap.mmap:
    """A regular file of at least `smallest` (> 0) bytes, mapped read-only; FormatError otherwise."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size < smallest:
                raise FormatError(path.name, "", f"{size} bytes are too short for a file of this kind")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise FormatError(path.name, "", getattr(e, "strerror", None) or str(e)) from e


def open_regular(name: str, flags: int) -> int:
    """Open without waiting for a writer (a FIFO would), and only a regular file."""
    fd = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file")
    return fd
