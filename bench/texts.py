"""What quality is measured on: a text file or JSON lines -> ids -> windows that slide over them.

JSON lines, one object a line: `text` (or `content`): all of it is predicted; `prompt` with `completion` (or `response`,
`answer`, `output`): only the completion is; `messages` (or ShareGPT's `conversations`): the conversation as the model's chat
template writes it, all of it. A line may also be a plain JSON string. Everything else is refused by its line. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MAX_FILE_BYTES = 256 << 20
MAX_LINE_BYTES = 16 << 20
CHARS_PER_TOKEN = 64  # more of a long text than this many times the wanted tokens is not encoded
CHARS_GUESSED = 3  # a token, to begin with
JSON_LINES = (".jsonl", ".ndjson")
TEXT, COMPLETION = ("text", "content"), ("completion", "response", "answer", "output")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Render = Callable[[list[dict[str, str]]], list[int]]  # a conversation -> its ids


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    bos_id: int | None
    add_bos: bool

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One document. Ids before `first` (at least 1) are given, the others are to be predicted."""

    ids: list[int]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Window:
    """What the model sees at once; ids from `first` on are scored, each in exactly one window."""

    ids: list[int]
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def read_pieces(path: Path, tokenizer: Encoder, render: Render | None, tokens: int) -> list[Piece]:
    """The documents of a file, no more than `tokens` ids to predict need. ValueError with file and line where it cannot be used."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has {size / 2**20:.0f} MiB, more than the {MAX_FILE_BYTES >> 20} that are read; give a part of it.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if path.suffix.lower() not in JSON_LINES:
        return [Piece(tokenizer.encode(text[: CHARS_PER_TOKEN * (tokens + 1)], add_special=True))]
    pieces: list[Piece] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            pieces.append(_piece(line, tokenizer, render))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
        tokens -= max(0, len(pieces[-1].ids) - pieces[-1].first)
        if tokens <= 0:
            break
    return pieces


def unused_part(path: Path, tokenizer: Encoder, render: Render | None, tokens: int) -> str:
    """What of the file is left when `tokens` ids of it are scored: text to calibrate on. "" where nothing is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() in JSON_LINES:
        rows = [line for line in text.splitlines() if line.strip()]
        return "\n".join(rows[len(read_pieces(path, tokenizer, render, tokens)) :])
    end = CHARS_GUESSED * (tokens + 1)
    while end < len(text) and len(tokenizer.encode(text[:end])) <= tokens + 1:
        end += end // 4
    return text[end:]


def _piece(line: str, tokenizer: Encoder, render: Render | None) -> Piece:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has {len(line):,} characters, at most {MAX_LINE_BYTES:,} are read.")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}.") from None
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise ValueError("a line is a JSON object or a string.")
    if messages := row.get("messages") or row.get("conversations"):
        conversation = _messages(messages)
        if render is None:
            raise ValueError("a conversation needs a chat template, and this model has none; give text, or prompt and completion.")
        return Piece(render(conversation))
    if (text := _first(row, TEXT)) is not None:
        return Piece(tokenizer.encode(text, add_special=True))
    prompt, completion = _first(row, ("prompt",)), _first(row, COMPLETION)
    if prompt is None or completion is None:
        raise ValueError(f"the object has none of text, messages, or prompt with completion; it has {', '.join(map(str, row))[:200]}.")
    given = tokenizer.encode(prompt, add_special=True)
    return Piece(given + tokenizer.encode(completion), max(1, len(given)))


def _first(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The value under the first of the names that is there."""
    for name in names:
        if name in row:
            if not isinstance(row[name], str):
                raise ValueError(f"{name} is not a string.")
            return str(row[name])
    return None


def _messages(rows: Any) -> list[dict[str, str]]:
    """OpenAI's form (role, content) or ShareGPT's (from, value)."""
    out: list[dict[str, str]] = []
    for row in rows if isinstance(rows, list) else [None]:
        role, content = (row.get("role", row.get("from")), row.get("content", row.get("value"))) if isinstance(row, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("messages is a list of objects with role and content, both strings.")
        out.append({"role": SHAREGPT.get(role, role), "content": content})
    return out


def windows(pieces: Sequence[Piece], window: int, stride: int, tokens: int, bos: int | None = None) -> list[Window]:
    """Every id to predict once, up to `tokens` of them, each with as much before it as the window holds: at least window -
    stride ids where there are so many. A window that begins inside a document begins with `bos` where the document does."""
    out: list[Window] = []
    for one in (one for piece in pieces for one in _slide(piece, window, stride, bos)):
        if tokens <= 0:
            break
        surplus = max(0, one.scored - tokens)
        out.append(Window(one.ids[: len(one.ids) - surplus], one.first))
        tokens -= out[-1].scored
    return out


def _slide(piece: Piece, window: int, stride: int, bos: int | None) -> Iterator[Window]:
    """The windows of one document."""
    ids, scored, stride = piece.ids, piece.first, min(stride, window - 1)  # the first id of a window is only seen
    head = [bos] if bos is not None and ids[:1] == [bos] else []
    while scored < len(ids):
        end = min(len(ids), window if scored < window else scored + stride)
        begin = max(0, end - window)
        seen = ids[begin:end] if begin == 0 else head + ids[begin + len(head) : end]
        yield Window(seen, len(seen) - (end - scored))
        scored = end
