"""Every CUDA operation at the shapes of Llama-3.1-8B: time, share of the measured ceilings, error against engine/reference.py.

Part of `python -m bench.kernels --device cuda`. Weights and KV pools are rotated past the L2 cache, as in a model, where every
layer reads its own; small activations are not: in a model they come from the operation before. Outputs are poisoned with
NaN before they are checked. A part that fails is reported and does not stop the others. Knows no engine loop.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import peers
from bench.gpu_time import Call, copies, relative_error
from engine import awq, kv_quant, reference
from engine.cache.layout import KVLayout
from engine.cuda import ceilings
from engine.cuda.elementwise import AddRmsNorm, ApplyUpdates, Embed, RmsNorm, SiluMul, TakeRows
from engine.cuda.kv_store import RopeStore
from engine.cuda.launch import Library
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.parts import SumParts
from engine.cuda.prefill_attention import PrefillAttention
from engine.cuda.sampling import GpuSampler
from engine.cuda.tuning import dense_from, packed_bytes
from engine.cuda.w4_by_rows import W4ByRows
from engine.cuda.w4_layout import W4Device
from engine.cuda.w4_product import W4Product
from engine.cuda.w4_repack import W4Repack
from engine.sampler import Sampler
from engine.sequence import SamplingParams
from engine.step import Admit

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED_ROWS = 8  # of an output, against the reference
CHECKED_COLUMNS = 512
EPS = 1e-5
TOLERANCE = 2e-2  # of a relative error: several roundings to 8 bits of mantissa
PLACES = 1 << 18  # ids a sequence may get while sampling is timed: each call writes the next
SAMPLING = {
    "greedy": SamplingParams(max_tokens=1, temperature=0.0),
    "temperature": SamplingParams(max_tokens=1, temperature=1.0),
    "top-k, top-p": SamplingParams(max_tokens=1, temperature=0.8, top_k=50, top_p=0.95),
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is measured. `decode` (sequences, context), `prompts` (prompts, tokens of each)."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_seq_len: int = 64
    vocab: int = 128256
    group: int = 128
    products: tuple[tuple[str, int, int], ...] = tuple((name, n, k) for name, (n, k) in peers.PRODUCTS.items())
    rows: tuple[int, ...] = tuple(peers.W4_BARS)
    decode: tuple[tuple[int, int], ...] = (*peers.DECODE_ATTENTION, *peers.ATTENTION_BAR_TB_S)
    prompts: tuple[tuple[int, int], ...] = ((8, 1024), (8, 4096), (1, 8192))
    small: tuple[int, ...] = (1, 32, 256, 8192)
    sampled: tuple[int, ...] = (1, 32, 256)
    max_rows: int = 256
    read_bytes: int = 2 << 30
    dense: tuple[int, int, int] = (8192, 28672, 4096)  # M, N, K of the product whose rate is the ceiling


TOYS = (
    Shapes(
        hidden=256, inner=512, heads=8, kv_heads=2, head_dim=64, block_seq_len=16, vocab=1003, products=(("a", 256, 256), ("b", 384, 512)),
        rows=(1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 129), decode=((1, 1), (1, 700), (3, 65), (5, 129)), prompts=((1, 1), (2, 33), (3, 130)),
        small=(1, 5, 33), sampled=(1, 5), max_rows=8, read_bytes=64 << 20, dense=(256, 256, 256),
    ),
    Shapes(
        hidden=128, inner=384, heads=7, kv_heads=1, head_dim=128, block_seq_len=64, vocab=5000, group=32, products=(("a", 96, 160),),
        rows=(1, 3, 15, 31, 70), decode=((2, 64), (1, 1025)), prompts=((2, 70),), small=(2,), sampled=(3,), max_rows=4, read_bytes=64 << 20,
        dense=(256, 256, 256),
    ),
)  # fmt: skip


class CudaBench:
    """One device, its ceilings, and the rows of the report. `out`: a file that gets each row as a JSON line when it is measured."""

    def __init__(
        self, device: Any, library: Library, timer: Any, shapes: Shapes, dtype: str, out: Path | None = None, peers_too: bool = True
    ) -> None:
        self.device, self.library, self.timer, self.shapes, self.dtype = device, library, timer, shapes, dtype
        self.place = {"device": device.torch_device, "dtype": DTYPES[dtype]}
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator(device=device.torch_device).manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.read = self.flops = 0.0
        self.launch_us = 0.0
        self.w4_layer_us: dict[str, float] = {}
        self._out, self._peers_too = out, peers_too
        self._heads = {"heads": shapes.heads, "kv_heads": shapes.kv_heads, "head_dim": shapes.head_dim}

    # -- helpers ----------------------------------------------------------------------------------------------------------

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the computing dtype, on the card."""
        return torch.randn(shape, generator=self.generator, **self.place)

    def ints(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32), device=self.device.torch_device)

    def poisoned(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, **self.place)

    def measure(
        self, op: str, case: str, calls: Sequence[Call], *, nbytes: float = 0, flop: float = 0, less: float = 0, **more: Any
    ) -> float:
        """Time the calls and keep a row; seconds of one, `less` microseconds that do not belong to it."""
        seconds = self.timer.seconds(calls) - less / 1e6
        memory, compute = nbytes / seconds / self.read, flop / seconds / self.flops
        bound, share = ("read", memory) if memory >= compute else ("dense", compute)
        row = {
            "op": op, "case": case, "us": seconds * 1e6, "gb_s": nbytes / seconds / 1e9, "gflop_s": flop / seconds / 1e9,
            "percent": 100 * share, "of": bound, "error": None, **more,
        }  # fmt: skip
        self.keep(row)
        if row["error"] is not None and not row["error"] <= TOLERANCE:
            self.failed.append(f"{op} {case}: differs from the reference by {row['error']:.2g}, {TOLERANCE:g} is allowed")
        return seconds

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        peer = f"  peer {row['peer_us']:g} us" if row.get("peer_us") else ""
        rates = f"{row['gb_s']:8.1f} GB/s {row['gflop_s'] / 1e3:8.2f} TFLOP/s {row['percent']:5.1f} % of {row['of']:5}"
        print(f"{row['op']:24} {row['case']:22} {row['us']:10.2f} us {rates}{error}{peer}", flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"bench": "kernel row", **row}) + "\n")

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run a part; what goes wrong is said and remembered."""
        try:
            run()
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name} failed: {''.join(traceback.format_exception_only(error)).strip()}", flush=True)
        if self.device.torch_device.type == "cuda":
            torch.cuda.empty_cache()

    # -- ceilings ---------------------------------------------------------------------------------------------------------

    def ceilings(self) -> None:
        """Bytes a second of a plain read kernel, the best of its shapes; operations a second of a dense product; an empty launch."""
        data = torch.randint(0, 1 << 31, (self.shapes.read_bytes // 4,), dtype=torch.int32, device=self.device.torch_device)
        data = data.view(torch.uint32)
        for threads, in_flight, blocks in ceilings.SHAPES:
            read = ceilings.Read(self.library, self.device.multiprocessors, threads, in_flight, blocks)
            sums = torch.empty(read.threads, dtype=torch.uint32, device=self.device.torch_device)
            if data.numel() // (4 * read.threads * in_flight):
                seconds = self.timer.seconds([lambda read=read, sums=sums: read(data, sums)])
                self.read = max(self.read, read.num_bytes(data) / seconds)
        m, n, k = self.shapes.dense
        a, b, out = self.random(m, k), self.random(n, k), self.poisoned(m, n)
        self.flops = 2.0 * m * n * k / self.timer.seconds([lambda: torch.mm(a, b.T, out=out)])
        self.launch_us = self.timer.seconds([ceilings.Nothing(self.library)] * 16) * 1e6
        if not self.read:
            raise ValueError(f"{self.shapes.read_bytes} bytes are too few for the read kernel on this card")
        rates = f"read {self.read / 1e12:.3f} TB/s; dense product {self.flops / 1e12:.1f} TFLOP/s"
        print(f"{rates}; empty launch {self.launch_us:.2f} us", flush=True)

    # -- products ---------------------------------------------------------------------------------------------------------

    def products(self) -> None:
        """The four 4-bit products: our kernels as the engine chooses them, and a 16-bit copy; a layer takes what the engine would."""
        ours, copy = (dict.fromkeys(self.shapes.rows, 0.0) for _ in range(2))
        for name, n, k in self.shapes.products:
            self._product(name, n, k, ours, copy)
        first = dense_from(self.device.cc, "zero", resident=True)
        for m in self.shapes.rows:
            taken = copy[m] if m >= first else ours[m]
            self.w4_layer_us[str(m)] = taken * 1e6
            peer, bar = peers.W4_LAYER["Marlin"].get(m), peers.W4_BARS.get(m)
            both = f"4-bit {ours[m] * 1e6:.1f}, 16-bit copy {copy[m] * 1e6:.1f}"
            print(f"layer total, {m:5} rows {taken * 1e6:10.2f} us   ({both})   bar {bar}   Marlin {peer}", flush=True)
        faster = [m for m in self.shapes.rows if copy[m] < ours[m]]
        print(f"the 16-bit copy is the faster one at {faster} rows; the table says from {first}", flush=True)

    def _product(self, name: str, n: int, k: int, ours: dict[int, float], copy: dict[int, float]) -> None:
        product = Product(self, n, k)
        op = W4ByRows(
            self.library, n, k, self.shapes.group, "zero", self.dtype, cc=self.device.cc, multiprocessors=self.device.multiprocessors,
            max_m=max(self.shapes.rows),
        )  # fmt: skip
        self.library.load(op.variants)
        summed = Summed(self.library, op, self.dtype, self.device.torch_device)
        self.library.load(summed.variants)
        dense = product.dense()
        calls = [lambda p=p: product.repack.dequantize(p, dense[0]) for p in product.packed]
        error = relative_error(dense[0][product.columns], product.true_weight)
        self.measure("dequantize", name, calls, nbytes=product.nbytes + 2 * n * k, error=error)
        for m in self.shapes.rows:
            x, out = self.random(m, k), self.poisoned(m, n)
            common = {"flop": 2.0 * m * n * k, "peer_us": peers.MARLIN.get(m, {}).get(name)}
            summed(x, product.packed[0], out)
            ours[m] += self.measure(
                "w4", f"{name} x {m}", [lambda p=p, x=x, out=out: summed(x, p, out) for p in product.packed],
                nbytes=product.nbytes + 2 * m * (n + k), error=product.error(x, out),
                less=self.launch_us if summed.parted else 0.0, **common,
            )  # fmt: skip
            out.fill_(torch.nan)
            torch.mm(x, dense[0].T, out=out)
            copy[m] += self.measure(
                "16-bit copy", f"{name} x {m}", [lambda d=d, x=x, out=out: torch.mm(x, d.T, out=out) for d in dense],
                nbytes=2 * n * k + 2 * m * (n + k), error=product.error(x, out), **common,
            )  # fmt: skip

    def head(self) -> None:
        """The output head, 16-bit weights and float32 logits."""
        n, k = self.shapes.vocab, self.shapes.hidden
        weight = self.random(n, k)
        for m in self.shapes.sampled:
            x = self.random(m, k)
            out = torch.full((m, n), torch.nan, dtype=torch.float32, device=self.device.torch_device)
            self.device.matmul_f32(x, weight, out)
            true = reference.linear(x[:CHECKED_ROWS].float().cpu().numpy(), weight[:CHECKED_COLUMNS].float().cpu().numpy())
            self.measure(
                "output head", f"{m}", [lambda x=x, out=out: self.device.matmul_f32(x, weight, out)], nbytes=2 * n * k + 4 * m * n,
                flop=2.0 * m * n * k, error=relative_error(out[:CHECKED_ROWS, :CHECKED_COLUMNS], true),
            )  # fmt: skip

    # -- attention --------------------------------------------------------------------------------------------------------

    def layout(self, bits: int) -> KVLayout:
        """Of a pool of one layer; bits: of a quantized one, else 0."""
        s = self.shapes
        return KVLayout(1, s.kv_heads, s.head_dim, s.block_seq_len, self.dtype, bits)

    def kv_bytes(self, tokens: int, bits: int) -> float:
        """K and V of so many tokens in one layer, scales and zeros in it."""
        return tokens * self.layout(bits).layer_block_bytes / self.shapes.block_seq_len

    def some_pools(self, blocks: int, bits: int, count: int) -> list[torch.Tensor]:
        """Layers' pools of random K and V, or of random codes with scales of 1 / 16 to 1 / 8 and zeros of that size."""
        s, layout, made = self.shapes, self.layout(bits), []
        if not bits:
            return [self.random(blocks + 1, 2, s.kv_heads, s.block_seq_len, s.head_dim) for _ in range(count)]
        place = {"device": self.device.torch_device, "generator": self.generator}
        pairs = slice(layout.pairs_at, layout.pairs_at + 8 * layout.num_kv_heads * layout.block_seq_len)
        for _ in range(count):
            pool = torch.randint(0, 256, (blocks + 1, layout.layer_block_bytes), dtype=torch.uint8, **place)
            words = torch.randint(0, 128, (blocks + 1, pairs.stop // 4 - pairs.start // 4), dtype=torch.int32, **place)
            pool[:, pairs] = (words | 0x3D803D80).view(torch.uint8).view(len(pool), -1)  # bfloat16: 7 random bits of the scale
            made.append(pool)
        return made

    def tables(self, rows: int, context: int) -> np.ndarray:
        """int32 [rows, blocks of a row]: blocks in random order."""
        blocks = -(-context // self.shapes.block_seq_len)
        return self.rng.permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)

    def attended(self, q: torch.Tensor, pool: torch.Tensor, table: np.ndarray, positions: np.ndarray, bits: int) -> np.ndarray:
        """The reference's answer for queries [n, heads, head_dim] of one row at `positions`; bits: of a quantized pool, else 0."""
        own = pool[torch.from_numpy(table).long().to(pool.device)].cpu()
        blocks = kv_quant.values(own.numpy(), self.layout(bits)) if bits else own.float().numpy()
        k, v = reference.gather_kv(blocks, np.arange(len(table)), int(positions[-1]) + 1)
        answer = reference.attend(q.float().cpu().numpy(), k, v, positions, 0)
        return kv_quant.rotate(answer, bits).reshape(len(positions), -1)

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Of the pools that the kernels take: 0 is 16-bit."""
        return tuple(bits for bits in (0, 8, 4) if self.shapes.head_dim * bits % 256 == 0)

    def decode_attention(self) -> None:
        for count, context in self.shapes.decode:
            for bits in self.all_bits:
                self._decode_case(count, context, bits)

    def _decode_case(self, count: int, context: int, bits: int) -> None:
        """bits: of a quantized pool, else 0."""
        s = self.shapes
        op = PagedDecode(
            self.library, **self._heads, block_seq_len=s.block_seq_len, dtype=self.dtype, max_rows=max(s.max_rows, count),
            multiprocessors=self.device.multiprocessors, cc=self.device.cc, bits=bits,
        )  # fmt: skip
        self.library.load(op.variants)
        op.bind(torch.empty(op.scratch_bytes, dtype=torch.uint8, device=self.device.torch_device))
        host = self.tables(count, context)
        kv_bytes = self.kv_bytes(count * context, bits)
        pools = self.some_pools(host.size, bits, copies(kv_bytes))
        tables = self.ints(host)
        q = self.random(count, (s.heads + 2 * s.kv_heads) * s.head_dim)
        out = self.poisoned(count, s.heads * s.head_dim)
        contexts, slots = self.ints([context] * count), self.ints(range(count))
        op.schedule(contexts, slots, count)
        op(q, pools[0], tables, out)
        errors = []
        for row in {0, count - 1}:
            heads = q[row, : s.heads * s.head_dim].view(1, s.heads, s.head_dim)
            true = self.attended(heads, pools[0], host[row], np.array([context - 1]), bits)
            errors.append(relative_error(out[row : row + 1], true))
        case, flop = f"{count} x {context:,}", 4.0 * count * context * s.heads * s.head_dim
        peer = peers.DECODE_ATTENTION.get((count, context))
        self.measure(
            f"decode attention int{bits}" if bits else "decode attention", case, [lambda p=p: op(q, p, tables, out) for p in pools],
            nbytes=kv_bytes + 2 * q.nbytes, flop=flop, error=max(errors), peer_us=None if bits else peer,
        )  # fmt: skip
        if not bits:
            self.measure("decode schedule", case, [lambda: op.schedule(contexts, slots, count)])

    def prompt_attention(self) -> None:
        for count, length in self.shapes.prompts:
            for bits in self.all_bits:
                self._prompt_case(count, length, bits)

    def _prompt_case(self, count: int, length: int, bits: int) -> None:
        """bits: of a quantized pool, else 0."""
        s = self.shapes
        op = PrefillAttention(
            self.library, **self._heads, block_seq_len=s.block_seq_len, dtype=self.dtype, multiprocessors=self.device.multiprocessors,
            cc=self.device.cc, bits=bits,
        )  # fmt: skip
        self.library.load(op.variants)
        host = self.tables(count, length)
        pool, tables = self.some_pools(host.size, bits, 1)[0], self.ints(host)
        tokens = count * length
        q = self.random(tokens, (s.heads + 2 * s.kv_heads) * s.head_dim)
        out = self.poisoned(tokens, s.heads * s.head_dim)
        cut = op.tiles((row, row * length, length, 0) for row in range(count))
        most, tiles = int(cut[:, 2].max()), self.ints(cut)
        op(q, pool, tables, tiles, most, out)
        errors = []
        for row, first, n in ((0, 0, min(16, length)), (count - 1, max(0, length - 16), min(16, length))):
            at = slice(row * length + first, row * length + first + n)
            heads = q[at, : s.heads * s.head_dim].reshape(n, s.heads, s.head_dim)
            true = self.attended(heads, pool, host[row], np.arange(first, first + n), bits)
            errors.append(relative_error(out[at], true))
        case, flop = f"{count} x {length:,}", 2.0 * count * length * (length + 1) * s.heads * s.head_dim
        kv_bytes = self.kv_bytes(tokens, bits)
        self.measure(
            f"prompt attention int{bits}" if bits else "prompt attention", case, [lambda: op(q, pool, tables, tiles, most, out)],
            nbytes=kv_bytes + 2 * out.nbytes, flop=flop, error=max(errors),
        )  # fmt: skip
        if not bits and self._peers_too and self.device.torch_device.type == "cuda":
            self._torch_attention(q, count, length, case, flop)

    def _torch_attention(self, q: torch.Tensor, count: int, length: int, case: str, flop: float) -> None:
        """torch's backends on K and V that lie contiguous: what they would need gathered first."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        s = self.shapes
        parts = q.view(count, length, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        query, k, v = parts[:, : s.heads], parts[:, s.heads : s.heads + s.kv_heads], parts[:, s.heads + s.kv_heads :]
        for name, backend in (("FlashAttention", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

            def run(backend: Any = backend) -> None:
                with sdpa_kernel(backend):
                    scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)

            try:
                self.measure(f"torch {name}", case, [run], flop=flop)
            except RuntimeError as error:  # a peer that does not run here is no failure of ours
                print(f"torch {name} {case}: not measured: {str(error).splitlines()[0]}", flush=True)

    # -- between the products ---------------------------------------------------------------------------------------------

    def elementwise(self) -> None:
        for tokens in self.shapes.small:
            self.part(f"elementwise {tokens}", lambda tokens=tokens: self._elementwise(tokens))

    def _elementwise(self, tokens: int) -> None:
        s, dev = self.shapes, self.device.torch_device
        norm, add_norm = RmsNorm(self.library, s.hidden, self.dtype), AddRmsNorm(self.library, s.hidden, self.dtype)
        silu = SiluMul(self.library, s.inner, self.dtype)
        embed, take, updates = Embed(self.library, s.hidden, self.dtype), TakeRows(self.library, s.hidden), ApplyUpdates(self.library)
        few, case = min(tokens, CHECKED_ROWS), f"{tokens}"
        x, weight = self.random(tokens, s.hidden), torch.rand(s.hidden, device=dev) + 0.5
        out, residual = self.poisoned(tokens, s.hidden), self.random(tokens, s.hidden).float()
        size, before = x.nbytes, residual[:few].cpu().numpy().copy()
        norm(residual, weight, out, EPS)
        error = relative_error(out[:few], reference.rms_norm(before, weight.cpu().numpy(), EPS))
        self.measure("rms_norm", case, [lambda: norm(residual, weight, out, EPS)], nbytes=3 * size, error=error)
        true = reference.rms_norm(before + x[:few].float().cpu().numpy(), weight.cpu().numpy(), EPS)
        out.fill_(torch.nan)
        add_norm(x, residual, weight, out, EPS)
        error = relative_error(out[:few], true)
        zeros = torch.zeros_like(x)  # or the residual would grow without bound over the repeats
        self.measure("add_rms_norm", case, [lambda: add_norm(zeros, residual, weight, out, EPS)], nbytes=6 * size, error=error)
        wide, gated = self.random(tokens, 2 * s.inner), self.poisoned(tokens, s.inner)
        silu(wide, gated)
        error = relative_error(gated[:few], reference.silu_mul(wide[:few].float().cpu().numpy()))
        self.measure("silu_mul", case, [lambda: silu(wide, gated)], nbytes=wide.nbytes * 1.5, error=error)
        table, ids = self.random(min(s.vocab, 32768), s.hidden), self.ints(self.rng.integers(0, min(s.vocab, 32768), (tokens + 1, 3)))
        slots, places = self.ints(range(tokens)), self.ints([1] * tokens)
        residual.fill_(torch.nan)
        embed(table, ids, slots, places, residual)
        error = relative_error(residual, table[ids[:tokens, 1].long()].float().cpu())
        self.measure("embed", case, [lambda: embed(table, ids, slots, places, residual)], nbytes=3 * size, error=error)
        picked = self.ints(self.rng.integers(0, tokens, min(tokens, s.max_rows)))
        some = self.poisoned(len(picked), s.hidden)
        take(x, picked, some)
        error = relative_error(some, x[picked.long()].float().cpu())
        self.measure("take_rows", case, [lambda: take(x, picked, some)], nbytes=2 * some.nbytes, error=error)
        entries = self.ints([[row, 0, row] for row in range(min(tokens, s.max_rows))])
        tables = torch.zeros((s.max_rows + 1, 4), dtype=torch.int32, device=dev)
        self.measure("apply_updates", case, [lambda: updates(tables, entries)], nbytes=2 * entries.nbytes)
        self._rope_store(tokens, few)

    def _rope_store(self, tokens: int, few: int) -> None:
        s, dev = self.shapes, self.device.torch_device
        op = RopeStore(self.library, s.heads, s.kv_heads, s.head_dim, s.head_dim, s.block_seq_len, self.dtype)
        host = self.tables(1, tokens)
        pool, tables = self.some_pools(host.size, 0, 1)[0], self.ints(host)
        angles = np.outer(np.arange(tokens), 500000.0 ** (-np.arange(0, s.head_dim, 2) / s.head_dim)).astype(np.float32)
        cos, sin = (torch.from_numpy(f(angles)).to(dev) for f in (np.cos, np.sin))
        qkv = self.random(tokens, (s.heads + 2 * s.kv_heads) * s.head_dim)
        slots, positions = self.ints([0] * tokens), self.ints(range(tokens))
        given = qkv[:few].float().cpu().numpy()
        q, k, v = reference.split_qkv(given, s.heads, s.kv_heads, s.head_dim)
        pool.fill_(torch.nan)
        op(qkv, pool, slots, positions, tables, cos, sin)
        true_q, true_k = (reference.rotate(x, np.cos(angles[:few]), np.sin(angles[:few])) for x in (q, k))
        got_q = qkv[:few, : s.heads * s.head_dim].reshape(few, s.heads, s.head_dim)
        row = pool[torch.from_numpy(host[0]).long().to(dev)].float().cpu().numpy()
        got_k, got_v = reference.gather_kv(row, np.arange(len(row)), few)
        pairs = (got_q, true_q), (torch.from_numpy(got_k), true_k), (torch.from_numpy(got_v), v)
        self.measure(
            "rope_store", f"{tokens}", [lambda: op(qkv, pool, slots, positions, tables, cos, sin)], nbytes=2 * qkv.nbytes,
            error=max(relative_error(*pair) for pair in pairs),
        )  # fmt: skip

    # -- sampling ---------------------------------------------------------------------------------------------------------

    def sampling(self) -> None:
        for rows in self.shapes.sampled:
            for name, params in SAMPLING.items():
                self._sampling_case(rows, name, params)

    def _sampling_case(self, rows: int, name: str, params: SamplingParams) -> None:
        """Logits to ids, the copy of the ids to the host in it. Error: share of ids that differ from the host's sampler."""
        vocab, dev = self.shapes.vocab, self.device.torch_device
        op = GpuSampler(self.library, self.device, rows, vocab)
        self.library.load(op.variants)
        host = Sampler(rows, 8, vocab)
        for slot in range(rows):
            admit = Admit(slot, (slot + 3, 5), 2, (), replace(params, seed=slot))
            op.admit(admit)
            host.admit(admit)
        logits = torch.randn((rows, vocab), generator=self.generator, device=dev) * 3
        slots, ids = self.ints(range(rows)), torch.zeros((rows + 1, PLACES), dtype=torch.int32, device=dev)
        true, _ = host.sample(logits.cpu().numpy().copy(), tuple(range(rows)))
        finish = op.sample(logits, slots, range(rows), ids)
        self.device.synchronize()
        got, _ = finish()
        wrong = float(np.mean(np.asarray(got) != np.asarray(true)))
        calls = [lambda: op.sample(logits, slots, range(rows), ids)]
        self.measure(f"sampling, {name}", f"{rows} x {vocab:,}", calls, nbytes=logits.nbytes, error=wrong)

    def result(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "ceilings": {"read_gb_s": self.read / 1e9, "dense_gflop_s": self.flops / 1e9, "empty_launch_us": self.launch_us},
            "rows": self.rows, "w4_layer_us": self.w4_layer_us, "failed": self.failed, "emulated": self.timer.emulated, "dtype": self.dtype,
        }  # fmt: skip

    def run(self, parts: set[str]) -> None:
        """The ceilings, then the parts asked for, all where the set is empty."""
        self.ceilings()
        for name, run in self.parts().items():
            if not parts or name in parts:
                self.part(name, run)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "products": self.products, "decode_attention": self.decode_attention, "prompt_attention": self.prompt_attention,
            "elementwise": self.elementwise, "sampling": self.sampling, "head": self.head,
        }  # fmt: skip


class Summed:
    """A 4-bit product and, where it comes in parts, their sum by a kernel of its own. In a step the next kernel reads the parts, so
    that what this takes, less a launch, is what the product costs there."""

    def __init__(self, library: Library, op: W4Product | W4ByRows, dtype: str, place: torch.device) -> None:
        self._op, self._sum = op, SumParts(library, dtype)
        self._scratch = torch.full((max(1, op.scratch_floats),), torch.nan, device=place)
        self.variants, self.parted = self._sum.variants, False

    def __call__(self, x: torch.Tensor, weight: W4Device, out: torch.Tensor) -> None:
        parts = self._op(x, weight, out, self._scratch)
        self.parted = parts is not out
        if self.parted:
            self._sum(parts, out)


class Product:
    """A random AWQ weight [n, k], packed as often as the cache cannot hold, and what some of its output channels really are."""

    def __init__(self, bench: CudaBench, n: int, k: int) -> None:
        group, rng, place = bench.shapes.group, bench.rng, bench.device.torch_device
        words = rng.integers(0, 1 << 32, (k, n // 8), np.uint32).view(np.int32)
        zeros = rng.integers(0, 1 << 32, (k // group, n // 8), np.uint32).view(np.int32)
        raw = awq.AWQ(words, zeros, (rng.random((k // group, n)) * 0.002 + 0.003).astype(np.float16))
        self.repack = W4Repack(bench.library, group, "zero", bench.dtype)
        bench.library.load(self.repack.variants)
        first = W4Device.zeros(n, k, group, "zero", bench.dtype, place)
        self.repack.from_awq(first, 0, *(torch.from_numpy(part).to(place) for part in (raw.qweight, raw.qzeros, raw.scales)))
        self.nbytes = packed_bytes(n, k, group)
        more = copies(self.nbytes) - 1
        self.packed = [first, *(replace(first, packed=first.packed.clone(), pairs=first.pairs.clone()) for _ in range(more))]
        self._bench, self._shape = bench, (n, k)
        chosen = np.sort(rng.choice(n // 8, min(n // 8, CHECKED_COLUMNS // 8), replace=False))  # int32s of 8 output channels
        channels = (chosen[:, None] * 8 + np.arange(8)).reshape(-1)
        self.columns = torch.from_numpy(channels).to(place)
        self.true_weight = reference.dense(awq.AWQ(words[:, chosen], zeros[:, chosen], raw.scales[:, channels]))

    def dense(self) -> list[torch.Tensor]:
        """16-bit copies, at least two, as many as the cache cannot hold."""
        n, k = self._shape
        made = [self._bench.poisoned(n, k) for _ in range(copies(2 * n * k, 2))]
        for each in made:
            self.repack.dequantize(self.packed[0], each)
        return made

    def error(self, x: torch.Tensor, out: torch.Tensor) -> float:
        """Of out = x @ w.T, in some rows (the first and the last) and output channels."""
        rows = sorted({*range(min(CHECKED_ROWS, len(x))), len(x) - 1})
        true = reference.linear(x[rows].float().cpu().numpy(), self.true_weight)
        return relative_error(out[rows][:, self.columns], true)
