"""GGUF files, read defensively: the header in one bounded pass over a memory map, tensors as views into it.

`text` takes the vocabulary from here and `engine` the weights, so this knows neither. Files come from strangers:
every length is checked against the bytes that are left before anything is allocated, all arithmetic is on Python
ints, and whatever is wrong raises `FormatError`. A file that is accepted has tensors that are aligned, in order,
disjoint and inside the file. Little-endian versions 2 and 3 only.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys ... | tensor entries ... | padding | tensor data
    key    = name string | type u32 | value          string = length u64 | UTF-8 bytes
    array  = element type u32 | length u64 | values
    entry  = name string | n_dims u32 | dims u64 (fastest first) | type u32 | offset u64 from the tensor data
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from formats.errors import FormatError
from formats.files import map_file

MAGIC = b"GGUF"
MAX_KEYS = 4096
MAX_TENSORS = 65536
MAX_NAME_BYTES = 256  # of a key or a tensor
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 1 << 22  # numbers in one array
MAX_STRINGS = 1 << 21  # in arrays, all keys together
MAX_ARRAYS = 4096  # arrays within arrays, all keys together
MAX_DEPTH = 4  # arrays within arrays
MAX_DIMS = 4
MAX_ALIGNMENT = 4096
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor type stores its elements: `nbytes` bytes hold `elements` consecutive ones of a row."""

    elements: int
    nbytes: int


TYPES = {
    "F32": BlockType(1, 4),
    "F16": BlockType(1, 2),
    "BF16": BlockType(1, 2),
    "Q4_0": BlockType(32, 18),
    "Q4_1": BlockType(32, 20),
    "Q5_0": BlockType(32, 22),
    "Q5_1": BlockType(32, 24),
    "Q8_0": BlockType(32, 34),
    "Q2_K": BlockType(256, 84),
    "Q3_K": BlockType(256, 110),
    "Q4_K": BlockType(256, 144),
    "Q5_K": BlockType(256, 176),
    "Q6_K": BlockType(256, 210),
    "IQ2_XXS": BlockType(256, 66),
}
TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    30: "BF16",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """`shape` is in numpy order (rows first); `offset` counts from the start of the file; `type` is a key of TYPES."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last axis)."""
        block = TYPES[self.type]
        return self.shape[-1] // block.elements * block.nbytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """Numbers and strings in `metadata` are Python's; arrays of numbers are numpy arrays, of strings lists."""

    path: Path
    version: int
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]
    _map: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as they are in the file: read-only uint8 [nbytes], a view into the memory map."""
        t = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, t.nbytes, t.offset)


def read_gguf(path: Path | str) -> GGUFFile:
    """Read a header; tensor data is mapped and not touched. Raises FormatError and nothing else."""
    path = Path(path)
    mapped = map_file(path, smallest=len(MAGIC))
    reader = _Reader(path.name, mapped)
    version, num_tensors = reader.preamble()
    metadata = reader.keys()
    alignment = _alignment(path.name, metadata)
    return GGUFFile(path, version, metadata, reader.tensor_entries(num_tensors, alignment), mapped)


def without_tensors(path: Path | str) -> bytes:
    """A GGUF file of the same keys and no tensors: what a tokenizer needs. Raises FormatError."""
    path = Path(path)
    mapped = map_file(path, smallest=len(MAGIC))
    reader = _Reader(path.name, mapped)
    reader.preamble()
    reader.keys()
    return mapped[:8] + struct.pack("<Q", 0) + mapped[16 : reader.pos]


def _alignment(file: str, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        shown = value if isinstance(value, (int, float)) else type(value).__name__
        raise FormatError(file, "general.alignment", f"{shown} is not a power of two up to {MAX_ALIGNMENT}")
    return value


class _Reader:
    """A cursor over the map; `where` names the key or tensor being read, for messages."""

    def __init__(self, file: str, mapped: mmap.mmap) -> None:
        self.file, self.map = file, mapped
        self.pos, self.end = 0, len(mapped)
        self.where = ""
        self.left = {STRING: MAX_STRINGS, ARRAY: MAX_ARRAYS}

    def fail(self, reason: str) -> NoReturn:
        raise FormatError(self.file, self.where, reason)

    def take(self, nbytes: int, what: str) -> int:
        """Position of the next `nbytes` bytes, and step over them."""
        if nbytes > self.end - self.pos:
            self.fail(f"{what} wants {nbytes} bytes at {self.pos}, the file has {self.end - self.pos} left")
        start = self.pos
        self.pos += nbytes
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.map, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.map, self.take(8, what))[0])

    def string(self, limit: int, what: str) -> str:
        length = self.u64(f"length of {what}")
        if length > limit:
            self.fail(f"{what} of {length} bytes; at most {limit} are read")
        start = self.take(length, what)
        try:
            return str(self.map[start : self.pos], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} at {start} is not UTF-8")

    def count(self, what: str, limit: int, smallest: int) -> int:
        """A number of things to follow, each of at least `smallest` bytes."""
        n = self.u64(f"number of {what}")
        if n > limit:
            self.fail(f"{n} {what}; at most {limit} are read")
        if n * smallest > self.end - self.pos:
            self.fail(f"{n} {what} do not fit in the {self.end - self.pos} bytes left")
        return n

    def preamble(self) -> tuple[int, int]:
        """(version, number of tensors); the number of keys is left to be read."""
        if self.map[:4] != MAGIC:
            self.fail("not a GGUF file: wrong magic number")
        self.pos = 4
        version = self.u32("version")
        if version and version & 0xFFFF == 0:
            self.fail("big-endian GGUF is not read; convert the file to little-endian")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; versions 2 and 3 are read")
        return version, self.count("tensors", MAX_TENSORS, 32)

    def keys(self) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for i in range(self.count("keys", MAX_KEYS, 13)):
            self.where = f"key {i}"
            name = self.string(MAX_NAME_BYTES, "name")
            self.where = name or self.where
            if not name or name in metadata:
                self.fail("appears twice" if name else "has an empty name")
            metadata[name] = self.value(self.u32("type"), 0)
        self.where = ""
        return metadata

    def value(self, kind: int, depth: int) -> object:
        if kind == STRING:
            return self.string(MAX_STRING_BYTES, "string")
        if kind == ARRAY:
            return self.array(depth + 1)
        if kind not in SCALARS:
            self.fail(f"unknown value type {kind}")
        value = self.numbers(kind, 1)[0].item()
        return bool(value) if kind == BOOL else value

    def numbers(self, kind: int, n: int) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.map, dtype, n, self.take(n * dtype.itemsize, f"{n} numbers")).copy() if n else np.empty(0, dtype)
        if kind != BOOL:
            return values
        if values.size and values.max() > 1:
            self.fail("a truth value is neither 0 nor 1")
        return values.astype(bool)

    def array(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            self.fail(f"arrays nested deeper than {MAX_DEPTH}")
        kind = self.u32("element type")
        if kind in SCALARS:
            return self.numbers(kind, self.count("array items", MAX_ARRAY_ITEMS, 1))
        if kind not in (STRING, ARRAY):
            self.fail(f"unknown element type {kind}")
        n = self.count("array items", self.left[kind], 8 if kind == STRING else 12)
        self.left[kind] -= n
        return self.string_list(n) if kind == STRING else [self.array(depth + 1) for _ in range(n)]

    def string_list(self, n: int) -> list[str]:
        """`string` n times in one tight loop: vocabularies have hundreds of thousands of entries."""
        out: list[str] = []
        unpack, data, pos, end = struct.Struct("<Q").unpack_from, self.map, self.pos, self.end
        for i in range(n):
            if pos + 8 > end:
                self.fail(f"string {i} of {n} is cut off by the end of the file")
            length = unpack(data, pos)[0]
            pos += 8
            if length > end - pos or length > MAX_STRING_BYTES:
                self.fail(f"string {i} of {n} has {length} bytes, the file has {end - pos} left")
            try:
                out.append(str(data[pos : pos + length], "utf-8"))
            except UnicodeDecodeError:
                self.fail(f"string {i} of {n} is not UTF-8")
            pos += length
        self.pos = pos
        return out

    def tensor_entries(self, n: int, alignment: int) -> dict[str, GGUFTensor]:
        entries: list[GGUFTensor] = []
        names: set[str] = set()
        for i in range(n):
            self.where = f"tensor {i}"
            entry = self.tensor_entry()
            if entry.name in names:
                self.fail("appears twice")
            names.add(entry.name)
            entries.append(entry)
        return self.place(entries, -(-self.pos // alignment) * alignment, alignment)

    def tensor_entry(self) -> GGUFTensor:
        """One entry, its offset still counted from the tensor data."""
        name = self.string(MAX_NAME_BYTES, "name")
        self.where = name or self.where
        n_dims = self.u32("number of dimensions")
        if not name or not 0 < n_dims <= MAX_DIMS:
            self.fail(f"{n_dims} dimensions; 1 to {MAX_DIMS} are read" if name else "has an empty name")
        dims = struct.unpack_from(f"<{n_dims}Q", self.map, self.take(8 * n_dims, "dimensions"))
        kind, offset = self.u32("type"), self.u64("offset")
        if kind not in TYPE_NAMES:
            self.fail(f"tensor type {kind} is not supported; supported: {', '.join(TYPES)}")
        block = TYPES[TYPE_NAMES[kind]]
        elements = 1
        for d in dims:
            elements *= d
        if elements == 0:
            self.fail(f"shape {dims} holds a zero")
        if dims[0] % block.elements:
            self.fail(f"rows of {dims[0]} elements cannot be cut into {TYPE_NAMES[kind]} blocks of {block.elements}")
        return GGUFTensor(name, tuple(reversed(dims)), TYPE_NAMES[kind], offset, elements // block.elements * block.nbytes)

    def place(self, entries: list[GGUFTensor], data_start: int, alignment: int) -> dict[str, GGUFTensor]:
        """Check where the tensors lie and make their offsets absolute."""
        tensors: dict[str, GGUFTensor] = {}
        free_from = data_start
        for t in entries:
            self.where = t.name
            start = data_start + t.offset
            if t.offset % alignment:
                self.fail(f"offset {t.offset} is not a multiple of the alignment {alignment}")
            if start < free_from:
                self.fail(f"offset {t.offset} lies inside the tensor before it")
            if start + t.nbytes > self.end:
                self.fail(f"{t.nbytes} bytes of data at {start}, the file ends at {self.end}")
            free_from = start + t.nbytes
            tensors[t.name] = GGUFTensor(t.name, t.shape, t.type, start, t.nbytes)
        self.where = ""
        return tensors
