"""Converting a weight some rows at a time, on several threads, and looking for numbers that are not finite. Knows no format."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from engine.host import usable_cores

BITS = {  # signed integer of the same size, all bits but the sign, infinity
    torch.float32: (torch.int32, np.int32(0x7FFFFFFF), 0x7F800000),
    torch.float16: (torch.int16, np.int16(0x7FFF), 0x7C00),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), 0x7F80),
}
MAX_THREADS = 8  # that convert; more do not help, since memory and the interpreter are shared


def in_pieces(convert: Callable[[slice], None], rows: int, step: int) -> None:
    """`convert` some rows at a time, on as many threads as there is work for (numpy lets them run side by side)."""
    pieces = [slice(row, min(row + step, rows)) for row in range(0, rows, step)]
    threads = min(usable_cores(), MAX_THREADS, len(pieces) // 2)
    if threads < 2:
        for piece in pieces:
            convert(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(convert, pieces):
            pass  # an error of a piece is raised here


def all_finite(bits: np.ndarray, dtype: torch.dtype) -> bool:
    """NaN and infinity have all bits of the exponent set; looking at bits is several times as fast as a sum."""
    _, magnitude, limit = BITS[dtype]
    return not bits.size or int((bits & magnitude).max()) < limit
