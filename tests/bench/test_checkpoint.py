"""Random checkpoints: what is written can be loaded, has the shapes it says, and is the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import checkpoint
from engine.models.spec import load_spec
from engine.weight_files import take_stock
from formats.safetensors import read_safetensors
from text.tokenizer import load_tokenizer


def test_a_dense_checkpoint_is_a_model(tmp_path: Path) -> None:
    assert checkpoint.main(["toy", "--format", "dense", "--dtype", "bfloat16", "--out", str(tmp_path / "m"), "--threads", "2"]) == 0
    spec = load_spec(tmp_path / "m")
    stock = take_stock(tmp_path / "m", spec)
    assert spec.num_layers == 2 and stock["layers.1.down.weight"].shape == (256, 512)
    stored = stock["layers.0.q.weight"]
    values = (stored.file.raw(stored.name).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert 0.01 < values.std() < 0.03 and abs(values.mean()) < 1e-3 and np.unique(values).size > 300
    norm = stock["final_norm.weight"]
    assert (norm.file.raw(norm.name).view(np.uint16) == 0x3F80).all()
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo" and tokenizer.decode([1000]) == " t1000"


def test_an_awq_checkpoint_has_the_gemm_layout(tmp_path: Path) -> None:
    words = ["toy", "--out", str(tmp_path / "m"), "--threads", "1"]
    assert checkpoint.main(words) == 0
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["quantization_config"]["group_size"] == 128 and config["quantization_config"]["version"] == "gemm"
    file = read_safetensors(tmp_path / "m/model-00001-of-00003.safetensors")
    shapes = {name.rpartition(".")[2]: t.shape for name, t in file.tensors.items() if "gate_proj" in name}
    assert shapes == {"qweight": (256, 64), "qzeros": (2, 64), "scales": (2, 512)}
    gate = "model.layers.0.mlp.gate_proj"
    assert (file.raw(f"{gate}.qzeros").view(np.uint32) == 0x88888888).all()
    scales = file.raw(f"{gate}.scales").view(np.float16)
    assert 2**-9 <= scales.min() and scales.max() < 2**-8
    first = file.raw(f"{gate}.qweight").tobytes()
    assert checkpoint.main([*words, "--seed", "1"]) == 0
    other = read_safetensors(tmp_path / "m/model-00001-of-00003.safetensors").raw(f"{gate}.qweight").tobytes()
    assert checkpoint.main(words) == 0
    again = read_safetensors(tmp_path / "m/model-00001-of-00003.safetensors").raw(f"{gate}.qweight").tobytes()
    assert first == again != other


def test_keep_means_this_very_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["toy", "--out", str(tmp_path), "--keep"]
    assert checkpoint.main(words) == 0 and "GiB" in capsys.readouterr().out
    assert checkpoint.main(words) == 0 and "there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        checkpoint.main([*words, "--layers", "1"])
    assert "another model" in capsys.readouterr().err


def test_the_shapes_of_the_bars() -> None:
    eight = checkpoint.SHAPES["llama-3.1-8b"]
    tensors = {t.name: t for part in checkpoint.files(eight, True, "F16") for t in part}
    assert tensors["model.layers.31.mlp.gate_proj.qweight"].shape == (4096, 14336 // 8)
    assert tensors["model.layers.0.self_attn.k_proj.scales"].shape == (32, 1024)
    assert 5.2 < sum(t.nbytes for t in tensors.values()) / 2**30 < 5.5
    with pytest.raises(ValueError, match="multiples"):
        checkpoint.write(Path(), checkpoint.Shape(1, 96, 2, 2, 96, 512), True, "F16", 1)
