"""Registers that hold one constant: their uses become immediates, which the emulator executes faster (prmt, shifts, shuffles)."""

from __future__ import annotations

from tests.ptx.parser import Instruction, Kernel, Operand

# where every source may be an immediate
TAKES = {
    "add", "sub", "mul", "mad", "fma", "min", "max", "shl", "shr", "shf", "and", "or", "xor", "setp", "selp", "lop3", "prmt", "bfe", "bfi", "div",
    "rem", "shfl", "vote", "match", "redux",
}  # fmt: skip


def written(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    word = instruction.parts[0]
    if word in (
        "st",
        "red",
        "bra",
        "bar",
        "barrier",
        "stmatrix",
        "prefetch",
        "membar",
        "fence",
        "cp",
        "ret",
        "exit",
        "brx",
        "call",
        "mbarrier",
    ):
        if word == "mbarrier" and instruction.operands and instruction.operands[0].kind in ("reg", "pair"):
            return registers(instruction.operands[0])
        return registers(instruction.operands[0]) if word in ("bar", "barrier") and "red" in instruction.parts else []
    return registers(instruction.operands[0]) if instruction.operands else []


def registers(operand: Operand) -> list[str]:
    """Names of the registers in an operand."""
    found = [operand.name] if operand.kind == "reg" else []
    for item in operand.items:
        found += registers(item)
    return found


def propagate(kernel: Kernel) -> None:
    """Replace the uses, in place; the mov stays."""
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
        if instruction.parts[0] not in TAKES or instruction.parts[0] in ("setp", "selp") and instruction.kind == "pred":
            continue
        sources = instruction.operands[1:]
        changed = [constants.get(o.name, o) if o.kind == "reg" else o for o in sources]
        if any(o.kind == "reg" for o in changed):
            instruction.operands = [instruction.operands[0], *changed]
