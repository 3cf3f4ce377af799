"""Vocabularies that the text tests share. The small ones are made here; the real ones come from the shared assets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.text.gguf_files import bpe_metadata, spm_metadata, write_gguf
from text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@pytest.fixture
def gguf(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes metadata to a GGUF file."""
    return lambda metadata: write_gguf(tmp_path / "vocabulary.gguf", metadata)


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("bpe") / "tiny.gguf", bpe_metadata()))


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "tiny.gguf", spm_metadata()))


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session", params=["bytes", "bpe", "spm"])
def tiny(request: pytest.FixtureRequest, tiny_bpe: Tokenizer, tiny_spm: Tokenizer, byte_tokenizer: Tokenizer) -> Tokenizer:
    """Each of the vocabularies that need no download."""
    return {"bytes": byte_tokenizer, "bpe": tiny_bpe, "spm": tiny_spm}[request.param]


@pytest.fixture(scope="session")
def load(assets: Path) -> Callable[[str], Tokenizer]:
    """Loads a tokenizer under assets/tokenizers, once a session."""
    cache: dict[str, Tokenizer] = {}

    def loader(name: str) -> Tokenizer:
        if name not in cache:
            cache[name] = load_tokenizer(assets / "tokenizers" / name)
        return cache[name]

    return loader


@pytest.fixture(scope="session")
def golden(assets: Path) -> list[dict[str, Any]]:
    """The ten chat prompts of SmolLM2 with their ids."""
    path = assets / "golden" / "smollm2-135m-instruct.float32.transformers.json"
    prompts: list[dict[str, Any]] = json.loads(path.read_text())["prompts"]
    return prompts
