"""Who computes which part of a decode step's attention: one small launch a step, before the first layer. Knows no K or V.

A row's positions from `base` to its context are cut into at most `few` sections of whole strips of `strip` positions, or into
more, at most `sections`, where those would be long (LONG strips): by the row's context and constants alone, so that what a row's
answer is summed from never depends on its batch. Work is then dealt out in shares of equal cost, whole sections each; a share
is what one thread block computes of one KV head.

    contexts, row_slots  int32 [R]
    shares  int32 [most_shares, 4]   first row, its first section, last row, the section of it to stop before; an empty share
                                     has its last row before its first
    rows    int32 [R, 8]             slot, base, low (first visible position), stop (context), strips a section, sections,
                                     first share that has sections of it, strips

Work split: one thread block; thread i takes rows i * n .. i * n + n - 1 for the prefix sums, then shares i, i + threads ..
Costs are strips, and ROW_COST more for a row.

Measured on an H200: 2.5 us at 1 sequence, 2.8 at 64, 5.1 at 256; once a step.
"""

from __future__ import annotations

from engine.cuda import ptx
from engine.cuda.launch import Kernel
from engine.cuda.target import cuda, pointer, types

THREADS = 256
ROW_COST = 1  # strips: a row's beginning and end cost about as much as one
LONG = 8  # strips of a section
ROW_INTS, SHARE_INTS = 8, 4
i32, u32 = types.int32, types.uint32
INTS = pointer(i32)


def decode_schedule(strip: int, sections: int, few: int, window: int, most_shares: int, max_rows: int) -> Kernel:
    """(contexts, row_slots, R, shares, rows); window 0: none."""
    threads = THREADS
    costs_at = 0  # costs of all rows before r; then their sections; then sums of threads; then where shares start
    counts_at = max_rows + 1
    sums_at = 2 * (max_rows + 1)
    starts_at = sums_at + 4 * threads
    words = starts_at + 3 * (most_shares + 1)
    rounds = tuple(1 << i for i in range(threads.bit_length() - 1))

    @cuda.jit(device=True, inline="always")
    def over(a, b):  # type: ignore[no-untyped-def]
        """a // b of numbers that are not negative: no 64-bit division."""
        return i32(u32(a) // u32(b))

    def kernel(contexts, row_slots, num_rows, shares, rows):  # type: ignore[no-untyped-def]
        ptx.after_previous()
        shared = cuda.shared.array(0, i32)
        thread = i32(cuda.threadIdx.x)
        each = over(i32(num_rows + i32(threads - 1)), i32(threads))
        first = i32(min(i32(thread * each), num_rows))
        stop = i32(min(i32(first + each), num_rows))
        cost = i32(0)
        count = i32(0)
        row = first
        while row < stop:
            context = contexts[row]
            low = i32(0)
            if window > 0 and context > i32(window):
                low = i32(context - i32(window))
            base = i32(over(low, i32(strip)) * i32(strip))
            strips = over(i32(i32(context - base) + i32(strip - 1)), i32(strip))
            wanted = i32(sections)
            if few < sections:
                wanted = i32(min(i32(max(over(strips, i32(LONG)), i32(few))), i32(sections)))
            of_section = over(i32(strips + wanted - i32(1)), wanted)
            row_sections = over(i32(strips + of_section - i32(1)), of_section)
            at = i32(row * i32(ROW_INTS))
            rows[at], rows[at + 1], rows[at + 2], rows[at + 3] = row_slots[row], base, low, context
            rows[at + 4], rows[at + 5], rows[at + 7] = of_section, row_sections, strips
            shared[costs_at + row], shared[counts_at + row] = cost, count
            cost = i32(cost + strips + i32(ROW_COST))
            count = i32(count + row_sections)
            row = i32(row + 1)
        # sums of all threads before this one, in two buffers by turns
        here = i32(0)
        shared[sums_at + thread], shared[sums_at + threads + thread] = cost, count
        for distance in rounds:
            cuda.syncthreads()
            of = i32(sums_at + here * i32(2 * threads) + thread)
            sum_cost, sum_count = shared[of], shared[of + threads]
            if thread >= i32(distance):
                sum_cost = i32(sum_cost + shared[of - distance])
                sum_count = i32(sum_count + shared[of - distance + threads])
            here = i32(i32(1) - here)
            to = i32(sums_at + here * i32(2 * threads) + thread)
            shared[to], shared[to + threads] = sum_cost, sum_count
        cuda.syncthreads()
        ends = i32(sums_at + here * i32(2 * threads))
        before_cost, before_count = i32(shared[ends + thread] - cost), i32(shared[ends + threads + thread] - count)
        row = first
        while row < stop:
            shared[costs_at + row] = i32(shared[costs_at + row] + before_cost)
            shared[counts_at + row] = i32(shared[counts_at + row] + before_count)
            row = i32(row + 1)
        total_cost, total_count = shared[ends + threads - 1], shared[ends + 2 * threads - 1]
        if thread == i32(0):
            shared[costs_at + num_rows], shared[counts_at + num_rows] = total_cost, total_count
        used = i32(min(total_count, i32(most_shares)))
        cuda.syncthreads()

        # where each share starts: (row, section), and the same counted in sections of all rows
        share = thread
        while share <= i32(most_shares):
            at_row, at_section, at_count = num_rows, i32(0), total_count
            if share < used:
                even = over(total_cost, used)
                goal = i32(even * share + i32(min(share, i32(total_cost - i32(even * used)))))
                low_row, high_row = i32(0), num_rows
                while high_row - low_row > i32(1):
                    middle = over(i32(low_row + high_row), i32(2))
                    if shared[costs_at + middle] <= goal:
                        low_row = middle
                    else:
                        high_row = middle
                at_row = low_row
                row_sections = i32(shared[counts_at + low_row + 1] - shared[counts_at + low_row])
                of_section = rows[low_row * ROW_INTS + 4]
                at_section = over(i32(i32(goal - shared[costs_at + low_row]) + over(of_section, i32(2))), of_section)
                if at_section >= row_sections:
                    at_row, at_section = i32(low_row + 1), i32(0)
                at_count = i32(shared[counts_at + at_row] + at_section)
            to = i32(starts_at + i32(3) * share)
            shared[to], shared[to + 1], shared[to + 2] = at_row, at_section, at_count
            share = i32(share + threads)
        cuda.syncthreads()

        share = thread
        while share < i32(most_shares):
            of = i32(starts_at + i32(3) * share)
            last_row, last_stop = shared[of + 3], shared[of + 4]
            if last_stop == i32(0):
                last_row = i32(last_row - 1)
                last_stop = i32(shared[counts_at + last_row + 1] - shared[counts_at + last_row])
            if shared[of + 5] == shared[of + 2]:
                last_row = i32(shared[of] - 1)
            to = i32(share * i32(SHARE_INTS))
            shares[to], shares[to + 1], shares[to + 2], shares[to + 3] = shared[of], shared[of + 1], last_row, last_stop
            share = i32(share + threads)

        # the last share that starts at a row's first section or before
        row = thread
        while row < num_rows:
            count = shared[counts_at + row]
            low_share, high_share = i32(0), used
            while high_share - low_share > i32(1):
                middle = over(i32(low_share + high_share), i32(2))
                if shared[starts_at + i32(3) * middle + 2] <= count:
                    low_share = middle
                else:
                    high_share = middle
            rows[row * ROW_INTS + 6] = low_share
            row = i32(row + threads)

    return Kernel(kernel, (INTS, INTS, i32, INTS, INTS), threads, 4 * words, early=True)
