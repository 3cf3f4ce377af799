"""The one error of the emulator: what went wrong, in which kernel, at which line of PTX, in which thread."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A kernel did what hardware leaves undefined, or an instruction that the emulator does not know."""
