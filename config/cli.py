"""The command line of `server.py`, as far as it concerns the configuration.

`parser()` and `load(args)` are all that `server.py` needs; what it does with `--check`, `--print-effective` and
`--plan` is its own business, because a memory plan needs the engine and this room imports nothing of ours.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from config.load import ELSEWHERE, LoadedConfig, all_knobs, load_config
from config.schema import Config
from config.version import VERSION


class _Parser(argparse.ArgumentParser):
    """One sentence for wrong usage."""

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        word = words.split(" ")[0]
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        key = ELSEWHERE.get(name) or next((knob.key for knob in all_knobs() if knob.name == name), "")
        if not unknown:
            message = message.removeprefix("argument ")
        elif not word.startswith("-"):
            message = f"{word}: there is no place for this word; write --config FILE, or --set model.path=PATH for a model"
        elif key:
            message = f"{word}: there is no such flag; write --set {key}=VALUE"
        else:
            message = f"{word}: there is no such flag; knobs are --set section.key=VALUE (docs/config.md)"
        self.exit(2, f"{self.prog}: {message}\n")


def parser(prog: str = "server.py") -> argparse.ArgumentParser:
    """Flags: --config --set --insecure --stop-with-stdin --check --print-effective --plan --version. Wrong usage exits with code 2."""
    cli = _Parser(
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


def verdict(config: Config) -> str:
    """What --check says of a configuration that can be used. A model may come to its place later (a volume, a download)."""
    path = config.model.path
    if path and not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return f"the configuration can be used; nothing is at model.path = {path} yet"
    return "the configuration can be used"
