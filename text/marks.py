"""Keeping control tokens that users write apart from those that a chat template writes.

Before rendering, one private-use character, drawn anew for each request and absent from everything in it, is put into
every control token that a user-supplied string spells, and at its ends where text beside it could complete one. After
rendering the template's own control tokens are the only ones still whole; the character is taken out when the text
around them is encoded. Users cannot forge the mark: it is chosen after their text is known.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from text.base import Tokenizer
from text.errors import TemplateRefused, Unencodable

MAX_DEPTH = 128
PRIVATE_USE = (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)  # planes 15 and 16
# roles that templates may write into a control token themselves ('<|' + role + '|>')
KNOWN_ROLES = frozenset(
    "system user assistant tool developer function ipython observation tool_results tool_response environment model".split()
)
_random = random.SystemRandom()


class Spellings:
    """The control tokens of a vocabulary, as strings that must not be spelled by users."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.contents = tuple(tokenizer.specials)
        self.pattern = tokenizer.special_pattern
        self.longest = max(map(len, self.contents), default=0)
        self.beginnings = {c[:n] for c in self.contents for n in range(1, len(c))}
        self.endings = {c[n:] for c in self.contents for n in range(1, len(c))}
        self.single = frozenset(c for c in self.contents if len(c) == 1)


class Marks:
    """One request's mark and its use. `fixed`: texts that must not hold the mark either (the templates)."""

    def __init__(self, spellings: Spellings, fixed: Iterable[str], given: Any) -> None:
        self._spellings = spellings
        self.char = _absent_char([*fixed, *_strings(given, 0)])
        self._escaped = json.dumps(self.char)[1:-1]

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A marked copy of chat messages."""
        return [{self.text(k): self._message_value(k, v) for k, v in message.items()} for message in messages]

    def _message_value(self, key: str, value: Any) -> Any:
        if isinstance(value, str) and (key == "content" or (key == "role" and value not in KNOWN_ROLES)):
            return self.text(value, inside=True)
        return self.value(value)

    def value(self, value: Any) -> Any:
        """A marked copy of anything JSON can hold."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(k)): self.value(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(v) for v in value]
        return value

    def text(self, text: str, inside: bool = False) -> str:
        """`inside`: also where the whole text could be the middle of a control token. Only for strings that templates
        do not compare with anything."""
        s = self._spellings
        if s.single and not s.single.isdisjoint(text):
            raise Unencodable(f"the text holds {next(c for c in text if c in s.single)!r}, which is a control token of this vocabulary")
        while s.pattern.search(text):  # again: spellings may overlap
            text = s.pattern.sub(self._break, text)
        last = min(len(text), s.longest)
        before = any(text[:n] in s.endings for n in range(1, last + 1))
        after = any(text[-n:] in s.beginnings for n in range(1, last + 1))
        if inside and not after and 0 < len(text) < s.longest:
            after = any(text in c for c in s.contents)
        return self.char * before + text + self.char * after

    def _break(self, match: Any) -> str:
        found: str = match.group()
        return found[0] + self.char + found[1:]

    def remove(self, text: str) -> str:
        """Rendered text as the user meant it, also where a template wrote it as ASCII JSON."""
        if self._escaped in text:
            text = text.replace(self._escaped, "")
        return text.replace(self.char, "") if self.char in text else text


def _strings(value: Any, depth: int) -> Iterable[str]:
    if depth > MAX_DEPTH:
        raise TemplateRefused(f"the messages are nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield str(k)
            yield from _strings(v, depth + 1)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _strings(v, depth + 1)


def _absent_char(texts: list[str]) -> str:
    for _ in range(64):
        char = chr(_random.randint(*_random.choice(PRIVATE_USE)))
        escaped = json.dumps(char)[1:-1]
        if not any(char in t or escaped in t for t in texts):
            return char
    raise TemplateRefused("the messages use up Unicode's private-use planes; remove those characters")
