"""`Emulator`: runs the kernels of a PTX text on host arrays, with the checks that hardware does not make.

Thread blocks run in batches of about `batch_lanes` threads, in order of their index; a batch runs to its end before the
next begins. So "the last thread block reduces" works, and a wait for a flag works when the thread block that sets it is
in the same or an earlier batch (`cooperative=True` puts the whole grid into one).
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.inline import unfold
from tests.ptx.machine import DTYPE, Machine, size_of
from tests.ptx.memory import GlobalShadow, Memory, Region, Window
from tests.ptx.parser import Instruction, Kernel, Module, parse
from tests.ptx.program import Program
from tests.ptx.registers import propagate, share

__all__ = ["Emulator", "EmulatorError", "Memory"]
SHARED_LIMIT = 227 * 1024  # of one thread block on sm_90
PROGRAM_BYTES = 256 << 20  # of the arrays of bound kernels, all emulators together; those used last are kept
_parsed: dict[str, Module] = {}
_programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
_numbers = itertools.count()


def parsed(text: str) -> Module:
    """The module of a text, parsed once."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest not in _parsed:
        module = parse(text)
        unfold(module)
        for kernel in module.kernels.values():
            propagate(kernel)
            share(kernel)
        _parsed[digest] = module
    return _parsed[digest]


class Options:
    """What instructions ask of the launch they run in."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.conflict_samples = 4
        self.global_shadow: GlobalShadow | None = None
        self.conflicts: dict[int, tuple[str, list[float]]] = {}
        self.sectors: dict[int, tuple[str, list[float]]] = {}

    def conflict(self, instruction: Instruction, ways: float) -> None:
        """Note the bank conflicts of one execution."""
        self.conflicts.setdefault(instruction.line, (instruction.text, []))[1].append(ways)

    def sector(self, instruction: Instruction, ratio: float) -> None:
        """Note how many sectors of global memory one execution touched, over the fewest possible."""
        self.sectors.setdefault(instruction.line, (instruction.text, []))[1].append(ratio)


class Emulator:
    """The kernels of one PTX text.

    `stats` after a launch: warp_instructions, thread_instructions, barriers, atomics, global_bytes_read,
    global_bytes_written; bank_conflicts: PTX line -> (instruction, ways), where 1.0 is free of conflicts; sectors: PTX line ->
    (instruction, 32-byte sectors of global memory over the fewest possible). These two are of the first executions of a
    kernel in each launch shape, the rest is of this launch. Within a warp the emulator runs in
    lockstep: a missing bar.warp.sync is not found.
    """

    def __init__(self, text: str) -> None:
        self.module = parsed(text)
        self.kernels = list(self.module.kernels)
        self.stats: dict[str, Any] = {}
        self._number = next(_numbers)
        self._memory = Memory()
        self._variables: list[np.ndarray] = []
        self._symbols = self._place_variables()

    def _place_variables(self) -> dict[str, int]:
        """Arrays for .global and .const variables."""
        symbols = {}
        everything = [*self.module.variables.values(), *(v for k in self.module.kernels.values() for v in k.variables.values())]
        for variable in everything:
            if variable.space in ("global", "const"):
                whole = np.zeros(variable.nbytes + 256, np.uint8)
                start = -whole.ctypes.data % 256
                array = whole[start : start + variable.nbytes]
                array[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self._variables.append(whole)
                self._memory.insert(Region(array.ctypes.data, variable.nbytes, variable.name, variable.space == "global", whole))
                symbols[variable.name] = array.ctypes.data
        return symbols

    def kernel(self, name: str | None) -> Kernel:
        """The kernel of that name, or whose name contains it, or the only one."""
        found = [k for k in self.kernels if name is None or k == name] or [k for k in self.kernels if name is not None and name in k]
        if len(found) != 1:
            raise EmulatorError(f"{len(found)} kernels are called {name}: {', '.join(self.kernels)}")
        return self.module.kernels[found[0]]

    def launch(
        self,
        name: str | None,
        grid: Sequence[int] | int,
        block: Sequence[int] | int,
        args: Sequence[Any],
        memory: Memory,
        shared_bytes: int = 0,
        *,
        races: bool = True,
        poison: bool = True,
        cooperative: bool = False,
        batch_lanes: int = 4096,
        step_limit: int = 2_000_000,
        conflict_samples: int = 4,
        global_races: bool = False,
    ) -> dict[str, Any]:
        """Run one grid; returns the stats.

        `races` and `poison` are the checks of shared memory. `global_races` raises where two thread blocks write the same
        bytes with plain stores, or one reads what another writes, which only atomics or fences of the kernel's own order:
        not for kernels that pass data between thread blocks.
        """
        kernel = self.kernel(name)
        whole_grid, whole_block = three(grid), three(block)
        threads, total = whole_block[0] * whole_block[1] * whole_block[2], whole_grid[0] * whole_grid[1] * whole_grid[2]
        if not 1 <= threads <= 1024 or total < 1:
            raise EmulatorError(f"a grid of {whole_grid} thread blocks of {whole_block} threads cannot be launched")
        lanes = -(-threads // 32) * 32
        blocks = total if cooperative else max(1, min(total, batch_lanes // lanes))
        program = self._program(kernel, blocks, threads, shared_bytes)
        machine = program.machine
        if machine.shared.nbytes > SHARED_LIMIT:
            raise EmulatorError(f"{machine.shared.nbytes} bytes of shared memory; a thread block has at most {SHARED_LIMIT}")
        machine.options.conflict_samples = conflict_samples
        machine.window = Window(memory, self._memory)
        machine.options.global_shadow = GlobalShadow(machine.window) if global_races else None
        self._set_params(machine, args)
        machine.stats.update(
            dict.fromkeys(
                ("warp_instructions", "thread_instructions", "barriers", "atomics", "global_bytes_read", "global_bytes_written"), 0
            )
        )
        for first in range(0, total, blocks):
            exists = machine.place(whole_grid, whole_block, first)
            machine.reset(races, poison)
            program.run(exists, step_limit)
        self.stats = {**machine.stats, "bank_conflicts": means(machine.options.conflicts), "sectors": means(machine.options.sectors)}
        return self.stats

    def _program(self, kernel: Kernel, blocks: int, threads: int, shared_bytes: int) -> Program:
        key = (self._number, kernel.name, blocks, threads, shared_bytes)
        if key not in _programs:
            _programs[key] = Program(Machine(kernel, self._symbols, blocks, threads, shared_bytes, Options(self.module)))
            while len(_programs) > 1 and sum(program.machine.nbytes for program in _programs.values()) > PROGRAM_BYTES:
                _programs.popitem(last=False)
        _programs.move_to_end(key)
        return _programs[key]

    def _set_params(self, machine: Machine, args: Sequence[Any]) -> None:
        """Convert the arguments by the types of the parameters."""
        params = machine.kernel.params
        if len(args) != len(params):
            raise EmulatorError(f"{machine.kernel.name[:120]} takes {len(params)} arguments, not {len(args)}")
        for (name, kind, offset), value in zip(params, args, strict=True):
            place = machine.param_bytes[offset : offset + size_of(kind)]
            if kind.startswith("bytes"):
                if len(value) != len(place):
                    raise EmulatorError(f"{name[-40:]}: {len(place)} bytes are wanted, not {len(value)}")
                place[...] = np.frombuffer(value, np.uint8)
                continue
            place[...] = np.array([as_number(value, kind)], DTYPE[kind]).view(np.uint8)


def means(samples: dict[int, tuple[str, list[float]]]) -> dict[int, tuple[str, float]]:
    """PTX line -> (instruction, mean)."""
    return {line: (text, float(np.mean(values))) for line, (text, values) in sorted(samples.items())}


def as_number(value: Any, kind: str) -> Any:
    """A Python or numpy scalar, or the address of an array, that fits the type."""
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    if isinstance(value, np.ndarray) and value.ndim:
        return value.ctypes.data
    if "f" in kind:
        return float(value)
    number = int(value)
    bits = 8 * np.dtype(DTYPE[kind]).itemsize
    if not -(1 << bits - 1) <= number < 1 << bits:
        raise EmulatorError(f"the argument {number} does not fit a .{kind}")
    number %= 1 << bits
    return number - (1 << bits) if kind.startswith("s") and number >> bits - 1 else number


def three(extent: Sequence[int] | int) -> tuple[int, int, int]:
    """1, 2 or 3 extents as three."""
    given = (extent,) if isinstance(extent, int | np.integer) else tuple(extent)
    if not 1 <= len(given) <= 3 or min(given) < 1:
        raise EmulatorError(f"{extent} is no grid or block: one to three positive numbers")
    x, y, z = (*(int(e) for e in given), 1, 1)[:3]
    return x, y, z
