"""What the CPU can do, and the only place where Numba is imported and set up for `engine/cpu`.

Numba keys its disk cache on the source file of the outermost function alone, so that an edit of a kernel that it calls
would go unnoticed: the cache directory that the caller chose (NUMBA_CACHE_DIR) gets a subfolder named after a digest of
this whole package. Features are those Numba compiles for (NUMBA_CPU_NAME / NUMBA_CPU_FEATURES where set, else the
host's), so the portable path can be had on any machine. Must be imported before any kernel file; knows no model.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba


@dataclass(frozen=True, slots=True)
class Features:
    """Which instructions the kernels are built from; everything absent has a plain substitute."""

    bf16_dot: bool  # vdpbf16ps, vpermw, vcvtneps2bf16
    half_convert: bool  # float16 -> float32 in hardware: scales are kept in 16 bits
    int8_dot: bool  # vpdpbusd
    wide: bool  # 32 vector registers of 512 bits: larger register tiles
    x86: bool


_config: Any = numba.config  # its members are made at run time


def _features() -> Features:
    if _config.CPU_FEATURES is not None or _config.CPU_NAME is not None:
        names = {f[1:] for f in (_config.CPU_FEATURES or "").split(",") if f.startswith("+")}
    else:
        names = {name for name, present in llvm.get_host_cpu_features().items() if present}
    return Features(
        bf16_dot={"avx512f", "avx512bw", "avx512bf16"} <= names,
        int8_dot={"avx512f", "avx512bw", "avx512vnni"} <= names,
        half_convert="f16c" in names or platform.machine() == "aarch64",
        wide="avx512f" in names,
        x86=platform.machine() in ("x86_64", "AMD64"),
    )


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if _config.CACHE_DIR:
    _config.CACHE_DIR = os.path.join(_config.CACHE_DIR, f"cpu-{_source_digest()}")
    os.makedirs(_config.CACHE_DIR, mode=0o700, exist_ok=True)

FEATURES = _features()
