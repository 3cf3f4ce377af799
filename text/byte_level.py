"""Vocabularies that go through the `tokenizers` library: `tokenizer.json`, and byte-level BPE out of GGUF and tiktoken files.

This file knows how those formats say what an id stands for and where spaces are added; `base.py` knows what to do
with it. The library is told to leave control tokens in text alone; `base.py` finds them instead.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from formats.errors import FormatError, printable
from formats.gguf import GGUFFile
from formats.json_file import read_json
from text.base import Special, Tokenizer, VocabularyInfo
from text.errors import Unencodable
from text.gguf_vocabulary import CONTROL, UNUSED, USER_DEFINED, GGUFVocabulary
from text.hub_files import HubSettings
from text.pre_tokenizers import TABLE, PreTokenizer

MAX_TOKENIZER_JSON = 256 << 20
MAX_TIKTOKEN_BYTES = 64 << 20
MAX_TOKEN_BYTES = 1024
# bytes that never occur in UTF-8 need no token
UTF8_BYTES = bytes(b for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints in Latin-1, else the next of U+0100, U+0101, ..."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + n): b for n, b in enumerate(rest)}


ALPHABET = _byte_alphabet()
_TO_BYTES = {ord(c): b for c, b in ALPHABET.items()}
_FROM_BYTES = {b: c for c, b in ALPHABET.items()}


def alphabet_bytes(token: str) -> bytes:
    """The bytes behind a byte-level token; a token with characters outside the alphabet is its own UTF-8."""
    try:
        return token.translate(_TO_BYTES).encode("latin-1") if all(c in ALPHABET for c in token) else token.encode("utf-8")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


@contextlib.contextmanager
def library_errors(file: str) -> Iterator[None]:
    """The library raises bare `Exception`, and panics (a BaseException of its own) on some broken files."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, FormatError):
        raise
    except BaseException as e:
        raise FormatError(file, "tokenizer", printable(str(e))) from e


class LibraryTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind our interface. `plain` adds no space; None where `library` adds none either."""

    def __init__(self, info: VocabularyInfo, library: tokenizers.Tokenizer, plain: tokenizers.Tokenizer | None, byte_level: bool) -> None:
        super().__init__(info)
        library.encode_special_tokens = True  # control tokens written in text stay text
        self._library = library
        self._plain = plain or library
        self._plain.encode_special_tokens = True
        have = {b[0] for b in info.token_bytes if len(b) == 1}
        self._no_token = bytes(b for b in UTF8_BYTES if b not in have) if byte_level else b""

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        if self._no_token:
            self._refuse_missing(text)
        chosen = self._library if prefix else self._plain
        try:
            return list(chosen.encode(text, add_special_tokens=False).ids)
        except BaseException as e:
            if type(e).__name__ != "PanicException":
                raise
            # the library's way to say that its regular expression gave up; a BaseException would end the thread
            raise Unencodable("the tokenizer's splitting pattern gave up on this text; make it shorter") from e

    def to_json(self) -> str:
        """A `tokenizer.json` of the same vocabulary; BOS is put first where it asks for one."""
        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        if self.add_bos and self.bos_id is not None:
            bos = self.token_text(self.bos_id)
            library.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=None, special_tokens=[(bos, self.bos_id)])
        return library.to_str()

    def _refuse_missing(self, text: str) -> None:
        """Byte-level BPE drops bytes that have no token; say so instead of losing them."""
        raw = text.encode("utf-8")
        if len(raw.translate(None, self._no_token)) == len(raw):
            return
        char = next(c for c in text if any(b in self._no_token for b in c.encode("utf-8")))
        raise Unencodable(f"the vocabulary has no token for the character U+{ord(char):04X}; remove it from the text")


# --- tokenizer.json -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _JsonKind:
    """How a tokenizer.json writes bytes and spaces."""

    byte_level: bool
    text_prefix: str
    strip_first_space: bool


def load_tokenizer_json(path: Path, hub: HubSettings) -> Tokenizer:
    """A Hugging Face `tokenizer.json`; `hub` is what the files beside it say."""
    spec = read_json(path, MAX_TOKENIZER_JSON)
    kind = _json_kind(path.name, spec)
    with library_errors(path.name):
        spec = _with_declared(path.name, spec | {"truncation": None, "padding": None}, hub)
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        _check_declared(path.name, library, hub)
        plain = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec))) if kind.text_prefix != "never" else None
        vocab = library.get_vocab(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        start = library.encode("", add_special_tokens=True).ids
    token_bytes = _json_token_bytes(vocab, {i: t.content for i, t in added.items()}, kind)
    specials = [Special(i, t.content, t.lstrip, t.rstrip) for i, t in added.items() if t.special]
    bos = vocab.get(hub.bos_token) if hub.bos_token else None
    if bos is None and hub.bos_token is None and start and start[0] in added:
        bos = start[0]
    add_bos = hub.add_bos if hub.add_bos is not None else bool(start) and start[0] == bos
    info = VocabularyInfo(
        token_bytes=token_bytes,
        specials=specials,
        bos_id=bos,
        eos_id=vocab.get(hub.eos_token) if hub.eos_token else None,
        eos_ids=hub.eos_ids(vocab, len(token_bytes)),
        unk_id=vocab.get(hub.unk_token) if hub.unk_token else None,
        add_bos=add_bos,
        text_prefix=kind.text_prefix,
        strip_first_space=kind.strip_first_space,
        chat_templates=hub.chat_templates,
    )
    return LibraryTokenizer(info, library, plain, kind.byte_level)


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """A pipeline stage as a flat list: a Sequence's members, the one member, or nothing."""
    if not isinstance(value, dict):
        return []
    if value.get("type") == "Sequence":
        return [p for member in value.get(key) or [] for p in _parts(member, key)]
    return [value]


def _json_kind(file: str, spec: dict[str, Any]) -> _JsonKind:
    before = _parts(spec.get("normalizer"), "normalizers") + _parts(spec.get("pre_tokenizer"), "pretokenizers")
    after = _parts(spec.get("decoder"), "decoders")
    byte_level = [p for p in before if p.get("type") == "ByteLevel"]
    if byte_level:
        prefix = any(p.get("add_prefix_space") for p in byte_level)
        return _JsonKind(True, "segments" if prefix else "never", False)
    kinds = {p.get("type") for p in after}
    if not kinds & {"ByteFallback", "Metaspace"} and not any(_replaces_space(p) for p in after):
        raise FormatError(file, "decoder", "neither byte-level nor sentencepiece-like; other tokenizers are not supported")
    text_prefix = "never"
    for p in before:
        if p.get("type") == "Prepend":
            text_prefix = "segments"
        if p.get("type") == "Metaspace":
            scheme = p.get("prepend_scheme", "always" if p.get("add_prefix_space", True) else "never")
            text_prefix = {"always": "segments", "first": "first"}.get(scheme, "never")
    # some files strip a space that they never add (InternLM2); decoding is the inverse of encoding here
    return _JsonKind(False, text_prefix, text_prefix != "never")


def _replaces_space(part: dict[str, Any]) -> bool:
    return part.get("type") == "Replace" and part.get("content") == " "


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, adding no space before the text."""
    return {**spec, "normalizer": _drop_prefix(spec.get("normalizer")), "pre_tokenizer": _drop_prefix(spec.get("pre_tokenizer"))}


def _drop_prefix(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    kind = stage.get("type")
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in stage else "pretokenizers"
        return {**stage, key: [m for m in map(_drop_prefix, stage.get(key) or []) if m is not None]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**stage, "prepend_scheme": "never", "add_prefix_space": False}
    return {**stage, "add_prefix_space": False} if kind == "ByteLevel" else stage


def _with_declared(file: str, spec: dict[str, Any], hub: HubSettings) -> dict[str, Any]:
    """Enter tokens that tokenizer_config.json declares and tokenizer.json does not. A declared id that the vocabulary
    holds under another name is renamed: that is how InternLM2 fills its placeholders."""
    added = list(spec.get("added_tokens") or [])
    known = {t.get("id") for t in added if isinstance(t, dict)}
    model: dict[str, Any] = spec["model"] if isinstance(spec.get("model"), dict) else {}
    vocab = dict(model["vocab"]) if isinstance(model.get("vocab"), dict) else {}
    names = {token_id: token for token, token_id in vocab.items()}
    for token_id, token in sorted(hub.added_tokens.items()):
        if token_id in known:
            continue
        if vocab.get(token.content, token_id) != token_id:
            raise FormatError(file, printable(token.content), f"tokenizer_config.json gives it id {token_id}, the vocabulary another")
        if token_id in names and names[token_id] != token.content:
            del vocab[names[token_id]]
            vocab[token.content] = token_id
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": False, "normalized": False, "special": token.special}
        added.append({"id": token_id, "content": token.content, **flags})
    if not hub.added_tokens or not vocab:
        return spec
    return {**spec, "added_tokens": sorted(added, key=lambda t: t["id"]), "model": {**model, "vocab": vocab}}


def _check_declared(file: str, library: tokenizers.Tokenizer, hub: HubSettings) -> None:
    for token_id, token in hub.added_tokens.items():
        if library.token_to_id(token.content) != token_id:
            raise FormatError(file, printable(token.content), f"tokenizer_config.json gives it id {token_id}, the vocabulary another")


def _json_token_bytes(vocab: dict[str, int], added: dict[int, str], kind: _JsonKind) -> list[bytes]:
    size = max(vocab.values(), default=-1) + 1
    if size > len(vocab) + (1 << 20):
        raise FormatError("tokenizer.json", "vocab", f"{len(vocab)} tokens numbered up to {size - 1}")
    table = [b""] * size
    to_bytes = alphabet_bytes if kind.byte_level else piece_bytes
    for token, token_id in vocab.items():
        table[token_id] = to_bytes(token)
    for token_id, content in added.items():
        table[token_id] = content.encode("utf-8", "replace")
    return table


def piece_bytes(piece: str) -> bytes:
    """The bytes behind a sentencepiece piece: `<0x0A>` is one byte, U+2581 a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        with contextlib.suppress(ValueError):
            return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8", "replace")


# --- GGUF and tiktoken: build the library's tokenizer ---------------------------------------------------------------


def _build(
    vocab: dict[str, int], merges: Iterable[tuple[str, str]], pre: PreTokenizer, added: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    model = models.BPE(vocab=vocab, merges=list(merges), ignore_merges=pre.ignore_merges, fuse_unk=False, byte_fallback=False)
    library = tokenizers.Tokenizer(model)
    splits: list[Any] = [pre_tokenizers.Split(tokenizers.Regex(r), behavior="isolated") for r in pre.patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre.normalizer is not None:
        library.normalizer = pre.normalizer
    library.decoder = decoders.ByteLevel()
    library.add_tokens(added)
    return library


def load_gguf_bpe(file: GGUFFile, vocabulary: GGUFVocabulary) -> LibraryTokenizer:
    """Byte-level BPE from GGUF metadata. The file holds no normalizer, so none is applied."""
    name = file.path.name
    pre_name = vocabulary.pre
    if pre_name not in TABLE:
        raise FormatError(name, "tokenizer.ggml.pre", f"unknown pre-tokenizer {printable(pre_name)}; known: {', '.join(sorted(TABLE))}")
    pre = TABLE[pre_name]
    vocab: dict[str, int] = {}
    token_bytes: list[bytes] = []
    specials: list[Special] = []
    added: list[tokenizers.AddedToken] = []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        raw = kind in (CONTROL, USER_DEFINED, UNUSED)
        vocab.setdefault(token, i)
        token_bytes.append(token.encode("utf-8") if raw else alphabet_bytes(token))
        if kind in (CONTROL, USER_DEFINED) and token and vocab[token] == i:
            added.append(tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL))
        if kind == CONTROL:
            specials.append(Special(i, token))
    control = {s.content for s in specials}
    with library_errors(name):
        library = _build(vocab, _gguf_merges(name, vocabulary.merges, control), pre, added)
    add_bos = pre.add_bos if vocabulary.add_bos is None else vocabulary.add_bos
    info = VocabularyInfo(
        token_bytes=token_bytes,
        specials=specials,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        eos_ids=vocabulary.eos_ids,
        add_bos=add_bos,
        chat_templates=vocabulary.chat_templates,
    )
    return LibraryTokenizer(info, library, None, byte_level=True)


def _gguf_merges(file: str, merges: list[str], control: set[str]) -> Iterator[tuple[str, str]]:
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise FormatError(file, "tokenizer.ggml.merges", f"merge {i} is not two tokens with a space between them")
        if left + right not in control:  # text never spells a control token
            yield left, right


QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def load_tiktoken(path: Path, hub: HubSettings) -> Tokenizer:
    """Qwen-1's `qwen.tiktoken`: lines of base64 token and rank; its control tokens follow the last rank."""
    ranks = _read_ranks(path)
    spelled = {raw: "".join(_FROM_BYTES[b] for b in raw) for raw in ranks}
    vocab = {spelled[raw]: rank for raw, rank in ranks.items()}
    specials = [Special(len(ranks) + i, content) for i, content in enumerate(QWEN_SPECIALS)]
    vocab |= {s.content: s.id for s in specials}
    added = [tokenizers.AddedToken(s.content, normalized=False, special=True) for s in specials]
    with library_errors(path.name):
        library = _build(vocab, _rank_merges(ranks, spelled), TABLE["qwen"], added)
    token_bytes = sorted(ranks, key=ranks.__getitem__) + [s.content.encode() for s in specials]
    eos = hub.eos_ids(vocab, len(token_bytes)) or frozenset({len(ranks)})
    return LibraryTokenizer(
        VocabularyInfo(token_bytes, specials, eos_ids=eos, chat_templates=hub.chat_templates), library, None, byte_level=True
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        if path.stat().st_size > MAX_TIKTOKEN_BYTES:
            raise FormatError(path.name, "", f"larger than {MAX_TIKTOKEN_BYTES} bytes")
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise FormatError(path.name, "", e.strerror or str(e)) from e
    ranks: dict[bytes, int] = {}
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        token, space, rank = line.strip().partition(b" ")
        try:
            raw = base64.b64decode(token, validate=True)
        except binascii.Error as e:
            raise FormatError(path.name, f"line {n}", "not base64") from e
        if not space or rank != str(len(ranks)).encode() or not 0 < len(raw) <= MAX_TOKEN_BYTES or raw in ranks:
            raise FormatError(path.name, f"line {n}", f"not a new token of 1 to {MAX_TOKEN_BYTES} bytes with rank {len(ranks)}")
        ranks[raw] = len(ranks)
    if not ranks:
        raise FormatError(path.name, "", "holds no tokens")
    return ranks


def _rank_merges(ranks: dict[bytes, int], spelled: dict[bytes, str]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of what it makes: tiktoken always merges to the lowest rank."""
    for raw in ranks:  # insertion order is rank order
        for cut in range(1, len(raw)):
            left, right = raw[:cut], raw[cut:]
            if left in ranks and right in ranks:
                yield spelled[left], spelled[right]
