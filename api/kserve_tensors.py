"""Tensors of the KServe v2 protocol: from the JSON of a request, or from Triton's binary extension behind it, and back.

Binary: `Inference-Header-Content-Length` bytes of JSON, then the data of each tensor that says `binary_data_size`, in
order. An element of BYTES is its length (uint32, little endian) and its bytes. Everything is checked before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import orjson

from api.errors import bad
from api.schema import wrong_type

FORMATS = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "FP32": "f", "FP64": "d",
}  # fmt: skip
DATATYPES = (*FORMATS, "BYTES")
MAX_TENSORS = 64
MAX_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]  # flat; str, bool, int or float


def read_tensors(given: Any, binary: bytes) -> list[Tensor]:
    """The inputs of a request; `binary` is what came behind its JSON."""
    if type(given) is not list:
        raise wrong_type("inputs", "an array of tensors", given)
    if not 1 <= len(given) <= MAX_TENSORS:
        raise bad("inputs", f"inputs must hold 1 to {MAX_TENSORS} tensors.", "invalid_value")
    tensors, at = [], 0
    for i, item in enumerate(given):
        tensor, size = _read_tensor(f"inputs[{i}]", item, binary, at)
        tensors.append(tensor)
        at += size
    if at != len(binary):
        raise bad("inputs", f"{len(binary)} bytes of binary data came, but the tensors speak of {at}.", "invalid_value")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise bad("inputs", "inputs name a tensor twice.", "invalid_value")
    return tensors


def _read_tensor(where: str, item: Any, binary: bytes, at: int) -> tuple[Tensor, int]:
    if type(item) is not dict:
        raise wrong_type(where, "an object", item)
    for key in item:
        if key not in ("name", "datatype", "shape", "data", "parameters"):
            raise bad(f"{where}.{key[:64]}", f"There is no field {key[:64]!r} in a tensor.", "unknown_parameter")
    name, datatype = item.get("name"), item.get("datatype")
    if type(name) is not str or not 1 <= len(name) <= 64:
        raise bad(f"{where}.name", f"{where}.name must be a string of 1 to 64 characters.", "invalid_value")
    if type(datatype) is not str or datatype not in DATATYPES:
        raise bad(f"{where}.datatype", f"{where}.datatype must be one of {', '.join(DATATYPES)}.", "invalid_value")
    shape = _shape(where, item.get("shape"))
    size = _binary_size(where, item.get("parameters"))
    if size is None:
        return Tensor(name, datatype, shape, _json_values(where, item.get("data"), datatype, math.prod(shape))), 0
    if "data" in item:
        raise bad(f"{where}.data", f"{where} has both data and binary_data_size.", "invalid_value")
    if at + size > len(binary):
        raise bad(where, f"{where} announces {size} bytes of binary data, {len(binary) - at} are left.", "invalid_value")
    return Tensor(name, datatype, shape, _binary_values(where, binary[at : at + size], datatype, math.prod(shape))), size


def _shape(where: str, value: Any) -> tuple[int, ...]:
    good = type(value) is list and 1 <= len(value) <= 4 and all(type(n) is int and 0 < n <= MAX_ELEMENTS for n in value)
    if not good or math.prod(value) > MAX_ELEMENTS:
        raise bad(f"{where}.shape", f"{where}.shape must be 1 to 4 positive integers of at most {MAX_ELEMENTS} elements.", "invalid_value")
    return tuple(value)


def _binary_size(where: str, parameters: Any) -> int | None:
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise wrong_type(f"{where}.parameters", "an object", parameters)
    for key in parameters:
        if key != "binary_data_size":
            raise bad(f"{where}.parameters", f"The parameter {key[:64]!r} of a tensor is not supported.", "unsupported_parameter")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise bad(f"{where}.parameters", "binary_data_size must be an integer of at least 0.", "invalid_value")
    return size


def _json_values(where: str, data: Any, datatype: str, count: int) -> list[Any]:
    flat: list[Any] = []
    _flatten(where, data, flat, 0)
    if len(flat) != count:
        raise bad(f"{where}.data", f"{where}.data has {len(flat)} elements, its shape {count}.", "invalid_value")
    kinds: tuple[type, ...] = (str,) if datatype == "BYTES" else (bool,) if datatype == "BOOL" else (int,)
    if datatype in ("FP32", "FP64"):
        kinds = (int, float)
    if any(type(value) not in kinds for value in flat):
        raise bad(f"{where}.data", f"{where}.data holds something that is no {datatype}.", "invalid_type")
    return flat


def _flatten(where: str, data: Any, out: list[Any], depth: int) -> None:
    if type(data) is not list or depth > 4:
        raise wrong_type(f"{where}.data", "a (nested) array of as many dimensions as the shape", data)
    for value in data:
        if type(value) is list:
            _flatten(where, value, out, depth + 1)
        else:
            out.append(value)


def _binary_values(where: str, data: bytes, datatype: str, count: int) -> list[Any]:
    if datatype != "BYTES":
        form = f"<{count}{FORMATS[datatype]}"
        if struct.calcsize(form) != len(data):
            raise bad(where, f"{where} has {len(data)} bytes of data; its shape needs {struct.calcsize(form)}.", "invalid_value")
        return list(struct.unpack(form, data))
    out: list[str] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if at + size > len(data) or len(out) == count:
            raise bad(where, f"{where} holds binary data that is no {count} strings with their lengths.", "invalid_value")
        try:
            out.append(data[at : at + size].decode())
        except UnicodeDecodeError:
            raise bad(where, f"{where} holds text that is not UTF-8.", "invalid_value") from None
        at += size
    if len(out) != count:
        raise bad(where, f"{where} holds {len(out)} strings, its shape {count}.", "invalid_value")
    return out


def write_tensors(head: dict[str, Any], outputs: list[tuple[Tensor, bool]]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary data follows it. The flag asks for binary."""
    listed, tail = [], b""
    for tensor, binary in outputs:
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if binary:
            data = _packed(tensor)
            item["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            item["data"] = tensor.values
        listed.append(item)
    body = orjson.dumps({**head, "outputs": listed})
    return (body + tail, len(body)) if any(binary for _, binary in outputs) else (body, None)


def _packed(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        parts = [value.encode() for value in tensor.values]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return struct.pack(f"<{len(tensor.values)}{FORMATS[tensor.datatype]}", *tensor.values)
