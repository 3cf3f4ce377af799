"""Launch shapes of the attention kernels: (kernel, compute capability, head_dim class) -> constants. Estimates until measured.

`bench/tune.py` prints rows; a person commits them with the date and the machine. Knows no kernel's code.

decode   warps: of a thread block, each with its own stages; stages: of a warp, in flight and in use; blocks: thread blocks on a
         multiprocessor at a time; sections: the most a row is cut into, which decides how its sums round (with 8 KV heads, 32
         let 256 thread blocks share one sequence); tiles: of 16 positions in a stage, 1 or 2, more than 1 only of codes;
         few: sections of a row until each has 8 steps of all warps, 0: as many as there may be
prompt   warps; tiles: of 16 query rows a warp; keys: positions of K and V in a stage; stages; blocks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class DecodeShape:
    warps: int
    stages: int
    blocks: int
    sections: int = 32
    tiles: int = 1
    few: int = 0


@dataclass(frozen=True, slots=True)
class PromptShape:
    warps: int
    tiles: int
    keys: int
    stages: int
    blocks: int


Shape = TypeVar("Shape", DecodeShape, PromptShape)

# by compute capability, then by the largest head_dim a row is for; without a date not measured: sized so that the stages fit
DECODE: dict[tuple[int, int], dict[int, DecodeShape]] = {
    (9, 0): {
        64: DecodeShape(4, 4, 3),
        128: DecodeShape(8, 3, 1),  # 2026-11-20, H200: of 22, the best where a step is long; 0.8 us slower at 1 x 1,024
        256: DecodeShape(4, 2, 1),
    },
    (8, 0): {64: DecodeShape(4, 4, 2), 128: DecodeShape(4, 2, 2), 256: DecodeShape(4, 2, 1)},
    (8, 6): {64: DecodeShape(4, 2, 2), 128: DecodeShape(4, 2, 1), 256: DecodeShape(2, 2, 1)},
}
# of codes a tile is a half or a quarter as large: by bits, then the same. Fewer sections: ending one costs as much as two tiles, and
# reading a tile less than of 16 bits
DECODE_QUANTIZED: dict[int, dict[tuple[int, int], dict[int, DecodeShape]]] = {
    8: {
        (9, 0): {
            64: DecodeShape(4, 4, 4, 16),
            128: DecodeShape(4, 2, 2, 32, 2, 8),  # 2026-11-20, H200: of 99, 3 % above the best of each of 5 cases
            256: DecodeShape(4, 3, 1, 16),
        },
        (8, 0): {64: DecodeShape(4, 4, 3, 16), 128: DecodeShape(4, 3, 2, 16), 256: DecodeShape(4, 3, 1, 16)},
        (8, 6): {64: DecodeShape(4, 4, 2, 16), 128: DecodeShape(4, 3, 1, 16), 256: DecodeShape(2, 3, 1, 16)},
    },
    4: {
        (9, 0): {
            64: DecodeShape(4, 6, 4, 16),
            128: DecodeShape(4, 2, 4, 32, 2, 8),  # 2026-11-20, H200: of 100, the best of many sequences, 16 % slower at 1 x 32,768
            256: DecodeShape(4, 3, 2, 16),
        },
        (8, 0): {64: DecodeShape(4, 4, 3, 16), 128: DecodeShape(4, 4, 2, 16), 256: DecodeShape(4, 3, 1, 16)},
        (8, 6): {64: DecodeShape(4, 4, 3, 16), 128: DecodeShape(4, 3, 2, 16), 256: DecodeShape(4, 3, 1, 16)},
    },
}
PROMPT: dict[tuple[int, int], dict[int, PromptShape]] = {
    (9, 0): {
        64: PromptShape(4, 2, 64, 2, 2),
        128: PromptShape(4, 2, 32, 3, 2),  # 2026-11-20, H200: the best of 57, 2 % before (4, 2, 64, 2, 2)
        256: PromptShape(4, 1, 32, 2, 1),
    },
    (8, 0): {64: PromptShape(4, 2, 64, 2, 2), 128: PromptShape(8, 1, 64, 2, 1), 256: PromptShape(4, 1, 32, 2, 1)},
    (8, 6): {64: PromptShape(4, 1, 64, 2, 1), 128: PromptShape(4, 1, 32, 2, 1), 256: PromptShape(4, 1, 16, 2, 1)},
}
# over codes, where it was measured: by bits, compute capability, head_dim; 2026-11-20, H200: the best of 28 and 29
PROMPT_QUANTIZED: dict[int, dict[tuple[int, int], dict[int, PromptShape]]] = {
    8: {(9, 0): {128: PromptShape(8, 1, 64, 2, 2)}},
    4: {(9, 0): {128: PromptShape(4, 2, 64, 2, 2)}},
}
# Lengths of prompts that begin in a step for which cuDNN attends (`engine/cuda/whole_prompts.py`), ascending; 2026-11-20, H200: 1.5
# times our kernel at 1,024, 1.8 times at 4,096
WHOLE_PROMPTS: dict[tuple[int, int], tuple[int, ...]] = {(9, 0): (2048, 4096, 8192)}
WHOLE_HEAD_DIMS = (64, 128)
LEAST_FILLED = 0.8  # of a length: below, our own kernel is the quicker one
SAME_AS = {(8, 7): (8, 6), (8, 9): (8, 6)}  # the same shared memory a multiprocessor, or near it


def decode_shape(cc: tuple[int, int], head_dim: int, bits: int = 0) -> DecodeShape:
    """bits: of a quantized pool, else 0."""
    return _row(DECODE_QUANTIZED[bits] if bits else DECODE, cc, head_dim)


def prompt_shape(cc: tuple[int, int], head_dim: int, bits: int = 0) -> PromptShape:
    """bits: of a quantized pool, else 0; it has a stage of 16 bits beside those of codes, and so less room on a small card."""
    if bits and (own := PROMPT_QUANTIZED[bits].get(cc, {}).get(head_dim)):
        return own
    shape = _row(PROMPT, cc, head_dim)
    return replace(shape, keys=max(16, shape.keys // 2)) if bits and cc < (9, 0) else shape


def whole_prompt_lengths(cc: tuple[int, int], head_dim: int) -> tuple[int, ...]:
    return WHOLE_PROMPTS.get(cc, ()) if head_dim in WHOLE_HEAD_DIMS else ()


def _row(table: dict[tuple[int, int], dict[int, Shape]], cc: tuple[int, int], head_dim: int) -> Shape:
    known = table.get(SAME_AS.get(cc, cc), table[8, 6] if cc < (9, 0) else table[9, 0])
    return known[min(size for size in known if size >= head_dim)]
