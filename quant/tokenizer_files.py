"""The text side of a checkpoint, to go with weights that are written anew: tokenizer and small JSON files, as they are.

Of a GGUF file: its keys without tensors, or the same as Hugging Face's files. Code that lies beside a checkpoint is never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.errors import ModelError
from formats.errors import FormatError
from formats.gguf import without_tensors
from text.hub_export import hub_files_of_gguf

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "tokenizer.gguf")
NOT_TOKENIZER = ("model.safetensors.index.json", "quantize.json")
MAX_TOKENIZER_FILE = 256 << 20
OF_GGUF = "tokenizer.gguf"


def tokenizer_files(source: Path, tokenizer_path: Path | str | None = None, *, hub: bool = False) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the tokenizer and the small JSON files beside it (config.json among them). `hub`: a GGUF file's as
    Hugging Face's files. ModelError of a file that is too large, or of a GGUF file that cannot be read."""
    given = Path(tokenizer_path) if tokenizer_path else None
    home = source if source.is_dir() else None
    files = [path for pattern in TOKENIZER_FILES for path in sorted(home.glob(pattern))] if home else []
    if given:
        tokenizers = [given] if given.is_file() else [p for pattern in TOKENIZER_FILES for p in sorted(given.glob(pattern))]
        files = [path for path in files if path.name == "config.json" or path.name == "generation_config.json"] + tokenizers
    for path in {path.name: path for path in files if path.name not in NOT_TOKENIZER}.values():
        if path.stat().st_size > MAX_TOKENIZER_FILE:
            raise ModelError(f"{path.name}: {path.stat().st_size} bytes are too many for a tokenizer's file")
        yield path.name, path.read_bytes()
    if home is None and given is None:
        try:
            yield from (_hub_files(source) if hub else {OF_GGUF: without_tensors(source)}).items()
        except FormatError as e:
            raise ModelError(str(e)) from e


def _hub_files(source: Path) -> dict[str, bytes]:
    try:
        return hub_files_of_gguf(source)
    except FormatError:  # no vocabulary in it, or one that has no such files: its keys, which numbatch reads
        return {OF_GGUF: without_tensors(source)}
