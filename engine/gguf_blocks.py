"""GGUF's block formats -> the canonical W4 and W8 layouts where they map exactly, else float32. numpy only.

Input is always uint8 [N, bytes of a row]: whole rows, or a run of whole blocks of each row. Where a block format is
not one of ours, PyPI `gguf`'s dequantizers do the work (its quants module only: its file reader is not safe).

    Q4_0   d f16, 16 bytes                      w = d (q - 8)         low nibbles: elements 0..15, high: 16..31
    Q4_1   d f16, m f16, 16 bytes               w = d q + m           likewise
    Q4_K   d f16, dmin f16, 12 bytes, 128 bytes w = d s q - dmin t    8 groups of 32, s and t 6 bits each in the 12 bytes;
                                                                      32 bytes hold group 2c (low nibbles), 2c + 1 (high)
    Q5_0   d f16, 4 bytes, 16 bytes             w = d (q - 16)        the fifth bits in the 4 bytes, nibbles as Q4_0
    Q8_0   d f16, 32 int8                       w = d q
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from engine.w4 import W4
from engine.w8 import W8
from formats.gguf import TYPES


def to_w4(raw: np.ndarray, kind: str) -> W4:
    """Exactly the same numbers, in groups of 32."""
    return W4_CONVERTERS[kind](raw.reshape(raw.shape[0], -1, TYPES[kind].nbytes))


def _q4_0(blocks: np.ndarray) -> W4:
    scale = _halves(blocks[:, :, :2])[:, :, 0]
    return W4(_pair_nibbles(blocks[:, :, 2:]), scale, scale * np.float32(-8))


def _q4_1(blocks: np.ndarray) -> W4:
    halves = _halves(blocks[:, :, :4])
    return W4(_pair_nibbles(blocks[:, :, 4:]), np.ascontiguousarray(halves[:, :, 0]), np.ascontiguousarray(halves[:, :, 1]))


def _q4_k(blocks: np.ndarray) -> W4:
    n, b = blocks.shape[:2]
    d = _halves(blocks[:, :, :4])
    a, c, e = (blocks[:, :, i : i + 4] for i in (4, 8, 12))
    scales = np.concatenate([a & 63, (e & 15) | (a >> 6 << 4)], axis=2)
    mins = np.concatenate([c & 63, (e >> 4) | (c >> 6 << 4)], axis=2)
    return W4(
        _pair_nibbles(blocks[:, :, 16:].reshape(n, b * 4, 32)),
        (d[:, :, :1] * scales).reshape(n, b * 8),
        (d[:, :, 1:] * mins * np.float32(-1)).reshape(n, b * 8),
    )


W4_CONVERTERS: dict[str, Callable[[np.ndarray], W4]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def to_w8(raw: np.ndarray, kind: str) -> W8:
    """Exactly the same numbers, in groups of 32."""
    blocks = raw.reshape(raw.shape[0], -1, TYPES[kind].nbytes)
    return W8(W8_CONVERTERS[kind](blocks).reshape(raw.shape[0], -1), _halves(blocks[:, :, :2])[:, :, 0])


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little") << 4
    nibbles = np.concatenate([blocks[:, :, 6:] & 15, blocks[:, :, 6:] >> 4], axis=2)
    return (nibbles | fifth).view(np.int8) - np.int8(16)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)


W8_CONVERTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q5_0": _q5_0, "Q8_0": _q8_0}


def to_float32(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 [N, K]."""
    from gguf import GGMLQuantizationType, quants

    if kind == "IQ2_XXS":
        return _iq2_xxs(raw.reshape(raw.shape[0], -1, TYPES[kind].nbytes))
    with np.errstate(invalid="ignore", over="ignore"):  # whoever asked checks that all is finite
        return quants.dequantize(raw, GGMLQuantizationType[kind])


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    """Eight elements a look-up; the package's own way takes some six passes over float32 arrays.

    d f16, then 8 groups of 32 elements: u32 of four codes, u32 of four 7-bit sign patterns and a 4-bit scale.
    """
    n, b = blocks.shape[:2]
    words = np.ascontiguousarray(blocks[:, :, 2:]).view("<u4").reshape(n, b, 8, 2)
    signs = words[..., 1]
    scale = _halves(blocks[:, :, :2]) * (np.float32(0.5) + (signs >> 28).astype(np.float32)) * np.float32(0.25)
    codes = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(n, b, 8, 4).astype(np.int32) << 7
    for j in range(4):
        codes[..., j] |= ((signs >> 7 * j) & 127).astype(np.int32)
    values = _iq2_xxs_table().take(codes.ravel()).view(np.int8).reshape(n, b, 8, 32)
    return (values * scale[..., None]).reshape(n, -1)


@functools.cache
def _iq2_xxs_table() -> np.ndarray:
    """int64 [256 codes * 128 sign patterns], each eight int8 elements; made of the package's tables."""
    from gguf import quants

    quants.IQ2_XXS.init_grid()
    grid = quants.IQ2_XXS.grid.reshape(256, 1, 8).astype(np.int8)
    patterns = np.frombuffer(quants.IQ2_XXS.ksigns, np.uint8).reshape(1, 128, 1)
    signs = 1 - 2 * ((patterns >> np.arange(8, dtype=np.uint8)) & 1).astype(np.int8)
    return np.ascontiguousarray(grid * signs).view(np.int64).ravel()


def _halves(parts: np.ndarray) -> np.ndarray:
    """uint8 [N, B, 2 n] -> float32 [N, B, n], read as little-endian halves."""
    return np.ascontiguousarray(parts).view("<f2").astype(np.float32)


def _pair_nibbles(blocks: np.ndarray) -> np.ndarray:
    """uint8 [N, B, w] whose low nibbles are elements 0 .. w-1 and high nibbles w .. 2w-1 of 2w -> uint8 [N, B * w] with
    neighbouring elements in one byte, as W4 has them. Two bytes at a time: x = a | b << 8."""
    n, b, w = blocks.shape
    x = np.ascontiguousarray(blocks).view("<u2")
    out = np.empty((n, b, 2, w // 2), np.uint8)
    out[:, :, 0] = (x & 0xF) | ((x >> 4) & 0xF0)
    out[:, :, 1] = ((x >> 4) & 0xF) | ((x >> 8) & 0xF0)
    return out.reshape(n, b * w)
