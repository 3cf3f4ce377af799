"""The GGUF reader on good files and on a hostile corpus: one exception type, bounded time and memory, no tensor outside."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from formats.errors import FormatError
from formats.gguf import MAX_ARRAYS, MAX_STRINGS, TYPES, read_gguf
from tests.conftest import ROOT

EXTREMES = {4: (0, 1, 2**31, 2**32 - 1), 8: (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)}


class Writer:
    """A GGUF file by hand; remembers where each number that counts or points lies."""

    def __init__(self) -> None:
        self.data = bytearray(b"GGUF")
        self.fields: dict[str, tuple[int, int]] = {}  # name -> (position, size)

    def number(self, value: int, size: int, name: str) -> None:
        self.fields[name] = (len(self.data), size)
        self.data += value.to_bytes(size, "little")

    def string(self, text: str, name: str) -> None:
        raw = text.encode()
        self.number(len(raw), 8, f"{name} length")
        self.data += raw

    def key(self, name: str, kind: int) -> None:
        self.string(name, f"key {name}")
        self.number(kind, 4, f"type of {name}")

    def tensor(self, name: str, dims: tuple[int, ...], kind: int, offset: int) -> None:
        self.string(name, f"tensor {name}")
        self.number(len(dims), 4, f"n_dims of {name}")
        for i, d in enumerate(dims):
            self.number(d, 8, f"dim {i} of {name}")
        self.number(kind, 4, f"type of tensor {name}")
        self.number(offset, 8, f"offset of {name}")

    def pad(self, alignment: int = 32) -> None:
        self.data += bytes(-len(self.data) % alignment)


def tiny() -> Writer:
    """Every kind of value and two tensors: a [1, 4] float32 and a [2, 32] Q4_0."""
    w = Writer()
    w.number(3, 4, "version")
    w.number(2, 8, "tensor count")
    w.number(7, 8, "key count")
    w.key("general.alignment", 4)
    w.number(32, 4, "alignment")
    w.key("name", 8)
    w.string("a toy", "string")
    w.key("flag", 7)
    w.data += b"\1"
    w.key("scale", 6)
    w.data += struct.pack("<f", 0.5)
    w.key("numbers", 9)
    w.number(5, 4, "element type of numbers")
    w.number(3, 8, "length of numbers")
    w.data += struct.pack("<3i", -1, 0, 1)
    w.key("words", 9)
    w.number(8, 4, "element type of words")
    w.number(2, 8, "length of words")
    w.string("ab", "word 0")
    w.string("é", "word 1")
    w.key("nested", 9)
    w.number(9, 4, "element type of nested")
    w.number(1, 8, "length of nested")
    w.number(0, 4, "element type of inner")
    w.number(2, 8, "length of inner")
    w.data += b"\7\10"
    w.tensor("a", (4,), 0, 0)
    w.tensor("b", (32, 2), 2, 32)
    w.pad()
    w.data += struct.pack("<4f", 1, 2, 3, 4) + bytes(16) + bytes(range(36))
    return w


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(path: Path, data: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        read_gguf(write(path, data))
    assert caught.value.file == path.name
    return str(caught.value)


def check_accepted(path: Path, alignment: int = 1) -> None:
    """What being accepted promises."""
    file = read_gguf(path)
    size, end = path.stat().st_size, 0
    for t in file.tensors.values():
        assert t.offset >= end and t.offset % alignment == 0
        end = t.offset + t.nbytes
        block = TYPES[t.type]
        assert t.nbytes == int(np.prod([int(d) for d in t.shape], dtype=object)) // block.elements * block.nbytes
        assert file.raw(t.name).nbytes == t.nbytes
    assert end <= size


def test_a_good_file(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "x.gguf", bytes(tiny().data)))
    assert file.version == 3
    numbers = file.metadata.pop("numbers")
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [-1, 0, 1]
    (inner,) = file.metadata.pop("nested")
    assert inner.tolist() == [7, 8]
    assert file.metadata == {"general.alignment": 32, "name": "a toy", "flag": True, "scale": 0.5, "words": ["ab", "é"]}
    assert file.tensors["a"].shape == (4,) and file.raw("a").view("<f4").tolist() == [1, 2, 3, 4]
    assert file.tensors["b"].shape == (2, 32) and file.tensors["b"].row_bytes == 18
    assert file.raw("b").tolist() == list(range(36))
    with pytest.raises(ValueError, match="read-only"):
        file.raw("a")[0] = 1


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    data = bytes(tiny().data)
    for n in range(len(data)):
        refused(tmp_path / "x.gguf", data[:n])


@pytest.mark.parametrize("name", tiny().fields)
def test_every_number_at_its_extremes(tmp_path: Path, name: str) -> None:
    """Refused, or accepted with all promises kept; never another exception, never slow."""
    writer = tiny()
    position, size = writer.fields[name]
    path = tmp_path / "x.gguf"
    for value in (*EXTREMES[size], 2 ** (8 * size) - 32):
        data = bytearray(writer.data)
        data[position : position + size] = value.to_bytes(size, "little")
        path.write_bytes(data)
        started = time.monotonic()
        try:
            read_gguf(path)
        except FormatError:
            pass
        else:
            check_accepted(path)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "mutate, reason",
    [
        (lambda w: w.tensor("c", (4,), 0, 0), "inside the tensor before it"),
        (lambda w: w.tensor("c", (4,), 0, 64), "inside the tensor before it"),
        (lambda w: w.tensor("c", (4,), 0, 2**64 - 32), "the file ends at"),
        (lambda w: w.tensor("c", (4,), 0, 97), "not a multiple of the alignment"),
        (lambda w: w.tensor("c", (4,) * 9, 0, 96), "9 dimensions"),
        (lambda w: w.tensor("c", (), 0, 96), "0 dimensions"),
        (lambda w: w.tensor("c", (4, 0), 0, 96), "holds a zero"),
        (lambda w: w.tensor("c", (2**63, 2**63, 2, 2), 0, 96), "the file ends at"),
        (lambda w: w.tensor("c", (31,), 2, 96), "cannot be cut into Q4_0 blocks"),
        (lambda w: w.tensor("c", (4,), 4, 96), "type 4 is not supported"),
        (lambda w: w.tensor("c", (4,), 26, 96), "type 26 is not supported"),
        (lambda w: w.tensor("a", (4,), 0, 96), "appears twice"),
        (lambda w: w.tensor("", (4,), 0, 96), "empty name"),
        (lambda w: w.tensor("n" * 257, (4,), 0, 96), "257 bytes"),
    ],
)
def test_a_third_tensor_that_lies(tmp_path: Path, mutate, reason: str) -> None:
    w = Writer()
    w.number(3, 4, "version")
    w.number(3, 8, "tensors")
    w.number(0, 8, "keys")
    w.tensor("a", (4,), 0, 0)
    w.tensor("b", (32, 2), 2, 32)
    mutate(w)
    w.pad()
    w.data += bytes(256)
    assert reason in refused(tmp_path / "x.gguf", bytes(w.data))


def with_key(kind: int, body: bytes, name: str = "key") -> bytes:
    w = Writer()
    w.number(3, 4, "version")
    w.number(0, 8, "tensors")
    w.number(1, 8, "keys")
    w.key(name, kind)
    return bytes(w.data) + body


def array(kind: int, n: int) -> bytes:
    return struct.pack("<IQ", kind, n)


@pytest.mark.parametrize(
    "data, reason",
    [
        (with_key(9, array(0, 50_000_000)), "at most"),
        (with_key(9, array(0, 2**62)), "at most"),
        (with_key(9, array(12, 1000)), "do not fit"),
        (with_key(9, array(12, 1000) + bytes(2000)), "bytes at"),
        (with_key(9, array(8, 2**62)), "at most"),
        (with_key(9, array(8, MAX_STRINGS) + bytes(64)), "do not fit"),
        (with_key(9, array(9, 1) * 50), "nested deeper"),
        (with_key(9, array(9, 2**40)), "at most"),
        (with_key(9, array(13, 0)), "unknown element type 13"),
        (with_key(13, b""), "unknown value type 13"),
        (with_key(7, b"\2"), "neither 0 nor 1"),
        (with_key(8, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (with_key(9, array(8, 1) + struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (with_key(9, array(8, 1) + struct.pack("<Q", 2**63) + b"ab"), "left"),
        (with_key(4, struct.pack("<I", 3), "general.alignment"), "power of two"),
        (with_key(4, struct.pack("<I", 8192), "general.alignment"), "power of two"),
        (with_key(4, struct.pack("<I", 0), "general.alignment"), "power of two"),
        (with_key(8, struct.pack("<Q", 1) + b"8", "general.alignment"), "power of two"),
        (with_key(9, array(4, 1) + struct.pack("<I", 32), "general.alignment"), "power of two"),
        (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
        (b"GGUF\1\0\0\0" + bytes(16), "version 1"),
        (b"GGUF\4\0\0\0" + bytes(16), "version 4"),
        (b"GGML\3\0\0\0" + bytes(16), "magic"),
        (b"", "too short"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refused(tmp_path / "x.gguf", data)


def test_names_are_fit_to_print(tmp_path: Path) -> None:
    message = refused(tmp_path / "x.gguf", with_key(13, b"", "a\n\x1b[31m\u202e"))
    assert message == "x.gguf: a\\x0a\\x1b[31m\\u202e: unknown value type 13"


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    for name in ("fifo", "dir", "absent", "nul\0"):
        with pytest.raises(FormatError):
            read_gguf(tmp_path / name)


def test_random_damage(tmp_path: Path) -> None:
    """1,000 files with a few bytes changed: refused with FormatError, or all promises kept."""
    rng, good, path = random.Random(1), bytes(tiny().data), tmp_path / "x.gguf"
    accepted = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            read_gguf(path)
        except FormatError:
            continue
        accepted += 1
        check_accepted(path)
    assert 0 < accepted < 1000


CORPUS_SCRIPT = """
import sys, time
from formats.errors import FormatError
from formats.gguf import read_gguf
slowest = 0.0
for path in sys.argv[1:]:
    started = time.process_time()
    try:
        read_gguf(path)
        print("accepted", path)
    except FormatError:
        pass
    slowest = max(slowest, time.process_time() - started)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("limits", int(peak) // 1024, slowest)  # ru_maxrss would count the parent's memory from before the exec
"""


def test_big_hostile_files_cost_little(tmp_path: Path) -> None:
    """Lengths that the file does back with (sparse) bytes: still at most 2 s and 200 MB, here for all of them together."""
    heads = {
        "strings": with_key(9, array(8, MAX_STRINGS)),
        "too-many-strings": with_key(9, array(8, MAX_STRINGS + 1)),
        "numbers": with_key(9, array(0, 1 << 22)),
        "too-many-numbers": with_key(9, array(0, 1 << 31)),
        "long-string": with_key(8, struct.pack("<Q", 1 << 30)),
        "arrays": with_key(9, array(9, MAX_ARRAYS)),
        "too-many-arrays": with_key(9, array(9, MAX_ARRAYS + 1)),
        "keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40),
        "tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0),
    }
    for name, head in heads.items():
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(64 << 20)
    done = subprocess.run(
        [sys.executable, "-c", CORPUS_SCRIPT, *(str(tmp_path / name) for name in heads)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    *_, megabytes, slowest = done.stdout.split()
    assert int(megabytes) < 200 and float(slowest) < 2, done.stdout


@pytest.mark.parametrize("name", ["ggml-vocab-llama-spm.gguf", "ggml-vocab-qwen2.gguf"])
def test_real_vocabularies_load_fast(assets: Path, name: str) -> None:
    started = time.process_time()
    file = read_gguf(assets / "tokenizers" / "vectors" / name)
    assert time.process_time() - started < 1
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == (151936 if "qwen2" in name else 32000) and not file.tensors


def test_agrees_with_the_package_on_a_real_file(smollm2: Path) -> None:
    import gguf

    ours, theirs = read_gguf(smollm2), gguf.GGUFReader(smollm2)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.offset, mine.nbytes, mine.type) == (t.data_offset, t.n_bytes, t.tensor_type.name)
        assert mine.shape == tuple(int(d) for d in reversed(t.shape))
    assert ours.metadata["tokenizer.ggml.merges"] == theirs.fields["tokenizer.ggml.merges"].contents()
