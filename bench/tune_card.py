"""What `bench.tune` does on the card: candidates in the order of their promise, compiled by other processes, checked, timed.

A job is one launch shape for one case. Jobs of all cases take turns, so that a short run has something for each of them; a job
is measured as soon as its kernels are compiled. The best few of each case are measured once more, carefully. Knows no files
but the one it appends to.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import astuple, dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_time import Call, copies, relative_error
from bench.kernels_cuda import TOLERANCE, CudaBench, Product, Shapes, Summed
from bench.tune import identity, read
from engine.cuda import tuning_attention
from engine.cuda.attention_tiles import code_tile_bytes
from engine.cuda.launch import Kernel, Library, Variant
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.prefill_attention import PrefillAttention
from engine.cuda.tuning import (
    FEW_BUCKETS,
    HOPPER_BUCKETS,
    ROW_BUCKETS,
    FewLaunch,
    HopperLaunch,
    W4Grid,
    W4Launch,
    candidates,
    few_candidates,
    few_launch,
    hopper_candidates,
    hopper_launch,
    most_shared,
    w4_launch,
)
from engine.cuda.tuning_attention import DecodeShape, PromptShape
from engine.cuda.w4_few import W4Few
from engine.cuda.w4_hopper import W4Hopper
from engine.cuda.w4_matmul import W4Matmul
from engine.cuda.w4_product import W4Product

POOLS = (0, 8, 4)  # bits of a quantized pool, 0: 16-bit
MOST_DECODE_WARPS = 16  # on a multiprocessor: more have too few registers each
DECODE_CASES = ((1, 1024), (1, 32768), (8, 4096), (64, 1024), (64, 4096))
PROMPT_CASES = ((8, 1024), (1, 8192))
FINALISTS = 4
FINALS_SHARE = 0.15  # of the budget
SUM_LAUNCH_US = 0.8  # an empty launch in a graph: in a step the parts of a product are added by the next kernel, not by one of their own
MOST_FEW_THREADS = 1280  # of w4_few on a multiprocessor, by its registers
ENOUGH_IN_FLIGHT = 48 << 10  # bytes a multiprocessor should have on their way from memory

Launch = FewLaunch | W4Launch | HopperLaunch


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """`make(launch)` gives the operation's kernels and a function that gives (error, calls to time)."""

    kind: str
    case: str
    launch: Any
    promise: float  # the smaller, the sooner
    variants: tuple[Variant, ...]
    ready: Callable[[], tuple[float, Sequence[Call]]]
    less_us: float = 0.0  # of what is timed, what does not belong to it

    @property
    def row(self) -> dict[str, Any]:
        return {"bench": "tune", "kind": self.kind, "case": self.case, "launch": list(astuple(self.launch))}


def _kind(of: str, bits: int) -> str:
    return f"{of}_int{bits}" if bits else of


class _Compiler:
    """A device that a library can compile for and not load on."""

    def __init__(self, cc: tuple[int, int], image: str) -> None:
        self.cc, self.image = cc, image

    def load(self, image: bytes, entry: str, kernel: Kernel) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            raise RuntimeError("this process only compiles")

        return launch


def compiled(variant: Variant, cc: tuple[int, int], image: str, cache_dir: str) -> None:
    """Put a kernel into the disk cache. Runs in a process of its own."""
    Library(_Compiler(cc, image), Path(cache_dir)).load([variant])


class Tuner:
    """One device. `quick` and `careful` are timers; `out` gets a line for each measurement."""

    def __init__(self, device: Any, cache_dir: Path, quick: Any, careful: Any, shapes: Shapes, dtype: str, out: Path) -> None:
        self.device, self._cache_dir, self._quick, self._careful = device, cache_dir, quick, careful
        self.shapes, self.dtype, self._out = shapes, dtype, out
        self.library = Library(device, cache_dir)
        self.bench = CudaBench(device, self.library, quick, shapes, dtype)
        self._subjects: dict[Any, Any] = {}
        self.done = {identity(row) for row in read(out)}

    # -- what there is to measure -------------------------------------------------------------------------------------------

    def jobs(self, kinds: set[str]) -> list[Job]:
        """All jobs, cases in turn, the likeliest of each first."""
        made: dict[str, Callable[[], Iterator[Job]]] = {"w4": self._w4}
        for bits in POOLS:
            made |= {_kind("decode", bits): partial(self._decode, bits), _kind("prompt", bits): partial(self._prompt, bits)}
        cases: dict[tuple[str, str], list[Job]] = defaultdict(list)
        for kind in made.keys() & kinds:
            for job in made[kind]():
                cases[job.kind, job.case].append(job)
        ordered = [sorted(jobs, key=lambda job: job.promise) for _, jobs in sorted(cases.items())]
        return [job for turn in zip_longest(*ordered) for job in turn if job is not None]

    def _w4(self) -> Iterator[Job]:
        """Of each kernel of 4-bit products that the card has, for its own buckets of rows."""
        s, cc = self.shapes, self.device.cc
        families: list[tuple[str, tuple[int, ...], Callable[..., Any], Callable[..., Iterator[Any]]]] = [
            ("w4 few", FEW_BUCKETS, partial(few_launch, cc), partial(few_candidates, cc)),
            ("w4", ROW_BUCKETS, partial(w4_launch, cc), partial(candidates, cc)),
        ]
        if cc == (9, 0):
            families.append(("w4 hopper", HOPPER_BUCKETS, hopper_launch, hopper_candidates))
        for kind, buckets, launch_of, candidates_of in families:
            for (name, n, k), m in product(s.products, [rows for rows in buckets if rows <= max(s.rows)]):
                first = launch_of(m, n, k)
                for launch in dict.fromkeys([first, *candidates_of(m, n, k, s.group)]):
                    grid = self._w4_op(n, k, m, launch).launch(m)[1]
                    promise = -1.0 if launch == first else self._promise(launch, grid, k)
                    yield self._w4_job(kind, (name, n, k), m, launch, promise, grid.splits > 1)

    def _w4_job(
        self, kind: str, weight: tuple[str, int, int], m: int, launch: Launch, promise: float, parted: bool
    ) -> Job:  # fmt: skip
        name, n, k = weight
        return Job(
            kind, f"{m} {n} {k}", launch, promise, self._w4_op(n, k, m, launch).variants,
            partial(self._w4_ready, name, n, k, m, launch), SUM_LAUNCH_US if parted else 0.0,
        )  # fmt: skip

    def _promise(self, launch: Launch, grid: W4Grid, k: int) -> float:
        """How unevenly the multiprocessors are loaded, and how little is in flight: a guess that only orders the candidates."""
        mps, group, blocks = self.device.multiprocessors, self.shapes.group, grid.column_blocks * grid.splits * grid.row_blocks
        if isinstance(launch, HopperLaunch):
            return -(-blocks // mps) * mps / blocks * grid.row_blocks
        room = most_shared(self.device.cc) // grid.shared_bytes
        if isinstance(launch, FewLaunch):
            resident = max(1, min(room, MOST_FEW_THREADS // launch.threads, -(-blocks // mps)))
            steps = -(-launch.steps(k, group) // grid.splits)
            flying = resident * launch.threads // 32 * launch.tiles * min(launch.ahead, steps) * launch.tile_slot(group)
            rounds = -(-blocks // mps) * mps / blocks
        else:
            resident = max(1, min(launch.waves or 1, room))
            flying = resident * grid.shared_bytes * (launch.stages - 1) // launch.stages
            rounds = -(-blocks // (mps * resident)) * mps * resident / blocks
        return rounds * (1 + max(0.0, ENOUGH_IN_FLIGHT / flying - 1)) * (1.1 if grid.part_floats else 1.0)

    def _w4_op(self, n: int, k: int, m: int, launch: Launch) -> W4Product:
        weight = (self.library, n, k, self.shapes.group, "zero", self.dtype)
        card = {"cc": self.device.cc, "multiprocessors": self.device.multiprocessors}
        if isinstance(launch, FewLaunch):
            return W4Few(*weight, **card, max_m=m, launch=launch)
        if isinstance(launch, HopperLaunch):
            return W4Hopper(*weight, **card, max_m=m, launch=launch)
        return W4Matmul(*weight, **card, max_m=m, launch=launch)

    def _w4_ready(self, name: str, n: int, k: int, m: int, launch: Launch) -> tuple[float, Sequence[Call]]:
        weight: Product = self._subject(("w4", name), lambda: Product(self.bench, n, k))
        x, out = self._subject(("x", name, m), lambda: (self.bench.random(m, k), self.bench.poisoned(m, n)))
        op = self._w4_op(n, k, m, launch)
        summed = Summed(self.library, op, self.dtype, self.device.torch_device)
        out.fill_(torch.nan)
        summed(x, weight.packed[0], out)
        error = weight.error(x, out)
        out.fill_(torch.nan)
        summed(x, weight.packed[0], out)  # what the first launch leaves in the scratch must not matter
        return max(error, weight.error(x, out)), [lambda p=p: summed(x, p, out) for p in weight.packed]

    def _decode(self, bits: int) -> Iterator[Job]:
        """bits: of a quantized pool, else 0."""
        s = self.shapes
        first = tuning_attention.decode_shape(self.device.cc, s.head_dim, bits)
        space = [DecodeShape(*x) for x in product((2, 4, 8), (2, 3, 4, 6), (1, 2, 3, 4))]
        if bits:
            space = [DecodeShape(*x) for x in product((2, 4, 8), (2, 3, 4, 6), (1, 2, 3, 4), (16, 32), (1, 2), (0, 8))]
        for launch in dict.fromkeys([first, *space]):
            if bits and not 8 <= launch.warps * launch.blocks <= MOST_DECODE_WARPS:
                continue
            promise = -1.0 if launch == first else self._decode_promise(launch, bits)
            variants = self._variants(lambda launch=launch: self._decode_op(launch, bits), launch.blocks)
            for count, context in self._cases(DECODE_CASES, s.decode) if variants else ():
                ready = partial(self._decode_ready, (count, context), launch, bits)
                yield Job(_kind("decode", bits), f"{s.head_dim} {count} x {context}", launch, promise, variants, ready)

    def _decode_promise(self, launch: DecodeShape, bits: int) -> float:
        if not bits:
            return abs(launch.warps * launch.blocks - 8) + abs(launch.stages - 3) / 4
        flying = launch.warps * launch.blocks * (launch.stages - 1) * code_tile_bytes(self.shapes.head_dim, bits, launch.tiles)
        filled = abs(launch.warps * launch.blocks - MOST_DECODE_WARPS) / 4 + abs(math.log2(flying / (2 * ENOUGH_IN_FLIGHT)))
        return filled + 0.5 * (launch.sections != 32) + 0.5 * (launch.few == 0) + (launch.tiles == 1)

    @staticmethod
    def _cases(wanted: tuple[tuple[int, int], ...], there: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple(case for case in wanted if case in there) or there

    def _decode_op(self, launch: DecodeShape, bits: int) -> PagedDecode:
        s, card = self.shapes, (self.device.multiprocessors, self.device.cc)
        heads = (s.heads, s.kv_heads, s.head_dim, s.block_seq_len)
        return PagedDecode(self.library, *heads, self.dtype, s.max_rows, *card, shape=launch, bits=bits)

    def _decode_ready(self, case: tuple[int, int], launch: DecodeShape, bits: int) -> tuple[float, Sequence[Call]]:
        (count, context), bench = case, self.bench
        host, pools, tables, q, out = self._subject(("decode", bits, case), lambda: self._decode_subject(count, context, bits))
        op = self._decode_op(launch, bits)
        op.bind(torch.empty(op.scratch_bytes, dtype=torch.uint8, device=self.device.torch_device))
        op.schedule(bench.ints([context] * count), bench.ints(range(count)), count)
        out.fill_(torch.nan)
        op(q, pools[0], tables, out)
        true = self._subject(
            ("true", bits, case), lambda: self._attended(q[count - 1 :], pools[0], host[count - 1], np.array([context - 1]), bits)
        )
        error = relative_error(out[count - 1 :], true)
        calls = [lambda p=p: op(q, p, tables, out) for p in pools]
        return (float("nan") if bool(torch.isnan(out).any()) else error), calls

    def _decode_subject(self, count: int, context: int, bits: int) -> tuple[Any, ...]:
        s, bench = self.shapes, self.bench
        host = bench.tables(count, context)
        pools = bench.some_pools(host.size, bits, copies(bench.kv_bytes(count * context, bits)))
        q = bench.random(count, (s.heads + 2 * s.kv_heads) * s.head_dim)
        return host, pools, bench.ints(host), q, bench.poisoned(count, s.heads * s.head_dim)

    def _attended(self, q: torch.Tensor, pool: torch.Tensor, table: np.ndarray, positions: np.ndarray, bits: int) -> np.ndarray:
        s = self.shapes
        heads = q[:, : s.heads * s.head_dim].reshape(len(q), s.heads, s.head_dim)
        return self.bench.attended(heads, pool, table, positions, bits)

    def _prompt(self, bits: int) -> Iterator[Job]:
        """bits: of a quantized pool, else 0."""
        s = self.shapes
        first = tuning_attention.prompt_shape(self.device.cc, s.head_dim, bits)
        space = [PromptShape(*x) for x in product((4, 8), (1, 2), (16, 32, 64, 128), (2, 3), (1, 2, 3))]
        for launch in dict.fromkeys([first, *space]):
            variants = self._variants(lambda launch=launch: self._prompt_op(launch, bits), launch.blocks)
            guess = abs(launch.warps * launch.tiles - 8) + abs(launch.keys - 64) / 32 + abs(launch.blocks - 2)
            for count, length in self._cases(PROMPT_CASES, s.prompts) if variants else ():
                ready = partial(self._prompt_ready, (count, length), launch, bits)
                promise = -1.0 if launch == first else guess
                yield Job(_kind("prompt", bits), f"{s.head_dim} {count} x {length}", launch, promise, variants, ready)

    def _prompt_op(self, launch: PromptShape, bits: int) -> PrefillAttention:
        s, card = self.shapes, (self.device.multiprocessors, self.device.cc)
        heads = (s.heads, s.kv_heads, s.head_dim, s.block_seq_len)
        return PrefillAttention(self.library, *heads, self.dtype, *card, shape=launch, bits=bits)

    def _prompt_ready(self, case: tuple[int, int], launch: PromptShape, bits: int) -> tuple[float, Sequence[Call]]:
        (count, length), bench = case, self.bench
        host, pool, tables, q, out = self._subject(("prompt", bits, case), lambda: self._prompt_subject(count, length, bits))
        op = self._prompt_op(launch, bits)
        cut = op.tiles((row, row * length, length, 0) for row in range(count))
        most, tiles = int(cut[:, 2].max()), bench.ints(cut)
        out.fill_(torch.nan)
        op(q, pool, tables, tiles, most, out)
        checked = min(8, length)
        seen = np.arange(length - checked, length)
        true = self._subject(("true prompt", bits, case), lambda: self._attended(q[-checked:], pool, host[count - 1], seen, bits))
        error = float("nan") if bool(torch.isnan(out).any()) else relative_error(out[-checked:], true)
        return error, [lambda: op(q, pool, tables, tiles, most, out)]

    def _prompt_subject(self, count: int, length: int, bits: int) -> tuple[Any, ...]:
        s, bench = self.shapes, self.bench
        host = bench.tables(count, length)
        q = bench.random(count * length, (s.heads + 2 * s.kv_heads) * s.head_dim)
        return host, bench.some_pools(host.size, bits, 1)[0], bench.ints(host), q, bench.poisoned(count * length, s.heads * s.head_dim)

    def _variants(self, make: Callable[[], Any], blocks: int) -> tuple[Variant, ...]:
        """The kernels of an operation; none where so many thread blocks' shared memory does not fit, or the shape is refused."""
        room = most_shared(self.device.cc) + 1024
        try:
            variants = make().variants
            fits = all(blocks * (variant.make().shared_bytes + 1024) <= room for variant in variants)
        except ValueError:
            return ()
        return variants if fits else ()

    def _subject(self, key: Any, make: Callable[[], Any]) -> Any:
        """Data of a case, made when it is first needed."""
        if key not in self._subjects:
            self._subjects[key] = make()
        return self._subjects[key]

    # -- measuring ------------------------------------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job], end: float, processes: int) -> None:
        """Measure in order, as kernels become ready, until `end` (monotonic); then the best of each case once more. What was measured,
        or only begun, before this tuner was made is left out."""
        reserve = end - FINALS_SHARE * max(0.0, end - time.monotonic())
        fresh = [job for job in jobs if identity(job.row) not in self.done]
        variants = list(dict.fromkeys(variant for job in fresh for variant in job.variants))
        pool = ProcessPoolExecutor(max(1, min(processes, len(variants))), mp_context=multiprocessing.get_context("spawn"))
        try:
            place = (self.device.cc, self.device.image, str(self._cache_dir))
            waiting = {variant: pool.submit(compiled, variant, *place) for variant in variants}
            for job in fresh:
                left = reserve - time.monotonic()
                needed = [waiting[variant] for variant in job.variants]
                if left <= 0 or wait(needed, timeout=left).not_done:
                    break
                self._measure(job, needed, self._quick)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._finals(jobs, end)

    def _finals(self, jobs: Sequence[Job], end: float) -> None:
        best: dict[tuple[str, str], list[tuple[float, Job]]] = defaultdict(list)
        measured = {identity(row): row["us"] for row in read(self._out) if "us" in row and row["right"]}
        for job in jobs:
            if (us := measured.get(identity(job.row))) is not None:
                best[job.kind, job.case].append((us, job))
        for case in best.values():
            for _, job in sorted(case, key=lambda item: item[0])[:FINALISTS]:
                if time.monotonic() >= end:
                    return
                self._measure(job, [], self._careful)

    def _measure(self, job: Job, kernels: Sequence[Future[None]], timer: Any) -> None:
        """Keep a line that it was begun, then one with the time: what takes the process with it is not tried again."""
        for future in kernels:
            if error := future.exception():
                self._keep(job, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
                return
        self._keep(job)
        try:
            error, calls = job.ready()
            right = error <= TOLERANCE
            us = timer.seconds(calls) * 1e6 - job.less_us if right else 0.0
        except (ValueError, TypeError) as problem:  # of the launcher's checks; the card is unharmed
            self._keep(job, failed=str(problem))
            return
        self._keep(job, us=us, error=error, right=right)
        print(f"{job.kind:7} {job.case:18} {us:10.2f} us  error {error:.1e}  {job.launch}", flush=True)

    def _keep(self, job: Job, **more: Any) -> None:
        where = {"card": self.device.name, "cc": list(self.device.cc), "date": time.strftime("%Y-%m-%d"), "dtype": self.dtype}
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**job.row, **more, **({"where": where} if more else {})}) + "\n")
