"""8-bit products: activations quantized a token, multiplied by the tensor cores in 8 bits (cuBLAS), scaled back.

`quantize_rows` of `engine/eight_bit.py`, and the products of `Int8` and `Float8` weights. Layouts on the card (T tokens, N output, K
input channels, K' = K padded with zeros: to 512 for blocks, else K):

    kind        q of a weight       its scale                         activations      their scale
    int8        int8 [N, K]         float32 [N]                       int8 [T, K]      float32 [T]
    fp8         e4m3 [N, K]         float32 [1, N]                    e4m3 [T, K]      float32 [T, 1]
    fp8 blocks  e4m3 [N, K']        float32 [N / 128, K' / 128]       e4m3 [T, K']     float32 [K' / 128, T], of 128 channels each

int8 products are int32 sums, brought to the computing dtype (times both scales, plus the bias) by `scale_back`, some rows at
a time so that the sums stay near. fp8 products are scaled by cuBLAS, but those of few rows and a large weight, which it reads
faster when it has nothing to scale: their float32 sums are scaled like int8's. cuBLAS wants more than 16 rows of int8 and multiples of 4
of fp8 blocks: what is missing is taken from rows that are not looked at.

work split: `quantize_rows` one thread block a row, whose numbers stay in registers between the maximum and the rounding;
the maximum of |x| as integers, so that a number that is none stays one. `scale_back` one thread for 8 outputs.

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
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types
from engine.eight_bit import BLOCK, E4M3_LARGEST, INT8_LARGEST, Float8, Int8
from engine.plan_cuda import EIGHT_BIT_PIECE, FEW_FP8_ROWS, eight_bit_kind, is_large, padded_inputs

VECTOR = 8  # 16-bit numbers of a 128-bit access
LEAST_INT8_ROWS = 32  # cuBLAS wants more than 16
BLOCK_ROWS = 4  # cuBLAS wants multiples
MAX_INPUTS = 32768
ROUNDING = 12582912.0  # 1.5 * 2^23: added to a float below 2^22, its low byte is the float as an integer

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, FLOATS, INTS = pointer(u32), pointer(f32), pointer(i32)
PACK = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16_portable}
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8 blocks": torch.float8_e4m3fn}


# -- kernels --------------------------------------------------------------------------------------------------------------------


def quantize_rows(inputs: int, width: int, kind: str, dtype: str, threads: int) -> Kernel:
    """(x, q, scales, rows of the scales)."""
    low, high = ptx.LOW[dtype], ptx.HIGH[dtype]
    vectors, all_vectors = inputs // VECTOR, width // VECTOR
    rounds = -(-all_vectors // threads)
    whole = vectors == all_vectors and vectors % threads == 0
    by_block, eight_bits = kind == "fp8 blocks", kind != "int8"
    numbers, warps = VECTOR * rounds, threads // 32
    lane_steps = (8, 4, 2, 1) if by_block else (16, 8, 4, 2, 1)
    warp_steps = tuple(n for n in (16, 8, 4, 2, 1) if n < warps)
    largest_number = f32(E4M3_LARGEST if eight_bits else INT8_LARGEST)
    step = f32(1.0 / (E4M3_LARGEST if eight_bits else INT8_LARGEST))
    magnitude, rounding = u32(0x7FFFFFFF), f32(ROUNDING)
    add_exact, multiply_exact, bits, permute = ptx.add_exact, ptx.multiply_exact, ptx.bits_of_float, ptx.permute_bytes

    @cuda.jit(device=True, inline="always")
    def factor(most: Any) -> Any:
        largest = ptx.float_of_bits(most)
        return ptx.divide_exact(largest_number, largest) if largest > f32(0.0) else f32(0.0)

    @cuda.jit(device=True, inline="always")
    def four_bytes(a: Any, b: Any, c: Any, d: Any) -> Any:
        if eight_bits:
            return u32(u32(ptx.pack_e4m3(a, b)) | u32(u32(ptx.pack_e4m3(c, d)) << u32(16)))
        first = permute(bits(add_exact(a, rounding)), bits(add_exact(b, rounding)), u32(0x0040))
        second = permute(bits(add_exact(c, rounding)), bits(add_exact(d, rounding)), u32(0x0040))
        return permute(first, second, u32(0x5410))

    def kernel(x, q, scales, scale_rows):  # type: ignore[no-untyped-def]
        row, thread = u32(cuda.blockIdx.x), i32(cuda.threadIdx.x)
        source = ptx.address(x) + u64(row) * u64(2 * inputs)
        target = ptx.address(q) + u64(row) * u64(width)
        values = cuda.local.array(numbers, f32)
        mosts = cuda.local.array(rounds, u32)
        partial = cuda.shared.array(32, u32)
        for r in range(rounds):
            at = thread + i32(r * threads)
            most = u32(0)
            if whole or at < i32(vectors):
                words = ptx.load_constant_128(source + u64(u32(at) * u32(16)))
                for i in range(4):
                    values[8 * r + 2 * i], values[8 * r + 2 * i + 1] = low(words[i]), high(words[i])
                    most = max(most, max(u32(bits(low(words[i])) & magnitude), u32(bits(high(words[i])) & magnitude)))
            else:
                for i in range(VECTOR):
                    values[8 * r + i] = f32(0.0)
            mosts[r] = most
        if by_block:
            for r in range(rounds):
                for lanes in lane_steps:
                    mosts[r] = max(mosts[r], ptx.shuffle_xor(mosts[r], u32(lanes)))
        else:
            most = mosts[0]
            for r in range(1, rounds):
                most = max(most, mosts[r])
            for lanes in lane_steps:
                most = max(most, ptx.shuffle_xor(most, u32(lanes)))
            if warps > 1:
                if thread & i32(31) == i32(0):
                    partial[thread >> i32(5)] = most
                cuda.syncthreads()
                lane = thread & i32(31)
                most = partial[lane] if lane < i32(warps) else u32(0)
                for lanes in warp_steps:
                    most = max(most, ptx.shuffle_xor(most, u32(lanes)))
                most = ptx.shuffle_first(most)
            for r in range(rounds):
                mosts[r] = most
            if thread == i32(0):
                scales[row] = multiply_exact(ptx.float_of_bits(most), step)
        for r in range(rounds):
            at = thread + i32(r * threads)
            if whole or at < i32(all_vectors):
                by = factor(mosts[r])
                v = 8 * r
                a = four_bytes(
                    multiply_exact(values[v], by), multiply_exact(values[v + 1], by), multiply_exact(values[v + 2], by),
                    multiply_exact(values[v + 3], by),
                )  # fmt: skip
                b = four_bytes(
                    multiply_exact(values[v + 4], by), multiply_exact(values[v + 5], by), multiply_exact(values[v + 6], by),
                    multiply_exact(values[v + 7], by),
                )  # fmt: skip
                ptx.store_64(target + u64(u32(at) * u32(8)), a, b)
                if by_block and thread & i32(15) == i32(0):
                    scales[u64(u32(at) >> u32(4)) * u64(scale_rows) + u64(row)] = multiply_exact(ptx.float_of_bits(mosts[r]), step)

    return Kernel(kernel, (WORDS, WORDS, FLOATS, u32), threads)


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
        self._one: torch.Tensor
        self._few: torch.Tensor  # outputs of rows that make up a multiple

    @property
    def variants(self) -> tuple[Variant, ...]:
        sums = {True: self._sums_wide["int8"], False: self._sums_wide["fp8"]}
        return (*self._quantize.values(), *(variant for (integers, _), variant in self._scale_back.items() if sums[integers]))

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
        self._quantize.setdefault((k, width, kind), self._variant(k, width, kind))
        self._widths.append(n if kind == "fp8 blocks" else 0)
        if kind == "int8" or kind == "fp8" and is_large(n, k):
            self._sums_wide[kind] = max(self._sums_wide[kind], n)
        return EightBit(kind, n, k, width, q.view(TYPES[kind]), scale)

    def _variant(self, inputs: int, width: int, kind: str) -> Variant:
        threads = min(512, -(-(width // VECTOR) // 32) * 32)
        return Variant(__name__, "quantize_rows", (inputs, width, kind, self._dtype, threads))

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
        self._few = torch.empty(BLOCK_ROWS * max(self._widths), dtype=getattr(torch, self._dtype), **place)

    def __call__(
        self, x: torch.Tensor, weight: EightBit, out: torch.Tensor, bias: torch.Tensor | None, bias16: torch.Tensor | None
    ) -> None:
        """out [rows, N] = x [rows, K] W^T + b; x and out in the computing dtype, bias float32 and the same in the computing dtype."""
        if not len(x):
            return
        if weight.kind == "int8":
            pieces = -(-len(x) * weight.n // self._sums.numel())
            size = -(-len(x) // pieces)  # of one: as many rows as there is room for sums, evenly
            for first in range(0, len(x), size):
                rows = slice(first, first + size)
                self._int8(x[rows], weight, out[rows], bias)
        elif weight.kind == "fp8" and len(x) <= FEW_FP8_ROWS and is_large(weight.n, weight.k):
            q, scale = self._activations(x, weight, len(x))
            sums = self._sums[: len(x) * weight.n].view(len(x), weight.n)
            self._device.scaled_mm(q, weight.q, self._one, self._one, None, sums.view(torch.float32))
            self._scale(sums, scale, weight, out, bias, integers=False)
        elif weight.kind == "fp8":
            q, scale = self._activations(x, weight, len(x))
            self._device.scaled_mm(q, weight.q, scale.view(-1, 1), weight.scale, bias16, out)
        else:
            self._blocks(x, weight, out)
            if bias16 is not None:
                out += bias16

    def _int8(self, x: torch.Tensor, weight: EightBit, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        rows = max(len(x), LEAST_INT8_ROWS)
        q, scale = self._activations(x, weight, rows)
        sums = self._sums[: rows * weight.n].view(rows, weight.n)
        self._device.int_mm(q, weight.q, sums)
        self._scale(sums, scale, weight, out, bias, integers=True)

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

    def _activations(self, x: torch.Tensor, weight: EightBit, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(q [rows, K'], scales): of the rows of x, and whatever was there of more."""
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
