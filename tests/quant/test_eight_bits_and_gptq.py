"""`lite auto_gptq`, `smooth_quant`, `calibrate`, `kv_qparams`: their files against readers written from the descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from cli.main import main
from engine.models.families import HF_NAMES
from engine.models.spec import load_spec
from engine.weight_files import expected_shapes, file_name
from engine.weights import open_checkpoint
from quant.forward import SITES, Float32Model
from quant.gptq import compensated
from quant.groups import output_error, round_groups
from quant.threads import SERIAL, one_thread_an_operation
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.toy import toy_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toy operations split over cores wait for each other longer than they take."""
    with one_thread_an_operation(torch.device("cpu")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toy_checkpoint(tmp_path_factory.mktemp("methods") / "m", "qwen2", dtype="bfloat16", layers=2)
    byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": "".join(chr(97 + int(c)) for c in rng.integers(0, 26, 90))}]} for _ in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def lite(command: str, source: Path, out: Path, text: Path, *flags: str) -> Path:
    words = ["lite", command, str(source), "--work-dir", str(out), "--calib-dataset", str(text)]
    assert main([*words, "--calib-samples", "5", "--calib-seqlen", "40", "--device", "cpu", *flags]) == 0
    return out


def linears(source: Path) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Name in the file -> (weight of the source, its shape)."""
    tensors = load_torch(source / "model.safetensors")
    out = {}
    for canonical, shape in expected_shapes(load_spec(source)).items():
        if len(shape) == 2 and canonical not in ("embed.weight", "lm_head.weight"):
            name = file_name(canonical, HF_NAMES)
            out[name.removesuffix(".weight")] = (tensors[name].float(), shape)
    return out


# ---- GPTQ


def gptq_values(tensors: dict[str, np.ndarray], linear: str) -> np.ndarray:
    """float32 [N, K], from the description of version 1: nibbles along K, zeros along N and one too small."""
    words, zeros, scales = (tensors[f"{linear}.{name}"] for name in ("qweight", "qzeros", "scales"))
    k, n = len(words) * 8, words.shape[1]
    out = np.empty((n, k), np.float32)
    for i in range(k):
        group = int(tensors[f"{linear}.g_idx"][i])
        for j in range(n):
            q = int(words[i // 8, j]) >> (4 * (i % 8)) & 15
            zero = (int(zeros[group, j // 8]) >> (4 * (j % 8)) & 15) + 1
            out[j, i] = np.float32(scales[group, j]) * (q - zero)
    return out


@pytest.mark.parametrize("samples", ["5", "0"])
def test_gptq_is_in_the_layout_of_version_1(samples: str, source: Path, jsonl: Path, tmp_path: Path) -> None:
    out = lite("auto_gptq", source, tmp_path / "gptq", jsonl, "--w-group-size", "32", "--calib-samples", samples)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["checkpoint_format"], said["bits"], said["group_size"]) == ("gptq", "gptq", 4, 32)
    assert said["sym"] is True and said["desc_act"] is False
    tensors = {
        name: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
        for name, t in load_torch(out / "model.safetensors").items()
    }
    for linear, (weight, (n, k)) in linears(source).items():
        assert tensors[f"{linear}.qweight"].shape == (k // 8, n) and tensors[f"{linear}.qzeros"].shape == (k // 32, n // 8)
        assert (tensors[f"{linear}.qzeros"].view(np.uint32) == 0x77777777).all()
        values = gptq_values(tensors, linear)
        plain = round_groups(weight, 32, symmetric=True).values().numpy()
        if samples == "0":
            np.testing.assert_array_equal(values, plain)
        else:
            assert np.abs(values - weight.numpy()).max() < 0.35 and not np.array_equal(values, plain)
        if "q_proj" in linear:
            assert f"{linear}.bias" in tensors
    if samples != "0":
        for layer in json.loads((out / "quantize.json").read_text())["layers"]:
            assert all(layer[site]["error"] < 0.9 * layer[site]["error_nearest"] for site in SITES), layer


def test_gptq_column_by_column_is_the_papers() -> None:
    """Against the obvious way: after each column, the rest is the least-squares answer to what is left."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 64, dtype=torch.float64), torch.randn(300, 64, dtype=torch.float64) / 3
    x += torch.randn(300, 8, dtype=torch.float64) @ torch.randn(8, 64, dtype=torch.float64)  # as real inputs: few directions
    gram = (x.T @ x).float()
    got = compensated(weight.float(), gram, 32, SERIAL, "w")
    damped = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(64, dtype=torch.float64)
    left, codes = weight.clone(), []
    for k in range(64):
        if k % 32 == 0:
            scale = (left[:, k : k + 32].abs().amax(1) * 2 / 15).half().double()
        code = (torch.round(left[:, k] / scale) + 8).clamp(0, 15)
        codes.append(code)
        error = left[:, k] - (code - 8) * scale
        rest = damped[k + 1 :, k + 1 :]
        if len(rest):
            left[:, k + 1 :] += torch.outer(error, torch.linalg.solve(rest, damped[k + 1 :, k]))
    same = (got.q.double() == torch.stack(codes, 1)).double().mean()
    assert same > 0.99  # float32 and float64 may part at a tie
    plain = round_groups(weight.float(), 32, symmetric=True).values()
    assert output_error(got.values() - weight.float(), gram).sum() < 0.7 * output_error(plain - weight.float(), gram).sum()


# ---- W8A8


@pytest.mark.parametrize(("kind", "dtype", "largest"), [("int8", torch.int8, 127), ("fp8", torch.float8_e4m3fn, 448)])
def test_w8a8_is_a_compressed_tensors_checkpoint(
    kind: str, dtype: torch.dtype, largest: int, source: Path, jsonl: Path, tmp_path: Path
) -> None:
    out = lite("smooth_quant", source, tmp_path / kind, jsonl, "--quant-dtype", kind)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert said["quant_method"] == "compressed-tensors" and said["ignore"] == ["lm_head"]
    assert said["format"] == {"int8": "int-quantized", "fp8": "float-quantized"}[kind]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["input_activations"]["dynamic"] is True
    tensors = load_torch(out / "model.safetensors")
    norms = {name: t.float() for name, t in tensors.items() if "layernorm" in name}
    plain = load_torch(source / "model.safetensors")
    for linear, (weight, (n, k)) in linears(source).items():
        q, scale = tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"]
        assert (q.dtype, q.shape) == (dtype, (n, k)) and (scale.dtype, scale.shape) == (torch.bfloat16, (n, 1))
        assert q.float().abs().amax() <= largest and float(q.float().abs().amax(1).min()) > 0.9 * largest
        values = q.float() * scale.float()
        if any(part in linear for part in ("q_proj", "k_proj", "gate_proj")):  # their rows were not divided
            norm = linear.rsplit(".", 2)[0] + (".input_layernorm" if "_attn" in linear else ".post_attention_layernorm") + ".weight"
            back = values * norms[norm] / plain[norm].float()
            assert float((back - weight).abs().max()) < 0.07 * float(weight.abs().max())
    for layer in json.loads((out / "quantize.json").read_text())["layers"]:
        assert all(layer[site]["error"] <= layer[site]["error_plain"] and layer[site]["error"] < 0.003 for site in SITES)


def test_a_type_that_nobody_reads_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "smooth_quant", str(source), "--quant-dtype", "float8_e5m2"]) == 2
    assert "has no such type; use fp8" in capsys.readouterr().err


# ---- calibration and static KV scales


def test_calibrate_sees_what_the_layers_see(source: Path, jsonl: Path, tmp_path: Path) -> None:
    out = lite("calibrate", source, tmp_path / "stats", jsonl)
    stats, manifest = load_file(out / "calibration.safetensors"), json.loads((out / "calibration.json").read_text())
    assert manifest["calibration"]["samples"] == 5 and manifest["layers"] == 2
    spec = load_spec(source)
    assert stats["layers.1.key.min"].shape == (spec.num_kv_heads, spec.head_dim)
    assert (stats["layers.0.value.absmax"] == np.maximum(-stats["layers.0.value.min"], stats["layers.0.value.max"])).all()
    windows = _windows(source, jsonl)
    model = Float32Model(open_checkpoint(source, spec), spec, torch.device("cpu"), 40)
    x = torch.from_numpy(np.stack(list(model.embed(windows))))
    seen: dict[str, torch.Tensor] = {}
    model.run(model.load(0), x, lambda site, value: seen.__setitem__(site, value))
    for name, site in (("self_attn.q_proj", "qkv"), ("self_attn.o_proj", "o"), ("mlp.up_proj", "gate_up"), ("mlp.down_proj", "down")):
        np.testing.assert_allclose(stats[f"model.layers.0.{name}.input.absmax"], seen[site].abs().amax(0).numpy(), rtol=1e-5)
        np.testing.assert_allclose(stats[f"model.layers.0.{name}.input.absmean"], seen[site].abs().mean(0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(stats["layers.0.key.max"], seen["k"].amax(0).numpy(), rtol=1e-5)


def _windows(source: Path, text: Path) -> np.ndarray:
    from quant.corpus import load_windows
    from text.tokenizer import load_tokenizer

    return load_windows(str(text), load_tokenizer(source), 5, 40).ids


@pytest.mark.parametrize("symmetric", ["False", "True"])
def test_kv_qparams_are_turbominds(symmetric: str, source: Path, jsonl: Path, tmp_path: Path) -> None:
    stats = lite("calibrate", source, tmp_path / "stats", jsonl)
    weights = tmp_path / "weights"
    weights.mkdir()
    command = ["lite", "kv_qparams", "--work_dir", str(stats), "--turbomind_dir", str(weights), "--kv_sym", symmetric, "--num_tp", "2"]
    assert main(command) == 0
    assert sorted(p.name for p in weights.iterdir()) == [f"layers.{i}.past_kv_scale.{r}.weight" for i in range(2) for r in range(2)]
    numbers = np.frombuffer((weights / "layers.1.past_kv_scale.1.weight").read_bytes(), "<f4")
    found = load_file(stats / "calibration.safetensors")
    key, value = ({what: found[f"layers.1.{name}.{what}"][1:] for what in ("min", "max", "absmax")} for name in ("key", "value"))
    if symmetric == "True":
        np.testing.assert_allclose(numbers, [key["absmax"].max() / 127, value["absmax"].max() / 127], rtol=1e-6)
    else:
        expected: list[Any] = [v for x in (key, value) for v in ((x["max"].max() - x["min"].min()) / 255, x["min"].min())]
        np.testing.assert_allclose(numbers, expected, rtol=1e-6)
    assert main([*command, "--num-tp", "3"]) == 2
