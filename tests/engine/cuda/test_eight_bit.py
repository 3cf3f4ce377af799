"""Activations quantized a token and 8-bit products against engine/eight_bit.py, in the emulator; outputs start as NaN."""

import numpy as np
import pytest
import torch

from engine import eight_bit, plan_cuda
from engine.cuda.eight_bit import EightBitProducts
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.quantize_rows import rows_variant, silu_variant
from engine.eight_bit import BLOCK, Float8, Int8
from engine.models.layers import to_dense
from tests.ptx.device import KERNELS, EmulatedDevice

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}


@pytest.fixture(scope="module")
def device():
    return EmulatedDevice((9, 0))


@pytest.fixture(scope="module")
def library(device):
    return Library(device, KERNELS)


def activations(rng, rows, k, dtype):
    x = rng.standard_normal((rows, k)).astype(np.float32) * (rng.random((rows, 1)).astype(np.float32) * 50 + 0.01)
    x[:, 3] *= 20  # an outlier
    x[rows // 2] *= rows < 3  # a token of zeros
    return torch.from_numpy(x).to(dtype)


def int8(rng, n, k):
    return Int8(rng.integers(-128, 128, (n, k)).astype(np.int8), (rng.random(n).astype(np.float32) + 0.5) * 0.01)


def codes(rng, n, k):
    q = rng.integers(0, 256, (n, k)).astype(np.uint8)
    q[(q & 127) == eight_bit.E4M3_NAN] = 0
    return q


def float8(rng, n, k, blocks=False):
    if not blocks:
        return Float8(codes(rng, n, k), (rng.random((n, 1)).astype(np.float32) + 0.5) * 0.01)
    scale = (rng.random((-(-n // BLOCK), -(-k // BLOCK))).astype(np.float32) + 0.5) * 0.01
    return Float8(codes(rng, n, k), np.repeat(scale, BLOCK, axis=0)[:n], blocked=True)


def quantized(x, kind):
    """float64 values of x as the kind has them."""
    wide = x.float().numpy()
    if kind == "int8":
        q, scale = eight_bit.quantize_rows(wide)
        return q.astype(np.float64) * scale[:, None]
    out = np.zeros(wide.shape)
    for at in range(0, wide.shape[1], BLOCK if kind == "fp8 blocks" else wide.shape[1]):
        part = wide[:, at : at + BLOCK] if kind == "fp8 blocks" else wide
        largest = np.abs(part).max(axis=1, keepdims=True)
        by = np.divide(np.float32(448), largest, out=np.zeros_like(largest), where=largest > 0)
        q = torch.from_numpy((part * by).clip(-448, 448)).to(torch.float8_e4m3fn).double().numpy()
        out[:, at : at + part.shape[1]] = q * (largest * np.float32(1 / 448))
    return out


CASES = [  # kind, output channels of the parts, input channels, dtype, bias
    ("int8", (48,), 64, "bfloat16", True), ("int8", (32, 16, 16), 576, "float16", False), ("int8", (16,), 4128, "bfloat16", True),
    ("fp8", (48,), 64, "bfloat16", True), ("fp8", (32, 16, 16), 576, "bfloat16", False), ("fp8", (16,), 4128, "bfloat16", False),
    ("fp8 blocks", (128,), 256, "bfloat16", True), ("fp8 blocks", (256, 128), 576, "bfloat16", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "parts", "k", "dtype", "bias"), CASES)
def test_products(library, device, kind, parts, k, dtype, bias):
    rng = np.random.default_rng(k)
    weights = [int8(rng, n, k) if kind == "int8" else float8(rng, n, k, kind == "fp8 blocks") for n in parts]
    products = EightBitProducts(library, device, dtype, 24)
    weight = products.load(weights)
    assert weight is not None and weight.kind == kind
    products.finish()
    dense = np.concatenate([eight_bit.dequantize(w) for w in weights]).astype(np.float64)
    vector = torch.from_numpy(rng.standard_normal(sum(parts)).astype(np.float32)).to(DTYPES[dtype]) if bias else None
    for rows in (24, 1, 3, 17):
        x = activations(rng, rows, k, DTYPES[dtype])
        out = torch.full((rows, sum(parts)), float("nan"), dtype=DTYPES[dtype])
        products(x, weight, out, vector.float() if bias else None, vector)
        wanted = quantized(x, kind) @ dense.T + (vector.double().numpy() if bias else 0)
        np.testing.assert_allclose(out.double().numpy(), wanted, rtol=2.1 * ROUNDING[dtype], atol=1e-4 * np.abs(wanted).max())
        exact = x.double().numpy() @ dense.T + (vector.double().numpy() if bias else 0)
        # half a step of each activation: of 127 to the largest, or of 8 to the power of two below it
        size, largest = np.abs(x.double().numpy()), np.abs(x.double().numpy()).max(axis=1, keepdims=True)
        step = (largest / 127 if kind == "int8" else np.maximum(size / 8, largest * 2.0**-17)) * np.ones_like(size)
        bound = 0.51 * step @ np.abs(dense).T + 2.1 * ROUNDING[dtype] * np.abs(exact) + 1e-3
        assert (np.abs(out.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gate_and_up_go_into_the_bytes_of_down(library, device, kind, monkeypatch):
    monkeypatch.setattr("engine.cuda.eight_bit.EIGHT_BIT_PIECE", 34)
    rng = np.random.default_rng(3)
    make = int8 if kind == "int8" else float8
    products = EightBitProducts(library, device, "bfloat16", 70)
    halves, last = [make(rng, 272, 64), make(rng, 272, 64)], make(rng, 64, 272)
    gate_up, down = products.load(halves), products.load([last])
    assert products.can_gate(gate_up, down) and not products.can_gate(down, gate_up) and not products.can_gate(gate_up, None)
    products.finish()
    gate, up = (eight_bit.dequantize(half).astype(np.float64) for half in halves)
    for rows in (70, 1, 5):
        x = activations(rng, rows, 64, torch.bfloat16) * 0.01
        spare, out = (torch.full((rows, n), float("nan"), dtype=torch.bfloat16) for n in (544, 64))
        gated = products.gate(x, gate_up, spare)
        assert len(gated) == rows
        products(gated, down, out, None, None)
        inputs = quantized(x, kind)
        g, u = inputs @ gate.T, inputs @ up.T
        if kind == "fp8":  # rounded on the way
            g, u = (torch.from_numpy(v).bfloat16().double().numpy() for v in (g, u))
        between = g / (1 + np.exp(-g)) * u
        wanted = quantized(torch.from_numpy(between.astype(np.float32)), kind) @ eight_bit.dequantize(last).astype(np.float64).T
        # where a number lies between two steps, rounding may go either way
        np.testing.assert_allclose(out.double().numpy(), wanted, rtol=2.1 * 2**-8, atol=0.02 * np.abs(wanted).max())


def test_int8_products_of_many_rows_are_made_in_pieces(library, device, monkeypatch):
    monkeypatch.setattr("engine.cuda.eight_bit.EIGHT_BIT_PIECE", 40)
    rng = np.random.default_rng(2)
    products = EightBitProducts(library, device, "bfloat16", 100)
    narrow, wide = products.load([int8(rng, 16, 64)]), products.load([int8(rng, 48, 64)])
    products.finish()
    x = activations(rng, 100, 64, torch.bfloat16)
    for weight in (narrow, wide):
        device.launches.clear()
        out = torch.full((100, weight.n), float("nan"), dtype=torch.bfloat16)
        products(x, weight, out, None, None)
        alone = torch.empty_like(out)
        for row in range(0, 100, 9):
            products(x[row : row + 1], weight, alone[row : row + 1], None, None)
            assert torch.equal(out[row], alone[row])
        assert torch.isfinite(out).all()


def test_few_rows_of_a_large_fp8_weight_are_scaled_afterwards(library, device, monkeypatch):
    monkeypatch.setattr(plan_cuda, "LARGE_FP8", 48 * 64)
    monkeypatch.setattr("engine.cuda.eight_bit.FEW_FP8_ROWS", 4)
    test_products(library, device, "fp8", (48,), 64, "bfloat16", True)
    test_products(library, device, "fp8", (48,), 64, "bfloat16", False)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 blocks"])
def test_a_token_that_holds_no_number_gives_none(library, device, kind):
    rng = np.random.default_rng(0)
    products = EightBitProducts(library, device, "bfloat16", 8)
    weight = products.load([int8(rng, 128, 256) if kind == "int8" else float8(rng, 128, 256, kind == "fp8 blocks")])
    products.finish()
    x = activations(rng, 4, 256, torch.bfloat16)
    x[1, 70], x[3, 2] = float("nan"), float("inf")
    out = torch.zeros(4, 128, dtype=torch.bfloat16)
    products(x, weight, out, None, None)
    finite = torch.isfinite(out).all(dim=1)
    assert finite.tolist() == [True, False, True, False]


def test_what_is_dequantized_instead(library):
    """Older cards, odd shapes, mixed parts: `load` has nothing to offer, and 16 bits take their place."""
    rng = np.random.default_rng(1)
    old, ada = (
        EightBitProducts(library, EmulatedDevice((7, 5)), "float16", 8),
        EightBitProducts(library, EmulatedDevice((8, 0)), "bfloat16", 8),
    )
    new = EightBitProducts(library, EmulatedDevice((9, 0)), "bfloat16", 8)
    assert old.load([int8(rng, 32, 64)]) is None and ada.load([float8(rng, 32, 64)]) is None
    assert ada.load([int8(rng, 32, 64)]) is not None
    assert new.load([int8(rng, 24, 64)]) is None and new.load([int8(rng, 32, 72)]) is None
    assert new.load([int8(rng, 32, 64), float8(rng, 32, 64)]) is None
    assert new.load([float8(rng, 64, 256, True), float8(rng, 64, 256, True)]) is None  # blocks that a cut divides
    assert EightBitProducts(library, EmulatedDevice((9, 0)), "float16", 8).load([float8(rng, 32, 64)]) is None
    weight = float8(rng, 64, 128, True)
    np.testing.assert_allclose(to_dense(weight).float().numpy(), eight_bit.dequantize(weight), rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize(
    "variant",
    [
        rows_variant(14336, 14336, "int8", "bfloat16"),
        rows_variant(28672, 28672, "fp8", "bfloat16"),
        rows_variant(14336, 14336, "fp8 blocks", "bfloat16"),
        silu_variant(28672, "int8", "bfloat16"),
        silu_variant(14336, "fp8", "bfloat16"),
        Variant("engine.cuda.eight_bit", "scale_back", ("bfloat16", True, True, 256)),
        Variant("engine.cuda.eight_bit", "scale_back", ("float16", False, False, 256)),
    ],
    ids=lambda v: v.name,
)
def test_no_stack_and_no_spills(variant):
    for cc in ((8, 0), (9, 0)) if "fp8" not in variant.name else ((8, 9), (9, 0)):
        resources = assemble(to_ptx(variant, cc), cc)[1]
        assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, resources)
