"""`lite auto_awq`: the bytes against a reader written from the layout's description, the folding, kills, disks, and served ids."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import quant.disk
import quant.job
from cli.main import main
from engine.models.families import FAMILIES
from engine.models.spec import load_spec
from engine.sequence import SamplingParams
from engine.weight_files import expected_shapes, file_name
from engine.weights import open_checkpoint
from quant.auto_awq import fold, shared_owner
from quant.awq_search import find_scales
from quant.forward import SITES, Float32Model
from quant.passes import Observer, Wanted
from quant.threads import one_thread_an_operation
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.toy import save_tensors, toy_checkpoint, toy_gguf
from tests.harness import answers, configure, running


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toy operations split over cores wait for each other longer than they take."""
    with one_thread_an_operation(torch.device("cpu")):
        yield


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run", "far", "away", "while", "it", "rained"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(7)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 9)) for _ in range(400)))
    return path


def model(path: Path, family: str = "llama", **more: Any) -> Path:
    path = toy_checkpoint(path, family, **{"dtype": "float16"} | more)
    byte_tokenizer(path)
    return path


def made(source: Path, out: Path, text: Path | str, *flags: str) -> Path:
    calibration = ["--calib-dataset", str(text), "--calib-samples", "6", "--calib-seqlen", "48", "--device", "cpu"]
    assert main(["lite", "auto_awq", str(source), "--work-dir", str(out), "--w-group-size", "32", *calibration, *flags]) == 0
    return out


def unpacked(words: np.ndarray) -> np.ndarray:
    """int32 [R, N / 8] -> [R, N], from the description: nibbles hold output channels 0 2 4 6 1 3 5 7 of eight, low to high."""
    out = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[row, 8 * column + channel] = int(words[row, column]) >> (4 * nibble) & 15
    return out


def dequantized(tensors: dict[str, np.ndarray], linear: str) -> np.ndarray:
    """float32 [N, K], as transformers' AWQ loader computes it: (q - zero) * scale of each input row's group."""
    q, zeros, scales = unpacked(tensors[f"{linear}.qweight"]), unpacked(tensors[f"{linear}.qzeros"]), tensors[f"{linear}.scales"]
    group = len(q) // len(scales)
    return ((q - zeros.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)).T.astype(np.float32)


def tree(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*")) if p.is_file()}


# ---- the layout


@pytest.mark.parametrize("flags", [[], ["--w-sym"], ["--no-search-scale"], ["--calib-samples", "0"]])
def test_every_linear_is_in_awqs_gemm_layout(flags: list[str], tmp_path: Path, text: Path) -> None:
    source = model(tmp_path / "m")
    out = made(source, tmp_path / "awq", text, *flags)
    spec, plain = load_spec(out), load_spec(source)
    assert spec.awq is not None and spec.awq.group_size == 32
    tensors, checkpoint = load_file(out / "model.safetensors"), open_checkpoint(out, spec)
    for canonical, shape in expected_shapes(plain).items():
        name = file_name(canonical, FAMILIES[spec.family].names)
        if len(shape) == 2 and canonical not in ("embed.weight", "lm_head.weight"):
            linear = name.removesuffix(".weight")
            n, k = shape
            assert tensors[f"{linear}.qweight"].shape == (k, n // 8) and tensors[f"{linear}.qweight"].dtype == np.int32
            assert tensors[f"{linear}.qzeros"].shape == (k // 32, n // 8)
            assert tensors[f"{linear}.scales"].shape == (k // 32, n) and tensors[f"{linear}.scales"].dtype == np.float16
            values = checkpoint.weight(canonical.removesuffix(".weight"), dense=True).float().numpy()
            np.testing.assert_array_equal(values, dequantized(tensors, linear).astype(np.float16).astype(np.float32))
            if "--w-sym" in flags:
                assert (tensors[f"{linear}.qzeros"].view(np.uint32) == 0x88888888).all()
        else:
            assert tensors[name].shape == shape
    manifest = json.loads((out / "quantize.json").read_text())
    assert manifest["method"] == "awq" and manifest["bits"] == 4 and manifest["group_size"] == 32
    assert len(manifest["layers"]) == spec.num_layers
    if flags[:1] != ["--calib-samples"]:
        assert len(manifest["calibration"]["sha256"]) == 64
        assert all(layer[site]["error"] < 0.05 for layer in manifest["layers"] for site in ("qkv", "o", "gate_up", "down"))
    assert not (out / "work").exists() and not out.with_name("awq.partial").exists()


# ---- the numbers


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """float32 [T, vocab] by the reference backend's equations, from what the loader reads."""
    spec = load_spec(path)
    checkpoint = open_checkpoint(path, spec)
    float_model = Float32Model(checkpoint, spec, torch.device("cpu"), len(ids))
    x = torch.from_numpy(np.stack(list(float_model.embed(ids[None]))))
    for i in range(spec.num_layers):
        x = float_model.run(float_model.load(i), x)
    norm = checkpoint.weight("final_norm", dense=True).float()
    head = checkpoint.weight("embed" if spec.tie_word_embeddings else "lm_head", dense=True).float()
    return (float_model.backend.rms_norm(x[0], norm, spec.rms_norm_eps) @ head.T).numpy()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("internlm2", {}),
        ("qwen", {}),
        ("baichuan", {}),
        ("mistral", {"sliding_window": 20}),
    ],
)
def test_folding_changes_nothing_but_the_rounding(family: str, more: dict[str, Any], tmp_path: Path, text: Path) -> None:
    """Before rounding, each layer gives what it gave; after it, the whole copy is near the model (a mixed-up row would show)."""
    source = model(tmp_path / "m", family, **more)
    ids = np.random.default_rng(3).integers(1, 250, 40).astype(np.int32)
    plain = logits(source, ids)
    awq = made(source, tmp_path / "awq", text)
    assert float(np.square(logits(awq, ids) - plain).mean()) < 0.15 * float(np.square(plain).mean())
    np.testing.assert_allclose(_differences_when_folded(source), 0, atol=2e-4)


def _differences_when_folded(source: Path) -> list[float]:
    """Largest difference of each layer's output between the float layer and the folded one, its weights not rounded."""
    spec = load_spec(source)
    checkpoint = open_checkpoint(source, spec)
    float_model = Float32Model(checkpoint, spec, torch.device("cpu"), 32)
    x = torch.from_numpy(np.stack(list(float_model.embed(np.arange(64, dtype=np.int32).reshape(2, 32)))))
    differences = []
    for index in range(spec.num_layers):
        layer = float_model.load(index)
        observer = Observer(Wanted(), torch.device("cpu"), 64)
        out = float_model.run(layer, x, observer.add)
        seen = observer.inputs()
        norms, biases = dict(layer.norms), dict(layer.biases)
        divided = {site: torch.ones(len(layer.stacks[site])) for site in SITES}
        scales = {}
        for site in SITES:
            owner = shared_owner(spec, torch.device("cpu")) if site == "o" else None
            scales[site] = find_scales(layer.stacks[site], seen[site], 32, False, owner=owner).values
        by = {site: fold(layer, norms, biases, divided, spec, site, scales[site], "float16") for site in SITES}
        assert any(float((s - 1).abs().max()) > 0.01 for s in by.values())
        for site in SITES:
            layer.stacks[site].mul_(by[site])
        for name in ("input_norm", "post_norm"):
            layer.norms[name].copy_(norms[name])
        for part, bias in biases.items():
            layer.biases[part].copy_(bias)
        differences.append(float((float_model.run(layer, x) - out).abs().max()))
        x = out
    return differences


def test_scales_and_clipping_each_lower_the_error(tmp_path: Path, text: Path) -> None:
    """Inputs with outliers, as real models have them: scales must help, and clipping must not hurt."""
    source = model(tmp_path / "m")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(source / "model.safetensors").items()}
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][::16] *= 12
    save_tensors(source, tensors)
    layers = json.loads((made(source, tmp_path / "awq", text) / "quantize.json").read_text())["layers"]
    for layer in layers:
        for site in ("qkv", "gate_up"):
            assert layer[site]["error_scaled"] < 0.8 * layer[site]["error_nearest"]
        assert all(layer[site]["error"] <= layer[site]["error_scaled"] * 1.02 for site in layer)


def test_a_gguf_file_becomes_a_hugging_face_directory(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy_gguf(tmp_path / "toy.gguf", types={"q": "Q4_1", "down": "Q8_0", "embed": "F16"}, hidden=64)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    made(source, tmp_path / "awq", text, "--calib-samples", "0")
    assert "Q4_1, Q8_0 already" in capsys.readouterr().err
    spec, plain = load_spec(tmp_path / "awq"), load_spec(source)
    assert (spec.hidden_size, spec.rope, spec.eos_token_ids) == (plain.hidden_size, plain.rope, plain.eos_token_ids)
    assert (tmp_path / "awq" / "tokenizer.gguf").exists()
    ids = np.arange(1, 40, dtype=np.int32)
    a, b = logits(tmp_path / "awq", ids), logits(source, ids)
    assert np.square(a - b).mean() < 0.15 * np.square(b).mean()
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before


# ---- kills and disks


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path, text: Path) -> None:
    """Killed as soon as some layers are done, wherever it is then; then once more, a little later."""
    source = model(tmp_path / "m", layers=6)
    whole = tree(made(source, tmp_path / "whole", text))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "cli", "lite", "auto_awq", str(source), "--work-dir", str(out), "--w-group-size", "32"]
    command += ["--calib-dataset", str(text), "--calib-samples", "6", "--calib-seqlen", "48", "--device", "cpu"]
    state = out.with_name("killed.partial") / "work" / "state.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (state.exists() and json.loads(state.read_text())["layers"] >= 1) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and not (state.parent.parent / "config.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "of an earlier start kept" in done.stdout
    assert tree(out) == whole


def test_other_settings_begin_anew(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "m", layers=3)
    expected = tree(made(source, tmp_path / "expected", text, "--w-sym"))
    _stop_after(2, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped"):
        made(source, tmp_path / "out", text)
    monkeypatch.undo()
    assert tree(made(source, tmp_path / "out", text, "--w-sym")) == expected


def _stop_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = quant.job.Job._write_layer

    def stop(self: quant.job.Job, tensors: Any, index: int, result: Any) -> None:
        write(self, tensors, index, result)
        if index == layers:
            raise RuntimeError("stopped")

    monkeypatch.setattr(quant.job.Job, "_write_layer", stop)


def test_an_existing_copy_is_replaced_and_nothing_else_is(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model(tmp_path / "m")
    first = tree(made(source, tmp_path / "out", text))
    assert tree(made(source, tmp_path / "out", text, "--w-sym")) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "diary.txt").write_text("dear diary")
    for place in (mine, source, source.parent, source / "below", mine / "diary.txt", tmp_path / "other"):
        before = tree(tmp_path)
        capsys.readouterr()
        assert main(["lite", "auto_awq", str(source), "--work-dir", str(place), "--w-group-size", "32", "--calib-samples", "0"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--work-dir" in said, said
        assert tree(tmp_path) == before


@pytest.mark.parametrize("when", ["reserving", "writing", "room"])
def test_a_full_disk_is_one_line(when: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = model(tmp_path / "m", layers=3)
    before, out = tree(source), tmp_path / "out"

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if when == "reserving":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif when == "room":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    else:
        pwrite, left = os.pwrite, [40]

        def later(*args: Any) -> int:
            left[0] -= 1
            return pwrite(*args) if left[0] > 0 else full()

        monkeypatch.setattr(os, "pwrite", later)
    flags = ["--w-group-size", "32", "--calib-dataset", str(text), "--calib-samples", "4", "--calib-seqlen", "32"]
    assert main(["lite", "auto_awq", str(source), "--work-dir", str(out), *flags]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("No space left" in said or "are free" in said), said
    assert not out.exists() and not list(tmp_path.rglob("out.partial/config.json")) and tree(source) == before
    if when == "writing":
        monkeypatch.undo()
        assert tree(made(source, out, text)) == tree(made(source, tmp_path / "again", text))


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = model(tmp_path / "m")

    def read_only(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    command = ["lite", "auto_awq", str(source), "--work-dir", str(tmp_path / "out"), "--w-group-size", "32", "--calib-samples", "0"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Read-only file system" in said


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--w-bits", "8"], "--w-bits 8: AWQ's layout holds 4"),
        (["--w-group-size", "128"], "does not divide its 64 input channels; use --w-group-size 64"),
        (["--w-group-size", "48"], "supported: 32, 64, 128"),
        (["--calib-dataset", "nowhere.txt"], "neither a file nor one of wikitext2"),
        (["--calib-dataset", "ptb"], "put ptb.train.txt into .corpora"),
        (["--calib-seqlen", "4096"], "the model's sequences end at 512"),
        (["--calib-samples", "-1"], "at least 0"),
        (["--trust-remote-code"], "never runs code"),
        (["--w-groups", "32"], "did you mean --w-group-size"),
    ],
)
def test_what_cannot_be_done_is_said(flags: list[str], sentence: str, tmp_path: Path, text: Path, capsys: Any, monkeypatch: Any) -> None:
    source = model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    base = [
        "lite",
        "auto_awq",
        str(source),
        "--work-dir",
        "out",
        "--w-group-size",
        "32",
        "--calib-dataset",
        str(text),
        "--calib-samples",
        "2",
        "--calib-seqlen",
        "32",
    ]
    try:
        code = main([*base, *flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path, text: Path, capsys: Any) -> None:
    once = made(model(tmp_path / "m"), tmp_path / "once", text)
    capsys.readouterr()
    assert main(["lite", "auto_awq", str(once), "--work-dir", str(tmp_path / "twice"), "--w-group-size", "32"]) == 3
    assert "is quantized already" in capsys.readouterr().err


# ---- served


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_served_with_the_ids_of_the_dequantized_model(device: str, tmp_path: Path, text: Path) -> None:
    """A dense checkpoint of the very numbers, by the reader above, answers alike wherever the first choice is clear."""
    out = made(model(tmp_path / "m", hidden=128, layers=2), tmp_path / "awq", text)
    tensors = load_file(out / "model.safetensors")
    twin = {name: torch.from_numpy(array).float() for name, array in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    twin |= {
        f"{linear}.weight": torch.from_numpy(np.ascontiguousarray(dequantized(tensors, linear)))
        for linear in (name.removesuffix(".qweight") for name in tensors if name.endswith("qweight"))
    }
    dense = tmp_path / "dense"
    dense.mkdir()
    save_tensors(dense, twin)
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    (dense / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    prompts = [[5, 9, 200], list(range(30, 70)), [250]]
    assert _greedy(out, device, prompts) == _greedy(dense, device, prompts)


def _greedy(path: Path, device: str, prompts: list[list[int]]) -> list[list[int]]:
    config = configure(
        model={"path": str(path), "dtype": "float32"},
        engine={"device": device, "max_batch_size": 4, "session_len": 128},
        cache={"num_blocks": 40, "cache_block_seq_len": 16},
    )

    async def run() -> list[list[int]]:
        async with running(config) as started:
            return await answers(started, prompts, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), together=True)

    return asyncio.run(run())
