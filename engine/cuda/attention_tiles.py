"""How 16 positions of K and V come from the pool into shared memory: one function for each format of the pool.

    one tile of 16 bits an element, in bytes   K [16, pitch] then V [16, pitch],  pitch = 2 head_dim + 16
    one tile of a quantized pool               codes of K [n, row], of V [n, row], pairs of K [n], of V [n],  row = head_dim bits / 8;
                                               n = 16, or 32 where a warp takes two tiles at once

The 16 spare bytes of a row put the eight rows that an ldmatrix reads into different banks, for every head_dim that is a
multiple of 16. Positions outside [low, stop) become zeros: P = 0 there, and 0 times whatever a free block holds is no 0.
Codes have no spare bytes: their 16-byte pieces change places within each line of 128 bytes (`code_place`), so that neither
4 lanes that read a row (K) nor 8 lanes that read a part of four rows (V) meet in a bank. Positions outside [low, stop) are left
as they come, or not read at all: codes are finite whatever they are, and who reads pairs asks for the position first.
Knows no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.cache.layout import KVLayout
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


@dataclass(frozen=True, slots=True)
class TileCopy:
    """How a format of the pool is read, as two functions that kernels inline.

    find(table, position, stop) -> uint32: where the pool has the tile, a load to be issued early.
    copy(kv, table, found, head, position, low, stop, to, lane): queue the copies of one tile by 32 lanes.

    kv uint64: address of the layer's pool. table uint64: address of the row's block table. position: of the tile's first row,
    int32, a multiple of 16 that may be beyond `stop`. head: KV head. to: shared address. Commit and wait are the caller's.
    """

    find: Callable[..., Any]
    copy: Callable[..., Any]


def sixteen_bits(kv_heads: int, head_dim: int, block_seq_len: int) -> TileCopy:
    """For pools of 16-bit elements, [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim], and any block_seq_len: whole tiles
    lie in one block when it is a multiple of 16, else every piece looks its block up."""
    row = head_dim // 8  # 16-byte pieces of a row
    copies = TILE * row // 32
    even = 32 % row == 0
    head_bytes = 2 * block_seq_len * head_dim
    block_bytes = 2 * kv_heads * head_bytes
    value_bytes, value_at = kv_heads * head_bytes, TILE * pitch(head_dim)
    copy_16, load_32 = ptx.copy_async_16_or_zero, ptx.load_32

    @cuda.jit(device=True, inline="always")
    def find(table, position, stop):  # type: ignore[no-untyped-def]
        last = u32(min(position, i32(stop - i32(1))))  # a tile beyond the context looks up a block that exists
        return load_32(u64(table + u64(u32(last // u32(block_seq_len))) * u64(4)))

    @cuda.jit(device=True, inline="always")
    def whole(kv, table, found, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        inside = u32(u32(position) % u32(block_seq_len))
        start = u64(kv + u64(found) * u64(block_bytes) + u64(u32(u32(head) * u32(head_bytes) + inside * u32(2 * head_dim))))
        source = u64(start + u64(u32(lane * u32(16))))
        row_0 = u32(lane // u32(row))
        target_0 = u32(to + u32(lane + row_0) * u32(16))
        for i in range(copies):
            if even:  # the same steps for every lane: addresses are one sum and constants
                offset, target = u32(row_0 + u32(32 // row * i)), u32(target_0 + u32((32 + 32 // row) * 16 * i))
            else:
                offset = u32(u32(lane + u32(32 * i)) // u32(row))
                target = u32(to + u32(lane + u32(32 * i) + offset) * u32(16))
            at = i32(position + i32(offset))
            size = u32(16) if low <= at and at < stop else u32(0)
            copy_16(target, u64(source + u64(512 * i)), size)
            copy_16(u32(target + u32(value_at)), u64(source + u64(512 * i + value_bytes)), size)

    @cuda.jit(device=True, inline="always")
    def found_later(table, position, stop):  # type: ignore[no-untyped-def]
        return u32(0)

    @cuda.jit(device=True, inline="always")
    def scattered(kv, table, found, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        for i in range(copies):
            piece = u32(lane + u32(32 * i))
            offset = u32(piece // u32(row))
            at = i32(position + i32(offset))
            last = u32(min(at, i32(stop - i32(1))))
            index = u32(last // u32(block_seq_len))
            start = u64(kv + u64(load_32(u64(table + u64(index) * u64(4)))) * u64(block_bytes))
            inside = u32(u32(last - index * u32(block_seq_len)) * u32(head_dim) + u32(piece - offset * u32(row)) * u32(8))
            source = u64(start + u64(u32(u32(head) * u32(head_bytes) + inside * u32(2))))
            size = u32(16) if low <= at and at < stop else u32(0)
            target = u32(to + u32(piece + offset) * u32(16))
            copy_16(target, source, size)
            copy_16(u32(target + u32(value_at)), u64(source + u64(value_bytes)), size)

    return TileCopy(find, whole) if block_seq_len % TILE == 0 else TileCopy(found_later, scattered)


def code_tile_bytes(head_dim: int, bits: int, tiles: int = 1) -> int:
    """Bytes of a tile of a quantized pool, `tiles` times as many positions."""
    return 2 * TILE * tiles * (head_dim * bits // 8 + 4)


def code_place(head_dim: int, bits: int) -> Any:
    """place(row, byte) -> uint32: where in the codes of K or V of a tile that byte of a row lies, a device function."""
    row_pieces = head_dim * bits // 8 // 16
    by_row = row_pieces % 8 == 0  # whole lines a row: the row decides; else the line

    @cuda.jit(device=True, inline="always")
    def place(row, byte):  # type: ignore[no-untyped-def]
        piece = u32(row * u32(row_pieces) + u32(byte >> u32(4)))
        if by_row:
            turn = u32(u32(u32(u32(row ^ u32(row >> u32(2))) & u32(1)) << u32(2)) | u32(row & u32(2)))
        else:
            turn = u32(u32(u32(piece >> u32(3)) & u32(3)) << u32(1))
        return u32(u32(u32(piece ^ turn) << u32(4)) | u32(byte & u32(15)))

    return place


def quantized(kv_heads: int, head_dim: int, block_seq_len: int, bits: int, tiles: int = 1) -> TileCopy:
    """For quantized pools, uint8 [num_blocks + 1, bytes] (`engine/cache/layout.py`), and any block_seq_len; a tile has 16 `tiles`
    positions."""
    layout = KVLayout(1, kv_heads, head_dim, block_seq_len, "float16", bits)
    row, block_bytes, pairs_at = layout.row_bytes, layout.layer_block_bytes, layout.pairs_at
    if row % 32:
        raise ValueError(f"{bits} bits x {head_dim} are {row} bytes a position; a multiple of 32 is needed")
    rows = TILE * tiles
    row_pieces, copies, pair_copies = row // 16, rows * row // 16 // 32, 2 * rows // 32
    values_from, value_at, tile_pairs_at = kv_heads * block_seq_len, rows * row, 2 * rows * row
    copy_16, copy_4, load_32 = ptx.copy_async_16, ptx.copy_async_4, ptx.load_32
    place = code_place(head_dim, bits)

    @cuda.jit(device=True, inline="always")
    def find(table, position, stop):  # type: ignore[no-untyped-def]
        last = u32(min(position, i32(stop - i32(1))))
        return load_32(u64(table + u64(u32(last // u32(block_seq_len))) * u64(4)))

    @cuda.jit(device=True, inline="always")
    def whole(kv, table, found, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        if position < stop:
            block = u64(kv + u64(found) * u64(block_bytes))
            first = u32(u32(head) * u32(block_seq_len) + u32(u32(position) % u32(block_seq_len)))
            source = u64(block + u64(u32(first * u32(row) + lane * u32(16))))
            for i in range(copies):
                piece = u32(lane + u32(32 * i))
                target = u32(to + place(u32(piece // u32(row_pieces)), u32(u32(piece % u32(row_pieces)) * u32(16))))
                copy_16(target, u64(source + u64(512 * i)))
                copy_16(u32(target + u32(value_at)), u64(source + u64(512 * i + values_from * row)))
            for i in range(pair_copies):
                pair = u32(lane + u32(32 * i))
                own = u32(first + pair) if pair < u32(rows) else u32(first + u32(pair + u32(values_from - rows)))
                copy_4(u32(to + u32(tile_pairs_at) + pair * u32(4)), u64(block + u64(u32(u32(pairs_at) + own * u32(4)))))

    @cuda.jit(device=True, inline="always")
    def found_later(table, position, stop):  # type: ignore[no-untyped-def]
        return u32(0)

    @cuda.jit(device=True, inline="always")
    def block_and_row(kv, table, head, at, stop):  # type: ignore[no-untyped-def]
        last = u32(min(at, i32(stop - i32(1))))
        index = u32(last // u32(block_seq_len))
        block = u64(kv + u64(load_32(u64(table + u64(index) * u64(4)))) * u64(block_bytes))
        return block, u32(u32(head) * u32(block_seq_len) + u32(last - index * u32(block_seq_len)))

    @cuda.jit(device=True, inline="always")
    def scattered(kv, table, found, head, position, low, stop, to, lane):  # type: ignore[no-untyped-def]
        if position < stop:
            for i in range(copies):
                piece = u32(lane + u32(32 * i))
                offset = u32(piece // u32(row_pieces))
                byte = u32(u32(piece - offset * u32(row_pieces)) * u32(16))
                block, first = block_and_row(kv, table, head, i32(position + i32(offset)), stop)
                source, target = u64(block + u64(u32(first * u32(row) + byte))), u32(to + place(offset, byte))
                copy_16(target, source)
                copy_16(u32(target + u32(value_at)), u64(source + u64(values_from * row)))
            for i in range(pair_copies):
                pair = u32(lane + u32(32 * i))
                of_v = pair >= u32(rows)
                block, first = block_and_row(kv, table, head, i32(position + i32(u32(pair - u32(rows)) if of_v else pair)), stop)
                own = u32(first + (u32(values_from) if of_v else u32(0)))
                copy_4(u32(to + u32(tile_pairs_at) + pair * u32(4)), u64(block + u64(u32(u32(pairs_at) + own * u32(4)))))

    return TileCopy(find, whole) if block_seq_len % rows == 0 else TileCopy(found_later, scattered)
