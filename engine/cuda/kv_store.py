"""Rope on q and k, q left in place, k and v written into the pool: `ReferenceBackend.rope_store` of `engine/reference.py`.

Optional: RMSNorm of each head of q and k before rope, logn scaling of q after it (`logn_scale`), q and k in the frame in which k
is quantized (`engine/kv_quant.py`). Knows no attention.

Layout: 16-bit numbers in the computing dtype unless said; a "word" is two of them, dimensions 2w and 2w + 1.

    qkv       [T, heads q | kv_heads k | kv_heads v, head_dim]
    pool      one layer: [num_blocks + 1, 2, kv_heads, block_seq_len, head_dim], or a quantized one (engine/cache/layout.py)
    cos, sin  float32 [max_position, rotary / 2]          tables int32 [slots + 1, blocks_per_slot]
    a head    | a: rotary / 2 | b: rotary / 2 | rest |      a_i turns with b_i; rest, and all of v, is copied

Work split: one warp a head of a token; grid = T * ceil((heads + 2 kv_heads) / warps of a block). Lane l holds words
l, l + 32, .. of a and of b (so it has both numbers of every pair it turns) and of the rest, as float32 in registers: qkv is
read once (or its parts, `engine/cuda/parts.py`) and written once. A token's position and block are found by every warp for itself:
two loads that the cache answers.

A quantized pool gets codes (`engine/cuda/kv_quant.py`). Where its heads are turned too (4 bits), a warp first deals its head out
again through shared memory, lane l words l, l + 32, .., and q is stored so.
Portable: float16 variants use no instruction that compute capability 7.5 lacks.

Measured on an H200 (32 + 16 heads of 128): 1.5 us at one row, 74 us at 8,192, 58 % of what a read kernel reaches. Warps a block is a
factory constant; no other was tried.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.cache.layout import KVLayout
from engine.cuda import ptx
from engine.cuda.elementwise import DTYPES, PACK
from engine.cuda.kv_quant import quantizer, rotator
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.parts import check_parts, part_adder, part_arguments
from engine.cuda.pool import check_pool
from engine.cuda.target import cuda, pointer, types

WARPS = 4
INVERSES = 0x7F000000  # less the bits of a power of 2: those of its inverse

i32, u32, u64, f32 = types.int32, types.uint32, types.uint64, types.float32
WORDS, INTS, FLOATS = pointer(u32), pointer(i32), pointer(f32)


def rope_store(
    heads: int, kv_heads: int, head_dim: int, rotary: int, block_seq_len: int, dtype: str, normed: bool, trained_length: int, warps: int,
    parted: bool, bits: int = 0, keep_k: bool = False,
) -> Kernel:
    """(qkv, cos, sin, token_slots, positions, tables, entries of a slot, pool, q_norm, k_norm, key_frame, eps), after them, where
    `parted`, (parts, how many, bytes of one); trained_length 0: no logn; keep_k: k goes back into qkv, too. key_frame: of a quantized
    pool, null: none."""
    pack, low, high = PACK[dtype], ptx.LOW[dtype], ptx.HIGH[dtype]
    total_heads, group = heads + 2 * kv_heads, heads // kv_heads
    groups = -(-total_heads // warps)  # thread blocks of a token
    all_words, half_words = head_dim // 2, rotary // 4
    turned, rest = -(-half_words // 32), -(-(all_words - 2 * half_words) // 32)  # words of a, of b, and of the rest that a lane holds
    held = 2 * turned + rest
    numbers = 2 * held
    head_bytes = 2 * head_dim
    kv_bytes = kv_heads * block_seq_len * head_bytes  # K or V of a block
    inverse_dim, one, zero = f32(1.0 / head_dim), f32(1.0), f32(0.0)
    per_octave = f32(1.0 / math.log2(trained_length)) if trained_length else f32(0.0)
    lane_steps = (16, 8, 4, 2, 1)
    add_parts = part_adder(2)
    turns_heads = bits == 4
    layout = KVLayout(1, kv_heads, head_dim, block_seq_len, dtype, bits)
    row_bytes, block_bytes, pairs_at = layout.row_bytes, layout.layer_block_bytes, layout.pairs_at
    dealt = all_words // 32 if turns_heads else 1  # words of a lane, dealt out in order
    dealt_numbers, exchanged = 2 * dealt, warps * head_dim if turns_heads else 1

    @cuda.jit(device=True, inline="always")
    def word_of(i: Any, lane: Any) -> Any:
        """Which word of a head the i-th of a lane is; all_words or more: none."""
        if i < turned:
            at = lane + i32(32 * i)
            return at if at < i32(half_words) else i32(all_words)
        if i < 2 * turned:
            at = lane + i32(32 * (i - turned))
            return at + i32(half_words) if at < i32(half_words) else i32(all_words)
        return lane + i32(32 * (i - 2 * turned) + 2 * half_words)

    @cuda.jit(device=True, inline="always")
    def load_head(head: Any, x: Any, lane: Any) -> None:
        for i in range(held):
            word = word_of(i, lane)
            packed = u32(0)
            if word < i32(all_words):
                packed = ptx.load_32(head + u64(u32(word) * u32(4)))
            x[2 * i], x[2 * i + 1] = low(packed), high(packed)

    @cuda.jit(device=True, inline="always")
    def add_head(head: Any, x: Any, lane: Any, parts: Any, stride: Any) -> None:
        """The same from the parts of a product: `head` is the address of the first one's floats."""
        for i in range(held):
            word = word_of(i, lane)
            x[2 * i], x[2 * i + 1] = zero, zero
            if word < i32(all_words):
                add_parts(x, 2 * i, head + u64(u32(word) * u32(8)), parts, stride)

    @cuda.jit(device=True, inline="always")
    def store_words(to: Any, x: Any, lane: Any) -> None:
        """The numbers of one head at one position."""
        for i in range(held):
            word = word_of(i, lane)
            if word < i32(all_words):
                ptx.store_32(to + u64(u32(word) * u32(4)), pack(x[2 * i], x[2 * i + 1]))

    @cuda.jit(device=True, inline="always")
    def in_order(i: Any, lane: Any) -> Any:
        return lane + i32(32 * i)

    @cuda.jit(device=True, inline="always")
    def deal(x: Any, y: Any, floats: Any, barrier: Any, lane: Any) -> None:
        """x, held as `word_of` says, to y, in order. floats: shared address for one head."""
        for i in range(held):
            word = word_of(i, lane)
            if word < i32(all_words):
                ptx.store_shared_64(u32(floats + u32(word) * u32(8)), ptx.bits_of_float(x[2 * i]), ptx.bits_of_float(x[2 * i + 1]))
        ptx.some_barrier(barrier, u32(32))
        for i in range(dealt):
            a, b = ptx.load_shared_64(u32(floats + u32(in_order(i, lane)) * u32(8)))
            y[2 * i], y[2 * i + 1] = ptx.float_of_bits(a), ptx.float_of_bits(b)

    @cuda.jit(device=True, inline="always")
    def store_in_order(to: Any, y: Any, lane: Any) -> None:
        for i in range(dealt):
            ptx.store_32(to + u64(u32(in_order(i, lane)) * u32(4)), pack(y[2 * i], y[2 * i + 1]))

    rotate = quantize = store_words  # of a pool that is not quantized neither is called
    if turns_heads:
        rotate, quantize = rotator(head_dim), quantizer(head_dim, bits, dealt, in_order)
    elif bits:
        quantize = quantizer(head_dim, bits, held, word_of)

    @cuda.jit(device=True, inline="always")
    def normalise(x: Any, weight: Any, eps: Any, lane: Any) -> None:
        total = zero
        for i in range(numbers):
            total += x[i] * x[i]
        for step in lane_steps:
            total += ptx.shuffle_xor_f32(total, u32(step))
        scale = ptx.rsqrt(total * inverse_dim + eps)
        for i in range(held):
            word = word_of(i, lane)
            if word < i32(all_words):
                w0, w1 = ptx.load_constant_64(weight + u64(u32(word) * u32(8)))
                x[2 * i] = x[2 * i] * scale * ptx.float_of_bits(w0)
                x[2 * i + 1] = x[2 * i + 1] * scale * ptx.float_of_bits(w1)

    @cuda.jit(device=True, inline="always")
    def turn(x: Any, cos: Any, sin: Any, lane: Any) -> None:
        for i in range(turned):
            word = lane + i32(32 * i)
            if word < i32(half_words):
                c0, c1 = ptx.load_constant_64(cos + u64(u32(word) * u32(8)))
                s0, s1 = ptx.load_constant_64(sin + u64(u32(word) * u32(8)))
                cos0, cos1, sin0, sin1 = ptx.float_of_bits(c0), ptx.float_of_bits(c1), ptx.float_of_bits(s0), ptx.float_of_bits(s1)
                a0, a1, b0, b1 = x[2 * i], x[2 * i + 1], x[2 * (i + turned)], x[2 * (i + turned) + 1]
                x[2 * i], x[2 * i + 1] = a0 * cos0 - b0 * sin0, a1 * cos1 - b1 * sin1
                x[2 * (i + turned)], x[2 * (i + turned) + 1] = b0 * cos0 + a0 * sin0, b1 * cos1 + a1 * sin1

    @cuda.jit(device=True, inline="always")
    def enter_frame(x: Any, frame: Any, head: Any, lane: Any) -> None:
        of_k = head >= i32(heads)
        kv_head = head - i32(heads) if of_k else i32(u32(head) // u32(group))
        origins = frame + u64(u32(kv_head) * u32(4 * head_dim))
        for i in range(held):
            word = word_of(i, lane)
            if word < i32(all_words):
                at = origins + u64(u32(word) * u32(8))
                u0, u1 = ptx.load_constant_64(at + u64(4 * kv_heads * head_dim))
                if of_k:
                    o0, o1 = ptx.load_constant_64(at)
                    x[2 * i] -= ptx.float_of_bits(o0)
                    x[2 * i + 1] -= ptx.float_of_bits(o1)
                    u0, u1 = u32(u32(INVERSES) - u0), u32(u32(INVERSES) - u1)
                x[2 * i] *= ptx.float_of_bits(u0)
                x[2 * i + 1] *= ptx.float_of_bits(u1)

    @cuda.jit(device=True, inline="always")
    def work(  # type: ignore[no-untyped-def]
        qkv, cos, sin, token_slots, positions, tables, stride, pool, q_norm, k_norm, key_frame, eps, parts, count, part_bytes
    ):
        ptx.next_may_begin()
        ptx.after_previous()
        thread, group = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        lane, token = thread & i32(31), i32(u32(group) // u32(groups))
        head = (group - token * i32(groups)) * i32(warps) + (thread >> i32(5))
        if head >= i32(total_heads):
            return
        x = cuda.local.array(numbers, f32)
        own = ptx.address(qkv) + u64(token) * u64(total_heads * head_bytes) + u64(u32(head) * u32(head_bytes))
        position = positions[token]
        if parted:
            floats = u64(token) * u64(2 * total_heads * head_bytes) + u64(u32(head) * u32(2 * head_bytes))
            add_head(ptx.address(parts) + floats, x, lane, count, part_bytes)
        else:
            load_head(own, x, lane)
        if head < i32(heads + kv_heads):  # q or k
            if normed:
                normalise(x, ptx.address(q_norm) if head < i32(heads) else ptx.address(k_norm), eps, lane)
            at = u64(position) * u64(2 * rotary)
            turn(x, ptx.address(cos) + at, ptx.address(sin) + at, lane)
            if bits > 0:
                frame = ptx.address(key_frame)
                if frame != u64(0):
                    enter_frame(x, frame, head, lane)
        if head < i32(heads):
            if trained_length:
                scale = ptx.log2(f32(position + i32(1))) * per_octave if position >= i32(trained_length) else one
                for i in range(numbers):
                    x[i] *= scale
            if not turns_heads:
                store_words(own, x, lane)
        if turns_heads:
            y = cuda.local.array(dealt_numbers, f32)
            shared = ptx.to_shared(ptx.generic_address(cuda.shared.array(exchanged, f32)))
            warp = u32(u32(thread) >> u32(5))
            deal(x, y, u32(shared + warp * u32(4 * head_dim)), u32(warp + u32(1)), lane)
            rotate(y, lane)
            if head < i32(heads):
                store_in_order(own, y, lane)
        if head >= i32(heads):
            of_v = head >= i32(heads + kv_heads)
            if keep_k and not of_v:
                store_words(own, x, lane)
            kv_head = head - i32(heads) - (i32(kv_heads) if of_v else i32(0))
            index = i32(u32(position) // u32(block_seq_len))
            block = tables[u64(token_slots[token]) * u64(stride) + u64(index)]
            place = u32(kv_head) * u32(block_seq_len) + u32(position - index * i32(block_seq_len))
            if bits > 0:
                place = place + (u32(kv_heads * block_seq_len) if of_v else u32(0))
                start = ptx.address(pool) + u64(u32(block)) * u64(block_bytes)
                codes, pair = start + u64(place * u32(row_bytes)), start + u64(u32(pairs_at) + place * u32(4))
                if turns_heads:
                    quantize(y, codes, pair, lane)
                else:
                    quantize(x, codes, pair, lane)
            else:
                to = ptx.address(pool) + u64(u32(block) * u32(2) + u32(of_v)) * u64(kv_bytes) + u64(place * u32(head_bytes))
                store_words(to, x, lane)

    def kernel(qkv, cos, sin, token_slots, positions, tables, stride, pool, q_norm, k_norm, key_frame, eps):  # type: ignore[no-untyped-def]
        work(qkv, cos, sin, token_slots, positions, tables, stride, pool, q_norm, k_norm, key_frame, eps, qkv, u32(0), u64(0))

    def parted_kernel(  # type: ignore[no-untyped-def]
        qkv, cos, sin, token_slots, positions, tables, stride, pool, q_norm, k_norm, key_frame, eps, parts, count, part_bytes
    ):
        work(qkv, cos, sin, token_slots, positions, tables, stride, pool, q_norm, k_norm, key_frame, eps, parts, count, part_bytes)

    arguments = (WORDS, FLOATS, FLOATS, INTS, INTS, INTS, i32, WORDS, FLOATS, FLOATS, FLOATS, f32)
    if parted:
        return Kernel(parted_kernel, (*arguments, WORDS, u32, u64), 32 * warps, early=True)
    return Kernel(kernel, arguments, 32 * warps, early=True)


class RopeStore:
    """Rope, q and k normed before it where the model has that, into qkv (q) and into one layer's pool (k, v).

    qkv [T, (heads + 2 kv_heads) * head_dim] in the computing dtype; pool one layer of `engine/cache/layout.py`, of `bits` 8 or 4 where
    it is quantized; token t
    is position `positions[t]` of batch slot `token_slots[t]` and goes to block `tables[slot, position // block_seq_len]`. cos, sin
    float32 [max_position, rotary_dim / 2]; q_norm, k_norm float32 [head_dim], None without `qk_norm`. `trained_length`: of logn
    scaling, 0 for none. k and v inside qkv are left as they were; with `keep_k`, which no parts know, k is the rotated one there.
    key_frame float32 [2 * kv_heads * head_dim], only of a quantized pool: origins and units, powers of 2 (engine/kv_quant.py).

    `parts` float32 [S, T, (heads + 2 kv_heads) * head_dim]: q, k and v are their sum, and of qkv only q is written.
    """

    def __init__(
        self,
        library: Library,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        block_seq_len: int,
        dtype: str,
        *,
        qk_norm: bool = False,
        trained_length: int = 0,
        warps: int = WARPS,
        bits: int = 0,
        keep_k: bool = False,
    ) -> None:
        if head_dim % 4 or not 16 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}; a multiple of 4 from 16 to 256 is needed")
        if rotary_dim % 4 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim is {rotary_dim}; a multiple of 4 up to head_dim = {head_dim} is needed")
        if bits == 4 and head_dim % 64:
            raise ValueError(f"head_dim is {head_dim}; a multiple of 64 is needed where K and V are kept in 4 bits")
        if heads < 1 or kv_heads < 1:
            raise ValueError(f"{heads} heads and {kv_heads} KV heads; at least 1 of each is needed")
        if trained_length == 1 or trained_length < 0:
            raise ValueError(f"trained_length is {trained_length}; 0 or at least 2 is needed")
        self._library, self._dtype, self._qk_norm, self._half = library, DTYPES[dtype], qk_norm, rotary_dim // 2
        self._width, self._frame = (heads + 2 * kv_heads) * head_dim, 2 * kv_heads * head_dim
        self._layout = KVLayout(1, kv_heads, head_dim, block_seq_len, dtype, bits)
        self._groups = -(-(heads + 2 * kv_heads) // warps)
        constants = (heads, kv_heads, head_dim, rotary_dim, block_seq_len, dtype, qk_norm, trained_length, warps)
        kinds = ((False, bits, keep_k), (True, bits, False))  # parted or not
        self.variants = tuple(Variant(__name__, "rope_store", (*constants, *kind)) for kind in kinds)

    def __call__(
        self,
        qkv: torch.Tensor,
        pool: torch.Tensor,
        token_slots: torch.Tensor,
        positions: torch.Tensor,
        tables: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
        parts: torch.Tensor | None = None,
        key_frame: torch.Tensor | None = None,
    ) -> None:
        tokens = len(positions)
        if qkv.shape != (tokens, self._width) or qkv.dtype != self._dtype or not qkv.is_contiguous():
            raise ValueError(f"qkv is {qkv.dtype} {tuple(qkv.shape)}, not consecutive {self._dtype} {(tokens, self._width)}")
        check_pool(pool, self._layout)
        if cos.shape[1] != self._half or sin.shape != cos.shape:
            raise ValueError(f"cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}, not [positions, {self._half}]")
        if (q_norm is None or k_norm is None) == self._qk_norm:
            raise ValueError("q_norm and k_norm belong to a model with qk_norm, and only to it")
        if key_frame is not None and (not self._layout.quant_policy or key_frame.shape != (self._frame,)):
            raise ValueError(f"key_frame is {tuple(key_frame.shape)}; a quantized pool takes ({self._frame},), any other none")
        if parts is not None:
            check_parts("qkv's parts", parts, tokens, self._width)
        if tokens:
            self._library[self.variants[parts is not None]](
                tokens * self._groups, qkv, cos, sin, token_slots, positions, tables, tables.stride(0), pool, q_norm, k_norm,
                key_frame, eps, *(() if parts is None else part_arguments(parts)),
            )  # fmt: skip
