"""A conversation in a terminal: two Enters end the input, `end` begins anew, `exit` (or Ctrl-D) leaves.

On a terminal prompt_toolkit edits the lines and remembers them; from a pipe, lines are read as they come and an empty
one ends the input. Ctrl-C stops the answer that is being written. Knows no model: who talks is a `Partner`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

PROMPT = "\ndouble enter to end input >>> "
EXIT, END = "exit", "end"
# a model's text goes to the terminal: what could move the cursor or change its settings does not
CONTROL = {code: None for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


class Partner(Protocol):
    """The other side of a conversation."""

    def reply(self, text: str) -> Iterator[str]:
        """The answer to the next question, as it comes; leaving early ends it."""

    def forget(self) -> None:
        """The next question begins a new conversation."""


def converse(partner: Partner, history: Path | None = None) -> int:
    """Until the user leaves; returns the exit code. `history`: a file that keeps the lines that were typed."""
    ask = _editor(history) if sys.stdin.isatty() else _lines()
    while True:
        try:
            text = ask()
        except (EOFError, KeyboardInterrupt):
            return 0
        if text == EXIT:
            return 0
        if text == END:
            partner.forget()
            print("(a new conversation)", flush=True)
        elif text:
            _answer(partner, text)


def _answer(partner: Partner, text: str) -> None:
    try:
        with closing(partner.reply(text)) as pieces:  # type: ignore[type-var]  # a generator, which Iterator does not say
            for piece in pieces:
                print(piece.translate(CONTROL), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print("\n(stopped)", flush=True)
    except (ValueError, RuntimeError, ConnectionError) as error:
        print(f"\n{error}", file=sys.stderr, flush=True)


def _lines() -> Callable[[], str]:
    """Input from a pipe: an empty line or the end of the file ends a question."""

    def ask() -> str:
        print(PROMPT, end="", flush=True)
        lines: list[str] = []
        for line in sys.stdin:
            if not line.strip():
                if lines:
                    break
                continue
            lines.append(line.rstrip("\n"))
        if not lines:
            raise EOFError
        return "\n".join(lines).strip()

    return ask


def _editor(history: Path | None) -> Callable[[], str]:
    """Input on a terminal, with arrows and what was typed before."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter was while an answer was being written
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line.strip() == "" and buffer.document.is_cursor_at_the_end:
            buffer.text = buffer.text.rstrip()  # the empty line is not part of what is remembered
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    kept: History = FileHistory(str(history)) if history is not None else InMemoryHistory()
    session: PromptSession[str] = PromptSession(PROMPT, multiline=True, key_bindings=keys, history=kept, prompt_continuation="")
    return lambda: session.prompt().strip()
