"""Vocabularies broken at random: refused with the one exception, or loaded and usable; never a crash, never a foreign id."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import FormatError
from tests.text.gguf_files import bpe_metadata, spm_metadata, write_gguf
from text.errors import TextError
from text.tokenizer import load_tokenizer

STRINGS = ["", "\0", "<0xZZ>", "h", "a b", "\u2581" * 50, "he ll", " ", "  ", "h h", "<s>", "llama", "gpt2", "llama-bpe", "\u00e9"]
NUMBERS = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1]
FLOATS = [1e38, -1e38, 0.0, float("inf"), float("nan")]


def changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return rng.choice(STRINGS)
    if isinstance(value, int):
        return rng.choice([0, 1, 2, 261, 262, 2**32 - 1])
    value = list(value)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(value))
        if rng.random() < 0.2 and len(value) > 1:
            del value[at]
        elif rng.random() < 0.4:
            value[at] = rng.choice(value)
        else:
            value[at] = rng.choice(STRINGS if isinstance(value[0], str) else FLOATS if isinstance(value[0], float) else NUMBERS)
    return value


def use(path: Path) -> None:
    try:
        tokenizer = load_tokenizer(path)
    except FormatError:
        return
    for text in ["hello <s> w\u00e9", "", "\0 h", "\u2581\u2581", "<|im_end|>!!!"]:
        for parse_special in (False, True):
            try:
                ids = tokenizer.encode(text, add_special=True, parse_special=parse_special)
            except TextError:
                continue
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)
    assert len(tokenizer.text_table(True)) == tokenizer.vocab_size


@pytest.mark.parametrize("make", [bpe_metadata, spm_metadata])
def test_changed_metadata(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    rng = random.Random(1)
    for _ in range(200):
        metadata = make()
        for key in rng.sample(list(metadata), rng.randint(1, 3)):
            metadata[key] = changed(rng, metadata[key])
        use(write_gguf(tmp_path / "x.gguf", metadata))


@pytest.mark.parametrize("name", ["models/stories260K/tok512.model", "tokenizers/vectors/ggml-vocab-llama-spm.gguf"])
def test_changed_bytes(assets: Path, tmp_path: Path, name: str) -> None:
    rng = random.Random(2)
    original = (assets / name).read_bytes()[: 1 << 20]
    path = tmp_path / Path(name).name
    for _ in range(40):
        raw = bytearray(original[: rng.randrange(len(original))] if rng.random() < 0.3 else original)
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(max(len(raw) // 8, 1))] = rng.randrange(256)
        path.write_bytes(raw)
        use(path)


def test_no_token_for_unknown_characters(tmp_path: Path) -> None:
    """No byte pieces and no unknown token: such a character is refused, not given an id beyond the vocabulary."""
    metadata = spm_metadata()
    metadata["tokenizer.ggml.token_type"][0:4] = [3, 3, 3, 1]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", metadata))
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(TextError, match="no token"):
        tokenizer.encode("hello w")
