"""out = x @ dequantize(w).T + bias for a 4-bit weight on compute capability 9.0: wgmma, weights from registers.

The same weight (`engine/cuda/w4_layout.py`, pairs of the form "zero" only), operands and results as `engine/cuda/w4_matmul.py`, which is
for other cards and the form "bias".

Numbers: a weight fragment becomes q - zero in 16 bits, exactly; a group of input channels is summed by wgmma in float32 as
P = sum (q - zero) x, and  out += scale * P. Weights are never rounded.

    wgmma.m64nNk16, a warpgroup of 4 warps; lane = 4 g + t of a warp
      A (weights)      registers: each warp its own tile of 16 output channels, a fragment is a word of the packed chunk
      B (x)            shared memory: N rows of x, 128 bytes (64 input channels) of a row together, 128-byte swizzle
      D                output channels g, g + 8 of the tile; rows of x 8 c + 2 t, + 1

The packed words take input channels in an order of their own, so x is stored in that order: in each 64 channels, 4-byte word
16 h + 4 t + 2 s + b goes to place 16 h + 8 s + 4 b + t. A warp loads 128 bytes of four rows, 16 bytes a lane, and stores 4 bytes a
lane: no two in one bank.

    thread block:  `warpgroups` of consumers | one warpgroup of producers
      producers    x: global memory -> registers (`ahead` steps) -> ring of `x_stages`, fence.proxy.async, mbarrier "full"; a place
                   in the ring is free when every consumer has arrived at its mbarrier "empty"
      consumers    each lane copies the 16 bytes of weights and the pair that it will itself need, cp.async -> its own places in a ring
                   of `w_stages`: no barrier. Words -> fragments -> wgmma; one warpgroup unpacks while another multiplies

    a step is 128 input channels for groups of 128, else 64. Grid x: part, then block of output channels; y: blocks of rows. Part s of
    S takes steps s T / S .. (s + 1) T / S of all T. S = 1 writes the output; else float32 parts [S, M, N] (`engine/cuda/parts.py`).
    Weights of the first steps are on their way before the kernel before this one has ended (`ptx.after_previous`).

Versions tried (H200, 2026-11-20, microseconds of a Llama-3.1-8B layer's four products at 32 / 64 / 128 rows, groups of 128, bfloat16;
w4_matmul.py: 79.6 / 130.8 / not measured):

    x by cp.async of 4 bytes: that was the bottleneck                  65.3 / 94.1 / 178.9
    x by way of registers                                              57.7 / 78.3 / 137.6
    .. with `together` = 4 and warpgroups along K, since removed       57.5 / 80.7 / 141.0
    sums of two groups at a time, words read a step before: not among the best of any shape; setmaxnreg: nvJitLink ignores it
"""

from __future__ import annotations

from engine.cuda import ptx
from engine.cuda.launch import Kernel, Variant
from engine.cuda.target import cuda, types
from engine.cuda.tuning import HOPPER_BUCKETS, HopperLaunch, HopperShared, W4Grid, hopper_grid, hopper_launch, unit_channels
from engine.cuda.w4_product import W4Product, arguments, result_writer

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
DESCRIPTOR = 1 << 62 | 1024 >> 4 << 32 | 1 << 16  # 128-byte swizzle, 1024 bytes from eight rows to the next


# -- a step of a warpgroup, in PTX --------------------------------------------------------------------------------------------------

UNPACK = {  # word $w, registers {a}0 .. 3; zl, zh: what to subtract in the rows g, g + 8
    "bfloat16": """
        lop3.b32 {a}0, {w}, 0x00780078, 0x41804180, 0xEA;
        shr.u32 {a}1, {w}, 4; lop3.b32 {a}1, {a}1, 0x00780078, 0x41804180, 0xEA;
        shr.u32 {a}2, {w}, 8; lop3.b32 {a}2, {a}2, 0x00780078, 0x41804180, 0xEA;
        shf.r.wrap.b32 {a}3, {w}, {w}, 12; lop3.b32 {a}3, {a}3, 0x00780078, 0x41804180, 0xEA;
        fma.rn.bf16x2 {a}0, {a}0, one, {zl}; fma.rn.bf16x2 {a}1, {a}1, one, {zh};
        fma.rn.bf16x2 {a}2, {a}2, one, {zl}; fma.rn.bf16x2 {a}3, {a}3, one, {zh};""",
    "float16": """
        shr.u32 {a}2, {w}, 8;
        lop3.b32 {a}0, {w}, 0x000F000F, 0x64006400, 0xEA; lop3.b32 {a}1, {w}, 0x00F000F0, 0x64006400, 0xEA;
        lop3.b32 {a}3, {a}2, 0x00F000F0, 0x64006400, 0xEA; lop3.b32 {a}2, {a}2, 0x000F000F, 0x64006400, 0xEA;
        add.rn.f16x2 {a}0, {a}0, {zl}; fma.rn.f16x2 {a}1, {a}1, sixteenth, {zh};
        add.rn.f16x2 {a}2, {a}2, {zl}; fma.rn.f16x2 {a}3, {a}3, sixteenth, {zh};""",
}
ZERO = {  # pair $p of the row g (l) or g + 8 (h) -> scale s, z
    "bfloat16": """
        {{ .reg .b16 lo, hi; .reg .f32 f; mov.b32 {{lo, hi}}, {p}; cvt.f32.f16 {s}, lo; cvt.f32.f16 f, hi;
        sub.rn.f32 f, 0fC1800000, f; cvt.rn.bf16x2.f32 {z}, f, f; }}""",
    "float16": """
        {{ .reg .b16 lo, hi, m; mov.b32 {{lo, hi}}, {p}; cvt.f32.f16 {s}, lo;
        mov.b16 m, {magic}; sub.rn.f16 m, m, hi; mov.b32 {z}, {{m, m}}; }}""",
}
MAGIC = ("0xE400", "0xD400")  # -1024, -64


def step_text(rows: int, group: int, dtype: str, tiles: int, parts: int, together: int) -> str:
    """PTX of a step: operands accumulators f32 [tiles * rows / 2] (in place), words [tiles, chunks, 4], pairs [tiles, groups, 2 rows],
    descriptor of x."""
    step = unit_channels(group)
    groups, steps = step // group, group // 16  # of a step of a tile; wgmmas of a group
    columns, kind = rows // parts, "bf16" if dtype == "bfloat16" else "f16"
    results = columns // 2
    words_at = 2 * tiles * parts * results
    pairs_at = words_at + tiles * step // 16
    descriptor = f"${pairs_at + 2 * tiles * groups}"
    items = [(j, s, p) for j in range(tiles) for s in range(groups) for p in range(parts)]
    lines = [
        "{",
        ".reg .pred first, more; .reg .b64 xd; .reg .b32 one, sixteenth; mov.b32 one, 0x3F803F80; mov.b32 sixteenth, 0x2C002C00;",
        "setp.ne.b32 first, 0, 0; setp.ne.b32 more, 1, 0;",
        *(f".reg .f32 d{r};" for r in range(results)),
    ]

    for j, s, p in items:
        d = ", ".join(f"d{r}" for r in range(results))
        for half in range(2 if p == 0 else 0):
            lines.append(f".reg .f32 s{j}_{s}_{half}; .reg .b32 z{j}_{s}_{half};")
            pair = f"${pairs_at + (j * groups + s) * 2 + half}"
            lines.append(ZERO[dtype].format(s=f"s{j}_{s}_{half}", z=f"z{j}_{s}_{half}", p=pair, magic=MAGIC[half]))
        for i in range(steps):
            if i % together == 0:
                for u in range(i, min(i + together, steps)) if p == 0 else ():
                    a = f"a{j}_{s}_{u}_"
                    lines.append(".reg .b32 " + ", ".join(f"{a}{r}" for r in range(4)) + ";")
                    word = f"${words_at + j * step // 16 + s * steps + u}"
                    lines.append(UNPACK[dtype].format(a=a, w=word, zl=f"z{j}_{s}_0", zh=f"z{j}_{s}_1"))
                lines.append("wgmma.fence.sync.aligned;")
            k = s * steps + i  # wgmma steps from the begin of the step
            offset = (k // 4 * rows * 128 + p * columns * 128 + k % 4 * 32) >> 4
            lines.append(f"add.s64 xd, {descriptor}, {offset};")
            fragment, keep = ", ".join(f"a{j}_{s}_{i}_{r}" for r in range(4)), "more" if i else "first"
            lines.append(f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{d}}}, {{{fragment}}}, xd, {keep}, 1, 1, 0;")
        lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
        at = (j * parts + p) * results
        lines += [f"fma.rn.f32 ${at + r}, s{j}_{s}_{r % 4 // 2}, d{r}, ${at + r};" for r in range(results)]
    return "\n".join([*lines, "}"])


# -- kernel -----------------------------------------------------------------------------------------------------------------------


def w4_hopper(
    group: int, dtype: str, out_dtype: str,
    rows: int, warpgroups: int, tiles: int, x_stages: int, w_stages: int, ahead: int, parts: int, together: int, blocks: int,
) -> Kernel:  # fmt: skip
    """(x, packed, pairs, bias or null, out, parts, m, n, k, elements between rows of x, of out)."""
    launch = HopperLaunch(rows, warpgroups, tiles, x_stages, w_stages, ahead, parts, together, blocks)
    if rows % 8 or not 8 <= rows <= 256 or x_stages < 2 or not 2 <= w_stages <= 8 or not 1 <= ahead <= 4 or rows % (8 * parts):
        raise ValueError(f"{launch} cannot be compiled: rows are a multiple of 8, 2 or more stages of x, 2 to 8 of weights, 1 to 4 ahead")
    shared_map = HopperShared.of(launch, group)
    x_stage, w_stage, pairs_at = shared_map.x_stage, shared_map.w_stage, shared_map.pairs_at
    w_warp, w_at, barriers_at = shared_map.w_warp, shared_map.w_at, shared_map.barriers_at
    step = unit_channels(group)
    chunks_of_step, groups_of_step = step // 64, step // group
    consumers = warpgroups * 4
    results, words, pair_words = rows // 2, tiles * chunks_of_step * 4, tiles * groups_of_step * 2
    all_results = tiles * results
    pieces = -(-rows // 16) * chunks_of_step  # 16-byte loads of x of a producer and step
    held_x, uneven = ahead * pieces * 4, rows % 16 != 0
    ragged = group == 32  # K may end within a chunk
    block_n, pitch = launch.block_n, launch.block_n + 4
    wait_w = ptx.COPY_WAIT[w_stages - 1]
    text = step_text(rows, group, dtype, tiles, parts, together)
    multiply = ptx.on_arrays(text, (f32, all_results), ((u32, words), (u32, pair_words)), (u64,))
    descriptor = u64(DESCRIPTOR)
    empty_at = barriers_at + 8 * x_stages
    zero = f32(0.0)

    @cuda.jit(device=True, inline="always")
    def wait_for(barrier, parity):  # type: ignore[no-untyped-def]
        while ptx.mbarrier_over(barrier, parity) == u32(0):
            pass

    @cuda.jit(device=True, inline="always")
    def copy_weights(w_from, s_from, to, lane):  # type: ignore[no-untyped-def]
        for j in range(tiles):
            for c in range(chunks_of_step):
                ptx.copy_async_16(u32(to + u32(lane * u32(16)) + u32((j * chunks_of_step + c) * 512)), u64(w_from[j] + u64(c * 512)))
            for s in range(groups_of_step):
                ptx.copy_async_8(
                    u32(to + u32(lane * u32(8)) + u32(pairs_at + (j * groups_of_step + s) * 256)), u64(s_from[j] + u64(s * 64))
                )
            w_from[j] = u64(w_from[j] + u64(chunks_of_step * 512))
            s_from[j] = u64(s_from[j] + u64(groups_of_step * 64))

    @cuda.jit(device=True, inline="always")
    def load_weights(w, p, at, lane):  # type: ignore[no-untyped-def]
        for j in range(tiles * chunks_of_step):
            v = ptx.load_shared_128(u32(at + u32(lane * u32(16)) + u32(j * 512)))
            w[j * 4], w[j * 4 + 1], w[j * 4 + 2], w[j * 4 + 3] = v[0], v[1], v[2], v[3]
        for j in range(tiles * groups_of_step):
            q = ptx.load_shared_64(u32(at + u32(lane * u32(8)) + u32(pairs_at + j * 256)))
            p[j * 2], p[j * 2 + 1] = q[0], q[1]

    def load_piece(index, values, held, source, stride, row, channel, live, k):  # type: ignore[no-untyped-def]
        """Number `index` of a producer's 16-byte pieces of a step; rows and channels that are not there stay zeros."""
        at, c = i32(held + i32(index * 4)), i32(index % chunks_of_step)
        of = u32(row + u32(index // chunks_of_step * 16))
        if ragged:
            values[at], values[at + 1], values[at + 2], values[at + 3] = u32(0), u32(0), u32(0), u32(0)
        if of < live and (not ragged or u32(channel + u32(c * 64)) < k):
            v = ptx.load_128(u64(source + u64(c * 128) + stride * u64(index // chunks_of_step)))
            values[at], values[at + 1], values[at + 2], values[at + 3] = v[0], v[1], v[2], v[3]

    def store_piece(index, values, held, to, row):  # type: ignore[no-untyped-def]
        """.. to its four places."""
        at, c = i32(held + i32(index * 4)), i32(index % chunks_of_step)
        if not uneven or u32(row + u32(index // chunks_of_step * 16)) < u32(rows):
            for e in range(4):
                ptx.store_shared_32(u32(to[e] + u32(c * rows * 128 + index // chunks_of_step * 2048)), values[at + e])

    load_pieces, store_pieces = ptx.unrolled(pieces, load_piece), ptx.unrolled(pieces, store_piece)

    def first_loads(index, values, state, source, stride, row, k, live):  # type: ignore[no-untyped-def]
        """x of step `index` is asked for. `state`: step, slot, parity, number of steps, input channel."""
        if u32(index) < state[3]:
            load_pieces(values, i32(index * pieces * 4), source[0], stride, row, state[4], live, k)
        source[0] = u64(source[0] + u64(step * 2))
        state[4] = u32(state[4] + u32(step))

    def produce(index, values, state, source, stride, row, k, live, to, shared):  # type: ignore[no-untyped-def]
        """x of a step goes to its slot, x of the step `ahead` steps later is asked for."""
        if state[0] < state[3]:
            slot = state[1]
            if state[0] >= u32(x_stages):
                wait_for(u32(shared + u32(empty_at) + u32(slot * u32(8))), state[2])
            places = cuda.local.array(4, u32)
            for e in range(4):
                places[e] = u32(to[e] + u32(slot * u32(x_stage)))
            store_pieces(values, i32(index * pieces * 4), places, row)
            ptx.fence_async_proxy()
            ptx.warp_barrier()
            if u32(cuda.threadIdx.x) & u32(31) == u32(0):
                ptx.mbarrier_arrive(u32(shared + u32(barriers_at) + u32(slot * u32(8))))
            if u32(state[0] + u32(ahead)) < state[3]:
                load_pieces(values, i32(index * pieces * 4), source[0], stride, row, state[4], live, k)
            source[0] = u64(source[0] + u64(step * 2))
            state[4] = u32(state[4] + u32(step))
            state[0] = u32(state[0] + u32(1))
            state[1] = u32(slot + u32(1))
            if slot == u32(x_stages - 1):
                state[1], state[2] = u32(0), u32(state[2] ^ u32(1))

    load_first, produce_all = ptx.unrolled(ahead, first_loads), ptx.unrolled(ahead, produce)

    def put_fragment(index, acc, at, t):  # type: ignore[no-untyped-def]
        """Eight rows of a tile to shared memory, [row of x][output channel]: no two lanes of a store in one bank."""
        j, column = i32(index // (results // 4)), i32(index % (results // 4))
        for e in range(4):
            row = u32(u32(t * u32(2)) + u32(column * 8 + e % 2))
            to = u32(at + u32(u32(row * u32(pitch)) + u32(j * 64 + e // 2 * 8)) * u32(4))
            ptx.store_shared_f32(to, acc[j * results + column * 4 + e])

    put_all = ptx.unrolled(all_results // 4, put_fragment)
    write_results = result_writer(block_n, consumers * 32, out_dtype)

    def kernel(x, packed, pairs, bias, out, parts, m_rows, n, k, x_stride, out_stride):  # type: ignore[no-untyped-def]
        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), ptx.shuffle_first(u32(thread >> u32(5)))
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(0, u32)))
        shared = u32(u32(shared + u32(1023)) & u32(0xFFFFFC00))
        if thread < u32(x_stages):
            ptx.mbarrier_init(u32(shared + u32(barriers_at) + u32(thread * u32(8))), u32(4))
            ptx.mbarrier_init(u32(shared + u32(empty_at) + u32(thread * u32(8))), u32(consumers))

        # the cut
        chunks = u32(u32(k + u32(63)) >> u32(6))
        steps = u32(chunks // u32(chunks_of_step))
        column_blocks = u32(u32(n + u32(block_n - 1)) // u32(block_n))
        splits, split = u32(u32(cuda.gridDim.x) // column_blocks), u32(u32(cuda.blockIdx.x) // column_blocks)
        nb = u32(u32(cuda.blockIdx.x) - u32(split * column_blocks))
        first = u32(u32(split * steps) // splits)
        count = u32(u32(u32(u32(split + u32(1)) * steps) // splits) - first)
        first_row = u32(u32(cuda.blockIdx.y) * u32(rows))
        live = u32(min(u32(m_rows - first_row), u32(rows)))
        cuda.syncthreads()

        if warp >= u32(consumers):  # x
            ptx.after_previous()
            # a warp's load: 128 bytes of four rows. 4-byte word 16 h + 4 t + 2 s + b of a chunk goes to place 16 h + 8 s + 4 b + t
            row = u32(u32(u32(warp - u32(consumers)) * u32(4)) + u32(lane >> u32(3)))
            to = cuda.local.array(4, u32)
            for e in range(4):
                piece = u32(u32(u32(lane & u32(4)) + u32(e)) ^ u32(row & u32(7)))
                to[e] = u32(shared + u32(row * u32(128)) + u32(piece * u32(16)) + u32(u32(lane & u32(3)) * u32(4)))
            stride = u64(u64(x_stride) * u64(32))  # of 16 rows
            source, state, values = cuda.local.array(1, u64), cuda.local.array(5, u32), cuda.local.array(held_x, u32)
            for i in range(held_x):
                values[i] = u32(0)
            source[0] = u64(
                ptx.address(x) + u64(u32(first_row + row)) * u64(u64(x_stride) * u64(2)) + u64(first) * u64(step * 2)
                + u64(u32(u32(lane & u32(7)) * u32(16)))
            )  # fmt: skip
            state[0], state[1], state[2], state[3] = u32(0), u32(0), u32(1), count
            state[4] = u32(u32(first * u32(step)) + u32(u32(lane & u32(7)) * u32(8)))
            load_first(values, state, source, stride, row, k, live)
            while state[0] < count:
                produce_all(values, state, source, stride, row, k, live, to, shared)
        else:  # weights
            warpgroup, place = u32(warp >> u32(2)), u32(warp & u32(3))
            last_tile = u32(u32(u32(n + u32(15)) >> u32(4)) - u32(1))
            tile = u32(u32(u32(nb * u32(warpgroups) + warpgroup) * u32(4 * tiles)) + place)
            groups = u32(steps * u32(groups_of_step))
            w_from, s_from = cuda.local.array(tiles, u64), cuda.local.array(tiles, u64)
            for j in range(tiles):
                of = u32(min(u32(tile + u32(4 * j)), last_tile))
                at = u32(u32(of * chunks) + u32(first * u32(chunks_of_step)))
                w_from[j] = u64(ptx.address(packed) + u64(at) * u64(512) + u64(u32(lane * u32(16))))
                at = u32(u32(of * groups) + u32(first * u32(groups_of_step)))
                s_from[j] = u64(ptx.address(pairs) + u64(at) * u64(64) + u64(u32(g * u32(8))))
            ring = u32(shared + u32(w_at) + u32(warp * u32(w_warp)))
            for s in range(w_stages):
                if u32(s) < count:
                    copy_weights(w_from, s_from, u32(ring + u32(s * w_stage)), lane)
                ptx.copy_commit()
            acc = cuda.local.array(all_results, f32)
            for i in range(all_results):
                acc[i] = zero
            w, p = cuda.local.array(words, u32), cuda.local.array(pair_words, u32)
            ptx.after_previous()
            it, slot, parity, here = u32(0), u32(0), u32(0), u32(0)
            while it < count:
                wait_w()
                load_weights(w, p, u32(ring + here), lane)
                if u32(it + u32(w_stages)) < count:
                    copy_weights(w_from, s_from, u32(ring + here), lane)
                ptx.copy_commit()
                here = u32(here + u32(w_stage)) if here < u32((w_stages - 1) * w_stage) else u32(0)
                wait_for(u32(shared + u32(barriers_at) + u32(slot * u32(8))), parity)
                multiply(acc, w, p, u64(descriptor | u64(u32(shared + u32(slot * u32(x_stage))) >> u32(4))))
                if lane == u32(0):
                    ptx.mbarrier_arrive(u32(shared + u32(empty_at) + u32(slot * u32(8))))
                slot = u32(slot + u32(1))
                if slot == u32(x_stages):
                    slot, parity = u32(0), u32(parity ^ u32(1))
                it = u32(it + u32(1))

            # results go out in rows, through shared memory: what x was in is free once all warps are here
            ptx.some_barrier(u32(1), u32(consumers * 32))
            put_all(acc, u32(shared + u32(u32(u32(warpgroup * u32(64 * tiles)) + u32(place * u32(16))) + g) * u32(4)), t)
            ptx.some_barrier(u32(1), u32(consumers * 32))
            write_results(
                shared, thread, bias, out, parts, m_rows, n, out_stride, first_row, live, u32(nb * u32(block_n)), splits, split
            )  # fmt: skip

    return Kernel(kernel, arguments(out_dtype), launch.threads, shared_map.total, min_blocks=blocks, suffix="a", early=True)


# -- launcher ---------------------------------------------------------------------------------------------------------------------


class W4Hopper(W4Product):
    """For weights of the form "zero" on compute capability 9.0."""

    buckets = HOPPER_BUCKETS

    def of_table(self, rows: int) -> HopperLaunch:
        return hopper_launch(rows, self.n, self.k)

    def variant(self, launch: HopperLaunch) -> Variant:
        if self.form != "zero":
            raise ValueError(f"this product takes pairs of the form zero, not {self.form}; w4_matmul takes both")
        if self._cc != (9, 0):
            raise ValueError(
                f"this product runs on compute capability 9.0 alone, not {self._cc[0]}.{self._cc[1]}; w4_matmul does elsewhere"
            )
        return Variant(__name__, "w4_hopper", (self.group, self.dtype, self.out_dtype, *launch.constants))

    def grid(self, launch: HopperLaunch, m: int) -> W4Grid:
        return hopper_grid(launch, m, self.n, self.k, self.group, self._multiprocessors)
