"""Calibration text: known names, files of one's own, windows that a seed chooses, and what is said when there is too little."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from quant.corpus import DATASETS, load_windows, text_of
from text.base import Special, Tokenizer, VocabularyInfo
from text.tokenizer import ByteTokenizer

LINES = "".join(f"line {n} of the text\n" for n in range(2000))


class WithBos(Tokenizer):
    """Bytes, and a vocabulary that asks for BOS."""

    def __init__(self) -> None:
        super().__init__(VocabularyInfo([bytes([b]) for b in range(256)] + [b"<s>"], [Special(256, "<s>")], 256, add_bos=True))

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        return list(text.encode())


def as_text(ids: np.ndarray) -> str:
    return bytes(int(i) for i in ids).decode()


def test_windows_are_pieces_of_the_text_that_the_seed_chooses(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    first = load_windows(str(tmp_path / "a.txt"), ByteTokenizer(), 7, 100, seed=1)
    assert first.ids.shape == (7, 100) and first.ids.dtype == np.int32 and not first.sentences
    assert all(as_text(row) in LINES for row in first.ids)
    again, other = (load_windows(str(tmp_path / "a.txt"), ByteTokenizer(), 7, 100, seed=seed) for seed in (1, 2))
    assert first.digest == again.digest != other.digest
    assert len({row.tobytes() for row in first.ids}) == 7


def test_windows_begin_with_bos_where_the_vocabulary_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    windows = load_windows(str(tmp_path / "a.txt"), WithBos(), 4, 50).ids
    assert windows.shape == (4, 50) and (windows[:, 0] == 256).all() and (windows[:, 1:] < 256).all()


def test_a_short_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES[:1050])
    windows = load_windows(str(tmp_path / "a.txt"), ByteTokenizer(), 128, 100)
    assert windows.ids.shape == (10, 100)
    assert windows.sentences == ("a.txt has 1050 tokens: 10 samples of 100, not 128",)
    with pytest.raises(ConfigError, match="1050 tokens, less than one sample of 2048; lower --calib-seqlen"):
        load_windows(str(tmp_path / "a.txt"), ByteTokenizer(), 1, 2048)


@pytest.mark.parametrize(
    ("name", "file"),
    [("wikitext2", "wiki.train.raw"), ("ptb", "ptb.train.txt"), ("c4", "c4-train.00000-of-01024.json.gz"), ("pileval", "val.jsonl"),
     ("wikitext2", "wikitext-2-raw-v1.zip")],
)  # fmt: skip
def test_known_datasets_from_a_local_copy(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join(json.dumps({"text": LINES[i : i + 500], "meta": {}}) for i in range(0, 20000, 500))
    place = tmp_path / ".corpora"
    place.mkdir()
    if file.endswith(".zip"):
        with zipfile.ZipFile(place / file, "w") as archive:
            archive.writestr(DATASETS[name].member, LINES)
    elif file.endswith(".gz"):
        (place / file).write_bytes(gzip.compress(rows.encode()))
    else:
        (place / file).write_text(rows if "json" in file else LINES)
    monkeypatch.chdir(tmp_path)
    found = load_windows(name, ByteTokenizer(), 3, 64)
    assert found.name == name and found.ids.shape == (3, 64)
    assert load_windows(name, ByteTokenizer(), 3, 64, folder=place).digest == found.digest


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ('{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ('{"score": 1}\n', "line 1 has none of the keys text"),
        (b"\xff\xfe broken", "utf-8"),
    ],
)
def test_a_broken_file_is_said(contents: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.txt" if isinstance(contents, bytes) else "x.jsonl")
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(ConfigError, match=sentence):
        load_windows(str(path), ByteTokenizer(), 1, 8)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ({"content": "c", "other": 1}, "c"),
        ({"prompt": "p", "completion": "q"}, "p\nq"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "hi\nho"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a\nb"),
        ({"score": 3}, ""),
        (7, ""),
    ],
)
def test_where_a_json_value_has_its_text(value: object, text: str) -> None:
    assert text_of(value) == text


def test_what_the_hub_does_not_give_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"wikitext2: not in .corpora here .* name a text file"):
        load_windows("wikitext2", ByteTokenizer(), 1, 8, folder=tmp_path)
