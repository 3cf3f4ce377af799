"""out = x @ dequantize(w).T + bias for a 4-bit weight and one to eight rows of x: the weights of a lane are nobody else's.

The same weight (`engine/cuda/w4_layout.py`) as `engine/cuda/w4_matmul.py`, and its numbers: with magic numbers a fragment is exact, so
a span of input channels with one scale is summed by mma in float32 as P = sum (q + offset) x, and  out += scale * P +
(bias - offset * scale) * sum x. With so few rows a product is as fast as the instructions between two loads allow, so there are few:

    thread block: warps_n x warps_k warps; a warp has `tiles` tiles of 16 output channels and every warps_k-th unit of input channels
    (64, 128 for groups of 128), one after the other

      each lane copies the 16 bytes of weights and the pair that it will itself need, cp.async -> its own places in a ring of `ahead`
      units: no barrier. The first units are on their way before the kernel before this one has ended (`ptx.after_previous`)
      x of the block's input channels lies in shared memory as a whole; one barrier, then sums of x over each span, by mma with
      ones; another barrier, then nothing but units:  words -> fragments -> mma -> scaled into the sums

    A thread block has the steps s T / S .. (s + 1) T / S of all T (a step: a unit of each warp along K): part s of S. Grid x: part,
    then block of output channels; y: blocks of rows. At the end the warps along K add up in shared memory, in order. With S = 1 that
    is the output; else float32 parts [S, M, N] (`engine/cuda/parts.py`).

Versions tried (H200, 2026-11-20, microseconds of a Llama-3.1-8B layer's four products at 1 / 8 rows, groups of 128, bfloat16, the
best of some hundred launches; w4_matmul.py, which had these rows before: 49.9 / 51.4):

    weights in registers from the load on                                   41.6 / 47.3
    a ring: 48 registers instead of 116, so more bytes on their way         40.3 / 45.3
    .. the next kernel may begin at once; 7 x 2 warps, two thread blocks    38.1 / 44.1
    x in two or four pieces, multiplied as each is there: not better than more parts of K
    16 rows (two columns of fragments): 56.7, no better than w4_matmul.py
    instructions of the machine code, a warp and chunk of 64 input channels: 47; w4_matmul.py 87
"""

from __future__ import annotations

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Variant
from engine.cuda.target import cuda, types
from engine.cuda.tuning import (
    FEW_BUCKETS,
    FewLaunch,
    W4Grid,
    few_grid,
    few_launch,
    most_shared,
    steps_of_span,
    sum_spans,
    unit_channels,
)
from engine.cuda.w4_product import W4Product, arguments, result_writer

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
MOST_SHARED = 227 * 1024  # of any card; a launch takes what its part of x needs


# -- kernel -----------------------------------------------------------------------------------------------------------------------


def w4_few(
    group: int, form: str, dtype: str, out_dtype: str, rows: int, tiles: int, warps_n: int, warps_k: int, ahead: int, at_once: bool
) -> Kernel:
    """(x, packed, pairs, bias or null, out, parts, m, n, k, elements between rows of x, of out)."""
    launch = FewLaunch(rows, tiles, warps_n, warps_k, ahead, at_once)
    if rows not in FEW_BUCKETS or not 1 <= ahead <= 8 or launch.threads > 1024:
        raise ValueError(f"{launch} cannot be compiled: 1 or 8 rows, 1 to 8 units ahead, at most 1024 threads")
    warps, threads, block_n = warps_n * warps_k, launch.threads, launch.block_n
    unit = unit_channels(group)
    chunks_of_unit, groups_of_unit = unit // 64, unit // group
    span, spans = steps_of_span(group), sum_spans(group)
    step_k = warps_k * unit
    pieces = step_k // 8  # 16-byte pieces of a row of x in a step
    fragments, x_registers = chunks_of_unit * 16, chunks_of_unit * 8
    tile_slot = launch.tile_slot(group)
    slot, ring = tiles * tile_slot, ahead * tiles * tile_slot  # bytes
    w_step, s_step = warps_k * chunks_of_unit * 512, warps_k * groups_of_unit * 64  # bytes from a unit of a warp to its next
    results, unit_sums, pitch = tiles * 4, spans * 32, block_n + 4
    ragged, single = group == 32, rows == 1
    bf16, zero_form = dtype == "bfloat16", form == "zero"

    zero = f32(0.0)
    offset = f32(16.0 if bf16 else 0.0)
    factor_low, factor_high = f32(1.0 if bf16 else 2.0**24), f32(1.0 if bf16 else 2.0**20)
    ones = u32(0x3F803F80 if bf16 else 0x3C003C00)
    mma, low, high = ptx.MMA[dtype], ptx.low_f16, ptx.high_f16
    wait_all, wait_unit = ptx.COPY_WAIT[0], ptx.COPY_WAIT[ahead - 1]

    def copy_tile(index, held, unit_at, w_from, s_from, slots):  # type: ignore[no-untyped-def]
        """A tile's unit, `unit_at` units of this warp after where the addresses point, to the ring's slot `held`."""
        place = u32(held * slot + index * tile_slot)
        for c in range(chunks_of_unit):
            ptx.copy_async_16(u32(slots[0] + place + u32(c * 512)), u64(w_from[index] + u64(unit_at * w_step + c * 512)))
        for s in range(groups_of_unit):
            ptx.copy_async_8(u32(slots[1] + place + u32(s * 256)), u64(s_from[index] + u64(unit_at * s_step + s * 64)))

    copy_tiles = ptx.unrolled(tiles, copy_tile)

    def first_copy(index, w_from, s_from, slots, own):  # type: ignore[no-untyped-def]
        if u32(index) < own:
            copy_tiles(index, index, w_from, s_from, slots)
        ptx.copy_commit()

    def multiply_tile(index, held, acc, b, sums_from, slots):  # type: ignore[no-untyped-def]
        """The unit in slot `held` of one tile, eight rows of x (a single row: in all columns of the fragments, one is used)."""
        place = u32(held * slot + index * tile_slot)
        a = cuda.local.array(fragments, u32)
        for c in range(chunks_of_unit):
            v = ptx.load_shared_128(u32(slots[0] + place + u32(c * 512)))
            for i in range(4):
                w = v[i]
                f = c * 16 + i * 4
                if bf16:
                    a[f] = ptx.and_or(w, u32(0x00780078), u32(0x41804180))
                    a[f + 1] = ptx.and_or(u32(w >> u32(4)), u32(0x00780078), u32(0x41804180))
                    a[f + 2] = ptx.and_or(u32(w >> u32(8)), u32(0x00780078), u32(0x41804180))
                    a[f + 3] = ptx.and_or(ptx.rotate_right(w, u32(12)), u32(0x00780078), u32(0x41804180))
                else:
                    a[f] = u32(w & u32(0x000F000F))
                    a[f + 1] = u32(w & u32(0x00F000F0))
                    a[f + 2] = u32(u32(w >> u32(8)) & u32(0x000F000F))
                    a[f + 3] = u32(u32(w >> u32(8)) & u32(0x00F000F0))
        for s in range(spans):
            p = ptx.load_shared_64(u32(slots[1] + place + u32(s * 256)))
            s0, s1, z0, z1 = low(p[0]), low(p[1]), high(p[0]), high(p[1])
            if zero_form:
                z0, z1 = f32(-s0 * f32(offset + z0)), f32(-s1 * f32(offset + z1))
            else:
                z0, z1 = ptx.fma(-offset, s0, z0), ptx.fma(-offset, s1, z1)
            s0, s1 = f32(s0 * factor_low), f32(s1 * factor_high)
            d0, d1, d2, d3 = zero, zero, zero, zero
            for i in range(span):
                f, h = (s * span + i) * 4, (s * span + i) * 2
                d0, d1, d2, d3 = mma(a[f], a[f + 1], a[f + 2], a[f + 3], b[h], b[h + 1], d0, d1, d2, d3)
            e = i32(index * 4)
            if single:
                x0 = ptx.load_shared_f32(u32(sums_from + u32(s * 32)))
                acc[e] = ptx.fma(z0, x0, ptx.fma(s0, d0, acc[e]))
                acc[e + 2] = ptx.fma(z1, x0, ptx.fma(s1, d2, acc[e + 2]))
            else:
                u = ptx.load_shared_64(u32(sums_from + u32(s * 32)))
                x0, x1 = ptx.float_of_bits(u[0]), ptx.float_of_bits(u[1])
                acc[e] = ptx.fma(z0, x0, ptx.fma(s0, d0, acc[e]))
                acc[e + 1] = ptx.fma(z0, x1, ptx.fma(s0, d1, acc[e + 1]))
                acc[e + 2] = ptx.fma(z1, x0, ptx.fma(s1, d2, acc[e + 2]))
                acc[e + 3] = ptx.fma(z1, x1, ptx.fma(s1, d3, acc[e + 3]))

    multiply_tiles = ptx.unrolled(tiles, multiply_tile)

    def take_unit(index, acc, x_from, sums_from, w_from, s_from, slots, left):  # type: ignore[no-untyped-def]
        """Products of the unit in slot `index`; what comes `ahead` units later takes its place. `left`: units from slot 0 on."""
        wait_unit()
        if u32(index) < left:
            b = cuda.local.array(x_registers, u32)
            for i in range(2 * chunks_of_unit):
                v = ptx.load_shared_128(u32(x_from + u32(index * (step_k * 2) + i * 64)))
                b[i * 4], b[i * 4 + 1], b[i * 4 + 2], b[i * 4 + 3] = v[0], v[1], v[2], v[3]
            multiply_tiles(index, acc, b, u32(sums_from + u32(index * (warps_k * unit_sums))), slots)
            if u32(index + ahead) < left:
                copy_tiles(index, i32(index + ahead), w_from, s_from, slots)
        ptx.copy_commit()

    copy_first, take_units = ptx.unrolled(ahead, first_copy), ptx.unrolled(ahead, take_unit)

    @cuda.jit(device=True, inline="always")
    def sum_x(x_from, to, stores):  # type: ignore[no-untyped-def]
        """Sums over each span of a unit, of eight rows of x: every row of the product with ones."""
        for s in range(spans):
            d0, d1, d2, d3 = zero, zero, zero, zero
            for h in range(span // 2):
                v = ptx.load_shared_128(u32(x_from + u32((s * span // 2 + h) * 64)))
                d0, d1, d2, d3 = mma(ones, ones, ones, ones, v[0], v[1], d0, d1, d2, d3)
                d0, d1, d2, d3 = mma(ones, ones, ones, ones, v[2], v[3], d0, d1, d2, d3)
            if stores:
                ptx.store_shared_64(u32(to + u32(s * 32)), ptx.bits_of_float(d0), ptx.bits_of_float(d1))

    def put_fragment(index, acc, at, g, t):  # type: ignore[no-untyped-def]
        """A C fragment to shared memory, [row of x][output channel]: no two lanes of a store in one bank."""
        for e in range(4):
            m = u32(u32(t * u32(2)) + u32(e % 2))
            if m < u32(rows):
                to = u32(at + u32(u32(u32(m * u32(pitch)) + g) + u32(index * 16 + e // 2 * 8)) * u32(4))
                ptx.store_shared_f32(to, acc[index * 4 + e])

    put_all = ptx.unrolled(tiles, put_fragment)
    write_results = result_writer(block_n, threads, out_dtype, warps_k, rows)

    def kernel(x, packed, pairs, bias, out, parts, m_rows, n, k, x_stride, out_stride):  # type: ignore[no-untyped-def]
        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), u32(thread >> u32(5))
        wn, wk = u32(warp // u32(warps_k)), u32(warp % u32(warps_k))
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(0, u32)))

        # the cut
        chunks = u32(u32(k + u32(63)) >> u32(6))
        units = u32(chunks // u32(chunks_of_unit))
        steps = u32(u32(units + u32(warps_k - 1)) // u32(warps_k))
        column_blocks = u32(u32(n + u32(block_n - 1)) // u32(block_n))
        splits, split = u32(u32(cuda.gridDim.x) // column_blocks), u32(u32(cuda.blockIdx.x) // column_blocks)
        nb = u32(u32(cuda.blockIdx.x) - u32(split * column_blocks))
        first = u32(u32(split * steps) // splits)
        count = u32(u32(u32(u32(split + u32(1)) * steps) // splits) - first)
        first_unit = u32(first * u32(warps_k))
        unit_at = u32(first_unit + wk)
        own = u32(0)  # units of this warp
        if unit_at < units:
            own = u32(min(count, u32(u32(u32(units - unit_at) + u32(warps_k - 1)) // u32(warps_k))))

        # shared memory: ring of each warp | sums of x [units][spans][8] | rows of x, 64 bytes apart by more than their data, so that a
        # quarter of a warp reads all 32 banks once
        slots = cuda.local.array(2, u32)
        slots[0] = u32(shared + u32(warp * u32(ring)) + u32(lane * u32(16)))
        slots[1] = u32(shared + u32(warp * u32(ring)) + u32(lane * u32(8)) + u32(chunks_of_unit * 512))
        most_steps = u32(u32(steps + u32(splits - u32(1))) // splits)
        sums_at = u32(shared + u32(warps * ring))
        x_at = u32(sums_at + u32(most_steps * u32(warps_k * unit_sums)))
        x_pitch = u32(u32(most_steps * u32(step_k * 2)) + u32(64))

        last_tile = u32(u32(u32(n + u32(15)) >> u32(4)) - u32(1))
        tile = u32(u32(nb * u32(warps_n) + wn) * u32(tiles))
        w_from, s_from = cuda.local.array(tiles, u64), cuda.local.array(tiles, u64)
        for j in range(tiles):
            at = u64(u64(u32(u32(u32(min(u32(tile + u32(j)), last_tile)) * units) + unit_at)))
            w_from[j] = u64(ptx.address(packed) + at * u64(chunks_of_unit * 512) + u64(u32(lane * u32(16))))
            s_from[j] = u64(ptx.address(pairs) + at * u64(groups_of_unit * 64) + u64(u32(g * u32(8))))
        copy_first(w_from, s_from, slots, own)
        acc = cuda.local.array(results, f32)
        for i in range(results):
            acc[i] = zero

        if at_once:
            ptx.next_may_begin()
        ptx.after_previous()
        first_row = u32(u32(cuda.blockIdx.y) * u32(rows))
        live = u32(min(u32(m_rows - first_row), u32(rows)))
        row = u32(0)
        while row < live:
            source = u64(ptx.address(x) + u64(u32(first_row + row)) * u64(u64(x_stride) * u64(2)) + u64(first) * u64(step_k * 2))
            piece = thread
            while piece < u32(count * u32(pieces)):
                at = u32(piece * u32(16))
                to = u32(x_at + u32(row * x_pitch) + at)
                if u32(u32(first * u32(step_k)) + u32(piece * u32(8))) < k:
                    ptx.copy_async_16(to, u64(source + u64(at)))
                elif ragged:  # K ends within a chunk
                    ptx.store_shared_128(to, u32(0), u32(0), u32(0), u32(0))
                piece = u32(piece + u32(threads))
            row = u32(row + u32(1))
        ptx.copy_commit()
        wait_all()
        cuda.syncthreads()

        row = u32(min(g, u32(live - u32(1))))  # rows that are not there: the last one again
        x_from = u32(x_at + u32(row * x_pitch) + u32(t * u32(16)))
        of = warp
        while of < u32(count * u32(warps_k)):
            if u32(first_unit + of) < units:
                sum_x(u32(x_from + u32(of * u32(unit * 2))), u32(sums_at + u32(of * u32(unit_sums)) + u32(t * u32(8))), g == u32(0))
            of = u32(of + u32(warps))
        cuda.syncthreads()

        x_from = u32(x_from + u32(wk * u32(unit * 2)))
        sums_from = u32(sums_at + u32(wk * u32(unit_sums)) + u32(t * u32(8)))
        left = i32(own)
        while left > i32(0):
            take_units(acc, x_from, sums_from, w_from, s_from, slots, u32(left))
            for j in range(tiles):
                w_from[j], s_from[j] = u64(w_from[j] + u64(ahead * w_step)), u64(s_from[j] + u64(ahead * s_step))
            x_from = u32(x_from + u32(ahead * step_k * 2))
            sums_from = u32(sums_from + u32(ahead * warps_k * unit_sums))
            left = i32(left - i32(ahead))

        if not at_once:
            ptx.next_may_begin()
        cuda.syncthreads()  # the ring is not needed any more: results take its place
        put_all(acc, u32(shared + u32(u32(wk * u32(rows * pitch)) + u32(wn * u32(tiles * 16))) * u32(4)), g, t)
        cuda.syncthreads()
        write_results(
            shared, thread, bias, out, parts, m_rows, n, out_stride, first_row, live, u32(nb * u32(block_n)), splits, split
        )  # fmt: skip

    return Kernel(kernel, arguments(out_dtype), threads, MOST_SHARED, early=True)


# -- launcher ---------------------------------------------------------------------------------------------------------------------


class W4Few(W4Product):
    """For 1 to 8 rows at a time."""

    buckets = FEW_BUCKETS

    def of_table(self, rows: int) -> FewLaunch:
        return few_launch(self._cc, rows, self.n, self.k)

    def variant(self, launch: FewLaunch) -> Variant:
        return Variant(__name__, "w4_few", (self.group, self.form, self.dtype, self.out_dtype, *launch.constants))

    def grid(self, launch: FewLaunch, m: int) -> W4Grid:
        return few_grid(launch, m, self.n, self.k, self.group, self._multiprocessors, most_shared(self._cc))
