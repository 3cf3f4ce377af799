"""What is asynchronous in the emulator: named barriers, mbarriers, bulk copies, wgmma; and the mistakes that each check finds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.cuda.test_emulator import SHARED, run
from tests.ptx.emulator import EmulatorError

BIG = SHARED.replace("4096", "32768").replace(".align 16", ".align 1024")


def bf16(value: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)


# -- barriers of some warps -----------------------------------------------------------------------------------------------------

NAMED = """
mov.u32 %r1, smem; shl.b32 %r2, %tid, 2; and.b32 %r2, %r2, 127; add.u32 %r2, %r2, %r1;
setp.ge.u32 %p0, %tid, 32; @%p0 bra OTHERS;
ld.global.u32 %r0, [%xi]; st.shared.u32 [%r2], %r0; bar.arrive 1, 128; bar.sync 2, 128; ld.global.u32 %r0, [%xi]; add.u32 %r0, %r0, 1;
st.shared.u32 [%r2], %r0; bra DONE;
OTHERS: bar.sync 1, 128; ld.shared.u32 %r3, [%r2]; st.global.u32 [%yi], %r3; bar.arrive 2, 128;
DONE: """


def test_a_producer_and_its_consumers() -> None:
    """Warp 0 writes, three warps read, warp 0 writes again once they have read: bar.arrive and bar.sync with counts."""
    x, y = np.arange(1, 257, dtype=np.uint32), np.zeros(256, np.uint32)
    run(NAMED, x, y, grid=2, block=128, variables=SHARED)
    want = np.tile(x.reshape(2, 1, 32 * 4)[:, :, :32], (1, 4, 1))
    want[:, 0] = 0
    assert (y.reshape(2, 4, 32) == want).all()


@pytest.mark.parametrize(("mistake", "instead", "message"), [
    ("bar.sync 2, 128; ld", "ld", "a race: warp [01]"),
    ("bar.arrive 1, 128;", "", "is stuck: PTX line .*bar.sync"),
    ("bar.sync 1, 128; ld.sh", "ld.sh", "a race: warp 1 reads|nothing has written"),
    ("bar.sync 1, 128;", "bar.sync 1, 96;", "barrier 1 is used with 96, 96 and 128 threads"),
])  # fmt: skip
def test_wrong_named_barriers_are_found(mistake: str, instead: str, message: str) -> None:
    assert mistake in NAMED
    x, y = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    with pytest.raises(EmulatorError, match=message):
        run(NAMED.replace(mistake, instead), x, y, grid=2, block=128, variables=SHARED)


# -- mbarriers and bulk copies --------------------------------------------------------------------------------------------------

# thread 0 copies two halves of 1 KiB in turn, the 64 threads read them; "full" at 4096, "empty" at 4104
BULK = """
mov.u32 %r1, smem; add.u32 %r2, %r1, 4096; add.u32 %r3, %r1, 4104;
setp.ne.u32 %p0, %tid, 0; @%p0 bra READY;
mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r3], 2; fence.mbarrier_init.release.cluster;
READY: bar.sync 0;
mov.u32 %r10, 0; shl.b32 %r11, %tid, 4; add.u32 %r12, %r1, %r11; mul.wide.u32 %d0, %tid, 16; add.s64 %d1, %py, %d0; mov.u64 %d2, %px;
LOOP: setp.ne.u32 %p0, %tid, 0; @%p0 bra CONSUME;
setp.eq.u32 %p1, %r10, 0; @%p1 bra FILL;
xor.b32 %r13, %r10, 1; and.b32 %r13, %r13, 1;
EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r13; @!%p2 bra EMPTY;
FILL: mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d2], 1024, [%r2];
CONSUME: bar.warp.sync -1;
and.b32 %r14, %r10, 1;
FULL: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p3, [%r2], %r14; @%p3 bra READ; bra FULL;
READ: ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r12]; st.global.v4.u32 [%d1], {%r20, %r21, %r22, %r23};
bar.warp.sync -1;
and.b32 %r15, %tid, 31; setp.ne.u32 %p4, %r15, 0; @%p4 bra NEXT; mbarrier.arrive.release.cta.shared::cta.b64 %d5, [%r3];
NEXT: add.s64 %d1, %d1, 1024; add.s64 %d2, %d2, 1024; add.u32 %r10, %r10, 1; setp.lt.u32 %p5, %r10, 6; @%p5 bra LOOP;"""


def test_bulk_copies_through_one_buffer() -> None:
    x, y = np.random.default_rng(0).integers(0, 2**32, 1536, dtype=np.uint32), np.zeros(1536, np.uint32)
    run(BULK, x, y, block=64, variables=BIG)
    assert (x == y).all()


@pytest.mark.parametrize(("mistake", "instead", "message"), [
    ("FULL: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p3, [%r2], %r14; @%p3 bra READ; bra FULL;", "", "which a bulk copy wrote|nothing has written"),
    ("EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r13; @!%p2 bra EMPTY;", "", "a race: warp 0 writes shared offset .* read"),
    ("_, [%r2], 1024;", "_, [%r2], 2048;", "wait in loops, in vain"),
    ("mbarrier.init.shared.b64 [%r3], 2;", "", "not initialised"),
    ("READY: bar.sync 0;", "READY:", "not initialised|initialised with no barrier since"),
    ("[%r3], 2;", "[%r3], 1;", "arrives once too often|a race"),
    ("[%d2], 1024, [%r2]", "[%d2], 1000, [%r2]", "1000 bytes, which is no multiple of 16"),
])  # fmt: skip
def test_wrong_pipelines_are_found(mistake: str, instead: str, message: str) -> None:
    assert mistake in BULK
    x, y = np.zeros(1536, np.uint32), np.zeros(1536, np.uint32)
    with pytest.raises(EmulatorError, match=message):
        run(BULK.replace(mistake, instead), x, y, block=64, variables=BIG)


def test_a_flag_of_another_thread_block() -> None:
    """Thread block 1 waits for a flag that thread block 2 sets: works inside one batch, says so when it cannot."""
    body = """setp.eq.u32 %p0, %cta, 2; @%p0 bra SET; setp.eq.u32 %p0, %cta, 1; @!%p0 bra DONE;
    WAIT: ld.acquire.gpu.global.u32 %r0, [%py+256]; setp.eq.u32 %p1, %r0, 0; @%p1 bra WAIT; st.global.u32 [%yi], %r0; bra DONE;
    SET: mov.u32 %r1, 7; st.release.gpu.global.u32 [%py+256], %r1; DONE: """
    x, y = np.zeros(96, np.uint32), np.zeros(96, np.uint32)
    run(body, x, y, grid=3)
    assert (y[32:64] == 7).all()
    y[:] = 0
    with pytest.raises(EmulatorError, match="cooperative=True"):
        run(body, x, y, grid=3, batch_lanes=32)
    y[:] = 0
    run(body, x, y, grid=3, batch_lanes=32, cooperative=True)
    assert (y[32:64] == 7).all()


def test_tickets_of_a_long_loop_are_no_waiting() -> None:
    """Work handed out by an atomic: 12,000 rounds, all lanes together."""
    body = """LOOP: setp.ne.u32 %p0, %tid, 0; mov.u32 %r0, 0; @%p0 bra SHARE; atom.global.add.u32 %r0, [%py], 1; SHARE: shfl.sync.idx.b32 %r0, %r0, 0, 31, -1;
    st.global.u32 [%yi+128], %r0; setp.lt.u32 %p1, %r0, 12000; @%p1 bra LOOP;"""
    y = np.zeros(64, np.uint32)
    run(body, y.copy(), y)
    assert y[0] == 12001 and (y[32:] == 12000).all()


# -- wgmma ----------------------------------------------------------------------------------------------------------------------

WIDTH = {0: 8, 3: 16, 2: 32, 1: 64}  # elements of a row of the pattern, by the swizzle's code


def image(matrix: np.ndarray, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """A (rows, 16) matrix as shared memory holds it: (uint16 elements, leading, stride in bytes), by the ISA's canonical layouts."""
    rows, w = len(matrix), WIDTH[swizzle]
    place = np.zeros((rows, 16), np.int64)
    for r in range(rows):
        for k in range(16):
            if not transposed and swizzle == 0:  # ((8, m), (8, 2)) : ((8, 64), (1, 64 m))
                place[r, k] = r % 8 * 8 + r // 8 * 64 + k % 8 + k // 8 * rows * 8
            elif not transposed:  # ((8, m), (8, 2)) : ((w, 8 w), (1, 8))
                place[r, k] = r % 8 * w + r // 8 * 8 * w + k
            elif swizzle == 0:  # ((8, 1, m), (8, 2)) : ((1, 8, 64), (8, 64 m))
                place[r, k] = r % 8 + r // 8 * 64 + k % 8 * 8 + k // 8 * rows * 8
            else:  # ((8, w / 8, m), (8, 2)) : ((1, 8, 16 w), (w, 8 w))
                place[r, k] = r % w + r // w * 16 * w + k % 8 * w + k // 8 * 8 * w
    if swizzle:
        piece = place // 8
        place = (piece ^ (piece >> 3 & (w // 8 - 1))) * 8 + place % 8
    flat = np.zeros(place.max() // 512 * 512 + 512, np.uint16)
    flat[place] = bf16(matrix)
    if not transposed:
        return flat, rows * 16 if swizzle == 0 else 16, 128 if swizzle == 0 else 16 * w
    return (flat, rows * 16, 128) if swizzle == 0 else (flat, 32 * w, 16 * w)


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return (start + 1024) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


def product(n: int, a: str, b: int, flags: str, fence: str = "fence.proxy.async;") -> str:
    """Copy 16 KiB of x into shared memory, one wgmma, its N / 2 accumulators to y. `a`: a number or four registers."""
    count = n // 2
    accumulators = ", ".join(f"%f{i}" for i in range(count))
    clear = " ".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(count))
    store = " ".join(f"st.global.f32 [%d6+{4 * i}], %f{i};" for i in range(count))
    descriptor_a = (
        f"mov.u64 %d3, {a};"
        if not a.startswith("{")
        else "add.s64 %d7, %px, 16384; mul.wide.u32 %d8, %tid, 16; add.s64 %d7, %d7, %d8; ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%d7];"
    )
    return f"""
    mov.u32 %r1, smem; shl.b32 %r2, %tid, 4; add.u32 %r2, %r1, %r2; mul.wide.u32 %d0, %tid, 16; add.s64 %d1, %px, %d0; mov.u32 %r10, 0;
    COPY: ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d1]; st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}};
    add.s64 %d1, %d1, 2048; add.u32 %r2, %r2, 2048; add.u32 %r10, %r10, 1; setp.lt.u32 %p0, %r10, 8; @%p0 bra COPY;
    {fence} bar.sync 0; {descriptor_a} mov.u64 %d4, {b}; {clear} setp.ne.s32 %p1, 1, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{accumulators}}}, {a if a.startswith("{") else "%d3"}, %d4, %p1, 1, -1, {flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %d5, %tid, {4 * count}; add.s64 %d6, %py, %d5; {store}"""


def gathered(y: np.ndarray, n: int) -> np.ndarray:
    """The accumulators of 128 threads as a (64, N) matrix."""
    d = np.zeros((64, n), np.float32)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for i in range(n // 2):
            d[16 * warp + g + i % 4 // 2 * 8, i // 4 * 8 + 2 * t + i % 2] = y[thread, i]
    return d


@pytest.mark.parametrize("swizzle_b", [0, 1, 2, 3])
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("a_form", ["registers", "plain", "swizzled", "transposed"])
def test_wgmma(swizzle_b: int, transposed_b: bool, a_form: str) -> None:
    rng, n = np.random.default_rng(5), 64
    a, b = rng.integers(-8, 8, (64, 16)).astype(np.float32), rng.integers(-8, 8, (n, 16)).astype(np.float32)
    x = np.zeros((18432 // 2,), np.uint16)
    flat, leading, stride = image(b, swizzle_b, transposed_b)
    x[4096 : 4096 + len(flat)] = flat
    b_word = descriptor(8192, leading, stride, swizzle_b)
    if a_form == "registers":
        for thread in range(128):
            warp, g, t = thread // 32, thread % 32 // 4, thread % 4
            for r in range(4):
                row, column = 16 * warp + g + r % 2 * 8, 2 * t + r // 2 * 8
                x[8192 + thread * 8 + 2 * r : 8192 + thread * 8 + 2 * r + 2] = bf16(a[row, column : column + 2])
        text = product(n, "{%r20, %r21, %r22, %r23}", b_word, f"{int(transposed_b)}")
    else:
        swizzle_a = 1 if a_form == "swizzled" else 0 if a_form == "plain" else 2
        flat, leading, stride = image(a, swizzle_a, a_form == "transposed")
        x[: len(flat)] = flat
        text = product(n, str(descriptor(0, leading, stride, swizzle_a)), b_word, f"{int(a_form == 'transposed')}, {int(transposed_b)}")
    y = np.zeros((128, n // 2), np.float32)
    run(text, x, y, block=128, variables=BIG)
    assert np.array_equal(gathered(y, n), 1 - a @ b.T)


def test_wgmma_wants_the_proxy_fence() -> None:
    x, y = np.zeros(9216, np.uint16), np.zeros((128, 32), np.float32)
    word = descriptor(0, 16, 1024, 1)
    with pytest.raises(EmulatorError, match="no fence.proxy.async"):
        run(product(64, str(word), word, "0, 0", fence=""), x, y, block=128, variables=BIG)
