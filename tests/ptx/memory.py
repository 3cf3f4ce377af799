"""Global memory: host arrays at their real addresses, every access inside one of them.

Nothing is copied. `Memory` keeps the regions; `Window` is one numpy view from the lowest region to the highest end, which
is only ever read at addresses that were checked, so that a gather is one `take` however many arrays there are.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ALIGN = 256


class Region:
    """Bytes [start, end) of an array that is kept alive here."""

    def __init__(self, start: int, nbytes: int, name: str, writable: bool, owner: object) -> None:
        self.start, self.end, self.name, self.writable, self.owner = start, start + nbytes, name, writable, owner
        self.shadow: Any = None


class Memory:
    """Arrays that a kernel may touch. One inside another is the same memory; two that overlap in part are refused."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.version = 0

    def add(self, array: Any, name: str = "", writable: bool | None = None) -> int:
        """Register a contiguous numpy array or CPU tensor; returns its address. Read-only numpy arrays stay so."""
        if hasattr(array, "data_ptr"):
            if not array.is_contiguous() or array.device.type != "cpu":
                raise ValueError(f"{name or 'tensor'}: only contiguous CPU tensors can be registered")
            start, nbytes, can_write = array.data_ptr(), array.numel() * array.element_size(), True
        else:
            if not array.flags.c_contiguous:
                raise ValueError(f"{name or 'array'}: only contiguous arrays can be registered")
            start, nbytes, can_write = array.ctypes.data, array.nbytes, array.flags.writeable
        self.insert(Region(start, nbytes, name or f"array {len(self.regions)}", can_write if writable is None else writable, array))
        return int(start)

    def insert(self, region: Region) -> None:
        """Keep the regions sorted and apart."""
        if region.start == region.end:
            return
        self.version += 1
        touching = [other for other in self.regions if other.start < region.end and region.start < other.end]
        for other in touching:
            if other.start <= region.start and region.end <= other.end:
                return
            if not (region.start <= other.start and other.end <= region.end):
                raise ValueError(f"{region.name} and {other.name} overlap in part: register the array that holds both")
        self.regions = sorted([r for r in self.regions if r not in touching] + [region], key=lambda r: r.start)


class Window:
    """The regions of some memories as one address range; addresses below are offsets from `base`."""

    def __init__(self, *memories: Memory) -> None:
        joined = Memory()
        for memory in memories:
            for region in memory.regions:
                joined.insert(region)
        self.regions = joined.regions
        self.base = self.regions[0].start // ALIGN * ALIGN if self.regions else ALIGN
        self.starts = [region.start - self.base for region in self.regions]
        self.ends = [region.end - self.base for region in self.regions]
        self.start_array = np.array(self.starts or [0], np.int64)
        self.end_array = np.array(self.ends or [0], np.int64)
        self.writable_array = np.array([region.writable for region in self.regions] or [False])
        self.nbytes = (self.ends[-1] if self.ends else 0) // ALIGN * ALIGN + ALIGN
        # read-only for numpy says nothing here: the region is asked at every store
        self.bytes = np.asarray(_Span(self.base, self.nbytes)) if self.regions else np.zeros(ALIGN, np.uint8)
        self.flat = {width: self.bytes.view(word) for width, word in WORD.items()}
        self.rows = {(width, count): self.flat[width].reshape(-1, count) for width in WORD for count in (1, 2, 4, 8)}
        self.rows |= {(1, 16): self.bytes.reshape(-1, 16)}

    def outside(self, offsets: np.ndarray, nbytes: int, write: bool) -> int:
        """The first index whose access is not inside one region (or not allowed); -1 when all are."""
        low, high = int(offsets.min()), int(offsets.max())
        at = bisect.bisect_right(self.starts, low) - 1
        if at >= 0 and high + nbytes <= self.ends[at] and (not write or self.regions[at].writable):
            return -1
        at_each = np.searchsorted(self.start_array, offsets, side="right") - 1
        good = (at_each >= 0) & (offsets + nbytes <= self.end_array[at_each])
        if write:
            good &= self.writable_array[at_each]
        return -1 if good.all() else int(np.argmin(good))

    def explain(self, offset: int, nbytes: int, write: bool) -> str:
        """What is wrong with one address."""
        address = offset + self.base
        at = bisect.bisect_right(self.starts, offset) - 1
        if at >= 0 and offset + nbytes <= self.ends[at]:
            return f"writes {nbytes} bytes at {address:#x} in {self.regions[at].name}, which is read-only"
        near = []
        if at >= 0:
            past = offset - self.ends[at]
            how = f"{past} bytes past" if past >= 0 else "across"
            near.append(f"{how} the end of {self.regions[at].name} ({self.ends[at] - self.starts[at]} bytes)")
        if at + 1 < len(self.regions):
            near.append(f"{self.starts[at + 1] - offset} bytes before {self.regions[at + 1].name}")
        return f"{'writes' if write else 'reads'} {nbytes} bytes at {address:#x}, inside no registered array: {', or '.join(near) or 'there is none'}"


class GlobalShadow:
    """Which thread block wrote and which read each byte of the regions with plain accesses, in one launch."""

    def __init__(self, window: Window) -> None:
        self.starts, sizes = np.array(window.starts, np.int64), [e - s for s, e in zip(window.starts, window.ends, strict=True)]
        self.first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.writer = np.full(int(self.first[-1]), -1, np.int32)
        self.reader = np.full(int(self.first[-1]), -1, np.int32)

    def note(self, at: np.ndarray, blocks: np.ndarray, nbytes: int, write: bool) -> tuple[int, int]:
        """(the first access that conflicts with another thread block's, that thread block), or (-1, -1)."""
        region = np.searchsorted(self.starts, at, side="right") - 1
        index = (at - self.starts[region] + self.first[region])[:, None] + np.arange(nbytes)
        mine = np.broadcast_to(blocks.astype(np.int32)[:, None], index.shape)
        found = self.writer[index]
        bad = (found >= 0) & (found != mine)
        if write:
            read = self.reader[index]
            found = np.where(bad, found, read)
            bad |= (read >= 0) & (read != mine)
            self.writer[index] = mine
            left = self.writer[index]
            found = np.where(bad, found, left)
            bad |= left != mine
        else:
            self.reader[index] = mine
        if not bad.any():
            return -1, -1
        wrong = int(np.argmax(bad.any(axis=1)))
        return wrong, int(found[wrong][np.argmax(bad[wrong])])


class _Span:
    """An address range for numpy; holds nothing alive."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (start, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def out_of_bounds(window: Window, offsets: np.ndarray, at: int, nbytes: int, write: bool) -> EmulatorError:
    """The error for the access `offsets[at]`."""
    return EmulatorError(window.explain(int(offsets[at]), nbytes, write))
