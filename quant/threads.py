"""Work on every core with torch kept to one thread an operation: small operations side by side, the same numbers on any machine.

An operation that torch splits over cores waits for the slowest of them, thousands of times a layer; and how it is split
changes the last bits of sums. Here whole pieces of work go to threads, each computed the same way wherever it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engine.host import usable_cores

A = TypeVar("A")
B = TypeVar("B")


class Pool:
    """`map` in order. `size` 1: no threads at all."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._threads = ThreadPoolExecutor(size) if size > 1 else None

    def map(self, work: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """An error of any piece is raised here."""
        return [work(item) for item in items] if self._threads is None else list(self._threads.map(work, items))

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


SERIAL = Pool()


@contextlib.contextmanager
def one_thread_an_operation(device: torch.device) -> Iterator[Pool]:
    """A pool over this machine's cores (a card: one thread, which feeds it); torch's own number of threads is put back after."""
    before = torch.get_num_threads()
    pool = Pool(usable_cores() if device.type == "cpu" else 1)
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
