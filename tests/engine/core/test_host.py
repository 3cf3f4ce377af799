"""A container's limits are this process's limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import host
from engine.errors import ConfigError, DeviceError
from engine.load_backend import num_threads
from tests.harness import configure

KIB = 1024


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 MiB free, no limits, four cores."""
    (tmp_path / "meminfo").write_text("MemTotal: 131072 kB\nMemAvailable:   65536 kB\n")
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path


def limit_memory(machine: Path, limit: str, used: int, inactive: int) -> None:
    (machine / "memory.max").write_text(limit + "\n")
    (machine / "memory.current").write_text(f"{used}\n")
    (machine / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_memory_without_a_limit(machine: Path) -> None:
    assert host.free_bytes() == 65536 * KIB
    limit_memory(machine, "max", 10, 0)
    assert host.free_bytes() == 65536 * KIB


def test_memory_with_a_limit(machine: Path) -> None:
    limit_memory(machine, str(1000 * KIB), 600 * KIB, 100 * KIB)
    assert host.free_bytes() == 500 * KIB
    limit_memory(machine, str(1000 * KIB), 2000 * KIB, 0)
    assert host.free_bytes() == 0
    limit_memory(machine, str(1 << 40), 0, 0)
    assert host.free_bytes() == 65536 * KIB


def test_memory_that_nobody_tells(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(DeviceError, match="num_blocks"):
        host.free_bytes()


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("max 100000", 4), ("150000 100000", 2), ("10000 100000", 1), ("900000 100000", 4), ("?", 4)]
)
def test_cores_are_those_that_are_paid_for(machine: Path, cpu_max: str, cores: int) -> None:
    (machine / "cpu.max").write_text(cpu_max)
    assert host.usable_cores() == cores


def test_threads_are_bounded_by_the_cores(machine: Path) -> None:
    assert num_threads(configure()) == 4
    assert num_threads(configure(engine={"tp": 2})) == 2
    assert num_threads(configure(engine={"tp": 8})) == 1
    assert num_threads(configure(engine={"num_threads": 3})) == 3
    with pytest.raises(ConfigError, match=r"num_threads is 5.*4 cores"):
        num_threads(configure(engine={"num_threads": 5}))
