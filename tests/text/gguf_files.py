"""Small GGUF files made here: metadata only, valid or broken as a test wants them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from text.byte_level import ALPHABET

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A GGUF value with its type: bool, int (u32), str, or a list of str, int (i32) or float (f32)."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    head = struct.pack("<IIQ", 9, 8 if not value or isinstance(value[0], str) else 6 if isinstance(value[0], float) else 5, len(value))
    if not value or isinstance(value[0], str):
        return head + b"".join(map(_string, value))
    return head + struct.pack(f"<{len(value)}{'f' if isinstance(value[0], float) else 'i'}", *value)


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file without tensors."""
    body = b"".join(_string(k) + _value(v) for k, v in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)
    return path


def bpe_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE vocabulary of 262: the 256 bytes, `he`, `ll`, `hell`, and three control tokens."""
    tokens = [c for c, _ in sorted(ALPHABET.items(), key=lambda item: item[1])] + ["he", "ll", "hell", "<s>", "<|im_start|>", "<|im_end|>"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 259 + [3] * 3,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 261,
        "tokenizer.chat_template": CHATML,
    }
    metadata |= {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in metadata.items() if v is not None}


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A sentencepiece vocabulary of 267: unk, bos, eos, 256 bytes, and eight pieces with scores."""
    pieces = [("\u2581", -9.0), ("h", -8.0), ("e", -7.0), ("l", -6.0), ("o", -5.0), ("he", -4.0), ("ll", -3.0), ("\u2581he", -2.0)]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + [p for p, _ in pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [s for _, s in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in metadata.items() if v is not None}
