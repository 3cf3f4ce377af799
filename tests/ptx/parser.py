"""PTX text -> kernels, variables and instructions with typed operands (PTX ISA 9, "Syntax" and "Directives").

Knows the grammar only: what an instruction does is in the files that bind it. Registers and labels of nested braces
(inline PTX) get names of their own, so that every name means one thing in a kernel.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from tests.ptx.errors import EmulatorError

WIDTH = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}  # fmt: skip
SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)(\.[xyz])?$|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|"
    r"globaltimer|globaltimer_lo|globaltimer_hi|lanemask_eq|lanemask_lt|lanemask_le|lanemask_gt|lanemask_ge|dynamic_smem_size|total_smem_size|"
    r"cluster_ctarank|cluster_nctarank)$"
)


@dataclass(frozen=True)
class Operand:
    """kind: reg, imm (value: integer), f32/f64 (value: bits), special, symbol, vector, address, pair, not, sink, list."""

    kind: str
    name: str = ""
    value: int = 0
    items: tuple[Operand, ...] = ()


@dataclass
class Instruction:
    """One statement. `op` is the whole opcode, `parts` its dot-separated pieces; `guard` is (predicate, negated)."""

    op: str
    operands: list[Operand]
    line: int
    text: str
    guard: tuple[str, bool] | None = None
    parts: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The type: the last piece of the opcode that is one."""
        return next((part for part in reversed(self.parts) if part in WIDTH), "")

    @property
    def types(self) -> list[str]:
        """All pieces of the opcode that are types, in order."""
        return [part for part in self.parts if part in WIDTH]


@dataclass
class Variable:
    """A declared array: `space` is shared, local, global or const; `external` ones take what the launch gives."""

    name: str
    space: str
    align: int
    nbytes: int
    data: bytes = b""
    external: bool = False


@dataclass
class Kernel:
    """A .entry or .func: parameters as (name, type, offset), registers by name, instructions, label -> index of one."""

    name: str
    params: list[tuple[str, str, int]]
    entry: bool = True
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    returns: list[str] = field(default_factory=list)


@dataclass
class Module:
    """A parsed text."""

    kernels: dict[str, Kernel]
    functions: dict[str, Kernel]
    variables: dict[str, Variable]


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def split_commas(text: str) -> list[str]:
    """Pieces between the commas that are in no bracket."""
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[start:at].strip())
            start = at + 1
    tail = text[start:].strip()
    return [*pieces, tail] if tail else pieces


def number(text: str) -> int | None:
    """An integer constant, or None."""
    match = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
    if not match:
        return None
    digits = match[2]
    value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
    return -value if match[1] == "-" else value


class Parser:
    """Reads one module."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", _blank, text, flags=re.DOTALL)
        self.text = re.sub(r"//[^\n]*", _blank, text)
        self.at = 0
        self.lines = [0, *(match.end() for match in re.finditer("\n", self.text))]
        self.module = Module({}, {}, {})

    def line(self, at: int) -> int:
        low, high = 0, len(self.lines)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.lines[middle] <= at else (low, middle)
        return low + 1

    def parse(self) -> Module:
        head = re.compile(r"\s*(?:\.(version|target|address_size|file|loc|section)[^\n]*\n|((?:\.\w+\s+)*)\.(entry|func)\b|(\.[^;]*?);|$)")
        while self.at < len(self.text):
            match = head.match(self.text, self.at)
            if not match:
                raise EmulatorError(f"line {self.line(self.at)}: no directive of PTX: {self.text[self.at : self.at + 80]!r}")
            if match[3]:
                self.at = match.end()
                self.function(match[3] == "entry")
            elif match[4]:
                # an initialiser holds no semicolon, so the statement ends where the pattern ended
                self.variable(match[4], self.module.variables)
                self.at = match.end()
            else:
                self.at = max(match.end(), self.at + 1)
        return self.module

    def variable(self, text: str, into: dict[str, Variable]) -> None:
        """`.visible .shared .align 4 .b8 name[512]`, `.global .align 4 .b8 table[3] = {1, 2, 3}`."""
        space = re.search(r"\.(shared|local|global|const)\b", text)
        if not space:
            return
        declaration, _, values = text.partition("=")
        kind = re.search(r"\.(b8|u8|s8|b16|u16|s16|f16|b32|u32|s32|f32|b64|u64|s64|f64|b128)\b", declaration)
        align = re.search(r"\.align\s+(\d+)", declaration)
        name = re.search(r"([\w$%]+)\s*((?:\[\d*\])*)\s*$", declaration)
        if not kind or not name:
            raise EmulatorError(f"cannot read the variable {text!r}")
        width = WIDTH[kind[1]]
        count = 1
        for dimension in re.findall(r"\[(\d*)\]", name[2]):
            count *= int(dimension or 0)
        data = b""
        for value in split_commas(values.strip().strip("{}").replace("{", "").replace("}", "")):
            data += (
                constant(value).to_bytes(width, "little", signed=False) if width < 8 else (constant(value) % 2**64).to_bytes(8, "little")
            )
        count = max(count, len(data) // width) if "[]" in name[2] and data else count
        into[name[1]] = Variable(
            name[1],
            space[1],
            int(align[1]) if align else width,
            count * width,
            data,
            "extern" in text or (count == 0 and space[1] == "shared"),
        )

    def function(self, entry: bool) -> None:
        match = re.compile(r"\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])").match(self.text, self.at)
        if not match:
            raise EmulatorError(f"line {self.line(self.at)}: cannot read the head of a function")
        self.at = match.end()
        if match[5] == ";":
            return
        kernel = Kernel(match[2], parameters(match[3] or ""), entry, returns=[name for name, _, _ in parameters(match[1] or "")])
        (self.module.kernels if entry else self.module.functions)[kernel.name] = kernel
        Body(self, kernel).parse()


def constant(text: str) -> int:
    """An initialiser as unsigned bits."""
    value = number(text)
    if value is not None:
        return value if value >= 0 else value % 2**64
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    raise EmulatorError(f"cannot read the constant {text!r}")


def parameters(text: str) -> list[tuple[str, str, int]]:
    """`.param .u64 name, .param .align 8 .b8 name[16]` -> (name, type or "bytes:16", offset)."""
    found, offset = [], 0
    for item in split_commas(text):
        match = re.fullmatch(
            r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s\S]*?\s)?([\w$%]+)(?:\[(\d+)\])?", item.strip()
        )
        if not match:
            raise EmulatorError(f"cannot read the parameter {item!r}")
        width = WIDTH[match[2]]
        align = max(width, int(match[1] or 1))
        offset = -(-offset // align) * align
        found.append((match[3], f"bytes:{int(match[4]) * width}" if match[4] else match[2], offset))
        offset += width * int(match[4] or 1)
    return found


class Body:
    """Reads the braces of one function."""

    def __init__(self, parser: Parser, kernel: Kernel) -> None:
        self.parser, self.kernel = parser, kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.open_labels: list[dict[str, str]] = [{}]
        self.number = 0
        self.targets: list[tuple[Instruction, tuple[dict[str, str], ...]]] = []

    def parse(self) -> None:
        parser, text = self.parser, self.parser.text
        space, label = re.compile(r"\s+"), re.compile(r"([$\w%]+)\s*:(?!:)")
        while True:
            match = space.match(text, parser.at)
            parser.at = match.end() if match else parser.at
            char = text[parser.at]
            if char == "{":
                self.scopes.append({})
                self.open_labels.append({})
                parser.at += 1
            elif char == "}":
                parser.at += 1
                self.scopes.pop()
                self.open_labels.pop()
                if not self.scopes:
                    break
            elif re.match(r"\.(loc|file)\s", text[parser.at : parser.at + 6]):
                parser.at = text.index("\n", parser.at)
            elif match := label.match(text, parser.at):
                parser.at = match.end()
                self.label(match[1])
            else:
                end = text.index(";", parser.at)
                self.statement(text[parser.at : end], parser.line(parser.at))
                parser.at = end + 1
        self.link()

    def label(self, name: str) -> None:
        self.number += 1
        unique = name if name not in self.kernel.labels else f"{name}#{self.number}"
        self.open_labels[-1][name] = unique
        self.kernel.labels[unique] = len(self.kernel.code)

    def statement(self, text: str, line: int) -> None:
        text = " ".join(text.split())
        if not text:
            return
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".shared", ".local", ".visible", ".extern", ".global", ".const")):
            self.parser.variable(text, self.kernel.variables)
        elif text.startswith(".param"):
            name, kind, _ = parameters(text)[0]
            nbytes = int(kind.partition(":")[2]) if kind.startswith("bytes") else WIDTH[kind]
            self.number += 1
            self.scopes[-1][name] = f"{name}#{self.number}"
            self.kernel.variables[f"{name}#{self.number}"] = Variable(f"{name}#{self.number}", "callparam", 8, nbytes)
        elif text.startswith(".branchtargets"):
            name = next(label for label, at in reversed(self.kernel.labels.items()) if at == len(self.kernel.code))
            self.kernel.tables[name] = split_commas(text.removeprefix(".branchtargets"))
        elif not text.startswith("."):
            self.instruction(text, line)

    def declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not match or match[1] not in WIDTH:
            raise EmulatorError(f"cannot read the registers {text!r}")
        for name in split_commas(match[2]):
            many = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
            for each in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]:
                self.number += 1
                unique = each if each not in self.kernel.registers else f"{each}#{self.number}"
                self.scopes[-1][each] = unique
                self.kernel.registers[unique] = match[1]

    def instruction(self, text: str, line: int) -> None:
        match = re.fullmatch(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if not match:
            raise EmulatorError(f"line {line}: cannot read {text!r}")
        guard = (self.register(match[2], line), match[1] == "!") if match[2] else None
        operands = [self.operand(piece, line) for piece in split_commas(match[4])]
        instruction = Instruction(match[3], operands, line, text, guard, match[3].split("."))
        self.kernel.code.append(instruction)
        if instruction.parts[0] == "bra" or instruction.parts[0] == "brx":
            self.targets.append((instruction, tuple(self.open_labels)))

    def register(self, name: str, line: int) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise EmulatorError(f"line {line}: {name} is not declared")

    def operand(self, text: str, line: int) -> Operand:
        """One operand of an instruction."""
        if text.startswith("["):
            return self.address(text[1:-1], line)
        if text.startswith("{"):
            return Operand("vector", items=tuple(self.operand(piece, line) for piece in split_commas(text[1:-1])))
        if text.startswith("("):
            return Operand("list", items=tuple(self.operand(piece, line) for piece in split_commas(text[1:-1])))
        if "|" in text:
            return Operand("pair", items=tuple(self.operand(piece.strip(), line) for piece in text.split("|")))
        if text.startswith("!"):
            return Operand("not", items=(self.operand(text[1:].strip(), line),))
        if text == "_":
            return Operand("sink")
        if (value := number(text)) is not None:
            return Operand("imm", value=value)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Operand("f32", value=int(text[2:], 16))
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Operand("f64", value=int(text[2:], 16))
        if re.fullmatch(r"[+-]?\d+\.\d*(e[+-]?\d+)?", text):
            return Operand("f64", value=struct.unpack("<Q", struct.pack("<d", float(text)))[0])
        if text == "WARP_SZ":
            return Operand("imm", value=32)
        for scope in reversed(self.scopes):
            if text in scope:
                return Operand("reg" if scope[text] in self.kernel.registers else "symbol", scope[text])
        if SPECIAL.match(text):
            return Operand("special", text)
        if match := re.fullmatch(r"([\w$%]+)\s*([+-])\s*(\d+)", text):
            inner = self.operand(match[1], line)
            return Operand(inner.kind, inner.name, int(match[3]) * (-1 if match[2] == "-" else 1))
        if text.startswith("%"):
            raise EmulatorError(f"line {line}: {text} is not declared")
        return Operand("symbol", text)

    def address(self, text: str, line: int) -> Operand:
        pieces = split_commas(text)
        match = re.fullmatch(r"(.+?)\s*(?:([+-])\s*(-?\w+))?", pieces[0].strip())
        if not match:
            raise EmulatorError(f"line {line}: cannot read the address [{text}]")
        offset = (number(match[3]) or 0) * (-1 if match[2] == "-" else 1) if match[3] else 0
        return Operand("address", value=offset, items=(self.operand(match[1], line), *(self.operand(p, line) for p in pieces[1:])))

    def link(self) -> None:
        """Labels are looked up when all of them are known; an inner one hides an outer one."""
        for instruction, scopes in self.targets:
            at = 0 if instruction.parts[0] == "bra" else 1
            name = instruction.operands[at].name
            for scope in reversed(scopes):
                if name in scope:
                    name = scope[name]
                    break
            else:
                raise EmulatorError(f"line {instruction.line}: the label {name} does not exist")
            instruction.operands[at] = Operand("symbol", name)


def parse(text: str) -> Module:
    """Parse a PTX module."""
    return Parser(text).parse()
