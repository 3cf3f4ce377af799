"""Every CUDA kernel for every architecture, with no GPU: registers, stack frame, spills. Part of `python -m bench.kernels`.

The kernels are those that the operations of some real models would load (`MODELS`), compiled by Numba to PTX and assembled by
nvJitLink, in several processes. sm_80 and newer take all of them, older ones the portable operations in float16.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.cuda.all_reduce import Peers, SummedNorm
from engine.cuda.attention_portable import PortableAttention
from engine.cuda.ceilings import SHAPES, Nothing, Read
from engine.cuda.elementwise import AddRmsNorm, ApplyUpdates, Embed, RmsNorm, SiluMul, TakeRows
from engine.cuda.kv_store import RopeStore
from engine.cuda.launch import Kernel, Library, Variant, assemble, to_ptx
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.prefill_attention import PrefillAttention
from engine.cuda.sampling import GpuSampler
from engine.cuda.w4_by_rows import W4ByRows
from engine.cuda.w4_portable import W4Portable
from engine.cuda.w4_repack import W4Repack

OLDEST_MMA = (8, 0)
HEAD = f"{'sm':>3} {'registers':>9} {'stack':>6} {'spills':>6}  kernel"
MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132}  # T4, A100, RTX 3090, RTX 4090, H200: decides grids, and with them variants


@dataclass(frozen=True, slots=True)
class Model:
    """What decides the variants: sizes of a rank."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    block_seq_len: int = 64
    window: int = 0
    qk_norm: bool = False
    group: int = 128
    dtypes: tuple[str, ...] = ("bfloat16", "float16")


KV_BITS = (8, 4)
# Kernels that may spill, by the begin of their names, where, and why they stay
EXCEPTIONS = (
    ("prefill_16_1_256_", (80, 86, 89), "heads of 256: 128 float32 sums a thread beside the fragments of K and V, 12 registers too many"),
    ("paged_decode_16_1_256_64_bfloat16_16_4_3_1_4_", (80, 86, 89), "heads of 256 in 4 bits: 26 registers too many"),
)
SUMMED = ((4096, 2), (8192, 2), (8192, 4), (8192, 8), (16384, 8), (576, 3))  # hidden size, ranks
MODELS = (
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256),
    Model("Qwen3-8B", 4096, 12288, 32, 8, 128, 151936, qk_norm=True, dtypes=("bfloat16",)),
    Model("Mistral-7B", 4096, 14336, 32, 8, 128, 32000, block_seq_len=128, window=4096, dtypes=("bfloat16",)),
    Model("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151936, dtypes=("bfloat16",)),
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, block_seq_len=16, group=32),
    Model("head_dim 80", 2560, 10240, 32, 32, 80, 51200, group=64, dtypes=("bfloat16",)),
    Model("head_dim 96", 4096, 14336, 32, 32, 96, 32064, dtypes=("bfloat16",)),
    Model("head_dim 256", 4096, 14336, 16, 16, 256, 256000, dtypes=("bfloat16",)),
)


class _NoDevice:
    """Stands where a card would: variants can be named, not loaded."""

    image = "cubin"

    def __init__(self, sm: int) -> None:
        self.cc = (sm // 10, sm % 10)
        self.multiprocessors = MULTIPROCESSORS.get(sm, 100)

    torch_device = torch.device("cpu")

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
        raise RuntimeError("there is no card here")


def operations(library: Library, device: Any, model: Model, dtype: str) -> Iterator[Any]:
    """What a rank with this model would make."""
    m = model
    yield from (RmsNorm(library, m.hidden, dtype), AddRmsNorm(library, m.hidden, dtype), SiluMul(library, m.inner, dtype))
    yield from (Embed(library, m.hidden, dtype), TakeRows(library, m.hidden), ApplyUpdates(library))
    yield GpuSampler(library, device, 1, m.vocab)
    yield RopeStore(library, m.heads, m.kv_heads, m.head_dim, m.head_dim, m.block_seq_len, dtype, qk_norm=m.qk_norm)
    if device.cc < OLDEST_MMA:
        yield PortableAttention(library, m.heads, m.kv_heads, m.head_dim, m.block_seq_len, window=m.window)
        for form in ("zero", "bias"):
            yield from (W4Portable(library, m.hidden, m.group * 8, m.group, form), W4Repack(library, m.group, form, dtype))
        return
    place = (library, m.heads, m.kv_heads, m.head_dim, m.block_seq_len, dtype)
    yield PagedDecode(*place, 256, device.multiprocessors, device.cc, window=m.window)
    yield PrefillAttention(*place, device.multiprocessors, device.cc, window=m.window)
    for bits in KV_BITS if m.head_dim % 64 == 0 else ():
        yield RopeStore(library, m.heads, m.kv_heads, m.head_dim, m.head_dim, m.block_seq_len, dtype, qk_norm=m.qk_norm, bits=bits)
        yield PagedDecode(*place, 256, device.multiprocessors, device.cc, window=m.window, bits=bits)
        yield PrefillAttention(*place, device.multiprocessors, device.cc, window=m.window, bits=bits)
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    for n, k in ((q + 2 * kv, m.hidden), (m.hidden, q), (2 * m.inner, m.hidden), (m.hidden, m.inner)):
        for form in ("zero", "bias") if k % m.group == 0 else ():
            card = {"cc": device.cc, "multiprocessors": device.multiprocessors, "max_m": 256}
            yield W4ByRows(library, n, k, m.group, form, dtype, **card)
    yield from (W4Repack(library, m.group, form, dtype) for form in ("zero", "bias"))


def variants(sm: int, models: Sequence[Model] = MODELS) -> list[Variant]:
    """Each kernel once, in the order of the models."""
    found: dict[Variant, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        device = _NoDevice(sm)
        library = Library(device, Path(folder))
        plain = [Nothing(library), *(Read(library, device.multiprocessors, *shape) for shape in SHAPES)]
        for model in models:
            dtypes = model.dtypes if device.cc >= OLDEST_MMA else tuple(d for d in model.dtypes if d == "float16")
            for dtype in dtypes:
                plain += operations(library, device, model, dtype)
        if device.cc >= OLDEST_MMA:
            none = Peers(torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
            plain += [SummedNorm(library, hidden, "bfloat16", 0, size, none, device.multiprocessors) for hidden, size in SUMMED]
        for operation in plain:
            found |= dict.fromkeys(operation.variants)
    return list(found)


def resources(variant: Variant, sm: int) -> dict[str, Any]:
    """One row of the result; RuntimeError with the compiler's or the assembler's words."""
    cc = sm // 10, sm % 10
    suffix = variant.make().suffix
    if suffix and cc[0] != 9:
        raise RuntimeError(f"{variant.name} is for compute capability 9.0 alone")
    _, found = assemble(to_ptx(variant, cc), cc, suffix)
    return {
        "kernel": variant.name, "sm": sm, "registers": found.registers, "stack_bytes": found.stack_bytes, "spill_bytes": found.spill_bytes,
    }  # fmt: skip


def exception(row: dict[str, Any]) -> str:
    """Why this kernel may spill; empty: it may not."""
    return next((why for name, where, why in EXCEPTIONS if row["kernel"].startswith(name) and row["sm"] in where), "")


def spills(row: dict[str, Any]) -> bool:
    return bool(row["stack_bytes"] or row["spill_bytes"])


def run(architectures: Sequence[int], match: str, processes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what failed) of every kernel whose name holds `match`, for each architecture; a row is printed when it is there."""
    work = [(variant, sm) for sm in architectures for variant in variants(sm) if match in variant.name]
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    print(f"{len(work)} kernels\n{HEAD}", flush=True)
    if processes == 1 or len(work) <= 2:
        for variant, sm in work:
            _take(lambda variant=variant, sm=sm: resources(variant, sm), f"{variant.name}, sm_{sm}", found, failed)
        return found, failed
    with ProcessPoolExecutor(min(processes, len(work)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(resources, variant, sm): f"{variant.name}, sm_{sm}" for variant, sm in work}
        for future in as_completed(futures):
            _take(future.result, futures[future], found, failed)
    found.sort(key=lambda row: (row["sm"], row["kernel"]))
    return found, sorted(failed)


def _take(call: Callable[[], dict[str, Any]], what: str, found: list[dict[str, Any]], failed: list[str]) -> None:
    try:
        row = call()
    except Exception as error:  # a compiler's exceptions are many; each is one line of the result
        words = str(error).strip().splitlines()
        failed.append(f"{what}: {type(error).__name__}: {words[0] if words else ''}")
        print(f"failed: {failed[-1]}", flush=True)
        return
    found.append(row)
    mark = f"  <-- {exception(row)}" if spills(row) else ""
    print(f"{row['sm']:>3} {row['registers']:>9} {row['stack_bytes']:>6} {row['spill_bytes']:>6}  {row['kernel']}{mark}", flush=True)
