"""Logits -> ids on the card: `Sampler.sample` of `engine/sampler.py` (and `reference_edits`, `reference_distribution`).

Three kernels, each with one row of logits float32 [S, vocab] along the grid's y; `sampling.py` launches only those that a step needs.

    scan       edits in place (bias, penalties, masks), the largest key, its lowest id, and the largest key of every part; greedy
               rows are done
    draw       rows that are drawn: weights, top_k, top_p, min_p, the random number, the id
    logprobs   of the raw logits, of rows that ask; of prompt ids too

Layout, all on the card; rows of logits are `stride` numbers apart. `slot` of row r is sample_slots[r]; a row of `dummy` is
padding: only its out[r] is written.

    params     uint32 [slots + 1, WORDS]   the words named below, 64-bit ones in two, low first
    lists      int32 [slots + 1, width]    bias ids | bias, float32 | what would end the answer | where each bad word begins and
                                           the last ends | bad words; their lengths are in params
    seen       uint16 [slots + 1, vocab, padded to 8]   bit 15: in the prompt; bits 0 .. 14: times in the answer, 32,767 at most
    mask       uint32 [slots + 1, ceil(vocab / 32)]     bit i of word w: id 32 w + i may come; read where MASKED is set
    raw        float32 [S, vocab]   logits before the edits, of rows that want logprobs and have edits
    tops       uint32 [S, parts], sums int64 [S, parts]   largest key and weight of each part (sampling_select.py)
    partial    uint32 [S, splits, 2], best uint32 [S, 2]   (key, lowest id with it)
    arrivals   uint32 [S], zero between launches

Work split: `splits` thread blocks share a row, each `share` parts; a warp takes a part at a time. What they find meets in global
memory; the last to arrive (a counter, zeroed again by it) ends the row: merges and commits a greedy id, or selects and draws. So a
row of 128k logits is spread over the card when it is alone, and one thread block's work when there are many.

A row with NaN or +inf, or with nothing above -inf, gives BAD_LOGITS in `out`, one that the masks of CHOOSES left without an id
NOTHING_LEFT; both give id 0 in `ids`, and the slot's counts stay as they were.

Exactness: the arithmetic is that of engine/sampler_kernels.py, so ids are the CPU's for the same logits, with no exception for
rounding. `seen` saturates where the CPU counts on (32,767 times one id in one answer).

Portable: no instruction that compute capability 7.5 lacks.

Measured on an H200 (128,256 ids, copy of the ids included): greedy 14 / 23 / 62 us at 1 / 32 / 256 rows, temperature 24 / 41 / 165, top-k
with top-p 123 / 172 / 233. Shapes are parameters (threads of a block here, splits in sampling.py).
"""

from __future__ import annotations

from typing import Any

from engine.cuda import ptx
from engine.cuda.launch import Kernel
from engine.cuda.ptx import device_function
from engine.cuda.sampling_select import (
    ARENA_WORDS,
    BAD_KEY,
    BINS,
    FOUND,
    LEAST_CHUNKS,
    NEG_INF_KEY,
    PART_SUMS,
    TIES_BEFORE,
    TOPS,
    bin_of,
    checked,
    count_of_warp,
    count_scan_of_warp,
    i32,
    i64,
    key_of,
    largest_of_warp,
    load_i64,
    logit_of,
    philox,
    scan_of_warp,
    store_i64,
    sum_of_warp,
    tools,
    top_of,
    u32,
    u64,
    weight_of,
)
from engine.cuda.target import cuda, pointer, types
from engine.step import BAD_LOGITS, NOTHING_LEFT

f32, f64, u16 = types.float32, types.float64, types.uint16
U32S, I32S, I64S, F32S, U16S = pointer(u32), pointer(i32), pointer(i64), pointer(f32), pointer(u16)

# words of a row of params
FLAGS, POSITION, GENERATED, MIN_TOKENS, TOP_K, NUM_BIAS, NUM_ENDS, LOGPROBS = range(8)
INVERSE_TEMPERATURE, REPETITION, PRESENCE, FREQUENCY, SEED, TOP_P, LEAST, NUM_BAD = 8, 9, 10, 11, 12, 14, 16, 18
WORDS = 20
GREEDY, EDITED, PENALISED, MASKED, CHOOSES = 1, 2, 4, 8, 16  # flags

# words of a row of the logprobs kernel's answer; then `width` ids, then `width` logits
TOP_COUNT, RANK, TOTAL, HIGHEST, OWN = 0, 1, 2, 4, 5
UNUSABLE = 0xFFFFFFFF  # as TOP_COUNT: the row has NaN or +inf, or nothing above -inf
ANSWER_WORDS = 6
MOST_TOP = 128

IN_PROMPT, COUNTED = 0x8000, 0x7FFF
POS_INF, NEG_INF = f32(float("inf")), f32(float("-inf"))


@cuda.jit(device=True, inline="always")
def word_64(params: Any, at: Any, word: Any) -> Any:
    return u64(params[at + u64(word)]) | (u64(params[at + u64(word + 1)]) << u64(32))


@cuda.jit(device=True, inline="always")
def commit(
    row: Any, slot: Any, token: Any, dummy: Any, params: Any, seen: Any, seen_stride: Any, ids: Any, ids_stride: Any, out: Any
) -> None:
    """The id of a row, or what is wrong with it, into `out`, into the sequence, into the counts. One thread."""
    out[row] = token
    if slot != dummy:
        at = u64(slot) * u64(WORDS)
        position = params[at + u64(POSITION)]
        ids[u64(slot) * u64(ids_stride) + u64(position)] = max(token, i32(0))
        if token >= i32(0):
            params[at + u64(POSITION)] = position + u32(1)
            params[at + u64(GENERATED)] += u32(1)
            if params[at + u64(FLAGS)] & u32(PENALISED):
                place = u64(slot) * u64(seen_stride) + u64(token)
                count = u32(seen[place])
                if count & u32(COUNTED) < u32(COUNTED):
                    seen[place] = u16(count + u32(1))


@cuda.jit(device=True, inline="always")
def seen_width(vocab: Any) -> Any:
    return (vocab + i32(7)) & i32(~7)


@cuda.jit(device=True, inline="always")
def last_to_arrive(arrivals: Any, row: Any, splits: Any, flag: Any) -> Any:
    """True in the thread block that ends the row: all others have written what they had. Called by whole thread blocks."""
    cuda.syncthreads()
    if i32(cuda.threadIdx.x) == i32(0):
        last = u32(1)
        if splits > i32(1):
            ptx.fence_device()
            before = ptx.add_counter(ptx.address(arrivals) + u64(row) * u64(4), u32(1))
            last = u32(1) if before == u32(splits - i32(1)) else u32(0)
            if last:
                ptx.fence_device()
                arrivals[row] = u32(0)
        flag[0] = last
    cuda.syncthreads()
    return flag[0] != u32(0)


def scan(chunks: int, edits: bool, threads: int) -> Kernel:
    """Grid (splits, S)."""
    part, warps = 32 * chunks, threads // 32

    @cuda.jit(device=True, inline="always")
    def penalised(x: Any, count: Any, repetition: Any, presence: Any, frequency: Any) -> Any:
        if repetition != f32(1.0):
            x = ptx.divide_exact(x, repetition) if x > f32(0.0) else ptx.multiply_exact(x, repetition)
        times = f32(i32(count & u32(COUNTED)))
        x = ptx.subtract_exact(x, ptx.multiply_exact(frequency, times))
        return ptx.subtract_exact(x, presence if times > f32(0.0) else f32(0.0))

    @device_function(types.boolean, f32)
    def maskable(x: Any) -> Any:
        return x < POS_INF and x > NEG_INF

    @cuda.jit(device=True, inline="always")
    def edit(
        logits: Any, vocab: Any, base: Any, raw_base: Any, low: Any, high: Any, slot: Any, params: Any, at: Any, flags: Any,
        lists: Any, width: Any, seen: Any, mask: Any, raw: Any, ids: Any, ids_stride: Any,
    ) -> Any:  # fmt: skip
        """Ids low .. high - 1 of a row. -> whether this thread masked a number: NaN and +inf stay, to be found."""
        thread, list_at, removed = i32(cuda.threadIdx.x), u64(slot) * u64(width), False
        if i32(params[at + u64(LOGPROBS)]) >= i32(0):
            i = low + thread
            while i < high:
                raw[raw_base + u64(i)] = logits[base + u64(i)]
                i += i32(threads)
            cuda.syncthreads()
        i, n = thread, i32(params[at + u64(NUM_BIAS)])
        while i < n:
            token = lists[list_at + u64(i)]
            if token >= low and token < high:
                addend = ptx.float_of_bits(u32(lists[list_at + u64(n + i)]))
                logits[base + u64(token)] = ptx.add_exact(logits[base + u64(token)], addend)
            i += i32(threads)
        cuda.syncthreads()
        if flags & u32(PENALISED):
            repetition, presence = ptx.float_of_bits(params[at + u64(REPETITION)]), ptx.float_of_bits(params[at + u64(PRESENCE)])
            frequency = ptx.float_of_bits(params[at + u64(FREQUENCY)])
            i = low + thread
            while i < high:
                count = u32(seen[u64(slot) * u64(seen_width(vocab)) + u64(i)])
                if count:
                    logits[base + u64(i)] = penalised(logits[base + u64(i)], count, repetition, presence, frequency)
                i += i32(threads)
            cuda.syncthreads()
        if flags & u32(MASKED):
            i = low + thread
            while i < high:
                allowed = (mask[u64(slot) * u64((vocab + i32(31)) >> i32(5)) + u64(i >> i32(5))] >> u32(i & i32(31))) & u32(1)
                if not allowed and maskable(logits[base + u64(i)]):
                    logits[base + u64(i)], removed = NEG_INF, True
                i += i32(threads)
            cuda.syncthreads()
        list_at += u64(2 * n)
        generated, n = params[at + u64(GENERATED)], i32(params[at + u64(NUM_ENDS)])
        if generated < params[at + u64(MIN_TOKENS)]:
            i = thread
            while i < n:
                token = lists[list_at + u64(i)]
                if token >= low and token < high and maskable(logits[base + u64(token)]):
                    logits[base + u64(token)], removed = NEG_INF, True
                i += i32(threads)
            cuda.syncthreads()
        list_at += u64(n)
        i, n = thread, i32(params[at + u64(NUM_BAD)])
        answer_end = u64(slot) * u64(ids_stride) + u64(params[at + u64(POSITION)])
        while i < n:
            word, end = lists[list_at + u64(i)], lists[list_at + u64(i + i32(1))] - i32(1)
            words_at = list_at + u64(n + i32(1))
            token, length = lists[words_at + u64(end)], end - word  # of what goes before
            if token >= low and token < high and length <= i32(generated):
                j, same = i32(0), True
                while j < length and same:
                    same = ids[answer_end - u64(length - j)] == lists[words_at + u64(word + j)]
                    j += i32(1)
                if same and maskable(logits[base + u64(token)]):
                    logits[base + u64(token)], removed = NEG_INF, True
            i += i32(threads)
        cuda.syncthreads()
        return removed

    def kernel(  # type: ignore[no-untyped-def]
        logits, vocab, stride, sample_slots, dummy, share, params, lists, width, seen, mask, raw,
        partial, arrivals, tops, best, ids, ids_stride, out,
    ):  # fmt: skip
        thread, split, row, splits = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.gridDim.x)
        lane, warp = thread & i32(31), thread >> i32(5)
        keys = cuda.shared.array(32, u32)
        tokens = cuda.shared.array(32, u32)
        flag = cuda.shared.array(1, u32)
        slot = sample_slots[row]
        at = u64(slot) * u64(WORDS)
        flags = params[at + u64(FLAGS)]
        base = u64(row) * u64(stride)
        first = split * share
        parts = i32(u32(vocab + i32(part - 1)) // u32(part))
        last = min(first + share, parts)
        top_key, top_token = u32(NEG_INF_KEY), u32(0xFFFFFFFF)
        if edits:
            if flags & u32(EDITED):
                removed = edit(
                    logits, vocab, base, u64(row) * u64(vocab), first * i32(part), min(last * i32(part), vocab), slot, params, at, flags,
                    lists, width, seen, mask, raw, ids, ids_stride,
                )  # fmt: skip
                if removed and flags & u32(CHOOSES):
                    top_token = u32(0)  # where nothing above -inf is left, this says that masks took it
        row_at = ptx.address(logits) + base * u64(4)
        index = first + warp
        while index < last:
            largest = u32(0)
            x_of = cuda.local.array(chunks, f32)
            low = index * i32(part) + lane
            for chunk in range(chunks):  # all loads before the first use
                x_of[chunk] = ptx.load_f32(row_at + u64(min(low + i32(32 * chunk), vocab - i32(1))) * u64(4))
            for chunk in range(chunks):
                token = low + i32(32 * chunk)
                key = checked(key_of(x_of[chunk])) if token < vocab else u32(0)
                if key > top_key:
                    top_key, top_token = key, u32(token)
                largest = key if key > largest else largest
            if not flags & u32(GREEDY):
                largest = largest_of_warp(largest)
                if lane == i32(0):
                    tops[u64(row) * u64(parts) + u64(index)] = largest
            index += i32(warps)
        key = largest_of_warp(top_key)
        token = ~largest_of_warp(~top_token if top_key == key else u32(0))
        if lane == i32(0):
            keys[warp], tokens[warp] = key, token
        cuda.syncthreads()
        if warp == i32(0):
            key, token = u32(NEG_INF_KEY), u32(0xFFFFFFFF)
            if lane < i32(warps):
                key, token = keys[lane], tokens[lane]
            largest = largest_of_warp(key)
            token = ~largest_of_warp(~token if key == largest else u32(0))
            if lane == i32(0):
                place = (u64(row) * u64(splits) + u64(split)) * u64(2)
                partial[place], partial[place + u64(1)] = largest, token
        if last_to_arrive(arrivals, row, splits, flag) and warp == i32(0):
            top_key, top_token = u32(NEG_INF_KEY), u32(0xFFFFFFFF)
            other = lane
            while other < splits:
                place = (u64(row) * u64(splits) + u64(other)) * u64(2)
                key, token = partial[place], partial[place + u64(1)]
                if key > top_key:
                    top_key, top_token = key, token
                elif key == top_key and token < top_token:
                    top_token = token
                other += i32(32)
            key = largest_of_warp(top_key)
            token = ~largest_of_warp(~top_token if top_key == key else u32(0))
            bad = key == u32(BAD_KEY) or key == u32(NEG_INF_KEY)
            exhausted = key == u32(NEG_INF_KEY) and token == u32(0)
            if lane == i32(0):
                best[u64(row) * u64(2)], best[u64(row) * u64(2) + u64(1)] = u32(BAD_KEY) if bad else key, token
                if bad or flags & u32(GREEDY):
                    answer = i32(NOTHING_LEFT) if exhausted else (i32(BAD_LOGITS) if bad else i32(token))
                    commit(row, slot, answer, dummy, params, seen, seen_width(vocab), ids, ids_stride, out)

    arguments = (
        F32S, i32, i32, I32S, i32, i32, U32S, I32S, i32, U16S, U32S, F32S, U32S, U32S, U32S, U32S, I32S, i32, I32S,
    )  # fmt: skip
    return Kernel(kernel, arguments, threads, min_blocks=max(1, 1024 // threads) if chunks == LEAST_CHUNKS else 1)


def draw(chunks: int, threads: int) -> Kernel:
    """Grid (splits, S)."""
    row_tools = tools(chunks, threads)
    part, warps, parts_of = row_tools.part, row_tools.warps, row_tools.parts_of
    select, keep, scan_of_block = row_tools.select, row_tools.keep, row_tools.scan_of_block

    @cuda.jit(device=True, inline="always")
    def weigh(row_at: Any, vocab: Any, tops: Any, sums: Any, place: Any, first: Any, last: Any, highest: Any, inverse: Any) -> None:
        """The weight of parts first .. last - 1."""
        thread = i32(cuda.threadIdx.x)
        lane, index = thread & i32(31), first + (thread >> i32(5))
        while index < last:
            total = i64(0)
            if bin_of(logit_of(tops[place + u64(index)]), highest, inverse) < i32(BINS - 1):  # in the last bin are weights of 0
                x_of = cuda.local.array(chunks, f32)
                low = index * i32(part) + lane
                for chunk in range(chunks):
                    x_of[chunk] = ptx.load_f32(row_at + u64(min(low + i32(32 * chunk), vocab - i32(1))) * u64(4))
                for chunk in range(chunks):
                    if low + i32(32 * chunk) < vocab:
                        total += weight_of(x_of[chunk], highest, inverse)
                total = sum_of_warp(total)
            if lane == i32(0):
                sums[place + u64(index)] = total
            index += i32(warps)

    def kernel(  # type: ignore[no-untyped-def]
        logits, vocab, stride, sample_slots, dummy, share, params, seen, arrivals, tops, sums, best, ids, ids_stride, out
    ):
        thread, split, row, splits = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x), i32(cuda.blockIdx.y), i32(cuda.gridDim.x)
        lane = thread & i32(31)
        slot = sample_slots[row]
        at = u64(slot) * u64(WORDS)
        key = best[u64(row) * u64(2)]
        if params[at + u64(FLAGS)] & u32(GREEDY) or key == u32(BAD_KEY):
            return
        shared = cuda.shared.array(ARENA_WORDS, u32, alignment=16)
        arena = ptx.to_shared(ptx.generic_address(shared))
        flag = cuda.shared.array(1, u32)
        parts = parts_of(vocab)
        row_at, place = ptx.address(logits) + u64(row) * u64(stride) * u64(4), u64(row) * u64(parts)
        highest, inverse = logit_of(key), ptx.float_of_bits(params[at + u64(INVERSE_TEMPERATURE)])
        top_k = i64(params[at + u64(TOP_K)])
        if top_k == i64(0):
            first = split * share
            weigh(row_at, vocab, tops, sums, place, first, min(first + share, parts), highest, inverse)
        if not last_to_arrive(arrivals, row, splits, flag):
            return
        top_p = ptx.double_of_bits(word_64(params, at, TOP_P))
        least = i64(word_64(params, at, LEAST))
        index, whole = thread, i64(0)
        while index < parts:
            ptx.store_shared_32(arena + u32(TOPS) + u32(index) * u32(4), tops[place + u64(index)])
            own = sums[place + u64(index)] if top_k == i64(0) else i64(0)
            store_i64(arena + u32(PART_SUMS) + u32(index) * u32(8), own)
            ptx.store_shared_32(arena + u32(TIES_BEFORE) + u32(index) * u32(4), u32(0))
            whole += own
            index += i32(threads)
        _, total = scan_of_block(whole, arena)
        threshold, ties, stage = u32(0), i64(0), i32(0)
        while stage < i32(2):
            by_count = stage == i32(0)
            wanted = top_k > i64(0) if by_count else top_p < f64(1.0)
            if wanted:
                target = top_k if by_count else min(max(i64(ptx.ceiling(top_p * f64(total))), i64(1)), total)
                threshold, ties = select(row_at, vocab, arena, target, not by_count, highest, inverse)
            if wanted or (not by_count and least > i64(0)):
                floor = i64(0) if by_count else least
                total = keep(row_at, vocab, arena, threshold, ties, floor, highest, inverse)
            stage += i32(1)
        position = u64(params[at + u64(POSITION)])
        point = i64(ptx.multiply_high_64(philox(position, word_64(params, at, SEED)), u64(total)))
        before_all, start = i64(0), i32(0)
        while start < parts:
            index = start + thread
            own = i64(0)
            if index < parts:
                own = load_i64(arena + u32(PART_SUMS) + u32(index) * u32(8))
            before, chunk_total = scan_of_block(own, arena)
            before += before_all
            if before <= point and point < before + own:
                store_i64(arena + u32(FOUND + 16), i64(index))
                store_i64(arena + u32(FOUND + 24), before)
            before_all += chunk_total
            start += i32(threads)
        cuda.syncthreads()
        if thread < i32(32):
            index, running = i32(load_i64(arena + u32(FOUND + 16))), load_i64(arena + u32(FOUND + 24))
            ties -= i64(ptx.load_shared_32(arena + u32(TIES_BEFORE) + u32(index) * u32(4)))
            for chunk in range(chunks):
                token = index * i32(part) + i32(32 * chunk) + lane
                weight, equal = i64(0), u32(0)
                if token < vocab:
                    x = ptx.load_f32(row_at + u64(token) * u64(4))
                    own_key = key_of(x)
                    equal = u32(1) if own_key == threshold else u32(0)
                    weight = weight_of(x, highest, inverse) if own_key >= threshold else i64(0)
                rank = count_scan_of_warp(equal, lane)
                if weight < least or (equal and i64(rank) > ties):
                    weight = i64(0)
                ties -= i64(count_of_warp(equal))
                inclusive = running + scan_of_warp(weight, lane)
                if inclusive - weight <= point and point < inclusive:
                    commit(row, slot, token, dummy, params, seen, seen_width(vocab), ids, ids_stride, out)
                running = i64(ptx.shuffle_from_64(u64(inclusive), u32(31)))

    arguments = (F32S, i32, i32, I32S, i32, i32, U32S, U16S, U32S, U32S, I64S, U32S, I32S, i32, I32S)
    return Kernel(kernel, arguments, threads, min_blocks=max(1, 1024 // threads) if chunks == LEAST_CHUNKS else 1)


def logprobs(chunks: int, threads: int) -> Kernel:
    """Grid (1, S): a thread block a row. Of id chosen[row], or of none where that is negative; with counts[row] likeliest ids, or as
    many as its slot asks for where there are no counts."""
    row_tools = tools(chunks, threads)
    part, warps, parts_of = row_tools.part, row_tools.warps, row_tools.parts_of
    select, keep, scan_of_block = row_tools.select, row_tools.keep, row_tools.scan_of_block

    def kernel(logits, vocab, stride, raw, edited, sample_slots, params, chosen, counts, answer, width):  # type: ignore[no-untyped-def]
        thread, row = i32(cuda.threadIdx.x), i32(cuda.blockIdx.y)
        lane, warp = thread & i32(31), thread >> i32(5)
        own_token, flags = chosen[row], u32(0)
        if ptx.address(counts) == u64(0):
            at = u64(sample_slots[row]) * u64(WORDS)
            k, flags = i32(params[at + u64(LOGPROBS)]), params[at + u64(FLAGS)]
        else:
            k = counts[row]
        if k < i32(0) or own_token < i32(0):
            return
        shared = cuda.shared.array(ARENA_WORDS, u32, alignment=16)
        arena = ptx.to_shared(ptx.generic_address(shared))
        top_keys = cuda.shared.array(MOST_TOP, u32)
        top_tokens = cuda.shared.array(MOST_TOP, u32)
        tally = cuda.shared.array(1, u32)
        parts = parts_of(vocab)
        place = u64(row) * u64(i32(ANSWER_WORDS) + i32(2) * width)
        from_raw = edited != i32(0) and flags & u32(EDITED)
        raw_row = ptx.address(raw) + u64(row) * u64(vocab) * u64(4)
        row_at = raw_row if from_raw else ptx.address(logits) + u64(row) * u64(stride) * u64(4)
        index = warp
        while index < parts:
            largest = u32(0)
            x_of = cuda.local.array(chunks, f32)
            low = index * i32(part) + lane
            for chunk in range(chunks):
                x_of[chunk] = ptx.load_f32(row_at + u64(min(low + i32(32 * chunk), vocab - i32(1))) * u64(4))
            for chunk in range(chunks):
                key = checked(key_of(x_of[chunk]))
                largest = key if key > largest else largest
            largest = largest_of_warp(largest)
            if lane == i32(0):
                ptx.store_shared_32(arena + u32(TOPS) + u32(index) * u32(4), largest)
            index += i32(warps)
        if thread == i32(0):
            tally[0] = u32(0)
        cuda.syncthreads()
        largest, index = u32(0), lane
        while index < parts:
            top = top_of(arena, index)
            largest = top if top > largest else largest
            index += i32(32)
        largest = largest_of_warp(largest)
        if largest == u32(BAD_KEY) or largest == u32(NEG_INF_KEY):
            answer[place + u64(TOP_COUNT)] = u32(UNUSABLE)
            return
        highest = logit_of(largest)
        own_logit = ptx.load_f32(row_at + u64(own_token) * u64(4))
        own_key = key_of(own_logit)
        whole, ahead, index = i64(0), i64(0), warp
        while index < parts:
            x_of = cuda.local.array(chunks, f32)
            low = index * i32(part) + lane
            for chunk in range(chunks):
                x_of[chunk] = ptx.load_f32(row_at + u64(min(low + i32(32 * chunk), vocab - i32(1))) * u64(4))
            for chunk in range(chunks):
                token = low + i32(32 * chunk)
                if token < vocab:
                    key = key_of(x_of[chunk])
                    whole += weight_of(x_of[chunk], highest, f32(1.0))
                    ahead += i64(1) if key > own_key or (key == own_key and token < own_token) else i64(0)
            index += i32(warps)
        _, total = scan_of_block(whole, arena)
        _, rank = scan_of_block(ahead, arena)
        if k > i32(0):
            threshold, ties = select(row_at, vocab, arena, i64(k), False, highest, f32(1.0))
            keep(row_at, vocab, arena, threshold, ties, i64(0), highest, f32(1.0))
            cuda.syncthreads()
            index = warp
            while index < parts:
                if top_of(arena, index) >= threshold:
                    left = ties - i64(ptx.load_shared_32(arena + u32(TIES_BEFORE) + u32(index) * u32(4)))
                    for chunk in range(chunks):
                        token = index * i32(part) + i32(32 * chunk) + lane
                        key = u32(0)
                        if token < vocab:
                            key = key_of(ptx.load_f32(row_at + u64(token) * u64(4)))
                        equal = u32(1) if key == threshold else u32(0)
                        order = count_scan_of_warp(equal, lane)
                        kept = key > threshold or (key == threshold and i64(order) <= left)
                        if kept and key > u32(NEG_INF_KEY):
                            to = ptx.add_shared(ptx.to_shared(ptx.generic_address(tally)), u32(1))
                            top_keys[to], top_tokens[to] = key, u32(token)
                        left -= i64(count_of_warp(equal))
                index += i32(warps)
        cuda.syncthreads()
        n = i32(tally[0])
        if thread < n:
            key, own, order, other = top_keys[thread], top_tokens[thread], i32(0), i32(0)
            while other < n:
                before = top_keys[other] > key or (top_keys[other] == key and top_tokens[other] < own)
                order += i32(1) if before else i32(0)
                other += i32(1)
            answer[place + u64(ANSWER_WORDS) + u64(order)] = own
            answer[place + u64(i32(ANSWER_WORDS) + width) + u64(order)] = ptx.bits_of_float(logit_of(key))
        if thread == i32(0):
            answer[place + u64(TOP_COUNT)], answer[place + u64(RANK)] = u32(n), u32(rank)
            answer[place + u64(TOTAL)], answer[place + u64(TOTAL + 1)] = u32(total & i64(0xFFFFFFFF)), u32(total >> i64(32))
            answer[place + u64(HIGHEST)], answer[place + u64(OWN)] = ptx.bits_of_float(highest), ptx.bits_of_float(own_logit)

    return Kernel(
        kernel,
        (F32S, i32, i32, F32S, i32, I32S, U32S, I32S, I32S, U32S, i32),
        threads,
        min_blocks=max(1, 1024 // threads) if chunks == LEAST_CHUNKS else 1,
    )
