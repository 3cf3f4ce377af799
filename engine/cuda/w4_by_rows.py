"""The product of one 4-bit weight, by whichever kernel is the quickest for the rows of x (`tuning.w4_kernel`).

    compute capability 9.0, pairs of the form zero     w4_few, w4_hopper
    others from 8.0 on                                 w4_few, w4_matmul

Where a dense product is quicker than both is `tuning.dense_from`; who holds the dense weight decides that (`linear.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from engine.cuda.launch import Library
from engine.cuda.tuning import w4_kernel
from engine.cuda.w4_few import W4Few
from engine.cuda.w4_hopper import W4Hopper
from engine.cuda.w4_layout import W4Device
from engine.cuda.w4_matmul import W4Matmul
from engine.cuda.w4_product import W4Product

FAMILIES: dict[str, type[W4Product]] = {"w4_few": W4Few, "w4_matmul": W4Matmul, "w4_hopper": W4Hopper}


class W4ByRows:
    """As `engine.cuda.w4_product.W4Product`, whose further arguments `card` are, for x of 1 to max_m rows."""

    def __init__(
        self, library: Library, n: int, k: int, group: int, form: str, dtype: str, *, cc: tuple[int, int], max_m: int, **card: Any
    ) -> None:
        most = {w4_kernel(cc, form, m): m for m in range(1, max_m + 1)}  # kernel -> the most rows it gets
        made = {name: FAMILIES[name](library, n, k, group, form, dtype, cc=cc, max_m=rows, **card) for name, rows in most.items()}
        self.max_m = max_m
        self.scratch_floats = max(product.scratch_floats for product in made.values())
        self._of = {m: made[w4_kernel(cc, form, m)] for m in range(1, max_m + 1)}
        self.variants = tuple(dict.fromkeys(product.launch(m)[0] for m, product in self._of.items()))  # those in use

    def family(self, m: int) -> W4Product:
        """Whose kernel serves m rows."""
        if m not in self._of:
            raise ValueError(f"this product was made for 1 to {self.max_m} rows, {m} were given")
        return self._of[m]

    def __call__(
        self, x: torch.Tensor, weight: W4Device, out: torch.Tensor, scratch: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.family(len(x))(x, weight, out, scratch, bias)
