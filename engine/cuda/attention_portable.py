"""Attention in plain arithmetic for cards without the tensor-core instructions we use (compute capability 7.0, 7.5): `attend`
over `gather_kv` of `engine/reference.py`, decode rows and prompt parts alike. Also runs in Numba's CUDA simulator.

Layout (float16; the pool of a layer may be a quantized one, bytes as `engine/cache/layout.py` draws them)

    q, out [T, heads, head_dim] with a stride between tokens        pool of a layer [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim]
    tables int32 [slots + 1, blocks_per_slot]                       token_slots, positions int32 [T]

Work split: one thread block = one token x one head set, up to 8 query heads that share a KV head; grid = T * head sets. Positions
go by in runs of `THREADS`: thread i scores position i of the run for all heads, then adds up dimensions i, i + THREADS of the
answer over the run's values. Nothing of `engine/cuda/ptx.py`, so no fragments and no shuffles: maxima go through shared memory.

Versions tried: none was measured.
"""

from __future__ import annotations

import math

import torch

from engine import kv_quant
from engine.cache.layout import KVLayout
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.pool import check_pool
from engine.cuda.target import cuda, pointer, types

THREADS = 128
MOST_HEADS = 8  # of a head set: their accumulators are registers
UNSEEN = -1.0e30
i32, f32, f16, i64 = types.int32, types.float32, types.float16, types.int64
INTS, HALVES, BYTES = pointer(i32), pointer(f16), pointer(types.uint8)


def attend(kv_heads: int, group: int, head_dim: int, block_seq_len: int, window: int, bits: int = 0) -> Kernel:
    """(q, elements between tokens, pool of a layer, tables, entries of a slot, token_slots, positions, out); bits: of a quantized
    pool, else 0."""
    sets_of_kv = -(-group // MOST_HEADS)
    held = -(-group // sets_of_kv)
    sets = kv_heads * sets_of_kv
    owned = -(-head_dim // THREADS)  # dimensions of a thread
    threads, numbers, query_size, score_size = THREADS, held * owned, held * head_dim, held * THREADS
    block_size, values_at, head_size = (
        2 * kv_heads * block_seq_len * head_dim,
        kv_heads * block_seq_len * head_dim,
        block_seq_len * head_dim,
    )
    out_stride = kv_heads * group * head_dim
    scale, unseen, zero, one = f32(head_dim**-0.5), f32(UNSEEN), f32(0.0), f32(1.0)
    layout = KVLayout(1, kv_heads, head_dim, block_seq_len, "float16", bits)
    row_bytes, pairs_at, block_bytes = layout.row_bytes, layout.pairs_at, layout.layer_block_bytes
    half, value_rows, rotated = f32(1 << max(0, bits - 1)), kv_heads * block_seq_len, kv_quant.rotated(head_dim, bits)
    factor, four, not_a_number = f32(max(1, rotated) ** -0.5), bits == 4, f32(math.nan)
    halves = tuple(threads >> (i + 1) for i in range(threads.bit_length() - 1))

    @cuda.jit(device=True, inline="always")
    def bfloat(pool, at):  # type: ignore[no-untyped-def]
        """The bfloat16 in two bytes of the pool."""
        word = i32(pool[at]) + i32(pool[at + i64(1)]) * i32(256)
        power = (word >> i32(7)) & i32(255)
        size = zero
        if power > i32(0):
            size = f32(math.ldexp(f32((word & i32(127)) + i32(128)), power - i32(134)))
        if power == i32(255):
            size = not_a_number
        return -size if word >= i32(32768) else size

    @cuda.jit(device=True, inline="always")
    def find(pool, tables, table, key, kv_head, of_v):  # type: ignore[no-untyped-def]
        """Where the head's numbers at position `key` begin, and scale and zero of them."""
        index = key // i32(block_seq_len)
        block, inside = i64(tables[table + i64(index)]), i64(key - index * i32(block_seq_len))
        if bits > 0:
            row = i64(kv_head) * i64(block_seq_len) + inside + i64(of_v) * i64(value_rows)
            pair = block * i64(block_bytes) + i64(pairs_at) + row * i64(4)
            scale = bfloat(pool, pair)
            return block * i64(block_bytes) + row * i64(row_bytes), scale, bfloat(pool, pair + i64(2)) - half * scale
        place = block * i64(block_size) + i64(of_v) * i64(values_at) + i64(kv_head) * i64(head_size)
        return place + inside * i64(head_dim), one, zero

    @cuda.jit(device=True, inline="always")
    def read(pool, place, dim, scale, add):  # type: ignore[no-untyped-def]
        if bits > 0:
            code = i32(pool[place + i64(dim // i32(2))]) >> (dim % i32(2) * i32(4)) & i32(15) if four else i32(pool[place + i64(dim)])
            return add + scale * f32(code)
        return f32(pool[place + i64(dim)])

    def kernel(q, q_stride, pool, tables, table_stride, token_slots, positions, out):  # type: ignore[no-untyped-def]
        query = cuda.shared.array(query_size, f32)
        scores = cuda.shared.array(score_size, f32)
        maxima = cuda.shared.array(score_size, f32)
        sums = cuda.local.array(numbers, f32)
        top = cuda.local.array(held, f32)
        under = cuda.local.array(held, f32)
        mine = cuda.local.array(held, f32)

        thread = i32(cuda.threadIdx.x)
        token = i32(cuda.blockIdx.x) // i32(sets)
        head_set = i32(cuda.blockIdx.x) - token * i32(sets)
        kv_head = head_set // i32(sets_of_kv)
        first = (head_set - kv_head * i32(sets_of_kv)) * i32(held)  # of the group's heads
        position, table = i32(positions[token]), i64(token_slots[token]) * i64(table_stride)
        own = i64(token) * i64(q_stride) + i64(kv_head * i32(group) + first) * i64(head_dim)
        at = thread
        while at < i32(query_size):
            real = first + at // i32(head_dim) < i32(group)
            query[at] = f32(q[own + i64(at)]) * scale if real else zero
            at += i32(threads)
        for i in range(numbers):
            sums[i] = zero
        for h in range(held):
            top[h], under[h] = unseen, zero
        low = i32(0)
        if window > 0:
            low = max(i32(0), position - i32(window - 1))
        cuda.syncthreads()

        run = low
        while run <= position:
            key = run + thread
            for h in range(held):
                mine[h] = zero
            if key <= position:
                place, scale_of, add = find(pool, tables, table, key, kv_head, i32(0))
                dim = i32(0)
                while dim < i32(head_dim):
                    number = read(pool, place, dim, scale_of, add)
                    for h in range(held):
                        mine[h] += query[i32(h * head_dim) + dim] * number
                    dim += i32(1)
            for h in range(held):
                score = mine[h] if key <= position else unseen
                scores[i32(h * threads) + thread] = score
                maxima[i32(h * threads) + thread] = score
            for half in halves:
                cuda.syncthreads()
                if thread < i32(half):
                    for h in range(held):
                        at = i32(h * threads) + thread
                        maxima[at] = max(maxima[at], maxima[at + i32(half)])
            cuda.syncthreads()
            for h in range(held):
                most = max(top[h], maxima[h * threads])
                keep = math.exp(top[h] - most)
                top[h] = most
                under[h] *= keep
                for i in range(owned):
                    sums[h * owned + i] *= keep
                scores[i32(h * threads) + thread] = math.exp(scores[i32(h * threads) + thread] - most)
            cuda.syncthreads()
            count = min(i32(threads), position - run + i32(1))
            other = i32(0)
            while other < count:
                key = run + other
                place, scale_of, add = find(pool, tables, table, key, kv_head, i32(1))
                for h in range(held):
                    under[h] += scores[i32(h * threads) + other]
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        number = read(pool, place, dim, scale_of, add)
                        for h in range(held):
                            sums[h * owned + i] += scores[i32(h * threads) + other] * number
                other += i32(1)
            cuda.syncthreads()
            run += i32(threads)

        for h in range(held):
            inverse = one / under[h]
            for i in range(owned):
                sums[h * owned + i] *= inverse
        if rotated > 0:  # a 4-bit pool's heads are turned back: through shared memory, where q is no longer needed
            for h in range(held):
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        query[i32(h * head_dim) + dim] = sums[h * owned + i]
            cuda.syncthreads()
            for h in range(held):
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        own_part = dim % i32(rotated)
                        total, start = zero, i32(h * head_dim) + dim - own_part
                        other = i32(0)
                        while other < i32(rotated):
                            number = query[start + other]
                            total += number if cuda.popc(own_part & other) % 2 == 0 else -number
                            other += i32(1)
                        sums[h * owned + i] = total * factor
        for h in range(held):
            if first + i32(h) < i32(group):
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        to = i64(token) * i64(out_stride) + i64(kv_head * i32(group) + first + i32(h)) * i64(head_dim)
                        out[to + i64(dim)] = f16(sums[h * owned + i])

    return Kernel(kernel, (HALVES, i32, BYTES if bits else HALVES, INTS, i32, INTS, INTS, HALVES), threads)


class PortableAttention:
    """Attention of every token of a step, decode rows and prompt parts, over the pool (`engine.reference.attend`), float16.

    heads, kv_heads: of this rank. head_dim: up to 256. window: positions a token sees, 0 for all. bits: of a quantized pool, else 0.
    """

    def __init__(
        self, library: Library, heads: int, kv_heads: int, head_dim: int, block_seq_len: int, *, window: int = 0, bits: int = 0
    ) -> None:
        if not 1 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; 1 to 256 is needed")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
        if block_seq_len < 1 or window < 0:
            raise ValueError(f"block_seq_len {block_seq_len} and window {window}: at least 1 and 0 are needed")
        group = heads // kv_heads
        self._library, self._width = library, heads * head_dim
        self._layout = KVLayout(1, kv_heads, head_dim, block_seq_len, "float16", bits)
        self._sets = kv_heads * -(-group // MOST_HEADS)
        self._variant = Variant(__name__, "attend", (kv_heads, group, head_dim, block_seq_len, window, bits))
        self.variants = (self._variant,)

    def __call__(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        tables: torch.Tensor,
        token_slots: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out[t] = attention of the query in the first heads * head_dim elements of q[t], at positions[t] of batch slot token_slots[t].

        q [T, >= heads * head_dim], out [T, heads * head_dim], pool one layer of `engine/cache/layout.py` with
        num_blocks + 1 blocks, tables int32 [slots + 1, blocks_per_slot].
        """
        check_pool(pool, self._layout)
        if q.dtype != torch.float16 or q.shape[1] < self._width or q.stride(1) != 1:
            raise ValueError(f"q is {q.dtype} {tuple(q.shape)}, not float16 rows of at least {self._width}")
        if out.dtype != torch.float16 or out.shape[1] != self._width or not out.is_contiguous() or tables.stride(1) != 1:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not consecutive float16 rows of {self._width}")
        if len(positions):
            self._library[self._variant](
                len(positions) * self._sets, q, q.stride(0), pool, tables, tables.stride(0), token_slots, positions, out
            )
