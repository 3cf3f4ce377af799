"""The loops of the sampler, in Numba: one row of logits -> one id, in a few passes and without a sort.

Nothing here knows of sequences or slots. Probabilities are *integer weights*, exp((x - max) / temperature) in units
of 2**-43: sums of integers do not depend on their order, so an answer cannot depend on vector width, block size or
batch-mates, and the one random number of a row selects an id exactly.

    key      int32, orders as the float32 it stands for; -0.0 counts as 0.0, NaN lies outside -inf .. +inf
    order    (logit descending, id ascending): which ids top_k and top_p keep
    draw     over the kept ids in ascending id: the first id whose running weight exceeds random64 * total / 2**64

Random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
Code generation: no fastmath, no contraction; the results are those of the written operations on every CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray

BLOCK = 64  # ids whose largest key (or summed weight) is kept, so that later passes skip what cannot matter
WEIGHT_BITS = 43  # of weight 1.0; with fewer than 2**20 ids the sum stays below 2**63
MAX_VOCAB = (1 << 20) - 1
KEY_POS_INF = 0x7F800000
KEY_NEG_INF = -0x7F800001
NO_ID = -1  # a row with NaN, with +inf, or with nothing but -inf

_FLIP = np.int32(0x7FFFFFFF)
_NEG_ZERO = np.int32(-0x80000000)
_ONE = np.float32(1 << WEIGHT_BITS)
_LOG2E = np.float32(1.4426950408889634)
_HALF = np.float32(0.5)
_LOWEST = np.float32(-40.0)  # exp(-40) is less than one unit of weight
_LN2_HIGH = np.float32(0.693359375)  # n * _LN2_HIGH is exact for |n| < 2**15
_LN2_LOW = np.float32(-2.12194440054690583e-4)
_C0 = np.float32(1.0)
_C2 = np.float32(1 / 2)
_C3 = np.float32(1 / 6)
_C4 = np.float32(1 / 24)
_C5 = np.float32(1 / 120)
_C6 = np.float32(1 / 720)
_C7 = np.float32(1 / 5040)
_U32 = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_PHILOX_M0 = np.uint64(0xD2511F53)
_PHILOX_M1 = np.uint64(0xCD9E8D57)
_PHILOX_W0 = np.uint64(0x9E3779B9)
_PHILOX_W1 = np.uint64(0xBB67AE85)
_LEVELS = ((21, 11), (10, 11), (0, 10))  # radix digits of a key: (shift, bits), most significant first
_BINS = 1 << 11


class Knobs(NamedTuple):
    """Of every slot of the persistent batch, what its row needs when it is sampled."""

    greedy: np.ndarray  # uint8
    inverse_temperature: np.ndarray  # float32
    top_k: np.ndarray  # int64, 0: off
    top_p: np.ndarray  # float64, 1: off
    min_p: np.ndarray  # float64, 0: off
    seeds: np.ndarray  # uint64
    positions: np.ndarray  # int64: position of the id to be sampled


class Scratch(NamedTuple):
    """Memory of one sampler, made once."""

    block_max: np.ndarray  # int32 [V / BLOCK]
    block_sum: np.ndarray  # int64 [V / BLOCK]
    block_top: np.ndarray  # int64 [V / BLOCK]: the largest weight
    weights: np.ndarray  # int64 [V]
    ones: np.ndarray  # int64 [V], all 1: weights for selecting by count
    ids: np.ndarray  # int32 [V]: the candidates, ascending
    keys: np.ndarray  # int32 [V]: theirs
    picked: np.ndarray  # int64 [V]: their weights
    bins: np.ndarray  # int64 [2048]


def make_scratch(vocab_size: int) -> Scratch:
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab_size} ids cannot be sampled; 1 to {MAX_VOCAB} can.")
    blocks = -(-vocab_size // BLOCK)
    return Scratch(
        np.zeros(blocks, np.int32), np.zeros(blocks, np.int64), np.zeros(blocks, np.int64),
        np.zeros(vocab_size, np.int64), np.ones(vocab_size, np.int64),
        np.zeros(vocab_size, np.int32), np.zeros(vocab_size, np.int32), np.zeros(vocab_size, np.int64), np.zeros(_BINS, np.int64),
    )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _key(bits: int) -> int:  # int32 pattern of a float32 -> int32 that orders as the number does
    flipped = np.int32(bits ^ ((bits >> np.int32(31)) & _FLIP))
    return np.int32(0) if bits == _NEG_ZERO else flipped


@njit(cache=True, nogil=True)
def scan(bits: Array, block_max: Array) -> tuple[int, int]:
    """One pass: the largest key of each block, -> (largest, smallest) key of the row."""
    vocab = len(bits)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for block in range(len(block_max)):
        start = block * BLOCK
        part = bits[start : min(start + BLOCK, vocab)]
        block_low, block_high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(len(part)):
            key = _key(part[i])
            block_low = min(block_low, key)
            block_high = max(block_high, key)
        block_max[block] = block_high
        low = min(low, block_low)
        high = max(high, block_high)
    return high, low


@njit(cache=True, nogil=True)
def _unusable(high: int, low: int) -> bool:
    return high >= KEY_POS_INF or high <= KEY_NEG_INF or low < KEY_NEG_INF


@njit(cache=True, nogil=True)
def _first_of_key(bits: Array, block_max: Array, key: int) -> int:
    """The lowest id with this key (there is one)."""
    block = 0
    while block_max[block] < key:
        block += 1
    i = block * BLOCK
    while _key(bits[i]) != key:
        i += 1
    return i


@njit(cache=True, nogil=True, inline="always")
def _weight(x: float, highest: float, inverse_temperature: float) -> int:
    """exp((x - highest) * inverse_temperature) in units of 2**-43; x <= highest, -inf allowed.

    exp(y) = 2**n exp(r) with |r| <= ln2 / 2 and exp(r) by its Taylor series to r**7 (relative error below 1e-7).
    """
    y = max((x - highest) * inverse_temperature, _LOWEST)
    n = np.int32(y * _LOG2E - _HALF)  # rounds to nearest: y <= 0 and casts truncate
    f = np.float32(n)
    r = (y - f * _LN2_HIGH) - f * _LN2_LOW
    p = _C6 + r * _C7
    p = _C5 + r * p
    p = _C4 + r * p
    p = _C3 + r * p
    p = _C2 + r * p
    p = _C0 + r * p
    p = _C0 + r * p
    return np.int64(p * _ONE) >> np.int64(-n)


@njit(cache=True, nogil=True)
def weigh(row: Array, highest: float, inverse_temperature: float, scratch: Scratch) -> int:
    """One pass: the weight of every id, the sum and the largest of every block; -> the weight of all."""
    vocab = len(row)
    total = np.int64(0)
    for block in range(len(scratch.block_sum)):
        start = block * BLOCK
        stop = min(start + BLOCK, vocab)
        part, out = row[start:stop], scratch.weights[start:stop]
        summed, top = np.int64(0), np.int64(0)
        for i in range(len(part)):
            weight = _weight(part[i], highest, inverse_temperature)
            out[i] = weight
            summed += weight
            top = max(top, weight)
        scratch.block_sum[block] = summed
        scratch.block_top[block] = top
        total += summed
    return total


@njit(cache=True, nogil=True)
def _threshold(keys: Array, weights: Array, n: int, target: int, bins: Array) -> tuple[int, int]:
    """Where the shortest prefix, in order, whose weight is at least `target` ends: -> (key, entries with that key).

    The prefix is every entry with a larger key and the first so many with this one. 1 <= target <= weight of all.
    A radix selection: three counting passes, whatever the values are.
    """
    above = np.int64(0)
    prefix = np.int64(0)
    for shift, width in _LEVELS:
        bins[:] = 0
        for i in range(n):
            unsigned = np.int64(keys[i]) + 0x80000000
            if unsigned >> (shift + width) == prefix:
                bins[(unsigned >> shift) & ((1 << width) - 1)] += weights[i]
        digit = (1 << width) - 1
        while above + bins[digit] < target:
            above += bins[digit]
            digit -= 1
        prefix = (prefix << width) | digit
    key = prefix - 0x80000000
    ties = 0
    for i in range(n):
        if keys[i] == key:
            above += weights[i]
            ties += 1
            if above >= target:
                break
    return key, ties


@njit(cache=True, nogil=True)
def _keep(scratch: Scratch, n: int, key: int, ties: int) -> int:
    """Drop candidates beyond a threshold, in place; -> how many are left."""
    kept = 0
    for i in range(n):
        equal = scratch.keys[i] == key
        if scratch.keys[i] > key or (equal and ties > 0):
            ties -= equal
            scratch.ids[kept] = scratch.ids[i]
            scratch.keys[kept] = scratch.keys[i]
            scratch.picked[kept] = scratch.picked[i]
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def _gather(bits: Array, floor: int, scratch: Scratch) -> int:
    """The ids whose key is at least `floor` become the candidates; needs `scan`'s block_max. -> how many."""
    n = 0
    for block in range(len(scratch.block_max)):
        if scratch.block_max[block] >= floor:
            start = block * BLOCK
            for i in range(start, min(start + BLOCK, len(bits))):
                key = _key(bits[i])
                scratch.ids[n] = i
                scratch.keys[n] = key
                n += key >= floor  # without a branch: on a flat row every second one would be mispredicted
    return n


@njit(cache=True, nogil=True)
def _gather_heavy(bits: Array, least: int, scratch: Scratch) -> int:
    """The ids whose weight is at least `least` become the candidates; needs `weigh`'s weights. -> how many."""
    n = 0
    for block in range(len(scratch.block_top)):
        if scratch.block_top[block] >= least:
            start = block * BLOCK
            for i in range(start, min(start + BLOCK, len(bits))):
                scratch.ids[n] = i
                scratch.keys[n] = _key(bits[i])
                n += scratch.weights[i] >= least
    return n


@njit(cache=True, nogil=True)
def _gather_top(bits: Array, k: int, scratch: Scratch) -> int:
    """The k first ids in order (fewer where fewer are above -inf) become the candidates. -> how many."""
    blocks = len(scratch.block_max)
    floor = np.int64(KEY_NEG_INF + 1)
    if k < blocks:  # k blocks reach the k-th largest of the block maxima, so the k-th largest key is not below it
        floor = max(floor, _threshold(scratch.block_max, scratch.ones, blocks, k, scratch.bins)[0])
    n = _gather(bits, floor, scratch)
    if k < n:
        key, ties = _threshold(scratch.keys, scratch.ones, n, k, scratch.bins)
        n = _keep(scratch, n, key, ties)
    return n


@njit(cache=True, nogil=True)
def _gather_nucleus(bits: Array, total: int, target: int, scratch: Scratch) -> int:
    """Candidates that hold the shortest prefix weighing `target`: few where a few ids weigh much. -> how many."""
    blocks = len(scratch.block_top)
    tops = np.int64(0)
    for block in range(blocks):
        tops += scratch.block_top[block]
    if tops >= target:  # the block maxima down to some key weigh enough, so all ids down to it do
        key, _ = _threshold(scratch.block_max, scratch.block_top, blocks, target, scratch.bins)
        return _gather(bits, key, scratch)
    least = max((total - target) // len(bits), np.int64(1))  # ids lighter than this weigh at most total - target together
    while True:
        heavy = np.int64(0)
        for i in range(len(bits)):
            heavy += scratch.weights[i] if scratch.weights[i] >= 2 * least else 0
        if heavy < target:
            return _gather_heavy(bits, least, scratch)
        least = 2 * least


@njit(cache=True, nogil=True)
def philox(counter: tuple[int, int], key: int) -> tuple[int, int]:
    """Philox4x32-10: a counter of two 64-bit words (low, high) and a 64-bit key -> two random 64-bit words (low, high)."""
    c0, c1 = counter[0] & _U32, counter[0] >> _SHIFT
    c2, c3 = counter[1] & _U32, counter[1] >> _SHIFT
    k0, k1 = key & _U32, key >> _SHIFT
    for _ in range(10):
        product0, product1 = _PHILOX_M0 * c0, _PHILOX_M1 * c2
        c0, c1, c2, c3 = (product1 >> _SHIFT) ^ c1 ^ k0, product1 & _U32, (product0 >> _SHIFT) ^ c3 ^ k1, product0 & _U32
        k0, k1 = (k0 + _PHILOX_W0) & _U32, (k1 + _PHILOX_W1) & _U32
    return c0 | (c1 << _SHIFT), c2 | (c3 << _SHIFT)


@njit(cache=True, nogil=True)
def _mul_high(a: int, b: int) -> int:
    """The upper 64 bits of a 64 x 64 bit product."""
    a0, a1, b0, b1 = a & _U32, a >> _SHIFT, b & _U32, b >> _SHIFT
    middle = a1 * b0 + ((a0 * b0) >> _SHIFT)
    return a1 * b1 + (middle >> _SHIFT) + ((a0 * b1 + (middle & _U32)) >> _SHIFT)


@njit(cache=True, nogil=True)
def _point(seed: int, position: int, total: int) -> int:
    """The random weight of a row, 0 .. total - 1: a function of seed and position only."""
    low, _ = philox((np.uint64(position), np.uint64(0)), seed)
    return np.int64(_mul_high(low, np.uint64(total)))


@njit(cache=True, nogil=True)
def _walk(weights: Array, start: int, point: int) -> int:
    """The first index from `start` at which the running weight exceeds `point`."""
    i = start
    while point >= weights[i]:
        point -= weights[i]
        i += 1
    return i


@njit(cache=True, nogil=True)
def _draw(row: Array, bits: Array, high: int, knobs: Knobs, slot: int, scratch: Scratch) -> int:
    """One id of a usable row, from the distribution that temperature, top_k, top_p and min_p leave."""
    highest = row[_first_of_key(bits, scratch.block_max, high)]
    inverse_temperature = knobs.inverse_temperature[slot]
    top_k, top_p, min_p = knobs.top_k[slot], knobs.top_p[slot], knobs.min_p[slot]
    seed, position = knobs.seeds[slot], knobs.positions[slot]
    least = np.int64(np.ceil(min_p * (np.int64(1) << WEIGHT_BITS)))  # the most likely id weighs 2**WEIGHT_BITS
    if 0 < top_k < len(row):
        n = _gather_top(bits, top_k, scratch)
        total = np.int64(0)
        for i in range(n):
            scratch.picked[i] = _weight(row[scratch.ids[i]], highest, inverse_temperature)
            total += scratch.picked[i]
    else:
        total = weigh(row, highest, inverse_temperature, scratch)
        if top_p >= 1.0 and least == 0:
            return _draw_of_all(_point(seed, position, total), scratch)
        n = _gather_nucleus(bits, total, _share(top_p, total), scratch) if top_p < 1.0 else _gather_heavy(bits, least, scratch)
        for i in range(n):
            scratch.picked[i] = scratch.weights[scratch.ids[i]]
    if top_p < 1.0:
        target = min(_share(top_p, total), scratch.picked[:n].sum())
        key, ties = _threshold(scratch.keys, scratch.picked, n, target, scratch.bins)
        n = _keep(scratch, n, key, ties)
    total = np.int64(0)
    for i in range(n):
        if scratch.picked[i] < least:
            scratch.picked[i] = 0
        total += scratch.picked[i]
    return np.int64(scratch.ids[_walk(scratch.picked, 0, _point(seed, position, total))])


@njit(cache=True, nogil=True)
def _share(top_p: float, total: int) -> int:
    """The weight that the ids kept by top_p must reach."""
    return min(max(np.int64(np.ceil(top_p * total)), np.int64(1)), total)


@njit(cache=True, nogil=True)
def _draw_of_all(point: int, scratch: Scratch) -> int:
    block = 0
    while point >= scratch.block_sum[block]:
        point -= scratch.block_sum[block]
        block += 1
    return _walk(scratch.weights, block * BLOCK, point)


@njit(cache=True, nogil=True)
def sample_rows(logits: Array, bits: Array, slots: Array, knobs: Knobs, scratch: Scratch, out: Array) -> None:
    """Row i of logits [S, V] (bits: the same memory as int32) is sampled as slot `slots[i]` says, into out[i]."""
    for i in range(len(slots)):
        high, low = scan(bits[i], scratch.block_max)
        if _unusable(high, low):
            out[i] = NO_ID
        elif knobs.greedy[slots[i]]:
            out[i] = _first_of_key(bits[i], scratch.block_max, high)
        else:
            out[i] = _draw(logits[i], bits[i], high, knobs, slots[i], scratch)


@njit(cache=True, nogil=True)
def row_logprobs(row: Array, bits: Array, chosen: int, k: int, scratch: Scratch, top_ids: Array) -> tuple[float, float, int, int]:
    """Of a usable row: -> (highest logit, log of sum of exp(x - highest), rank of `chosen`, top_ids filled).

    At most k ids, in order; ids at -inf are left out.
    """
    high, _ = scan(bits, scratch.block_max)
    highest = row[_first_of_key(bits, scratch.block_max, high)]
    total = weigh(row, highest, np.float32(1), scratch)
    own = _key(bits[chosen])
    rank = 0
    for i in range(len(bits)):
        key = _key(bits[i])
        rank += (key > own) or (key == own and i < chosen)
    n = _gather_top(bits, k, scratch) if k > 0 else 0
    for i in range(n):  # insertion sort: k is small, and equal keys stay in ascending id
        key, token = scratch.keys[i], scratch.ids[i]
        j = i
        while j > 0 and scratch.keys[j - 1] < key:
            scratch.keys[j] = scratch.keys[j - 1]
            top_ids[j] = top_ids[j - 1]
            j -= 1
        scratch.keys[j] = key
        top_ids[j] = token
    return highest, np.log(np.float64(total)) - WEIGHT_BITS * np.log(2.0), rank, n
