"""GPTQ's layout and that of compressed-tensors' pack-quantized: integers of 4 or 8 bits along the input channels of an int32.

A weight of N output and K input channels with G groups of input channels, P = 32 / bits integers in an int32 (Frantar et al.
2023; the layouts are AutoGPTQ's, of which GPTQModel's v2 differs in the zeros, and compressed-tensors'):

    GPTQ     qweight  int32 [K/P, N]    field i of qweight[r, n] is q[n, P r + i]
             qzeros   int32 [G, N/P]    field i of qzeros[j, c] is zero[P c + i, j], in v1 less one: the whole int32 less 0x11111111
             scales   [G, N]
             g_idx    int32 [K]         the group of each input channel; absent: k // (K / G)
    PACKED   weight_packed     int32 [N, K/P]   field i of [n, c] is q[n, P c + i]
             weight_zero_point int32 [N/P, G]   field i of [r, j] is zero[P r + i, j]; absent: 2 ** (bits - 1)
             weight_scale      [N, G]
             weight_g_idx      int32 [K]

    w[n, k] = scale[n, j] * (q[n, k] - zero[n, j])       j the group of k;  q in 0 .. 2 ** bits - 1;  field 0 in the lowest bits

With act-order (desc_act) groups are made of input channels that lie apart. Sorted by group (`order`), they are whole groups
again: the form in which they go to a product, whose activations are then taken in that order. numpy only; knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine import w4
from engine.w4 import GROUP_SIZES, W4
from engine.w8 import GROUP_SIZE as W8_GROUP
from engine.w8 import W8

Rows = slice | np.ndarray  # output channels


@dataclass(frozen=True, slots=True, eq=False)
class PackedInts:
    """A weight as drawn above; arrays may be read-only views of a mapped file."""

    gptq: bool  # the layout, else PACKED
    bits: int
    words: np.ndarray  # qweight or weight_packed
    zeros: np.ndarray | None  # qzeros or weight_zero_point
    scales: np.ndarray  # any float; bfloat16 as float32
    zero_offset: int = 0
    g_idx: np.ndarray | None = None  # None: groups of consecutive channels

    @property
    def per(self) -> int:
        return 32 // self.bits

    @property
    def out_features(self) -> int:
        return self.words.shape[1] if self.gptq else self.words.shape[0]

    @property
    def in_features(self) -> int:
        return self.words.shape[0 if self.gptq else 1] * self.per

    @property
    def groups(self) -> int:
        return self.scales.shape[0 if self.gptq else 1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.groups

    def bytes_of(self, rows: Rows) -> np.ndarray:
        """uint8 [rows, K * bits / 8]: fields in the order of the input channels, of 4 bits the even one in the low half."""
        words = self.words[:, rows].T if self.gptq else self.words[rows]
        return np.ascontiguousarray(words).view(np.uint8)

    def integers(self, rows: Rows) -> np.ndarray:
        """q, uint8 [rows, K]."""
        return w4.unpack(self.bytes_of(rows)) if self.bits == 4 else self.bytes_of(rows)

    def scale(self, rows: Rows) -> np.ndarray:
        """float32 [rows, G]."""
        return np.ascontiguousarray(self.scales[:, rows].T if self.gptq else self.scales[rows], np.float32)

    def zero(self, rows: Rows) -> np.ndarray:
        """float32 [rows, G], integers."""
        if self.zeros is None:
            return np.full(self.scale(rows).shape, 1 << (self.bits - 1), np.float32)
        every = np.arange(self.out_features)[rows]
        words = self.zeros.T if self.gptq else self.zeros  # [N / P, G]
        words = words[every // self.per].view(np.uint32) + np.uint32(self.zero_offset * (0x11111111 if self.bits == 4 else 0x01010101))
        shifts = (self.bits * (every % self.per)).astype(np.uint32)
        return ((words >> shifts[:, None]) & np.uint32((1 << self.bits) - 1)).astype(np.float32)


def order_of(g_idx: np.ndarray, groups: int) -> np.ndarray | None:
    """Input channels sorted by group, int32 [K]; None where they are so already. ValueError where groups differ in size."""
    k = len(g_idx)
    size = k // groups
    if np.array_equal(g_idx, np.arange(k) // size):
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups or np.any(np.bincount(g_idx, minlength=groups) != size):
        raise ValueError(f"does not give each of {groups} groups {size} input channels")
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def w4_group(group_size: int, *cuts: int) -> int:
    """The largest W4 group that divides a scale's input channels and every cut; 0 where none does."""
    return next((size for size in reversed(GROUP_SIZES) if not any(n % size for n in (group_size, *cuts))), 0)


def to_w4(weight: PackedInts, rows: Rows, order: np.ndarray | None, columns: slice) -> W4:
    """Input channels `columns`, counted in `order`, as W4 (4 bits; the cut lies between groups of `w4_group`)."""
    start, stop = columns.start, columns.stop
    group = w4_group(weight.group_size, start, stop)
    packed = weight.bytes_of(rows) if order is None else w4.pack(np.ascontiguousarray(w4.unpack(weight.bytes_of(rows))[:, order]))
    scale, zero = weight.scale(rows), weight.zero(rows)
    own = np.arange(start, stop, group) // weight.group_size  # the file's group of each W4 group
    scale, zero = scale[:, own], zero[:, own]
    return W4(np.ascontiguousarray(packed[:, start // 2 : stop // 2]), scale, -zero * scale, integer_zeros=True)


def to_w8(weight: PackedInts, rows: Rows, columns: slice) -> W8:
    """8 bits, symmetric, groups of consecutive channels; the cut lies between groups of 32."""
    own = np.arange(columns.start, columns.stop, W8_GROUP) // weight.group_size
    q = (weight.bytes_of(rows)[:, columns] ^ np.uint8(128)).view(np.int8)
    return W8(np.ascontiguousarray(q), weight.scale(rows)[:, own])


def dequantize(weight: PackedInts, rows: Rows, columns: slice | np.ndarray) -> np.ndarray:
    """float32 [rows, columns], input channels counted as they are in the file (or listed)."""
    every = np.arange(weight.in_features)[columns]
    own = every // weight.group_size if weight.g_idx is None else weight.g_idx[every]
    scale, zero = weight.scale(rows), weight.zero(rows)
    return scale[:, own] * (weight.integers(rows)[:, every].astype(np.float32) - zero[:, own])
