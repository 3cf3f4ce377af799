"""The memory plan of quantized checkpoints: on the CPU the bytes that the backend packs, on a card those of its layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.target import FEATURES
from engine.models.decoder import Decoder
from engine.models.shard import largest_share
from engine.models.spec import load_spec
from engine.parallel import Ranks
from engine.plan import memory_parts
from engine.plan_cuda import CardWeights, card_weights, eight_bit_kind, eight_bit_workspace, padded_inputs
from engine.weight_files import take_stock
from engine.weights import open_checkpoint
from tests.fixtures.quantized import FORMS, quantized_checkpoint


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_of_the_cpu_is_what_is_packed(form: str, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(tmp_path, form, layers=1)
    spec = load_spec(path)
    backend = CpuBackend(spec, "bfloat16", 1)
    try:
        decoder = Decoder(spec, open_checkpoint(path, spec), backend, Ranks(), session_len=64, exact=False)
    finally:
        backend.close()
    layer = decoder.layers[0]
    held = {
        "attention": layer.qkv.weight.packed.nbytes + layer.o.weight.packed.nbytes,
        "mlp": layer.gate_up.weight.packed.nbytes + layer.down.weight.packed.nbytes,
    }
    planned = memory_parts(path, spec, dtype="bfloat16")
    for part, nbytes in held.items():
        # scales that float16 holds take less than the plan says, and 8 bits without a zero point are counted as 16
        least = 0.5 if form == "GPTQ 8 bits" else 0.8
        assert least * planned[part] <= nbytes <= 1.001 * planned[part], (part, nbytes, planned)


def weights_of(path: Path, tp: int = 1, cc: tuple[int, int] = (9, 0), dtype: str = "bfloat16") -> CardWeights:
    spec = load_spec(path)
    return card_weights(take_stock(path, spec), spec, largest_share(spec, tp), tp, dtype=dtype, cc=cc)


def test_what_a_card_holds(tmp_path: Path) -> None:
    h, kv, inner = 256, 128, 512
    shapes = {"attention": ((h + 2 * kv, h), (h, h)), "mlp": ((2 * inner, h), (h, inner))}

    def total(part: str, nbytes: float, each_row: float = 0.0) -> int:
        return round(sum(n * k * nbytes + n * each_row for n, k in shapes[part])) * 2  # layers

    for form, attention, mlp in (
        ("W8A8", total("attention", 1, 4), total("mlp", 1, 4)),
        ("FP8 a channel", total("attention", 1, 4), total("mlp", 1, 4)),
        ("GPTQ v1", total("attention", 0.5 + 4 / 32), total("mlp", 0.5 + 4 / 32)),
        ("packed int8", total("attention", 2), total("mlp", 2)),
    ):
        path, _ = quantized_checkpoint(tmp_path / form.replace(" ", "-"), form, hidden=h)
        found = weights_of(path)
        assert (found.parts["attention"], found.parts["mlp"]) == (attention, mlp), form
        assert bool(found.eight_bit) == (form in ("W8A8", "FP8 a channel"))
        if form == "FP8 a channel":  # a card before Ada, or float16: 16 bits
            for other in (weights_of(path, cc=(8, 0)), weights_of(path, dtype="float16")):
                assert other.parts["mlp"] == total("mlp", 2) and not other.eight_bit
    path, _ = quantized_checkpoint(tmp_path / "blocks", "FP8 blocks", hidden=h)
    found = weights_of(path)
    width = padded_inputs("fp8 blocks", h)
    assert width == 512
    assert found.parts["mlp"] == 2 * (2 * inner * width + 4 * (2 * inner // 128) * (width // 128) + h * 512 + 4 * (h // 128) * 4)
    assert weights_of(path, cc=(8, 9)).parts["mlp"] == total("mlp", 2)  # blocks are Hopper's
    assert weights_of(path, tp=2).eight_bit  # 128 rows of each
    path, _ = quantized_checkpoint(tmp_path / "order", "GPTQ v1 act-order", hidden=h)
    assert weights_of(path).ordered == inner


def test_kinds_and_their_buffers() -> None:
    assert eight_bit_kind("int8", 4096, 4096, (8, 0), "float16", False) == "int8"
    assert eight_bit_kind("int8", 4096, 4104, (9, 0), "float16", False) == ""
    assert eight_bit_kind("fp8 blocks", 4096, 4096, (9, 0), "bfloat16", False) == ""
    assert eight_bit_workspace((), 8192) == 0
    products = (("int8", 28672, 4096), ("int8", 4096, 14336))
    assert eight_bit_workspace(products, 8192) == 8196 * (14336 + 4) + 4 * 1024 * 28672
    blocks = (("fp8 blocks", 4096, 14336),)
    assert eight_bit_workspace(blocks, 64) == 68 * (14336 + 4 * 112) + 2 * 4 * 4096


@pytest.mark.skipif(not FEATURES.int8_dot, reason="this CPU has no vpdpbusd: int8 weights are dequantized")
def test_int8_takes_a_byte_an_element(tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(tmp_path, "W8A8", layers=1)
    planned = memory_parts(path, load_spec(path), dtype="bfloat16")["mlp"]
    assert planned == pytest.approx(3 * 128 * 256, rel=0.07)
