"""The tools of the sampling kernels: keys and weights of logits, sums and scans of a thread block, selection in a row.

`engine/sampler_kernels.py` says what they must compute: the same keys, the same integer weights (float32 arithmetic as
written, never contracted) and the same order (logit falling, then id rising), so that an id is the CPU's, bit for bit.
`tools(...)` makes device functions for one size of thread block; a vocabulary is an argument. Knows no slots and no parameters.

    key     uint32, orders as its float32 does; -0.0 counts as 0.0
    weight  int64, exp((x - highest) * inverse_temperature) in units of 2**-43
    part    `part` consecutive ids of a row, the share of one warp at a time; at most 1,024 parts, whose largest keys ("tops") let
            a pass skip what cannot matter
    bin     of 2,048: how far below the highest logit, in steps of 1/64 of a factor e of weight; rises as the key falls

Selection: the shortest prefix, in order, whose weight (or count) is at least a target. The bins of the tops bound it; the sums
of the bins of the ids in the remaining parts find the bin where it ends; three passes over that bin's ids, by 11, 11 and 10 bits
of the key, find the key where it ends. Sums are of integers, so it does not matter in which order atomics add them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.cuda import ptx
from engine.cuda.ptx import device_function
from engine.cuda.target import cuda, types

i32, i64, u32, u64, f32 = types.int32, types.int64, types.uint32, types.uint64, types.float32

MAX_PARTS = 1024
BINS = 2048
LEAST_CHUNKS = 8
MAX_VOCAB = 1 << 19  # parts of 16 chunks; sums of weights stay below 2**63
WEIGHT_BITS = 43
NEG_INF_KEY, POS_INF_KEY, ZERO_KEY = 0x007FFFFF, 0xFF800000, 0x80000000
BAD_KEY = 0xFFFFFFFF  # what NaN and +inf count as

_ONE = f32(1 << WEIGHT_BITS)
_LOG2E, _HALF, _LOWEST, _ZERO = f32(1.4426950408889634), f32(0.5), f32(-40.0), f32(0.0)
_LN2_HIGH, _LN2_LOW = f32(0.693359375), f32(-2.12194440054690583e-4)
_C0, _C2, _C3, _C4, _C5, _C6, _C7 = f32(1), f32(1 / 2), f32(1 / 6), f32(1 / 24), f32(1 / 120), f32(1 / 720), f32(1 / 5040)
_BIN_STEPS, _LAST_BIN = f32(64.0), f32(BINS - 1)

# shared memory of a thread block, byte offsets: its kernels declare ARENA_WORDS of uint32 and pass the address
BIN_SUMS, PART_SUMS, TIES_BEFORE, TOPS = 0, 8 * BINS, 8 * BINS + 8 * MAX_PARTS, 8 * BINS + 12 * MAX_PARTS
WARP_SUMS = TOPS + 4 * MAX_PARTS  # int64 [32]
FOUND = WARP_SUMS + 8 * 32  # int64 [4]
ARENA_WORDS = (FOUND + 8 * 4) // 4

I64_PAIR = types.UniTuple(i64, 2)
multiply, subtract, add = ptx.multiply_exact, ptx.subtract_exact, ptx.add_exact


def chunks_of(vocab: int) -> int:
    """How many times 32 ids a part has: what a warp loads at once."""
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} ids cannot be sampled; 1 to {MAX_VOCAB} can")
    return max(LEAST_CHUNKS, -(-vocab // (32 * MAX_PARTS)))


@device_function(u32, f32)
def key_of(x: Any) -> Any:
    bits = ptx.bits_of_float(x)
    return ~bits if bits > u32(ZERO_KEY) else bits | u32(ZERO_KEY)


@device_function(u32, u32)
def checked(key: Any) -> Any:
    """Every key that a row must not hold becomes the largest."""
    return u32(BAD_KEY) if key >= u32(POS_INF_KEY) or key < u32(NEG_INF_KEY) else key


@device_function(f32, u32)
def logit_of(key: Any) -> Any:
    return ptx.float_of_bits(key ^ u32(ZERO_KEY) if key >= u32(ZERO_KEY) else ~key)


@device_function(i64, f32, f32, f32)
def weight_of(x: Any, highest: Any, inverse_temperature: Any) -> Any:
    """`_weight` of engine/sampler_kernels.py, operation by operation."""
    y = multiply(subtract(x, highest), inverse_temperature)
    y = y if y > _LOWEST else _LOWEST
    n = i32(subtract(multiply(y, _LOG2E), _HALF))
    f = f32(n)
    r = subtract(subtract(y, multiply(f, _LN2_HIGH)), multiply(f, _LN2_LOW))
    p = add(_C6, multiply(r, _C7))
    p = add(_C5, multiply(r, p))
    p = add(_C4, multiply(r, p))
    p = add(_C3, multiply(r, p))
    p = add(_C2, multiply(r, p))
    p = add(_C0, multiply(r, p))
    p = add(_C0, multiply(r, p))
    return i64(multiply(p, _ONE)) >> i64(-n)


@device_function(i32, f32, f32, f32)
def bin_of(x: Any, highest: Any, inverse_temperature: Any) -> Any:
    """Each operation is monotone, rounding included, so a larger key never has a larger bin."""
    t = multiply(multiply(subtract(highest, x), inverse_temperature), _BIN_STEPS)
    return i32(t if t < _LAST_BIN else _LAST_BIN)


@device_function(u64, u64, u64)
def philox(position: Any, seed: Any) -> Any:
    """The low word of Philox4x32-10 at counter (position, 0): `philox` of engine/sampler_kernels.py."""
    word, shift = u64(0xFFFFFFFF), u64(32)
    c0, c1, c2, c3 = position & word, position >> shift, u64(0), u64(0)
    k0, k1 = seed & word, seed >> shift
    for _ in range(10):
        a, b = u64(0xD2511F53) * c0, u64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & word, (a >> shift) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + u64(0x9E3779B9)) & word, (k1 + u64(0xBB67AE85)) & word
    return c0 | (c1 << shift)


@device_function(i64, i64)
def sum_of_warp(value: Any) -> Any:
    """In every lane."""
    for step in (16, 8, 4, 2, 1):
        value += i64(ptx.shuffle_xor_64(u64(value), u32(step)))
    return value


@device_function(u32, u32)
def count_of_warp(value: Any) -> Any:
    """In every lane."""
    for step in (16, 8, 4, 2, 1):
        value += ptx.shuffle_xor(value, u32(step))
    return value


@device_function(u32, u32)
def largest_of_warp(value: Any) -> Any:
    """In every lane."""
    for step in (16, 8, 4, 2, 1):
        other = ptx.shuffle_xor(value, u32(step))
        value = other if other > value else value
    return value


@device_function(i64, i64, i32)
def scan_of_warp(value: Any, lane: Any) -> Any:
    """The sum of lanes 0 .. lane."""
    for step in (1, 2, 4, 8, 16):
        other = i64(ptx.shuffle_up_64(u64(value), u32(step)))
        value += other if lane >= i32(step) else i64(0)
    return value


@device_function(u32, u32, i32)
def count_scan_of_warp(value: Any, lane: Any) -> Any:
    """The sum of lanes 0 .. lane."""
    for step in (1, 2, 4, 8, 16):
        other = ptx.shuffle_up(value, u32(step))
        value += other if lane >= i32(step) else u32(0)
    return value


@device_function(i64, u32)
def load_i64(at: Any) -> Any:
    """Of shared memory."""
    low, high = ptx.load_shared_64(at)
    return i64(u64(low) | (u64(high) << u64(32)))


@device_function(types.void, u32, i64)
def store_i64(at: Any, value: Any) -> None:
    ptx.store_shared_64(at, u32(value & i64(0xFFFFFFFF)), u32(value >> i64(32)))


@device_function(u32, u32, i32)
def top_of(arena: Any, index: Any) -> Any:
    """The largest key of a part."""
    return ptx.load_shared_32(arena + u32(TOPS) + u32(index) * u32(4))


@device_function(types.void, u32, i32, i64)
def add_to_bin(arena: Any, index: Any, amount: Any) -> None:
    """A 64-bit sum as two 32-bit atomics: whoever makes the low word wrap carries into the high one."""
    at = arena + u32(BIN_SUMS) + u32(index) * u32(8)
    low, high = u32(amount & i64(0xFFFFFFFF)), u32(amount >> i64(32))
    before = ptx.add_shared(at, low)
    if u32(before + low) < low:
        high += u32(1)
    if high:
        ptx.add_shared(at + u32(4), high)


def tools(chunks: int, threads: int) -> SimpleNamespace:
    """Device functions over one row for thread blocks of `threads`, all of which must call them together. `row`: the global
    address of its `vocab` logits; `arena`: the shared address of ARENA_WORDS words, the tops of the row in it."""
    part, warps = 32 * chunks, threads // 32
    per_thread = BINS // threads
    last_warp = warps - 1

    @device_function(i32, i32)
    def parts_of(vocab: Any) -> Any:
        return i32(u32(vocab + i32(part - 1)) // u32(part))

    @device_function(I64_PAIR, i64, u32)
    def scan_of_block(value: Any, arena: Any) -> Any:
        """int64 of each thread -> (the sum of the threads before it, the sum of all)."""
        thread = i32(cuda.threadIdx.x)
        lane, warp = thread & i32(31), thread >> i32(5)
        inclusive = scan_of_warp(value, lane)
        cuda.syncthreads()  # the sums of the last call may still be read
        if lane == i32(31):
            store_i64(arena + u32(WARP_SUMS) + u32(warp) * u32(8), inclusive)
        cuda.syncthreads()
        own = load_i64(arena + u32(WARP_SUMS) + u32(min(lane, i32(last_warp))) * u32(8))
        own = own if lane <= i32(last_warp) else i64(0)
        whole = scan_of_warp(own, lane)
        before = i64(ptx.shuffle_from_64(u64(whole - own), u32(warp)))
        return before + inclusive - value, i64(ptx.shuffle_from_64(u64(whole), u32(last_warp)))

    @device_function(types.void, u32)
    def clear(arena: Any) -> None:
        thread = i32(cuda.threadIdx.x)
        cuda.syncthreads()
        i = thread
        while i < i32(BINS):
            ptx.store_shared_64(arena + u32(BIN_SUMS) + u32(i) * u32(8), u32(0), u32(0))
            i += i32(threads)
        cuda.syncthreads()

    @device_function(I64_PAIR, u32, i64)
    def crossing(arena: Any, target: Any) -> Any:
        """-> (the first bin at which the running sum reaches the target, the sum before it); (BINS, ..) where it never does."""
        own_bins = arena + u32(BIN_SUMS) + u32(cuda.threadIdx.x) * u32(8 * per_thread)
        cuda.syncthreads()
        own = i64(0)
        for i in range(per_thread):
            own += load_i64(own_bins + u32(8 * i))
        before, total = scan_of_block(own, arena)
        if before < target and target <= before + own:
            for i in range(per_thread):
                value = load_i64(own_bins + u32(8 * i))
                if before < target and target <= before + value:
                    store_i64(arena + u32(FOUND), i64(cuda.threadIdx.x) * i64(per_thread) + i64(i))
                    store_i64(arena + u32(FOUND + 8), before)
                before += value
        if total < target:
            return i64(BINS), total
        cuda.syncthreads()
        return load_i64(arena + u32(FOUND)), load_i64(arena + u32(FOUND + 8))

    @device_function(types.void, u64, i32, i32, u32, i64, u32, i32, u32, types.boolean, f32, f32)
    def add_part(
        row: Any,
        vocab: Any,
        index: Any,
        arena: Any,
        edge: Any,
        prefix: Any,
        level: Any,
        shift: Any,
        weighted: Any,
        highest: Any,
        inverse: Any,
    ) -> None:
        """The ids of a part that match, into the bins: level 0 by bin up to `edge`, then those of bin `edge` by digits of the key."""
        lane = i32(cuda.threadIdx.x) & i32(31)
        mask = u32(1023) if level == i32(3) else u32(2047)
        width = u32(10) if level == i32(3) else u32(11)
        x_of = cuda.local.array(chunks, f32)
        first = index * i32(part) + lane
        for chunk in range(chunks):  # all loads before the first use
            x_of[chunk] = ptx.load_f32(row + u64(min(first + i32(32 * chunk), vocab - i32(1))) * u64(4))
        for chunk in range(chunks):
            if first + i32(32 * chunk) < vocab:
                x = x_of[chunk]
                place = bin_of(x, highest, inverse)
                if level == i32(0):
                    wanted = place <= i32(edge)
                else:
                    key = key_of(x)
                    over = key >> (shift + width) if level > i32(1) else u32(0)
                    wanted = place == i32(edge) and over == prefix
                    place = i32(mask - ((key >> shift) & mask))
                if wanted:
                    add_to_bin(arena, place, weight_of(x, highest, inverse) if weighted else i64(1))

    @device_function(types.Tuple((u32, i64)), u64, i32, u32, i64, types.boolean, f32, f32)
    def select(row: Any, vocab: Any, arena: Any, target: Any, weighted: Any, highest: Any, inverse: Any) -> Any:
        """-> (key, ids with it) where the shortest prefix of at least `target` (1 .. the row's) ends."""
        thread = i32(cuda.threadIdx.x)
        warp, parts = thread >> i32(5), parts_of(vocab)
        clear(arena)
        index = thread
        while index < parts:
            x = logit_of(top_of(arena, index))
            add_to_bin(arena, bin_of(x, highest, inverse), weight_of(x, highest, inverse) if weighted else i64(1))
            index += i32(threads)
        edge, _ = crossing(arena, target)
        edge = min(edge, i64(BINS - 1))  # the prefix ends in this bin or before it
        above, prefix, level = i64(0), u32(0), i32(0)
        while level < i32(4):
            clear(arena)
            shift = u32(21) if level == i32(1) else (u32(10) if level == i32(2) else u32(0))
            index = warp
            while index < parts:
                if i64(bin_of(logit_of(top_of(arena, index)), highest, inverse)) <= edge:
                    add_part(row, vocab, index, arena, edge, prefix, level, shift, weighted, highest, inverse)
                index += i32(warps)
            place, before = crossing(arena, target - above)
            above += before
            if level == i32(0):
                edge = place
            else:
                mask = u32(1023) if level == i32(3) else u32(2047)
                prefix = (prefix << (u32(10) if level == i32(3) else u32(11))) | (mask - u32(place))
            level += i32(1)
        ties = target - above
        if weighted:
            each = max(weight_of(logit_of(prefix), highest, inverse), i64(1))
            ties = (ties + each - i64(1)) // each
        return prefix, ties

    @device_function(i64, u64, i32, u32, u32, i64, i64, f32, f32)
    def keep(row: Any, vocab: Any, arena: Any, key: Any, ties: Any, least: Any, highest: Any, inverse: Any) -> Any:
        """-> the weight of the kept ids: those with a larger key and the first `ties` with this one, if not lighter than `least`.

        Leaves the weight of each part at PART_SUMS, and the number of equal keys before it at TIES_BEFORE.
        """
        thread = i32(cuda.threadIdx.x)
        lane, index, parts = thread & i32(31), thread >> i32(5), parts_of(vocab)
        cuda.syncthreads()
        while index < parts:
            total, equal = i64(0), u32(0)
            if top_of(arena, index) >= key:
                x_of = cuda.local.array(chunks, f32)
                first = index * i32(part) + lane
                for chunk in range(chunks):
                    x_of[chunk] = ptx.load_f32(row + u64(min(first + i32(32 * chunk), vocab - i32(1))) * u64(4))
                for chunk in range(chunks):
                    if first + i32(32 * chunk) < vocab:
                        own = key_of(x_of[chunk])
                        weight = weight_of(x_of[chunk], highest, inverse)
                        total += weight if own > key and weight >= least else i64(0)
                        equal += u32(1) if own == key else u32(0)
                total, equal = sum_of_warp(total), count_of_warp(equal)
            if lane == i32(0):
                store_i64(arena + u32(PART_SUMS) + u32(index) * u32(8), total)
                ptx.store_shared_32(arena + u32(TIES_BEFORE) + u32(index) * u32(4), equal)
            index += i32(warps)
        cuda.syncthreads()
        each = weight_of(logit_of(key), highest, inverse) if ties > i64(0) else i64(0)
        each = each if each >= least else i64(0)
        whole, before_all, start = i64(0), i64(0), i32(0)
        while start < parts:
            index = start + thread
            equal_at = arena + u32(TIES_BEFORE) + u32(index) * u32(4)
            own = i64(0)
            if index < parts:
                own = i64(ptx.load_shared_32(equal_at))
            before, found = scan_of_block(own, arena)
            before += before_all
            if index < parts:
                ptx.store_shared_32(equal_at, u32(before))
                sum_at = arena + u32(PART_SUMS) + u32(index) * u32(8)
                weight = load_i64(sum_at) + min(max(ties - before, i64(0)), own) * each
                store_i64(sum_at, weight)
                whole += weight
            before_all += found
            start += i32(threads)
        _, kept = scan_of_block(whole, arena)
        return kept

    return SimpleNamespace(part=part, warps=warps, parts_of=parts_of, scan_of_block=scan_of_block, select=select, keep=keep)
