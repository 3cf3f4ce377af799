"""Kernels as data: which variant of which factory, compiled once, cached on disk, loaded and launched in microseconds.

    Variant("engine.cuda.elementwise", "rms_norm", (4096, "bfloat16"))      names a kernel
    engine.cuda.elementwise.rms_norm(4096, "bfloat16") -> Kernel            makes it: a function, its types, its size
    library.load([variant, ...])                                            compiles what is missing, in processes
    library[variant](grid, tensor, 3, 1e-5)                                 launches it on the device's stream

A kernel takes addresses and scalars only. The disk cache is keyed by the sources of this package, the compiler's version
and the architecture; what it holds is the machine code, so a warm start needs neither Numba's compiler nor a toolkit. PTX is
assembled by nvJitLink, which also tells registers and spills, with no GPU. Knows no model.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.cuda.target import AFTER_PREVIOUS, NEXT_MAY_BEGIN, compile_ptx, types
from engine.errors import DeviceError

EARLY_LAUNCH = (9, 0)  # the first compute capability with griddepcontrol
REPORT = re.compile(r"used (\d+) registers.*?, (\d+) stack(?:.*?, (\d+) bytes lmem)?")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
KINDS = {types.int32: "i", types.uint32: "I", types.int64: "q", types.uint64: "Q", types.float32: "f", types.float64: "d"}
Scalar = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel before compilation. `threads`: of a thread block; `shared_bytes`: most dynamic shared memory of a launch;
    `min_blocks`: thread blocks that must fit on a multiprocessor; `suffix` "a": uses the architecture's own instructions; `early`:
    every thread calls `ptx.after_previous` before it touches what other kernels write, so that the kernel may be started while
    the one before it still runs (programmatic dependent launch, cc 9.0)."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    threads: int
    shared_bytes: int = 0
    min_blocks: int = 1
    fastmath: bool = False
    suffix: str = ""
    early: bool = False

    @property
    def kinds(self) -> str:
        """A struct code for each argument; P is an address."""
        return "".join("P" if isinstance(a, types.CPointer) else KINDS[a] for a in self.arguments)


@dataclass(frozen=True, slots=True)
class Variant:
    """Which kernel: a factory in a module of this package, and the constants it is made with."""

    module: str
    factory: str
    constants: tuple[Scalar, ...] = ()

    @property
    def name(self) -> str:
        """An identifier that says it all, for profilers and file names."""
        parts = (self.factory, *(str(c) for c in self.constants))
        return re.sub(r"\W", "_", "_".join(parts))

    def make(self) -> Kernel:
        if not self.module.startswith("engine.cuda."):
            raise ValueError(f"{self.module} is not a room of CUDA kernels")
        kernel = getattr(importlib.import_module(self.module), self.factory)(*self.constants)
        if not isinstance(kernel, Kernel):
            raise TypeError(f"{self.module}.{self.factory} made a {type(kernel).__name__}, not a Kernel")
        return kernel


@dataclass(frozen=True, slots=True)
class Resources:
    """What the assembler says of a kernel."""

    registers: int
    stack_bytes: int
    spill_bytes: int


class Device(Protocol):
    """What a library needs of a card; `engine.cuda.device.CudaDevice`, or an emulator of it in tests."""

    cc: tuple[int, int]
    image: str  # "cubin" or "ptx": what `load` takes

    def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
        """A launcher: (grid, *arguments) or (grid, *arguments, shared_bytes=n) for less dynamic shared memory."""


def to_ptx(variant: Variant, cc: tuple[int, int]) -> str:
    """PTX whose one entry is `variant.name`."""
    kernel = variant.make()
    text, mangled = compile_ptx(
        kernel.function, kernel.arguments, cc, threads=kernel.threads, min_blocks=kernel.min_blocks, fastmath=kernel.fastmath,
        suffix=kernel.suffix,
    )  # fmt: skip
    if kernel.early != (AFTER_PREVIOUS in text):
        raise RuntimeError(f"{variant.name} is {'not ' if kernel.early else ''}to wait for the kernel before it, by what its factory says")
    if cc >= EARLY_LAUNCH:
        text = text.replace(AFTER_PREVIOUS, "griddepcontrol.wait;").replace(NEXT_MAY_BEGIN, "griddepcontrol.launch_dependents;")
    return text.replace(mangled, variant.name)


def assemble(ptx: str, cc: tuple[int, int], suffix: str = "") -> tuple[bytes, Resources]:
    """Machine code for an architecture, and what it takes. RuntimeError with the assembler's words."""
    from cuda.bindings import nvjitlink

    data = ptx.encode()
    handle = nvjitlink.create(3, [f"-arch=sm_{cc[0]}{cc[1]}{suffix}", "-O3", "-verbose"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
        nvjitlink.complete(handle)
        image = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, image)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except nvjitlink.nvJitLinkError as error:
        words = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, words)
        raise RuntimeError(f"the assembler refused a kernel: {words.decode(errors='replace').strip(chr(0)).strip()}") from error
    finally:
        nvjitlink.destroy(handle)
    return bytes(image), _resources(log.decode(errors="replace"))


def _resources(log: str) -> Resources:
    """nvJitLink 13.0 leaves the line of spills out now and then; what is spilled lies in local memory, which it always counts."""
    used, spills = REPORT.search(log), SPILLS.search(log)
    if used is None:
        raise RuntimeError(f"the assembler's report has no registers in it: {log!r}")
    spilled = int(spills[1]) + int(spills[2]) if spills else int(used[3] or 0)
    return Resources(int(used[1]), int(used[2]), spilled)


class Library:
    """The kernels of one device. `processes`: how many may compile at a time."""

    def __init__(self, device: Device, cache_dir: Path, processes: int = 1) -> None:
        self._device = device
        self._dir = cache_dir / f"cuda-{device.cc[0]}{device.cc[1]}-{device.image}-{_digest()}"
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._processes = max(1, processes)
        self._launchers: dict[Variant, Callable[..., None]] = {}

    def __getitem__(self, variant: Variant) -> Callable[..., None]:
        if variant not in self._launchers:
            self.load([variant])
        return self._launchers[variant]

    def load(self, variants: Iterable[Variant]) -> None:
        """Make these launchable: compile those the disk cache lacks, several at a time, then load all."""
        wanted = [v for v in dict.fromkeys(variants) if v not in self._launchers]
        missing = [v for v in wanted if not self._path(v).exists()]
        if len(missing) > 2 and self._processes > 1:
            compile_in_processes(missing, self._device.cc, self._device.image, self._dir, self._processes)
        for variant in wanted:
            path = self._path(variant)
            if not path.exists():
                store(variant, self._device.cc, self._device.image, path)
            self._launchers[variant] = self._device.load(path.read_bytes(), variant.name, variant.make())

    def _path(self, variant: Variant) -> Path:
        return cached(self._dir, variant, self._device.image)


def cached(directory: Path, variant: Variant, image: str) -> Path:
    tail = hashlib.sha256(repr((variant.module, variant.factory, variant.constants)).encode()).hexdigest()[:12]
    return directory / f"{variant.name[:100]}-{tail}.{image}"


def store(variant: Variant, cc: tuple[int, int], image: str, path: Path) -> None:
    """Compile one kernel into the cache; whole or not at all."""
    ptx = to_ptx(variant, cc)
    data = ptx.encode() if image == "ptx" else assemble(ptx, cc, variant.make().suffix)[0]
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def compile_in_processes(variants: list[Variant], cc: tuple[int, int], image: str, directory: Path, processes: int) -> None:
    """Numba compiles one function at a time in a process: each process of `python -m engine.cuda.compile` takes a share."""
    shares = [variants[i::processes] for i in range(min(processes, len(variants)))]
    running = []
    for share in shares:
        work = {"cc": cc, "image": image, "directory": str(directory), "variants": [asdict(v) for v in share]}
        command = [sys.executable, "-m", "engine.cuda.compile"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
        running.append((process, json.dumps(work)))
    for process, work in running:
        process.stdin.write(work)
        process.stdin.close()
        process.stdin = None
    errors = [process.communicate()[1] for process, _ in running]
    for (process, _), words in zip(running, errors, strict=True):
        if process.returncode:
            raise DeviceError(f"A CUDA kernel did not compile: {words.strip().splitlines()[-1] if words.strip() else process.returncode}")


def _digest() -> str:
    """Of all that decides what a kernel's machine code is."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"-")
    digest.update(os.environ.get("CUDA_HOME", "").encode())
    return digest.hexdigest()[:16]
