"""The server: `python server.py --config x.toml`.

Thin on purpose: read the configuration, do what the flags ask for, run. Nothing heavy is imported at the top,
because every spawned rank imports this file again as `__mp_main__`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from config.cli import load, parser, verdict
from config.errors import ConfigError
from config.load import LoadedConfig, render_effective


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        loaded = load(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.check:
        print(verdict(loaded.config))
        return 0
    if arguments.print_effective:
        print(render_effective(loaded))
        return 0
    if arguments.plan:
        return plan(loaded)
    return run(loaded, with_stdin=arguments.stop_with_stdin)


def plan(loaded: LoadedConfig) -> int:
    """Print the memory plan; 4 (as when there is too little memory at start) where the model does not fit."""
    from api.lifecycle import EXIT_DEVICE, EXIT_INTERNAL, EXIT_OK, exit_code
    from api.loading import planned
    from api.log import setup_logging

    setup_logging(loaded.config.server.log_level, loaded.config.server.log_format)
    try:
        found, text = planned(loaded.config)
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_INTERNAL:
            raise
        print(error, file=sys.stderr)
        return code
    print(text)
    return EXIT_DEVICE if found.shortfall else EXIT_OK


def run(loaded: LoadedConfig, with_stdin: bool = False) -> int:
    """Serve until a signal, the engine's death or (`with_stdin`) the end of standard input; returns the exit code."""
    import asyncio
    import logging

    import uvloop

    from api.lifecycle import Server
    from api.log import setup_logging

    setup_logging(loaded.config.server.log_level, loaded.config.server.log_format)
    for warning in loaded.warnings:
        logging.getLogger("numbatch.server").warning("%s", warning)

    loop = uvloop.new_event_loop()  # not asyncio.run: that waits for threads which may load or compile for minutes
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(Server(loaded.config, with_stdin).run())
    finally:
        loop.close()


def finish(code: int) -> None:
    """End the process with `code` even while a thread is still in native code (a compile, a download)."""
    if threading.active_count() > 1:
        with contextlib.suppress(OSError, ValueError):  # a stream that is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    finish(main())
