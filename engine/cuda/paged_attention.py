"""Attention of one query token a row over the paged pool: `attend` over `gather_kv` of `engine/reference.py`, decode rows.

Layout (16 bits an element unless said; the pool of a layer may be quantized, `engine/cache/layout.py`)

    q, out [R, heads, head_dim] with a stride between rows          pool of a layer [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim]
    tables int32 [slots + 1, blocks_per_slot]                       shares, rows int32: `engine/cuda/attention_schedule.py`
    partials float32 [shares, head sets, sections, record]          record: numerators [heads of a set, head_dim], then
    counters uint32 [shares, head sets], 0 between launches             (maximum, denominator) of each head

A quantized pool's tiles are worked through by `engine/cuda/decode_quantized.py`; all else is the same.

A head set is up to 16 query heads that share a KV head: the columns of the tensor-core products.

    S^T [16 positions, 8 heads] += K [16, 16 dims] x q^T [16 dims, 8 heads]       A: ldmatrix, B: registers
    O^T [16 dims, 8 heads]      += V^T [16 dims, 16 positions] x P^T              A: ldmatrix.trans, B: movmatrix of S^T

Work split: one thread block = one share of the schedule x one head set, grid = shares * head sets, the same in every step. Warp
w takes tile w of each strip of `warps` tiles of 16 positions (of codes also 32), through its own ring of stages filled by
cp.async: warps wait for each other only where a section ends.

       row 0                     row 1                                     strip  = warps tiles, one a warp
    |  section | section |  section | section | section |                 section = strips; its value: the warps' sums, joined
    '--------- share 0 ---------''------ share 1 -------'                  row     = its sections, folded in order

A row within one share is folded in registers. The sections of a row that shares divide go to `partials`, and whoever counts
the last of them folds them all, in the same order with the same arithmetic: so a row's bits depend on its own context only,
never on the batch. Counters go back to 0 for the next launch.

A tile's block is looked up a step before the tile is copied: 262 us at 64 x 4,096, where an earlier run took 277.

Measured on an H200 (32 heads over 8 of 128; bench/LOG.md): 7.6 us at 1 x 1,024, 46 at 8 x 4,096, 75 at 64 x 1,024, 4.10 TB/s at
64 x 4,096, 89 % of what a read kernel reaches; over codes of 8 and 4 bits that takes 145 and 82 us. By estimate 16 mma, 16 ldmatrix
and about 200 other instructions for 8 KB, which is an eighth of what a multiprocessor can issue while it reads them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from engine.cache.layout import KVLayout
from engine.cuda import ptx
from engine.cuda.attention_schedule import ROW_INTS, SHARE_INTS
from engine.cuda.attention_tiles import TILE, code_tile_bytes, pitch, quantized, sixteen_bits, tile_bytes
from engine.cuda.decode_quantized import TileMath, quantized_math
from engine.cuda.kv_quant import piece_rotator
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.pool import check_pool
from engine.cuda.target import cuda, pointer, types
from engine.cuda.tuning_attention import DecodeShape, decode_shape

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
INTS, WORDS, FLOATS, HALVES = pointer(i32), pointer(u32), pointer(f32), pointer(types.uint16)
NOTHING = -1.0e30  # a maximum of no scores: finite, so that no difference of two is NaN
LOG2_E = math.log2(math.e)
FEW_SETS = 4  # head sets: with these or fewer, twice as many sections
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROW, STRIP, END, BASE, LOW, STOP = range(6)  # what a warp copies next: row, strip, strip to stop before; of that row the rest
MOST_PIECES = 4  # of 4 numerators that a thread folds
MOST_RECORDS = 128  # of sections, a multiprocessor, where a shape leaves the choice; memory (`engine/plan_cuda.py`)
BATCH = 8  # sections whose partials are in flight at a time


def heads_of_set(group: int, head_dim: int, warps: int) -> int:
    """Query heads that one thread block takes, of `group` that share a KV head: as many as its registers hold sums of."""
    most = min(16 if head_dim <= 128 else 8, MOST_PIECES * 4 * 32 * warps // head_dim)
    sets = -(-group // most)
    return -(-group // sets)


def record_floats(set_heads: int, head_dim: int) -> int:
    return set_heads * head_dim + -(-2 * set_heads // 4) * 4


def paged_decode(
    kv_heads: int, group: int, head_dim: int, block_seq_len: int, dtype: str, sections: int, warps: int, stages: int, blocks: int,
    bits: int = 0, tiles: int = 1,
) -> Kernel:  # fmt: skip
    """(q, elements between rows, pool of a layer, tables, entries of a slot, shares, rows, partials, counters, out); bits: of a
    quantized pool, else 0; tiles: of 16 positions that a warp takes at once."""
    if tiles > 1 and not bits:
        raise ValueError(f"{tiles} tiles at once: a pool of 16 bits an element is read one tile at a time")
    set_heads = heads_of_set(group, head_dim, warps)
    sets_of_kv = -(-group // set_heads)
    sets = kv_heads * sets_of_kv
    columns = -(-set_heads // 8)  # tiles of 8 heads
    steps = head_dim // 16  # tiles of 16 dims
    row_pitch, value_at = pitch(head_dim), TILE * pitch(head_dim)
    slot_bytes = code_tile_bytes(head_dim, bits, tiles) if bits else tile_bytes(head_dim)
    taken = TILE * tiles  # positions
    threads = 32 * warps
    slots_bytes = stages * slot_bytes
    # what a warp leaves in the slot it read last: numerators [set_heads, head_dim + 4 floats], then maxima and denominators
    left_pitch = 4 * (head_dim + 4)
    pairs_at = 16 * left_pitch if columns == 2 else 8 * left_pitch
    left_bytes = 0
    if bits:  # a slot of codes is too small: they have a place of their own after a ring
        pairs_at = set_heads * left_pitch
        left_bytes = pairs_at + 8 * set_heads
    ring_bytes = -(-(slots_bytes + left_bytes) // 16) * 16
    flag_at = warps * ring_bytes  # one word after the rings
    pieces = -(-set_heads * head_dim // 4 // threads)  # of 4 numerators that a thread folds
    all_pieces = set_heads * head_dim // 4
    record, record_pairs = record_floats(set_heads, head_dim), set_heads * head_dim
    scale = f32(head_dim**-0.5 * LOG2_E)
    nothing, zero = f32(NOTHING), f32(0.0)
    mma, pack, wait = ptx.MMA[dtype], ptx.PACK[dtype], ptx.COPY_WAIT[stages - 1]
    pool_format = sixteen_bits(kv_heads, head_dim, block_seq_len)
    if bits:
        pool_format = quantized(kv_heads, head_dim, block_seq_len, bits, tiles)
    find_tile, copy_tile = pool_format.find, pool_format.copy
    query_words, fragments, totals = columns * steps * 2, columns * steps * 4, pieces * 4
    score_words, weight_words = tiles * columns * 4, tiles * columns * 2
    column_words = columns * 2
    batch = BATCH
    batch_totals, batch_pairs = batch * 4, batch * 2
    lane_steps = (4, 8, 16)
    out_stride = kv_heads * group * head_dim
    if not bits and pairs_at + 16 * 8 > slot_bytes:
        raise ValueError(f"head_dim {head_dim}: a slot of {slot_bytes} bytes does not hold a warp's sums")

    @cuda.jit(device=True, inline="always")
    def find_next(cursor, table, found, first_row, first_section, last_row, last_stop, tables, table_stride, rows, warp):  # type: ignore[no-untyped-def]
        """Where the warp's next tile is, if one is left: asked a step before it is copied."""
        if cursor[STRIP] == cursor[END] and cursor[ROW] < last_row:
            cursor[ROW] = i32(cursor[ROW] + i32(1))
            at = u64(rows + u64(u32(cursor[ROW])) * u64(4 * ROW_INTS))
            slot, base, low, stop = ptx.load_128(at)
            length, _, _, strips = ptx.load_128(u64(at + u64(16)))
            table[0] = u64(tables + u64(slot) * u64(u32(table_stride)) * u64(4))
            cursor[BASE], cursor[LOW], cursor[STOP] = i32(base), i32(low), i32(stop)
            cursor[STRIP] = i32(first_section * i32(length)) if cursor[ROW] == first_row else i32(0)
            cursor[END] = i32(min(i32(last_stop * i32(length)), i32(strips))) if cursor[ROW] == last_row else i32(strips)
        if cursor[STRIP] < cursor[END]:
            position = i32(cursor[BASE] + i32(u32(u32(cursor[STRIP]) * u32(warps) + warp) * u32(taken)))
            found[0] = find_tile(table[0], position, cursor[STOP])

    @cuda.jit(device=True, inline="always")
    def queue_tile(
        cursor, table, found, to, first_row, first_section, last_row, last_stop, tables, table_stride, rows, kv, kv_head, lane, warp, ring
    ):  # type: ignore[no-untyped-def]
        """Queue the copy of the warp's next tile, if one is left, and close the group."""
        if cursor[STRIP] < cursor[END]:
            position = i32(cursor[BASE] + i32(u32(u32(cursor[STRIP]) * u32(warps) + warp) * u32(taken)))
            copy_tile(kv, table[0], found[0], kv_head, position, cursor[LOW], cursor[STOP], to[0], lane)
            cursor[STRIP] = i32(cursor[STRIP] + i32(1))
            to[0] = next_slot(to[0], ring)
            find_next(cursor, table, found, first_row, first_section, last_row, last_stop, tables, table_stride, rows, warp)
        ptx.copy_commit()

    @cuda.jit(device=True, inline="always")
    def next_slot(slot, ring):  # type: ignore[no-untyped-def]
        after = u32(slot + u32(slot_bytes))
        return ring if after == u32(ring + u32(slots_bytes)) else after

    @cuda.jit(device=True, inline="always")
    def place_lanes(places, lane):  # type: ignore[no-untyped-def]
        """Where this lane's ldmatrix addresses point in a tile: K row (lane & 7) + 8 (lane bit 3), V row (lane & 7) + 8 (bit 4)."""
        lane_8, bit_3, bit_4 = u32(lane & u32(7)), u32(u32(lane >> u32(3)) & u32(1)), u32(lane >> u32(4))
        places[0] = u32(u32(lane_8 + bit_3 * u32(8)) * u32(row_pitch) + bit_4 * u32(16))
        places[1] = u32(u32(lane_8 + bit_4 * u32(8)) * u32(row_pitch) + bit_3 * u32(16) + u32(value_at))

    @cuda.jit(device=True, inline="always")
    def load_query(query, asked, q, row, q_stride, first_head, some_heads, lane):  # type: ignore[no-untyped-def]
        """B fragments of the set's heads; heads that do not exist are zeros."""
        for n in range(columns):
            head = u32(u32(lane >> u32(2)) + u32(8 * n))
            inside = head < some_heads
            head = u32(first_head + head) if inside else first_head
            source = u64(q + u64(u32(row)) * u64(u32(q_stride)) * u64(2))
            source = u64(source + u64(u32(head * u32(2 * head_dim) + u32(lane & u32(3)) * u32(4))))
            for k in range(steps):
                a, b = ptx.load_32(u64(source + u64(32 * k))), ptx.load_32(u64(source + u64(32 * k + 16)))
                query[(n * steps + k) * 2] = a if inside else u32(0)
                query[(n * steps + k) * 2 + 1] = b if inside else u32(0)

    @cuda.jit(device=True, inline="always")
    def add_tile(slot, query, asked, sums, top, under, shift, scores, weights, keep, position, low, stop, places, lane):  # type: ignore[no-untyped-def]
        """One online-softmax step over the 16 positions in `slot`; `position` is that of this lane's first score."""
        for i in range(score_words):
            scores[i] = zero
        for k in range(steps):
            a0, a1, a2, a3 = ptx.load_matrix_4(u32(slot + places[0] + u32(32 * k)))
            for n in range(columns):
                i, w = 4 * n, (n * steps + k) * 2
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = mma(
                    a0, a1, a2, a3, query[w], query[w + 1], scores[i], scores[i + 1], scores[i + 2], scores[i + 3]
                )
        near = low <= position and position < stop
        far = low <= i32(position + i32(8)) and i32(position + i32(8)) < stop
        for i in range(column_words):
            w = i // 2 * 4 + i % 2
            above = scores[w] * scale if near else nothing
            below = scores[w + 2] * scale if far else nothing
            most = ptx.maximum(above, below)
            for distance in lane_steps:
                most = ptx.maximum(most, ptx.shuffle_xor_f32(most, u32(distance)))
            most = ptx.maximum(most, top[i])
            keep[i] = ptx.exp2(top[i] - most)
            top[i] = most
            scores[w], scores[w + 2] = ptx.exp2(above - most), ptx.exp2(below - most)
            under[i] = ptx.fma(under[i], keep[i], scores[w] + scores[w + 2])
        for n in range(columns):
            weights[2 * n] = ptx.move_matrix_transposed(pack(scores[4 * n], scores[4 * n + 1]))
            weights[2 * n + 1] = ptx.move_matrix_transposed(pack(scores[4 * n + 2], scores[4 * n + 3]))
        for k in range(steps):
            a0, a1, a2, a3 = ptx.load_matrix_4_transposed(u32(slot + places[1] + u32(32 * k)))
            for n in range(columns):
                i = (n * steps + k) * 4
                sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = mma(
                    a0, a1, a2, a3, weights[2 * n], weights[2 * n + 1],
                    sums[i] * keep[2 * n], sums[i + 1] * keep[2 * n + 1], sums[i + 2] * keep[2 * n], sums[i + 3] * keep[2 * n + 1],
                )  # fmt: skip

    @cuda.jit(device=True, inline="always")
    def leave(slot, sums, top, under, shift, lane):  # type: ignore[no-untyped-def]
        """Write the warp's sums of a section over the tile it has read last: [set_heads, head_dim + 4], then pairs."""
        for n in range(columns):
            for j in range(2):
                total_under = under[2 * n + j]
                for distance in lane_steps:
                    total_under = total_under + ptx.shuffle_xor_f32(total_under, u32(distance))
                head = u32(u32(lane & u32(3)) * u32(2) + u32(8 * n + j))
                if head < u32(set_heads):
                    to = u32(slot + head * u32(left_pitch) + u32(lane >> u32(2)) * u32(4))
                    for k in range(steps):
                        i = (n * steps + k) * 4 + j
                        ptx.store_shared_f32(u32(to + u32(64 * k)), sums[i])
                        ptx.store_shared_f32(u32(to + u32(64 * k + 32)), sums[i + 2])
                    if lane < u32(4):
                        to = u32(slot + u32(pairs_at) + head * u32(8))
                        ptx.store_shared_64(to, ptx.bits_of_float(top[2 * n + j]), ptx.bits_of_float(total_under))

    work = TileMath(place_lanes, load_query, add_tile, leave, 2)
    if bits:
        work = quantized_math(head_dim, bits, set_heads, dtype, NOTHING, left_pitch, pairs_at, tiles)
    rotate_piece = piece_rotator(head_dim) if bits == 4 else None
    find_places, get_query, add, leave_sums, num_places = work

    @cuda.jit(device=True, inline="always")
    def join(left, head, part, joined):  # type: ignore[no-untyped-def]
        """joined = numerators 4 part .. of a head over all warps' sums, the first at `left`: (maximum, denominator)."""
        pair = u32(left + u32(pairs_at) + head * u32(8))
        most = nothing
        for w in range(warps):
            most = ptx.maximum(most, ptx.load_shared_f32(u32(pair + u32(ring_bytes * w))))
        total_under = zero
        for j in range(4):
            joined[j] = zero
        source = u32(left + head * u32(left_pitch) + part * u32(16))
        for w in range(warps):
            b0, b1 = ptx.load_shared_64(u32(pair + u32(ring_bytes * w)))
            weight = ptx.exp2(ptx.float_of_bits(b0) - most)
            total_under = ptx.fma(ptx.float_of_bits(b1), weight, total_under)
            a0, a1, a2, a3 = ptx.load_shared_128(u32(source + u32(ring_bytes * w)))
            joined[0] = ptx.fma(ptx.float_of_bits(a0), weight, joined[0])
            joined[1] = ptx.fma(ptx.float_of_bits(a1), weight, joined[1])
            joined[2] = ptx.fma(ptx.float_of_bits(a2), weight, joined[2])
            joined[3] = ptx.fma(ptx.float_of_bits(a3), weight, joined[3])
        return most, total_under

    @cuda.jit(device=True, inline="always")
    def fold(total, tops, unders, i, values, of, other_top, other_under):  # type: ignore[no-untyped-def]
        """Piece i of the row and one section more. Every operation is explicit: the two callers must round alike."""
        most = ptx.maximum(tops[i], other_top)
        kept, added = ptx.exp2(tops[i] - most), ptx.exp2(other_top - most)
        tops[i] = most
        unders[i] = ptx.fma(unders[i], kept, other_under * added)
        for j in range(4):
            total[4 * i + j] = ptx.fma(total[4 * i + j], kept, values[of + j] * added)

    @cuda.jit(device=True, inline="always")
    def fold_partials(start, row_sections, piece, total, tops, unders, i, values, pairs):  # type: ignore[no-untyped-def]
        """Piece i of a row that shares divide, from its sections' records at `start`."""
        head = u32(piece // u32(head_dim // 4))
        section = i32(0)
        while section < row_sections:
            for b in range(batch):
                of = i32(min(i32(section + i32(b)), i32(row_sections - i32(1))))
                source = u64(start + u64(u32(of)) * u64(4 * record))
                a0, a1, a2, a3 = ptx.load_128(u64(source + u64(piece) * u64(16)))
                b0, b1 = ptx.load_64(u64(source + u64(4 * record_pairs) + u64(head) * u64(8)))
                values[4 * b], values[4 * b + 1] = ptx.float_of_bits(a0), ptx.float_of_bits(a1)
                values[4 * b + 2], values[4 * b + 3] = ptx.float_of_bits(a2), ptx.float_of_bits(a3)
                pairs[2 * b], pairs[2 * b + 1] = ptx.float_of_bits(b0), ptx.float_of_bits(b1)
            for b in range(batch):
                if i32(section + i32(b)) < row_sections:
                    fold(total, tops, unders, i, values, 4 * b, pairs[2 * b], pairs[2 * b + 1])
            section = i32(section + i32(batch))

    @cuda.jit(device=True, inline="always")
    def arrive(counter, done, of, flag, thread):  # type: ignore[no-untyped-def]
        """Whether `done` sections more make `of`, the same answer in all threads; what others wrote of the row is then seen."""
        ptx.fence_device()
        cuda.syncthreads()
        if thread == u32(0):
            before = ptx.add_counter(counter, done)
            last = u32(0)
            if u32(before + done) == u32(of):
                last = u32(1)
                ptx.store_32(counter, u32(0))
            ptx.store_shared_32(flag, last)
        cuda.syncthreads()
        ready = ptx.load_shared_32(flag) == u32(1)
        if ready:
            ptx.fence_device()
        return ready

    def kernel(q, q_stride, kv, tables, table_stride, shares, rows, partials, counters, out):  # type: ignore[no-untyped-def]
        ptx.after_previous()
        shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(0, u32, alignment=16)))
        query, weights = cuda.local.array(query_words, u32), cuda.local.array(weight_words, u32)
        sums, scores = cuda.local.array(fragments, f32), cuda.local.array(score_words, f32)
        top, under, keep = cuda.local.array(column_words, f32), cuda.local.array(column_words, f32), cuda.local.array(column_words, f32)
        total, joined = cuda.local.array(totals, f32), cuda.local.array(4, f32)
        total_top, total_under = cuda.local.array(pieces, f32), cuda.local.array(pieces, f32)
        values, pairs = cuda.local.array(batch_totals, f32), cuda.local.array(batch_pairs, f32)
        asked, shift = cuda.local.array(column_words, f32), cuda.local.array(column_words, f32)
        places = cuda.local.array(num_places, u32)
        cursor, table = cuda.local.array(6, i32), cuda.local.array(1, u64)
        found, to = cuda.local.array(1, u32), cuda.local.array(1, u32)

        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), u32(thread >> u32(5))
        share = u32(u32(cuda.blockIdx.x) // u32(sets))
        head_set = u32(u32(cuda.blockIdx.x) - share * u32(sets))
        kv_head = u32(head_set // u32(sets_of_kv))
        of_kv = u32(u32(head_set - kv_head * u32(sets_of_kv)) * u32(set_heads))
        some_heads, first_head = u32(min(u32(set_heads), u32(u32(group) - of_kv))), u32(kv_head * u32(group) + of_kv)
        kv_address, tables_address, rows_address = ptx.address(kv), ptx.address(tables), ptx.address(rows)
        own = u32(warp + u32(1))  # the warp's barrier
        ring, flag = u32(shared + warp * u32(ring_bytes)), u32(shared + u32(flag_at))
        find_places(places, lane)

        s0, s1, s2, s3 = ptx.load_128(u64(ptx.address(shares) + u64(share) * u64(4 * SHARE_INTS)))
        first_row, first_section, last_row, last_stop = i32(s0), i32(s1), i32(s2), i32(s3)
        if last_row < first_row:
            return
        cursor[ROW], cursor[STRIP], cursor[END] = i32(first_row - i32(1)), i32(0), i32(0)
        cursor[BASE], cursor[LOW], cursor[STOP], table[0], found[0], to[0] = i32(0), i32(0), i32(1), tables_address, u32(0), ring
        find_next(cursor, table, found, first_row, first_section, last_row, last_stop, tables_address, table_stride, rows_address, warp)
        ahead = i32(0)
        while ahead < i32(stages - 1):
            queue_tile(
                cursor, table, found, to, first_row, first_section, last_row, last_stop, tables_address, table_stride, rows_address,
                kv_address, kv_head, lane, warp, ring,
            )  # fmt: skip
            ahead = i32(ahead + i32(1))

        slot = ring
        row = first_row
        while row <= last_row:
            at = u64(rows_address + u64(u32(row)) * u64(4 * ROW_INTS))
            _, r1, r2, r3 = ptx.load_128(at)
            r4, r5, owner, r7 = ptx.load_128(u64(at + u64(16)))
            low, stop, length, row_sections = i32(r2), i32(r3), i32(r4), i32(r5)
            section = first_section if row == first_row else i32(0)
            section_stop = last_stop if row == last_row else row_sections
            begun = section
            whole = begun == i32(0) and section_stop == row_sections
            owner = u32(owner * u32(sets) + head_set)
            records = u64(ptx.address(partials) + u64(u32(owner * u32(sections))) * u64(4 * record))
            get_query(query, asked, ptx.address(q), row, q_stride, first_head, some_heads, lane)
            for i in range(pieces):
                total_top[i], total_under[i] = nothing, zero
            for i in range(totals):
                total[i] = zero

            while section < section_stop:
                for i in range(column_words):
                    top[i], under[i], shift[i] = nothing, zero, zero
                for i in range(fragments):
                    sums[i] = zero
                strip = i32(section * length)
                strip_stop = i32(min(i32(strip + length), i32(r7)))
                position = i32(i32(r1) + i32(u32(u32(strip) * u32(warps) + warp) * u32(taken) + u32(lane >> u32(2))))
                read = slot
                while strip < strip_stop:
                    queue_tile(
                        cursor, table, found, to, first_row, first_section, last_row, last_stop, tables_address, table_stride,
                        rows_address, kv_address, kv_head, lane, warp, ring,
                    )  # fmt: skip
                    wait()
                    ptx.some_barrier(own, u32(32))
                    if bits == 0 or i32(position - i32(lane >> u32(2))) < stop:  # a tile of codes beyond it was not read
                        add(slot, query, asked, sums, top, under, shift, scores, weights, keep, position, low, stop, places, lane)
                    ptx.some_barrier(own, u32(32))
                    position = i32(position + i32(warps * taken))
                    read = slot
                    slot = next_slot(slot, ring)
                    strip = i32(strip + i32(1))

                if bits > 0:
                    read = u32(ring + u32(slots_bytes))
                leave_sums(read, sums, top, under, shift, lane)
                cuda.syncthreads()
                left = u32(read - warp * u32(ring_bytes))
                for i in range(pieces):
                    piece = u32(thread + u32(threads * i))
                    if piece < u32(all_pieces):
                        head = u32(piece // u32(head_dim // 4))
                        part = u32(piece - head * u32(head_dim // 4))
                        joined_top, joined_under = join(left, head, part, joined)
                        if whole:
                            fold(total, total_top, total_under, i, joined, 0, joined_top, joined_under)
                        else:
                            target = u64(records + u64(u32(section)) * u64(4 * record))
                            ptx.store_128(
                                u64(target + u64(piece) * u64(16)), ptx.bits_of_float(joined[0]), ptx.bits_of_float(joined[1]),
                                ptx.bits_of_float(joined[2]), ptx.bits_of_float(joined[3]),
                            )  # fmt: skip
                            if part == u32(0):
                                target = u64(target + u64(4 * record_pairs) + u64(head) * u64(8))
                                ptx.store_64(target, ptx.bits_of_float(joined_top), ptx.bits_of_float(joined_under))
                cuda.syncthreads()  # the slot may be filled again
                section = i32(section + i32(1))

            ready = whole
            if not whole:
                counter = u64(ptx.address(counters) + u64(owner) * u64(4))
                ready = arrive(counter, u32(section_stop - begun), row_sections, flag, thread)
                if ready:
                    for i in range(pieces):
                        piece = u32(thread + u32(threads * i))
                        if piece < u32(all_pieces):
                            fold_partials(records, row_sections, piece, total, total_top, total_under, i, values, pairs)
            if ready:
                target = u64(ptx.address(out) + u64(u32(row)) * u64(2 * out_stride) + u64(u32(first_head * u32(2 * head_dim))))
                for i in range(pieces):
                    piece = u32(thread + u32(threads * i))
                    inverse = ptx.reciprocal(total_under[i])
                    for j in range(4):
                        total[4 * i + j] = total[4 * i + j] * inverse
                    if bits == 4:
                        rotate_piece(total, 4 * i)
                    if u32(piece // u32(head_dim // 4)) < some_heads:
                        ptx.store_64(
                            u64(target + u64(piece) * u64(8)),
                            pack(total[4 * i], total[4 * i + 1]), pack(total[4 * i + 2], total[4 * i + 3]),
                        )  # fmt: skip
            row = i32(row + i32(1))

    arguments = (HALVES, i32, HALVES, INTS, i32, INTS, INTS, FLOATS, WORDS, HALVES)
    return Kernel(kernel, arguments, threads, warps * ring_bytes + 16, blocks, early=True)


class PagedDecode:
    """Attention of the first R rows of a step, one query token each, at position contexts[r] - 1 (`engine.reference.attend`).

    Owns its scratch: `scratch_bytes` are allocated by the caller as one uint8 tensor and given to `bind` once. One object serves
    all layers with the same window; `schedule` runs once a step before the first of them.

    heads, kv_heads: of this rank. head_dim: a multiple of 16, to 256. multiprocessors, cc: of the card, they decide the grid.
    max_rows: the most decode rows of a step. window: positions a token sees, 0 for all. `shape` overrides the tuning table. bits: 8 or
    4 of a quantized pool (head_dim a multiple of 32 or 64), 0: it has the computing dtype.
    """

    def __init__(
        self,
        library: Library,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_seq_len: int,
        dtype: str,
        max_rows: int,
        multiprocessors: int,
        cc: tuple[int, int],
        *,
        window: int = 0,
        shape: DecodeShape | None = None,
        bits: int = 0,
    ) -> None:
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; a multiple of 16 from 16 to 256 is needed")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
        if block_seq_len < 1 or max_rows < 1 or window < 0:
            raise ValueError(f"block_seq_len {block_seq_len}, max_rows {max_rows} and window {window}: at least 1, 1 and 0 are needed")
        shape = shape or decode_shape(cc, head_dim, bits)
        if block_seq_len % (TILE * shape.tiles):  # what lies in one block is copied with fewer instructions
            shape = replace(shape, tiles=1)
        group = heads // kv_heads
        self._library, self._dtype = library, DTYPES[dtype]
        self._layout = KVLayout(1, kv_heads, head_dim, block_seq_len, dtype, bits)
        self._width, self._max_rows = heads * head_dim, max_rows
        set_heads = heads_of_set(group, head_dim, shape.warps)
        self._sets = kv_heads * -(-group // set_heads)
        self._shares = max(1, shape.blocks * multiprocessors // self._sets)
        twice = 1 if self._sets > FEW_SETS else 2
        sections, few = twice * shape.sections, twice * shape.few
        if few:
            sections = max(shape.sections, min(sections, MOST_RECORDS // shape.blocks))
        self._partials = self._shares * self._sets * sections * record_floats(set_heads, head_dim)
        constants = (kv_heads, group, head_dim, block_seq_len, dtype, sections, shape.warps, shape.stages, shape.blocks, bits)
        constants = (*constants, shape.tiles) if bits else constants
        self._decode = Variant(__name__, "paged_decode", constants)
        strip = shape.warps * shape.tiles * TILE
        self._schedule = Variant(
            "engine.cuda.attention_schedule", "decode_schedule", (strip, sections, few or sections, window, self._shares, max_rows)
        )
        self.variants = (self._schedule, self._decode)
        self._scratch: tuple[torch.Tensor, ...] = ()

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the tensor that `bind` takes."""
        return 4 * sum(self._lengths)

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Words of shares, rows, counters and partials; each a multiple of 4."""
        return SHARE_INTS * self._shares, ROW_INTS * self._max_rows, -(-self._shares * self._sets // 4) * 4, self._partials

    def bind(self, scratch: torch.Tensor) -> None:
        """scratch uint8 [scratch_bytes], on a 16-byte boundary, nobody else's from now on."""
        if scratch.dtype != torch.uint8 or scratch.numel() != self.scratch_bytes or scratch.data_ptr() % 16:
            raise ValueError(f"the scratch is {scratch.dtype} x {scratch.numel()}, not uint8 x {self.scratch_bytes} on a 16-byte boundary")
        shares, rows, counters, partials = scratch.view(torch.int32).split(self._lengths)
        counters.zero_()
        self._scratch = (shares, rows, counters, partials)

    def schedule(self, contexts: torch.Tensor, row_slots: torch.Tensor, num_rows: int) -> None:
        """Divide a step's decode rows, the first `num_rows`, among thread blocks; contexts, row_slots int32 of at least so many."""
        if not 0 < num_rows <= self._max_rows or len(contexts) < num_rows or len(row_slots) < num_rows:
            raise ValueError(f"{num_rows} rows of {len(contexts)} contexts and {len(row_slots)} slots; 1 to {self._max_rows} are possible")
        shares, rows, _, _ = self._scratch
        self._library[self._schedule](1, contexts, row_slots, num_rows, shares, rows)

    def __call__(self, q: torch.Tensor, pool: torch.Tensor, tables: torch.Tensor, out: torch.Tensor) -> None:
        """out[r] = attention of the query in the first heads * head_dim elements of q[r], for the rows of `schedule`.

        q, out [R or more, >= heads * head_dim], pool one layer of `engine/cache/layout.py` with num_blocks + 1 blocks, tables int32
        [slots + 1, blocks_per_slot].
        """
        check_pool(pool, self._layout)
        if q.dtype != self._dtype or out.dtype != self._dtype or q.stride(1) != 1 or not out.is_contiguous():
            raise ValueError(f"q is {q.dtype} {q.stride()}, out is {out.dtype} {out.stride()}; consecutive {self._dtype} rows are needed")
        apart = 8 if self._layout.quant_policy else 2  # elements
        aligned = q.stride(0) % apart == 0 and q.data_ptr() % (2 * apart) == 0
        if q.shape[1] < self._width or out.shape[1] != self._width or not aligned or tables.stride(1) != 1:
            raise ValueError(
                f"q is {tuple(q.shape)} {q.stride()}; rows of at least {self._width} elements on {2 * apart}-byte boundaries are needed"
            )
        shares, rows, counters, partials = self._scratch
        self._library[self._decode](
            self._shares * self._sets, q, q.stride(0), pool, tables, tables.stride(0), shares, rows, partials, counters, out
        )
