"""The one exception of the file readers, and how names out of a file are made fit to print. Standard library only."""

from __future__ import annotations

MAX_PRINTED = 120


def printable(name: str) -> str:
    """A name read from a file, for a message or a log: control characters and backslashes escaped, at most 120 characters."""
    text = name[: MAX_PRINTED + 1].encode("ascii", "backslashreplace").decode("ascii")
    text = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= MAX_PRINTED else text[:MAX_PRINTED] + "..."


class FormatError(Exception):
    """A file is broken, hostile or of a kind this project does not read: `file: key or tensor: reason`."""

    def __init__(self, file: str, where: str, reason: str) -> None:
        self.file, self.where, self.reason = printable(file), printable(where), reason
        super().__init__(": ".join(part for part in (self.file, self.where, reason) if part))
