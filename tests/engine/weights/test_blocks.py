"""The 4-bit and 8-bit layouts and every GGUF block format, element by element against the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine import w4, w8
from engine.gguf_blocks import W4_CONVERTERS, W8_CONVERTERS, to_float32, to_w4, to_w8
from engine.w4 import W4
from engine.w8 import W8
from engine.weight_files import DENSE_TYPES
from formats.gguf import TYPE_NAMES, TYPES
from tests.fixtures.toy import random_blocks

QUANTIZED = [kind for kind in TYPES if kind not in DENSE_TYPES]
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40).map(lambda k: 2 * k))


def dequantized_by_the_package(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def test_the_table_of_types_is_the_packages() -> None:
    for code, name in TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(code).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)] == (TYPES[name].elements, TYPES[name].nbytes)
    assert set(TYPE_NAMES.values()) == set(TYPES)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("rows, columns", [(1, 256), (7, 768), (33, 1024)])
def test_every_element(kind: str, rows: int, columns: int) -> None:
    raw = random_blocks(kind, rows, columns, np.random.default_rng(rows))
    expected = dequantized_by_the_package(raw, kind)
    if kind in W4_CONVERTERS:
        got = w4.dequantize(to_w4(raw, kind))
    elif kind in W8_CONVERTERS:
        got = w8.dequantize(to_w8(raw, kind))
    else:
        got = to_float32(raw, kind)
    assert got.dtype == np.float32 and got.shape == (rows, columns)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", QUANTIZED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_bit_pattern(kind: str, seed: int) -> None:
    """Scales too are random bits here: huge, tiny, zero, infinite, NaN."""
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2 * (256 // TYPES[kind].elements) * TYPES[kind].nbytes), dtype=np.uint8)
    expected = dequantized_by_the_package(raw, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind in W4_CONVERTERS:
            got = w4.dequantize(to_w4(raw, kind))
        else:
            got = w8.dequantize(to_w8(raw, kind)) if kind in W8_CONVERTERS else to_float32(raw, kind)
    if kind == "Q4_0":  # d (q - 8) against d q - 8 d: the same number, but infinity minus infinity
        finite = np.isfinite(got)
        np.testing.assert_array_equal(got[finite], expected[finite])
    else:
        np.testing.assert_array_equal(got, expected)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_pack_and_unpack_are_inverses(data: st.DataObject) -> None:
    q = data.draw(arrays(np.uint8, SIZES, elements=st.integers(0, 15)))
    np.testing.assert_array_equal(w4.unpack(w4.pack(q)), q)
    packed = data.draw(arrays(np.uint8, SIZES))
    np.testing.assert_array_equal(w4.pack(w4.unpack(packed)), packed)


def test_the_drawing_of_w4() -> None:
    q = np.arange(8, dtype=np.uint8).reshape(1, 8)
    assert w4.pack(q).tolist() == [[0x10, 0x32, 0x54, 0x76]]


@pytest.mark.parametrize("q", [np.full((1, 2), 16, np.uint8), np.zeros((1, 3), np.uint8), np.zeros((1, 2), np.int8), np.zeros(2, np.uint8)])
def test_pack_refuses(q: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pack wants"):
        w4.pack(q)


def random_w4(rng: np.random.Generator, n: int, k: int, group: int) -> W4:
    scale, bias = rng.standard_normal((2, n, k // group), np.float32)
    return W4(w4.pack(rng.integers(0, 16, (n, k), dtype=np.uint8)), scale, bias)


@pytest.mark.parametrize("group", w4.GROUP_SIZES)
def test_w4_slices_and_stacks(group: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_w4(rng, 6, 4 * group, group)
    whole = w4.dequantize(weight)
    assert (weight.out_features, weight.in_features, weight.group_size) == (6, 4 * group, group)
    q = w4.unpack(weight.qweight)
    for n, k in ((0, 0), (5, 4 * group - 1), (3, 2 * group)):  # the formula, written out
        assert whole[n, k] == weight.scale[n, k // group] * np.float32(q[n, k]) + weight.bias[n, k // group]
    np.testing.assert_array_equal(w4.dequantize(weight.rows(1, 5)), whole[1:5])
    np.testing.assert_array_equal(w4.dequantize(weight.columns(group, 3 * group)), whole[:, group : 3 * group])
    with pytest.raises(ValueError, match="in two"):
        weight.columns(group // 2, group)
    np.testing.assert_array_equal(w4.dequantize(w4.concat_rows([weight.rows(0, 2), weight.rows(2, 6)])), whole)


def test_w8_slices_and_stacks() -> None:
    rng = np.random.default_rng(0)
    weight = W8(rng.integers(-128, 128, (6, 128)).astype(np.int8), rng.standard_normal((6, 4), np.float32))
    whole = w8.dequantize(weight)
    assert whole[5, 127] == weight.scale[5, 3] * np.float32(weight.q[5, 127])
    np.testing.assert_array_equal(w8.dequantize(weight.rows(1, 5)), whole[1:5])
    np.testing.assert_array_equal(w8.dequantize(weight.columns(32, 96)), whole[:, 32:96])
    with pytest.raises(ValueError, match="in two"):
        weight.columns(16, 32)
    np.testing.assert_array_equal(w8.dequantize(w8.concat_rows([weight.rows(0, 1), weight.rows(1, 6)])), whole)
