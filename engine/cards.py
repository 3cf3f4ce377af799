"""Which NVIDIA cards this machine has, asked of the driver's management library: no CUDA context, no torch.

The server process, the memory plan and `check_env` ask here; only a rank ever touches a card (`engine/cuda/device.py`).
NVML's functions and structures are those of its public API reference.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"
NAME_BYTES = 96


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    cc: tuple[int, int]  # compute capability
    total_bytes: int
    free_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def cards() -> list[Card]:
    """The cards that this process may use, in the driver's order; empty where there is no driver or no card."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        found = [_card(nvml, index) for index in _visible(count.value)]
        return [card for card in found if card is not None]
    finally:
        nvml.nvmlShutdown()


def _visible(count: int) -> list[int]:
    """NVML shows every card; CUDA only those of CUDA_VISIBLE_DEVICES, up to the first index that does not exist."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return list(range(count))
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not all(name.isdigit() for name in names):  # UUIDs: so many cards, whichever they are
        return list(range(min(count, len(names))))
    return list(itertools.takewhile(lambda index: index < count, map(int, names)))


def _card(nvml: ctypes.CDLL, index: int) -> Card | None:
    """None: the driver shows it but will not let this process ask."""
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(NAME_BYTES)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, NAME_BYTES)
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else Card(name.value.decode(errors="replace"), (major.value, minor.value), memory.total, memory.free)
