"""The numbers of a quantized KV pool: one head of K or V at one position becomes integers, a scale and a zero.

    x[d] = zero + scale * (code[d] - half)         code in 0 .. 2 half - 1, half = 128 or 8; scale, zero bfloat16

`zero` is what the code `half` stands for. It is rounded first, then the scale is chosen, and rounded up, so that the codes
reach both ends of the head: nothing is clipped, and the error of a number is at most half a scale. Per token and head,
asymmetric, at the moment the token is written: no calibration. A number that is not finite makes the whole head NaN, as it
would have made its scores. Where the bytes lie is drawn in `engine/cache/layout.py`. This page says what kernels compute.
A head of 4 bits is turned before (`rotate`), K and Q alike and V too, and so is what attention makes of V: the numbers of a head
become sums of many, which are of one size, and an outlier takes no other number's precision (QuaRot, Ashkboos et al. 2024). A
rotation of both Q and K changes no score; turned twice, V is V.
A K with biases is stored in a frame (`frame_of_keys`): (k - origin) / unit, and q * unit. q . origin is the same for all keys of
a query, so no softmax notices, and nothing is added back; units leave every product as it is (SmoothAttention of QServe, Lin et
al. 2024, which measures them on a text). Both are constants of an engine: blocks may be shared and computed again. numpy only.
"""

from __future__ import annotations

import numpy as np

from engine.cache.layout import KVLayout

MOST_ROTATED = 128  # numbers that are turned together: what a warp holds
FRAMED_BY = 4096  # positions: the mean of what is turned is over so many, from the first on
SMALLEST_SCALE = np.float32(2.0**-60)  # of a head whose numbers are all alike


def rotated(head_dim: int, bits: int) -> int:
    """How many numbers of a head are turned together: the largest power of 2 that divides it, to 128; 0: none are."""
    return min(head_dim & -head_dim, MOST_ROTATED) if bits == 4 else 0


def rotate(x: np.ndarray, bits: int) -> np.ndarray:
    """[..., head_dim] times a Hadamard matrix (Sylvester's, orthonormal: its own inverse), `rotated` numbers at a time; of 4 bits."""
    size = rotated(x.shape[-1], bits)
    if not size:
        return x
    y = x.astype(np.float32)
    step = 1
    while step < size:
        pairs = y.reshape(*x.shape[:-1], -1, 2, step)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(x.shape)
        step *= 2
    return y * np.float32(size**-0.5)


def frame_of_keys(k_bias: np.ndarray, q_bias: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The frame in which a biased K is quantized: float32 [2, kv_heads, head_dim], origin and unit.

    k_bias float32 [kv_heads, head_dim], q_bias [heads, head_dim]; cos, sin float32 [positions, rotary / 2], the tables of rope. The
    origin is the mean of the turned bias. The unit is the power of 2 nearest to the root of (size of k - origin / size of q),
    root mean squares of a pair where the weights' part is taken as 1: products of two errors' sizes are least there.
    """
    half, kv_heads = cos.shape[1], len(k_bias)
    c, s = (table[:FRAMED_BY].mean(axis=0, dtype=np.float64) for table in (cos, sin))
    a, b, rest = k_bias[:, :half], k_bias[:, half : 2 * half], k_bias[:, 2 * half :]
    origin = np.concatenate([a * c - b * s, b * c + a * s, rest], axis=1)
    length = np.ones(k_bias.shape[1])  # squared, of what a unit vector is turned into: more than 1 of yarn's
    length[: 2 * half] = np.tile(cos[0].astype(np.float64) ** 2 + sin[0].astype(np.float64) ** 2, 2)
    k = _of_pairs(length * k_bias.astype(np.float64) ** 2 - origin**2, half)
    q = _of_pairs((length * q_bias.astype(np.float64) ** 2).reshape(kv_heads, -1, k_bias.shape[1]).mean(axis=1), half)
    unit = np.exp2(np.rint(np.log2((1 + np.maximum(k, 0)) / (1 + q)) / 4))
    return np.stack([origin, unit]).astype(np.float32)


def _of_pairs(x: np.ndarray, half: int) -> np.ndarray:
    """The mean over the two dimensions that turn together, for both."""
    mean = (x[:, :half] + x[:, half : 2 * half]) / 2
    return np.concatenate([mean, mean, x[:, 2 * half :]], axis=1)


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
