"""Registers of a kernel before it is bound: constants become immediates, and registers that never live together share one.

NVVM names a register for each value, thousands in an unrolled kernel; a machine holds an array over all lanes for each.
Sharing keeps those arrays in the processor's cache. A lane's values are its own, so what may share is decided as for one
thread, however lanes diverge.
"""

from __future__ import annotations

from dataclasses import replace

from tests.ptx.parser import WIDTH, Instruction, Kernel, Operand
from tests.ptx.program import Block, split

# where every source may be an immediate
TAKES = {
    "add", "sub", "mul", "mad", "fma", "min", "max", "shl", "shr", "shf", "and", "or", "xor", "setp", "selp", "lop3", "prmt", "bfe", "bfi", "div",
    "rem", "shfl", "vote", "match", "redux",
}  # fmt: skip
# whose operands are all sources
READS_ONLY = {
    "st", "red", "bra", "brx", "barrier", "bar", "stmatrix", "prefetch", "prefetchu", "membar", "fence", "cp", "ret", "exit", "trap", "nanosleep",
    "setmaxnreg", "griddepcontrol", "discard", "applypriority",
}  # fmt: skip
# whose first operand is only written, whatever it held
WRITES_FIRST = TAKES | {
    "mov", "cvt", "ld", "ldu", "cvta", "mma", "ldmatrix", "movmatrix", "not", "neg", "abs", "set", "slct", "sqrt", "rcp", "rsqrt", "ex2", "lg2",
    "sin", "cos", "tanh", "popc", "clz", "bfind", "brev", "atom", "activemask", "addc", "subc", "madc", "isspacep", "copysign", "testp", "dp4a",
}  # fmt: skip


def names(operand: Operand) -> list[str]:
    """The registers in an operand."""
    found = [operand.name] if operand.kind == "reg" else []
    for item in operand.items:
        found += names(item)
    return found


def written(instruction: Instruction) -> list[str]:
    """The registers that an instruction may write."""
    if not instruction.operands or instruction.operands[0].kind == "address":
        return []
    if instruction.parts[0] in READS_ONLY and not (instruction.parts[0] in ("bar", "barrier") and "red" in instruction.parts):
        return []
    return names(instruction.operands[0])


def read(instruction: Instruction) -> list[str]:
    """The registers whose old value matters; a predicated instruction keeps that of its destination."""
    found = [instruction.guard[0]] if instruction.guard else []
    only_writes = instruction.parts[0] in WRITES_FIRST and instruction.guard is None
    for operand in instruction.operands[1 if only_writes else 0 :]:
        found += names(operand)
    return found


def propagate(kernel: Kernel) -> None:
    """Registers that are written once, by a mov of an immediate: their uses become that immediate. In place."""
    counts: dict[str, int] = {}
    for instruction in kernel.code:
        for name in written(instruction):
            counts[name] = counts.get(name, 0) + 1
    constants = {
        i.operands[0].name: i.operands[1]
        for i in kernel.code
        if i.parts[0] == "mov" and i.guard is None and i.operands[0].kind == "reg" and i.operands[1].kind in ("imm", "f32", "f64")
        and counts[i.operands[0].name] == 1 and kernel.registers[i.operands[0].name] != "pred"
    }  # fmt: skip
    for instruction in kernel.code:
        if instruction.parts[0] in TAKES:
            sources = instruction.operands[1:]
            changed = [constants.get(o.name, o) if o.kind == "reg" else o for o in sources]
            if any(o.kind == "reg" for o in changed):
                instruction.operands = [instruction.operands[0], *changed]


def successors(block: Block) -> list[int]:
    """The blocks that may follow."""
    last = block.last
    if last is None or last.parts[0] in ("bar", "barrier"):
        return [block.next]
    onward = [block.next] if last.guard is not None else []
    if last.parts[0] == "bra":
        return [block.target, *onward]
    return [*block.targets, *onward] if last.parts[0] == "brx" else onward


def intervals(kernel: Kernel) -> dict[str, tuple[int, int]]:
    """From the first to the last instruction at which each register holds a value that is still wanted."""
    blocks, _ = split(kernel)
    number = {name: at for at, name in enumerate(kernel.registers)}
    uses, kills = [], []
    for block in blocks:
        use = kill = 0
        for instruction in kernel.code[block.start : block.end]:
            for name in read(instruction):
                use |= (1 << number[name]) & ~kill
            if instruction.guard is None:
                for name in written(instruction):
                    kill |= 1 << number[name]
        uses.append(use)
        kills.append(kill)
    live_in, live_out = list(uses), [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for at in range(len(blocks) - 1, -1, -1):
            out = 0
            for to in successors(blocks[at]):
                out |= live_in[to] if to >= 0 else 0
            live_out[at] = out
            into = uses[at] | (out & ~kills[at])
            if into != live_in[at]:
                live_in[at], changed = into, True
    found: dict[str, tuple[int, int]] = {}
    order = list(kernel.registers)

    def extend(name: str, at: int) -> None:
        first, last = found.get(name, (at, at))
        found[name] = (min(first, at), max(last, at))

    for at, block in enumerate(blocks):
        for bits, place in ((live_in[at], block.start), (live_out[at], block.end)):
            while bits:
                lowest = bits & -bits
                extend(order[lowest.bit_length() - 1], place)
                bits ^= lowest
        for place in range(block.start, block.end):
            for name in (*read(kernel.code[place]), *written(kernel.code[place])):
                extend(name, place)
    return found


def share(kernel: Kernel) -> None:
    """Rename the registers so that those whose intervals do not touch share one of their width. In place."""
    found = intervals(kernel)
    free: dict[int, list[str]] = {}
    busy: list[tuple[int, str, int]] = []
    renamed: dict[str, str] = {}
    registers: dict[str, str] = {}
    for name, (first, last) in sorted(found.items(), key=lambda item: item[1]):
        kind = kernel.registers[name]
        width = 0 if kind == "pred" else WIDTH[kind]
        for end, owner, size in [entry for entry in busy if entry[0] < first]:
            free.setdefault(size, []).append(owner)
            busy.remove((end, owner, size))
        if free.get(width):
            renamed[name] = free[width].pop()
        else:
            renamed[name] = f"{'p' if width == 0 else 'b'}{width * 8}_{len(registers)}"
            registers[renamed[name]] = "pred" if width == 0 else f"b{width * 8}"
        busy.append((last, renamed[name], width))
    kernel.registers = registers
    for instruction in kernel.code:
        if instruction.guard is not None:
            instruction.guard = (renamed[instruction.guard[0]], instruction.guard[1])
        instruction.operands = [_renamed(operand, renamed) for operand in instruction.operands]


def _renamed(operand: Operand, to: dict[str, str]) -> Operand:
    if operand.kind == "reg":
        return replace(operand, name=to[operand.name])
    return replace(operand, items=tuple(_renamed(item, to) for item in operand.items)) if operand.items else operand
