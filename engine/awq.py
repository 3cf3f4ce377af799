"""AWQ's gemm layout: the drawing, slices, and the way to W4. The form in which such a checkpoint reaches a backend.

A weight of N output and K input channels in groups of g input channels, as the files have it (Lin et al. 2024; the
layout is AutoAWQ's "gemm" version):

    qweight  int32   [K, N / 8]        nibble i of qweight[k, c] is q[8 c + ORDER[i], k]
    qzeros   int32   [K / g, N / 8]    nibbles likewise: zero[8 c + ORDER[i], k // g]
    scales   float16 [K / g, N]

    w[n, k] = scales[k // g, n] * (q[n, k] - zero[n, k // g])          q, zero in 0 .. 15

        bits of an int32     28..31 24..27 20..23 16..19 12..15  8..11   4..7   0..3
        output channel        8c+7   8c+5   8c+3   8c+1   8c+6   8c+4   8c+2    8c

Nothing is shuffled here: a GPU backend uploads these bytes and repacks them on the card, the others ask `to_w4`. numpy
only; knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.w4 import W4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8  # output channels in an int32
COLUMNS = 32  # of int32s repacked at a time, so that the passes stay in a core's cache
SYMMETRIC_ZERO = 8  # of a file without qzeros


@dataclass(frozen=True, slots=True, eq=False)
class AWQ:
    """A 4-bit weight as drawn above; the arrays may be read-only views of a mapped file, not contiguous where sliced."""

    qweight: np.ndarray
    qzeros: np.ndarray
    scales: np.ndarray

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[0]

    def rows(self, start: int, stop: int) -> AWQ:
        """Output channels start .. stop-1, multiples of 8 (views)."""
        if start % PACK or stop % PACK:
            raise ValueError(f"output channels {start}:{stop} cut an int32 of {PACK} in two")
        first, last = start // PACK, stop // PACK
        return AWQ(self.qweight[:, first:last], self.qzeros[:, first:last], self.scales[:, start:stop])

    def columns(self, start: int, stop: int) -> AWQ:
        """Input channels start .. stop-1, multiples of the group size (views)."""
        g = self.group_size
        if start % g or stop % g:
            raise ValueError(f"input channels {start}:{stop} cut a W4 group of {g} in two")
        groups = slice(start // g, stop // g)
        return AWQ(self.qweight[start:stop], self.qzeros[groups], self.scales[groups])


def concat_rows(parts: list[AWQ]) -> AWQ:
    """Stack output channels (q, k, v; gate, up) of weights with one K and one group size (a copy)."""
    return AWQ(*(np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("qweight", "qzeros", "scales")))


def symmetric_zeros(groups: int, out_features: int) -> np.ndarray:
    """int32 [groups, N / 8]: what stands for the qzeros of a file that has none (zero_point = false)."""
    return np.full((groups, out_features // PACK), SYMMETRIC_ZERO * 0x11111111, np.uint32).view(np.int32)


def unpack(packed: np.ndarray) -> np.ndarray:
    """int32 [R, N / 8] (qweight or qzeros) -> uint8 [R, N], output channels in their order."""
    words = np.ascontiguousarray(packed).view(np.uint32)
    out = np.empty((*words.shape, PACK), np.uint8)
    for nibble, channel in enumerate(ORDER):
        out[:, :, channel] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def to_w4(weight: AWQ) -> W4:
    """The same numbers exactly: scale as it is, bias = -zero * scale."""
    scale = weight.scales.T.astype(np.float32, order="C")
    zero = unpack(weight.qzeros).T.astype(np.float32)
    return W4(_pair_nibbles(weight.qweight), scale, -zero * scale)


def _pair_nibbles(qweight: np.ndarray) -> np.ndarray:
    """int32 [K, N / 8] -> uint8 [N, K / 2] as W4 has them, eight nibbles at a time: of two rows, one's even nibbles beside the
    other's make four bytes, the odd ones the next four."""
    k, columns = qweight.shape
    words = np.ascontiguousarray(qweight).view(np.uint32)
    out = np.empty((columns, PACK, k // 2), np.uint8)
    even, four = np.uint32(0x0F0F0F0F), np.uint32(4)
    for column in range(0, columns, COLUMNS):
        part = words[:, column : column + COLUMNS]
        first, second = part[0::2], part[1::2]
        pairs = (first & even) | ((second & even) << four), ((first >> four) & even) | (second & ~even)
        for odd, pair in enumerate(pairs):
            for byte, values in enumerate(np.moveaxis(pair.view(np.uint8).reshape(*pair.shape, 4), -1, 0)):
                out[column : column + COLUMNS, ORDER[2 * byte + odd]] = values.T
    return out.reshape(columns * PACK, k // 2)
