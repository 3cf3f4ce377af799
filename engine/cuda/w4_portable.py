"""out = x @ dequantize(w).T + bias for a 4-bit weight (engine.reference.linear), without tensor cores: compute capability 7.0 and 7.5.

Plain indexing and arithmetic, no inline PTX, so the same function also runs in Numba's CUDA simulator, where flat numpy arrays
stand for addresses. float16 only (these cards have no bfloat16). Weights as in `engine/cuda/w4_layout.py`, in the float16 order.

work split: a thread block of four warps computes a tile of 16 output channels for `rows` rows of x; its warps take chunks of K in
turn; a lane sums its channels of rows g and g + 8 in float32; partial sums meet in shared memory and are added in a fixed order.

versions tried: none measured yet.
"""

from __future__ import annotations

import torch

from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types
from engine.cuda.w4_layout import FORMS, W4Device

i32, u32, f16, f32 = types.int32, types.uint32, types.float16, types.float32
WARPS = 4
MOST_ROWS = 4
HALVES, WORDS, FLOATS = pointer(f16), pointer(u32), pointer(f32)


def w4_portable(group: int, form: str, rows: int) -> Kernel:
    """(x, packed, pairs as halves, bias, has_bias, out, m, n, k, elements between rows of x, of out)."""
    zero_form = form == "zero"
    threads = 32 * WARPS
    results, shared_size = 2 * rows, 2 * rows * threads

    def kernel(x, packed, pairs, bias, has_bias, out, m_rows, n, k, x_stride, out_stride):  # type: ignore[no-untyped-def]
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        g, t = i32(lane >> 2), i32(lane & 3)
        tile = i32(cuda.blockIdx.x)
        first = i32(cuda.blockIdx.y * rows)
        chunks = i32((k + 63) // 64)
        groups = i32(chunks * 64 // group)
        shared = cuda.shared.array(shared_size, f32)
        acc = cuda.local.array(results, f32)
        for i in range(results):
            acc[i] = f32(0.0)
        chunk = warp
        while chunk < chunks:
            for step in range(4):
                at = i32(chunk * 64 + step // 2 * 32 + t * 8 + step % 2 * 4)
                if at < k:
                    word = packed[(tile * chunks + chunk) * 128 + lane * 4 + step]
                    pair = i32(((tile * groups + at // group) * 8 + g) * 4)
                    for half in range(2):
                        scale, constant = f32(pairs[pair + half * 2]), f32(pairs[pair + half * 2 + 1])
                        if zero_form:
                            constant = f32(-constant * scale)
                        for i in range(4):
                            q = f32((word >> u32(i % 2 * 16 + i // 2 * 8 + half * 4)) & u32(15))
                            w = f32(scale * q + constant)
                            for m in range(rows):
                                row = i32(min(i32(first + m), i32(m_rows - 1)))
                                acc[m * 2 + half] = f32(acc[m * 2 + half] + w * f32(x[row * x_stride + at + i]))
            chunk = i32(chunk + WARPS)
        for i in range(results):
            shared[i * threads + thread] = acc[i]
        cuda.syncthreads()
        at = thread
        while at < rows * 16:
            m, r = i32(at // 16), i32(at % 16)
            column = i32(tile * 16 + r)
            if first + m < m_rows and column < n:
                total = f32(0.0)
                for w in range(WARPS):
                    for lane4 in range(4):
                        total = f32(total + shared[(m * 2 + r // 8) * threads + w * 32 + r % 8 * 4 + lane4])
                if has_bias != 0:
                    total = f32(total + bias[column])
                out[(first + m) * out_stride + column] = f16(total)
            at = i32(at + threads)

    return Kernel(kernel, (HALVES, WORDS, HALVES, FLOATS, i32, HALVES, i32, i32, i32, i32, i32), threads)


class W4Portable:
    """What `engine.cuda.w4_matmul.W4Matmul` does, for cards without tensor-core PTX; float16, no scratch."""

    scratch_floats = scratch_counters = 0

    def __init__(self, library: Library, n: int, k: int, group: int, form: str) -> None:
        if form not in FORMS:
            raise ValueError(f"a pair of scales is of the form {' or '.join(FORMS)}, not {form!r}")
        self.n, self.k, self.group, self.form = n, k, group, form
        self._library = library
        self._one, self._several = (Variant(__name__, "w4_portable", (group, form, rows)) for rows in (1, MOST_ROWS))
        self.variants = (self._one, self._several)

    def __call__(self, x: torch.Tensor, weight: W4Device, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """x float16 [M, k], out float16 [M, n], bias float32 [n]."""
        m = len(x)
        made = (weight.n, weight.k, weight.group, weight.form, weight.dtype)
        if made != (self.n, self.k, self.group, self.form, "float16"):
            raise ValueError(f"a weight {made} does not fit a product made for {(self.n, self.k, self.group, self.form, 'float16')}")
        if x.shape[1] != self.k or out.shape != (m, self.n) or x.dtype != torch.float16 or out.dtype != torch.float16:
            raise ValueError(f"x and out must be float16 [M, {self.k}] and [M, {self.n}]; they are {tuple(x.shape)}, {tuple(out.shape)}")
        if x.stride(1) != 1 or out.stride(1) != 1 or len(x) * x.stride(0) >= 2**31:
            raise ValueError(f"rows of x and out must lie in one piece, below 2^31 elements; strides are {x.stride()}, {out.stride()}")
        if bias is not None and (bias.shape != (self.n,) or bias.dtype != torch.float32):
            raise ValueError(f"bias must be float32 [{self.n}]; it is {bias.dtype} {tuple(bias.shape)}")
        variant, rows = (self._one, 1) if m == 1 else (self._several, MOST_ROWS)
        self._library[variant](
            (weight.packed.shape[0], -(-m // rows), 1),
            x, weight.packed, weight.pairs, bias, 0 if bias is None else 1, out, m, self.n, self.k, x.stride(0), out.stride(0),
        )  # fmt: skip
