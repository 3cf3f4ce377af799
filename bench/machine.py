"""What a figure was measured on: cores, processor, the instructions that matter, and how busy others kept it. No names or paths."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FEATURES = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


def describe_machine() -> dict[str, Any]:
    """Processor name, cores this process may use, load before the run, and for each feature whether the processor has it."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "features": {name: name in flags for name in FEATURES},
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, str]]:
    """Name, driver, memory and power limit of each NVIDIA card as `nvidia-smi` tells them; empty where there is none. Makes no
    CUDA context."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    keys = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    try:
        words = [tool, f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if not colon:
                break
            fields[name.strip()] = value.strip()
    return fields


class Neighbours:
    """What other processes took of the machine's cores since this was made: 0 on a machine of one's own."""

    def __init__(self) -> None:
        self._start = _busy_s(), _own_s(), time.perf_counter()

    def share(self) -> float:
        """Of all cores' time. Child processes count as one's own once they have ended and were waited for."""
        busy, own, now = _busy_s(), _own_s(), time.perf_counter()
        seconds = max(now - self._start[2], 1e-9) * (os.cpu_count() or 1)
        return round(max(0.0, (busy - self._start[0]) - (own - self._start[1])) / seconds, 3)


def _own_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _busy_s() -> float:
    """Seconds all cores together were not idle since boot, steal included; 0 where /proc/stat is missing."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(n) for n in path.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
