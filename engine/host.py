"""What this process may use of its machine: memory and cores, a container's limits included. Linux; no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

from engine.errors import DeviceError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 63


def free_bytes() -> int:
    """Bytes that can be had without swapping: MemAvailable, or what the cgroup's memory.max leaves where that is less."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_bytes())
    raise DeviceError("/proc/meminfo names no MemAvailable; set cache.num_blocks.")


def usable_cores() -> int:
    """Cores this process may run on, or what the cgroup's cpu.max pays for where that is less; at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _cgroup_bytes() -> int:
    """What the control group (v2) of a container leaves."""
    try:
        limit, used = (CGROUP / "memory.max").read_text().strip(), int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        reclaimable = int(stat["inactive_file"])  # cached file contents, given back when memory is short
    except (OSError, ValueError, KeyError):
        return UNLIMITED
    return UNLIMITED if limit == "max" else max(0, int(limit) - used + reclaimable)
