"""Folders that are whole or not there: written beside their place, flushed to the disk, renamed at the end.

`ShardedTensors` is a checkpoint's safetensors files with the room for every tensor reserved before the first is made: a disk
that is too small is known in the first second, tensors may come in any order, and writing one twice does no harm.
Standard library and numpy only; knows no models.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats.safetensors import DTYPE_BYTES

SHARD_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_file(path: Path, data: bytes | memoryview) -> None:
    """A new file, on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """The file's old contents or the new ones, never a mixture."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, data)
    os.rename(partial, path)
    flush(path.parent)


def flush_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        flush(Path(folder))


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(partial: Path, dst: Path) -> None:
    """Put the finished folder in its place; the older one goes last."""
    old = dst.with_name(f"{dst.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if os.path.lexists(dst):
        os.rename(dst, old)
    try:
        os.rename(partial, dst)
    except OSError:
        if old.exists():
            os.rename(old, dst)
        raise
    flush(dst.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def reserve(path: Path, nbytes: int) -> None:
    """Make the file (if need be) and have the disk set `nbytes` aside for it; OSError (ENOSPC) where it has not got them."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot say
                raise
            os.ftruncate(handle, nbytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written. `dtype` is a key of formats.safetensors.DTYPE_BYTES."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class ShardedTensors:
    """`folder`'s safetensors files (one, or several with an index) with room for all of `planned`; metadata format: pt.

    Files that are there already, of an earlier attempt with the same plan, are gone on with.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Planned], shard_bytes: int = SHARD_BYTES, single: str = SINGLE) -> None:
        self._places: dict[str, tuple[Path, int, Planned]] = {}
        self.nbytes = sum(tensor.nbytes for tensor in planned.values())
        shards = list(_cut(planned, shard_bytes))
        names = [single] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        self._index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        self.files = [folder / name for name in names]
        self._handles: dict[Path, int] = {}
        for path, shard in zip(self.files, shards, strict=True):
            self._begin(path, {name: planned[name] for name in shard})

    def _begin(self, path: Path, shard: dict[str, Planned]) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, tensor in shard.items():
            entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        header = text + b" " * (-len(text) % 8)
        start = 8 + len(header)
        reserve(path, start + at)
        handle = self._handles[path] = os.open(path, os.O_RDWR)
        _write_at(handle, len(header).to_bytes(8, "little") + header, 0, path)
        place = start
        for name, tensor in shard.items():
            self._places[name] = (path, place, tensor)
            place += tensor.nbytes

    def write(self, name: str, array: np.ndarray, at_row: int = 0) -> None:
        """The tensor, or some of its rows from `at_row`. 16-bit and 8-bit floats come as integers of their size."""
        path, place, tensor = self._places[name]
        if array.dtype.itemsize != DTYPE_BYTES[tensor.dtype] or array.shape[1:] != tensor.shape[1:] or not array.shape:
            raise ValueError(f"{name}: {array.dtype} {array.shape} does not fit {tensor.dtype} {tensor.shape}")
        if at_row + len(array) > tensor.shape[0]:
            raise ValueError(f"{name}: rows {at_row} to {at_row + len(array) - 1} of {tensor.shape[0]}")
        row_bytes = tensor.nbytes // tensor.shape[0]
        _write_at(self._handles[path], np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, place + at_row * row_bytes, path)

    def flush(self) -> None:
        for handle in self._handles.values():
            os.fsync(handle)

    def index(self) -> bytes | None:
        """Contents of the index file; None where one file holds all."""
        if len(self.files) == 1:
            return None
        return json.dumps({"metadata": {"total_size": self.nbytes}, "weight_map": self._index}, indent=1).encode()

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


def _cut(planned: Mapping[str, Planned], shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in planned.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _write_at(handle: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(handle, view[: 1 << 28], offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time works in `folder`; BlockingIOError for the second."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
