"""Where a parameter lies in a checkpoint's files: the words that `weight_files.py` and `quantized_files.py` share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.errors import ModelError
from engine.models.quantized import Scheme
from formats.errors import printable

DENSE_TYPES = ("F32", "F16", "BF16")


class TensorFile(Protocol):
    """What GGUFFile and SafetensorsFile have in common."""

    @property
    def path(self) -> Path: ...

    def raw(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class RowPick:
    """Which rows of a tensor a parameter is: of every `stride` rows, `count` from `start`."""

    start: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a parameter lies. `shape` is the parameter's, which is the tensor's unless `pick` takes some of its rows.
    `type` is a key of `formats.gguf.TYPES`; of safetensors one of DENSE_TYPES or the form of a `Scheme`."""

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    type: str
    interleaved_heads: int = 0  # rows of this many heads are in GGUF's order: pairs of rotated dimensions side by side
    parts: tuple[Stored, ...] = ()  # of a quantized linear, whose `name` is the linear's and `shape` [N, K]
    pick: RowPick | None = None
    unit_rows: bool = False  # each row is divided by its length when read (Baichuan2's output head)
    scheme: Scheme | None = None  # of a quantized linear

    def part(self, suffix: str) -> Stored | None:
        """The tensor `name.suffix` of a quantized linear."""
        return next((part for part in self.parts if part.name == f"{self.name}.{suffix}"), None)

    def fail(self, reason: str) -> ModelError:
        return ModelError(f"{printable(self.file.path.name)}: {printable(self.name)}: {reason}")
