"""What can be wrong with a configuration. The engine's `ConfigError` is a child of this one, so one `except` catches both."""

from __future__ import annotations


class ConfigError(ValueError):
    """A knob's value is wrong or contradicts another; one line `where:section.key: reason`. Exit code 2."""
