"""The command line of `server.py`, as far as it concerns the configuration.

`parser()` and `load(args)` are all that `server.py` needs; what it does with `--check`, `--print-effective` and
`--plan` is its own business, because a memory plan needs the engine and this room imports nothing of ours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from config.load import LoadedConfig, load_config
from config.version import VERSION


def parser(prog: str = "server.py") -> argparse.ArgumentParser:
    """Flags: --config --set --insecure --stop-with-stdin --check --print-effective --plan --version. Wrong usage exits with code 2."""
    cli = argparse.ArgumentParser(
        prog=prog,
        description="Serve a language model behind an OpenAI-compatible port.",
        epilog="Every knob: docs/config.md. Precedence: --set, then NUMBATCH_SECTION_KEY, then the file, then the default.",
        allow_abbrev=False,
    )
    cli.add_argument("--config", type=Path, metavar="FILE", help="TOML file, e.g. config/demo.toml")
    cli.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets", help="override one knob; repeatable")
    cli.add_argument("--insecure", action="store_true", help="allow a public bind without api keys")
    cli.add_argument("--stop-with-stdin", action="store_true", help="stop as on SIGTERM when standard input, a pipe, is closed")
    cli.add_argument("--version", action="version", version=f"numbatch {VERSION}")
    what = cli.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check the configuration and exit: 0 if it can be used, 2 with one line if not")
    what.add_argument("--print-effective", action="store_true", help="print every knob with its value and where it came from, and exit")
    what.add_argument("--plan", action="store_true", help="print the memory plan, allocating nothing, and exit")
    return cli


def load(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """The configuration that `parser().parse_args()` asks for; `ConfigError` if there is none."""
    sets = [*args.sets, *(["server.insecure=true"] if args.insecure else [])]
    return load_config(args.config, sets=sets, environ=environ)
