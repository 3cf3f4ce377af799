"""Calls of .func are unfolded where they stand, so that a kernel is one list of instructions."""

from __future__ import annotations

import copy
from dataclasses import replace

from tests.ptx.errors import EmulatorError
from tests.ptx.parser import Instruction, Kernel, Module, Operand, Variable

DEPTH = 8


def unfold(module: Module) -> None:
    """Replace the calls of every kernel, in place."""
    for kernel in module.kernels.values():
        for _ in range(DEPTH):
            if not any(i.parts[0] == "call" for i in kernel.code):
                break
            _unfold_once(kernel, module)
        else:
            raise EmulatorError(f"{kernel.name[:120]}: calls nest deeper than {DEPTH}")


def _unfold_once(kernel: Kernel, module: Module) -> None:
    code: list[Instruction] = []
    moved, labels = {}, {}
    for at, instruction in enumerate(kernel.code):
        moved[at] = len(code)
        if instruction.parts[0] != "call":
            code.append(instruction)
            continue
        if instruction.guard is not None:
            raise EmulatorError(f"PTX line {instruction.line}: {instruction.text}: a call under a predicate is not emulated")
        lists = [o for o in instruction.operands if o.kind == "list"]
        position = 1 if instruction.operands[0].kind == "list" else 0
        name = instruction.operands[position].name
        if name not in module.functions:
            raise EmulatorError(f"PTX line {instruction.line}: {instruction.text}: the function {name} has no body in this text")
        callee = module.functions[name]
        results = [o.name for o in lists[0].items] if position else []
        values = [o.name for o in (lists[position].items if len(lists) > position else ())]
        names = {**dict(zip(callee.returns, results, strict=True)), **dict(zip([p[0] for p in callee.params], values, strict=True))}
        _insert(kernel, callee, names, code, labels)
    moved[len(kernel.code)] = len(code)
    kernel.labels = {label: moved[at] for label, at in kernel.labels.items()} | labels
    kernel.code = code


def _insert(kernel: Kernel, callee: Kernel, names: dict[str, str], code: list[Instruction], labels: dict[str, int]) -> None:
    """Append the callee's code with names of its own; a return goes to the end."""
    suffix = f"~{len(labels)}_{len(code)}"
    start, end = len(code), f"end{suffix}"
    kernel.registers |= {f"{name}{suffix}": kind for name, kind in callee.registers.items()}
    for variable in callee.variables.values():
        if variable.space in ("local", "callparam"):
            kernel.variables[f"{variable.name}{suffix}"] = _renamed(variable, suffix)
            names = {**names, variable.name: f"{variable.name}{suffix}"}
        else:
            kernel.variables[variable.name] = variable
    names = {**names, **{label: f"{label}{suffix}" for label in callee.labels}}
    labels |= {f"{label}{suffix}": start + at for label, at in callee.labels.items()}
    for table, targets in callee.tables.items():
        kernel.tables[f"{table}{suffix}"] = [f"{t}{suffix}" for t in targets]
    for instruction in callee.code:
        guard = (instruction.guard[0] + suffix, instruction.guard[1]) if instruction.guard else None
        if instruction.parts[0] == "ret":
            code.append(Instruction("bra", [Operand("symbol", end)], instruction.line, instruction.text, guard, ["bra"]))
            continue
        again = copy.copy(instruction)
        again.guard = guard
        again.operands = [_rename(operand, names, suffix) for operand in instruction.operands]
        code.append(again)
    labels[end] = len(code)


def _renamed(variable: Variable, suffix: str) -> Variable:
    return replace(variable, name=f"{variable.name}{suffix}")


def _rename(operand: Operand, names: dict[str, str], suffix: str) -> Operand:
    items = tuple(_rename(item, names, suffix) for item in operand.items)
    if operand.kind == "reg":
        return replace(operand, name=f"{operand.name}{suffix}", items=items)
    if operand.kind == "symbol":
        return replace(operand, name=names.get(operand.name, operand.name), items=items)
    return replace(operand, items=items)
