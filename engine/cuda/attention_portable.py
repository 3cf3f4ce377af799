"""Attention in plain arithmetic for cards without the tensor-core instructions we use (compute capability 7.0, 7.5): `attend`
over `gather_kv` of `engine/reference.py`, decode rows and prompt parts alike. Also runs in Numba's CUDA simulator.

Layout (float16)

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

from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.target import cuda, pointer, types

THREADS = 128
MOST_HEADS = 8  # of a head set: their accumulators are registers
UNSEEN = -1.0e30
i32, f32, f16, i64 = types.int32, types.float32, types.float16, types.int64
INTS, HALVES = pointer(i32), pointer(f16)


def attend(kv_heads: int, group: int, head_dim: int, block_seq_len: int, window: int) -> Kernel:
    """(q, elements between tokens, pool of a layer, tables, entries of a slot, token_slots, positions, out)."""
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
    halves = tuple(threads >> (i + 1) for i in range(threads.bit_length() - 1))

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
                index = key // i32(block_seq_len)
                place = i64(tables[table + i64(index)]) * i64(block_size) + i64(kv_head) * i64(head_size)
                place += i64(key - index * i32(block_seq_len)) * i64(head_dim)
                dim = i32(0)
                while dim < i32(head_dim):
                    number = f32(pool[place + i64(dim)])
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
                index = key // i32(block_seq_len)
                place = i64(tables[table + i64(index)]) * i64(block_size) + i64(values_at) + i64(kv_head) * i64(head_size)
                place += i64(key - index * i32(block_seq_len)) * i64(head_dim)
                for h in range(held):
                    under[h] += scores[i32(h * threads) + other]
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        number = f32(pool[place + i64(dim)])
                        for h in range(held):
                            sums[h * owned + i] += scores[i32(h * threads) + other] * number
                other += i32(1)
            cuda.syncthreads()
            run += i32(threads)

        for h in range(held):
            if first + i32(h) < i32(group):
                inverse = one / under[h]
                for i in range(owned):
                    dim = thread + i32(threads * i)
                    if dim < i32(head_dim):
                        to = i64(token) * i64(out_stride) + i64(kv_head * i32(group) + first + i32(h)) * i64(head_dim)
                        out[to + i64(dim)] = f16(sums[h * owned + i] * inverse)

    return Kernel(kernel, (HALVES, i32, HALVES, INTS, i32, INTS, INTS, HALVES), threads)


class PortableAttention:
    """Attention of every token of a step, decode rows and prompt parts, over the pool (`engine.reference.attend`), float16.

    heads, kv_heads: of this rank. head_dim: up to 256. window: positions a token sees, 0 for all.
    """

    def __init__(self, library: Library, heads: int, kv_heads: int, head_dim: int, block_seq_len: int, *, window: int = 0) -> None:
        if not 1 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; 1 to 256 is needed")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
        if block_seq_len < 1 or window < 0:
            raise ValueError(f"block_seq_len {block_seq_len} and window {window}: at least 1 and 0 are needed")
        group = heads // kv_heads
        self._library, self._width = library, heads * head_dim
        self._position = (2, kv_heads, block_seq_len, head_dim)
        self._sets = kv_heads * -(-group // MOST_HEADS)
        self._variant = Variant(__name__, "attend", (kv_heads, group, head_dim, block_seq_len, window))
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

        q [T, >= heads * head_dim], out [T, heads * head_dim], pool one layer [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim],
        tables int32 [slots + 1, blocks_per_slot].
        """
        if pool.shape[1:] != self._position or pool.dtype != torch.float16 or not pool.is_contiguous():
            raise ValueError(f"the pool is {pool.dtype} {tuple(pool.shape)}, not consecutive float16 [blocks, *{self._position}]")
        if q.dtype != torch.float16 or q.shape[1] < self._width or q.stride(1) != 1:
            raise ValueError(f"q is {q.dtype} {tuple(q.shape)}, not float16 rows of at least {self._width}")
        if out.dtype != torch.float16 or out.shape[1] != self._width or not out.is_contiguous() or tables.stride(1) != 1:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not consecutive float16 rows of {self._width}")
        if len(positions):
            self._library[self._variant](
                len(positions) * self._sets, q, q.stride(0), pool, tables, tables.stride(0), token_slots, positions, out
            )
