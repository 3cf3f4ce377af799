"""`python -m cli.check_env`: what this machine has, and whether one kernel of each usable backend compiles and is right here.

Reads the same configuration as the server (`--config`, `--set`), so that it speaks of the kernel cache, the device and, where
a model is named, the memory that the server would use. Exit code 0 where the device that the configuration asks for can be
used, else 4, with a sentence that says what to change. Without a GPU the CPU engine is what must work.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli.arguments import Parser
from config import cli as config_cli
from config.errors import ConfigError
from config.schema import Config
from config.version import VERSION
from engine.cards import Card, cards
from engine.errors import EngineError
from engine.host import free_bytes, usable_cores

INSTALL_CUDA = "Install numbatch with its cuda extra: pip install 'numbatch[cuda]'."
OLDEST_CARD = (7, 5)
OLDEST_PYTHON = (3, 11)
LEAST_HOST_BYTES = 1 << 30
LEAST_CARD_BYTES = 1 << 30  # a context, torch's libraries and the kernels take about half of it
EXIT_UNUSABLE = 4  # as server.py's for a device that cannot be used
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `state`: "ok", "none" (absent, and not needed here) or "bad"; `change`: what to do about it."""

    name: str
    state: str
    text: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class Tried:
    """A kernel that was compiled and run: its error against the reference, and seconds of the first call."""

    error: float
    seconds: float


class Probes:
    """Every question to the machine, one method each: what tests replace."""

    def version(self, package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def python(self) -> tuple[int, ...]:
        return sys.version_info[:3]

    def processor(self) -> tuple[str, list[str]]:
        """Name, and the instructions of it that the kernels use."""
        from bench.machine import describe_machine

        machine = describe_machine()
        return machine["processor"], [name for name, there in machine["features"].items() if there]

    def cores(self) -> int:
        return usable_cores()

    def free_host_bytes(self) -> int:
        return free_bytes()

    def cards(self) -> list[Card]:
        return cards()

    def driver_cuda(self) -> tuple[int, int] | None:
        """The CUDA version that the driver is for; None: no driver."""
        version = ctypes.c_int()
        try:
            failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        except OSError:
            return None
        return None if failed or not version.value else (version.value // 1000, version.value % 1000 // 10)

    def assembler_cuda(self) -> tuple[int, int] | None:
        """The CUDA version whose machine code the kernels are assembled to; None: numba-cuda is not installed."""
        version = self.version("nvidia-nvjitlink") if self.version("numba-cuda") else None
        if version is None:
            return None
        major, minor, *_ = version.split(".")
        return int(major), int(minor)

    def torch_cuda(self) -> str | None:
        """The CUDA version torch is built for; None: built without. ImportError: no torch."""
        import torch

        return torch.version.cuda

    def try_directory(self, path: Path) -> str:
        """Make it and write into it; the reason where that fails."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return ""
        except OSError as error:
            return error.strerror or str(error)

    def try_cpu(self) -> Tried:
        """RMSNorm of 3 x 64 numbers by the CPU backend."""
        import numpy as np
        import torch

        from engine import reference
        from engine.cpu.backend import CpuBackend
        from engine.models.spec import ModelSpec, RopeSpec

        spec = ModelSpec("llama", 256, 64, 128, 1, 4, 2, 16, 1e-5, 64, RopeSpec())
        backend = CpuBackend(spec, "float32", 1)
        try:
            rng = np.random.default_rng(0)
            x, weight = rng.standard_normal((3, 64)).astype(np.float32), rng.random(64).astype(np.float32)
            began = time.perf_counter()
            got = backend.rms_norm(x, backend.prepare_norm(torch.from_numpy(weight)), 1e-5)
            seconds = time.perf_counter() - began
            return Tried(float(np.abs(got - reference.rms_norm(x, weight, 1e-5)).max()), seconds)
        finally:
            backend.close()

    def try_cuda(self, index: int, cache_dir: Path) -> Tried:
        """RMSNorm of 3 x 64 numbers on a card: compiled, or loaded from the cache, launched, read back."""
        from engine.cuda.device import CudaDevice

        return norm_on(CudaDevice(index), cache_dir)


def norm_on(device: Any, cache_dir: Path) -> Tried:
    """What `try_cuda` does, on any device that a kernel library takes."""
    import numpy as np
    import torch

    from engine import reference
    from engine.cuda.elementwise import RmsNorm
    from engine.cuda.launch import Library

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32))
    weight = torch.from_numpy(rng.random(64).astype(np.float32))
    true = reference.rms_norm(x.numpy(), weight.numpy(), 1e-5)
    there = x.to(device.torch_device)
    out = torch.full_like(there, torch.nan, dtype=torch.float16)
    began = time.perf_counter()
    RmsNorm(Library(device, cache_dir), 64, "float16")(there, weight.to(device.torch_device), out, 1e-5)
    device.synchronize()
    got = out.cpu().float().numpy()
    return Tried(float(np.abs(got - true).max()), time.perf_counter() - began)


# -- the findings -------------------------------------------------------------------------------------------------------


def software(probes: Probes) -> list[Finding]:
    version = ".".join(map(str, probes.python()))
    old = probes.python()[:2] < OLDEST_PYTHON
    found = [Finding("Python", "bad", version, "Python 3.11 or newer is needed.") if old else Finding("Python", "ok", version)]
    for package in ("torch", "numba", "llvmlite", "numpy"):
        installed = probes.version(package)
        missing = Finding(package, "bad", "missing", f"Install it: pip install {package} (it comes with numbatch).")
        found.append(Finding(package, "ok", installed) if installed else missing)
    cuda = probes.version("numba-cuda")
    found.append(Finding("numba-cuda", "ok", cuda) if cuda else Finding("numba-cuda", "none", "not installed: the CPU engine only"))
    return found


def host(probes: Probes, config: Config) -> list[Finding]:
    name, features = probes.processor()
    cores, free = probes.cores(), probes.free_host_bytes()
    path = Path(config.engine.kernel_cache_dir).resolve()
    reason = probes.try_directory(path)
    scarce = f"At least {LEAST_HOST_BYTES / GIB:.0f} GiB must be free to load anything; end other programs or raise the container's limit."
    broken = Finding("kernel cache", "bad", f"{path}: {reason}", "Set engine.kernel_cache_dir to a directory that can be written.")
    return [
        Finding("processor", "ok", f"{name}: {', '.join(features) or 'no vector instructions that the kernels know'}"),
        Finding("cores", "ok", f"{cores} usable"),
        Finding("memory", "ok", f"{free / GIB:.1f} GiB free")
        if free >= LEAST_HOST_BYTES
        else Finding("memory", "bad", f"{free / GIB:.2f} GiB free", scarce),
        broken if reason else Finding("kernel cache", "ok", str(path)),
    ]


def gpu(probes: Probes, cache_dir: Path) -> list[Finding]:
    """Driver, versions that must agree, each card, and one kernel on each."""
    driver, there = probes.driver_cuda(), probes.cards()
    if driver is None and not there:
        return [Finding("driver", "none", "no NVIDIA driver: the CPU engine only")]
    if driver is None:
        if probes.version("numba-cuda") is None:
            return [*_listed(there), Finding("numba-cuda", "bad", "missing", INSTALL_CUDA)]
        words = "Install the NVIDIA driver's libcuda; check `nvidia-smi`."
        return [*_listed(there), Finding("driver", "bad", "libcuda cannot be loaded", words)]
    found = [Finding("driver", "ok", f"for CUDA {driver[0]}.{driver[1]}")]
    if not there:
        return [*found, Finding("cards", "bad", "the driver shows none", "Check `nvidia-smi`, and CUDA_VISIBLE_DEVICES.")]
    each = [f for index, card in enumerate(there) for f in one_card(probes, index, card, cache_dir)]
    return [*found, *versions_agree(probes, driver), *each]


def _listed(there: list[Card]) -> list[Finding]:
    return [Finding(f"card {i}", "ok", _describe(card)) for i, card in enumerate(there)]


def _describe(card: Card) -> str:
    size = f"{card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
    return f"{card.name}, compute capability {card.cc[0]}.{card.cc[1]}, {size}"


def versions_agree(probes: Probes, driver: tuple[int, int]) -> list[Finding]:
    """Machine code runs on a driver of the same major version or newer, and torch needs one too."""
    found = []
    assembler = probes.assembler_cuda()
    if assembler is None:
        found.append(Finding("kernels", "bad", "numba-cuda is missing", INSTALL_CUDA))
    elif driver[0] < assembler[0]:
        text = f"assembled by nvJitLink {assembler[0]}.{assembler[1]}, the driver is for CUDA {driver[0]}.{driver[1]}"
        newer = f"Update the NVIDIA driver to one for CUDA {assembler[0]}.0, or install nvidia-nvjitlink and nvidia-nvvm {driver[0]}.*."
        found.append(Finding("kernels", "bad", text, newer))
    else:
        found.append(Finding("kernels", "ok", f"assembled by nvJitLink {assembler[0]}.{assembler[1]}"))
    try:
        torch_cuda = probes.torch_cuda()
    except ImportError:
        return found  # named among the software
    if torch_cuda is None:
        found.append(Finding("torch", "bad", "built without CUDA", "Install a build of torch for CUDA."))
    elif int(torch_cuda.split(".")[0]) > driver[0]:
        needs = f"Update the driver to one for CUDA {torch_cuda} or install a torch for CUDA {driver[0]}."
        found.append(Finding("torch", "bad", f"built for CUDA {torch_cuda}, the driver is for CUDA {driver[0]}.{driver[1]}", needs))
    else:
        found.append(Finding("torch", "ok", f"built for CUDA {torch_cuda}"))
    return found


def one_card(probes: Probes, index: int, card: Card, cache_dir: Path) -> list[Finding]:
    name = f"card {index}"
    if card.cc < OLDEST_CARD:
        mend = "The oldest that CUDA 13 compiles for is compute capability 7.5 (Turing); use the CPU engine."
        return [Finding(name, "bad", _describe(card), mend)]
    if card.free_bytes < LEAST_CARD_BYTES:
        words = f"At least {LEAST_CARD_BYTES / GIB:.0f} GiB of it must be free; end the programs that `nvidia-smi` lists."
        return [Finding(name, "bad", _describe(card), words)]
    return [Finding(name, "ok", _describe(card)), attempt(f"kernel on {name}", lambda: probes.try_cuda(index, cache_dir), 2e-3)]


def attempt(name: str, run: Any, tolerance: float) -> Finding:
    """A kernel's finding: right, wrong, or the sentence of what failed."""
    try:
        tried = run()
    except EngineError as error:
        return Finding(name, "bad", "failed", str(error))
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, "bad", f"failed: {type(error).__name__}", str(error).strip() or "Report it with this page.")
    if not tried.error <= tolerance:  # NaN is not right either
        text = f"differs from the reference by {tried.error:.3g}, {tolerance:g} is allowed"
        return Finding(name, "bad", text, "Delete the kernel cache and try again; if it stays, report it with this page.")
    return Finding(name, "ok", f"right (error {tried.error:.1e}), first call {tried.seconds:.2f} s")


def plan(config: Config) -> list[Finding]:
    """The memory plan of the configured model, where there is one."""
    if not config.model.path:
        return []
    from api.loading import memory_plan
    from engine.load_backend import resolved

    try:
        found = memory_plan(resolved(config))
    except EngineError as error:
        return [Finding("model", "bad", "cannot be planned", str(error))]
    if found.shortfall:
        return [Finding("model", "bad", "its memory plan does not fit", found.shortfall)]
    return [Finding("model", "ok", "its memory plan fits")]


def check(probes: Probes, config: Config) -> tuple[list[Finding], str]:
    """All findings, and the verdict: "" where the device that the configuration asks for can be used, else why it cannot."""
    cache_dir = Path(config.engine.kernel_cache_dir).resolve()
    found = [*software(probes), *host(probes, config)]
    cards_found = gpu(probes, cache_dir)
    wants_cuda = config.engine.device == "cuda" or (config.engine.device == "auto" and any(f.state != "none" for f in cards_found))
    cpu = attempt("kernel on the CPU", probes.try_cpu, 1e-4)
    found += [cpu, *cards_found, *plan(config)]
    bad = [f for f in found if f.state == "bad" and not (f is cpu and wants_cuda) and (wants_cuda or f not in cards_found)]
    if config.engine.device == "cuda" and not any(f.name.startswith("kernel on card") and f.state == "ok" for f in found) and not bad:
        return found, "engine.device = 'cuda', but there is no usable card: install the NVIDIA driver, or set engine.device = 'cpu'."
    return found, "; ".join(f"{f.name}: {f.text}. {f.change}" for f in bad)


def table(found: list[Finding]) -> str:
    width = max(len(f.name) for f in found)
    marks = {"ok": "OK ", "none": "-- ", "bad": "BAD"}
    lines = []
    for f in found:
        lines.append(f"{marks[f.state]} {f.name:<{width}}  {f.text}")
        if f.change:
            lines.append(f"{'':4}{'':<{width}}  {f.change}")
    return "\n".join(lines)


def configure(path: Path | None, sets: list[str]) -> Config:
    """The server's configuration; a model need not be named here."""

    def load(more: list[str]) -> Config:
        return config_cli.load(argparse.Namespace(config=path, sets=[*sets, *more], insecure=False)).config

    try:
        return load([])
    except ConfigError as error:
        if ":model.path: is empty" not in str(error):
            raise
    config = load(["model.path=unnamed"])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=""))


def main(argv: list[str] | None = None, probes: Probes | None = None) -> int:
    cli = Parser(prog="numbatch check_env", description="What this machine has, and whether the kernels run here.")
    cli.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for server.py")
    cli.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets", help="override one knob; repeatable")
    cli.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    args = cli.parse_args(argv)
    try:
        config = configure(args.config, args.sets)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(config.engine.kernel_cache_dir).resolve()))
    found, reason = check(probes or Probes(), config)
    print(f"numbatch {VERSION} on {platform.system()} {platform.machine()}")
    print(table(found))
    usable = [f.name.removeprefix("kernel on ") for f in found if f.name.startswith("kernel on ") and f.state == "ok"]
    if reason:
        print(f"Not usable as configured. {reason}", file=sys.stderr)
    else:
        print(f"OK: numbatch can run on {' and '.join(usable)}.")
    if args.json:
        print(json.dumps({"ok": not reason, "reason": reason, "usable": usable, "findings": [asdict(f) for f in found]}))
    return EXIT_UNUSABLE if reason else 0


if __name__ == "__main__":
    sys.exit(main())
