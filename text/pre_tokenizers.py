"""Pre-tokenizers by the names that GGUF files use for them (`tokenizer.ggml.pre`): how text is cut before BPE.

A GGUF file holds only the name; the patterns are those of the models' own tokenizer.json files. Several patterns are
applied one after the other, each to the pieces that the one before it left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import normalizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """ignore_merges: a piece that is a token as a whole is not merged. add_bos: where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: Any = None


_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}|{_TAIL}"
_LLAMA3_PATTERN = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = PreTokenizer((_GPT2_PATTERN,))
_QWEN2 = PreTokenizer((_QWEN2_PATTERN,))
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2_PATTERN))
_LLAMA3 = PreTokenizer((_LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
_CHATGLM = PreTokenizer((_LLAMA3_PATTERN,))

TABLE: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _CHATGLM,
    "smaug-bpe": _CHATGLM,
    "chatglm-bpe": _CHATGLM,
    "glm4": _CHATGLM,
    "tekken": PreTokenizer((_TEKKEN_PATTERN,), ignore_merges=True, add_bos=True),
    # Qwen-1 is not in GGUF files under a name of its own; tiktoken looks whole pieces up first
    "qwen": PreTokenizer((_QWEN2_PATTERN,), ignore_merges=True, normalizer=normalizers.NFC()),
}
