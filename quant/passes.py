"""Calibration text through the layers, one layer in memory at a time: hidden states on the disk, statistics of what linears read.

The states before and after a layer are two files that change places; they are on the disk before the layer counts as done, so
that a later start goes on with the very numbers. Knows no quantization method.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quant.awq_search import Inputs
from quant.disk import reserve
from quant.forward import SITES, Float32Model, FloatLayer
from quant.threads import SERIAL, Pool

GRAM_ROWS = 256  # of a Gram matrix, added to at a time

Tick = Callable[[float], None]  # share of the pass that is done


class HiddenStates:
    """float32 [samples, seqlen, hidden] before layer `layer` in `folder`/hidden-<layer % 2>, and room for those after it."""

    def __init__(self, folder: Path, samples: int, seqlen: int, hidden: int) -> None:
        self.shape = (samples, seqlen, hidden)
        self._row = seqlen * hidden * 4
        self._files = [folder / f"hidden-{i}" for i in range(2)]
        for path in self._files:
            reserve(path, max(1, samples * self._row))

    @property
    def nbytes(self) -> int:
        """Of both files."""
        return 2 * self.shape[0] * self._row

    def read(self, layer: int, start: int, stop: int) -> np.ndarray:
        count = min(stop, self.shape[0]) - start
        return np.fromfile(self._files[layer % 2], np.float32, count * self._row // 4, offset=start * self._row).reshape(
            -1, *self.shape[1:]
        )

    def write(self, layer: int, start: int, states: np.ndarray) -> None:
        """Of sequences from `start`, as `layer` will read them."""
        with open(self._files[layer % 2], "r+b") as file:
            file.seek(start * self._row)
            file.write(np.ascontiguousarray(states, np.float32).data)

    def flush(self, layer: int) -> None:
        handle = os.open(self._files[layer % 2], os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(slots=True)
class Wanted:
    """What a method wants to know: Gram matrices; so many rows of each input as they are; ranges of keys and values."""

    gram: bool = True
    rows: int = 0
    kv: bool = False


class Observer:
    """Statistics of one layer's inputs, summed in the order of the sequences."""

    def __init__(self, wanted: Wanted, device: torch.device, total_rows: int, pool: Pool = SERIAL) -> None:
        self._wanted, self._device, self._pool = wanted, device, pool
        self._every = max(1, total_rows // wanted.rows) if wanted.rows else 0
        self._seen: dict[str, Inputs] = {}
        self.rows: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
        self.kv: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, site: str, x: torch.Tensor) -> None:
        """x [T, features] at one of SITES, or keys "k" and values "v" [T, kv_heads, head_dim]."""
        if site in ("k", "v"):
            if self._wanted.kv:
                self._range(site, x)
            return
        features = x.shape[1]
        if site not in self._seen:
            gram = torch.zeros(features, features if self._wanted.gram else 0, device=self._device)
            self._seen[site] = Inputs(gram, torch.zeros(features, device=self._device), torch.zeros(features, device=self._device), 0)
        seen, size = self._seen[site], x.abs()
        if self._wanted.gram:
            self._pool.map(lambda start: _add_product(seen.gram, x, start), range(0, features, GRAM_ROWS))
        seen.mean += size.sum(0)
        seen.largest = torch.maximum(seen.largest, size.amax(0))
        if self._every:
            self.rows[site].append(x[-seen.tokens % self._every :: self._every].clone())
        seen.tokens += len(x)

    def _range(self, name: str, x: torch.Tensor) -> None:
        """x [T, kv_heads, head_dim]."""
        found = {"min": x.amin(0), "max": x.amax(0), "absmax": x.abs().amax(0)}
        old = self.kv.setdefault(name, found)
        self.kv[name] = {
            "min": torch.minimum(old["min"], found["min"]),
            "max": torch.maximum(old["max"], found["max"]),
            "absmax": torch.maximum(old["absmax"], found["absmax"]),
        }

    def inputs(self) -> dict[str, Inputs]:
        """By site; `mean` is one now."""
        return {site: Inputs(seen.gram, seen.mean / max(1, seen.tokens), seen.largest, seen.tokens) for site, seen in self._seen.items()}


def _add_product(gram: torch.Tensor, x: torch.Tensor, start: int) -> None:
    """Some rows of gram += x^T x."""
    gram[start : start + GRAM_ROWS].addmm_(x[:, start : start + GRAM_ROWS].T, x)


def embed(model: Float32Model, ids: np.ndarray, states: HiddenStates) -> None:
    for start, rows in enumerate(model.embed(ids)):
        states.write(0, start, rows[None])
    states.flush(0)


def through_layer(
    model: Float32Model, layer: FloatLayer, states: HiddenStates, batch_size: int, observer: Observer | None, pool: Pool, tick: Tick
) -> None:
    """Every sequence through `layer`, its outputs put where the next layer reads them."""
    count = states.shape[0]

    def compute(start: int) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
        seen: list[tuple[str, torch.Tensor]] = []
        x = torch.from_numpy(states.read(layer.index, start, start + batch_size)).to(model.backend.device)
        return model.run(layer, x, None if observer is None else lambda site, value: seen.append((site, value))), seen

    for first in range(0, count, batch_size * pool.size):
        starts = range(first, min(first + batch_size * pool.size, count), batch_size)
        for start, (out, seen) in zip(starts, pool.map(compute, starts), strict=True):
            states.write(layer.index + 1, start, out.cpu().numpy())
            for site, x in seen if observer is not None else ():
                observer.add(site, x)  # type: ignore[union-attr]
        tick(min(starts[-1] + batch_size, count) / count)
    states.flush(layer.index + 1)
