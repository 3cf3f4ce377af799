"""How much memory this process can still have. Linux; no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import DeviceError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes that can be had without swapping: MemAvailable, or what the cgroup's memory.max leaves where that is less."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_bytes())
    raise DeviceError("/proc/meminfo names no MemAvailable; set cache.num_blocks.")


def _cgroup_bytes() -> int:
    """What the control group (v2) of a container leaves; no limit is 2**63."""
    try:
        limit, used = (CGROUP / "memory.max").read_text().strip(), int((CGROUP / "memory.current").read_text())
        reclaimable = next(int(v) for k, v in map(str.split, (CGROUP / "memory.stat").read_text().splitlines()) if k == "inactive_file")
    except (OSError, ValueError, StopIteration):
        return 1 << 63
    return 1 << 63 if limit == "max" else max(0, int(limit) - used + reclaimable)
