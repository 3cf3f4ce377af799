"""The 4-bit weight as it lies on the card: the drawing, its sizes, and `W4Device`. Packing kernels and products import it.

A weight of N output and K input channels (`engine/w4.py`) is cut into *tiles* of 16 rows and *chunks* of 64 input channels; a
chunk of a tile is 512 bytes, one 128-bit load a lane, and holds the A fragments of four mma.m16n8k16 steps. N is padded to
16, K to 64; padding is zero.

    packed   uint32 [N / 16, K / 64, 32 lanes, 4 steps]               lane = 4 g + t (g 0..7, t 0..3), step i
    pairs    uint32 [N / 16, K' / group, 8 g, 2]                      rows g and g + 8; K' = K padded to 64

An mma does not care in which order k is summed, as long as both operands agree. So step i of lane t takes the four input channels
k0 = 64 chunk + 32 (i / 2) + 8 t + 4 (i % 2) .. k0 + 3, and the other operand, the activations, is read as it lies in memory:
eight consecutive channels are one 128-bit load that feeds two steps.

    bits of a word     28..31  24..27  20..23  16..19  12..15   8..11    4..7    0..3
    row                 g + 8       g   g + 8       g   g + 8       g   g + 8       g
    input channel      k0 + 3  k0 + 3  k0 + 1  k0 + 1  k0 + 2  k0 + 2      k0      k0
    fragment register      a3      a2      a1      a0      a3      a2      a1      a0      (low half: even channel)

bfloat16 computes with words rotated left by 3, so that a nibble, shifted by a multiple of 4, lands in bits 3..6 of a half; there
0x4180 | q << 3 is the bfloat16 16 + q, exactly. float16 needs neither an offset nor most shifts: the nibbles of bits 0..3 and
4..7 are, as subnormal halves, q * 2^-24 and q * 2^-20.

    a pair             low half: scale, float16      high half: zero or bias, float16
    form "zero"        w = scale * (q - zero)        AWQ, GPTQ, Q4_0: the zero is an integer, both halves are exact
    form "bias"        w = scale * q + bias          GGUF: exact for Q4_0 and Q4_1; Q4_K's products of a half and 6 bits are rounded
                                                     to 11 bits, at most 2^-12 of the scale and of the bias

Knows no kernel and no Numba; torch for the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.cuda.tuning import packed_shapes

FORMS = ("zero", "bias")


@dataclass(frozen=True, slots=True, eq=False)
class W4Device:
    """A packed weight on the card: `packed` and `pairs` int32 tensors as drawn above, for one computing dtype."""

    packed: torch.Tensor
    pairs: torch.Tensor
    n: int
    k: int
    group: int
    form: str
    dtype: str

    @classmethod
    def zeros(cls, n: int, k: int, group: int, form: str, dtype: str, device: torch.device | str) -> W4Device:
        """Buffers to pack into; every padding element is zero already."""
        if form not in FORMS:
            raise ValueError(f"a pair of scales is of the form {' or '.join(FORMS)}, not {form!r}")
        words, pairs = packed_shapes(n, k, group)
        packed = torch.zeros(words, dtype=torch.int32, device=device)
        return cls(packed, torch.zeros(pairs, dtype=torch.int32, device=device), n, k, group, form, dtype)

    @property
    def chunks(self) -> int:
        return self.packed.shape[1]

    @property
    def padded_groups(self) -> int:
        return self.pairs.shape[1]
