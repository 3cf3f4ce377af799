"""Ids to text, a few at a time, for streams: whole characters only, and in sum exactly `Tokenizer.decode`.

This is on the delivery hot path. A token that is whole characters by itself, with nothing held back before it, is one
table look-up; everything else goes through an incremental UTF-8 decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from text.base import Tokenizer

_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one growing answer.

    continuation: the ids follow a prompt (every generated answer does), so the first space of a sentencepiece
    vocabulary is part of the text. Without it the result equals `tokenizer.decode(ids)`; with it
    `tokenizer.decode(ids, continuation=True)`. Vocabularies of other kinds do not care.
    """

    __slots__ = ("_decoder", "_fast", "_skip", "_strip", "_table", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.text_table(skip_special)
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = _decoder("replace")
        self._strip = tokenizer.strip_first_space and not continuation
        self._fast = not self._strip  # nothing is held back and no space is to be dropped

    def push(self, ids: Sequence[int]) -> str:
        """Text that is complete after `ids`; "" while a character is still incomplete. Ids are not negative."""
        if self._fast:
            try:
                if len(ids) == 1:
                    text = self._table[ids[0]]
                    if text is not None:
                        return text
                else:
                    return "".join([self._table[i] for i in ids])  # type: ignore[misc]
            except (IndexError, TypeError):  # an id of the embedding's padding; a token that is part of a character
                pass
        return self._push_slowly(ids)

    def _push_slowly(self, ids: Sequence[int]) -> str:
        raw = b"".join([self._bytes_of(i) for i in ids])
        text = self._decoder.decode(raw)
        self._fast = not self._strip and not self._decoder.getstate()[0]
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._skip:
            return b""
        raw = self._tokenizer.token_bytes(token_id)
        if self._strip and raw and token_id not in self._tokenizer.special_ids:
            self._strip = False
            return raw.removeprefix(b" ")
        return raw

    def flush(self) -> str:
        """What is held back, at the end of the answer: U+FFFD for an incomplete character, else ""."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._fast = not self._strip
        return text
