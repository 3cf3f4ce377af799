"""Parsers of the command line: old spellings are read and named, an unknown flag is answered with the nearest one.

`modern` turns LMDeploy's older spellings (underscores, flags that have another name now) into today's before argparse
sees them; `Parser` is argparse with our manners. Knows no command and no knob.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from config.names import SAME

# flag of the past (dashes) -> flag of today
RENAMED = {
    "--instance-num": "--max-batch-size",
    "--num-tokens-per-iter": "--max-prefill-token-num",
    "--max-concurrent-requests": "--max-requests",
    "--host": "--server-name",
    "--port": "--server-port",
    "--tensor-parallel-size": "--tp",
    "--max-model-len": "--session-len",
    "--max-num-seqs": "--max-batch-size",
    "--served-model-name": "--model-name",
    "--gpu-memory-utilization": "--cache-max-entry-count",
    "--device-memory-utilization": "--cache-max-entry-count",
    "-tp": "--tp",
    "-temp": "--temperature",
}
# what a new name does not say by itself
OTHERWISE = {
    "--gpu-memory-utilization": ", a share of what is free after the weights, not of all memory",
    "--device-memory-utilization": ", a share of what is free after the weights, not of all memory",
}
EXIT_USAGE = 2
KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


def modern(argv: Sequence[str], note: Callable[[str], None]) -> list[str]:
    """`argv` in today's spelling; `note` gets a sentence for each word that was changed."""
    out: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return [*out, *argv[position:]]
        name, equals, value = word.partition("=")
        new = name
        if name.startswith("--") and "_" in name:
            new = name.replace("_", "-")
        new = RENAMED.get(new, new)
        if new != name:
            note(f"{name} is now {new}{OTHERWISE.get(name.replace('_', '-'), '')}")
        out.append(new + equals + value)
    return out


def say(sentence: str) -> None:
    """One line beside the command's own output."""
    print(sentence, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """No abbreviations; sections in `--help`, one of them with `--help=WORD`; unknown flags are answered with a name.

    `refused`: flags that other servers have and this one does not -> the sentence that says so.
    """

    def __init__(self, *, refused: Mapping[str, str] | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", Formatter)
        super().__init__(allow_abbrev=False, add_help=False, **options)
        self.refused = dict(refused or {})
        self.add_argument("-h", "--help", action="help", help="this text; --help=WORD: what has WORD in it")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        own = {option for action in self._actions for option in action.option_strings}
        for word in words:
            name = word.partition("=")[0]
            if word.startswith("--help="):
                print(self.help_on(word.partition("=")[2]))
                raise SystemExit(0)
            if name in self.refused and name not in own:
                self.error(f"{name}: {self.refused[name]}")
        found, left = self.parse_known_args(words, namespace)
        if left:
            self.error(self._unknown(left[0]))
        return found

    def help_on(self, word: str) -> str:
        """The part of the help whose section or flag has `word` in it; a sentence where there is none."""
        word = word.lower()
        formatter = self._get_formatter()
        for group in self._action_groups:
            title = (group.title or "").lower()
            actions = [
                a for a in group._group_actions if word in title or word in " ".join([*a.option_strings, a.dest, a.help or ""]).lower()
            ]
            if actions:
                formatter.start_section(group.title)
                formatter.add_arguments(actions)
                formatter.end_section()
        return formatter.format_help().rstrip() or f"nothing in {self.prog} --help has {word!r} in it"

    def error(self, message: str) -> NoReturn:
        _, missing, names = message.partition("the following arguments are required: ")
        if missing:
            usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
            message = f"{names.replace(', ', ' and ')} {'are' if ', ' in names else 'is'} missing; write {usage}"
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")

    # argparse's own sentences, in our words: what was written, what it must be, what is nearest

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            shown = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or ())) or "a value"
            many = " (one or more)" if action.nargs == "+" else ""
            raise argparse.ArgumentError(None, f"{_name(action)} needs {shown}{many} after it") from None

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = KINDS.get(action.type)
            raise argparse.ArgumentError(None, f"{_name(action)} {arg_string}: must be {kind}") if kind else error from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if choices and str(value) not in choices:
            known = SAME.get(str(value).lower(), "")
            near = [known] if known in choices else difflib.get_close_matches(str(value), choices, 1, 0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(None, f"{_name(action)} {value}: must be one of {', '.join(choices)}{hint}")

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"{name!r} is one word too many; {self.prog} --help lists what is read"
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, options, 1, 0.6)
        return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists them")


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


class Formatter(argparse.HelpFormatter):
    """A little wider, and descriptions keep their lines."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 30, width: int | None = None) -> None:
        super().__init__(prog, indent_increment, max_help_position, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def choose(given: str, known: Sequence[str], what: str) -> str:
    """`given` if it is known; else a sentence for `SystemExit` that names the nearest."""
    if given in known:
        return given
    near = difflib.get_close_matches(given, known, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    raise UsageError(f"there is no {what} {given!r}{hint}")


class UsageError(ValueError):
    """A command line that asks for something that is not there; exit code 2."""
