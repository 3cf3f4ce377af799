"""The state of a batch of thread blocks: registers as arrays over all lanes, special registers, addresses of variables.

A lane is one thread; thread blocks are padded to whole warps, so lane = (block in batch) * lanes_per_block + thread. A
register is one array of bit patterns, seen through views of each type; instructions are bound to these arrays once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.memory import Memory, Window
from tests.ptx.parser import WIDTH, Instruction, Kernel, Operand
from tests.ptx.shared import SHARED_BASE, SharedMemory

Array = np.ndarray
DTYPE: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_WINDOW = 0x0100_0000_0000_0000  # generic addresses of shared memory; no host address is that high
LOCAL_WINDOW = 0x0200_0000_0000_0000
Masked = Callable[[Array], None]


class Bound:
    """An instruction on its arrays: `full()` for all lanes, `masked(mask)` for some, `live` when dead lanes may be written."""

    __slots__ = ("full", "masked", "live")

    def __init__(self, full: Callable[[], Any], masked: Masked, live: Masked | None = None) -> None:
        self.full, self.masked, self.live = full, masked, live or masked


class Machine:
    """Registers and memories of `blocks` thread blocks of `threads` threads."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], blocks: int, threads: int, shared_bytes: int, options: Any) -> None:
        self.kernel, self.blocks, self.threads, self.options = kernel, blocks, threads, options
        self.block_lanes = -(-threads // 32) * 32
        self.lanes = blocks * self.block_lanes
        self.warps = self.lanes // 32
        self.window = Window(Memory())
        self.symbols = dict(symbols)
        self.raw = {n: np.zeros(self.lanes, np.bool_ if k == "pred" else RAW[WIDTH[k]]) for n, k in kernel.registers.items()}
        self.carry = np.zeros(self.lanes, np.bool_)
        self.shaped: dict[tuple[Any, int, tuple[int, ...]], Array] = {}
        self.scratches: dict[tuple[Any, int], Array] = {}
        self.launch_values: dict[str, Array] = {}
        self.param_bytes = np.zeros(max([offset + size_of(kind) for _, kind, offset in kernel.params] or [8]) + 16, np.uint8)
        self.param_offsets = {name: offset for name, _, offset in kernel.params}
        self.stats: dict[str, Any] = {}
        self._variables(shared_bytes)
        self._special()
        self.clock = 0
        self.copies: Any = None  # what is in flight: cp.async, mbarriers, wgmma, made by whoever needs them
        self.barriers: Any = None
        self.reads: Any = None

    @property
    def nbytes(self) -> int:
        """Of the arrays, about."""
        arrays = [*self.raw.values(), *self.scratches.values(), *self.shaped.values(), *self.special.values()]
        return sum(array.nbytes for array in arrays) + 4 * self.shared.data.nbytes + self.local.nbytes

    # -- addresses -------------------------------------------------------------------------------------------------------

    def _variables(self, dynamic: int) -> None:
        """Place shared, local and call-parameter variables."""
        at, local, call = SHARED_BASE, 0, 0
        external = []
        for variable in [*self.options.module.variables.values(), *self.kernel.variables.values()]:
            if variable.space == "shared" and variable.external:
                external.append(variable)
            elif variable.space == "shared":
                at = -(-at // variable.align) * variable.align
                self.symbols[variable.name] = at
                at += variable.nbytes
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.symbols[variable.name] = local
                local += variable.nbytes
            elif variable.space == "callparam":
                self.symbols[variable.name] = call
                call += -(-variable.nbytes // 8) * 8
        for variable in external:
            at = -(-at // max(variable.align, 16)) * max(variable.align, 16)
        for variable in external:
            self.symbols[variable.name] = at
        self.dynamic_bytes, self.static_bytes = dynamic, at - SHARED_BASE
        self.shared = SharedMemory(self, at - SHARED_BASE + dynamic)
        self.local_stride = -(-max(local, 1) // 16) * 16
        self.local = np.zeros(self.lanes * self.local_stride, np.uint8)
        self.local_base = np.arange(self.lanes, dtype=np.int64) * self.local_stride
        self.callparam = np.zeros((self.lanes, max(call, 8)), np.uint8)

    # -- special registers -----------------------------------------------------------------------------------------------

    def _special(self) -> None:
        lane = np.arange(self.lanes, dtype=np.uint32)
        thread = lane % np.uint32(self.block_lanes)
        self.thread = thread
        self.block = (lane // np.uint32(self.block_lanes)).astype(np.int64)
        self.lane = lane % np.uint32(32)
        one = np.uint32(1)
        self.special = {
            "%laneid": self.lane,
            "%warpid": thread // np.uint32(32),
            "%lanemask_eq": one << self.lane,
            "%lanemask_lt": (one << self.lane) - one,
            "%lanemask_le": ((np.uint64(2) << self.lane.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
        }
        self.special["%lanemask_ge"] = ~self.special["%lanemask_lt"]
        self.special["%lanemask_gt"] = ~self.special["%lanemask_le"]
        for name in ("tid", "ntid", "ctaid", "nctaid"):
            for axis in "xyz":
                self.special[f"%{name}.{axis}"] = np.zeros(self.lanes, np.uint32)
        for name, value in (("smid", 0), ("nsmid", 132), ("gridid", 1), ("nwarpid", 64), ("cluster_ctarank", 0), ("cluster_nctarank", 1)):
            self.special[f"%{name}"] = np.full(self.lanes, value, np.uint32)
        self.special["%dynamic_smem_size"] = np.full(self.lanes, self.dynamic_bytes, np.uint32)
        self.special["%total_smem_size"] = np.full(self.lanes, self.dynamic_bytes + self.static_bytes, np.uint32)

    def place(self, grid: tuple[int, int, int], block: tuple[int, int, int], first: int) -> Array:
        """Fill the indices for thread blocks `first`...; returns the mask of the lanes that exist."""
        thread = self.thread
        bx, by, _ = block
        np.copyto(self.special["%tid.x"], thread % np.uint32(bx))
        np.copyto(self.special["%tid.y"], thread // np.uint32(bx) % np.uint32(by))
        np.copyto(self.special["%tid.z"], thread // np.uint32(bx * by))
        index = self.block + first
        gx, gy, gz = grid
        np.copyto(self.special["%ctaid.x"], index % gx, casting="unsafe")
        np.copyto(self.special["%ctaid.y"], index // gx % gy, casting="unsafe")
        np.copyto(self.special["%ctaid.z"], index // (gx * gy), casting="unsafe")
        for axis, extent, count in zip("xyz", block, grid, strict=True):
            self.special[f"%ntid.{axis}"].fill(extent)
            self.special[f"%nctaid.{axis}"].fill(count)
        self.index = index
        return (thread < self.threads) & (index < gx * gy * gz)

    def reset(self, races: bool, poison: bool) -> None:
        """Nothing is in flight, shared memory is poison."""
        self.shared.reset(races, poison)
        for part in (self.copies, self.barriers, self.reads):
            if part is not None:
                part.reset()

    def where(self, lane: int) -> str:
        """Thread and thread block of a lane, for messages."""
        return ", ".join(
            f"{word} ({', '.join(str(int(self.special[f'%{name}.{axis}'][lane])) for axis in 'xyz')})"
            for word, name in (("thread", "tid"), ("thread block", "ctaid"))
        )

    def error(self, instruction: Instruction, lane: int | None, message: str) -> EmulatorError:
        """An error that names kernel, line, instruction and thread."""
        who = f" {self.where(lane)}" if lane is not None else ""
        return EmulatorError(f"{self.kernel.name[:120]}, PTX line {instruction.line}: {instruction.text}:{who} {message}")

    # -- operands --------------------------------------------------------------------------------------------------------

    def scratch(self, dtype: Any, number: int = 0, factor: int = 1) -> Array:
        """An array that holds nothing between two instructions; different numbers are different arrays."""
        key = (np.dtype(dtype), number * 8 + factor)
        if key not in self.scratches:
            self.scratches[key] = np.zeros(self.lanes * factor, dtype)
        return self.scratches[key]

    def scratch_shape(self, dtype: Any, shape: tuple[int, ...], number: int) -> Array:
        """The same with a shape of its own."""
        key = (np.dtype(dtype), number, shape)
        if key not in self.shaped:
            self.shaped[key] = np.zeros(shape, dtype)
        return self.shaped[key]

    def register(self, operand: Operand, kind: str) -> Array:
        """The view of a register as a type of the same width."""
        if operand.kind != "reg":
            raise EmulatorError(f"{operand} must be a register")
        raw, dtype = self.raw[operand.name], np.dtype(DTYPE[kind])
        if raw.dtype == np.bool_ or dtype == np.bool_:
            if raw.dtype != dtype:
                raise EmulatorError(f"{operand.name} is {raw.dtype}, the instruction wants {kind}")
            return raw
        if raw.itemsize != dtype.itemsize:
            raise EmulatorError(f"{operand.name} has {raw.itemsize} bytes, .{kind} has {dtype.itemsize}")
        return raw.view(dtype)

    def source(self, operand: Operand, kind: str) -> Array:
        """A source operand as an array over lanes, or of no dimension for a constant."""
        if operand.kind == "reg":
            return self.register(operand, kind)
        if operand.kind == "special":
            return self.special_source(operand.name, kind)
        return self.constant(operand, kind)

    def wide(self, operand: Operand, kind: str) -> Array:
        """The same over all lanes, for what must be viewed as pairs."""
        value = self.source(operand, kind)
        return np.full(self.lanes, value) if value.ndim == 0 else value

    def special_source(self, name: str, kind: str) -> Array:
        if name.startswith(("%clock", "%globaltimer")):
            raise EmulatorError(f"{name} can only be read by mov")
        if name.startswith(("%clusterid", "%cluster_ctaid")):
            return np.zeros(self.lanes, DTYPE[kind])
        if name.startswith(("%nclusterid", "%cluster_nctaid")):
            return np.ones(self.lanes, DTYPE[kind])
        value = self.special[name]
        dtype = np.dtype(DTYPE[kind])
        if dtype.itemsize != 4:
            raise EmulatorError(f"{name} has 4 bytes, .{kind} has {dtype.itemsize}")
        return value.view(dtype)

    def constant(self, operand: Operand, kind: str) -> Array:
        """An immediate or the address of a variable, of no dimension."""
        dtype = np.dtype(DTYPE[kind])
        if operand.kind == "imm":
            if dtype == np.bool_:
                return np.array(operand.value != 0)
            # bits, also for a float: PTX writes float constants as 0f..., so this one came through a mov of bits
            return np.array(operand.value % (1 << 8 * dtype.itemsize), RAW[dtype.itemsize]).view(dtype)
        if operand.kind == "f32":
            value = struct.unpack("<f", struct.pack("<I", operand.value))[0]
            if dtype.kind == "f":
                return np.array(operand.value, np.uint32).view(np.float32) if dtype.itemsize == 4 else np.array(value, dtype)
            return np.array(operand.value, np.uint32).astype(dtype)
        if operand.kind == "f64":
            bits = np.array(operand.value, np.uint64)
            return bits.view(np.float64).astype(dtype) if dtype.kind == "f" else bits
        if operand.kind == "symbol":
            if operand.name not in self.symbols:
                raise EmulatorError(f"{operand.name} is no variable")
            return np.array(self.symbols[operand.name] + operand.value, np.uint64).astype(RAW[dtype.itemsize]).view(dtype)
        raise EmulatorError(f"{operand.kind} cannot be read here")

    # -- ways to bind ----------------------------------------------------------------------------------------------------

    def alu(self, destination: Array, compute: Callable[[Array], Any]) -> Bound:
        """An instruction of each lane for itself: `compute(out)` fills every lane and reads no lane of `out` after writing it."""
        scratch = self.scratch(destination.dtype, 7)
        full = partial(compute, destination)
        copy = np.copyto

        def masked(mask: Array) -> None:
            compute(scratch)
            copy(destination, scratch, where=mask)

        def live(mask: Array) -> None:
            full()

        return Bound(full, masked, live)

    def gathered(self, sources: list[Array], destinations: list[Array], core: Callable[..., Any]) -> Bound:
        """An instruction on whole lanes: `core(lanes, *sources) -> list of results`; lanes is None for all of them."""

        def full() -> None:
            for destination, value in zip(destinations, core(None, *sources), strict=True):
                destination[...] = value

        def masked(mask: Array) -> None:
            lanes = np.flatnonzero(mask)
            results = core(lanes, *[s[lanes] if s.ndim else s for s in sources])
            for destination, value in zip(destinations, results, strict=True):
                destination[lanes] = value

        return Bound(full, masked)


def size_of(kind: str) -> int:
    """Bytes of a parameter's type."""
    return int(kind.partition(":")[2]) if kind.startswith("bytes") else WIDTH[kind]
