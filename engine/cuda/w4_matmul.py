"""out = x @ dequantize(w).T + bias for a 4-bit weight (engine.w4.dequantize, engine.reference.linear): weights stream, x waits.

For more than a few rows (`engine/cuda/w4_few.py`); how it is cut is a `W4Launch` of `engine/cuda/tuning.py`. Weights are read as drawn in
`engine/cuda/w4_layout.py`; x [M, K] and out [M, N] lie in rows, bias is float32 [N].

Numbers: with magic numbers a weight fragment costs a shift and an and-or a register and is exact, so a span of input channels
with one scale is summed by mma in float32 as P = sum (q + offset) x, and  out += scale * P + (bias - offset * scale) * sum x.
Weights are never rounded to 16 bits. The sums of x are made by mma too (a fragment of ones), once for all warps.

    fragments of an mma.m16n8k16 (lane = 4 g + t)
      A (weights)      16 output channels x 16 input channels: one word of the 128-bit load of a chunk
      B (x)            16 input channels x 8 rows of x: row g, eight channels 32 c + 8 t .. + 7 are one 128-bit load, two steps
      C                output channels g, g + 8 of rows 2 t, 2 t + 1

Work split:

                        K  ->  steps of warps_k units (a unit: 64 input channels, 128 for groups of 128)
        +---------------------------+---------------------------+--
      N | wn 0: wk 0 | wk 1 | ..    |                           |        a thread block computes block_n = 16 tiles warps_n
        | wn 1: wk 0 | wk 1 | ..    |  next step                |        output channels of up to `rows` rows of x,
        +---------------------------+---------------------------+--      over the steps s T / S .. (s + 1) T / S of all T: part s
        |     next block of output channels                              of S (grid x: part, then block of channels; y: of rows)
        v

    Steps flow through a ring of `stages` in shared memory, filled by cp.async. One barrier a step:

        step i:   wait for copy i + 1 | barrier | copy i + stages - 1 | sums of x of step i + 1 | products of step i

    Weights of the first steps are on their way before the kernel before this one has ended (`ptx.after_previous`).

    At the end the warps along K add up in shared memory, in order. With S = 1 that is the output; else float32 parts [S, M, N] that
    the next kernel adds up (`engine/cuda/parts.py`): no counter, no fence, nobody waits for anybody, and results do not depend
    on timing.

Versions tried: microseconds of a Llama-3.1-8B layer on an H200 (bench/LOG.md) at 16 / 32 / 64 rows, bfloat16, groups of 128; then
instructions of the PTX, a warp and chunk, counted by the emulator (at 4.37 TB/s a warp scheduler has about 108 cycles a chunk):

    a cut of all steps into equal shares, the last thread block of a piece adds it up   115 / 244 / 473 us
    parts of split input channels, added up by the next kernel                          58.4 / 80.5 / 128 us

    signed 64-bit index arithmetic, x pieces found by division             116 / 165 / 261
    unsigned, running addresses, x pieces at a fixed place of a thread     99 / 145 / 225
    both chunks of a group unpacked before its products                    99 / 116 / 170

    relative error against float64 (float32 out, in the emulator): 4e-8 .. 1.4e-7; no bank conflicts, no part of a sector unused
"""

from __future__ import annotations

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Variant
from engine.cuda.target import cuda, types
from engine.cuda.tuning import ROW_BUCKETS, W4Grid, W4Launch, W4Shared, steps_of_span, sum_spans, w4_grid, w4_launch
from engine.cuda.w4_product import W4Product, arguments, result_writer

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32


# -- kernel -----------------------------------------------------------------------------------------------------------------------


def w4_matmul(group: int, form: str, dtype: str, out_dtype: str, rows: int, tiles: int, warps_n: int, warps_k: int, stages: int) -> Kernel:
    """(x, packed, pairs, bias or null, out, parts, m, n, k, elements between rows of x, of out)."""
    launch = W4Launch(rows, tiles, warps_n, warps_k, stages)
    shared_map = W4Shared.of(launch, group)
    warps, threads, block_n = warps_n * warps_k, launch.threads, launch.block_n
    columns = rows // 8  # fragments of 8 rows of x
    chunks_of_unit = 2 if group == 128 else 1
    unit = 64 * chunks_of_unit
    groups_of_unit = unit // group
    step_k, step_chunks = warps_k * unit, warps_k * chunks_of_unit
    pieces = step_k // 8  # 16-byte pieces of a row of x in a stage
    span, spans = steps_of_span(group), sum_spans(group)
    rows_of_pass = threads // pieces
    passes = -(-rows // rows_of_pass)
    weights_of_warp, pairs_of_warp = tiles * chunks_of_unit * 512, tiles * groups_of_unit * 64
    pairs_at, x_at, x_pitch, stage = shared_map.pairs_at, shared_map.x_at, shared_map.x_pitch, shared_map.stage
    ring, sums = stages * stage, shared_map.sums
    pitch = block_n + 4
    copy_lanes = tiles * groups_of_unit * 4
    sum_items = warps_k * columns
    sum_rounds = -(-sum_items // warps)
    fragments = tiles * columns
    results, scales = fragments * 4, tiles * groups_of_unit * 4
    weight_registers, x_registers = tiles * chunks_of_unit * 16, chunks_of_unit * 8
    ragged, bf16, zero_form = group == 32, dtype == "bfloat16", form == "zero"
    if copy_lanes > 32 or stages < 3 or stages > 10 or rows % 16:
        raise ValueError(f"{launch} cannot be compiled: rows a multiple of 16, at most 8 groups a warp and step, 3 to 10 stages")

    zero = f32(0.0)
    offset = f32(16.0 if bf16 else 0.0)
    factor_low, factor_high = f32(1.0 if bf16 else 2.0**24), f32(1.0 if bf16 else 2.0**20)
    ones = u32(0x3F803F80 if bf16 else 0x3C003C00)
    mma, low, high = ptx.MMA[dtype], ptx.low_f16, ptx.high_f16
    wait = ptx.COPY_WAIT[stages - 3]

    def unpack_chunk(index, a, at):  # type: ignore[no-untyped-def]
        """A chunk of a tile to the 16 registers of its four A fragments."""
        j, c = i32(index // chunks_of_unit), i32(index % chunks_of_unit)
        v = ptx.load_shared_128(u32(at + u32(i32((j * chunks_of_unit + c) * 512))))
        for i in range(4):
            w = v[i]
            f = i32(index * 16 + i * 4)
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

    def multiply_fragment(index, acc, a, b, scale, x_from, sums_from):  # type: ignore[no-untyped-def]
        """A unit of one tile and eight rows of x."""
        column, j = i32(index // tiles), i32(index % tiles)
        o = i32((j * columns + column) * 4)
        if j == 0:
            for i in range(2 * chunks_of_unit):
                v = ptx.load_shared_128(u32(x_from + u32(i32(column * (8 * x_pitch) + i * 64))))
                b[i * 4], b[i * 4 + 1], b[i * 4 + 2], b[i * 4 + 3] = v[0], v[1], v[2], v[3]
        for s in range(spans):
            d0, d1, d2, d3 = zero, zero, zero, zero
            for i in range(span):
                f, h = j * (16 * chunks_of_unit) + (s * span + i) * 4, (s * span + i) * 2
                d0, d1, d2, d3 = mma(a[f], a[f + 1], a[f + 2], a[f + 3], b[h], b[h + 1], d0, d1, d2, d3)
            u = ptx.load_shared_64(u32(sums_from + u32(i32((s * columns + column) * 32))))
            x0, x1 = ptx.float_of_bits(u[0]), ptx.float_of_bits(u[1])
            q = (j * groups_of_unit + s) * 4
            acc[o] = ptx.fma(scale[q + 1], x0, ptx.fma(scale[q], d0, acc[o]))
            acc[o + 1] = ptx.fma(scale[q + 1], x1, ptx.fma(scale[q], d1, acc[o + 1]))
            acc[o + 2] = ptx.fma(scale[q + 3], x0, ptx.fma(scale[q + 2], d2, acc[o + 2]))
            acc[o + 3] = ptx.fma(scale[q + 3], x1, ptx.fma(scale[q + 2], d3, acc[o + 3]))

    @cuda.jit(device=True, inline="always")
    def copy_weights(w_from, s_from, slot, warp, lane):  # type: ignore[no-untyped-def]
        """A warp's weights and pairs of one step begin to arrive in a stage of the ring."""
        to = u32(slot + u32(warp * u32(weights_of_warp)) + u32(lane * u32(16)))
        for j in range(tiles):
            for c in range(chunks_of_unit):
                ptx.copy_async_16(u32(to + u32((j * chunks_of_unit + c) * 512)), u64(w_from[j] + u64(c * 512)))
        if lane < u32(copy_lanes):
            to = u32(slot + u32(pairs_at) + u32(warp * u32(pairs_of_warp)) + u32(lane * u32(16)))
            ptx.copy_async_16(to, s_from)

    @cuda.jit(device=True, inline="always")
    def load_scales(scale, at):  # type: ignore[no-untyped-def]
        """For each tile and group: factor and constant of row g, of row g + 8."""
        for i in range(tiles * groups_of_unit):
            v = ptx.load_shared_64(u32(at + u32(i * 64)))
            s0, s1, z0, z1 = low(v[0]), low(v[1]), high(v[0]), high(v[1])
            if zero_form:
                scale[i * 4 + 1], scale[i * 4 + 3] = f32(-s0 * f32(offset + z0)), f32(-s1 * f32(offset + z1))
            else:
                scale[i * 4 + 1], scale[i * 4 + 3] = ptx.fma(-offset, s0, z0), ptx.fma(-offset, s1, z1)
            scale[i * 4], scale[i * 4 + 2] = f32(s0 * factor_low), f32(s1 * factor_high)

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
                ptx.store_shared_64(u32(to + u32(s * columns * 32)), ptx.bits_of_float(d0), ptx.bits_of_float(d1))

    def put_fragment(index, acc, at, g, t):  # type: ignore[no-untyped-def]
        """A C fragment to shared memory, [row of x][output channel]: no two lanes of a store in one bank."""
        column, j = i32(index // tiles), i32(index % tiles)
        for e in range(4):
            m = u32(u32(t * u32(2)) + u32(column * 8 + e % 2))
            to = u32(at + u32(u32(u32(m * u32(pitch)) + g) + u32(j * 16 + e // 2 * 8)) * u32(4))
            ptx.store_shared_f32(to, acc[(j * columns + column) * 4 + e])

    unpack, multiply = ptx.unrolled(tiles * chunks_of_unit, unpack_chunk), ptx.unrolled(fragments, multiply_fragment)
    put_all = ptx.unrolled(fragments, put_fragment)
    write_results = result_writer(block_n, threads, out_dtype, warps_k, rows)

    def kernel(x, packed, pairs, bias, out, parts, m_rows, n, k, x_stride, out_stride):  # type: ignore[no-untyped-def]
        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), u32(thread >> u32(5))
        wn, wk = u32(warp // u32(warps_k)), u32(warp % u32(warps_k))
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(0, u32)))

        # the cut
        chunks = u32(u32(k + u32(63)) >> u32(6))
        steps = u32(u32(chunks + u32(step_chunks - 1)) // u32(step_chunks))
        own_steps = u32(
            u32(chunks + u32(u32(step_chunks - 1) - u32(wk * u32(chunks_of_unit)))) // u32(step_chunks)
        )  # with a unit of this warp
        last_tile = u32(u32(u32(n + u32(15)) >> u32(4)) - u32(1))
        column_blocks = u32(u32(n + u32(block_n - 1)) // u32(block_n))
        splits, split = u32(u32(cuda.gridDim.x) // column_blocks), u32(u32(cuda.blockIdx.x) // column_blocks)
        nb = u32(u32(cuda.blockIdx.x) - u32(split * column_blocks))
        first = u32(u32(split * steps) // splits)
        count = i32(u32(u32(u32(split + u32(1)) * steps) // splits) - first)
        first_row = u32(u32(cuda.blockIdx.y) * u32(rows))
        live = u32(min(u32(m_rows - first_row), u32(rows)))

        # x of a stage is copied by `passes` passes of all threads, a 16-byte piece each: always the same channels of a step
        x_row, x_piece = u32(thread // u32(pieces)), u32(thread % u32(pieces))
        x_bytes = u64(u64(x_stride) * u64(2))
        x_begin = u64(ptx.address(x) + u64(u32(first_row + x_row)) * x_bytes + u64(u32(x_piece * u32(16))))
        x_to = u32(shared + u32(x_at) + u32(x_row * u32(x_pitch)) + u32(x_piece * u32(16)))
        for s in range(stages):  # rows that are not there: zeros, once
            for p in range(passes):
                row = u32(x_row + u32(p * rows_of_pass))
                if row >= live and row < u32(rows):
                    ptx.store_shared_128(u32(x_to + u32(s * stage + p * rows_of_pass * x_pitch)), u32(0), u32(0), u32(0), u32(0))

        acc = cuda.local.array(results, f32)
        for i in range(results):
            acc[i] = zero
        scale = cuda.local.array(scales, f32)
        a = cuda.local.array(weight_registers, u32)
        b = cuda.local.array(x_registers, u32)
        w_from = cuda.local.array(tiles, u64)  # what is copied next

        # three places in the order of steps: what is copied, whose x is summed, what is multiplied
        ks, ks_copy, ks_sum = first, first, first
        pair_tile, pair_piece = u32(lane // u32(4 * groups_of_unit)), u32(lane % u32(4 * groups_of_unit))
        groups = u32(u32(chunks // u32(chunks_of_unit)) * u32(groups_of_unit))
        tile = u32(u32(nb * u32(warps_n) + wn) * u32(tiles))
        unit_at = u32(u32(ks * u32(warps_k)) + wk)
        for j in range(tiles):
            at = u32(u32(u32(min(u32(tile + u32(j)), last_tile)) * chunks) + u32(unit_at * u32(chunks_of_unit)))
            w_from[j] = u64(ptx.address(packed) + u64(at) * u64(512) + u64(u32(lane * u32(16))))
        at = u32(u32(u32(min(u32(tile + pair_tile), last_tile)) * groups) + u32(unit_at * u32(groups_of_unit)))
        s_from = u64(ptx.address(pairs) + u64(at) * u64(64) + u64(u32(pair_piece * u32(16))))
        x_from = u64(x_begin + u64(u32(ks * u32(step_k * 2))))
        x_k = u32(u32(ks * u32(step_k)) + u32(x_piece * u32(8)))
        for i in range(stages - 1):  # weights of the first steps: they wait for nobody
            if i32(i) < count:
                if u32(ks + u32(i)) < own_steps:
                    copy_weights(w_from, s_from, u32(shared + u32(i * stage)), warp, lane)
                for j in range(tiles):
                    w_from[j] = u64(w_from[j] + u64(step_chunks * 512))
                s_from = u64(s_from + u64(warps_k * groups_of_unit * 64))
        ptx.after_previous()
        here = u32(stage)  # ring offset of step `it`
        it = i32(1 - stages)
        while it < count:
            wait()  # copy it + 1 is there; the barrier makes it everybody's, and tells that step it - 1 is done
            cuda.syncthreads()

            slot = u32(here - u32(stage)) if here >= u32(stage) else u32(ring - stage)
            if i32(it + i32(stages - 1)) < count:
                if it >= i32(0):
                    if ks_copy < own_steps:
                        copy_weights(w_from, s_from, u32(shared + slot), warp, lane)
                    for j in range(tiles):
                        w_from[j] = u64(w_from[j] + u64(step_chunks * 512))
                    s_from = u64(s_from + u64(warps_k * groups_of_unit * 64))
                if x_k < u32(chunks << u32(6)):
                    source = x_from
                    for p in range(passes):
                        if u32(x_row + u32(p * rows_of_pass)) < live:
                            to = u32(x_to + slot + u32(p * rows_of_pass * x_pitch))
                            if not ragged:
                                ptx.copy_async_16(to, source)
                            elif x_k < k:
                                ptx.copy_async_16(to, source)
                            else:  # K ends within the chunk
                                ptx.store_shared_128(to, u32(0), u32(0), u32(0), u32(0))
                        source = u64(source + x_bytes * u64(rows_of_pass))
                ks_copy = u32(ks_copy + u32(1))
                x_from, x_k = u64(x_from + u64(step_k * 2)), u32(x_k + u32(step_k))
            ptx.copy_commit()

            slot = u32(here + u32(stage)) if here < u32(ring - stage) else u32(0)
            if it >= i32(-1):
                if i32(it + i32(1)) < count:
                    to = u32(shared + u32(ring) + u32(t * u32(8)) + u32(u32(u32(it + i32(1)) & u32(1)) * u32(sums)))
                    for r in range(sum_rounds):
                        item = u32(warp + u32(r * warps))
                        of, column = u32(item // u32(columns)), u32(item % u32(columns))
                        unit_at = u32(u32(ks_sum * u32(warps_k)) + of)
                        if item < u32(sum_items) and u32(unit_at * u32(chunks_of_unit)) < chunks:
                            from_ = u32(u32(u32(column * u32(8)) + g) * u32(x_pitch))
                            from_ = u32(shared + slot + u32(x_at) + from_ + u32(of * u32(unit * 2)) + u32(t * u32(16)))
                            sum_x(from_, u32(to + u32(u32(u32(of * u32(spans * columns)) + column) * u32(32))), g == u32(0))
                ks_sum = u32(ks_sum + u32(1))

            if it >= i32(0):
                if ks < own_steps:
                    weights_from = u32(shared + here + u32(warp * u32(weights_of_warp)) + u32(lane * u32(16)))
                    pairs_from = u32(shared + here + u32(pairs_at) + u32(warp * u32(pairs_of_warp)) + u32(g * u32(8)))
                    from_ = u32(shared + here + u32(x_at) + u32(g * u32(x_pitch)) + u32(wk * u32(unit * 2)) + u32(t * u32(16)))
                    sums_from = u32(shared + u32(ring) + u32(wk * u32(spans * columns * 32)) + u32(t * u32(8)))
                    sums_from = u32(sums_from + u32(u32(u32(it) & u32(1)) * u32(sums)))
                    load_scales(scale, pairs_from)
                    unpack(a, weights_from)
                    multiply(acc, a, b, scale, from_, sums_from)
                ks = u32(ks + u32(1))
            here = u32(here + u32(stage)) if here < u32(ring - stage) else u32(0)
            it = i32(it + i32(1))

        ptx.next_may_begin()
        cuda.syncthreads()  # the ring is free: results take its place
        from_ = u32(shared + u32(u32(wk * u32(rows * pitch)) + u32(wn * u32(tiles * 16))) * u32(4))
        put_all(acc, from_, g, t)
        cuda.syncthreads()
        write_results(
            shared, thread, bias, out, parts, m_rows, n, out_stride, first_row, live, u32(nb * u32(block_n)), splits, split
        )  # fmt: skip

    resident = 256 if rows > 16 or tiles > 2 else 512  # threads at a time, with 255 or 128 registers
    return Kernel(kernel, arguments(out_dtype), threads, shared_map.total, min_blocks=max(1, resident // threads), early=True)


# -- launcher ---------------------------------------------------------------------------------------------------------------------


class W4Matmul(W4Product):
    """For 16 to 64 rows at a time."""

    buckets = ROW_BUCKETS

    def of_table(self, rows: int) -> W4Launch:
        return w4_launch(self._cc, rows, self.n, self.k)

    def variant(self, launch: W4Launch) -> Variant:
        return Variant(__name__, "w4_matmul", (self.group, self.form, self.dtype, self.out_dtype, *launch.constants))

    def grid(self, launch: W4Launch, m: int) -> W4Grid:
        return w4_grid(launch, m, self.n, self.k, self.group, self._multiprocessors)
