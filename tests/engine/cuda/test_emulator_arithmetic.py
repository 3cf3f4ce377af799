"""The emulator's arithmetic against numpy: integers, floats, halves, conversions, bits, from PTX and from compiled Python."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.cuda.target import compile_ptx, cuda, pointer, types
from tests.engine.cuda.test_emulator import module
from tests.ptx.emulator import Emulator, Memory

N = 256
rng = np.random.default_rng(20)
CORNERS = np.array(
    [0, 1, 2, 7, 31, 32, 33, 63, 64, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00010000, 0xFFFF0000, 0x12345678, 0x80000001], np.uint64
)
A = np.concatenate([np.repeat(CORNERS, 8), rng.integers(0, 2**64, 128, dtype=np.uint64)])
B = np.concatenate([np.tile(CORNERS, 8), rng.integers(0, 2**64, 128, dtype=np.uint64)])
C = rng.integers(0, 2**64, N, dtype=np.uint64)
FLOATS = np.array([0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 1e-20, 3e38, np.inf, -np.inf, np.nan, 65504, 70000, 1 / 3], np.float32)
FA = np.concatenate([np.repeat(FLOATS, 8), rng.standard_normal(128).astype(np.float32) * 100])
FB = np.concatenate([np.tile(FLOATS, 8), rng.standard_normal(128).astype(np.float32)])
FC = rng.standard_normal(N).astype(np.float32)


def compute(body: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: Any) -> np.ndarray:
    """Run a body over 256 threads: the 8-byte slots a, b, c are %d0, %d1, %d2; the result is what it puts into %d3."""
    x = np.zeros((N, 4), np.uint64)
    for column, value in enumerate((a, b, c)):
        x[:, column] = value if value.dtype == np.uint64 else value.view(f"u{value.itemsize}")
    y = np.zeros(N, np.uint64)
    memory = Memory()
    memory.add(x, "x")
    memory.add(y, "y")
    text = f"""mul.wide.u32 %off, %i, 32; add.s64 %xi, %px, %off; mul.wide.u32 %off, %i, 8; add.s64 %yi, %py, %off;
    ld.global.v2.b64 {{%d0, %d1}}, [%xi]; ld.global.b64 %d2, [%xi+16];
    cvt.u32.u64 %r0, %d0; cvt.u32.u64 %r1, %d1; cvt.u32.u64 %r2, %d2; cvt.u16.u64 %h0, %d0; cvt.u16.u64 %h1, %d1; cvt.u16.u64 %h2, %d2;
    mov.b32 %f0, %r0; mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b64 %g0, %d0; mov.b64 %g1, %d1; mov.b64 %g2, %d2;
    {body}
    st.global.b64 [%yi], %d3;"""
    Emulator(module(text)).launch(None, 2, 128, [x, y], memory)
    return np.ascontiguousarray(y.astype(f"u{np.dtype(dtype).itemsize}")).view(dtype)


RESULT = {  # where a body leaves its result -> (bits, how it gets into %d3)
    "d3": (64, ""), "r3": (32, "cvt.u64.u32 %d3, %r3;"), "h3": (16, "cvt.u64.u16 %d3, %h3;"), "p0": (1, "selp.b64 %d3, 1, 0, %p0;"),
    "f3": (32, "mov.b32 %r3, %f3; cvt.u64.u32 %d3, %r3;"), "g3": (64, "mov.b64 %d3, %g3;"),
}  # fmt: skip


def result_of(body: str) -> str:
    """The first register of `RESULT` that the last instruction names."""
    last = body.rstrip("; ").split(";")[-1]
    return next(name for name in re.findall(r"%(\w+)", last) if name in RESULT)


def signed_byte(value: int, at: int) -> int:
    return (value >> 8 * at & 255 ^ 128) - 128


def python(value: np.ndarray, bits: int, signed: bool) -> list[int]:
    """Integers of a width as Python's."""
    low = [int(v) & ((1 << bits) - 1) for v in value]
    return [v - (1 << bits) if signed and v >> (bits - 1) else v for v in low]


def field(a: int, start: int, count: int, signed: bool) -> int:
    """bfe as the ISA's pseudo-code has it."""
    start, count = start & 255, count & 255
    sign = 0 if not signed or count == 0 else (a >> min(start + count - 1, 31)) & 1
    return sum(((a >> (start + i) & 1) if i < count and start + i <= 31 else sign) << i for i in range(32))


def inserted(a: int, b: int, start: int, count: int) -> int:
    for i in range(count & 255):
        at = (start & 255) + i
        if at > 31:
            break
        b = (b & ~(1 << at)) | ((a >> i & 1) << at)
    return b


INTEGERS: dict[str, tuple[str, int, bool, Callable[[int, int, int], int]]] = {
    "add.s32": ("add.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: a + b),
    "sub.u64": ("sub.u64 %d3, %d0, %d1;", 64, False, lambda a, b, c: a - b),
    "add.s16": ("add.s16 %h3, %h0, %h1;", 16, True, lambda a, b, c: a + b),
    "add.sat.s32": ("add.sat.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: max(-(2**31), min(2**31 - 1, a + b))),
    "mul.lo.s32": ("mul.lo.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: a * b),
    "mul.hi.s32": ("mul.hi.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: a * b >> 32),
    "mul.hi.u32": ("mul.hi.u32 %r3, %r0, %r1;", 32, False, lambda a, b, c: a * b >> 32),
    "mul.hi.s64": ("mul.hi.s64 %d3, %d0, %d1;", 64, True, lambda a, b, c: a * b >> 64),
    "mul.hi.u64": ("mul.hi.u64 %d3, %d0, %d1;", 64, False, lambda a, b, c: a * b >> 64),
    "mad.lo.u32": ("mov.u32 %r3, %r2; mad.lo.u32 %r3, %r0, %r1, %r3;", 32, False, lambda a, b, c: a * b + c),
    "mad.hi.s32": ("mad.hi.s32 %r3, %r0, %r1, %r2;", 32, True, lambda a, b, c: (a * b >> 32) + c),
    "mul.wide.s32": ("mul.wide.s32 %d3, %r0, %r1;", 32, True, lambda a, b, c: a * b),
    "mul.wide.u16": ("mul.wide.u16 %r3, %h0, %h1;", 16, False, lambda a, b, c: a * b),
    "div.s32": ("or.b32 %r1, %r1, 1; div.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: int(abs(a) // abs(b | 1)) * (1 if (a < 0) == (b < 0) else -1)),
    "div.u64": ("or.b64 %d1, %d1, 1; div.u64 %d3, %d0, %d1;", 64, False, lambda a, b, c: a // (b | 1)),
    "rem.s64": ("or.b64 %d1, %d1, 1; rem.s64 %d3, %d0, %d1;", 64, True, lambda a, b, c: int(math.copysign(1, a)) * (abs(a) % abs(b | 1))),
    "min.s16": ("min.s16 %h3, %h0, %h1;", 16, True, lambda a, b, c: min(a, b)),
    "max.u32": ("max.u32 %r3, %r0, %r1;", 32, False, lambda a, b, c: max(a, b)),
    "neg.s32": ("neg.s32 %r3, %r0;", 32, True, lambda a, b, c: -a),
    "abs.s64": ("abs.s64 %d3, %d0;", 64, True, lambda a, b, c: abs(a)),
    "shl.b32": ("shl.b32 %r3, %r0, %r1;", 32, False, lambda a, b, c: a << b if b < 32 else 0),
    "shr.u32": ("shr.u32 %r3, %r0, %r1;", 32, False, lambda a, b, c: a >> b),
    "shr.s32": ("shr.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: a >> min(b % 2**32, 31)),
    "shr.s64": ("shr.s64 %d3, %d0, %r1;", 64, True, lambda a, b, c: a >> min(b % 2**32, 63)),
    "shl.b64": ("shl.b64 %d3, %d0, %r1;", 64, False, lambda a, b, c: a << (b % 2**32) if b % 2**32 < 64 else 0),
    "shr.s16": ("and.b32 %r1, %r1, 15; shr.s16 %h3, %h0, %r1;", 16, True, lambda a, b, c: a >> (b & 15)),
    "shf.l.wrap": ("shf.l.wrap.b32 %r3, %r0, %r1, %r2;", 32, False, lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    "shf.r.clamp": ("shf.r.clamp.b32 %r3, %r0, %r1, %r2;", 32, False, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "and.b64": ("and.b64 %d3, %d0, %d1;", 64, False, lambda a, b, c: a & b),
    "or.b32": ("or.b32 %r3, %r0, %r1;", 32, False, lambda a, b, c: a | b),
    "xor.b16": ("xor.b16 %h3, %h0, %h1;", 16, False, lambda a, b, c: a ^ b),
    "not.b32": ("not.b32 %r3, %r0;", 32, False, lambda a, b, c: ~a),
    "cnot.b32": ("cnot.b32 %r3, %r0;", 32, False, lambda a, b, c: int(a == 0)),
    "popc.b64": ("popc.b64 %r3, %d0;", 64, False, lambda a, b, c: a.bit_count()),
    "clz.b32": ("clz.b32 %r3, %r0;", 32, False, lambda a, b, c: 32 - a.bit_length()),
    "clz.b64": ("clz.b64 %r3, %d0;", 64, False, lambda a, b, c: 64 - a.bit_length()),
    "brev.b32": ("brev.b32 %r3, %r0;", 32, False, lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    "brev.b64": ("brev.b64 %d3, %d0;", 64, False, lambda a, b, c: int(f"{a:064b}"[::-1], 2)),
    "bfind.u32": ("bfind.u32 %r3, %r0;", 32, False, lambda a, b, c: a.bit_length() - 1),
    "bfind.s32": ("bfind.s32 %r3, %r0;", 32, True, lambda a, b, c: (~a if a < 0 else a).bit_length() - 1),
    "bfe.u32": ("and.b32 %r1, %r1, 63; bfe.u32 %r3, %r0, %r1, %r2;", 32, False, lambda a, b, c: field(a, b & 63, c, False)),
    "bfe.s32": ("and.b32 %r1, %r1, 63; bfe.s32 %r3, %r0, %r1, %r2;", 32, False, lambda a, b, c: field(a, b & 63, c, True)),
    "bfi.b32": ("and.b32 %r2, %r2, 31; bfi.b32 %r3, %r0, %r1, %r2, 9;", 32, False, lambda a, b, c: inserted(a, b, c & 31, 9)),
    "lop3 0xEA": ("lop3.b32 %r3, %r0, %r1, %r2, 0xEA;", 32, False, lambda a, b, c: (a & b) | c),
    "lop3 0x1D": ("lop3.b32 %r3, %r0, %r1, %r2, 0x1D;", 32, False, lambda a, b, c: (~a & b) | (~b & ~c)),
    "prmt": ("prmt.b32 %r3, %r0, %r1, 0x3254;", 32, False, lambda a, b, c: (b & 0xFFFF) | (a & 0xFFFF0000)),
    "prmt 0x7632": ("prmt.b32 %r3, %r0, %r1, 0x7632;", 32, False, lambda a, b, c: (b & 0xFFFF0000) | a >> 16),
    "prmt sign": ("prmt.b32 %r3, %r0, %r1, 0x000b;", 32, False, lambda a, b, c: (255 if a >> 31 else 0) | (a & 255) * 0x01010100),
    "dp4a.s32": ("dp4a.s32.s32 %r3, %r0, %r1, %r2;", 32, False, lambda a, b, c: c + sum(signed_byte(a, i) * signed_byte(b, i) for i in range(4))),
    "sad.s32": ("sad.s32 %r3, %r0, %r1, %r2;", 32, True, lambda a, b, c: c + abs(a - b)),
    "selp": ("setp.lt.s32 %p0, %r0, %r1; selp.b32 %r3, %r0, %r2, %p0;", 32, True, lambda a, b, c: a if a < b else c),
    "slct": ("slct.s32.s32 %r3, %r0, %r1, %r2;", 32, True, lambda a, b, c: a if c >= 0 else b),
    "cvt.s64.s32": ("cvt.s64.s32 %d3, %r0;", 32, True, lambda a, b, c: a),
    "cvt.u64.u16": ("cvt.u64.u16 %d3, %h0;", 16, False, lambda a, b, c: a),
    "cvt.s32.s8": ("cvt.s32.s8 %r3, %r0;", 8, True, lambda a, b, c: a),
    "cvt.u32.u8": ("cvt.u32.u8 %r3, %h0;", 8, False, lambda a, b, c: a),
    "cvt.sat.s16.s32": ("cvt.sat.s16.s32 %r3, %r0;", 32, True, lambda a, b, c: max(-32768, min(32767, a))),
    "cvt.sat.u8.s32": ("cvt.sat.u8.s32 %r3, %r0;", 32, True, lambda a, b, c: max(0, min(255, a))),
    "setp.and": ("setp.gt.u32 %p1, %r0, %r2; setp.lt.and.s32 %p0, %r0, %r1, %p1;", 32, True, lambda a, b, c: int(a < b and a % 2**32 > c % 2**32)),
    "setp.pair": ("setp.ls.u64 %p1|%p0, %d0, %d1;", 64, False, lambda a, b, c: int(not a <= b)),
    "set.s32": ("set.ge.u32.s32 %r3, %r0, %r1;", 32, True, lambda a, b, c: -1 if a >= b else 0),
    "add.cc": ("add.cc.u32 %r3, %r0, %r1; addc.u32 %r4, %r2, 0; mov.b64 %d3, {%r3, %r4};", 32, False, lambda a, b, c: a + b + (c << 32)),
    "sub.cc": ("sub.cc.u32 %r3, %r0, %r1; subc.u32 %r4, %r2, 0; mov.b64 %d3, {%r3, %r4};", 32, False, lambda a, b, c: (c << 32) + a - b),
    "mad.cc": ("mad.lo.cc.u32 %r3, %r0, %r1, %r2; madc.hi.u32 %r4, %r0, %r1, 0; mov.b64 %d3, {%r3, %r4};", 32, False, lambda a, b, c: a * b + c),
    "mov pack": ("mov.b32 %r3, {%h1, %h0};", 16, False, lambda a, b, c: b | a << 16),
    "mov unpack": ("mov.b64 {%r4, %r3}, %d0;", 64, False, lambda a, b, c: a >> 32),
    "guard": ("mov.u32 %r3, 5; setp.eq.s32 %p0, %r0, %r1; @!%p0 mov.u32 %r3, %r2; add.s32 %r3, %r3, 0;", 32, True, lambda a, b, c: 5 if a == b else c),
    "vote": ("setp.lt.s32 %p0, %r0, 0; vote.sync.ballot.b32 %r3, %p0, -1; activemask.b32 %r4; and.b32 %r3, %r3, 0; add.s32 %r3, %r3, %r4;", 32, True, lambda a, b, c: -1),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    body, bits, signed, function = INTEGERS[name]
    width, finish = RESULT[result_of(body)]
    got = compute(f"{body} {finish}", A, B, C, np.uint64)
    values = zip(python(A, bits, signed), python(B, bits, signed), python(C, bits, signed), strict=True)
    for at, (a, b, c) in enumerate(values):
        assert int(got[at]) % 2**width == function(a, b, c) % 2**width, (name, at, a, b, c)


def bf16(value: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, as float32; by torch."""
    return torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(torch.bfloat16).float().numpy()


def pairs(value: np.ndarray, kind: str) -> np.ndarray:
    """A value and its negative as a register of two halves."""
    both = torch.from_numpy(np.stack([value, -value], axis=1)).to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return both.view(torch.int16).numpy().view(np.uint32)[:, 0].copy()


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def to_int(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Saturating, NaN to 0, one Python number at a time."""
    limits = np.iinfo(dtype)
    return np.array([0 if math.isnan(v) else max(limits.min, min(limits.max, int(v))) if math.isfinite(v) else limits.min if v < 0 else limits.max
                     for v in x.astype(np.float64).tolist()], dtype)  # fmt: skip


REALS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]] = {
    "add.f32": ("add.rn.f32 %f3, %f0, %f1;", lambda a, b, c: a + b),
    "sub.ftz.f32": ("sub.ftz.f32 %f3, %f0, %f1;", lambda a, b, c: a - b),
    "mul.sat.f32": ("mul.sat.f32 %f3, %f0, %f1;", lambda a, b, c: np.nan_to_num(a * b, nan=0.0).clip(0, 1)),
    "fma.rn.f32": ("fma.rn.f32 %f3, %f0, %f1, %f2;", fused),
    "fma in place": ("mov.f32 %f3, %f2; fma.rn.f32 %f3, %f0, %f1, %f3;", fused),
    "div.rn.f32": ("div.rn.f32 %f3, %f0, %f1;", lambda a, b, c: a / b),
    "div.full.f32": ("div.full.ftz.f32 %f3, %f0, %f1;", lambda a, b, c: a / b),
    "rcp.approx": ("rcp.approx.ftz.f32 %f3, %f0;", lambda a, b, c: 1 / a),
    "sqrt.rn": ("sqrt.rn.f32 %f3, %f0;", lambda a, b, c: np.sqrt(a)),
    "rsqrt.approx": ("rsqrt.approx.f32 %f3, %f0;", lambda a, b, c: 1 / np.sqrt(a)),
    "ex2": ("ex2.approx.ftz.f32 %f3, %f0;", lambda a, b, c: np.exp2(a)),
    "lg2": ("lg2.approx.f32 %f3, %f0;", lambda a, b, c: np.log2(a)),
    "sin": ("sin.approx.f32 %f3, %f1;", lambda a, b, c: np.sin(b)),
    "cos": ("cos.approx.f32 %f3, %f1;", lambda a, b, c: np.cos(b)),
    "tanh": ("tanh.approx.f32 %f3, %f1;", lambda a, b, c: np.tanh(b)),
    "min.f32": ("min.f32 %f3, %f0, %f1;", lambda a, b, c: np.fmin(a, b)),
    "max.NaN.f32": ("max.NaN.f32 %f3, %f0, %f1;", lambda a, b, c: np.maximum(a, b)),
    "neg.f32": ("neg.f32 %f3, %f0;", lambda a, b, c: -a),
    "abs.f32": ("abs.f32 %f3, %f0;", lambda a, b, c: np.abs(a)),
    "copysign": ("copysign.f32 %f3, %f1, %f0;", lambda a, b, c: np.copysign(a, b)),
    "immediate": ("mul.f32 %f3, %f0, 0f3FC00000;", lambda a, b, c: a * np.float32(1.5)),
    "bits in a register": ("mov.b32 %f0, 0x40490fdb; mul.f32 %f3, %f1, %f0;", lambda a, b, c: b * np.float32(np.pi)),
    "halves by bits": ("mov.u16 %h4, 0x3C00; cvt.rn.f16.f32 %h0, %f1; add.f16 %h1, %h0, %h4; cvt.f32.f16 %f3, %h1;", lambda a, b, c: (b.astype(np.float16) + np.float16(1)).astype(np.float32)),
    "cvt.rni": ("cvt.rni.f32.f32 %f3, %f0;", lambda a, b, c: np.rint(a)),
    "cvt.rpi": ("cvt.rpi.f32.f32 %f3, %f0;", lambda a, b, c: np.ceil(a)),
    "cvt.rmi": ("cvt.rmi.f32.f32 %f3, %f0;", lambda a, b, c: np.floor(a)),
    "cvt.sat": ("cvt.sat.f32.f32 %f3, %f0;", lambda a, b, c: np.nan_to_num(a, nan=0.0).clip(0, 1)),
    "cvt.f64": ("cvt.f64.f32 %g3, %f0; mul.f64 %g3, %g3, %g3; cvt.rn.f32.f64 %f3, %g3;", lambda a, b, c: a * a),
    "cvt.f16": ("cvt.rn.f16.f32 %h0, %f0; cvt.f32.f16 %f3, %h0;", lambda a, b, c: a.astype(np.float16).astype(np.float32)),
    "cvt.bf16": ("cvt.rn.bf16.f32 %h0, %f0; mov.b32 %f3, {0, %h0};", lambda a, b, c: bf16(a)),
    "cvt.bf16x2 low": ("cvt.rn.bf16x2.f32 %r0, %f0, %f1; shl.b32 %r0, %r0, 16; mov.b32 %f3, %r0;", lambda a, b, c: bf16(b)),
    "cvt.bf16x2 high": ("cvt.rn.bf16x2.f32 %r0, %f0, %f1; and.b32 %r0, %r0, 0xffff0000; mov.b32 %f3, %r0;", lambda a, b, c: bf16(a)),
    "cvt.f16x2 high": ("cvt.rn.f16x2.f32 %r0, %f0, %f1; mov.b32 {_, %h0}, %r0; cvt.f32.f16 %f3, %h0;", lambda a, b, c: a.astype(np.float16).astype(np.float32)),
    "cvt.rn.f32.s32": ("cvt.rn.f32.s32 %f3, %r0;", lambda a, b, c: a.view(np.int32).astype(np.float32)),
    "cvt.rn.f32.u64": ("cvt.u64.u32 %d0, %r0; shl.b64 %d0, %d0, 20; cvt.rn.f32.u64 %f3, %d0;", lambda a, b, c: (a.view(np.uint32).astype(np.float64) * 2**20).astype(np.float32)),
    "cvt.rzi.s32.f32": ("cvt.rzi.s32.f32 %r3, %f0; mov.b32 %f3, %r3;", lambda a, b, c: to_int(np.trunc(a), np.int32).view(np.float32)),
    "cvt.rni.u32.f32": ("cvt.rni.u32.f32 %r3, %f0; mov.b32 %f3, %r3;", lambda a, b, c: to_int(np.rint(a), np.uint32).view(np.float32)),
    "cvt.rzi.s64.f32": ("cvt.rzi.s64.f32 %d0, %f0; shr.s64 %d0, %d0, 32; cvt.u32.u64 %r3, %d0; mov.b32 %f3, %r3;", lambda a, b, c: (to_int(np.trunc(a), np.int64) >> 32).astype(np.int32).view(np.float32)),
    "selp.f32": ("setp.lt.f32 %p0, %f0, %f1; selp.f32 %f3, %f0, %f2, %p0;", lambda a, b, c: np.where(a < b, a, c)),
    "setp.nan": ("setp.nan.f32 %p0, %f0, %f1; selp.f32 %f3, 0f3F800000, 0f00000000, %p0;", lambda a, b, c: (np.isnan(a) | np.isnan(b)).astype(np.float32)),
    "setp.geu": ("setp.geu.f32 %p0, %f0, %f1; selp.f32 %f3, 0f3F800000, 0f00000000, %p0;", lambda a, b, c: (~(a < b)).astype(np.float32)),
    "setp.ne": ("setp.ne.f32 %p0, %f0, %f1; selp.f32 %f3, 0f3F800000, 0f00000000, %p0;", lambda a, b, c: ((a < b) | (a > b)).astype(np.float32)),
    "testp": ("testp.finite.f32 %p0, %f0; selp.f32 %f3, 0f3F800000, 0f00000000, %p0;", lambda a, b, c: np.isfinite(a).astype(np.float32)),
    "mul.rz": ("mul.rz.f32 %f3, %f1, %f2;", lambda a, b, c: toward_zero(b.astype(np.float64) * c)),
}  # fmt: skip


def toward_zero(exact: np.ndarray) -> np.ndarray:
    value = exact.astype(np.float32)
    return np.where(np.abs(value.astype(np.float64)) > np.abs(exact), np.nextafter(value, np.float32(0)), value)


@pytest.mark.parametrize("name", REALS)
def test_floats(name: str) -> None:
    body, function = REALS[name]
    with np.errstate(all="ignore"):
        want = function(FA, FB, FC).astype(np.float32)
    got = compute(f"{body} {RESULT['f3'][1]}", FA, FB, FC, np.float32)
    if "approx" in body:
        assert np.allclose(got, want, rtol=1e-6, equal_nan=True)
    else:
        assert np.array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
        assert np.isnan(got[np.isnan(want)]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("word", ["fma", "add", "sub", "mul", "max", "neg"])
def test_pairs_of_halves(kind: str, word: str) -> None:
    a, b, c = (
        torch.from_numpy(v).to(torch.bfloat16 if kind == "bf16" else torch.float16).double().numpy() for v in (FB, FC, FB[::-1].copy())
    )
    function: dict[str, Callable[[], np.ndarray]] = {
        "fma": lambda: a * b + c, "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "max": lambda: np.fmax(a, b), "neg": lambda: -a,
    }  # fmt: skip
    count = {"fma": 3, "neg": 1}.get(word, 2)
    rounding = "" if word in ("max", "neg") else ".rn"
    sources = ", ".join(f"%r{i}" for i in range(count))
    body = f"{word}{rounding}.{kind}x2 %r3, {sources}; cvt.u64.u32 %d3, %r3;"
    got = compute(body, *(pairs(v.astype(np.float32), kind) for v in (a, b, c)), np.uint32)
    with np.errstate(all="ignore"):
        want = torch.from_numpy(function[word]()).to(torch.bfloat16 if kind == "bf16" else torch.float16)
    low = torch.from_numpy((got & 0xFFFF).astype(np.uint16).view(np.int16)).view(want.dtype)
    assert torch.equal(low.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


def test_eight_bit_floats() -> None:
    """cvt.rn.satfinite.e4m3x2.f32 against torch's float8_e4m3fn, and back through f16x2."""
    body = "cvt.rn.satfinite.e4m3x2.f32 %h3, %f0, %f1; cvt.u64.u16 %d3, %h3;"
    finite = np.nan_to_num(FA, nan=3.0, posinf=500.0, neginf=-500.0)
    got = compute(body, finite, FB, FC, np.uint16)
    want = torch.from_numpy(finite).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(got >> 8, want)
    back = compute(
        "cvt.rn.satfinite.e4m3x2.f32 %h3, %f0, %f1; cvt.rn.f16x2.e4m3x2 %r3, %h3; cvt.u64.u32 %d3, %r3;", finite, FB, FC, np.uint32
    )
    values = torch.from_numpy(want.copy()).view(torch.float8_e4m3fn).to(torch.float16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(back >> 16, values)


# -- compiled Python ------------------------------------------------------------------------------------------------------------

FLOAT32, INT32 = pointer(types.float32), pointer(types.int32)


def functions(x, y):  # type: ignore[no-untyped-def]
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    v = x[i]
    y[i] = math.exp(v) + math.log(v) + math.sin(v) * math.cos(v) + math.tanh(v) + math.sqrt(v) + math.erf(v) + v ** types.float32(1.7)


def rounds(x, y):  # type: ignore[no-untyped-def]
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    v = x[i]
    y[i] = math.floor(v) * types.float32(3) + math.ceil(v) + abs(v) % types.float32(2)


def cases(x, y):  # type: ignore[no-untyped-def]
    """Nested branches, a loop whose trip count differs in each lane, early exits."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    n = x[i]
    steps = types.int32(0)
    while n != types.int32(1):
        if n % types.int32(2) == types.int32(0):
            n = n // types.int32(2)
        else:
            n = types.int32(3) * n + types.int32(1)
        steps += types.int32(1)
        if steps > types.int32(100):
            break
    if steps > types.int32(90):
        return
    y[i] = steps


def reduction(x, y):  # type: ignore[no-untyped-def]
    """Each thread block its sum: shared memory, halving strides."""
    shared = cuda.shared.array(128, types.float32)
    thread = cuda.threadIdx.x
    shared[thread] = x[cuda.blockIdx.x * cuda.blockDim.x + thread]
    cuda.syncthreads()
    stride = types.int32(64)
    while stride > types.int32(0):
        if thread < stride:
            shared[thread] += shared[thread + stride]
        cuda.syncthreads()
        stride >>= types.int32(1)
    if thread == 0:
        y[cuda.blockIdx.x] = shared[0]


def table(x, y):  # type: ignore[no-untyped-def]
    """A local array with a run-time index (a stack frame) and a constant table."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    local = cuda.local.array(8, types.float32)
    for j in range(8):
        local[j] = x[i] * types.float32(j)
    known = cuda.const.array_like(TABLE)
    y[i] = local[i & 7] + known[(i >> 3) & 7]


TABLE = np.array([1.0, 2.5, 3, 4, 5, 6, 7, 80], np.float32)


def launch(function: Any, arguments: tuple[Any, ...], x: np.ndarray, y: np.ndarray, cc: tuple[int, int], fastmath: bool) -> None:
    text, name = compile_ptx(function, arguments, cc, threads=128, fastmath=fastmath)
    memory = Memory()
    memory.add(x, "x")
    memory.add(y, "y")
    Emulator(text).launch(name, len(x) // 128, 128, [x, y], memory)


BOTH = pytest.mark.parametrize(("cc", "fastmath"), [((8, 0), True), ((9, 0), False)])


@BOTH
def test_compiled_functions(cc: tuple[int, int], fastmath: bool) -> None:
    x = (rng.random(256) * 3 + 0.1).astype(np.float32)
    y = np.full(256, np.nan, np.float32)
    launch(functions, (FLOAT32, FLOAT32), x, y, cc, fastmath)
    v = x.astype(np.float64)
    want = np.exp(v) + np.log(v) + np.sin(v) * np.cos(v) + np.tanh(v) + np.sqrt(v) + np.array([math.erf(e) for e in v]) + v**1.7
    assert np.allclose(y, want, rtol=3e-6, atol=1e-5)


@BOTH
def test_compiled_rounding(cc: tuple[int, int], fastmath: bool) -> None:
    x = (rng.standard_normal(256) * 5).astype(np.float32)
    y = np.full(256, np.nan, np.float32)
    launch(rounds, (FLOAT32, FLOAT32), x, y, cc, fastmath)
    assert np.allclose(y, np.floor(x) * 3 + np.ceil(x) + np.abs(x) % 2, rtol=1e-5)


@BOTH
def test_compiled_control_flow(cc: tuple[int, int], fastmath: bool) -> None:
    x = np.arange(1, 257, dtype=np.int32)
    y = np.full(256, -1, np.int32)
    launch(cases, (INT32, INT32), x, y, cc, fastmath)
    for n, got in zip(x.tolist(), y.tolist(), strict=True):
        steps = 0
        while n != 1:
            n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
        assert got == (steps if steps <= 90 else -1)


@BOTH
def test_compiled_reduction(cc: tuple[int, int], fastmath: bool) -> None:
    x = rng.standard_normal(128 * 5).astype(np.float32)
    y = np.full(5, np.nan, np.float32)
    launch(reduction, (FLOAT32, FLOAT32), x, y, cc, fastmath)
    assert np.allclose(y, x.reshape(5, 128).sum(axis=1), atol=1e-5)


@BOTH
def test_compiled_arrays(cc: tuple[int, int], fastmath: bool) -> None:
    x = rng.standard_normal(256).astype(np.float32)
    y = np.full(256, np.nan, np.float32)
    launch(table, (FLOAT32, FLOAT32), x, y, cc, fastmath)
    i = np.arange(256)
    assert np.allclose(y, x * (i & 7) + TABLE[(i >> 3) & 7])
