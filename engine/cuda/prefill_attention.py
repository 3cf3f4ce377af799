"""Attention of prompt parts over the paged pool: `attend` over `gather_kv` of `engine/reference.py`, rows of many tokens.

Layout (16 bits an element)

    q, out [T, heads, head_dim] with a stride between tokens        pool of a layer [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim]
    tables int32 [slots + 1, blocks_per_slot]                       tiles int32 [n, 4]: slot, first token in q, tokens, its position

A tile is up to `query_rows // group` consecutive tokens of one row with all the `group` query heads that share a KV head:
query row i is token i // group, head i % group. So parts of few tokens fill tensor-core rows too, and K and V are read once
for all heads that share them. The prefix and the part itself are both in the pool when this runs.

    S [16 query rows, 8 positions] += Q [16, 16 dims] x K^T [16 dims, 8]         A: ldmatrix from shared, B: ldmatrix
    O [16 query rows, 8 dims]      += P [16, 16 positions] x V [16 positions, 8]  A: S repacked in registers, B: ldmatrix.trans

Work split: one thread block = one tile x one KV head, grid = tiles * kv_heads, tiles that see most positions first
(`query_tiles`). A warp has `tiles` times 16 query rows; all warps go through the same stages of `keys` positions of K and V,
filled by cp.async, with one barrier a stage (FlashAttention-2, Dao 2023). Stages start at multiples of `keys` and what is masked
changes no bit of a sum, so a token's answer is the same however its prompt is cut into parts and tiles, and whatever is beside it.

    shared memory    Q [query_rows, pitch], then per stage keys / 16 tiles of `engine/cuda/attention_tiles.py`

Of a quantized pool the stages hold codes; each is dequantized by all warps into one stage of 16 bits, after a second barrier read
by the same code. So an element costs about four instructions a thread block, however many query rows read it.

Measured on an H200 (32 heads over 8 of 128; 57 launch shapes, bench/LOG.md): 299 to 355 TFLOP/s, 39 to 47 % of a large product, level with
torch's FlashAttention; 128 keys a stage spill and are nine times slower. cuDNN reaches 449 to 613 (`engine/cuda/whole_prompts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from engine.cache.layout import KVLayout
from engine.cuda import ptx
from engine.cuda.attention_tiles import TILE, code_place, code_tile_bytes, pitch, quantized, sixteen_bits, tile_bytes
from engine.cuda.kv_quant import fragment_rotator
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.pool import check_pool
from engine.cuda.target import cuda, pointer, types
from engine.cuda.tuning_attention import PromptShape, prompt_shape

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
INTS, HALVES = pointer(i32), pointer(types.uint16)
TILE_INTS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
UNSEEN, NOTHING = -1.0e30, -1.0e25  # a masked score; a maximum of none: scaled or not, UNSEEN is far below it
LOG2_E = math.log2(math.e)


def prefill(
    kv_heads: int, group: int, head_dim: int, block_seq_len: int, dtype: str, window: int, warps: int, tiles: int, keys: int,
    stages: int, blocks: int, bits: int = 0,
) -> Kernel:  # fmt: skip
    """(q, elements between tokens, pool of a layer, tables, entries of a slot, tiles, out, elements between its tokens); bits: of a
    quantized pool, else 0."""
    if keys % TILE or stages < 2:
        raise ValueError(f"{keys} positions in {stages} stages: a multiple of {TILE} and at least 2 are needed")
    threads, warp_rows = 32 * warps, TILE * tiles
    query_rows = warps * warp_rows
    row_pitch, value_at, slot_bytes = pitch(head_dim), TILE * pitch(head_dim), tile_bytes(head_dim)
    steps, key_tiles = head_dim // 16, keys // TILE
    copied_bytes = code_tile_bytes(head_dim, bits) if bits else slot_bytes  # of a tile
    stage_bytes = key_tiles * copied_bytes
    query_bytes = query_rows * row_pitch
    wide_at = query_bytes + stages * stage_bytes  # where a stage of codes is dequantized
    wide_bytes = key_tiles * slot_bytes if bits else 0
    pieces = head_dim // 8  # 16-byte pieces of a row
    query_copies = warp_rows * pieces // 32
    turns = -(-key_tiles // warps)  # key tiles that a warp copies
    pool_format = quantized(kv_heads, head_dim, block_seq_len, bits) if bits else sixteen_bits(kv_heads, head_dim, block_seq_len)
    widen = stage_widener(head_dim, bits, dtype, key_tiles, threads) if bits else None
    rotate_fragments = fragment_rotator(head_dim, tiles) if bits == 4 else None
    find_tile, copy_tile = pool_format.find, pool_format.copy
    mma, pack, wait = ptx.MMA[dtype], ptx.PACK[dtype], ptx.COPY_WAIT[stages - 2]
    scale = f32(head_dim**-0.5 * LOG2_E)
    nothing, unseen, zero, one = f32(NOTHING), f32(UNSEEN), f32(0.0), f32(1.0)
    sum_count, score_count, row_count, fragment_count = tiles * steps * 8, tiles * key_tiles * 8, tiles * 2, tiles * 4
    pair_steps = (1, 2)

    def kernel(q, q_stride, kv, tables, table_stride, work, out, out_stride):  # type: ignore[no-untyped-def]
        ptx.after_previous()
        shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(0, u32, alignment=16)))
        sums = cuda.local.array(sum_count, f32)
        scores = cuda.local.array(score_count, f32)
        top = cuda.local.array(row_count, f32)
        under = cuda.local.array(row_count, f32)
        places = cuda.local.array(row_count, i32)
        fragment = cuda.local.array(fragment_count, u32)
        found = cuda.local.array(turns, u32)

        thread = u32(cuda.threadIdx.x)
        lane, warp = u32(thread & u32(31)), u32(thread >> u32(5))
        block = u32(cuda.blockIdx.x)
        tile = u32(block // u32(kv_heads))
        kv_head = u32(block - tile * u32(kv_heads))
        slot, t1, t2, t3 = ptx.load_128(u64(ptx.address(work) + u64(tile) * u64(4 * TILE_INTS)))
        first_token, count, first_position = t1, i32(t2), i32(t3)
        kv_address = ptx.address(kv)
        table = u64(ptx.address(tables) + u64(slot) * u64(u32(table_stride)) * u64(4))
        stop = i32(first_position + count)
        low = i32(0)
        if window > 0:
            low = i32(max(i32(0), i32(first_position - i32(window - 1))))
        start = i32(u32(low) // u32(keys) * u32(keys))
        own_row = u32(warp * u32(warp_rows))

        # the warp's query rows
        for i in range(query_copies):
            piece = u32(lane + u32(32 * i))
            row = u32(piece // u32(pieces))
            part = u32(piece - row * u32(pieces))
            row = u32(own_row + row)
            token = u32(row // u32(group))
            head = u32(kv_head * u32(group) + row - token * u32(group))
            inside = i32(token) < count
            size = u32(16) if inside else u32(0)
            token = u32(first_token + token) if inside else first_token
            source = u64(ptx.address(q) + u64(token) * u64(u32(q_stride)) * u64(2) + u64(u32(head * u32(2 * head_dim) + part * u32(16))))
            ptx.copy_async_16_or_zero(u32(shared + row * u32(row_pitch) + part * u32(16)), source, size)

        # stages - 1 stages are under way before the first is used
        p_at = start
        p_slot = u32(shared + u32(query_bytes))
        ring_end = u32(p_slot + u32(stages * stage_bytes))
        for i in range(turns):
            found[i] = find_tile(table, i32(p_at + i32(u32(warp + u32(warps * i)) * u32(TILE))), stop)
        ahead = i32(stages - 1)
        c_at, c_slot = start, p_slot
        for i in range(tiles):
            row = u32(own_row + u32(lane >> u32(2)) + u32(16 * i))
            places[2 * i] = i32(first_position + i32(row // u32(group)))
            places[2 * i + 1] = i32(first_position + i32(u32(row + u32(8)) // u32(group)))
        for i in range(row_count):
            top[i], under[i] = nothing, zero
        for i in range(sum_count):
            sums[i] = zero
        lane_8, bit_3, bit_4 = u32(lane & u32(7)), u32(u32(lane >> u32(3)) & u32(1)), u32(lane >> u32(4))
        query_at = u32(shared + u32(own_row + lane_8 + bit_3 * u32(8)) * u32(row_pitch) + bit_4 * u32(16))
        key_at = u32(u32(lane_8 + bit_4 * u32(8)) * u32(row_pitch) + bit_3 * u32(16))
        data_at = u32(u32(lane_8 + bit_3 * u32(8)) * u32(row_pitch) + bit_4 * u32(16) + u32(value_at))

        while c_at < stop:
            if ahead == i32(0):
                wait()
                cuda.syncthreads()  # the stage is there for all, and the one before it is no longer read
            if p_at < stop:
                for i in range(turns):
                    of = u32(warp + u32(warps * i))
                    if of < u32(key_tiles):
                        position = i32(p_at + i32(of * u32(TILE)))
                        copy_tile(kv_address, table, found[i], kv_head, position, low, stop, u32(p_slot + of * u32(copied_bytes)), lane)
                        found[i] = find_tile(table, i32(position + i32(keys)), stop)
                p_at = i32(p_at + i32(keys))
                p_slot = u32(p_slot + u32(stage_bytes))
                if p_slot == ring_end:
                    p_slot = u32(shared + u32(query_bytes))
            ptx.copy_commit()
            if ahead > i32(0):
                ahead = i32(ahead - i32(1))
                continue

            k_slot = c_slot
            if bits > 0:
                k_slot = u32(shared + u32(wide_at))
                widen(c_slot, k_slot, c_at, low, stop, thread)
                cuda.syncthreads()
            for i in range(score_count):
                scores[i] = zero
            for k in range(steps):
                for m in range(tiles):
                    fragment[4 * m], fragment[4 * m + 1], fragment[4 * m + 2], fragment[4 * m + 3] = ptx.load_matrix_4(
                        u32(query_at + u32(16 * m * row_pitch + 32 * k))
                    )
                for n in range(key_tiles):
                    b0, b1, b2, b3 = ptx.load_matrix_4(u32(k_slot + key_at + u32(n * slot_bytes + 32 * k)))
                    for m in range(tiles):
                        s = (m * key_tiles + n) * 8
                        scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = mma(
                            fragment[4 * m], fragment[4 * m + 1], fragment[4 * m + 2], fragment[4 * m + 3], b0, b1,
                            scores[s], scores[s + 1], scores[s + 2], scores[s + 3],
                        )  # fmt: skip
                        scores[s + 4], scores[s + 5], scores[s + 6], scores[s + 7] = mma(
                            fragment[4 * m], fragment[4 * m + 1], fragment[4 * m + 2], fragment[4 * m + 3], b2, b3,
                            scores[s + 4], scores[s + 5], scores[s + 6], scores[s + 7],
                        )  # fmt: skip

            # only stages at the edges of what is visible are masked
            edge = i32(c_at + i32(keys - 1)) > first_position
            if window > 0:
                edge = edge or c_at <= i32(stop - i32(1 + window))
            if edge:
                column = i32(c_at + i32(u32(lane & u32(3)) * u32(2)))
                for m in range(tiles):
                    for n in range(2 * key_tiles):
                        for j in range(4):
                            key = i32(column + i32(8 * n + j % 2))
                            place = places[2 * m + j // 2]
                            seen = key <= place
                            if window > 0:
                                seen = seen and key > i32(place - i32(window))
                            s = (m * key_tiles * 2 + n) * 4 + j
                            scores[s] = scores[s] if seen else unseen

            for m in range(tiles):
                for h in range(2):
                    most = scores[m * key_tiles * 8 + 2 * h]
                    for n in range(2 * key_tiles):
                        s = (m * key_tiles * 2 + n) * 4 + 2 * h
                        most = ptx.maximum(most, ptx.maximum(scores[s], scores[s + 1]))
                    for distance in pair_steps:
                        most = ptx.maximum(most, ptx.shuffle_xor_f32(most, u32(distance)))
                    most = ptx.maximum(most * scale, top[2 * m + h])
                    keep = ptx.exp2(top[2 * m + h] - most)
                    top[2 * m + h] = most
                    total = zero
                    for n in range(2 * key_tiles):
                        s = (m * key_tiles * 2 + n) * 4 + 2 * h
                        scores[s] = ptx.exp2(ptx.fma(scores[s], scale, -most))
                        scores[s + 1] = ptx.exp2(ptx.fma(scores[s + 1], scale, -most))
                        total = total + (scores[s] + scores[s + 1])
                    under[2 * m + h] = ptx.fma(under[2 * m + h], keep, total)
                    for d in range(2 * steps):
                        o = (m * steps * 2 + d) * 4 + 2 * h
                        sums[o] = sums[o] * keep
                        sums[o + 1] = sums[o + 1] * keep

            for n in range(key_tiles):
                for m in range(tiles):
                    s = (m * key_tiles + n) * 8
                    fragment[4 * m], fragment[4 * m + 1] = pack(scores[s], scores[s + 1]), pack(scores[s + 2], scores[s + 3])
                    fragment[4 * m + 2], fragment[4 * m + 3] = pack(scores[s + 4], scores[s + 5]), pack(scores[s + 6], scores[s + 7])
                for d in range(steps):
                    b0, b1, b2, b3 = ptx.load_matrix_4_transposed(u32(k_slot + data_at + u32(n * slot_bytes + 32 * d)))
                    for m in range(tiles):
                        o = (m * steps + d) * 8
                        sums[o], sums[o + 1], sums[o + 2], sums[o + 3] = mma(
                            fragment[4 * m], fragment[4 * m + 1], fragment[4 * m + 2], fragment[4 * m + 3], b0, b1,
                            sums[o], sums[o + 1], sums[o + 2], sums[o + 3],
                        )  # fmt: skip
                        sums[o + 4], sums[o + 5], sums[o + 6], sums[o + 7] = mma(
                            fragment[4 * m], fragment[4 * m + 1], fragment[4 * m + 2], fragment[4 * m + 3], b2, b3,
                            sums[o + 4], sums[o + 5], sums[o + 6], sums[o + 7],
                        )  # fmt: skip
            c_at = i32(c_at + i32(keys))
            c_slot = u32(c_slot + u32(stage_bytes))
            if c_slot == ring_end:
                c_slot = u32(shared + u32(query_bytes))

        # the answer, through the warp's own rows of Q so that it leaves in 16-byte pieces
        ptx.some_barrier(u32(warp + u32(1)), u32(32))
        if bits == 4:
            rotate_fragments(sums, lane)
        for m in range(tiles):
            for h in range(2):
                total = under[2 * m + h]
                for distance in pair_steps:
                    total = total + ptx.shuffle_xor_f32(total, u32(distance))
                inverse = one / total
                to = u32(shared + u32(own_row + u32(lane >> u32(2)) + u32(16 * m + 8 * h)) * u32(row_pitch) + u32(lane & u32(3)) * u32(4))
                for d in range(2 * steps):
                    o = (m * steps * 2 + d) * 4 + 2 * h
                    ptx.store_shared_32(u32(to + u32(16 * d)), pack(sums[o] * inverse, sums[o + 1] * inverse))
        ptx.some_barrier(u32(warp + u32(1)), u32(32))
        for i in range(query_copies):
            piece = u32(lane + u32(32 * i))
            row = u32(piece // u32(pieces))
            part = u32(piece - row * u32(pieces))
            row = u32(own_row + row)
            token = u32(row // u32(group))
            head = u32(kv_head * u32(group) + row - token * u32(group))
            if i32(token) < count:
                a0, a1, a2, a3 = ptx.load_shared_128(u32(shared + row * u32(row_pitch) + part * u32(16)))
                to = u64(
                    ptx.address(out)
                    + u64(u32(first_token + token)) * u64(u32(out_stride)) * u64(2)
                    + u64(u32(head * u32(2 * head_dim) + part * u32(16)))
                )
                ptx.store_128(to, a0, a1, a2, a3)

    arguments = (HALVES, i32, HALVES, INTS, i32, INTS, HALVES, i32)
    return Kernel(kernel, arguments, threads, wide_at + wide_bytes, blocks, early=True)


def stage_widener(head_dim: int, bits: int, dtype: str, key_tiles: int, threads: int) -> Any:
    """widen(codes, wide, position, low, stop, thread): tiles of codes, the first of them at `position`, to tiles of 16 bits an element,
    by all threads. Positions outside [low, stop) become zeros."""
    row = head_dim * bits // 8
    row_pieces, tile_pieces = row // 16, 2 * TILE * row // 16
    pieces = key_tiles * tile_pieces
    turns, ragged = -(-pieces // threads), pieces % threads != 0
    from_tile, to_tile, pairs_at = code_tile_bytes(head_dim, bits), tile_bytes(head_dim), 2 * TILE * row
    from_values, to_values, row_pitch = TILE * row, TILE * pitch(head_dim), pitch(head_dim)
    four, half, offset, zero = bits == 4, f32(1 << (bits - 1)), f32(2.0**23), f32(0.0)
    pack, place, permute = ptx.PACK[dtype], code_place(head_dim, bits), ptx.permute_bytes

    @cuda.jit(device=True, inline="always")
    def two(codes, first, second, scale, add):  # type: ignore[no-untyped-def]
        """Bytes `first` and `second` (selectors) of `codes` as two numbers."""
        a = ptx.float_of_bits(permute(codes, u32(0x4B000000), first)) - offset  # 2^23 + code, exactly
        b = ptx.float_of_bits(permute(codes, u32(0x4B000000), second)) - offset
        return pack(ptx.fma(a, scale, add), ptx.fma(b, scale, add))

    @cuda.jit(device=True, inline="always")
    def four_bytes(codes, scale, add):  # type: ignore[no-untyped-def]
        return two(codes, u32(0x7440), u32(0x7441), scale, add), two(codes, u32(0x7442), u32(0x7443), scale, add)

    @cuda.jit(device=True, inline="always")
    def widen(codes, wide, position, low, stop, thread):  # type: ignore[no-untyped-def]
        for i in range(turns):
            piece = u32(thread + u32(threads * i))
            if not ragged or piece < u32(pieces):
                tile = u32(piece // u32(tile_pieces))
                piece = u32(piece - tile * u32(tile_pieces))
                of_v = u32(piece // u32(TILE * row_pieces))
                piece = u32(piece - of_v * u32(TILE * row_pieces))
                line = u32(piece // u32(row_pieces))
                part = u32(piece - line * u32(row_pieces))
                at = i32(position + i32(tile * u32(TILE) + line))
                source = u32(codes + tile * u32(from_tile))
                target = u32(wide + tile * u32(to_tile) + of_v * u32(to_values) + line * u32(row_pitch) + part * u32(256 // bits))
                w0, w1, w2, w3, scale, add = u32(0), u32(0), u32(0), u32(0), zero, zero
                if low <= at and at < stop:
                    w0, w1, w2, w3 = ptx.load_shared_128(u32(source + of_v * u32(from_values) + place(line, u32(part * u32(16)))))
                    pair = ptx.load_shared_32(u32(source + u32(pairs_at) + of_v * u32(4 * TILE) + line * u32(4)))
                    scale = ptx.low_bf16(pair)
                    add = ptx.fma(-half, scale, ptx.high_bf16(pair))
                if four:
                    for j in range(4):
                        even, odd = u32(w0 & u32(0x0F0F0F0F)), u32(u32(w0 >> u32(4)) & u32(0x0F0F0F0F))
                        a0, a1 = four_bytes(permute(even, odd, u32(0x5140)), scale, add)
                        a2, a3 = four_bytes(permute(even, odd, u32(0x7362)), scale, add)
                        ptx.store_shared_128(u32(target + u32(16 * j)), a0, a1, a2, a3)
                        w0, w1, w2 = w1, w2, w3
                else:
                    a0, a1 = four_bytes(w0, scale, add)
                    a2, a3 = four_bytes(w1, scale, add)
                    ptx.store_shared_128(target, a0, a1, a2, a3)
                    a0, a1 = four_bytes(w2, scale, add)
                    a2, a3 = four_bytes(w3, scale, add)
                    ptx.store_shared_128(u32(target + u32(16)), a0, a1, a2, a3)

    return widen


class PrefillAttention:
    """Attention of rows of several query tokens, causal, whose positions are all in the pool (`engine.reference.attend`).

    heads, kv_heads: of this rank. head_dim: a multiple of 16, to 256. window: positions a token sees, 0 for all. `shape` overrides
    the tuning table. bits: 8 or 4 of a quantized pool (head_dim a multiple of 32 or 64), 0: it has the computing dtype. `tiles` makes
    on the host what a call works through; the caller carries it to the card with the step.
    """

    def __init__(
        self,
        library: Library,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_seq_len: int,
        dtype: str,
        multiprocessors: int,
        cc: tuple[int, int],
        *,
        window: int = 0,
        shape: PromptShape | None = None,
        bits: int = 0,
    ) -> None:
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; a multiple of 16 from 16 to 256 is needed")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
        if block_seq_len < 1 or window < 0:
            raise ValueError(f"block_seq_len {block_seq_len} and window {window}: at least 1 and 0 are needed")
        shape = shape or prompt_shape(cc, head_dim, bits)
        self._library, self._dtype, self._window = library, DTYPES[dtype], window
        self._layout = KVLayout(1, kv_heads, head_dim, block_seq_len, dtype, bits)
        self._kv_heads, self._group, self._width = kv_heads, heads // kv_heads, heads * head_dim
        self._multiprocessors = multiprocessors
        # query rows a thread block -> variant; the small one where the large one leaves multiprocessors idle
        self._variants = {}
        for tiles in sorted({1, shape.tiles}):
            constants = (
                kv_heads, self._group, head_dim, block_seq_len, dtype, window, shape.warps, tiles, shape.keys, shape.stages, shape.blocks,
                bits,
            )  # fmt: skip
            rows = TILE * tiles * shape.warps
            if rows >= self._group or tiles == shape.tiles:
                self._variants[max(1, rows // self._group)] = Variant(__name__, "prefill", constants)
        if max(self._variants) * self._group > TILE * shape.tiles * shape.warps:
            raise ValueError(f"{self._group} query heads share a KV head; at most {TILE * shape.tiles * shape.warps} can")
        self.variants = tuple(self._variants.values())

    def most_tiles(self, tokens: int, rows: int) -> int:
        """No step of so many prompt tokens in so many rows has more tiles."""
        return tokens // min(self._variants) + rows

    def tiles(self, parts: Iterable[tuple[int, int, int, int]]) -> np.ndarray:
        """int32 [n, 4] of a step's prompt parts (batch slot, first token in q, tokens, position of the first), longest work first."""
        parts = list(parts)
        tokens = max(self._variants)
        if sum(-(-count // tokens) for _, _, count, _ in parts) * self._kv_heads < self._multiprocessors:
            tokens = min(self._variants)
        return query_tiles(parts, tokens, self._window)

    def __call__(
        self, q: torch.Tensor, pool: torch.Tensor, tables: torch.Tensor, tiles: torch.Tensor, most: int, out: torch.Tensor
    ) -> None:
        """out[t] = attention of the query in the first heads * head_dim elements of q[t], for the tokens of `tiles`.

        q, out [T, >= heads * head_dim], pool one layer of `engine/cache/layout.py` with num_blocks + 1 blocks, tables int32
        [slots + 1, blocks_per_slot], tiles int32 [n, 4] from `tiles`, `most`: tokens of the largest of them (known on the host).
        """
        check_pool(pool, self._layout)
        for name, x in (("q", q), ("out", out)):
            if x.dtype != self._dtype or x.stride(1) != 1 or x.shape[1] < self._width or x.stride(0) % 8 or x.data_ptr() % 16:
                raise ValueError(
                    f"{name} is {x.dtype} {tuple(x.shape)} {x.stride()}; rows of {self._dtype} on 16-byte boundaries are needed"
                )
        fitting = [tokens for tokens in self._variants if tokens >= most]
        if not fitting or tiles.shape[1:] != (TILE_INTS,) or not tiles.is_contiguous() or tiles.data_ptr() % 16 or tables.stride(1) != 1:
            raise ValueError(f"tiles are {tuple(tiles.shape)} of up to {most} tokens; [n, 4] and {max(self._variants)} are possible")
        if len(tiles):
            self._library[self._variants[min(fitting)]](
                len(tiles) * self._kv_heads, q, q.stride(0), pool, tables, tables.stride(0), tiles, out, out.stride(0)
            )


def query_tiles(parts: Iterable[tuple[int, int, int, int]], tokens: int, window: int) -> np.ndarray:
    """Cut parts (slot, first token, count, position) into int32 [n, 4] of up to `tokens` tokens, those that see most first."""
    cut = []
    for slot, first, count, position in parts:
        for at in range(0, count, tokens):
            size = min(tokens, count - at)
            seen = position + at + size if not window else min(position + at + size, window + size)
            cut.append((-seen, slot, first + at, size, position + at))
    cut.sort()
    return np.array([tile[1:] for tile in cut], np.int32).reshape(-1, TILE_INTS)
