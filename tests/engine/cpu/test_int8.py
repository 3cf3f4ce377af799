"""The CPU's products of bytes (int8 weights, each token quantized) and of weights whose input channels are in another order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import eight_bit, w4
from engine.cache.layout import KVLayout
from engine.cpu.backend import CpuBackend
from engine.cpu.target import FEATURES
from tests.engine.cpu.checks import ROWS, backend, bits_of, error, make_batch, make_decoder, one_by_one, only, spec, to_bfloat16

needs_int8 = pytest.mark.skipif(not FEATURES.int8_dot, reason="this CPU has no vpdpbusd: int8 weights are dequantized")


def int8(rng: np.random.Generator, n: int, k: int) -> eight_bit.Int8:
    return eight_bit.Int8(rng.integers(-128, 128, (n, k)).astype(np.int8), (rng.random(n).astype(np.float32) + 0.5) * k**-0.5 / 64)


def ordered(rng: np.random.Generator, n: int, k: int, group: int = 32) -> w4.W4:
    scale = (rng.random((n, k // group)).astype(np.float16) + 1).astype(np.float32) * np.float32(2**-7)
    qweight = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    return w4.W4(qweight, scale, -8 * scale, integer_zeros=True, order=rng.permutation(k).astype(np.int32))


@needs_int8
@pytest.mark.parametrize(("n", "k", "threads"), [(960, 576, 2), (33, 50, 1), (16, 4096, 1), (100, 96, 3)])
def test_int8_products_are_those_of_quantized_rows(n: int, k: int, threads: int) -> None:
    rng = np.random.default_rng(n)
    weight, bias = int8(rng, n, k), rng.standard_normal(n).astype(np.float32)
    with backend(spec(), "bfloat16", threads) as cpu:
        handle = cpu.prepare_linear(weight, torch.from_numpy(bias))
        for rows in (1, 2, 3, 7, 8, 31, 70, 97):
            x = rng.standard_normal((rows, k)).astype(np.float32) * rng.random((rows, 1)).astype(np.float32) * 100
            x[rows // 2] = 0
            q, scale = eight_bit.quantize_rows(x)
            exact = q.astype(np.float64) @ weight.q.astype(np.float64).T  # integers
            wanted = exact * scale[:, None].astype(np.float64) * weight.scale.astype(np.float64) + bias
            y = cpu.linear(x, handle)
            assert error(y, wanted) < 1e-6, rows
            np.testing.assert_array_equal(y[rows // 2], bias)
            # and near the product of what was not quantized: half a step of 127 in each of K activations
            assert error(y, x.astype(np.float64) @ eight_bit.dequantize(weight).astype(np.float64).T + bias) < 0.02
            alone = cpu.linear(x[rows - 1 :], handle)
            np.testing.assert_array_equal(alone[0], y[rows - 1])


@needs_int8
def test_a_row_that_holds_no_number_gives_none() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1, 5] = np.nan
    with backend(spec(), "bfloat16", 1) as cpu:
        y = cpu.linear(x, cpu.prepare_linear(int8(rng, 48, 64), None))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


def test_int8_in_the_exact_mode_is_dequantized() -> None:
    rng = np.random.default_rng(1)
    weight, x = int8(rng, 48, 64), rng.standard_normal((3, 64)).astype(np.float32)
    with backend(spec(), "float32", 1) as cpu:
        y = cpu.linear(x, cpu.prepare_linear(weight, None))
    assert error(y, x @ eight_bit.dequantize(weight).T) < 1e-3  # rounded to float16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_order_is_that_of_the_activations(dtype: str) -> None:
    rng = np.random.default_rng(2)
    weight, x = ordered(rng, 96, 256), rng.standard_normal((9, 256)).astype(np.float32)
    with backend(spec(), dtype, 2) as cpu:
        y = cpu.linear(x, cpu.prepare_linear(weight, None))
    given = to_bfloat16(x) if dtype == "bfloat16" else x
    assert error(y, given.astype(np.float64) @ w4.dequantize(weight).astype(np.float64).T) < 3e-6


def mixed_decoder(cpu: CpuBackend, kinds: dict[str, str], rng: np.random.Generator) -> SimpleNamespace:
    """`make_decoder`'s, with linears of these kinds: int8, ordered, or as it makes them."""
    model = spec()
    decoder = make_decoder(cpu, model, rng, "w4")
    for layer in decoder.layers:
        for name, kind in kinds.items():
            packed = getattr(layer, name).weight.packed
            make = int8 if kind == "int8" else ordered
            setattr(layer, name, SimpleNamespace(weight=cpu.prepare_linear(make(rng, packed.out_features, packed.in_features), None)))
    return decoder


KINDS = {
    "int8": dict.fromkeys(("qkv", "o", "gate_up", "down"), "int8"),
    "int8 but down": dict.fromkeys(("qkv", "o", "gate_up"), "int8"),
    "int8 down only": {"down": "int8"},
    "ordered": dict.fromkeys(("qkv", "o", "gate_up"), "ordered"),
}


@pytest.mark.parametrize("kinds", KINDS)
def test_the_pass_is_the_operations_one_by_one(kinds: str) -> None:
    rng = np.random.default_rng(5)
    with backend(spec(), "bfloat16", 2) as cpu:
        decoder = mixed_decoder(cpu, KINDS[kinds], rng)
        cpu.bind(decoder)
        batch, blocks = make_batch(ROWS, 16, rng)
        kv = cpu.make_kv(KVLayout(2, 3, 64, 16, "bfloat16"), blocks)
        before = bits_of(rng.standard_normal(kv.shape).astype(np.float32))
        x = rng.standard_normal((batch.num_tokens, 576)).astype(np.float32)
        kv[:] = before
        wanted, wanted_kv = one_by_one(cpu, decoder, kv, batch, x.copy()), kv.copy()
        kv[:] = before
        got = cpu.run_layers(x.copy(), cpu.begin(batch))
        assert got is not None
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(kv, wanted_kv)
        for row in (0, 4, 5):
            kv[:] = before
            tokens = slice(batch.row_starts[row], batch.row_starts[row + 1])
            alone = cpu.run_layers(x[tokens].copy(), cpu.begin(only(batch, row)))
            assert alone is not None
            np.testing.assert_array_equal(alone, got[tokens])
