"""The PTX emulator against numpy: each family of instructions, and that each check fires."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx.emulator import Emulator, EmulatorError, Memory

HEAD = ".version 8.5\n.target sm_90a\n.address_size 64\n"
START = """
mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.s32 %i, %cta, %n, %tid;
ld.param.u64 %px, [x]; ld.param.u64 %py, [y]; mul.wide.s32 %off, %i, 4; add.s64 %xi, %px, %off; add.s64 %yi, %py, %off;
"""


def module(body: str, registers: str = "", variables: str = "") -> str:
    """A kernel of two pointers: %xi and %yi are the addresses of this thread's 4 bytes in x and y; %r0... are at hand."""
    return f"""{HEAD}{variables}
.visible .entry kernel(.param .u64 x, .param .u64 y) {{
.reg .b32 %tid, %cta, %n, %i; .reg .b64 %px, %py, %off, %xi, %yi;
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .f32 %f<80>; .reg .b64 %d<16>; .reg .f64 %g<4>; {registers}
{START}
{body}
ret;
}}
"""


def run(body: str, x: np.ndarray, y: np.ndarray, grid: int = 1, block: int = 32, **options: Any) -> dict[str, Any]:
    """Run a body on two arrays."""
    variables, registers = options.pop("variables", ""), options.pop("registers", "")
    memory = Memory()
    memory.add(x, "x")
    memory.add(y, "y")
    return Emulator(module(body, registers, variables)).launch(None, grid, block, [x, y], memory, **options)


def each(body: str, x: np.ndarray, dtype: Any = np.uint32, block: int = 32) -> np.ndarray:
    """y[i] = body(x[i]) for 4-byte elements: %r0 in, %r1 out."""
    y = np.full(len(x), 0xDEADBEEF, np.uint32)
    run(f"ld.global.b32 %r0, [%xi];\n{body}\nst.global.b32 [%yi], %r1;", x, y, grid=-(-len(x) // block), block=block)
    return y.view(dtype)


SHARED = ".visible .shared .align 16 .b8 smem[4096];\n"


def words(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)


def test_a_loop_reconverges() -> None:
    """Each lane sums 0..tid; lanes leave the loop at different times and meet at the shuffle."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
    LOOP: add.s32 %r1, %r1, %r2; add.s32 %r2, %r2, 1; setp.le.s32 %p0, %r2, %tid; @%p0 bra LOOP;
    shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
    st.global.u32 [%yi], %r1;"""
    y = np.zeros(64, np.uint32)
    run(body, y.copy(), y, grid=2)
    lane = np.arange(64) % 32 ^ 1
    assert (y == lane * (lane + 1) // 2).all()


def test_shared_memory_across_a_barrier() -> None:
    body = """
    ld.global.u32 %r0, [%xi]; mov.u32 %r1, smem; shl.b32 %r2, %tid, 2; add.u32 %r2, %r1, %r2; st.shared.u32 [%r2], %r0;
    bar.sync 0;
    xor.b32 %r3, %tid, 127; shl.b32 %r3, %r3, 2; add.u32 %r3, %r1, %r3; ld.shared.u32 %r4, [%r3]; st.global.u32 [%yi], %r4;"""
    x = words(1, 512)
    y = np.zeros(512, np.uint32)
    stats = run(body, x, y, grid=4, block=128, variables=SHARED)
    assert (y.reshape(4, 128) == x.reshape(4, 128)[:, ::-1]).all()
    assert stats["global_bytes_read"] == stats["global_bytes_written"] == 2048
    with pytest.raises(EmulatorError, match="a race|nothing has written"):
        run(body.replace("bar.sync 0;", ""), x, y, grid=4, block=128, variables=SHARED)


def test_ldmatrix_and_its_transpose() -> None:
    body = """
    ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%d1]; mov.u32 %r4, smem; shl.b32 %r5, %tid, 4; add.u32 %r5, %r4, %r5;
    st.shared.v4.u32 [%r5], {%r0, %r1, %r2, %r3}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.KIND.b16 {%r6, %r7, %r8, %r9}, [%r5]; st.global.v4.u32 [%d2], {%r6, %r7, %r8, %r9};"""
    body = "mul.wide.u32 %d0, %tid, 16; add.s64 %d1, %px, %d0; add.s64 %d2, %py, %d0;" + body
    x = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    y = np.zeros((32, 4, 2), np.uint16)
    run(body.replace("KIND", "shared"), x, y, variables=SHARED)
    lane = np.arange(32)
    for matrix in range(4):
        assert (y[:, matrix, 1] == x[matrix, lane // 4, lane % 4 * 2 + 1]).all()
    run(body.replace("KIND", "trans.shared"), x, y, variables=SHARED)
    for matrix in range(4):
        assert (y[:, matrix, 0] == x[matrix, lane % 4 * 2, lane // 4]).all()
        assert (y[:, matrix, 1] == x[matrix, lane % 4 * 2 + 1, lane // 4]).all()


COPY = """
mov.u32 %r1, smem; shl.b32 %r2, %tid, 4; add.u32 %r2, %r1, %r2; mul.wide.u32 %d0, %tid, 16; add.s64 %d1, %px, %d0; add.s64 %d2, %py, %d0;
cp.async.cg.shared.global [%r2], [%d1], 16; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
xor.b32 %r3, %tid, 63; shl.b32 %r3, %r3, 4; add.u32 %r3, %r1, %r3; ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3];
st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"""


def test_cp_async_is_seen_after_its_wait_and_a_barrier() -> None:
    x, y = words(2, 256).reshape(64, 4), np.zeros((64, 4), np.uint32)
    run(COPY, x, y, block=64, variables=SHARED)
    assert (y == x[::-1]).all()
    with pytest.raises(EmulatorError, match="cp.async writes that its thread has not waited"):
        run(COPY.replace("cp.async.wait_group 0;", ""), x, y, block=64, variables=SHARED)
    with pytest.raises(EmulatorError, match="cp.async writes that its thread has not waited"):
        run(COPY.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;"), x, y, block=64, variables=SHARED)
    with pytest.raises(EmulatorError, match="a race"):
        run(COPY.replace("bar.sync 0;", ""), x, y, block=64, variables=SHARED)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_m16n8k16(kind: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 8, (16, 16)).astype(np.float32), rng.integers(-8, 8, (16, 8)).astype(np.float32)
    c = rng.standard_normal((16, 8)).astype(np.float32)

    def bits(v: np.ndarray) -> np.ndarray:
        return (v.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else v.astype(np.float16).view(np.uint16)

    x = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r, (row, column) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            x[lane, r] = bits(np.ascontiguousarray(a[row, column : column + 2])).view(np.uint32)[0]
        for r in range(2):
            x[lane, 4 + r] = bits(np.ascontiguousarray(b[2 * t + 8 * r : 2 * t + 8 * r + 2, g])).view(np.uint32)[0]
        x[lane, 6:] = np.array([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]).view(np.uint32)
    y = np.zeros((32, 4), np.float32)
    loads = " ".join(f"ld.global.b32 %{'r' if r < 6 else 'f'}{r}, [%d1+{4 * r}];" for r in range(10))
    stores = " ".join(f"st.global.f32 [%d2+{4 * r}], %f{10 + r};" for r in range(4))
    op = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f10,%f11,%f12,%f13}},{{%r0,%r1,%r2,%r3}},{{%r4,%r5}},{{%f6,%f7,%f8,%f9}};"
    run(
        f"mul.wide.u32 %d0, %tid, 40; add.s64 %d1, %px, %d0; mul.wide.u32 %d0, %tid, 16; add.s64 %d2, %py, %d0; {loads} {op} {stores}", x, y
    )
    lane = np.arange(32)
    want = a @ b + c
    for r in range(4):
        assert np.allclose(y[:, r], want[lane // 4 + r // 2 * 8, lane % 4 * 2 + r % 2], rtol=1e-6)


def test_atomics_count() -> None:
    y = np.zeros(32, np.uint32)
    run(
        "atom.global.add.u32 %r0, [%py], 1; red.global.max.u32 [%py+4], %i; atom.global.inc.u32 %r1, [%py+8], 6;",
        y.copy(),
        y,
        grid=3,
        block=64,
    )
    assert list(y[:3]) == [192, 191, 192 % 7]


def test_addresses_are_checked() -> None:
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(EmulatorError, match=r"PTX line \d+: ld.global.u32 .*thread \(0, 0, 0\).* 0 bytes past the end of x \(128 bytes\)"):
        run("ld.global.u32 %r0, [%xi+128];", x, y)
    with pytest.raises(EmulatorError, match="not a multiple of 4"):
        run("ld.global.u32 %r0, [%px+2];", x, y)
    with pytest.raises(EmulatorError, match="outside the 4096 bytes"):
        run("mov.u32 %r1, smem; st.shared.u32 [%r1+4096], %r1;", x, y, variables=SHARED)
    x.flags.writeable = False
    with pytest.raises(EmulatorError, match="x, which is read-only"):
        run("st.global.u32 [%xi], %tid;", x, y)


def test_a_shuffle_without_its_warp_is_divergent() -> None:
    y = np.zeros(32, np.uint32)
    with pytest.raises(EmulatorError, match="divergent"):
        run(
            "setp.lt.u32 %p0, %tid, 16; @%p0 bra SKIP; shfl.sync.bfly.b32 %r1, %tid, 1, 31, -1; SKIP: st.global.u32 [%yi], %r1;",
            y.copy(),
            y,
        )


def test_an_unknown_instruction_is_named() -> None:
    y = np.zeros(32, np.uint32)
    with pytest.raises(EmulatorError, match=r"PTX line \d+: frobnicate.u32 %r1, %r2: .*not known"):
        run("frobnicate.u32 %r1, %r2;", y.copy(), y)
