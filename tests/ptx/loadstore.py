"""ld, st, atom, red, ldmatrix, cp.async: everything that touches memory (PTX ISA, "Data Movement and Conversion").

An access goes through three steps: addresses of the lanes, the check (bounds, alignment, shadow), the gather or scatter.
Generic addresses are told apart by their upper byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.machine import DTYPE, LOCAL_WINDOW, RAW, SHARED_WINDOW, Array, Bound, Machine
from tests.ptx.memory import out_of_bounds
from tests.ptx.parser import WIDTH, Instruction, Operand
from tests.ptx.shared import PENDING, wide_view

Lanes = Array | None


def space_of(instruction: Instruction) -> str:
    """shared, global, local, param, const or generic."""
    for part in instruction.parts[1:]:
        word = part.partition("::")[0]
        if word in ("shared", "global", "local", "param", "const"):
            return word
    return "generic"


def addresses(machine: Machine, operand: Operand) -> Callable[[Lanes], Array]:
    """`read(lanes) -> int64` addresses of an operand [register + offset] or [variable + offset]."""
    base, offset = operand.items[0], np.int64(operand.value)
    if base.kind == "reg":
        raw = machine.raw[base.name]
        if raw.itemsize == 8:
            wide = raw.view(np.int64)
            return lambda lanes: (wide if lanes is None else wide[lanes]) + offset
        return lambda lanes: (raw if lanes is None else raw[lanes]).astype(np.int64) + offset
    value = machine.constant(base, "s64").astype(np.int64) + offset
    return lambda lanes: np.full(machine.lanes if lanes is None else len(lanes), value)


class Port:
    """Reads and writes `count` words of `width` bytes at once, for one instruction."""

    def __init__(self, machine: Machine, instruction: Instruction, space: str, width: int, count: int) -> None:
        self.machine, self.instruction, self.space = machine, instruction, space
        self.width, self.count, self.nbytes = width, count, width * count
        self.shift = np.int64(width.bit_length() - 1)
        self.row_shift = np.int64(self.nbytes.bit_length() - 1)
        self.volatile = any(p in ("volatile", "acquire", "release", "relaxed", "acq_rel", "mmio") for p in instruction.parts)
        self.samples = 0
        if space in ("shared", "generic"):
            machine.shared.narrow(self.nbytes)

    def split(self, address: Array, lanes: Lanes) -> list[tuple[str, Array, Lanes, Any]]:
        """Generic addresses by space: (space, addresses, lanes, which of the given ones)."""
        if self.space != "generic":
            return [(self.space, address, lanes, None)]
        top = address >> 56
        kinds = {"global": 0, "shared": SHARED_WINDOW >> 56, "local": LOCAL_WINDOW >> 56}
        window = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
        first = int(top[0])
        if (top == first).all():
            space = next((name for name, value in kinds.items() if value == first), "global")
            return [(space, address - window[space] if window[space] else address, lanes, None)]
        found = []
        every = np.arange(self.machine.lanes) if lanes is None else lanes
        for space, value in kinds.items():
            chosen = np.flatnonzero(top == value)
            if len(chosen):
                found.append((space, address[chosen] - window[space], every[chosen], chosen))
        return found

    def locate(self, space: str, address: Array, lanes: Lanes, write: bool) -> tuple[Array, Any, Any]:
        """(byte offsets, flat view, rows view) after the checks."""
        machine, nbytes = self.machine, self.nbytes
        if space == "shared":
            at = machine.shared.locate(self.instruction, address, lanes, nbytes, write)
            self.sample(address, lanes, bank_ways, machine.options.conflict)
            if write:
                machine.shared.write(self.instruction, at, lanes, nbytes)
            else:
                machine.shared.read(self.instruction, at, lanes, nbytes)
            flat = machine.shared.flat[self.width]
            return at, flat, flat.reshape(-1, self.count)
        if space in ("global", "const"):
            window = machine.window
            at = address - window.base
            wrong = window.outside(at, nbytes, write)
            if wrong >= 0:
                lane = wrong if lanes is None else int(lanes[wrong])
                raise machine.error(self.instruction, lane, str(out_of_bounds(window, at, wrong, nbytes, write)))
            self.aligned(at, lanes, window.base)
            self.sample(at, lanes, sector_ratio, machine.options.sector)
            machine.stats["global_bytes_written" if write else "global_bytes_read"] += nbytes * len(at)
            if machine.options.global_shadow is not None and not self.volatile:
                blocks = machine.index if lanes is None else machine.index[lanes]
                wrong, other = machine.options.global_shadow.note(at, blocks, nbytes, write)
                if wrong >= 0:
                    lane = wrong if lanes is None else int(lanes[wrong])
                    did = "writes" if write else "reads"
                    raise machine.error(
                        self.instruction, lane, f"a race: {did} {int(at[wrong]) + window.base:#x}, which thread block {other} also uses"
                    )
            return at, window.flat[self.width], window.rows[self.width, self.count]
        if space == "local":
            limit = machine.local_stride
            if int(address.min()) < 0 or int(address.max()) + nbytes > limit:
                wrong = int(np.argmax((address < 0) | (address + nbytes > limit)))
                raise machine.error(self.instruction, wrong if lanes is None else int(lanes[wrong]), "is outside the thread's local memory")
            self.aligned(address, lanes, 0)
            at = address + (machine.local_base if lanes is None else machine.local_base[lanes])
            return at, machine.local.view(RAW[self.width]), machine.local.view(RAW[self.width]).reshape(-1, self.count)
        raise EmulatorError(f"{self.instruction.text}: no such space: {space}")

    def aligned(self, at: Array, lanes: Lanes, base: int) -> None:
        if self.nbytes > 1 and int(np.bitwise_or.reduce(at)) & (self.nbytes - 1):
            wrong = int(np.argmax(at & (self.nbytes - 1) != 0))
            lane = wrong if lanes is None else int(lanes[wrong])
            raise self.machine.error(
                self.instruction, lane, f"the address {int(at[wrong]) + base:#x} is not a multiple of {self.nbytes} bytes"
            )

    def sample(
        self, address: Array, lanes: Lanes, measure: Callable[[Array, int], float], report: Callable[[Instruction, float], None]
    ) -> None:
        """How well the first executions with whole warps use the memory."""
        if self.samples >= self.machine.options.conflict_samples or len(address) % 32:
            return
        if lanes is None or (lanes[31::32] - lanes[::32] == 31).all():
            self.samples += 1
            report(self.instruction, measure(address[: 32 * 64].reshape(-1, 32), self.nbytes))

    def load(self, address: Array, lanes: Lanes) -> Array:
        """(n, count) words."""
        pieces = self.split(address, lanes)
        if len(pieces) == 1:
            space, address, lanes, _ = pieces[0]
            at, flat, rows = self.locate(space, address, lanes, False)
            if self.count == 1:
                return flat.take(at >> self.shift, mode="clip")[:, None]
            return rows.take(at >> self.row_shift, axis=0, mode="clip")  # type: ignore[no-any-return]
        result = np.empty((len(address), self.count), RAW[self.width])
        for space, part, chosen, which in pieces:
            at, _, rows = self.locate(space, part, chosen, False)
            result[which] = rows[at >> self.row_shift]
        return result

    def store(self, address: Array, lanes: Lanes, values: Array) -> None:
        """Write (n, count) words."""
        for space, part, chosen, which in self.split(address, lanes):
            at, flat, _ = self.locate(space, part, chosen, True)
            some = values if which is None else values[which]
            if self.count == 1:
                flat[at >> self.shift] = some[:, 0]
            else:
                wide_view(flat, self.nbytes)[at >> self.row_shift] = wide_view(some.reshape(-1), self.nbytes)


def bank_ways(address: Array, nbytes: int) -> float:
    """Cycles over the fewest possible, mean over warps: 32 banks of 4 bytes; 8- and 16-byte accesses go by half and quarter."""
    lanes_at_once = 32 if nbytes <= 4 else 128 // nbytes
    words = address.reshape(-1, lanes_at_once) // 4
    if nbytes > 4:
        words = (words[:, :, None] + np.arange(nbytes // 4)).reshape(len(words), -1)
    ordered = np.sort(words, axis=1)
    fresh = np.ones_like(ordered, dtype=bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = np.zeros((len(words), 32), np.int64)
    np.add.at(counts, (np.nonzero(fresh)[0], ordered[fresh] % 32), 1)
    return float(counts.max(axis=1).mean())


def sector_ratio(address: Array, nbytes: int) -> float:
    """Sectors of 32 bytes that the warps touch, over the fewest that could hold as many different bytes."""
    places, sectors = (1 + (np.diff(np.sort(a, axis=1), axis=1) != 0).sum(axis=1) for a in (address, address >> 5))
    return float((sectors / np.ceil(places * nbytes / 32)).mean())


def vector_items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if operand.kind == "vector" else (operand,)


def load(machine: Machine, instruction: Instruction) -> Bound:
    """ld.space[.v2|.v4].type; the register may be wider than the type, which is then extended."""
    space, kind = space_of(instruction), instruction.kind
    target, source = instruction.operands
    items = vector_items(target)
    width = WIDTH[kind]
    if space == "param":
        return load_param(machine, instruction, items)
    port = Port(machine, instruction, space, width, len(items))
    where = addresses(machine, source)
    destinations = [(at, wide_target(machine, item, kind)) for at, item in enumerate(items) if item.kind != "sink"]
    dtype = np.dtype(DTYPE[kind])
    extend = dtype.kind == "i" and any(t.itemsize > width for _, t in destinations)

    def full() -> None:
        words = port.load(where(None), None)
        words = words.view(dtype) if extend else words
        for at, register in destinations:
            np.copyto(register, words[:, at], casting="unsafe")

    def masked(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        words = port.load(where(lanes), lanes)
        words = words.view(dtype) if extend else words
        for at, register in destinations:
            register[lanes] = words[:, at]

    return Bound(full, masked)


def wide_target(machine: Machine, item: Operand, kind: str) -> Array:
    """The register as unsigned bits, or signed where a narrow type must be extended."""
    raw = machine.raw[item.name]
    return raw.view(f"i{raw.itemsize}") if kind.startswith("s") and raw.itemsize > WIDTH[kind] else raw


def bits_of(kind: str) -> Any:
    """Unsigned bits of the type's width, or signed ones for what may have to be extended."""
    return DTYPE[kind] if kind.startswith("s") else RAW[WIDTH[kind]]


def load_param(machine: Machine, instruction: Instruction, items: tuple[Operand, ...]) -> Bound:
    """A kernel parameter is one value for all; a call's parameter is each lane's."""
    base, width = instruction.operands[1].items[0], WIDTH[instruction.kind]
    offset = instruction.operands[1].value
    if base.name in machine.param_offsets:
        start = machine.param_offsets[base.name] + offset
        parts = [machine.param_bytes[start + width * at : start + width * (at + 1)] for at in range(len(items))]
        dtype = bits_of(instruction.kind)
        pairs = [(wide_target(machine, item, instruction.kind), part.view(dtype)) for item, part in zip(items, parts, strict=True)]

        def full() -> None:
            for register, value in pairs:
                np.copyto(register, value, casting="unsafe")

        def masked(mask: Array) -> None:
            for register, value in pairs:
                np.copyto(register, value, casting="unsafe", where=mask)

        return Bound(full, masked, lambda mask: full())
    start = machine.symbols[base.name] + offset
    columns = [(wide_target(machine, item, instruction.kind), start + width * at) for at, item in enumerate(items)]

    def core(lanes: Lanes) -> list[Array]:
        rows = machine.callparam if lanes is None else machine.callparam[lanes]
        return [np.ascontiguousarray(rows[:, c : c + width]).view(bits_of(instruction.kind))[:, 0] for _, c in columns]

    return machine.gathered([], [register for register, _ in columns], core)


def store(machine: Machine, instruction: Instruction) -> Bound:
    """st.space[.v2|.v4].type; the register may be wider than the type."""
    space, kind = space_of(instruction), instruction.kind
    target, source = instruction.operands
    items, width = vector_items(source), WIDTH[kind]
    values = [machine.raw[item.name] if item.kind == "reg" else machine.source(item, UNSIGNED_OF.get(kind, kind)) for item in items]
    dtype = RAW[width]
    if space == "param":
        return store_param(machine, instruction, values, dtype)
    port = Port(machine, instruction, space, width, len(items))
    where = addresses(machine, target)

    def rows(lanes: Lanes) -> Array:
        result = np.empty((machine.lanes if lanes is None else len(lanes), len(items)), dtype)
        for at, value in enumerate(values):
            some = value if lanes is None or value.ndim == 0 else value[lanes]
            np.copyto(result[:, at], some.view(RAW[some.itemsize]), casting="unsafe")
        return result

    def full() -> None:
        port.store(where(None), None, rows(None))

    def masked(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        port.store(where(lanes), lanes, rows(lanes))

    return Bound(full, masked)


UNSIGNED_OF = {"s8": "u8", "s16": "u16", "s32": "u32", "s64": "u64"}


def store_param(machine: Machine, instruction: Instruction, values: list[Array], dtype: Any) -> Bound:
    base, width = instruction.operands[0].items[0], WIDTH[instruction.kind]
    start = machine.symbols[base.name] + instruction.operands[0].value

    def masked(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        for at, value in enumerate(values):
            some = np.broadcast_to(value, machine.lanes)[lanes]
            bits = some.view(RAW[some.itemsize]).astype(dtype)
            machine.callparam[lanes, start + at * width : start + (at + 1) * width] = bits[:, None].view(np.uint8)

    every = np.ones(machine.lanes, bool)
    return Bound(lambda: masked(every), masked)


# -- atomics -----------------------------------------------------------------------------------------------------------------


def combine(word: str, dtype: Any) -> Callable[..., Any]:
    """new = f(old, b, c) of one atomic operation, on numpy scalars."""
    if word == "inc":
        return lambda old, b, c: dtype(0) if old >= b else old + dtype(1)
    if word == "dec":
        return lambda old, b, c: b if old == 0 or old > b else old - dtype(1)
    if word == "cas":
        return lambda old, b, c: c if old == b else old
    return {
        "add": lambda old, b, c: old + b, "min": lambda old, b, c: min(old, b), "max": lambda old, b, c: max(old, b),
        "exch": lambda old, b, c: b, "and": lambda old, b, c: old & b, "or": lambda old, b, c: old | b, "xor": lambda old, b, c: old ^ b,
    }[word]  # fmt: skip


def atomic(machine: Machine, instruction: Instruction) -> Bound:
    """atom and red: lane after lane in order; the release and acquire of a scope are what this order already gives."""
    space, kind, parts = space_of(instruction), instruction.kind, instruction.parts
    returns = parts[0] == "atom"
    target = instruction.operands[1 if returns else 0]
    word = next(p for p in parts if p in ("add", "min", "max", "inc", "dec", "cas", "exch", "and", "or", "xor"))
    kind = {"b32": "u32", "b64": "u64", "b16": "u16"}.get(kind, kind)
    packed = kind in ("f16x2", "bf16x2", "f16", "bf16") or "noftz" in parts and "f16" in kind
    dtype: Any = DTYPE[kind]
    width = WIDTH[kind]
    first = 2 if returns else 1
    sources = [machine.wide(o, kind) for o in instruction.operands[first : first + (2 if word == "cas" else 1)]]
    destination = machine.register(instruction.operands[0], kind) if returns and instruction.operands[0].kind != "sink" else None
    port = Port(machine, instruction, space, width, 1)
    where = addresses(machine, target)
    function = packed_add(kind) if packed else combine(word, dtype)
    machine.stats["atomics"] = 0

    def masked(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        machine.stats["atomics"] += len(lanes)
        for area, part, chosen, which in port.split(where(lanes), lanes):
            at, flat = locate_atomic(port, area, part, chosen)
            b = [s[lanes if which is None else chosen] for s in sources]
            old = apply(flat.view(dtype), at >> port.shift, "sum" if word == "add" and not packed else word, function, b)
            if destination is not None:
                destination[lanes if which is None else chosen] = old

    every = np.ones(machine.lanes, bool)
    return Bound(lambda: masked(every), masked)


def locate_atomic(port: Port, space: str, address: Array, lanes: Lanes) -> tuple[Array, Any]:
    machine = port.machine
    if space == "shared":
        at = machine.shared.locate(port.instruction, address, lanes, port.nbytes, True)
        machine.shared.atomic(port.instruction, at, lanes, port.nbytes)
        return at, machine.shared.flat[port.width]
    volatile, port.volatile = port.volatile, True
    at, flat, _ = port.locate(space, address, lanes, True)
    port.volatile = volatile
    return at, flat


def apply(flat: Array, index: Array, word: str, function: Callable[..., Any], b: list[Array]) -> Array:
    """Do the lanes' operations one after the other; those of lanes with addresses of their own all at once."""
    if word == "sum" and flat.dtype.kind in "iu" and len(index) > 8:
        return add_in_order(flat, index, b[0])
    old = np.empty(len(index), flat.dtype)
    third = b[1] if len(b) > 1 else b[0]
    for lane in range(len(index)):
        at = index[lane]
        old[lane] = flat[at]
        flat[at] = function(old[lane], b[0][lane], third[lane])
    return old


def add_in_order(flat: Array, index: Array, b: Array) -> Array:
    """Integer sums, which do not care for order: running sums for each address."""
    order = np.argsort(index, kind="stable")
    place, amount = index[order], b[order]
    starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
    running = np.cumsum(amount, dtype=flat.dtype)
    before = running - amount
    lengths = np.diff(np.r_[starts, len(place)])
    base = np.repeat(before[starts], lengths)
    old_sorted = flat[place] + (before - base)
    old = np.empty_like(old_sorted)
    old[order] = old_sorted
    flat[place[starts]] += running[starts + lengths - 1] - before[starts]
    return old


def packed_add(kind: str) -> Callable[..., Any]:
    from tests.ptx.arith import bf16_to_f32, f32_to_bf16

    def add(old: Any, b: Any, _: Any) -> Any:
        left, right = np.atleast_1d(old), np.atleast_1d(b)
        if kind.startswith("bf16"):
            result = f32_to_bf16(bf16_to_f32(left.view(np.uint16)) + bf16_to_f32(right.view(np.uint16)))
        else:
            result = left.view(np.float16) + right.view(np.float16)
        return np.ascontiguousarray(result).view(left.dtype)[0]

    return add


# -- ldmatrix, stmatrix ------------------------------------------------------------------------------------------------------


def whole_warps(machine: Machine, instruction: Instruction, lanes: Lanes) -> int:
    """The number of warps; raises unless all 32 lanes of each are here."""
    if lanes is None:
        return machine.warps
    if len(lanes) % 32 or (lanes[::32] % 32).any() or (lanes.reshape(-1, 32) != lanes[::32, None] + np.arange(32)).any():
        counts = np.bincount(lanes // 32, minlength=machine.warps)
        warp = int(np.argmax((counts > 0) & (counts < 32)))
        raise machine.error(
            instruction, int(lanes[lanes // 32 == warp][0]), f"is divergent: {int(counts[warp])} of the 32 lanes of its warp are here"
        )
    return len(lanes) // 32


def ldmatrix(machine: Machine, instruction: Instruction) -> Bound:
    """Lane 8m + r gives the address of row r of matrix m; lane l gets elements (l / 4, 2 (l % 4) + {0, 1}), transposed with .trans."""
    items = vector_items(instruction.operands[0])
    destinations = [machine.register(item, "b32") for item in items]
    where = addresses(machine, instruction.operands[1])
    port = Port(machine, instruction, "shared", 4, 4)
    transposed, count = "trans" in instruction.parts, len(items)

    def core(lanes: Lanes) -> list[Array]:
        warps = whole_warps(machine, instruction, lanes)
        every = np.arange(machine.lanes) if lanes is None else lanes
        used = every.reshape(warps, 32)[:, : 8 * count].reshape(-1)
        address = where(used)
        if port.samples < machine.options.conflict_samples:
            port.samples += 1
            machine.options.conflict(instruction, bank_ways(address, 16))
        rows = port.load(address, used).reshape(warps, count, 8, 4)
        if transposed:
            halves = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, count, 8, 8).swapaxes(2, 3)
            rows = np.ascontiguousarray(halves).view(np.uint32)
        return [rows[:, matrix].reshape(-1) for matrix in range(count)]

    return machine.gathered([], destinations, core)


def stmatrix(machine: Machine, instruction: Instruction) -> Bound:
    """The inverse of ldmatrix (sm_90)."""
    items = vector_items(instruction.operands[1])
    sources = [machine.register(item, "b32") for item in items]
    where = addresses(machine, instruction.operands[0])
    port = Port(machine, instruction, "shared", 4, 4)
    transposed, count = "trans" in instruction.parts, len(items)

    def core(lanes: Lanes) -> list[Array]:
        warps = whole_warps(machine, instruction, lanes)
        every = np.arange(machine.lanes) if lanes is None else lanes
        used = every.reshape(warps, 32)[:, : 8 * count].reshape(-1)
        rows = np.stack([s[every].reshape(warps, 8, 4) for s in sources], axis=1)
        if transposed:
            halves = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, count, 8, 8).swapaxes(2, 3)
            rows = np.ascontiguousarray(halves).view(np.uint32)
        port.store(where(used), used, rows.reshape(-1, 4))
        return []

    return machine.gathered([], [], core)


# -- cp.async ----------------------------------------------------------------------------------------------------------------


class AsyncCopies:
    """Copies in flight: each knows its lanes, its group and where it goes; nothing is seen before its wait."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros(machine.lanes, np.int64)
        self.pending: list[tuple[Instruction, Array, Array, Array, Array]] = []

    def reset(self) -> None:
        self.group.fill(0)
        self.pending.clear()

    def add(self, instruction: Instruction, lanes: Array, at: Array, data: Array) -> None:
        self.pending.append((instruction, lanes, self.group[lanes], at, data))

    def wait(self, mask: Array, left: int | None) -> None:
        """Complete the groups of these lanes but the last `left` (None: also what is not committed)."""
        shared, still = self.machine.shared, []
        for instruction, lanes, group, at, data in self.pending:
            done = mask[lanes]
            if left is not None:
                done = done & (group < self.group[lanes] - left)
            if done.any():
                shared.flat[data.shape[1]][at[done] // data.shape[1]] = wide_view(data[done].reshape(-1), data.shape[1])
                shared.write(instruction, at[done], lanes[done], data.shape[1])
            if not done.all():
                keep = ~done
                still.append((instruction, lanes[keep], group[keep], at[keep], data[keep]))
        self.pending = still


def copies_of(machine: Machine) -> AsyncCopies:
    if machine.copies is None:
        machine.copies = AsyncCopies(machine)
    return machine.copies  # type: ignore[no-any-return]


def cp_async(machine: Machine, instruction: Instruction) -> Bound:
    """cp.async.{ca,cg}.shared.global [dst], [src], bytes[, bytes of src or predicate to ignore it]; commit_group; wait_group; wait_all."""
    parts, copies = instruction.parts, copies_of(machine)
    if "commit_group" in parts:

        def commit(mask: Array) -> None:
            copies.group[mask] += 1

        return every_lane(machine, commit)
    if "wait_group" in parts or "wait_all" in parts:
        left = instruction.operands[0].value if "wait_group" in parts else None
        return every_lane(machine, lambda mask: copies.wait(mask, left))
    if parts[2] not in ("ca", "cg"):
        raise EmulatorError(f"{instruction.op} is not emulated")
    nbytes = instruction.operands[2].value
    target, source = (addresses(machine, o) for o in instruction.operands[:2])
    extra = instruction.operands[3] if len(instruction.operands) > 3 else None
    ignored = machine.raw[extra.name] if extra is not None and extra.kind == "reg" and machine.raw[extra.name].dtype == np.bool_ else None
    size = machine.source(extra, "u32") if extra is not None and ignored is None and extra.kind in ("reg", "imm", "special") else None
    port = Port(machine, instruction, "global", 1 if nbytes < 4 else 4, max(nbytes // 4, 1))
    machine.shared.narrow(nbytes)

    def copy(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        at = machine.shared.locate(instruction, target(lanes), lanes, nbytes, True)
        data = np.zeros((len(lanes), nbytes), np.uint8)
        wanted = np.full(len(lanes), nbytes) if size is None else np.broadcast_to(size, machine.lanes)[lanes].astype(np.int64)
        if ignored is not None:
            wanted = np.where(ignored[lanes], 0, wanted)
        if (wanted > nbytes).any():
            raise machine.error(instruction, int(lanes[np.argmax(wanted > nbytes)]), f"copies more than its {nbytes} bytes")
        whole = wanted == nbytes
        begin = source(lanes)
        if whole.any():
            rows = port.load(begin[whole], lanes[whole])
            data[whole] = np.ascontiguousarray(rows).view(np.uint8)
        for lane in np.flatnonzero((wanted > 0) & ~whole):
            partial_port = Port(machine, instruction, "global", 1, 1)
            some = int(wanted[lane])
            data[lane, :some] = partial_port.load(begin[lane] + np.arange(some), np.full(some, lanes[lane]))[:, 0]
        machine.shared.write(instruction, at, lanes, nbytes, PENDING)
        copies.add(instruction, lanes, at, data)

    return every_lane(machine, copy)


def every_lane(machine: Machine, masked: Callable[[Array], Any]) -> Bound:
    """Bound with the same function for all lanes."""
    every = np.ones(machine.lanes, bool)
    return Bound(lambda: masked(every), masked)


def nothing(machine: Machine, instruction: Instruction) -> Bound:
    """Hints and fences: the emulator's order is stronger."""
    return Bound(lambda: None, lambda mask: None)


OPS: dict[str, Callable[[Machine, Instruction], Bound]] = {
    "ld": load, "ldu": load, "st": store, "atom": atomic, "red": atomic, "ldmatrix": ldmatrix, "stmatrix": stmatrix, "prefetch": nothing,
    "prefetchu": nothing, "membar": nothing, "discard": nothing, "applypriority": nothing, "nanosleep": nothing,
    "setmaxnreg": nothing, "griddepcontrol": nothing, "createpolicy": nothing, "pmevent": nothing,
}  # fmt: skip
