"""Which cards there are, asked of a driver library that a test stands in for."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from engine import cards
from engine.cards import Card


class Nvml:
    """Three cards, of which the driver does not let this process ask the last."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0 if index < 2 else 4

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: int) -> int:
        name.value = f"Card {handle.value - 1}".encode()
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, handle.value - 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 80, 70
        return 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("", []), ("1", [1]), ("1,0", [1, 0]), ("0,7,1", [0]), ("GPU-aa,GPU-bb", [0, 1]), ("2", [])],
)
def test_the_cards_that_cuda_shows(visible: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cards.cards() == [Card(f"Card {i}", (9, i), 80, 70) for i in expected]


def test_no_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cards.cards() == []
