"""What can go wrong in the engine, each with the sentence the user reads.

`api/` maps these to HTTP, `server.py` to exit codes; the engine knows neither. Messages name a number
and what to change; they never hold prompt text, paths of the package, or addresses.
"""

from __future__ import annotations

from config import errors as config_errors


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class BadParameter(EngineError):
    """A request that the engine cannot honour; `param` names the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(BadParameter):
    """Prompt (+ requested answer) longer than a sequence may be."""


class QueueFull(EngineError):
    """The waiting line is at its bound; `retry_after_s` is estimated from the measured drain rate."""

    def __init__(self, message: str, retry_after_s: int, per_key: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.per_key = per_key


class EngineDraining(EngineError):
    """SIGTERM was received: running sequences finish, new ones are refused."""


class EngineDead(EngineError):
    """The engine stopped; every waiter and every later caller gets this. `exit_code` is how the process should end."""

    exit_code: int = 5


class EngineNotReady(EngineError):
    """Still loading or warming up."""


class InvalidMove(EngineError):
    """A sequence was asked to change its status in a way the table of moves does not hold (our bug)."""


class ConfigError(EngineError, config_errors.ConfigError):
    """A knob's value contradicts the checkpoint or the machine. Exit code 2, like its parent in `config/`."""


class ModelError(EngineError):
    """A model file is broken, hostile or not supported; the message names file, tensor or key. Exit code 3."""


class DeviceError(EngineError):
    """No such device, too little memory, or a driver that does not fit. Exit code 4."""
