"""Calibration text: a known dataset's name or a file of one's own, as windows of token ids.

    wikitext2 | c4 | ptb | pileval    a local copy (under the names of `DATASETS`), else the hub
    FILE.jsonl, FILE.json             one JSON value a line: "text", "content" or the chat form "messages"
    any other FILE                    text; .gz is unpacked

Tokens are cut into windows of one length, of which a seeded choice is taken; each begins with BOS where the vocabulary asks
for one. Reads as much text as the windows may need and no more. Knows no models.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from engine.errors import ConfigError
from text.base import Tokenizer
from text.errors import Unencodable

CHARS_PER_TOKEN = 8  # read at most so many for each token that is wanted,
VARIETY = 4  # and so many times more, for the seed to choose from
BLOCK_CHARS = 1 << 16  # encoded at a time
MAX_LINE = 64 << 20
TEXT_KEYS = ("text", "content", "prompt", "instruction", "input", "output", "response", "completion")
CHAT_KEYS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where a known dataset may lie: file names of local copies, and a plain file on the hub (a member of it, if it is a zip)."""

    local: tuple[str, ...]
    hub: tuple[str, str] | None = None  # repository, file
    member: str = ""
    advice: str = ""


DATASETS = {
    "wikitext2": Dataset(
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw", "wikitext-2-raw-v1.zip"),
        ("ggml-org/ci", "wikitext-2-raw-v1.zip"),
        "wikitext-2-raw/wiki.train.raw",
    ),
    "c4": Dataset(
        ("c4-train.00000-of-01024.json", "c4-train.00000-of-01024.json.gz", "c4.jsonl"),
        ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
    ),
    "ptb": Dataset(("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"), advice="its hub copy is parquet, which is not read"),
    "pileval": Dataset(("val.jsonl", "val.jsonl.gz"), advice="its hub copy is zstandard-packed, which is not read: unpack val.jsonl.zst"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """`ids`: int32 [samples, seqlen]. `digest`: SHA-256 of the ids. `sentences`: what people should know of the choice."""

    ids: np.ndarray
    name: str
    digest: str
    sentences: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return self.ids.size


def load_windows(dataset: str, tokenizer: Tokenizer, samples: int, seqlen: int, seed: int = 0, folder: str | Path | None = None) -> Windows:
    """`samples` windows of `seqlen` tokens; fewer, with a sentence, where the text is short. `folder`: where local copies and
    downloads lie (also looked into: .corpora here). ConfigError where there is no such text, or less than one window of it."""
    room = seqlen - (tokenizer.add_bos and tokenizer.bos_id is not None)
    path, member = _find(dataset, folder)
    name = dataset if dataset in DATASETS else path.name
    try:
        ids = _encode(_texts(path, member, VARIETY * CHARS_PER_TOKEN * samples * seqlen), tokenizer, VARIETY * samples * room)
    except (OSError, EOFError, zipfile.BadZipFile, UnicodeDecodeError, Unencodable, ValueError) as error:
        raise ConfigError(f"--calib-dataset {dataset}: {path.name}: {getattr(error, 'strerror', None) or error}.") from error
    count = len(ids) // room
    if not count:
        raise ConfigError(f"--calib-dataset {dataset}: {len(ids)} tokens, less than one sample of {seqlen}; lower --calib-seqlen.")
    chosen = sorted(random.Random(seed).sample(range(count), min(samples, count)))
    windows = np.stack([ids[i * room : (i + 1) * room] for i in chosen])
    if room < seqlen:
        windows = np.concatenate([np.full((len(windows), 1), tokenizer.bos_id, np.int32), windows], axis=1)
    sentences = (f"{name} has {len(ids)} tokens: {count} samples of {seqlen}, not {samples}",) if count < samples else ()
    return Windows(windows, name, hashlib.sha256(windows.tobytes()).hexdigest(), sentences)


def _find(dataset: str, folder: str | Path | None) -> tuple[Path, str]:
    """(file, member of a zip)."""
    known = DATASETS.get(dataset)
    if known is None or Path(dataset).is_file():
        if not Path(dataset).is_file():
            raise ConfigError(f"--calib-dataset {dataset}: neither a file nor one of {', '.join(DATASETS)}.")
        return Path(dataset), ""
    folders = [Path(folder)] if folder else []
    for place in (*folders, Path(".corpora")):
        for name in known.local:
            if (place / name).is_file():
                return place / name, known.member if name.endswith(".zip") else ""
    if known.hub is None:
        raise ConfigError(
            f"--calib-dataset {dataset}: put {known.local[0]} into .corpora here or into --download-dir, or name a text file "
            f"({known.advice})."
        )
    return _fetch(dataset, known.hub, folder), known.member


def _fetch(dataset: str, hub: tuple[str, str], folder: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub[0], hub[1], repo_type="dataset", cache_dir=folder))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"--calib-dataset {dataset}: not in .corpora here nor in --download-dir ({', '.join(DATASETS[dataset].local[:2])}), and the "
            f"hub does not give it ({type(error).__name__}); name a text file."
        ) from error


def _texts(path: Path, member: str, max_chars: int) -> Iterator[str]:
    """Pieces of text in the file's order, a little more than `max_chars` in all at most."""
    with _open(path, member) as file:
        stem = (member or path.name).removesuffix(".gz")
        lines = _json_texts(file) if stem.endswith((".jsonl", ".json")) else iter(lambda: file.read(BLOCK_CHARS), "")
        for text in lines:
            yield text
            max_chars -= len(text)
            if max_chars <= 0:
                return


def _open(path: Path, member: str) -> IO[str]:
    if member:
        with zipfile.ZipFile(path) as archive:
            return io.TextIOWrapper(archive.open(member), encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _json_texts(file: IO[str]) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"line {number} is not JSON") from None
            text = text_of(value)
            if not text:
                raise ValueError(f"line {number} has none of the keys {', '.join((*TEXT_KEYS[:3], *CHAT_KEYS))}")
            yield text + "\n\n"


def text_of(value: object) -> str:
    """The text of one JSON value: a string, an object with text, or a conversation; "" where there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(text_of, value)))
    if not isinstance(value, dict):
        return ""
    for key in (*CHAT_KEYS, "value"):
        if key in value:
            return text_of(value[key])
    return "\n".join(value[key] for key in TEXT_KEYS if isinstance(value.get(key), str) and value[key])


def _encode(texts: Iterable[str], tokenizer: Tokenizer, wanted: int) -> np.ndarray:
    """int32 [up to about `wanted`]."""
    parts: list[list[int]] = []
    count = 0
    for block in _blocks(texts):
        parts.append(tokenizer.encode_segment(block, first=not parts))
        count += len(parts[-1])
        if count >= wanted:
            break
    return np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.empty(0, np.int32)


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end with a line, where lines are not absurdly long."""
    held = ""
    for text in texts:
        held += text
        if len(held) >= BLOCK_CHARS:
            cut = held.rfind("\n") + 1 or len(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held
