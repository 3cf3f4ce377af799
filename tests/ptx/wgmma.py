"""wgmma: products of four warps, B (and A) read from shared memory through descriptors (PTX ISA, "Asynchronous Warpgroup").

A descriptor: start address, leading and stride byte offsets, each >> 4, and the swizzle (0 none, 1 128 B, 2 64 B, 3 32 B).
In 16-byte pieces of eight elements, before the swizzle exchanges address bits 4-6 with bits 7-9:

    K-major     row r, piece k:  (r % 8) * width + (r / 8) * stride + k * 16        (no swizzle: width 16, k * leading)
    MN-major    piece m, k:      (k % 8) * width + (k / 8) * stride + (m % p) * 16 + (m / p) * leading,  p = width / 16
                no swizzle:      (k % 8) * 16 + (k / 8) * leading + m * stride

Results appear at once; what was read is read again, for the race check, when its group is waited for, since hardware may
read it until then.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.loadstore import Lanes, every_lane, nothing
from tests.ptx.machine import Array, Bound, Machine
from tests.ptx.parser import Instruction

WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
K = 16


class Reads:
    """What the wgmmas in flight read: (instruction, offsets, lanes, group)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros(machine.lanes, np.int64)
        self.pending: list[tuple[Instruction, Array, Array, Array]] = []

    def reset(self) -> None:
        self.group.fill(0)
        self.pending.clear()

    def wait(self, mask: Array, left: int) -> None:
        still = []
        for instruction, at, lanes, group in self.pending:
            done = mask[lanes] & (group < self.group[lanes] - left)
            if done.any():
                self.machine.shared.read(instruction, at[done], lanes[done], 16)
            if not done.all():
                still.append((instruction, at[~done], lanes[~done], group[~done]))
        self.pending = still


def reads_of(machine: Machine) -> Reads:
    if machine.reads is None:
        machine.reads = Reads(machine)
    return machine.reads  # type: ignore[no-any-return]


def wgmma(machine: Machine, instruction: Instruction) -> Bound:
    """fence, commit_group, wait_group, mma_async."""
    word, reads = instruction.parts[1], reads_of(machine)
    if word == "fence":
        return nothing(machine, instruction)
    if word == "commit_group":

        def commit(mask: Array) -> None:
            reads.group[mask] += 1

        return every_lane(machine, commit)
    if word == "wait_group":
        left = instruction.operands[0].value
        return every_lane(machine, lambda mask: reads.wait(mask, left))
    return mma_async(machine, instruction)


def fields(descriptor: Array) -> tuple[Array, Array, Array, Array]:
    """(start, leading, stride, width of the swizzle), bytes."""
    value = descriptor.astype(np.uint64)
    start, leading, stride = (((value >> np.uint64(by)) & np.uint64(0x3FFF)).astype(np.int64) << 4 for by in (0, 16, 32))
    width = np.array([WIDTHS[mode] for mode in (value >> np.uint64(62)).astype(np.int64).tolist()])
    return start, leading, stride, width


def piece_addresses(descriptor: Array, extent: int, transposed: bool) -> Array:
    """Shared addresses of the 16-byte pieces: (groups, extent, 2) K-major, (groups, 16, extent / 8) MN-major."""
    start, leading, stride, width = (f[:, None, None] for f in fields(descriptor))
    plain = width == 16
    if transposed:
        k, m = np.arange(K)[None, :, None], np.arange(extent // 8)[None, None, :]
        across = width // 16
        swizzled = k % 8 * width + k // 8 * stride + m % across * 16 + m // across * leading
        linear = np.where(plain, k % 8 * 16 + k // 8 * leading + m * stride, swizzled)
    else:
        row, piece = np.arange(extent)[None, :, None], np.arange(2)[None, None, :]
        linear = row % 8 * width + row // 8 * stride + piece * np.where(plain, leading, 16)
    address = start + linear
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4


def mma_async(machine: Machine, instruction: Instruction) -> Bound:
    """wgmma.mma_async.sync.aligned.m64nNk16.f32.{bf16,f16}: D (64, N) in N / 2 registers, warp w rows 16 w .. as in mma."""
    parts, operands, reads = instruction.parts, instruction.operands, reads_of(machine)
    shape = next(part for part in parts if part.startswith("m64n"))
    n, k = (int(number) for number in shape[4:].split("k"))
    d_kind, kind = parts[-3], parts[-2]
    if d_kind != "f32" or kind not in ("bf16", "f16") or k != K or n % 8 or machine.block_lanes % 128 or "sp" in parts:
        raise EmulatorError(f"{instruction.op} in thread blocks of {machine.threads} threads is not emulated")
    d_registers = [machine.register(item, "f32") for item in operands[0].items]
    if len(d_registers) != n // 2:
        raise EmulatorError(f"{shape} has {n // 2} accumulators, not {len(d_registers)}")
    from_registers = operands[1].kind == "vector"
    a_registers = [machine.register(item, "b32") for item in operands[1].items]
    a_descriptor = None if from_registers else machine.wide(operands[1], "b64")
    b_descriptor = machine.wide(operands[2], "b64")
    keep = operands[3]
    kept = machine.source(keep, "pred")
    signs = [operand.value for operand in operands[4:6]]
    transposes = [operand.value for operand in operands[6:]]
    transposed_a, transposed_b = (False, bool(transposes[0])) if from_registers else (bool(transposes[0]), bool(transposes[1]))
    scale = np.float32(signs[0] * signs[1])

    def decode(pieces: Array) -> Array:
        """(…, 16-byte pieces) -> (…, elements) float32."""
        words = np.ascontiguousarray(pieces).view(np.uint16)
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else words.view(np.float16).astype(np.float32)

    def fetch(descriptor: Array, lanes: Array, extent: int, transposed: bool) -> Array:
        """(groups, extent, 16) of a matrix in shared memory, checked, for all warps of the group or each its rows."""
        of_groups = descriptor[lanes].reshape(-1, 128)
        if (of_groups != of_groups[:, :1]).any():
            raise machine.error(instruction, int(lanes[0]), "has descriptors that differ within a warpgroup")
        if ((of_groups[:, 0] >> np.uint64(49)) & np.uint64(7)).any():
            raise machine.error(instruction, int(lanes[0]), "has a descriptor with a base offset, which is not emulated")
        address = piece_addresses(of_groups[:, 0], extent, transposed)
        groups = len(address)
        flat = address.reshape(groups, -1)
        first = lanes.reshape(-1, 128)[:, ::32]  # a lane of each of the four warps
        owners = np.repeat(first[:, :1], flat.shape[1], axis=1).reshape(-1)
        at = machine.shared.locate(instruction, flat.reshape(-1), owners, 16, False)
        for warp in range(4):
            lane = np.repeat(first[:, warp], flat.shape[1])
            machine.shared.read(instruction, at, lane, 16)
            if warp == 0:
                machine.shared.check_fenced(instruction, at, lane, 16)
            reads.pending.append((instruction, at, lane, reads.group[lane]))
        values = decode(machine.shared.flat[16][at >> 4].reshape(address.shape))
        return values.swapaxes(1, 2) if transposed else values

    def core(lanes: Lanes) -> list[Array]:
        every = np.arange(machine.lanes) if lanes is None else lanes
        groups = whole_groups(machine, instruction, every)
        if a_descriptor is not None:
            left = fetch(a_descriptor, every, 64, transposed_a)
        else:
            words = np.stack([decode(r[every]).reshape(groups, 4, 8, 8) for r in a_registers])
            left = words.reshape(2, 2, groups, 4, 8, 8).transpose(2, 3, 1, 4, 0, 5).reshape(groups, 64, K)
        right = fetch(b_descriptor, every, n, transposed_b)
        product = np.matmul(left, right.swapaxes(1, 2)) * scale
        tiles = product.reshape(groups, 4, 2, 8, n // 8, 4, 2)  # group, warp, row half, g, tile, t, column
        old = np.broadcast_to(kept, machine.lanes)[every]
        results = []
        for at, register in enumerate(d_registers):
            value = tiles[:, :, at % 4 // 2, :, at // 4, :, at % 2].reshape(-1)
            results.append(value + np.where(old, register[every], np.float32(0)))
        return results

    return machine.gathered([], d_registers, core)


def whole_groups(machine: Machine, instruction: Instruction, lanes: Array) -> int:
    """The number of warpgroups; raises unless all 128 lanes of each are here."""
    rows = lanes.reshape(-1, 128) if len(lanes) % 128 == 0 else None
    if rows is None or (rows[:, 0] % 128).any() or (rows != rows[:, :1] + np.arange(128)).any():
        raise machine.error(instruction, int(lanes[0]), "is divergent: not all four warps of its warpgroup are here")
    return len(rows)


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {"wgmma": wgmma}
