"""What every tokenizer has in common: the id tables, special tokens in text, BOS, and decoding.

A subclass brings the raw bytes of each id and one function, text -> ids without special tokens. Everything that keeps
user text from becoming a control token is here, once: ordinary text is encoded with control tokens switched off, and
what comes back is checked against the control ids.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from text.errors import Unencodable


@dataclass(frozen=True, slots=True)
class Special:
    """A control token as it is written in templates. `lstrip`/`rstrip`: it swallows the whitespace before/after it."""

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(slots=True)
class VocabularyInfo:
    """What a loader found out about a vocabulary.

    token_bytes: raw bytes per id (b"" for holes in the numbering).
    specials: control tokens; `unk_id` may be among them and is the one control id that ordinary text may yield.
    text_prefix: "never", "first" (only at the start of the text) or "segments" (also after each control token):
    where the encoder puts the extra space of sentencepiece.
    strip_first_space: decoding drops that space again.
    eos_id: the one of `eos_ids` that templates know as `eos_token`.
    template_name: a built-in chat template (`lmdeploy_template.py`) that the files name; "" for none.
    """

    token_bytes: list[bytes]
    specials: list[Special]
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    text_prefix: str = "never"
    strip_first_space: bool = False
    chat_templates: dict[str, str] = field(default_factory=dict)
    template_name: str = ""


class Tokenizer(ABC):
    """str <-> ids. Instances are immutable after loading and may be used from several threads.

    vocab_size: ids are 0 .. vocab_size - 1. special_ids: the control tokens. chat_templates: Jinja sources that came
    with the vocabulary, by name ("default", "tool_use", ...); template_name: the built-in one to take
    where there is none.
    """

    def __init__(self, info: VocabularyInfo) -> None:
        self.vocab_size = len(info.token_bytes)
        self.bos_id = info.bos_id
        self.eos_ids = info.eos_ids
        self.eos_id = info.eos_id if info.eos_id is not None else min(info.eos_ids, default=None)
        self.unk_id = info.unk_id
        self.special_ids = frozenset(s.id for s in info.specials)
        self.add_bos = info.add_bos and info.bos_id is not None
        self.strip_first_space = info.strip_first_space
        self.chat_templates = info.chat_templates
        self.template_name = info.template_name
        self.specials = {s.content: s for s in info.specials if s.content and s.id != info.unk_id}
        self.special_pattern = _alternatives(self.specials)
        self._token_bytes = info.token_bytes
        self._text_prefix = info.text_prefix
        self._never = self.special_ids - {info.unk_id}  # ids that ordinary text must not yield
        self._tables: dict[bool, list[str | None]] = {}

    @abstractmethod
    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        """Ids of `text`, control tokens switched off; `prefix`: put the vocabulary's leading space before it."""

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`. add_special puts BOS first where the vocabulary asks for it. Without parse_special no control
        id can come out, whatever the text holds. Raises Unencodable."""
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        if not parse_special:
            return ids + self.encode_segment(text, first=True)
        for i, part in enumerate(self.split_specials(text)):
            ids.extend([part] if isinstance(part, int) else self.encode_segment(part, first=i == 0))
        return ids

    def encode_segment(self, text: str, *, first: bool) -> list[int]:
        """Ids of ordinary text, either from the start of a prompt (`first`) or from behind a control token."""
        if not text:
            return []
        prefix = self._text_prefix == "segments" or (first and self._text_prefix == "first")
        try:
            ids = self._encode_ordinary(text, prefix)
        except (UnicodeEncodeError, TypeError) as e:  # which of them depends on the library
            raise Unencodable("the text holds a lone surrogate, which is no character") from e
        return ids if self._never.isdisjoint(ids) else self._encode_cut(text, prefix)

    def _encode_cut(self, text: str, prefix: bool) -> list[int]:
        """For vocabularies whose merges can spell a control token: cut each of its spellings in two."""
        ids: list[int] = []
        for part in self._cut(text):
            ids += self._encode_ordinary(part, prefix and not ids)
        if self._never.isdisjoint(ids):
            return ids
        at = next(i for i in ids if i in self._never)
        raise Unencodable(f"the text holds {self.token_text(at)!r}, which this vocabulary has only as a control token")

    def _cut(self, text: str) -> Iterable[str]:
        start = 0
        for match in self.special_pattern.finditer(text):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

    def split_specials(self, text: str) -> list[int | str]:
        """`text` cut at the control tokens written in it: their ids, and the (non-empty) text between them."""
        parts: list[int | str] = []
        start = 0
        swallow = False
        for match in self.special_pattern.finditer(text):
            special = self.specials[match.group()]
            self._append(parts, text[start : match.start()], swallow, special.lstrip)
            parts.append(special.id)
            start, swallow = match.end(), special.rstrip
        self._append(parts, text[start:], swallow, False)
        return parts

    @staticmethod
    def _append(parts: list[int | str], text: str, lstrip: bool, rstrip: bool) -> None:
        text = text.lstrip() if lstrip else text
        text = text.rstrip() if rstrip else text
        if text:
            parts.append(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes that an id stands for, control tokens as they are written; b"" for ids outside the vocabulary
        (models pad their embedding, so they can be sampled)."""
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """The id's own text, for logprobs; bytes that are no complete character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Text of `ids`. continuation: they follow a prompt, so sentencepiece's first space is part of the text.
        Invalid UTF-8 becomes U+FFFD, one for each maximal invalid part."""
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        parts = [self.token_bytes(i) for i in kept]
        if self.strip_first_space and not continuation:
            for n, (i, part) in enumerate(zip(kept, parts, strict=True)):
                if part and i not in self.special_ids:
                    parts[n] = part.removeprefix(b" ")
                    break
        return b"".join(parts).decode("utf-8", "replace")

    def text_table(self, skip_special: bool) -> list[str | None]:
        """Text of each id that is complete by itself, None where its bytes are not whole characters. Made once."""
        table = self._tables.get(skip_special)
        if table is None:
            table = [_complete(b) for b in self._token_bytes]
            if skip_special:
                for i in self.special_ids:
                    table[i] = ""
            self._tables[skip_special] = table
        return table


def _complete(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _alternatives(contents: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the leftmost, then longest of `contents`; one that never matches when there are none."""
    longest_first = sorted(contents, key=lambda c: (-len(c), c))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
