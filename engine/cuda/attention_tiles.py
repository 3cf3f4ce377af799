"""How 16 positions of K and V come from the pool into shared memory: one function for each format of the pool.

    one tile in shared memory, in bytes        K [16, pitch] then V [16, pitch],  pitch = 2 head_dim + 16

The 16 spare bytes of a row put the eight rows that an ldmatrix reads into different banks, for every head_dim that is a
multiple of 16. Positions outside [low, stop) become zeros: P = 0 there, and 0 times whatever a free block holds is no 0.
A format of fewer bits gets a function of its own beside `sixteen_bits`. Knows no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.cuda import ptx
from engine.cuda.target import cuda, types

TILE = 16  # positions
SPARE = 16  # bytes after each row
i32, u32, u64 = types.int32, types.uint32, types.uint64


def pitch(head_dim: int) -> int:
    """Bytes from one position's K to the next one's."""
    return 2 * head_dim + SPARE


def tile_bytes(head_dim: int) -> int:
    """Bytes of a tile: K and V of 16 positions."""
    return 2 * TILE * pitch(head_dim)


def sixteen_bits(kv_heads: int, head_dim: int, block_seq_len: int, lanes: int = 32) -> Callable[..., Any]:
    """copy(kv, table, head, position, low, stop, to, lane): queue the 16-byte copies of a tile, `lanes` threads together.

    kv uint64: address of the layer's pool [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim], 16 bits an element.
    table uint64: address of the row's block table. head: KV head. position: of the tile's first row, a multiple of 16; any
    int32 >= 0. to uint32: shared address. The caller commits and waits.
    """
    row = head_dim // 8  # 16-byte pieces of a row
    copies = TILE * row // lanes
    if TILE * row % lanes:
        raise ValueError(f"{lanes} threads cannot share the {TILE * row} pieces of a tile evenly")
    head_bytes = 2 * block_seq_len * head_dim
    block_bytes = 2 * kv_heads * head_bytes
    value_bytes, value_at = kv_heads * head_bytes, TILE * pitch(head_dim)
    copy_16 = ptx.copy_async_16_or_zero
    load_32 = ptx.load_32
    one_block = block_seq_len % TILE == 0

    @cuda.jit(device=True, inline="always")
    def whole(kv, table, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        last = i32(min(position, i32(stop - 1)))  # a tile beyond the context looks up a block that exists
        block = load_32(u64(table + u64(u32(last // block_seq_len)) * u64(4)))
        start = u64(
            kv + u64(block) * u64(block_bytes) + u64(u32(head)) * u64(head_bytes) + u64(u32(position % block_seq_len)) * u64(2 * head_dim)
        )
        for i in range(copies):
            piece = u32(lane + u32(lanes * i))
            offset = u32(piece // u32(row))
            at = i32(position + i32(offset))
            size = u32(16) if low <= at and at < stop else u32(0)
            source = u64(start + u64(piece) * u64(16))
            target = u32(to + u32(piece + offset) * u32(16))
            copy_16(target, source, size)
            copy_16(u32(target + u32(value_at)), u64(source + u64(value_bytes)), size)

    @cuda.jit(device=True, inline="always")
    def scattered(kv, table, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        for i in range(copies):
            piece = u32(lane + u32(lanes * i))
            offset = u32(piece // u32(row))
            at = i32(position + i32(offset))
            inside = i32(min(at, i32(stop - 1)))
            block = load_32(u64(table + u64(u32(inside // block_seq_len)) * u64(4)))
            start = u64(kv + u64(block) * u64(block_bytes) + u64(u32(head)) * u64(head_bytes))
            element = u32(u32(inside % block_seq_len) * u32(head_dim) + u32(piece - offset * u32(row)) * u32(8))
            source = u64(start + u64(element) * u64(2))
            size = u32(16) if low <= at and at < stop else u32(0)
            target = u32(to + u32(piece + offset) * u32(16))
            copy_16(target, source, size)
            copy_16(u32(target + u32(value_at)), u64(source + u64(value_bytes)), size)

    return whole if one_block else scattered
