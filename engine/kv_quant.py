"""The numbers of a quantized KV pool: one head of K or V at one position becomes integers, a scale and a zero.

    x[d] = zero + scale * (code[d] - half)         code in 0 .. 2 half - 1, half = 128 or 8; scale, zero bfloat16

`zero` is what the code `half` stands for. It is rounded first, then the scale is chosen, and rounded up, so that the codes
reach both ends of the head: nothing is clipped, and the error of a number is at most half a scale. Per token and head,
asymmetric, at the moment the token is written: no calibration. A number that is not finite makes the whole head NaN, as it
would have made its scores. Where the bytes lie is drawn in `engine/cache/layout.py`. This page says what kernels compute.
numpy only.
"""

from __future__ import annotations

import numpy as np

from engine.cache.layout import KVLayout

SMALLEST_SCALE = np.float32(2.0**-60)  # of a head whose numbers are all alike


def quantize(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., head_dim] -> codes uint8 [..., head_dim], pairs uint32 [...]."""
    half, levels = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        poison = np.where(np.isfinite(x).all(axis=-1), np.float32(0), np.float32(np.nan))
        low, high = x.min(axis=-1), x.max(axis=-1)
        zero = _float(_nearest(low + (high - low) * (half / levels) + poison))
        reach = np.maximum((high - zero) * (np.float32(1) / (half - 1)), (zero - low) * (np.float32(1) / half))
        scale = _float(_upwards(np.maximum(reach, SMALLEST_SCALE)))
        codes = np.rint((x - zero[..., None]) * (np.float32(1) / scale)[..., None]) + half
        codes = np.clip(np.nan_to_num(codes), 0, levels).astype(np.uint8)
    return codes, (scale.view(np.uint32) >> 16) | (zero.view(np.uint32) & np.uint32(0xFFFF0000))


def dequantize(codes: np.ndarray, pairs: np.ndarray, bits: int) -> np.ndarray:
    """float32 [..., head_dim], the inverse of `quantize`."""
    half = np.float32(1 << (bits - 1))
    scale, zero = _float(pairs << 16), _float(pairs & np.uint32(0xFFFF0000))
    return zero[..., None] + scale[..., None] * (codes.astype(np.float32) - half)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., head_dim] -> uint8 [..., head_dim * bits / 8]: of two 4-bit codes the even one is the low nibble."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def parts(layer: np.ndarray, layout: KVLayout) -> tuple[np.ndarray, np.ndarray]:
    """Views of one layer's pool, uint8 [num_blocks, bytes]: codes uint8 [num_blocks, 2, kv_heads, block_seq_len, row_bytes], pairs
    uint32 [num_blocks, 2, kv_heads, block_seq_len]."""
    blocks, positions = len(layer), (2, layout.num_kv_heads, layout.block_seq_len)
    end = layout.pairs_at + 4 * positions[0] * positions[1] * positions[2]
    codes = layer[:, : layout.pairs_at].reshape(blocks, *positions, layout.row_bytes, copy=False)
    return codes, layer[:, layout.pairs_at : end].view(np.uint32).reshape(blocks, *positions, copy=False)


def values(layer: np.ndarray, layout: KVLayout) -> np.ndarray:
    """float32 [num_blocks, 2, kv_heads, block_seq_len, head_dim]: what one layer's quantized pool stands for."""
    codes, pairs = parts(layer, layout)
    return dequantize(unpack(codes, layout.quant_policy), pairs, layout.quant_policy)


def store(layer: np.ndarray, layout: KVLayout, pool: np.ndarray) -> None:
    """Quantize float32 [num_blocks, 2, kv_heads, block_seq_len, head_dim] into one layer's pool."""
    codes, pairs = parts(layer, layout)
    new, pairs[:] = quantize(pool, layout.quant_policy)
    codes[:] = pack(new, layout.quant_policy)


def _float(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def _nearest(x: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to x, ties to even, in the upper half of 32 bits; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.uint32(0x7FC00000), rounded)


def _upwards(x: np.ndarray) -> np.ndarray:
    """The least bfloat16 that is not below x > 0, in the upper half of 32 bits; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FC00000), (bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000))
