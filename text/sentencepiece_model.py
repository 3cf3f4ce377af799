"""Sentencepiece vocabularies: `.model` files, and GGUF files of tokenizer model `llama`.

Both are run by the sentencepiece library. A GGUF vocabulary holds the same data (pieces, scores, types), so it is
written as a sentencepiece model in memory and merged by the same code: highest score first, leftmost on a tie, bytes
for what has no piece. Protocol-buffer field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import sentencepiece

from formats.errors import FormatError, printable
from formats.gguf import GGUFFile
from text.base import Special, Tokenizer, VocabularyInfo
from text.byte_level import library_errors, piece_bytes
from text.errors import Unencodable
from text.gguf_vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, GGUFVocabulary
from text.hub_files import DeclaredToken, HubSettings

MAX_MODEL_BYTES = 64 << 20
SPACE = "\u2581"
PLACEHOLDER = re.compile(r"\[UNUSED_TOKEN_\d{1,4}\]")
# appended to a serialized model, this overrides normalizer_spec (3) . add_dummy_prefix (3) with false
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencepieceTokenizer(Tokenizer):
    """`model` is a serialized sentencepiece model; `added` are ordinary tokens beyond it, matched wherever they are written."""

    def __init__(self, info: VocabularyInfo, model: bytes, added: dict[str, int]) -> None:
        super().__init__(info)
        self._plain = _processor(model + NO_PREFIX)
        self._prefixed = _processor(model) if info.text_prefix != "never" else self._plain
        self._added = added
        self._added_pattern = re.compile("|".join(map(re.escape, sorted(added, key=lambda c: (-len(c), c)))) or r"(?!)")

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        if not self._added:
            return self._encode_piece(text, prefix)
        ids: list[int] = []
        start = 0
        for match in self._added_pattern.finditer(text):
            ids += self._encode_piece(text[start : match.start()], prefix and not ids)
            ids.append(self._added[match.group()])
            start = match.end()
        return ids + self._encode_piece(text[start:], prefix and not ids)

    def _encode_piece(self, text: str, prefix: bool) -> list[int]:
        if not text:
            return []
        ids = list((self._prefixed if prefix else self._plain).encode(text))
        if self.unk_id is None and max(ids, default=0) >= self.vocab_size:
            raise Unencodable("the vocabulary has no token for a character of the text, and none for unknown characters")
        return ids


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.set_min_log_level(2)  # it warns on stderr about every NUL piece
    return sentencepiece.SentencePieceProcessor(model_proto=model)


# --- .model files ---------------------------------------------------------------------------------------------------


def load_sentencepiece(path: Path, hub: HubSettings) -> Tokenizer:
    """A sentencepiece `.model`; `hub` is what the files beside it say (tokens added after training, BOS, EOS)."""
    model = _read_model(path)
    with library_errors(path.name):
        sp = _processor(model)
        size = sp.get_piece_size()
        pieces = [sp.id_to_piece(i) for i in range(size)]
        token_bytes = [piece_bytes(p) if sp.is_byte(i) else p.replace(SPACE, " ").encode("utf-8", "replace") for i, p in enumerate(pieces)]
        specials = [Special(i, pieces[i]) for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
        prefixed = sp.encode_as_pieces("a")[:1] not in (["a"], [])
        bos, eos, unk = (i if 0 <= i < size else None for i in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
    added = _apply_added(path.name, hub.added_tokens, pieces, token_bytes, specials)
    for content in hub.family.controls if hub.family else ():
        if content in pieces and content not in {s.content for s in specials}:
            specials.append(Special(pieces.index(content), content))
    vocab = {s.content: s.id for s in specials}
    if hub.bos_token is not None:
        bos = vocab.get(hub.bos_token, bos)
    info = VocabularyInfo(
        token_bytes=token_bytes,
        specials=specials,
        bos_id=bos,
        eos_id=vocab.get(hub.eos_token) if hub.eos_token else None,
        eos_ids=hub.eos_ids(vocab, len(token_bytes)) or frozenset([] if eos is None else [eos]),
        unk_id=unk,
        add_bos=hub.add_bos is not False,
        text_prefix=("first" if hub.legacy is False else "segments") if prefixed else "never",
        strip_first_space=prefixed,
        chat_templates=hub.chat_templates,
    )
    with library_errors(path.name):
        return SentencepieceTokenizer(info, model, added)


def _read_model(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            model = file.read(MAX_MODEL_BYTES + 1)
    except OSError as e:
        raise FormatError(path.name, "", e.strerror or str(e)) from e
    if not 0 < len(model) <= MAX_MODEL_BYTES:
        raise FormatError(path.name, "", f"{len(model)} bytes; a model has 1 to {MAX_MODEL_BYTES}")
    return model


def _apply_added(
    file: str, declared: dict[int, DeclaredToken], pieces: list[str], token_bytes: list[bytes], specials: list[Special]
) -> dict[str, int]:
    """Enter the tokens added after training into the tables; gives the ordinary ones among those beyond the model."""
    ordinary: dict[str, int] = {}
    known = {s.id for s in specials}
    for token_id, token in sorted(declared.items()):
        if token_id < len(pieces):
            if PLACEHOLDER.fullmatch(pieces[token_id]):  # InternLM2 has left places for them
                pieces[token_id] = token.content
                token_bytes[token_id] = token.content.encode("utf-8", "replace")
            if pieces[token_id] != token.content:
                raise FormatError(file, printable(token.content), f"declared as id {token_id}, which the model has as another piece")
        elif token_id > len(token_bytes) + 1024:
            raise FormatError(file, printable(token.content), f"declared as id {token_id} in a vocabulary of {len(token_bytes)}")
        else:
            token_bytes.extend([b""] * (token_id + 1 - len(token_bytes)))
            token_bytes[token_id] = token.content.encode("utf-8", "replace")
            if not token.special:
                ordinary[token.content] = token_id
        if token.special and token_id not in known:
            specials.append(Special(token_id, token.content, token.lstrip, token.rstrip))
    return ordinary


# --- GGUF -----------------------------------------------------------------------------------------------------------


def load_gguf_sentencepiece(file: GGUFFile, vocabulary: GGUFVocabulary) -> Tokenizer:
    """Tokenizer model `llama` of a GGUF file. The space prefix applies after each control token, as in llama.cpp."""
    name = file.path.name
    prefixed = vocabulary.add_space_prefix is not False
    token_bytes: list[bytes] = []
    specials: list[Special] = []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        token_bytes.append(piece_bytes(token) if kind == BYTE else token.replace(SPACE, " ").encode("utf-8"))
        if kind in (CONTROL, UNKNOWN):
            specials.append(Special(i, token))
    unknown = [s.id for s in specials if vocabulary.types[s.id] == UNKNOWN]
    if len(unknown) > 1:
        raise FormatError(name, "tokenizer.ggml.token_type", f"{len(unknown)} tokens are marked unknown; at most one may be")
    info = VocabularyInfo(
        token_bytes=token_bytes,
        specials=specials,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        eos_ids=vocabulary.eos_ids,
        unk_id=unknown[0] if unknown else None,
        add_bos=vocabulary.add_bos is not False,
        text_prefix="segments" if prefixed else "never",
        strip_first_space=prefixed,
        chat_templates=vocabulary.chat_templates,
    )
    with library_errors(name):
        return SentencepieceTokenizer(info, _serialize(vocabulary, prefixed), {})


def model_bytes(file: GGUFFile, vocabulary: GGUFVocabulary) -> bytes:
    """A sentencepiece `.model` of a GGUF file's vocabulary."""
    with library_errors(file.path.name):
        return _serialize(vocabulary, vocabulary.add_space_prefix is not False)


def _serialize(vocabulary: GGUFVocabulary, prefixed: bool) -> bytes:
    """A ModelProto: pieces (1), trainer_spec (2: BPE, byte fallback), normalizer_spec (3: none, spaces escaped)."""
    byte_fallback = vocabulary.types.count(BYTE) == 256
    seen: set[str] = set()
    out = bytearray()
    for i, (token, score, kind) in enumerate(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)):
        if kind == USER_DEFINED:
            token = token.replace(" ", SPACE)  # matched after spaces are escaped
        if kind == BYTE and not byte_fallback:
            kind = UNUSED  # the library wants all of them or none
        if not token or "\0" in token or token in seen:  # the library refuses these; under a private name nothing reaches them
            token, kind = f"\U0010fffd{i}", CONTROL if kind == CONTROL else UNUSED
        seen.add(token)
        piece = _field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        out += _field(1, piece)
    if UNKNOWN not in vocabulary.types:  # the library wants one; it lies beyond the ids of this vocabulary
        out += _field(1, _field(1, "\U0010fffdunknown".encode()) + b"\x18" + bytes([UNKNOWN]))
    trainer = b"\x18\x02" + (b"\x98\x02\x01" if byte_fallback else b"")  # model_type (3) BPE, byte_fallback (35)
    normalizer = _field(1, b"identity") + bytes([0x18, prefixed, 0x20, 0, 0x28, 1])
    return bytes(out + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field; numbers below 16 take one byte."""
    length = len(data)
    out = bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out) + data
