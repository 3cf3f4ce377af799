"""The numbers of a quantized KV pool, as engine/kv_quant.py defines them."""

from __future__ import annotations

import numpy as np
import pytest

from engine import kv_quant
from engine.cache.layout import KVLayout


def heads(kind: str, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((200, 64)).astype(np.float32)
    if kind == "outliers":
        x[:, 3] += 40 * rng.random(200).astype(np.float32)
    if kind == "far from zero":
        x = x / 10 + 100
    if kind == "tiny":
        x *= np.float32(1e-12)
    if kind == "large":
        x *= np.float32(1e12)
    if kind == "alike":
        x[:] = x[:, :1]
    return x


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["normal", "outliers", "far from zero", "tiny", "large", "alike"])
def test_no_number_is_off_by_more_than_half_a_scale(bits: int, kind: str) -> None:
    x = heads(kind, np.random.default_rng(1))
    codes, pairs = kv_quant.quantize(x, bits)
    scale = (pairs << 16).view(np.float32)
    assert codes.max() < 1 << bits and (scale > 0).all()
    off = np.abs(kv_quant.dequantize(codes, pairs, bits) - x)
    assert (off <= 0.5001 * scale[:, None] + 4e-7 * np.abs(x).max()).all()
    if kind in ("normal", "outliers", "tiny", "large"):  # the codes are used: both ends of each head, to a rounding of the scale
        spread = (x.max(axis=-1) - x.min(axis=-1)) / ((1 << bits) - 1)
        assert (scale <= 1.02 * spread).all()


def test_zeros_stay_zeros() -> None:
    codes, pairs = kv_quant.quantize(np.zeros((3, 16), np.float32), 4)
    assert not kv_quant.dequantize(codes, pairs, 4).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_that_is_not_finite_spoils_its_head_and_no_other(bad: float, bits: int) -> None:
    x = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    x[1, 7] = bad
    got = kv_quant.dequantize(*kv_quant.quantize(x, bits), bits)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("kv_heads", "block_len", "head_dim"), [(2, 16, 64), (1, 1, 48), (3, 7, 16)])
def test_where_the_bytes_lie(bits: int, kv_heads: int, block_len: int, head_dim: int) -> None:
    layout = KVLayout(1, kv_heads, head_dim, block_len, "float32", bits)
    layer, rng = np.full(layout.shape(5)[1:], 0xEE, np.uint8), np.random.default_rng(3)
    x = rng.standard_normal((5, 2, kv_heads, block_len, head_dim)).astype(np.float32)
    kv_quant.store(layer, layout, x)
    codes, pairs = kv_quant.quantize(x, bits)
    row = ((1 * kv_heads + kv_heads - 1) * block_len) + block_len - 1  # the last V of a block
    own = layer[3, row * layout.row_bytes :][: layout.row_bytes]
    first = codes[3, 1, -1, -1]
    assert own[0] == (first[0] if bits == 8 else first[0] | first[1] << 4)
    at = layout.pairs_at + 4 * row
    assert layer[3, at : at + 4].view(np.uint32)[0] == pairs[3, 1, -1, -1]
    assert (layer[:, at + 4 :] == 0xEE).all()  # padding
    np.testing.assert_array_equal(kv_quant.values(layer, layout), kv_quant.dequantize(codes, pairs, bits))


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (128, 128), (256, 128), (48, 16), (96, 32)])
def test_a_head_of_4_bits_is_turned_and_turned_back(head_dim: int, size: int) -> None:
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 5, head_dim)).astype(np.float32)
    assert kv_quant.rotated(head_dim, 4) == size and kv_quant.rotate(q, 8) is q
    turned = kv_quant.rotate(k, 4)
    np.testing.assert_allclose(kv_quant.rotate(turned, 4), k, atol=1e-6)
    np.testing.assert_allclose(kv_quant.rotate(q, 4) @ turned.T, q @ k.T, atol=1e-4)
    one = np.zeros(head_dim, np.float32)
    one[1] = 3
    assert np.allclose(np.abs(kv_quant.rotate(one, 4)[:size]), 3 / size**0.5) and not kv_quant.rotate(one, 4)[size:].any()


def test_an_outlier_takes_less_precision_from_the_others_when_it_is_turned() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((100, 64)).astype(np.float32)
    x[:, 3] += 20
    plain = kv_quant.dequantize(*kv_quant.quantize(x, 4), 4)
    turned = kv_quant.rotate(kv_quant.dequantize(*kv_quant.quantize(kv_quant.rotate(x, 4), 4), 4), 4)
    assert np.abs(turned - x).mean() < 0.6 * np.abs(plain - x).mean()
