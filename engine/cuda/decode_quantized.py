"""Decode attention over a quantized pool: what `engine/cuda/paged_attention.py` does with a tile of codes, in mma fragments.

Codes are used as they are: a byte or a nibble in the low bits of a 16-bit number is a subnormal float16, exactly code x 2^-24 (or
2^-20 where a nibble lies four bits higher). So a register of a fragment costs one permutation or one mask, no code is ever
rounded, and scale and zero come in once a position (x = c + s (n - half), s and c of K and of V, powers of 2 besides):

    score   = ks (K q) + (kc - half ks) sum(q)                        K: codes
    answer  = sum p vs (V + vc / vs - half) / sum p                   V: codes
            = sum p' (V + z) / sum (p' / vs),   p' = p vs,  z = vc / vs - half

p' is exp2(score + log2 vs - maximum): the maximum is one of what is summed, so that p' fits into float16 whatever the scales
are, and no score has a second exponential. It is followed only when a sum exceeds it by more than SLACK: what is summed may be up to
2^SLACK, and most steps have no maximum to find in all lanes and nothing to scale. K q, p' V and their sums are float32; q, with
the softmax's factor in it, and p' are rounded to float16 (2^-12), whatever the computing dtype is.

    fragments (lane = 4 g + t; a head of K at a position is `row` bytes)
      K   16 positions x 16 dims: row g is position g; lane t has the t-th quarter of each 4 pieces of a row, a word a step
          (8 bits) or two (4 bits): which dims a step has is the same for all g, and q's fragments are made to match
      V^T 16 dims x 16 positions: lane g has the g-th eighth of the rows of positions 2t, 2t + 1, 2t + 8, 2t + 9; rows g, g + 8
          of tile T are dims g head_dim / 8 + 2 T and + 1

A step takes one or two tiles of 16 positions, whose softmax is one. By the assembler's listing two of 4 bits are 460 instructions of a
warp, where one was 295: the loop, the wait and the search for a maximum are shared. Knows neither shares nor sections.

Measured on an H200 (bench/LOG.md): 64 x 4,096 positions of 32 heads over 8 of 128 in 145 us (8 bits, 3.83 TB/s) and 82 us (4 bits, 3.51
TB/s), 1.81 and 3.21 times as fast as 16 bits; one tile a step takes as long with 8 bits, 5 to 11 % longer with 4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from engine.cuda import ptx
from engine.cuda.attention_tiles import TILE, code_place
from engine.cuda.target import cuda, types

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
LOG2_E = math.log2(math.e)
SLACK = 8.0  # float16 holds 2^15
ONE_F16, SIXTEEN_F16 = 0x3C003C00, 0x4C004C00  # pairs


class TileMath(NamedTuple):
    """What the kernel inlines, and how many numbers it keeps for it (`places`: uint32, loop-invariant)."""

    place_lanes: Any
    load_query: Any
    add_tile: Any
    leave: Any
    num_places: int


def piece_bytes(size: int) -> int:
    """Largest load of 16, 8 or 4 bytes that divides `size`."""
    return next(piece for piece in (16, 8, 4) if size % piece == 0)


def quantized_math(
    head_dim: int, bits: int, set_heads: int, dtype: str, nothing: float, left_pitch: int, pairs_at: int, tiles: int
) -> TileMath:
    """nothing: a maximum of no scores. left_pitch, pairs_at: how a warp leaves its sums (`paged_attention.py`). tiles: of a step."""
    row = head_dim * bits // 8
    steps, columns = head_dim // 16, -(-set_heads // 8)
    key_lane, value_lane = row // 4, row // 8  # bytes of a row that a lane reads
    key_piece, value_piece = piece_bytes(key_lane), piece_bytes(value_lane)
    key_pieces, value_pieces = key_lane // key_piece, value_lane // value_piece
    key_words, value_words = key_piece // 4, value_piece // 4
    tile_codes = TILE * row  # bytes of K or V of 16 positions
    value_at, tile_pairs_at, value_pairs = tiles * tile_codes, 2 * tiles * tile_codes, 4 * TILE * tiles
    num_places = 2 * key_pieces + 4 * value_pieces
    four, half = bits == 4, f32(1 << (bits - 1))
    column_words, score_words, fragments = columns * 2, columns * 4, columns * steps * 4
    all_score_words, parts_of_all = tiles * score_words, 2 * tiles
    scale = f32(head_dim**-0.5 * LOG2_E)
    lower = f32(head_dim**-0.5 * LOG2_E / 16)  # of numbers whose codes lie four bits higher
    unit = f32(2.0**24)
    odd_unit = f32(2.0**20 if four else 2.0**24)  # of the odd dims of V
    ones_low, ones_high = u32(ONE_F16), u32(SIXTEEN_F16 if four else ONE_F16)
    zero, one, never, slack = f32(0.0), f32(1.0), f32(nothing), f32(SLACK)
    low, high, pack, mma = ptx.LOW[dtype], ptx.HIGH[dtype], ptx.pack_f16, ptx.mma_f16
    permute, lane_steps = ptx.permute_bytes, (4, 8, 16)
    place = code_place(head_dim, bits)

    @cuda.jit(device=True, inline="always")
    def load_words(words, first, size, at):  # type: ignore[no-untyped-def]
        if size == 16:
            words[first], words[first + 1], words[first + 2], words[first + 3] = ptx.load_shared_128(at)
        elif size == 8:
            words[first], words[first + 1] = ptx.load_shared_64(at)
        else:
            words[first] = ptx.load_shared_32(at)

    @cuda.jit(device=True, inline="always")
    def place_lanes(places, lane):  # type: ignore[no-untyped-def]
        """Offsets in a tile of everything this lane reads: pieces of K of rows g and g + 8, pieces of V of its four rows."""
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        for i in range(key_pieces):
            byte = u32(u32(4 * key_piece * i) + t * u32(key_piece))
            places[2 * i], places[2 * i + 1] = place(g, byte), place(u32(g + u32(8)), byte)
        for i in range(value_pieces):
            byte = u32(g * u32(value_lane) + u32(value_piece * i))
            for j in range(4):
                row_of = u32(t * u32(2) + u32(j % 2 + j // 2 * 8))
                places[2 * key_pieces + 4 * i + j] = u32(u32(value_at) + place(row_of, byte))

    @cuda.jit(device=True, inline="always")
    def load_query(query, asked, q, row, q_stride, first_head, some_heads, lane):  # type: ignore[no-untyped-def]
        """B fragments of the set's heads times the softmax's factor, and their sums; heads that do not exist are zeros."""
        t = u32(lane & u32(3))
        for n in range(columns):
            head = u32(u32(lane >> u32(2)) + u32(8 * n))
            inside = head < some_heads
            head = u32(first_head + head) if inside else first_head
            source = u64(q + u64(u32(row)) * u64(u32(q_stride)) * u64(2) + u64(u32(head * u32(2 * head_dim))))
            d0, d1, d2, d3 = zero, zero, zero, zero
            for w in range(key_pieces * key_words):
                byte = u32(u32(4 * key_piece * (w // key_words) + 4 * (w % key_words)) + t * u32(key_piece))
                if four:
                    a0, a1, a2, a3 = ptx.load_128(u64(source + u64(u32(byte * u32(4)))))
                    k = (n * steps + 2 * w) * 2
                    query[k] = pack(low(a0) * scale, low(a2) * scale)
                    query[k + 1] = pack(high(a0) * lower, high(a2) * lower)
                    query[k + 2] = pack(low(a1) * scale, low(a3) * scale)
                    query[k + 3] = pack(high(a1) * lower, high(a3) * lower)
                else:
                    a0, a1 = ptx.load_64(u64(source + u64(u32(byte * u32(2)))))
                    k = (n * steps + w) * 2
                    query[k] = pack(low(a0) * scale, high(a0) * scale)
                    query[k + 1] = pack(low(a1) * scale, high(a1) * scale)
            for k in range(steps):
                w = (n * steps + k) * 2
                query[w] = query[w] if inside else u32(0)
                query[w + 1] = query[w + 1] if inside else u32(0)
                d0, d1, d2, d3 = mma(ones_low, ones_low, ones_high, ones_high, query[w], query[w + 1], d0, d1, d2, d3)
            asked[2 * n], asked[2 * n + 1] = d0, d1

    @cuda.jit(device=True, inline="always")
    def score(scores, m, query, step, a0, a1, a2, a3):  # type: ignore[no-untyped-def]
        for n in range(columns):
            i, w = m * score_words + 4 * n, (n * steps + step) * 2
            scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = mma(
                a0, a1, a2, a3, query[w], query[w + 1], scores[i], scores[i + 1], scores[i + 2], scores[i + 3]
            )

    @cuda.jit(device=True, inline="always")
    def answer(sums, weights, m, step, a0, a1, a2, a3):  # type: ignore[no-untyped-def]
        for n in range(columns):
            i, w = (n * steps + step) * 4, m * column_words + 2 * n
            sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = mma(
                a0, a1, a2, a3, weights[w], weights[w + 1], sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
            )

    @cuda.jit(device=True, inline="always")
    def all_scores(slot, query, scores, words, places):  # type: ignore[no-untyped-def]
        """Codes of K times q."""
        for i in range(all_score_words):
            scores[i] = zero
        for p in range(key_pieces):
            for m in range(tiles):
                load_words(words, 0, key_piece, u32(slot + places[2 * p] + u32(m * tile_codes)))
                load_words(words, 4, key_piece, u32(slot + places[2 * p + 1] + u32(m * tile_codes)))
                for w in range(key_words):
                    near, far = words[w], words[4 + w]
                    if four:
                        step = 2 * (p * key_words + w)
                        score(
                            scores, m, query, step, u32(near & u32(0x000F000F)), u32(far & u32(0x000F000F)),
                            u32(near & u32(0x00F000F0)), u32(far & u32(0x00F000F0)),
                        )  # fmt: skip
                        near, far = u32(near >> u32(8)), u32(far >> u32(8))
                        score(
                            scores, m, query, step + 1, u32(near & u32(0x000F000F)), u32(far & u32(0x000F000F)),
                            u32(near & u32(0x00F000F0)), u32(far & u32(0x00F000F0)),
                        )  # fmt: skip
                    else:
                        score(
                            scores, m, query, p * key_words + w, permute(near, u32(0), u32(0x4140)), permute(far, u32(0), u32(0x4140)),
                            permute(near, u32(0), u32(0x4342)), permute(far, u32(0), u32(0x4342)),
                        )  # fmt: skip

    @cuda.jit(device=True, inline="always")
    def all_answers(slot, weights, sums, words, places):  # type: ignore[no-untyped-def]
        """Codes of V times p'."""
        for p in range(value_pieces):
            for m in range(tiles):
                for j in range(4):
                    load_words(words, 4 * j, value_piece, u32(slot + places[2 * key_pieces + 4 * p + j] + u32(m * tile_codes)))
                for w in range(value_words):
                    for side in range(2):
                        order = u32(0x7632) if side else u32(0x5410)
                        near, far = permute(words[w], words[4 + w], order), permute(words[8 + w], words[12 + w], order)
                        if four:
                            step = (p * value_words + w) * 4 + 2 * side
                            answer(
                                sums, weights, m, step, u32(near & u32(0x000F000F)), u32(near & u32(0x00F000F0)),
                                u32(far & u32(0x000F000F)), u32(far & u32(0x00F000F0)),
                            )  # fmt: skip
                            near, far = u32(near >> u32(8)), u32(far >> u32(8))
                            answer(
                                sums, weights, m, step + 1, u32(near & u32(0x000F000F)), u32(near & u32(0x00F000F0)),
                                u32(far & u32(0x000F000F)), u32(far & u32(0x00F000F0)),
                            )  # fmt: skip
                        else:
                            answer(
                                sums, weights, m, (p * value_words + w) * 2 + side, permute(near, u32(0), u32(0x4240)),
                                permute(near, u32(0), u32(0x4341)), permute(far, u32(0), u32(0x4240)), permute(far, u32(0), u32(0x4341)),
                            )  # fmt: skip

    @cuda.jit(device=True, inline="always")
    def add_tile(slot, query, asked, sums, top, under, shift, scores, weights, keep, position, low, stop, places, lane):  # type: ignore[no-untyped-def]
        """One online-softmax step over the positions in `slot`; `position` is that of this lane's first score."""
        words, most = cuda.local.array(16, u32), cuda.local.array(column_words, f32)
        parts, zeros = cuda.local.array(parts_of_all, f32), cuda.local.array(parts_of_all, f32)  # 1 / vs and z of this lane's positions
        all_scores(slot, query, scores, words, places)

        for i in range(column_words):
            most[i] = never
        for m in range(tiles):
            # scale and zero of the two positions that this lane has scores of; outside, nothing that was never written is used
            pairs = u32(slot + u32(tile_pairs_at + 4 * TILE * m) + lane // u32(4) * u32(4))
            at = i32(position + i32(TILE * m))
            here = low <= at and at < stop
            there = low <= i32(at + i32(8)) and i32(at + i32(8)) < stop
            pair_0, pair_1 = ptx.load_shared_32(pairs), ptx.load_shared_32(u32(pairs + u32(32)))
            scale_0, scale_1 = ptx.low_bf16(pair_0), ptx.low_bf16(pair_1)
            add_0, add_1 = ptx.fma(-half, scale_0, ptx.high_bf16(pair_0)), ptx.fma(-half, scale_1, ptx.high_bf16(pair_1))
            scale_0, scale_1 = scale_0 * unit, scale_1 * unit
            pair_0, pair_1 = ptx.load_shared_32(u32(pairs + u32(value_pairs))), ptx.load_shared_32(u32(pairs + u32(value_pairs + 32)))
            size_0 = ptx.low_bf16(pair_0) if here else one
            size_1 = ptx.low_bf16(pair_1) if there else one
            zero_0 = ptx.high_bf16(pair_0) if here else zero
            zero_1 = ptx.high_bf16(pair_1) if there else zero
            log_0, log_1, part_0, part_1 = ptx.log2(size_0), ptx.log2(size_1), ptx.reciprocal(size_0), ptx.reciprocal(size_1)
            parts[2 * m], parts[2 * m + 1] = part_0, part_1
            zeros[2 * m], zeros[2 * m + 1] = ptx.fma(zero_0, part_0, -half), ptx.fma(zero_1, part_1, -half)
            for i in range(column_words):
                w = m * score_words + i // 2 * 4 + i % 2
                scores[w] = ptx.fma(scores[w], scale_0, ptx.fma(asked[i], add_0, log_0)) if here else never
                scores[w + 2] = ptx.fma(scores[w + 2], scale_1, ptx.fma(asked[i], add_1, log_1)) if there else never
                most[i] = ptx.maximum(most[i], ptx.maximum(scores[w], scores[w + 2]))

        above = u32(0)
        for i in range(column_words):
            above = u32(1) if most[i] > top[i] + slack else above
        if ptx.any_lane(above) == u32(1):
            for i in range(column_words):
                found = most[i]
                for distance in lane_steps:
                    found = ptx.maximum(found, ptx.shuffle_xor_f32(found, u32(distance)))
                found = ptx.maximum(found, top[i])
                keep[i] = ptx.exp2(top[i] - found)
                top[i], under[i], shift[i] = found, under[i] * keep[i], shift[i] * keep[i]
            for i in range(fragments):
                sums[i] = sums[i] * keep[i // (4 * steps) * 2 + i % 2]

        for m in range(tiles):
            for i in range(column_words):
                w = m * score_words + i // 2 * 4 + i % 2
                near, far = ptx.exp2(scores[w] - top[i]), ptx.exp2(scores[w + 2] - top[i])
                under[i] = ptx.fma(near, parts[2 * m], ptx.fma(far, parts[2 * m + 1], under[i]))
                shift[i] = ptx.fma(near, zeros[2 * m], ptx.fma(far, zeros[2 * m + 1], shift[i]))
                scores[w], scores[w + 2] = near, far
            for n in range(columns):
                w, i = m * column_words + 2 * n, m * score_words + 4 * n
                weights[w] = ptx.move_matrix_transposed(pack(scores[i], scores[i + 1]))
                weights[w + 1] = ptx.move_matrix_transposed(pack(scores[i + 2], scores[i + 3]))
        all_answers(slot, weights, sums, words, places)

    @cuda.jit(device=True, inline="always")
    def leave(slot, sums, top, under, shift, lane):  # type: ignore[no-untyped-def]
        """Write the warp's sums of a section: [set_heads, head_dim + 4 floats], then pairs."""
        for n in range(columns):
            for j in range(2):
                total_under, total_shift = under[2 * n + j], shift[2 * n + j]
                for distance in lane_steps:
                    total_under = total_under + ptx.shuffle_xor_f32(total_under, u32(distance))
                    total_shift = total_shift + ptx.shuffle_xor_f32(total_shift, u32(distance))
                head = u32(u32(lane & u32(3)) * u32(2) + u32(8 * n + j))
                if head < u32(set_heads):
                    to = u32(slot + head * u32(left_pitch) + u32(lane >> u32(2)) * u32(head_dim // 2))
                    for k in range(steps):
                        i = (n * steps + k) * 4 + j
                        even, odd = ptx.fma(sums[i], unit, total_shift), ptx.fma(sums[i + 2], odd_unit, total_shift)
                        ptx.store_shared_64(u32(to + u32(8 * k)), ptx.bits_of_float(even), ptx.bits_of_float(odd))
                    if lane < u32(4):
                        to = u32(slot + u32(pairs_at) + head * u32(8))
                        ptx.store_shared_64(to, ptx.bits_of_float(top[2 * n + j]), ptx.bits_of_float(total_under))

    return TileMath(place_lanes, load_query, add_tile, leave, num_places)
