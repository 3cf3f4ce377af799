"""The only import of `numba.cuda`: from a Python function to PTX. Works with no GPU and no driver.

numba-cuda is in maintenance; its successor takes the same kernel source, so a change of compiler is a change of this
file. `cuda` and `types` are what kernel files write kernels with. Knows no kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack  # numba-cuda 0.30 reads the name that NumPy 2.5 removed

from numba import config, cuda, types

if not config.ENABLE_CUDASIM:  # the simulator has no instructions of a card
    from numba.cuda.core.targetconfig import ConfigStack
    from numba.cuda.extending import intrinsic

__all__ = ["PTX_ARCHITECTURES", "ConfigStack", "compile_ptx", "cuda", "intrinsic", "pointer", "types"]

# What CI compiles for: A100, RTX 30, RTX 40 and L4, H100 and H200. Older cards take the portable kernels.
PTX_ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0))
AFTER_PREVIOUS, NEXT_MAY_BEGIN = "// after the previous kernel", "// the next kernel may begin"  # ptx.after_previous, .next_may_begin
ENTRY = re.compile(r"\.entry\s+([\w$]+)")


def pointer(element: Any) -> Any:
    """The type of a kernel argument that is the address of `element`s in device memory."""
    return types.CPointer(element)


def compile_ptx(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    cc: tuple[int, int],
    *,
    threads: int,
    min_blocks: int = 1,
    fastmath: bool = False,
    suffix: str = "",
) -> tuple[str, str]:
    """(PTX, name of its entry) of a kernel for compute capability `cc`.

    `threads` is the most a thread block may have and `min_blocks` how many of them are to fit on a multiprocessor: both
    bound the registers. `suffix` "a" asks for the architecture's own instructions (wgmma on 9.0).
    """
    target = (*cc, suffix) if suffix else cc
    ptx, _ = cuda.compile_ptx(
        function, types.void(*arguments), cc=target, fastmath=fastmath, opt=True, launch_bounds=(threads, min_blocks), abi="numba"
    )
    names = ENTRY.findall(ptx)
    if len(names) != 1:
        raise RuntimeError(f"{function.__name__}: the compiled module has {len(names)} entries, not 1")
    return ptx, names[0]
