"""`numbatch completion SHELL`: the lines that make a shell complete numbatch's commands and flags (argcomplete does it).

eval "$(numbatch completion bash)"      # zsh the same; fish: numbatch completion fish | source
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from cli.arguments import Parser

SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
    cli = Parser(prog="numbatch completion", description='Tab completion: eval "$(numbatch completion bash)".')
    cli.add_argument("shell", choices=SHELLS, help="for which shell")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    import argcomplete

    print(argcomplete.shellcode(["numbatch"], True, args.shell))
    return 0


def complete() -> None:
    """Answer the shell that asks (argcomplete's protocol, in the environment) and end the process."""
    import argcomplete

    argcomplete.autocomplete(tree())


def tree() -> argparse.ArgumentParser:
    """Every command's parser below one: only completion needs them all."""
    from cli.main import COMMANDS, Command, there

    root = argparse.ArgumentParser(prog="numbatch")

    def grow(above: argparse.ArgumentParser, commands: dict[str, Command]) -> None:
        below = above.add_subparsers()
        for name, command in there(commands).items():
            if command.below:
                grow(below.add_parser(name, help=command.summary), command.below)
                continue
            module = importlib.import_module(command.module)
            parents = [module.parser()] if hasattr(module, "parser") else []
            below.add_parser(name, help=command.summary, parents=parents, add_help=not parents)

    grow(root, COMMANDS)
    return root
