"""The emulated machine: launches, spaces of memory, warp-wide instructions, atomics, calls, and what it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.cuda.test_emulator import HEAD, SHARED, each, module, run, words
from tests.ptx.emulator import Emulator, EmulatorError, Memory

LANE = np.arange(64) % 32


@pytest.mark.parametrize(
    ("grid", "block"), [((3, 2, 4), (5, 3, 2)), ((7, 1, 1), (33, 1, 1)), ((1, 5, 1), (8, 8, 16)), ((200, 1, 1), (64, 1, 1))]
)
def test_indices_of_grids_and_blocks(grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    """Every thread writes its indices, also where warps are not full and a launch takes several batches."""
    text = f"""{HEAD}.visible .entry kernel(.param .u64 y, .param .u32 scale) {{
    .reg .b32 %r<20>; .reg .b64 %d<4>;
    ld.param.u64 %d0, [y]; ld.param.u32 %r15, [scale];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;
    mov.u32 %r6, %ntid.x; mov.u32 %r7, %ntid.y; mov.u32 %r8, %ntid.z; mov.u32 %r9, %nctaid.x; mov.u32 %r10, %nctaid.y;
    mad.lo.u32 %r11, %r2, %r7, %r1; mad.lo.u32 %r11, %r11, %r6, %r0;
    mad.lo.u32 %r12, %r5, %r10, %r4; mad.lo.u32 %r12, %r12, %r9, %r3;
    mul.lo.u32 %r13, %r6, %r7; mul.lo.u32 %r13, %r13, %r8; mad.lo.u32 %r14, %r12, %r13, %r11;
    mul.wide.u32 %d1, %r14, 4; add.s64 %d2, %d0, %d1; mul.lo.u32 %r14, %r14, %r15; st.global.u32 [%d2], %r14; ret; }}"""
    y = np.zeros(int(np.prod(grid) * np.prod(block)), np.uint32)
    memory = Memory()
    memory.add(y, "y")
    Emulator(text).launch("kernel", grid, block, [y, np.int32(3)], memory)
    assert (y == 3 * np.arange(len(y))).all()


def test_tensors_are_used_in_place() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    memory = Memory()
    for tensor in (x, y):
        memory.add(tensor)
    memory.add(y[8:16])  # inside y: the same memory
    Emulator(module("ld.global.u32 %r0, [%xi]; st.global.u32 [%yi], %r0;")).launch(None, 2, 32, [x, y], memory)
    assert torch.equal(x, y)
    with pytest.raises(ValueError, match="overlap in part"):
        storage = torch.zeros(8)
        memory.add(storage[:6], "front")
        memory.add(storage[2:], "back")
    with pytest.raises(ValueError, match="contiguous"):
        memory.add(np.zeros((4, 4))[:, 1])


def test_wrong_launches() -> None:
    y, memory = np.zeros(32, np.uint32), Memory()
    memory.add(y)
    emulator = Emulator(module(""))
    for arguments, message in (([y], "takes 2 arguments, not 1"), ([y, 1 << 64], "does not fit")):
        with pytest.raises(EmulatorError, match=message):
            emulator.launch(None, 1, 32, arguments, memory)
    with pytest.raises(EmulatorError, match="cannot be launched"):
        emulator.launch(None, 1, 2048, [y, y], memory)
    with pytest.raises(EmulatorError, match="at most 232448"):
        emulator.launch(None, 1, 32, [y, y], memory, shared_bytes=240 * 1024)
    with pytest.raises(EmulatorError, match="0 kernels are called missing"):
        emulator.launch("missing", 1, 32, [y, y], memory)


# -- spaces of memory -----------------------------------------------------------------------------------------------------------


def test_dynamic_shared_memory_and_generic_addresses() -> None:
    """Half of the lanes go through a generic shared address, half through a global one, in one instruction."""
    variables = ".extern .shared .align 16 .b8 dynamic[];\n" + SHARED
    body = """mov.u64 %d0, dynamic; mul.wide.u32 %d1, %tid, 4; add.s64 %d0, %d0, %d1; ld.global.u32 %r0, [%xi]; st.shared.u32 [%d0], %r0;
    cvta.shared.u64 %d2, %d0; and.b32 %r1, %tid, 1; setp.eq.s32 %p0, %r1, 0; selp.b64 %d3, %d2, %xi, %p0; ld.u32 %r2, [%d3];
    isspacep.shared %p1, %d3; selp.b32 %r3, 1000, 0, %p1; cvta.to.shared.u64 %d4, %d2; sub.s64 %d4, %d4, %d0; cvt.u32.u64 %r4, %d4;
    add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; st.global.u32 [%yi], %r2;"""
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    run(body, x, y, block=64, variables=variables, shared_bytes=256)
    assert (y == x + np.where(x % 2 == 0, 1000, 0)).all()
    with pytest.raises(EmulatorError, match="outside the 4224 bytes"):
        run(body, x, y, block=64, variables=variables, shared_bytes=128)


def test_local_memory_belongs_to_a_lane() -> None:
    body = """.local .align 8 .b8 depot[24]; mov.u64 %d0, depot; cvta.local.u64 %d1, %d0; ld.global.u32 %r0, [%xi]; st.local.u32 [%d0+8], %r0;
    add.u32 %r0, %r0, 1; st.u16 [%d1+16], %r0; ld.u32 %r1, [%d1+8]; ld.local.u16 %h0, [%d0+16]; cvt.u32.u16 %r2, %h0; add.u32 %r1, %r1, %r2;
    st.global.u32 [%yi], %r1;"""
    x, y = words(3, 64) % 1000, np.zeros(64, np.uint32)
    run(body, x, y, grid=2)
    assert (y == 2 * x + 1).all()
    with pytest.raises(EmulatorError, match="outside the thread's local memory"):
        run(body.replace("[%d0+8], %r0", "[%d0+32], %r0"), x, y, grid=2)


def test_constant_and_global_tables() -> None:
    variables = ".const .align 4 .u32 squares[4] = {0, 1, 4, 9};\n.global .align 2 .b8 bytes[4] = {10, 20, 30, 40};\n.visible .global .align 4 .u32 counter = 5;\n"
    body = """and.b32 %r0, %tid, 3; mul.wide.u32 %d0, %r0, 4; mov.u64 %d1, squares; add.s64 %d0, %d0, %d1; ld.const.u32 %r1, [%d0];
    cvt.u64.u32 %d2, %r0; mov.u64 %d3, bytes; add.s64 %d2, %d2, %d3; ld.global.u8 %h0, [%d2]; cvt.u32.u16 %r2, %h0; add.u32 %r1, %r1, %r2;
    ld.global.u32 %r3, [counter]; add.u32 %r1, %r1, %r3; st.global.u32 [%yi], %r1;"""
    y = np.zeros(32, np.uint32)
    run(body, y.copy(), y, variables=variables)
    assert (y == np.array([15, 26, 39, 54])[np.arange(32) % 4]).all()


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "b32", "b64", "v2.u16", "v4.u8", "v2.f32", "v4.b32", "v2.b64"])
def test_widths_of_loads_and_stores(kind: str) -> None:
    count = int(kind[1]) if kind[0] == "v" else 1
    base = kind.rpartition(".")[2]
    width = int(base[1:]) // 8 * count
    register = {"u8": "h", "s8": "h", "u16": "h", "s16": "h", "b32": "r", "b64": "d", "f32": "f"}[base]
    names = ", ".join(f"%{register}{4 + i}" for i in range(count))
    operand = f"{{{names}}}" if count > 1 else names
    x, y = np.random.default_rng(1).integers(0, 256, 64 * width, dtype=np.uint8), np.zeros(64 * width, np.uint8)
    run(
        f"mul.wide.u32 %d0, %i, {width}; add.s64 %d1, %px, %d0; add.s64 %d2, %py, %d0; ld.global.nc.L2::128B.{kind} {operand}, [%d1]; st.global.wb.{kind} [%d2], {operand};",
        x,
        y,
        grid=2,
    )
    assert (x == y).all()


def test_narrow_loads_are_extended() -> None:
    x = words(4, 64)
    assert (each("ld.global.s8 %r1, [%xi+1];", x, np.int32) == (x >> 8).astype(np.int8)).all()
    assert (each("ld.global.u16 %r1, [%xi+2];", x) == x >> 16).all()


# -- warps ----------------------------------------------------------------------------------------------------------------------

SHUFFLES = {
    "shfl.sync.idx.b32 %r1, %r0, 5, 31, -1;": LANE * 0 + 5,
    "shfl.sync.up.b32 %r1, %r0, 3, 0, -1;": np.where(LANE >= 3, LANE - 3, LANE),
    "shfl.sync.down.b32 %r1, %r0, 4, 31, -1;": np.where(LANE + 4 < 32, LANE + 4, LANE),
    "shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;": LANE ^ 16,
    "shfl.sync.down.b32 %r1, %r0, 1, 0x1807, -1;": np.where(LANE % 8 < 7, LANE + 1, LANE),  # width 8
    "mov.u32 %r2, %laneid; xor.b32 %r2, %r2, 7; shfl.sync.idx.b32 %r1, %r0, %r2, 31, -1;": LANE ^ 7,
}


@pytest.mark.parametrize("body", SHUFFLES)
def test_shuffles(body: str) -> None:
    x = words(5, 64)
    assert (each(body, x, block=64) == x.reshape(2, 32)[np.arange(64) // 32, SHUFFLES[body]]).all()


def test_the_predicate_of_a_shuffle() -> None:
    got = each("shfl.sync.up.b32 %r1|%p0, %r0, 3, 0, -1; selp.b32 %r1, 1, 0, %p0;", words(5, 64))
    assert (got == (LANE >= 3)).all()


def test_votes_matches_and_reductions() -> None:
    x = words(6, 64) % 4
    rows = x.reshape(2, 32)
    bits = (1 << np.arange(32, dtype=np.uint64)).astype(np.uint64)
    ballot = np.repeat((np.where(rows > 1, bits, 0)).sum(axis=1).astype(np.uint32), 32)
    assert (each("setp.gt.u32 %p0, %r0, 1; vote.sync.ballot.b32 %r1, %p0, -1;", x, block=64) == ballot).all()
    assert (each("setp.gt.u32 %p0, %r0, 9; vote.sync.any.pred %p1, %p0, -1; selp.b32 %r1, 1, 0, %p1;", x) == 0).all()
    assert (each("setp.gt.u32 %p0, %r0, 9; vote.sync.all.pred %p1, !%p0, -1; selp.b32 %r1, 1, 0, %p1;", x) == 1).all()
    match = np.concatenate([[np.where(row == v, bits, 0).sum() for v in row] for row in rows]).astype(np.uint32)
    assert (each("match.any.sync.b32 %r1, %r0, -1;", x) == match).all()
    assert (each("match.all.sync.b32 %r1|%p0, 7, -1;".replace("7,", "%r9,"), x) == 0xFFFFFFFF).all()
    assert (each("redux.sync.add.u32 %r1, %r0, -1;", x) == np.repeat(rows.sum(axis=1), 32)).all()
    assert (each("redux.sync.max.s32 %r1, %r0, -1;", x) == np.repeat(rows.max(axis=1), 32)).all()
    assert (each("elect.sync %r2|%p0, -1; selp.b32 %r1, 1, 0, %p0;", x) == (LANE == 0)).all()


def test_half_warps_shuffle_apart() -> None:
    """Each half of a warp in its own branch with its own member mask."""
    body = """setp.lt.u32 %p0, %tid, 16; @%p0 bra LOW; shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffff0000; add.u32 %r1, %r1, 1; bra JOIN;
    LOW: shfl.sync.bfly.b32 %r1, %r0, 2, 31, 0x0000ffff; activemask.b32 %r2; JOIN: bar.warp.sync -1;"""
    x = words(7, 32)
    lane = np.arange(32)
    assert (each(body, x) == np.where(lane < 16, x[lane ^ 2], x[lane ^ 1] + np.uint32(1))).all()


def test_matrices_moved_within_a_warp_and_stored() -> None:
    x = np.random.default_rng(8).integers(0, 2**16, (8, 8), dtype=np.uint16)
    y = np.zeros((8, 8), np.uint16)
    run("ld.global.b32 %r0, [%xi]; movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0; st.global.b32 [%yi], %r1;", x, y)
    assert (y == x.T).all()
    body = """ld.global.b32 %r0, [%xi]; mov.u32 %r1, smem; and.b32 %r2, %tid, 7; shl.b32 %r2, %r2, 4; add.u32 %r2, %r2, %r1;
    stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r2], {%r0}; bar.warp.sync -1; shl.b32 %r3, %tid, 2; add.u32 %r3, %r3, %r1;
    ld.shared.b32 %r4, [%r3]; st.global.b32 [%yi], %r4;"""
    run(body, x, y, variables=SHARED)
    assert (y == x.T).all()


# -- atomics, barriers, jumps ---------------------------------------------------------------------------------------------------


def test_atomics_of_every_kind() -> None:
    x = words(9, 256)
    y = np.zeros(16, np.uint32)
    y[3] = 0xFFFFFFFF
    body = """ld.global.u32 %r0, [%xi];
    red.global.add.u32 [%py], %r0; red.global.max.u32 [%py+4], %r0; red.global.min.s32 [%py+8], %r0; red.global.and.b32 [%py+12], %r0;
    red.global.or.b32 [%py+16], %r0; red.global.xor.b32 [%py+20], %r0; cvt.rn.f32.u32 %f0, %tid; red.global.add.f32 [%py+24], %f0;
    cvt.u64.u32 %d0, %r0; atom.global.add.u64 %d1, [%py+32], %d0; atom.global.exch.b32 %r1, [%py+40], %r0;
    atom.acq_rel.gpu.global.cas.b32 %r2, [%py+44], 0, %r0; mov.b32 %r3, 0x3c003c00; red.global.add.noftz.f16x2 [%py+48], %r3;"""
    run(body, x, y, grid=2, block=128)
    signed = x.view(np.int32)
    assert y[0] == x.sum(dtype=np.uint32) and y[1] == x.max() and y.view(np.int32)[2] == min(0, signed.min())
    assert y[3] == np.bitwise_and.reduce(x) and y[4] == np.bitwise_or.reduce(x) and y[5] == np.bitwise_xor.reduce(x)
    assert y.view(np.float32)[6] == 2 * np.arange(128).sum() and y[8:10].view(np.uint64)[0] == x.sum(dtype=np.uint64)
    assert y[10] == x[-1] and y[11] == x[0] and (y[12:13].view(np.float16) == 256).all()


def test_every_atomic_returns_the_value_before_it() -> None:
    x, y = np.zeros(1, np.uint32), np.zeros(256, np.uint32)
    run("atom.global.add.u32 %r0, [%px], 1; st.global.u32 [%yi], %r0;", x, y, grid=2, block=128)
    assert (np.sort(y) == np.arange(256)).all()


def test_shared_atomics_are_no_race_but_reading_them_early_is() -> None:
    body = """mov.u32 %r1, smem; setp.eq.u32 %p0, %tid, 0; mov.u32 %r0, 0; @%p0 st.shared.u32 [%r1], %r0; bar.sync 0;
    atom.shared.add.u32 %r2, [%r1], 1; bar.sync 0; ld.shared.u32 %r3, [%r1]; st.global.u32 [%yi], %r3;"""
    y = np.zeros(128, np.uint32)
    run(body, y.copy(), y, block=128, variables=SHARED)
    assert (y == 128).all()
    with pytest.raises(EmulatorError, match="a race: warp . reads"):
        run(body.replace("1; bar.sync 0;", "1;"), y.copy(), y, block=128, variables=SHARED)


def test_the_last_thread_block_reduces() -> None:
    """Each thread block stores a partial sum, counts itself, and the last one adds them up; over several batches."""
    body = """setp.ne.u32 %p0, %tid, 0; @%p0 bra DONE; mul.wide.u32 %d0, %cta, 4; add.s64 %d0, %d0, %py; add.u32 %r0, %cta, 1; st.global.u32 [%d0+8], %r0;
    fence.acq_rel.gpu; atom.add.acq_rel.gpu.global.u32 %r1, [%py], 1; setp.ne.u32 %p1, %r1, 99; @%p1 bra DONE; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u64 %d1, %py;
    LOOP: ld.global.u32 %r4, [%d1+8]; add.u32 %r2, %r2, %r4; add.s64 %d1, %d1, 4; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 100; @%p2 bra LOOP;
    st.global.u32 [%py+4], %r2; DONE: """
    y = np.zeros(102, np.uint32)
    run(body, np.zeros(1, np.uint32), y, grid=100, batch_lanes=512)
    assert y[1] == 5050


def test_barriers_that_vote_and_threads_that_left() -> None:
    body = """setp.ge.u32 %p0, %tid, 96; @%p0 bra DONE; setp.lt.u32 %p1, %tid, 40; bar.red.popc.u32 %r0, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    selp.b32 %r1, 1000, 0, %p2; add.u32 %r0, %r0, %r1; bar.sync 0; st.global.u32 [%yi], %r0; DONE: """
    y = np.zeros(128, np.uint32)
    run(body, y.copy(), y, block=128)
    assert (y[:96] == 40).all() and (y[96:] == 0).all()


def test_a_barrier_that_not_all_reach() -> None:
    y = np.zeros(128, np.uint32)
    with pytest.raises(EmulatorError, match=r"is stuck: PTX line \d+: bar.sync 1: 64 threads wait, .*bar.sync 2: 64 threads wait"):
        run("setp.ge.u32 %p0, %tid, 64; @%p0 bra OTHER; bar.sync 1; bra DONE; OTHER: bar.sync 2; DONE: ", y.copy(), y, block=128)


def test_jump_tables_and_calls() -> None:
    function = """.func (.param .b32 result) twice_plus(.param .b32 a, .param .b32 b) { .reg .b32 %q<4>; .reg .pred %z; ld.param.u32 %q0, [a]; ld.param.u32 %q1, [b];
    setp.gt.u32 %z, %q0, 50; @%z bra BIG; add.u32 %q2, %q0, %q0; add.u32 %q2, %q2, %q1; st.param.b32 [result+0], %q2; ret;
    BIG: mov.u32 %q3, 7; st.param.b32 [result+0], %q3; ret; }\n"""
    body = """and.b32 %r0, %tid, 3; TABLE: .branchtargets A, B, A, C; brx.idx %r0, TABLE;
    A: mov.u32 %r1, 10; bra CALL; B: mov.u32 %r1, 20; bra CALL; C: mov.u32 %r1, 60;
    CALL: { .param .b32 p0; st.param.b32 [p0+0], %r1; .param .b32 p1; st.param.b32 [p1+0], %tid; .param .b32 back;
    call.uni (back), twice_plus, (p0, p1); ld.param.b32 %r2, [back+0]; }
    st.global.u32 [%yi], %r2;"""
    y = np.zeros(32, np.uint32)
    run(body, y.copy(), y, variables=function)
    lane = np.arange(32)
    assert (y == np.select([lane % 4 == 1, lane % 4 == 3], [40 + lane, 7], 20 + lane)).all()


# -- what it counts, what it finds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "ways"), [(4, 1.0), (8, 2.0), (128, 32.0), (132, 1.0), (0, 1.0)])
def test_bank_conflicts_are_counted(stride: int, ways: float) -> None:
    body = f"mov.u32 %r1, smem; mad.lo.u32 %r2, %tid, {stride}, %r1; st.shared.u32 [%r2], %tid;"
    y = np.zeros(32, np.uint32)
    conflicts = run(body, y.copy(), y, variables=SHARED.replace("4096", "8192"))["bank_conflicts"]
    assert [(text.split()[0], value) for text, value in conflicts.values()] == [("st.shared.u32", ways)]


@pytest.mark.parametrize(("stride", "ways"), [(16, 1.0), (128, 8.0), (144, 1.0)])
def test_bank_conflicts_of_ldmatrix(stride: int, ways: float) -> None:
    body = f"""mov.u32 %r1, smem; shl.b32 %r2, %tid, 2; add.u32 %r2, %r2, %r1; mov.u32 %r3, 0;
    FILL: st.shared.u32 [%r2], %r3; add.u32 %r2, %r2, 128; add.u32 %r3, %r3, 1; setp.lt.u32 %p0, %r3, 64; @%p0 bra FILL; bar.warp.sync -1;
    mad.lo.u32 %r2, %tid, {stride}, %r1; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r2];"""
    y = np.zeros(32, np.uint32)
    conflicts = run(body, y.copy(), y, variables=SHARED.replace("4096", "8192"))["bank_conflicts"]
    assert [value for text, value in conflicts.values() if text.startswith("ldmatrix")] == [ways]


def test_bank_conflicts_are_told_at_every_launch() -> None:
    emulator, memory, y = (
        Emulator(module("mov.u32 %r1, smem; mad.lo.u32 %r2, %tid, 8, %r1; st.shared.u32 [%r2], %tid;", variables=SHARED)),
        Memory(),
        np.zeros(64, np.uint32),
    )
    memory.add(y)
    stats = [emulator.launch(None, 1, 48, [y, y], memory)["bank_conflicts"] for _ in range(3)]
    assert stats == [{}, {}, {}]  # the second warp is not whole
    stats = [emulator.launch(None, 3, 64, [y, y], memory)["bank_conflicts"] for _ in range(3)]
    assert [ways for each in stats for _, ways in each.values()] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("stride", "kind", "ratio"),
    [(4, "b32", 1.0), (8, "b32", 2.0), (32, "b32", 8.0), (0, "b32", 1.0), (16, "v4.b32", 1.0), (32, "v4.b32", 2.0)],
)
def test_sectors_of_global_memory_are_counted(stride: int, kind: str, ratio: float) -> None:
    target = "{%r4, %r5, %r6, %r7}" if kind[0] == "v" else "%r4"
    x = np.zeros(512, np.uint32)
    start = -x.ctypes.data % 32
    memory = Memory()
    memory.add(x)
    text = module(f"mul.wide.u32 %d0, %tid, {stride}; add.s64 %d1, %px, %d0; ld.global.{kind} {target}, [%d1];")
    stats = Emulator(text).launch(None, 1, 32, [x.ctypes.data + start, x], memory)
    assert [value for _, value in stats["sectors"].values()] == [ratio]


def test_instructions_are_counted() -> None:
    y = np.zeros(64, np.uint32)
    before, after = (run(body, y.copy(), y, grid=2) for body in ("", "add.u32 %r0, %tid, 1; add.u32 %r1, %tid, 2;"))
    assert after["warp_instructions"] - before["warp_instructions"] == 4
    assert after["thread_instructions"] - before["thread_instructions"] == 128


def test_unwritten_shared_memory_is_found_unless_allowed() -> None:
    body = "mov.u32 %r1, smem; ld.shared.u32 %r0, [%r1+64]; st.global.u32 [%yi], %r0;"
    y = np.zeros(32, np.uint32)
    with pytest.raises(EmulatorError, match="shared offset 64, which nothing has written"):
        run(body, y.copy(), y, variables=SHARED)
    run(body, y.copy(), y, variables=SHARED, poison=False)


@pytest.mark.parametrize(("body", "message"), [
    ("mov.u32 %r1, smem; st.shared.u32 [%r1], %tid;", "writes in the same instruction"),
    ("mov.u32 %r1, smem; shl.b32 %r2, %tid, 2; add.u32 %r2, %r2, %r1; st.shared.u32 [%r2], %tid; bar.sync 0; ld.shared.u32 %r3, [%r1]; st.shared.u32 [%r2], %r3;", "which warp 1 read|which warp . read"),
    ("mov.u32 %r1, smem; shl.b32 %r2, %tid, 2; add.u32 %r2, %r2, %r1; st.shared.u32 [%r2], %tid; ld.shared.u32 %r3, [%r1];", "reads shared offset 0, which warp 0 wrote"),
])  # fmt: skip
def test_races_of_shared_memory(body: str, message: str) -> None:
    y = np.zeros(64, np.uint32)
    with pytest.raises(EmulatorError, match=message):
        run(body, y.copy(), y, block=64, variables=SHARED)
    run(body, y.copy(), y, block=64, variables=SHARED, races=False)


def test_races_of_global_memory() -> None:
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(EmulatorError, match="a race: writes .* which thread block [01] also uses"):
        run("mul.wide.u32 %d0, %tid, 4; add.s64 %d0, %d0, %py; st.global.u32 [%d0], %cta;", x, y, grid=2, global_races=True)
    with pytest.raises(EmulatorError, match="a race: reads .* which thread block 0 also uses"):
        run("st.global.u32 [%yi], %cta; ld.global.u32 %r0, [%py];", x, y, grid=2, global_races=True)
    run("st.global.u32 [%yi], %cta; ld.global.u32 %r0, [%px]; red.global.add.u32 [%px+4], 1;", x, y, grid=2, global_races=True)
