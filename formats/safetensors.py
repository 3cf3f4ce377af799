"""safetensors files, read defensively: a bounded JSON header, tensors as views into a memory map.

    header length u64 | header JSON | tensor data       header[name] = {"dtype", "shape", "data_offsets": [begin, end]}

Stricter than the format's own library, which lets names appear twice. Accepted means: tensors follow one another
without gap or overlap and fill the rest of the file. numpy and standard library only: this side never needs torch.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import FormatError
from formats.files import map_file
from formats.json_file import parse_object

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
MAX_DIMS = 8
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`dtype` is a key of DTYPE_BYTES; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    _map: mmap.mmap = field(repr=False)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes: read-only uint8 [nbytes], a view into the memory map."""
        t = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, t.nbytes, t.offset)


def read_safetensors(path: Path | str) -> SafetensorsFile:
    """Read a header; tensor data is mapped and not touched. Raises FormatError and nothing else."""
    path = Path(path)
    mapped = map_file(path, smallest=10)
    length = struct.unpack_from("<Q", mapped)[0]
    if length > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise FormatError(path.name, "header", f"{length} bytes; the file has {len(mapped) - 8} and at most {MAX_HEADER_BYTES} are read")
    header = parse_object(mapped[8 : 8 + length], path.name, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(path.name, "__metadata__", "not an object of strings")
    if len(header) > MAX_TENSORS:
        raise FormatError(path.name, "header", f"{len(header)} tensors; at most {MAX_TENSORS} are read")
    tensors = {name: _tensor(path.name, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path.name, tensors, 8 + length, len(mapped))
    return SafetensorsFile(path, metadata, tensors, mapped)


def _tensor(file: str, name: str, entry: Any, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(file, name, "wants exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(file, name, f"unknown dtype; known: {', '.join(DTYPE_BYTES)}")
    if not _ints(shape) or len(shape) > MAX_DIMS or 0 in shape:
        raise FormatError(file, name, f"shape is not a list of up to {MAX_DIMS} positive integers")
    if not _ints(offsets) or len(offsets) != 2:
        raise FormatError(file, name, "data_offsets are not two integers")
    nbytes = DTYPE_BYTES[dtype]
    for d in shape:
        nbytes *= d
        if nbytes > 1 << 62:
            raise FormatError(file, name, "shape is larger than any file")
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(file, name, f"{dtype} {shape} takes {nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}")
    return Tensor(name, tuple(shape), dtype, data_start + offsets[0], nbytes)


def _ints(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _check_places(file: str, tensors: dict[str, Tensor], data_start: int, end: int) -> None:
    at = data_start
    for t in sorted(tensors.values(), key=lambda t: t.offset):
        if t.offset != at:
            raise FormatError(file, t.name, f"begins at byte {t.offset}, expected {at}: tensors overlap or leave a gap")
        at += t.nbytes
    if at != end:
        raise FormatError(file, "", f"tensors end at byte {at}, the file at {end}")
