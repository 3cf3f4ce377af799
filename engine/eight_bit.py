"""8-bit weights whose products take 8-bit activations, each token with a scale of its own: int8 (W8A8) and float8.

    Int8     q int8 [N, K]             scale float32 [N]             w[n, k] = scale[n] * q[n, k]
    Float8   q uint8 [N, K], e4m3      scale float32 [N, K / 128]    w[n, k] = scale[n, k // 128] * e4m3(q[n, k])
             (or [N, 1]: of all input channels)                      (the last group may be short)

e4m3 is float8_e4m3fn (Micikevicius et al. 2022): no infinity, NaN is 0x7F and 0xFF, the largest number 448. The activations
of a token are x / s rounded to the same type, s = max |x| / 127 or max |x| / 448 (`quantize_rows`); a product is summed without
rounding (int8) or in float32, and multiplied by both scales. Where no such product is at hand, and in the exact mode, the
weights are dequantized and activations stay as they are. numpy only; knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 128  # input channels of a Float8 group, and output channels of a block
INT8_LARGEST, E4M3_LARGEST = 127.0, 448.0
E4M3_NAN = 0x7F  # without the sign


def _e4m3_values() -> np.ndarray:
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(bits & 128, -size, size)
    values[(bits & 127) == E4M3_NAN] = np.nan
    return values.astype(np.float32)


E4M3_VALUES = _e4m3_values()


@dataclass(frozen=True, slots=True, eq=False)
class Int8:
    """As drawn above."""

    q: np.ndarray
    scale: np.ndarray

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Float8:
    """As drawn above. `blocked`: every 128 output channels from the first on have the same scales."""

    q: np.ndarray
    scale: np.ndarray
    blocked: bool = False

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    @property
    def by_channel(self) -> bool:
        """One scale for all input channels."""
        return self.scale.shape[1] == 1


def concat_int8(parts: list[Int8]) -> Int8:
    """Stack output channels of weights with one K."""
    return Int8(np.concatenate([p.q for p in parts]), np.concatenate([p.scale for p in parts]))


def concat_float8(parts: list[Float8]) -> Float8:
    """Stack output channels of weights with one K and one kind of scales."""
    blocked = all(p.blocked for p in parts) and not any(p.out_features % BLOCK for p in parts[:-1])
    return Float8(np.concatenate([p.q for p in parts]), np.concatenate([p.scale for p in parts]), blocked)


def dequantize(weight: Int8 | Float8) -> np.ndarray:
    """float32 [N, K]."""
    if isinstance(weight, Int8):
        return weight.q.astype(np.float32) * weight.scale[:, None]
    values = E4M3_VALUES[weight.q]
    if weight.by_channel:
        return values * weight.scale
    return values * np.repeat(weight.scale, BLOCK, axis=1)[:, : weight.in_features]


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T, K] -> int8 [T, K] and scales float32 [T]; a row of zeros has the scale 0. Rounds to nearest even."""
    largest = np.abs(x).max(axis=1)
    scale = largest / np.float32(INT8_LARGEST)
    inverse = np.divide(np.float32(INT8_LARGEST), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(x * inverse[:, None]).astype(np.int8), scale
