"""4-bit weights on the card: from checkpoint bytes to what `w4_matmul.py` reads, and from there to dense 16-bit rows.

The layout is drawn in `engine/cuda/w4_layout.py`. Every kernel here has one thread for each packed word (or scale word) of the
destination; a launch writes the output channels of one part only and keeps the others, so that q, k and v (gate and up)
are stacked without a copy. Runs at load, and before a dense product. `engine.w4.dequantize` is the reference.

work split: a thread block of 128 threads repacks one tile's chunk (16 rows, 64 input channels, 128 words); consecutive thread
blocks are consecutive tiles, because AWQ's int32 hold eight neighbouring output channels of one input channel.

measured on an H200: dequantize 78 to 86 % of what a read kernel reaches.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types
from engine.cuda.w4_layout import W4Device

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
p8, p16, p32, pf32 = pointer(types.uint8), pointer(types.uint16), pointer(u32), pointer(f32)
THREADS = 128
PACK = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16_portable}  # of pairs: sm_75 has no packed conversion
MAX_GRID_Y = 65535


def pack_w4(dtype: str) -> Kernel:
    """Canonical W4 nibbles (`engine/w4.py`) to packed words."""
    turn = u32(29 if dtype == "bfloat16" else 0)  # rotate right by 29 is left by 3
    back = u32(3 if dtype == "bfloat16" else 0)
    rotate_right = ptx.rotate_right

    def kernel(source: Any, packed: Any, first_row: Any, rows: Any, k: Any, chunks: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        tile, chunk = i32(i32(first_row >> 4) + i32(cuda.blockIdx.x)), i32(cuda.blockIdx.y)
        step, lane = i32(thread & 3), i32(thread >> 2)
        row = i32(i32(tile * 16 + i32(lane >> 2)) - first_row)
        at = i32(i32(chunk * 64 + i32(step >> 1) * 32) + i32(i32(lane & 3) * 8 + i32(step & 1) * 4))
        place = u64(u64(i32(tile * chunks + chunk)) * u64(128) + u64(thread))
        word = rotate_right(packed[place], back)
        if at < k:
            for half in range(2):
                r = i32(row + half * 8)
                if r >= 0 and r < rows:
                    byte = u64(u64(r) * u64(i32(k >> 1)) + u64(i32(at >> 1)))
                    low, high = u32(source[byte]), u32(source[byte + u64(1)])
                    new = u32(u32(low & u32(15)) | u32(u32(low >> u32(4)) << u32(16)))
                    new = u32(new | u32(u32(high & u32(15)) << u32(8)) | u32(u32(high >> u32(4)) << u32(24)))
                    word = u32(u32(word & u32(0xF0F0F0F0 >> (4 * half))) | u32(new << u32(4 * half)))
        packed[place] = rotate_right(word, turn)

    return Kernel(kernel, (p8, p32, i32, i32, i32, i32), THREADS)


def pack_awq(dtype: str) -> Kernel:
    """AWQ's gemm layout (`engine/awq.py`) to packed words; `pitch`: int32 from one input channel to the next."""
    turn = u32(29 if dtype == "bfloat16" else 0)
    back = u32(3 if dtype == "bfloat16" else 0)
    rotate_right = ptx.rotate_right

    def kernel(source: Any, packed: Any, first_row: Any, rows: Any, k: Any, chunks: Any, pitch: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        tile, chunk = i32(i32(first_row >> 4) + i32(cuda.blockIdx.x)), i32(cuda.blockIdx.y)
        step, lane = i32(thread & 3), i32(thread >> 2)
        row = i32(i32(tile * 16 + i32(lane >> 2)) - first_row)
        at = i32(i32(chunk * 64 + i32(step >> 1) * 32) + i32(i32(lane & 3) * 8 + i32(step & 1) * 4))
        place = u64(u64(i32(tile * chunks + chunk)) * u64(128) + u64(thread))
        word = rotate_right(packed[place], back)
        if at < k:
            for half in range(2):
                r = i32(row + half * 8)
                if r >= 0 and r < rows:
                    nibble = u32(u32(i32(i32(r & 7) >> 1) + i32(r & 1) * 4) * u32(4))  # of channel r in its int32
                    new = u32(0)
                    for i in range(4):
                        value = source[u64(u64(i32(at + i)) * u64(pitch) + u64(i32(r >> 3)))]
                        new = u32(new | u32(u32(u32(value >> nibble) & u32(15)) << u32((i & 1) * 16 + (i >> 1) * 8)))
                    word = u32(u32(word & u32(0xF0F0F0F0 >> (4 * half))) | u32(new << u32(4 * half)))
        packed[place] = rotate_right(word, turn)

    return Kernel(kernel, (p32, p32, i32, i32, i32, i32, i32), THREADS)


def pack_scales_w4(form: str) -> Kernel:
    """float32 scale and bias [N, K / g] to pairs; grid (groups / 8, tiles), a thread for each of 16 rows of 8 groups."""
    zero_form = form == "zero"
    half = ptx.half_f16

    def kernel(scale: Any, bias: Any, pairs: Any, first_row: Any, rows: Any, groups: Any, padded_groups: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        tile = i32(i32(first_row >> 4) + i32(cuda.blockIdx.y))
        row = i32(thread & 15)
        group = i32(i32(cuda.blockIdx.x) * 8 + i32(thread >> 4))
        source = i32(i32(tile * 16 + row) - first_row)
        if group < groups and source >= 0 and source < rows:
            at = u64(u64(source) * u64(groups) + u64(group))
            s, b = scale[at], bias[at]
            if zero_form:
                b = f32(-b / s) if b != f32(0.0) else f32(0.0)
            to = u64(u64(i32(tile * padded_groups + group)) * u64(16) + u64(i32(i32(row & 7) * 2 + i32(row >> 3))))
            pairs[to] = u32(u32(half(s)) | u32(u32(half(b)) << u32(16)))

    return Kernel(kernel, (pf32, pf32, p32, i32, i32, i32, i32), THREADS)


def pack_scales_awq(form: str) -> Kernel:
    """AWQ's scales float16 [K / g, N] and qzeros to pairs (scale, zero), both exact. `form` is always "zero"."""
    if form != "zero":
        raise ValueError(f"AWQ scales come with zeros, not with a {form}")
    half = ptx.half_f16

    def kernel(
        scales: Any, qzeros: Any, pairs: Any, first_row: Any, rows: Any, groups: Any, padded_groups: Any, pitch: Any, zero_pitch: Any
    ) -> None:
        thread = i32(cuda.threadIdx.x)
        tile = i32(i32(first_row >> 4) + i32(cuda.blockIdx.y))
        row = i32(thread & 15)
        group = i32(i32(cuda.blockIdx.x) * 8 + i32(thread >> 4))
        source = i32(i32(tile * 16 + row) - first_row)
        if group < groups and source >= 0 and source < rows:
            s = u32(scales[u64(u64(group) * u64(pitch) + u64(source))])
            packed = qzeros[u64(u64(group) * u64(zero_pitch) + u64(i32(source >> 3)))]
            nibble = u32(u32(i32(i32(source & 7) >> 1) + i32(source & 1) * 4) * u32(4))
            zero = f32(u32(u32(packed >> nibble) & u32(15)))
            to = u64(u64(i32(tile * padded_groups + group)) * u64(16) + u64(i32(i32(row & 7) * 2 + i32(row >> 3))))
            pairs[to] = u32(s | u32(u32(half(zero)) << u32(16)))

    return Kernel(kernel, (p16, p32, p32, i32, i32, i32, i32, i32, i32), THREADS)


def count_not_finite() -> Kernel:
    """Adds to `counter` how many of `count` pairs hold an infinity or a NaN (a float16 whose exponent is all ones)."""
    add_counter, address = ptx.add_counter, ptx.address

    def kernel(pairs: Any, count: Any, counter: Any) -> None:
        at = u32(u32(cuda.blockIdx.x) * u32(THREADS) + u32(cuda.threadIdx.x))
        if at < count:
            word = pairs[u64(at)]
            if u32(word & u32(0x7C00)) == u32(0x7C00) or u32(word & u32(0x7C000000)) == u32(0x7C000000):
                add_counter(address(counter), u32(1))

    return Kernel(kernel, (p32, u32, p32), THREADS)


def dequantize(group: int, form: str, dtype: str) -> Kernel:
    """Packed words to dense 16-bit rows [rows, K], rounded once; a warp for each tile's chunk, 64 bytes of 8 rows at a store."""
    zero_form = form == "zero"
    turn = u32(3 if dtype == "bfloat16" else 0)
    low, high, pack = ptx.low_f16, ptx.high_f16, PACK[dtype]
    rotate_right, load_stream_128, load_constant_64, store_128 = (
        ptx.rotate_right, ptx.load_stream_128, ptx.load_constant_64, ptx.store_128,
    )  # fmt: skip
    address, fma = ptx.address, ptx.fma

    def kernel(
        packed: Any, pairs: Any, out: Any, first_tile: Any, rows: Any, k: Any, chunks: Any, padded_groups: Any, out_stride: Any
    ) -> None:
        lane = i32(i32(cuda.threadIdx.x) & 31)
        chunk = i32(i32(cuda.blockIdx.x) * (THREADS // 32) + i32(i32(cuda.threadIdx.x) >> 5))
        tile = i32(first_tile + i32(cuda.blockIdx.y))
        g, t = i32(lane >> 2), i32(lane & 3)
        if chunk < chunks:
            words = load_stream_128(u64(address(packed) + u64(i32(tile * chunks + chunk)) * u64(512) + u64(i32(lane * 16))))
            for part in range(2):
                at = i32(chunk * 64 + part * 32)
                if at < k:
                    pair = load_constant_64(
                        u64(address(pairs) + u64(i32(tile * padded_groups + i32(at // group))) * u64(64) + u64(i32(g * 8)))
                    )
                    one, two = rotate_right(words[part * 2], turn), rotate_right(words[part * 2 + 1], turn)
                    for half in range(2):
                        row = i32(i32(cuda.blockIdx.y) * 16 + i32(g + half * 8))
                        s, b = low(pair[half]), high(pair[half])
                        if zero_form:
                            b = f32(-s * b)
                        if row < rows:
                            shift = u32(4 * half)
                            a, c = u32(one >> shift), u32(two >> shift)
                            store_128(
                                u64(address(out) + u64(u64(row) * u64(out_stride) + u64(i32(at + t * 8))) * u64(2)),
                                pack(fma(s, f32(u32(a & u32(15))), b), fma(s, f32(u32(u32(a >> u32(16)) & u32(15))), b)),
                                pack(fma(s, f32(u32(u32(a >> u32(8)) & u32(15))), b), fma(s, f32(u32(u32(a >> u32(24)) & u32(15))), b)),
                                pack(fma(s, f32(u32(c & u32(15))), b), fma(s, f32(u32(u32(c >> u32(16)) & u32(15))), b)),
                                pack(fma(s, f32(u32(u32(c >> u32(8)) & u32(15))), b), fma(s, f32(u32(u32(c >> u32(24)) & u32(15))), b)),
                            )

    return Kernel(kernel, (p32, p32, p16, i32, i32, i32, i32, i32, i32), THREADS)


# -- launcher ---------------------------------------------------------------------------------------------------------------------


class W4Repack:
    """Packs parts of a weight into a `W4Device` and unpacks it to dense rows; for one group size, form and computing dtype."""

    def __init__(self, library: Library, group: int, form: str, dtype: str) -> None:
        self.group, self.form, self.dtype = group, form, dtype
        self._library = library
        self._pack_w4, self._scales_w4 = Variant(__name__, "pack_w4", (dtype,)), Variant(__name__, "pack_scales_w4", (form,))
        self._pack_awq, self._scales_awq = Variant(__name__, "pack_awq", (dtype,)), Variant(__name__, "pack_scales_awq", (form,))
        self._count, self._dequantize = Variant(__name__, "count_not_finite"), Variant(__name__, "dequantize", (group, form, dtype))
        source = (self._pack_awq, self._scales_awq) if form == "zero" else (self._pack_w4, self._scales_w4)
        self.variants = (*source, self._count, self._dequantize)

    def from_w4(self, weight: W4Device, first_row: int, qweight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> None:
        """Output channels first_row .. of `weight` from canonical W4 on the card: uint8 [N, K / 2], float32 [N, K / group] twice.

        In the form "zero" the zero is -bias / scale rounded to float16: exact where it is an integer.
        """
        rows = qweight.shape[0]
        groups = weight.k // self.group
        wanted = ((rows, weight.k // 2), (rows, groups), (rows, groups))
        self._check(weight, first_row, rows, (qweight, scale, bias), wanted, (torch.uint8, torch.float32, torch.float32))
        tiles = -(-(first_row + rows) // 16) - first_row // 16
        self._library[self._pack_w4](_tall(tiles, weight.chunks), qweight, weight.packed, first_row, rows, weight.k, weight.chunks)
        self._library[self._scales_w4](
            (-(-groups // 8), tiles, 1), scale, bias, weight.pairs, first_row, rows, groups, weight.padded_groups
        )

    def from_awq(self, weight: W4Device, first_row: int, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> None:
        """Likewise from AWQ's tensors on the card: int32 [K, N / 8], int32 [K / group, N / 8], float16 [K / group, N]; rows may be
        strided views. Exact."""
        if self.form != "zero":
            raise ValueError("an AWQ weight is packed in the form 'zero'")
        rows, groups = scales.shape[1], weight.k // self.group
        wanted = ((weight.k, rows // 8), (groups, rows // 8), (groups, rows))
        self._check(weight, first_row, rows, (qweight, qzeros, scales), wanted, (torch.int32, torch.int32, torch.float16))
        tiles = -(-(first_row + rows) // 16) - first_row // 16
        self._library[self._pack_awq](
            _tall(tiles, weight.chunks), qweight, weight.packed, first_row, rows, weight.k, weight.chunks, qweight.stride(0)
        )
        self._library[self._scales_awq](
            (-(-groups // 8), tiles, 1),
            scales, qzeros, weight.pairs, first_row, rows, groups, weight.padded_groups, scales.stride(0), qzeros.stride(0),
        )  # fmt: skip

    def count_not_finite(self, weight: W4Device, counter: torch.Tensor) -> None:
        """Adds to int32 `counter` [1] how many scales are infinite or not numbers (float16 overflows at 65,504)."""
        count = weight.pairs.numel()
        self._library[self._count](-(-count // THREADS), weight.pairs, count, counter)

    def dequantize(self, weight: W4Device, out: torch.Tensor, first_row: int = 0) -> None:
        """out [rows, K] = dense rows first_row .. of `weight`, in the computing dtype; first_row a multiple of 16."""
        rows = out.shape[0]
        if first_row % 16 or first_row + rows > weight.n or out.shape[1] != weight.k or out.stride(1) != 1 or out.stride(0) % 8:
            raise ValueError(f"rows {first_row}:{first_row + rows} of [{weight.n}, {weight.k}] do not fit out {tuple(out.shape)}")
        if out.dtype != getattr(torch, self.dtype) or out.data_ptr() % 16 or weight.dtype != self.dtype:
            raise ValueError(f"out must be {self.dtype}, 16 bytes aligned; it is {out.dtype}")
        tiles = -(-rows // 16)
        self._library[self._dequantize](
            (-(-weight.chunks // (THREADS // 32)), tiles, 1),
            weight.packed, weight.pairs, out, first_row // 16, rows, weight.k, weight.chunks, weight.padded_groups, out.stride(0),
        )  # fmt: skip

    def _check(
        self,
        weight: W4Device,
        first_row: int,
        rows: int,
        tensors: tuple[torch.Tensor, ...],
        shapes: tuple[tuple[int, int], ...],
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        if (weight.group, weight.form, weight.dtype) != (self.group, self.form, self.dtype):
            raise ValueError(f"a weight {(weight.group, weight.form, weight.dtype)} for {(self.group, self.form, self.dtype)}")
        if first_row < 0 or first_row + rows > weight.n:
            raise ValueError(f"output channels {first_row}:{first_row + rows} are not all within a weight of {weight.n}")
        for tensor, shape, dtype in zip(tensors, shapes, dtypes, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or (tensor.stride(1) != 1 and shape[1] > 1):
                raise ValueError(f"expected {dtype} {shape}, rows in one piece; got {tensor.dtype} {tuple(tensor.shape)}")
            if dtype in (torch.uint8, torch.float32) and not tensor.is_contiguous():
                raise ValueError("canonical W4 tensors must be contiguous")


def _tall(tiles: int, chunks: int) -> tuple[int, int, int]:
    if max(tiles, chunks) > MAX_GRID_Y:
        raise ValueError(f"a weight of {tiles} x 16 output and {chunks} x 64 input channels is larger than a grid of {MAX_GRID_Y}")
    return (tiles, chunks, 1)
