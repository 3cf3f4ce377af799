"""Checkpoints: the same model from every format, slices, and strictness both ways."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine import pieces, w4, w8, weights
from engine.errors import ModelError
from engine.models.families import HF_NAMES
from engine.models.spec import FAMILIES, ModelSpec, load_spec
from engine.w4 import W4
from engine.w8 import W8
from engine.weight_files import expected_shapes, file_name, take_stock
from engine.weights import Checkpoint, open_checkpoint
from formats.gguf import TYPES
from tests.fixtures.stories import stories260k_to_hf
from tests.fixtures.toy import save_tensors, toy_checkpoint, toy_gguf, toy_weights

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def opened(path: Path) -> tuple[ModelSpec, Checkpoint]:
    spec = load_spec(path)
    return spec, open_checkpoint(path, spec)


def load_all(spec: ModelSpec, checkpoint: Checkpoint, dense: bool = True) -> dict[str, torch.Tensor | W4 | W8]:
    out: dict[str, torch.Tensor | W4 | W8] = {}
    for name in expected_shapes(spec):
        base, suffix = name.rsplit(".", 1)
        out[name] = checkpoint.bias(base) if suffix == "bias" else checkpoint.weight(base, dense=dense)
    return out


def as_float(weight: torch.Tensor | W4 | W8) -> np.ndarray:
    if isinstance(weight, W4):
        return w4.dequantize(weight)
    return w8.dequantize(weight) if isinstance(weight, W8) else weight.float().numpy()


# ---- what is read


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, shards", [("float32", 1), ("bfloat16", 3), ("float16", 2)])
def test_safetensors(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    path = toy_checkpoint(tmp_path / "x", family, dtype=dtype, shards=shards, attention_bias=family == "llama", mlp_bias=family == "llama")
    spec, checkpoint = opened(path)
    loaded = load_all(spec, checkpoint)
    checkpoint.finish()
    for name, expected in toy_weights(spec).items():
        tensor = loaded[name]
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == getattr(torch, dtype)
        expected = torch.from_numpy(expected).to(tensor.dtype)
        if (family, name) == ("baichuan", "lm_head.weight"):
            expected = (expected.float() / expected.float().square().sum(dim=1, keepdim=True).sqrt()).to(tensor.dtype)
            torch.testing.assert_close(tensor, expected, rtol=2 * torch.finfo(tensor.dtype).eps, atol=0)
        else:
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.gguf])
@pytest.mark.parametrize("kind", DENSE)
def test_gguf_holds_the_same_model_as_safetensors(tmp_path: Path, family: str, kind: str) -> None:
    """The reordering of q and k, and their biases, is undone where the converter does it."""
    extra = {"attention_bias": True} if family == "llama" else {}
    spec, checkpoint = opened(toy_gguf(tmp_path / "x.gguf", family, types=kind, **extra))
    expected = toy_weights(spec)
    assert spec.qkv_bias == (family != "qwen3")
    for name, tensor in load_all(spec, checkpoint).items():
        assert isinstance(tensor, torch.Tensor)
        dtype = DENSE[kind] if tensor.ndim == 2 else torch.float32
        torch.testing.assert_close(tensor, torch.from_numpy(expected[name]).to(dtype), rtol=0, atol=0)
    checkpoint.finish()


@pytest.mark.parametrize("kind", [k for k in TYPES if k not in DENSE])
def test_quantized_types(tmp_path: Path, kind: str) -> None:
    """Every element equals the package's; dense ones are its float32 numbers rounded to float16."""
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types=kind, hidden=256, layers=1)
    spec, checkpoint = opened(path)
    stock = take_stock(path, spec)
    form = W4 if kind in ("Q4_0", "Q4_1", "Q4_K") else W8 if kind in ("Q5_0", "Q8_0") else torch.Tensor
    for name, shape in expected_shapes(spec).items():
        if len(shape) == 1:
            continue
        stored = stock[name]
        raw = np.array(stored.file.raw(stored.name)).reshape(shape[0], -1)
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        halves = torch.from_numpy(expected).to(torch.float16)
        weight = checkpoint.weight(name.removesuffix(".weight"))
        assert isinstance(weight, form)
        np.testing.assert_array_equal(as_float(weight), expected if form is not torch.Tensor else halves.float().numpy())
        dense = checkpoint.weight(name.removesuffix(".weight"), dense=True)
        assert isinstance(dense, torch.Tensor) and dense.dtype == torch.float16 and dense.is_contiguous()
        torch.testing.assert_close(dense, halves, rtol=0, atol=0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dense", [True, False])
def test_slices_equal_the_sliced_whole(tmp_path: Path, kind: str, dense: bool) -> None:
    spec, checkpoint = opened(toy_gguf(tmp_path / "x.gguf", types=kind, hidden=512, heads=4, layers=1, vocab_size=260))
    for name in ("embed", "layers.0.q", "layers.0.k", "layers.0.down"):
        whole = as_float(checkpoint.weight(name, dense=True))
        for rows in (slice(0, 128), slice(128, 256), slice(3, 77), slice(5, 6), slice(None)):
            part = checkpoint.weight(name, rows=rows, dense=dense)
            np.testing.assert_array_equal(half(part), whole[rows])
        for columns in (slice(0, 256), slice(32, 288), slice(256, 512), slice(7, 300), slice(1, 2)):
            part = checkpoint.weight(name, columns=columns, dense=dense)
            np.testing.assert_array_equal(half(part), whole[:, columns])
        both = checkpoint.weight(name, rows=slice(2, 9), columns=slice(64, 128), dense=dense)
        np.testing.assert_array_equal(half(both), whole[2:9, 64:128])


def half(weight: torch.Tensor | W4 | W8) -> np.ndarray:
    """As `dense=True` would have rounded it."""
    return weight.float().numpy() if isinstance(weight, torch.Tensor) else as_float(weight).astype(np.float16).astype(np.float32)


def test_grouped_slices_stay_grouped(tmp_path: Path) -> None:
    _, checkpoint = opened(toy_gguf(tmp_path / "x.gguf", types="Q4_K", hidden=512, layers=1))
    part = checkpoint.weight("layers.0.down", columns=slice(32, 96))
    assert isinstance(part, W4) and part.in_features == 64 and part.qweight.flags.c_contiguous
    assert isinstance(checkpoint.weight("layers.0.down", columns=slice(16, 96)), torch.Tensor)  # cuts a group in two


def test_slices_of_safetensors(tmp_path: Path) -> None:
    _, checkpoint = opened(toy_checkpoint(tmp_path / "x", "qwen2", dtype="bfloat16"))
    whole = checkpoint.weight("layers.1.q")
    torch.testing.assert_close(checkpoint.weight("layers.1.q", rows=slice(16, 48)), whole[16:48], rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.weight("layers.1.q", columns=slice(3, 5)), whole[:, 3:5], rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.bias("layers.1.q", rows=slice(16, 48)), checkpoint.bias("layers.1.q")[16:48], rtol=0, atol=0)
    part = checkpoint.weight("layers.1.q", rows=slice(0, 4))
    part.zero_()  # a copy: the file is not changed, and a second read is whole
    torch.testing.assert_close(checkpoint.weight("layers.1.q"), whole, rtol=0, atol=0)


def test_slices_read_no_more_than_they_need(tmp_path: Path) -> None:
    """A rank's rows of a 64 MiB matrix, in a process that may not hold it all."""
    spec, checkpoint = opened(toy_checkpoint(tmp_path / "x", hidden=64, layers=1, intermediate_size=1 << 18))
    before = resident_kib()
    part = checkpoint.weight("layers.0.gate", rows=slice(0, 1024))
    assert part.shape == (1024, 64) and resident_kib() - before < 16 * 1024
    assert part.untyped_storage().nbytes() == 1024 * 64 * 4


def resident_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))


# ---- views, and threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_views_are_the_file(tmp_path: Path, dtype: str, recwarn: pytest.WarningsRecorder) -> None:
    path = toy_checkpoint(tmp_path / "x", "qwen2", dtype=dtype, layers=1)
    spec, copies = opened(path)
    checkpoint = open_checkpoint(path, spec, views=True)
    expected, loaded = load_all(spec, copies), load_all(spec, checkpoint)
    checkpoint.finish()
    mapped = {name: stored.file.raw(stored.name).ctypes.data for name, stored in checkpoint._stock.items()}
    for name, tensor in loaded.items():
        assert isinstance(tensor, torch.Tensor) and tensor.data_ptr() == mapped[name]
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    part = checkpoint.weight("layers.0.down", rows=slice(8, 16), columns=slice(3, 9))
    assert isinstance(part, torch.Tensor) and part.stride() == (128, 1)
    torch.testing.assert_close(part, expected["layers.0.down.weight"][8:16, 3:9], rtol=0, atol=0)
    del checkpoint, copies, tensor, part
    torch.testing.assert_close(loaded["embed.weight"], expected["embed.weight"], rtol=0, atol=0)  # they keep the file open
    assert not recwarn.list


def test_views_leave_it_to_the_card_to_look_for_bad_numbers(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x", layers=1, dtype="bfloat16")
    broken = tensors_of(path)
    broken["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_tensors(path, {k: v.to(torch.bfloat16) for k, v in broken.items()})
    weight = open_checkpoint(path, load_spec(path), views=True).weight("layers.0.q")
    assert isinstance(weight, torch.Tensor) and weight.isnan().sum() == 1


def test_views_of_a_gguf_file(tmp_path: Path) -> None:
    """Interleaved heads are put in order, which is a copy; the rest is the file."""
    path = toy_gguf(tmp_path / "x.gguf", types="BF16")
    spec, copies = opened(path)
    checkpoint = open_checkpoint(path, spec, views=True)
    for name in ("layers.0.q", "layers.1.k", "layers.1.down", "embed"):
        torch.testing.assert_close(checkpoint.weight(name), copies.weight(name), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_0", "Q8_0", "Q6_K"])
def test_several_threads_convert_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _, checkpoint = opened(toy_gguf(tmp_path / "x.gguf", "qwen2", types=kind, hidden=256, layers=1, vocab_size=259))
    names = ("embed", "layers.0.q", "layers.0.down")
    alone = [as_float(checkpoint.weight(name, columns=slice(32, 224))) for name in names]
    monkeypatch.setattr(pieces, "usable_cores", lambda: 4)
    monkeypatch.setattr(weights, "CHUNK", 2000)
    monkeypatch.setattr(weights, "GROUPED_CHUNK", 2000)
    for name, expected in zip(names, alone, strict=True):
        np.testing.assert_array_equal(as_float(checkpoint.weight(name, columns=slice(32, 224))), expected)


def test_an_error_of_one_thread_is_everybodys() -> None:
    def convert(part: slice) -> None:
        if part.start == 64:
            raise ModelError("this one")

    with pytest.raises(ModelError, match="this one"):
        pieces.in_pieces(convert, 100, 8)


# ---- strictness


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {file_name(name, HF_NAMES): torch.from_numpy(array) for name, array in toy_weights(load_spec(path)).items()}


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        opened(path)
    return str(caught.value)


def test_finish_lists_what_was_not_used(tmp_path: Path) -> None:
    spec, checkpoint = opened(toy_checkpoint(tmp_path / "x", layers=1))
    for name in expected_shapes(spec):
        if name != "layers.0.up.weight":
            checkpoint.weight(name.removesuffix(".weight"))
    with pytest.raises(ModelError, match=r"1 parameters were never loaded: layers\.0\.up\.weight"):
        checkpoint.finish()
    checkpoint.weight("layers.0.up")
    checkpoint.finish()
    with pytest.raises(ModelError, match="no such parameter"):
        checkpoint.weight("layers.7.up")
    with pytest.raises(ModelError, match="no such parameter"):
        checkpoint.bias("layers.0.up")


def test_missing_and_left_over(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    good = tensors_of(path)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        save_tensors(path, {k: v for k, v in good.items() if k != name})
        assert refusal(path) == f"model.safetensors: missing: {name}"
    save_tensors(path, good | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1), "evil\x1b[31m\n": torch.zeros(1)})
    message = refusal(path)
    assert message.startswith("model.safetensors: tensors that the model's configuration has no use for: ")
    assert "model.layers.2.mlp.up_proj.weight" in message and "evil\\x1b[31m\\x0a" in message
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "model.rotary_emb.inv_freq": torch.zeros(8)}
    save_tensors(path, good | derived)
    opened(path)


def test_wrong_shape_and_type(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    good = tensors_of(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_tensors(path, good | {name: torch.zeros(64, 63)})
    assert refusal(path) == f"model.safetensors: {name}: shape (64, 63), the model's configuration wants (64, 64)"
    for dtype in (torch.float64, torch.int8, torch.int32, torch.float8_e4m3fn):
        save_tensors(path, good | {name: torch.zeros(64, 64).to(dtype)})
        assert "is not supported here; supported: F32, F16, BF16" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, dtype: str) -> None:
    path = toy_checkpoint(tmp_path / "x", layers=1, dtype=dtype)
    good = tensors_of(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    good[name][3, 5] = value
    save_tensors(path, {k: v.to(getattr(torch, dtype)) for k, v in good.items()})
    _, checkpoint = opened(path)
    with pytest.raises(ModelError, match=f"model.safetensors: {name}: holds a number that is not finite"):
        checkpoint.weight("layers.0.q")
    checkpoint.weight("layers.0.k")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0", "Q6_K", "IQ2_XXS"])
@pytest.mark.parametrize("dense", [True, False])
def test_scales_that_are_not_finite(tmp_path: Path, kind: str, dense: bool) -> None:
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types=kind, hidden=256, layers=1)
    spec = load_spec(path)
    stored = take_stock(path, spec)["layers.0.v.weight"]
    at = stored.file.tensors[stored.name].offset + (208 if kind == "Q6_K" else 0)
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7e"  # a float16 NaN
    path.write_bytes(data)
    with pytest.raises(ModelError, match="x.gguf: blk.0.attn_v.weight: .*finite"):
        open_checkpoint(path, spec).weight("layers.0.v", dense=dense)


def test_tied_embeddings(tmp_path: Path) -> None:
    """A copy of the head in the file is passed over, as transformers does."""
    path = toy_checkpoint(tmp_path / "x", tie_word_embeddings=True)
    good = tensors_of(path)
    assert "lm_head.weight" not in good
    save_tensors(path, good | {"lm_head.weight": torch.zeros(260, 64)})
    _, checkpoint = opened(path)
    with pytest.raises(ModelError, match="no such parameter"):
        checkpoint.weight("lm_head")


@pytest.mark.parametrize(
    "file",
    ["../model-00001-of-00002.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".hidden.safetensors", "x\n.safetensors", 7, None],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, file: object) -> None:
    path = toy_checkpoint(tmp_path / "x", shards=2)
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["lm_head.weight"] = file
    index_file.write_text(json.dumps(index))
    assert "is not the name of a safetensors file beside the index" in refusal(path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x", shards=2)
    index_file = path / "model.safetensors.index.json"
    good = json.loads(index_file.read_text())

    def with_map(change: dict[str, str | None]) -> None:
        index_file.write_text(json.dumps({"weight_map": {k: v for k, v in (good["weight_map"] | change).items() if v is not None}}))

    first, second = sorted(set(good["weight_map"].values()))
    moved = next(name for name, file in good["weight_map"].items() if file == first)
    with_map({moved: second})
    assert "does not agree" in refusal(path) and moved in refusal(path)
    with_map({moved: None})
    assert "does not agree" in refusal(path)
    with_map({"extra": first})
    assert "does not agree" in refusal(path)
    with_map({"extra": "absent.safetensors"})
    assert refusal(path).startswith("absent.safetensors: No such file")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index_file.write_text(text)
        assert "weight_map" in refusal(path)
    index_file.write_text("{")
    assert refusal(path).startswith("model.safetensors.index.json: ")
    index_file.unlink()
    assert "other formats of weights are not read" in refusal(path)


def test_gguf_strictness(tmp_path: Path) -> None:
    """A qwen2 file read with a spec that wants something else."""
    import dataclasses

    path = toy_gguf(tmp_path / "x.gguf", "qwen2")
    spec = load_spec(path)
    for change, reason in (
        ({"num_layers": 3}, "missing: blk.2.attn_norm.weight"),
        ({"num_layers": 1}, "has no use for: blk.1."),
        ({"qkv_bias": False}, "has no use for: blk.0.attn_k.bias"),
        ({"intermediate_size": 256}, "shape (128, 64), the model's configuration wants (256, 64)"),
    ):
        with pytest.raises(ModelError) as caught:
            open_checkpoint(path, dataclasses.replace(spec, **change))
        assert str(caught.value).startswith("x.gguf: ") and reason in str(caught.value)


# ---- real files


def test_stories260k_becomes_a_directory(assets: Path, tmp_path: Path) -> None:
    source = assets / "models" / "stories260K"
    path = stories260k_to_hf(source / "stories260K.bin", source / "tok512.model", tmp_path / "hf")
    spec, checkpoint = opened(path)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (5, 8, 4, 8, 512)
    loaded = load_all(spec, checkpoint)
    checkpoint.finish()
    flat = np.fromfile(source / "stories260K.bin", "<f4", offset=28)
    np.testing.assert_array_equal(as_float(loaded["embed.weight"]).ravel(), flat[: 512 * 64])
    # head 0 of q in layer 0: pairs 2 i, 2 i + 1 in the file, i and i + 4 here
    q = flat[512 * 64 + 5 * 64 :][: 64 * 64].reshape(64, 64)
    np.testing.assert_array_equal(as_float(loaded["layers.0.q.weight"])[:8], q[[0, 2, 4, 6, 1, 3, 5, 7]])


def test_smollm2(smollm2: Path) -> None:
    started = time.process_time()
    spec, checkpoint = opened(smollm2)
    loaded = load_all(spec, checkpoint, dense=False)
    checkpoint.finish()
    assert time.process_time() - started < 2  # 0.2 s of one core where it was measured
    assert isinstance(loaded["embed.weight"], W8) and isinstance(loaded["layers.29.down.weight"], W4)
    stored = take_stock(smollm2, spec)["layers.7.q.weight"]
    raw = np.array(stored.file.raw(stored.name)).reshape(576, -1)
    rows = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1).reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    np.testing.assert_array_equal(as_float(loaded["layers.7.q.weight"]), rows)


def test_tinyllama_rows(tinyllama: Path) -> None:
    spec, checkpoint = opened(tinyllama)
    stock = take_stock(tinyllama, spec)
    for name in ("layers.0.gate", "layers.21.down", "layers.3.v", "embed"):
        stored = stock[f"{name}.weight"]
        raw = np.array(stored.file.raw(stored.name)).reshape(stored.shape[0], -1)[100:130]
        expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored.type])).to(torch.float16)
        torch.testing.assert_close(checkpoint.weight(name, rows=slice(100, 130), dense=True), expected, rtol=0, atol=0)
