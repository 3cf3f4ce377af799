"""8-bit products: activations quantized a token, multiplied by the tensor cores in 8 bits (cuBLAS), scaled back.

`quantize_rows` of `engine/eight_bit.py`, and the products of `Int8` and `Float8` weights. Layouts on the card (T tokens, N output, K
input channels, K' = K padded with zeros: to 512 for blocks, else K):

    kind        q of a weight       its scale                         activations      their scale
    int8        int8 [N, K]         float32 [N]                       int8 [T, K]      float32 [T]
    fp8         e4m3 [N, K]         float32 [1, N]                    e4m3 [T, K]      float32 [T, 1]
    fp8 blocks  e4m3 [N, K']        float32 [N / 128, K' / 128]       e4m3 [T, K']     float32 [K' / 128, T], of 128 channels each

int8 products are int32 sums, brought to the computing dtype (times both scales, plus the bias) by `scale_back`, a thread for 8
outputs, some rows at a time so that the sums stay near. fp8 products are scaled by cuBLAS, but those of few rows and a large
weight, which it reads faster when it has nothing to scale: their float32 sums are scaled like int8's. cuBLAS wants more than 16
rows of int8 and multiples of 4 of fp8 blocks: what is missing is taken from rows that are not looked at. Where gate, up and down
are int8 (or fp8), what gate and up give goes through SiLU into the bytes that down reads in one kernel (`Gated`).

Measured on an H200 (torch 2.11, cuBLAS 13.0), us of 8,192 rows x [28672, 4096]: bf16 2770, int8 2541 (2254 in pieces of
1,024 rows), fp8 1441, fp8 blocks 1798; of 1 row: 58, 37, 49 (not scaled: 32), -; [4096, 14336] of 1 row: 35, 45, 52 (26), -; of
256 rows: fp8 43 (30), of 1,024: 88 (87); [6144, 4096] of 1 row: fp8 25 (37).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.cuda import ptx
from engine.cuda.elementwise import VECTOR
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.parts import PACK
from engine.cuda.quantize_rows import rows_variant, silu_variant
from engine.cuda.target import cuda, pointer, types
from engine.eight_bit import BLOCK, Float8, Int8
from engine.plan_cuda import EIGHT_BIT_PIECE, FEW_FP8_ROWS, eight_bit_kind, is_large, padded_inputs

LEAST_INT8_ROWS = 32  # cuBLAS wants more than 16
BLOCK_ROWS = 4  # cuBLAS wants multiples
MAX_INPUTS = 32768

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, FLOATS, INTS = pointer(u32), pointer(f32), pointer(i32)
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8 blocks": torch.float8_e4m3fn}


# -- kernels --------------------------------------------------------------------------------------------------------------------


def scale_back(dtype: str, integers: bool, with_bias: bool, threads: int) -> Kernel:
    """(sums int32 or float32 [T, N], row scales, weight scales, bias, out, N, vectors of out): out = sums * both scales (+ bias)."""
    pack, number = PACK[dtype], ptx.float_of_bits

    def kernel(sums, row_scales, scales, bias, out, n, count):  # type: ignore[no-untyped-def]
        at = u32(cuda.blockIdx.x) * u32(threads) + u32(cuda.threadIdx.x)
        if at < u32(count):
            per_row = u32(n) >> u32(3)
            row = at // per_row
            column = u64(at - row * per_row) * u64(32)
            scale = row_scales[row]
            values = cuda.local.array(8, f32)
            for half in range(2):
                words = ptx.load_128(ptx.address(sums) + u64(at) * u64(32) + u64(16 * half))
                w = ptx.load_constant_128(ptx.address(scales) + column + u64(16 * half))
                for i in range(4):
                    value = f32(i32(words[i])) if integers else number(words[i])
                    values[4 * half + i] = value * (scale * number(w[i]))
                if with_bias:
                    b = ptx.load_constant_128(ptx.address(bias) + column + u64(16 * half))
                    for i in range(4):
                        values[4 * half + i] += number(b[i])
            ptx.store_128(
                ptx.address(out) + u64(at) * u64(16), pack(values[0], values[1]), pack(values[2], values[3]), pack(values[4], values[5]),
                pack(values[6], values[7]),
            )  # fmt: skip

    return Kernel(kernel, (WORDS, FLOATS, WORDS, WORDS, WORDS, i32, u32), threads)


# -- operations -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class EightBit:
    """A weight on the card, as drawn above; `width` is K'."""

    kind: str
    n: int
    k: int
    width: int
    q: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """silu(gate) * up of some tokens, quantized: the activations of the product of `kind` that comes next."""

    rows: int
    kind: str

    def __len__(self) -> int:
        return self.rows


class EightBitProducts:
    """Of one rank: uploads weights and multiplies by them. `max_rows`: of the largest step."""

    def __init__(self, library: Library, device: Any, dtype: str, max_rows: int) -> None:
        self._library, self._device, self._dtype, self._max_rows = library, device, dtype, max_rows
        self._quantize: dict[tuple[int, int, str], Variant] = {}
        self._scale_back = {
            (integers, bias): Variant(__name__, "scale_back", (dtype, integers, bias, 256))
            for integers in (True, False)
            for bias in (True, False)
        }
        self._widths, self._sums_wide = [0], {"int8": 0, "fp8": 0}
        self._q: torch.Tensor  # of the activations
        self._row_scales: torch.Tensor
        self._sums: torch.Tensor
        self._silu: dict[str, Variant] = {}
        self._gated_width = 0
        self._gated_q: torch.Tensor  # bytes of `Gated`
        self._gated_scales: torch.Tensor
        self._one: torch.Tensor
        self._few: torch.Tensor  # outputs of rows that make up a multiple

    @property
    def variants(self) -> tuple[Variant, ...]:
        sums = {True: self._sums_wide["int8"], False: self._sums_wide["fp8"]}
        return (
            *self._quantize.values(),
            *self._silu.values(),
            *(variant for (integers, _), variant in self._scale_back.items() if sums[integers]),
        )

    def load(self, parts: list[Any]) -> EightBit | None:
        """Weights with one input, stacked; None where they are not of one 8-bit kind that this card multiplies."""
        first = parts[0]
        if not all(isinstance(part, type(first)) for part in parts) or not isinstance(first, Int8 | Float8):
            return None
        blocks = isinstance(first, Float8) and not first.by_channel
        if blocks and not all(isinstance(p, Float8) and p.blocked and not p.out_features % BLOCK for p in parts):
            return None
        if isinstance(first, Float8) and len({part.scale.shape[1] for part in parts}) > 1:
            return None
        n, k = sum(part.out_features for part in parts), first.in_features
        wanted = "int8" if isinstance(first, Int8) else "fp8 blocks" if blocks else "fp8"
        kind = eight_bit_kind(wanted, n, k, self._device.cc, self._dtype, self._device.block_scaling)
        if not kind or k > MAX_INPUTS:
            return None
        width = padded_inputs(kind, k)
        q = torch.zeros((n, width), dtype=torch.uint8, device=self._device.torch_device)
        row = 0
        for part in parts:
            q[row : row + part.out_features, :k] = torch.from_numpy(np.ascontiguousarray(part.q).view(np.uint8)).to(q.device)
            row += part.out_features
        scale = torch.from_numpy(_scale(kind, parts, width)).to(q.device)
        self._quantize.setdefault((k, width, kind), rows_variant(k, width, kind, self._dtype))
        self._widths.append(n if kind == "fp8 blocks" else 0)
        if kind == "int8" or kind == "fp8" and is_large(n, k):
            self._sums_wide[kind] = max(self._sums_wide[kind], n)
        return EightBit(kind, n, k, width, q.view(TYPES[kind]), scale)

    def can_gate(self, gate_up: EightBit | None, down: EightBit | None) -> bool:
        """Whether what the first gives may go to the second as `Gated`; remembered. Before `finish`."""
        if gate_up is None or down is None or gate_up.kind != down.kind or gate_up.kind == "fp8 blocks" or gate_up.n != 2 * down.k:
            return False
        self._silu.setdefault(down.kind, silu_variant(down.k, down.kind, self._dtype))
        self._gated_width = down.k
        return True

    def finish(self) -> None:
        """Make the buffers of a step."""
        if not self._quantize:
            return
        place = {"device": self._device.torch_device}
        rows = max(self._max_rows + BLOCK_ROWS, LEAST_INT8_ROWS)
        widest = max(width for _, width, _ in self._quantize)
        groups = max((width // BLOCK for _, width, kind in self._quantize if kind == "fp8 blocks"), default=1)
        self._q = torch.zeros(rows * widest, dtype=torch.uint8, **place)
        self._row_scales = torch.zeros(rows * groups, dtype=torch.float32, **place)
        piece = max(min(self._max_rows, EIGHT_BIT_PIECE), LEAST_INT8_ROWS)
        few = min(self._max_rows, FEW_FP8_ROWS)
        self._sums = torch.empty(max(piece * self._sums_wide["int8"], few * self._sums_wide["fp8"]), dtype=torch.int32, **place)
        self._one = torch.ones((), dtype=torch.float32, **place)
        gated = rows if self._gated_width else 0
        self._gated_q = torch.zeros(gated * self._gated_width, dtype=torch.uint8, **place)
        self._gated_scales = torch.zeros(gated, dtype=torch.float32, **place)
        self._few = torch.empty(BLOCK_ROWS * max(self._widths), dtype=getattr(torch, self._dtype), **place)

    def gate(self, x: torch.Tensor, weight: EightBit, out: torch.Tensor) -> Gated:
        """silu(gate) * up of `weight`'s outputs for x [rows, K], as bytes for a `down` that `can_gate`; `out` [rows, 2 I] is used."""
        q, scales = self._gated(weight.kind, len(x))
        silu = self._library[self._silu[weight.kind]]
        if weight.kind == "int8":
            for rows in self._pieces(len(x), weight):
                sums, row_scales = self._sums_of(x[rows], weight)
                silu(len(x[rows]), sums, row_scales, weight.scale, q.view(torch.uint8)[rows], scales[rows])
        elif len(x):
            self(x, weight, out, None, None)
            silu(len(x), out, None, None, q, scales)
        return Gated(len(x), weight.kind)

    def _gated(self, kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        width = self._gated_width
        return self._gated_q[: rows * width].view(TYPES[kind]).view(rows, width), self._gated_scales[:rows]

    def _pieces(self, rows: int, weight: EightBit) -> list[slice]:
        """As many rows at a time as there is room for sums, evenly."""
        if not rows:
            return []
        size = -(-rows // -(-rows * weight.n // self._sums.numel()))
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]

    def __call__(
        self, x: torch.Tensor | Gated, weight: EightBit, out: torch.Tensor, bias: torch.Tensor | None, bias16: torch.Tensor | None
    ) -> None:
        """out [rows, N] = x [rows, K] W^T + b; x and out in the computing dtype, bias float32 and the same in the computing dtype."""
        if not len(x):
            return
        if weight.kind == "int8":
            for rows in self._pieces(len(x), weight):
                given = Gated(rows.stop, x.kind) if isinstance(x, Gated) else x[rows]
                sums, scale = self._sums_of(given, weight, rows.start if isinstance(x, Gated) else 0)
                self._scale(sums, scale, weight, out[rows], bias, integers=True)
        elif weight.kind == "fp8" and len(x) <= FEW_FP8_ROWS and is_large(weight.n, weight.k):
            q, scale = self._activations(x, weight, len(x))
            sums = self._sums[: len(x) * weight.n].view(len(x), weight.n)
            self._device.scaled_mm(q, weight.q, self._one, self._one, None, sums.view(torch.float32))
            self._scale(sums, scale, weight, out, bias, integers=False)
        elif weight.kind == "fp8":
            q, scale = self._activations(x, weight, len(x))
            self._device.scaled_mm(q, weight.q, scale.view(-1, 1), weight.scale, bias16, out)
        elif not isinstance(x, Gated):
            self._blocks(x, weight, out)
            if bias16 is not None:
                out += bias16

    def _sums_of(self, x: torch.Tensor | Gated, weight: EightBit, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 sums of rows `first` .. of x (and of more, where cuBLAS wants more), and the scales of those rows."""
        rows = max(len(x) - first, LEAST_INT8_ROWS)
        if isinstance(x, Gated):
            q, scale = (whole[first:] for whole in self._gated(x.kind, first + rows))
        else:
            q, scale = self._activations(x, weight, rows)
        sums = self._sums[: rows * weight.n].view(rows, weight.n)
        self._device.int_mm(q, weight.q, sums)
        return sums, scale

    def _scale(
        self, sums: torch.Tensor, scale: torch.Tensor, weight: EightBit, out: torch.Tensor, bias: torch.Tensor | None, *, integers: bool
    ) -> None:
        vectors = len(out) * weight.n // VECTOR
        variant = self._scale_back[integers, bias is not None]
        self._library[variant](-(-vectors // 256), sums, scale, weight.scale, bias, out, weight.n, vectors)

    def _blocks(self, x: torch.Tensor, weight: EightBit, out: torch.Tensor) -> None:
        even = len(x) // BLOCK_ROWS * BLOCK_ROWS
        if even:
            q, scale = self._activations(x[:even], weight, even)
            self._device.scaled_mm(q, weight.q, scale.view(-1, even).T, weight.scale.T, None, out[:even])
        if rest := len(x) - even:
            few = self._few[: BLOCK_ROWS * weight.n].view(BLOCK_ROWS, weight.n)
            q, scale = self._activations(x[even:], weight, BLOCK_ROWS)
            self._device.scaled_mm(q, weight.q, scale.view(-1, BLOCK_ROWS).T, weight.scale.T, None, few)
            out[even:].copy_(few[:rest])

    def _activations(self, x: torch.Tensor | Gated, weight: EightBit, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(q [rows, K'], scales): of the rows of x, and whatever was there of more."""
        if isinstance(x, Gated):
            return self._gated(x.kind, rows)
        q = self._q[: rows * weight.width]
        scales = self._row_scales[: rows * (weight.width // BLOCK if weight.kind == "fp8 blocks" else 1)]
        self._library[self._quantize[weight.k, weight.width, weight.kind]](len(x), x, q, scales, rows)
        return q.view(TYPES[weight.kind]).view(rows, weight.width), scales


def _scale(kind: str, parts: list[Any], width: int) -> np.ndarray:
    """float32, as drawn in the module."""
    if kind == "int8":
        return np.concatenate([part.scale for part in parts]).astype(np.float32)
    whole = np.concatenate([part.scale for part in parts])
    if kind == "fp8":
        return np.ascontiguousarray(whole.T)
    blocks = np.zeros((len(whole) // BLOCK, width // BLOCK), np.float32)
    blocks[:, : whole.shape[1]] = whole[::BLOCK]
    return blocks
