"""A 16-bit copy: the same model, the same answers' numbers, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine.errors import ModelError
from engine.models.layers import to_dense
from engine.models.spec import load_spec
from engine.weights import open_checkpoint
from formats.safetensors import read_safetensors
from quant import dense
from quant.dense import is_dense, write_dense
from quant.tokenizer_files import tokenizer_files
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint, toy_gguf


def same(source: Path, copy: Path) -> None:
    spec, read = load_spec(source), load_spec(copy)
    assert {f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(read, f.name)} <= dense.FORM
    ours, theirs = open_checkpoint(source, spec), open_checkpoint(copy, read)
    for name in ("embed", "layers.0.q", "layers.0.k", "layers.1.down", "layers.1.post_norm", "final_norm"):
        a, b = to_dense(ours.weight(name, dense=True)), theirs.weight(name)
        assert torch.equal(a.to(torch.float32), b.to(torch.float32)), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_of_a_gguf_file(tmp_path: Path, family: str) -> None:
    source = toy_gguf(tmp_path / "m.gguf", family, types="Q4_1", hidden=64)
    assert not is_dense(source)
    copy = write_dense(source, tmp_path / "copy")
    assert is_dense(copy) and (copy / "tokenizer.gguf").is_file() and not list(tmp_path.glob("*.partial"))
    same(source, copy)


def test_of_an_awq_folder(tmp_path: Path) -> None:
    source, _ = awq_checkpoint(tmp_path, layers=2)
    copy = write_dense(source, tmp_path / "copy")
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    same(source, copy)
    assert is_dense(write_dense(source, copy))  # an older one is replaced


@pytest.mark.parametrize("family", ["internlm2", "baichuan", "qwen"])
def test_packed_tensors_stay_packed(tmp_path: Path, family: str) -> None:
    source = toy_checkpoint(tmp_path / "m", family, dtype="float16")
    copy = write_dense(source, tmp_path / "copy")
    names = [set(read_safetensors(folder / "model.safetensors").tensors) for folder in (source, copy)]
    assert names[0] == names[1]
    same(source, copy)


def test_what_has_no_16_bit_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_checkpoint(tmp_path / "m")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match="mine: is there and is no checkpoint"):
        write_dense(source, tmp_path / "mine")
    monkeypatch.setattr(dense.Source, "config", lambda self: json.loads((source / "config.json").read_text()) | {"rope_theta": 1234.0})
    with pytest.raises(ModelError, match="cannot say this model's rope"):
        write_dense(source, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mine"]


def test_a_copy_of_a_copy_still_has_the_gguf_files_tokenizer(tmp_path: Path) -> None:
    copy = write_dense(toy_gguf(tmp_path / "m.gguf", types="Q4_1", hidden=64), tmp_path / "copy")
    names = {name for name, _ in tokenizer_files(copy)}
    assert "tokenizer.gguf" in names and "model.safetensors" not in names
