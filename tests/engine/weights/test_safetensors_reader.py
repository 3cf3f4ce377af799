"""The safetensors reader: agrees with the format's library on good files, and refuses what is damaged."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formats.errors import FormatError
from formats.safetensors import DTYPE_BYTES, read_safetensors

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def write(path: Path, header: Any, data: bytes = bytes(22), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        read_safetensors(path)
    return str(caught.value)


def test_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"w": torch.randn(5, 7), "h": torch.randn(4).to(torch.bfloat16), "i": torch.arange(9), "s": torch.tensor(3.0)}
    save_file(tensors, path, metadata={"format": "pt"})
    ours = read_safetensors(path)
    assert ours.metadata == {"format": "pt"}
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        for name, tensor in tensors.items():
            assert ours.tensors[name].shape == tuple(tensor.shape)
            np.testing.assert_array_equal(ours.raw(name), tensor.reshape(-1).view(torch.uint8).numpy())
    with pytest.raises(ValueError, match="read-only"):
        ours.raw("w")[0] = 1


def test_dtype_sizes_are_torchs() -> None:
    for name, dtype in {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}.items():
        assert DTYPE_BYTES[name] == dtype.itemsize


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | entry}


@pytest.mark.parametrize(
    "header, reason",
    [
        (b"{", "Expecting"),
        (b"[]", "not an object"),
        (b"\xff", "utf-8"),
        (b'{"a":' * 5000, "Expecting|deep"),
        (b'{"a": {"dtype":"F32","shape":[],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', "appears twice"),
        (GOOD | {"__metadata__": {"a": 1}}, "__metadata__"),
        (GOOD | {"__metadata__": []}, "__metadata__"),
        (GOOD | {"c": []}, "wants exactly"),
        (changed("a", extra=1), "wants exactly"),
        (changed("a", dtype="F12"), "unknown dtype"),
        (changed("a", dtype=["F32"]), "unknown dtype"),
        (changed("a", shape=[2, -2]), "positive integers"),
        (changed("a", shape=[0]), "positive integers"),
        (changed("a", shape=[True, 4]), "positive integers"),
        (changed("a", shape=[2.0, 2]), "positive integers"),
        (changed("a", shape=[1] * 9), "positive integers"),
        (changed("a", shape=[2**61, 2**61]), "larger than any file"),
        (changed("a", shape=[2, 3]), "takes 24 bytes"),
        (changed("a", data_offsets=[0]), "two integers"),
        (changed("a", data_offsets=[16, 0]), "span -16"),
        (changed("a", data_offsets=[2**64 - 16, 2**64]), "two integers"),
        (changed("b", data_offsets=[0, 6]), "overlap or leave a gap"),
        (changed("b", data_offsets=[15, 21]), "overlap or leave a gap"),
        (changed("b", data_offsets=[17, 23]), "overlap or leave a gap"),
        ({"a": GOOD["a"]}, "the file at"),
        (changed("b", shape=[4], data_offsets=[16, 24]), "the file at"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, reason: str) -> None:
    message = refused(write(tmp_path / "x.safetensors", header))
    assert message.startswith("x.safetensors: ") and any(part in message for part in reason.split("|"))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    refused(write(tmp_path / "x.safetensors", GOOD, length=length))


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.safetensors", GOOD).read_bytes()
    read_safetensors(tmp_path / "x.safetensors")
    for n in range(len(whole)):
        (tmp_path / "y.safetensors").write_bytes(whole[:n])
        refused(tmp_path / "y.safetensors")


def test_random_damage(tmp_path: Path) -> None:
    rng, path = random.Random(2), tmp_path / "x.safetensors"
    whole = write(path, GOOD).read_bytes()
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data) - 22)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            file = read_safetensors(path)
        except FormatError:
            continue
        end = 0
        for t in sorted(file.tensors.values(), key=lambda t: t.offset):
            assert t.offset >= end and t.offset + t.nbytes <= len(data) and file.raw(t.name).nbytes == t.nbytes
            end = t.offset + t.nbytes


def test_many_duplicate_keys_are_refused_quickly(tmp_path: Path) -> None:
    text = b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b',"k0":1}'
    started = time.process_time()
    assert "appears twice" in refused(write(tmp_path / "x.safetensors", text))
    assert time.process_time() - started < 2
