"""A GGUF file's vocabulary as Hugging Face's files: read back, it gives the same ids, ends, templates and bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from text.base import Tokenizer
from text.hub_export import hub_files_of_gguf
from text.tokenizer import load_tokenizer

TEXT = (
    "The 1,234 quick brown foxes don't jump.\n\n\tdef f(x):  return x**2  # naïve\n<|im_start|>user\nHi<|im_end|> </s> "
    "日本語のテキスト 🙂🏽 \u00a0 \r\n  trailing  "
)
VECTORS = ["ggml-vocab-llama-spm.gguf", "ggml-vocab-qwen2.gguf"]


def same(ours: Tokenizer, theirs: Tokenizer) -> None:
    for special in (False, True):
        assert ours.encode(TEXT, add_special=True, parse_special=special) == theirs.encode(TEXT, add_special=True, parse_special=special)
    for name in ("bos_id", "eos_id", "eos_ids", "unk_id", "add_bos", "vocab_size", "special_ids", "chat_templates", "strip_first_space"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [ours.token_text(i) for i in range(0, ours.vocab_size, 97)] == [theirs.token_text(i) for i in range(0, ours.vocab_size, 97)]


def exported(source: Path, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, data in hub_files_of_gguf(source).items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", VECTORS)
def test_vocabularies_of_llama_cpp(name: str, assets: Path, tmp_path: Path) -> None:
    source = assets / "tokenizers" / "vectors" / name
    same(load_tokenizer(source), exported(source, tmp_path / "hub"))


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    same(load_tokenizer(smollm2), exported(smollm2, tmp_path / "hub"))


def test_tinyllama(tinyllama: Path, tmp_path: Path) -> None:
    same(load_tokenizer(tinyllama), exported(tinyllama, tmp_path / "hub"))
