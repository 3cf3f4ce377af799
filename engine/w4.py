"""The 4-bit group layout: the drawing, `pack` and `unpack`. Quantizer, loader and kernels all import it.

A weight of N output and K input channels, cut into *W4 groups* of g = 32, 64 or 128 input channels that share a
scale and a bias:

    w[n, k] = scale[n, k // g] * q[n, k] + bias[n, k // g]          q in 0 .. 15

Every 4-bit format this project reads maps onto it without loss: GGUF Q4_0 (bias = -8 d), Q4_1 (bias = m),
AWQ and GPTQ (bias = -zero * scale). A weight that was quantized in another order of its input channels (GPTQ's act-order) is
kept in that order, so that groups are neighbours, and says so. Two nibbles a byte, the even input channel in the low nibble:

    qweight[n, k // 2] = q[n, k] | q[n, k + 1] << 4        k even          uint8   [N, K / 2]
    scale, bias                                                          float32 [N, K / g]

This is the canonical form in which a weight travels from file to backend; each backend repacks it once, at
load, into what its kernel wants to read (`Backend.prepare_linear`); `cuda_w4_bytes` is the size of what a card makes of
it. numpy only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

GROUP_SIZES = (32, 64, 128)
CUDA_ROWS = 64  # output channels are padded up to a multiple of this on a card


@dataclass(frozen=True, slots=True, eq=False)
class W4:
    """A 4-bit weight in canonical form; shapes as drawn above."""

    qweight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    integer_zeros: bool = False  # bias is -zero * scale with zero in 0 .. 15
    order: np.ndarray | None = None  # int32 [K]: column j stands for input channel order[j], whose activation it wants

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * 2

    @property
    def group_size(self) -> int:
        return self.in_features // self.scale.shape[1]

    def rows(self, start: int, stop: int) -> W4:
        """Output channels start .. stop-1 (views)."""
        return dataclasses.replace(self, qweight=self.qweight[start:stop], scale=self.scale[start:stop], bias=self.bias[start:stop])

    def columns(self, start: int, stop: int) -> W4:
        """Input channels start .. stop-1, multiples of the group size (views); not of a weight with an order."""
        g = self.group_size
        if self.order is not None:
            raise ValueError("a share of the input channels of a weight with an order is cut where it is read")
        if start % g or stop % g:
            raise ValueError(f"input channels {start}:{stop} cut a W4 group of {g} in two")
        groups = slice(start // g, stop // g)
        return dataclasses.replace(
            self, qweight=self.qweight[:, start // 2 : stop // 2], scale=self.scale[:, groups], bias=self.bias[:, groups]
        )


def concat_rows(parts: list[W4]) -> W4:
    """Stack output channels (q, k, v; gate, up) of weights with one K, one group size and one order (`same_columns`)."""
    stacked = (np.concatenate([getattr(p, name) for p in parts]) for name in ("qweight", "scale", "bias"))
    return W4(*stacked, integer_zeros=all(p.integer_zeros for p in parts), order=parts[0].order)


def same_columns(parts: list[W4]) -> bool:
    """Whether these have one group size, and their input channels in one order."""
    first = parts[0].order
    same = all(p.order is None if first is None else p.order is not None and np.array_equal(p.order, first) for p in parts)
    return same and len({p.group_size for p in parts}) == 1


def pack(q: np.ndarray) -> np.ndarray:
    """uint8 [N, K] with values 0..15 -> uint8 [N, K / 2]."""
    if q.dtype != np.uint8 or q.ndim != 2 or q.shape[1] % 2:
        raise ValueError(f"pack wants uint8 [N, even K], got {q.dtype} {q.shape}")
    if q.size and int(q.max()) > 15:
        raise ValueError(f"pack wants values 0..15, got {int(q.max())}")
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack(qweight: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 2] -> uint8 [N, K]; the inverse of `pack`."""
    q = np.empty((qweight.shape[0], qweight.shape[1] * 2), np.uint8)
    q[:, 0::2] = qweight & 15
    q[:, 1::2] = qweight >> 4
    return q


def dequantize(w: W4) -> np.ndarray:
    """float32 [N, K], input channels as the model counts them."""
    g = w.group_size
    q = unpack(w.qweight).reshape(w.out_features, -1, g).astype(np.float32)
    values = (q * w.scale[:, :, None] + w.bias[:, :, None]).reshape(w.out_features, w.in_features)
    if w.order is None:
        return values
    out = np.empty_like(values)
    out[:, w.order] = values
    return out


def cuda_w4_bytes(out_features: int, in_features: int, group_size: int) -> int:
    """Bytes of a weight repacked for the CUDA kernels: nibbles, and scale and bias of 16 bits each a group; padded up to
    whole tiles of `CUDA_ROWS` output channels and whole groups."""
    rows = -(-out_features // CUDA_ROWS) * CUDA_ROWS
    groups = -(-in_features // group_size)
    return rows * groups * (group_size // 2 + 4)
