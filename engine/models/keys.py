"""Strict reads of a checkpoint's keys: right type, finite, in range, or ModelError `file:key: reason`.

A key that is null counts as absent. A key without a default is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeVar

from engine.errors import ModelError
from formats.errors import printable

T = TypeVar("T")


class Required:
    """Stands for "no default"."""


REQUIRED = Required()


class Keys:
    """`values` of one file (or one object in it). In look-ups and in messages a key that `names` holds goes by that name,
    and `prefix` is put before each key."""

    def __init__(self, file: str, values: Mapping[str, object], prefix: str = "", names: Mapping[str, str] | None = None) -> None:
        self.file, self.values, self.prefix, self.names = file, values, prefix, names or {}

    def fail(self, key: str, reason: str) -> NoReturn:
        raise ModelError(f"{printable(self.file)}:{printable(self._place(key))}: {reason}")

    def has(self, key: str) -> bool:
        return self.values.get(self._place(key)) is not None

    def integer(self, key: str, low: int, high: int, default: int | Required = REQUIRED) -> int:
        value = self._get(key, default, "an integer", int)
        if type(value) is not int:
            self._wrong_type(key, "an integer", value)
        if not low <= value <= high and value is not default:
            self.fail(key, f"{_show(value)} is outside {low} .. {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | Required = REQUIRED) -> float:
        value = self._get(key, default, "a number", float)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong_type(key, "a number", value)
        if value is not default and not low <= value <= high:  # NaN is not either
            self.fail(key, f"{_show(value)} is outside {low:g} .. {high:g}")
        return float(value)

    def flag(self, key: str, default: bool | Required = REQUIRED) -> bool:
        value = self._get(key, default, "true or false", bool)
        if type(value) is not bool:
            self._wrong_type(key, "true or false", value)
        return value

    def text(self, key: str, default: str | Required = REQUIRED) -> str:
        value = self._get(key, default, "a string", str)
        if type(value) is not str:
            self._wrong_type(key, "a string", value)
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, REQUIRED, "a list of strings", list)
        if type(value) is not list or not all(type(item) is str for item in value):
            self._wrong_type(key, "a list of strings", value)
        return value

    def table(self, key: str) -> Mapping[str, object] | None:
        """A nested object, None where absent."""
        value = self.values.get(self._place(key))
        if value is None:
            return None
        if not isinstance(value, dict):
            self._wrong_type(key, "an object", value)
        return value

    def ids(self, key: str, limit: int) -> tuple[int, ...]:
        """One id or a list of ids, each in 0 .. limit - 1; () where absent."""
        value = self.values.get(self._place(key))
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > 256:
            self.fail(key, f"{len(ids)} ids; at most 256 are read")
        for i in ids:
            if type(i) is not int:
                self._wrong_type(key, "an id or a list of ids", i)
            if not 0 <= i < limit:
                self.fail(key, f"id {_show(i)} is outside the vocabulary of {limit}")
        return tuple(dict.fromkeys(ids))

    def expect(self, key: str, *allowed: object, why: str = "") -> None:
        """State an assumption: the key is absent or has one of these values. `why` is what the user reads otherwise."""
        value = self.values.get(self._place(key))
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            only = f" (only {' or '.join(map(_show, allowed))})" if allowed else ""
            self.fail(key, why or f"{_show(value)} is not supported{only}")

    def _place(self, key: str) -> str:
        return self.prefix + self.names.get(key, key)

    def _get(self, key: str, default: T | Required, what: str, kind: type) -> object:
        value = self.values.get(self._place(key))
        if value is not None:
            return value
        if isinstance(default, Required):
            self.fail(key, f"missing; {what} is required")
        return default

    def _wrong_type(self, key: str, what: str, value: object) -> NoReturn:
        self.fail(key, f"{_show(value)} is not {what}")


def _show(value: object) -> str:
    """A value for a message, short."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return printable(repr(value)) if not hasattr(value, "shape") else "an array"
