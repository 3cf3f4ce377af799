"""Every CPU operation at SmolLM2-135M shapes: microseconds, the ceiling it is nearest to, and its error against float64 numpy.

Part of `python -m bench.kernels --device cpu`. The ceilings are measured in the same run: bytes a second read from memory by all
threads, and float operations a second of the multiply-add that products are made of. A product of few rows is bound by the
first, of many rows by the second; `% of` says which. A product goes through the weights of 30 layers in turn (10 to 33 MB:
partly in the last cache, so single products can beat the read ceiling; `pass` cannot). `pass` is all 30 layers and the output
head through the backend's own pass, decode rows at `context` positions and one prompt of 512. Figures are the best of the
repeats; on a machine that others use, no more than a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine import w4, w8
from engine.batch import Batch
from engine.cache.layout import KVLayout
from engine.cpu.backend import CpuBackend, Linear
from engine.cpu.ceilings import multiply_adds, read_bytes
from engine.models.spec import ModelSpec, RopeSpec

SPEC = ModelSpec("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, 2048, RopeSpec(theta=100000.0), tie_word_embeddings=True)
PRODUCTS = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
BLOCK_LEN = 64


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def random_w4(rng: np.random.Generator, n: int, k: int) -> w4.W4:
    scale, minimum = (rng.random((2, n, k // 32)) * 2**-6).astype(np.float16).astype(np.float32)
    return w4.W4(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scale, -minimum * 8)


def random_w8(rng: np.random.Generator, n: int, k: int) -> w8.W8:
    return w8.W8(rng.integers(-127, 128, (n, k)).astype(np.int8), (rng.random((n, k // 32)) * 2**-8).astype(np.float16).astype(np.float32))


def make_batch(rows: list[tuple[int, int]], rng: np.random.Generator) -> Batch:
    """(context, tokens) rows over blocks in order."""
    needs = [-(-context // BLOCK_LEN) for context, _ in rows]
    tables = np.full((len(rows), max(needs)), -1, np.int32)
    positions, slots = [], []
    for row, (context, count) in enumerate(rows):
        tables[row, : needs[row]] = sum(needs[:row]) + np.arange(needs[row])
        own = np.arange(context - count, context)
        positions.append(own)
        slots.append(tables[row, own // BLOCK_LEN].astype(np.int64) * BLOCK_LEN + own % BLOCK_LEN)
    starts = np.cumsum([0, *(count for _, count in rows)]).astype(np.int32)
    return Batch(
        rng.integers(0, SPEC.vocab_size, starts[-1]).astype(np.int32), np.concatenate(positions).astype(np.int32), np.concatenate(slots),
        starts, np.array([context for context, _ in rows], np.int32), tables, starts[1:] - 1, tuple(range(len(rows))), 0,
    )  # fmt: skip


def batch_of(tokens: int, context: int, rng: np.random.Generator) -> Batch:
    """Up to 64 decode rows, or one prompt."""
    return make_batch([(context, 1)] * tokens if tokens <= 64 else [(tokens, tokens)], rng)


class Bench:
    """One backend, its random model, and the rows of the report."""

    def __init__(self, threads: int, context: int, repeats: int) -> None:
        self.rng = np.random.default_rng(0)
        self.cpu = CpuBackend(SPEC, "bfloat16", threads)
        self.context, self.repeats = context, repeats
        self.read = max(read_bytes(threads) for _ in range(5))
        self.flops = max(multiply_adds(threads) for _ in range(5))
        self.rows: list[dict[str, Any]] = []
        self.raw = {name: random_w4(self.rng, *shape) for name, shape in PRODUCTS.items()}
        self.layers = [self._layer() for _ in range(SPEC.num_layers)]
        self.table = random_w8(self.rng, SPEC.vocab_size, SPEC.hidden_size)
        self.embedding, self.head = self.cpu.prepare_tied(self.table)
        angles = np.outer(np.arange(SPEC.max_position), SPEC.rope.theta ** (-np.arange(0, 64, 2) / 64))
        self.rope = self.cpu.prepare_rope(np.cos(angles), np.sin(angles))
        blocks = max(64 * -(-context // BLOCK_LEN), 512 // BLOCK_LEN)
        self.kv = self.cpu.make_kv(KVLayout(SPEC.num_layers, 3, 64, BLOCK_LEN, "bfloat16"), blocks)
        values = self.rng.standard_normal(self.kv[0].shape).astype(np.float32)
        self.kv[:] = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
        decoder = SimpleNamespace(spec=SPEC, layers=self.layers, final_norm=self._norm(), rope=self.rope)
        self.cpu.bind(decoder)

    def _norm(self) -> np.ndarray:
        return self.cpu.prepare_norm(torch.rand(SPEC.hidden_size) + 0.5)

    def _layer(self) -> SimpleNamespace:
        linears = {name: SimpleNamespace(weight=self.cpu.prepare_linear(weight, None)) for name, weight in self.raw.items()}
        norms = {"input_norm": self._norm(), "post_norm": self._norm(), "q_norm": None, "k_norm": None}
        return SimpleNamespace(**norms, key_frame=None, window=0, **linears)

    def row(self, name: str, tokens: int, seconds: float, *, nbytes: float = 0, flop: float = 0, error: float | None = None) -> None:
        memory, compute = nbytes / seconds / self.read, flop / seconds / self.flops
        bound, share = ("read", memory) if memory >= compute else ("multiply-add", compute)
        self.rows.append(
            {"op": name, "rows": tokens, "us": round(seconds * 1e6, 1), "gb_s": round(nbytes / seconds / 1e9, 1),
             "gflop_s": round(flop / seconds / 1e9, 1), "percent": round(100 * share, 1), "of": bound, "error": error}
        )  # fmt: skip
        print(
            f"{name:10} {tokens:4} {seconds * 1e6:10.1f} us {nbytes / seconds / 1e9:7.1f} GB/s {flop / seconds / 1e9:8.1f} GFLOP/s "
            f"{100 * share:5.1f} % of {bound:12} " + ("" if error is None else f" error {error:.1e}"),
            flush=True,
        )

    def product(self, name: str, tokens: int, handles: list[Linear], values: np.ndarray) -> None:
        n, k = values.shape
        x = self.rng.standard_normal((tokens, k)).astype(np.float32)
        rounded = torch.from_numpy(x).bfloat16().double().numpy()
        sample = rounded[:8] @ values.astype(np.float64).T
        error = np.abs(self.cpu.linear(x, handles[0])[:8] - sample).max() / np.abs(sample).max()
        seconds = best(lambda: [self.cpu.linear(x, handle) for handle in handles], max(2, self.repeats // 6)) / len(handles)
        self.row(name, tokens, seconds, nbytes=handles[0].packed.nbytes, flop=2.0 * n * k * tokens, error=float(error))

    def products(self, tokens: int) -> None:
        for name, weight in self.raw.items():
            handles = [getattr(layer, name).weight for layer in self.layers]
            self.product(name, tokens, handles if tokens < 512 else handles[:3], w4.dequantize(weight))
        if tokens <= 64:
            self.product("head", tokens, [self.head], w8.dequantize(self.table))

    def small(self, tokens: int) -> None:
        """Norm, silu, embed, rope and K/V store, attention."""
        cpu, rng, layer = self.cpu, self.rng, self.layers[0]
        batch = batch_of(tokens, self.context, rng)
        step = cpu.begin(batch)
        x = rng.standard_normal((tokens, 576)).astype(np.float32)
        wide = rng.standard_normal((tokens, 3072)).astype(np.float32)
        qkv = rng.standard_normal((tokens, 960)).astype(np.float32)
        true_norm = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * layer.input_norm
        gate, up = wide[:, :1536].astype(np.float64), wide[:, 1536:]
        true_silu = gate / (1 + np.exp(-gate)) * up
        true_embed = w8.dequantize(w8.W8(self.table.q[batch.ids], self.table.scale[batch.ids]))
        for name, call, true, nbytes in (
            ("norm", lambda: cpu.rms_norm(x, layer.input_norm, 1e-5), true_norm, 2 * x.nbytes),
            ("silu_mul", lambda: cpu.silu_mul(wide), true_silu, wide.nbytes * 1.5),
            ("embed", lambda: cpu.embed(self.embedding, step), true_embed, x.nbytes),
        ):
            error = float(np.abs(call() - true).max() / np.abs(true).max())
            self.row(name, tokens, best(call, self.repeats), nbytes=nbytes, error=error)
        pool = self.kv[0]
        q = cpu.rope_store(qkv, step, pool, self.rope, None, None, SPEC)
        seconds = best(lambda: cpu.rope_store(qkv, step, pool, self.rope, None, None, SPEC), self.repeats)
        self.row("rope_store", tokens, seconds, nbytes=1.5 * qkv.nbytes)
        lengths = batch.positions.astype(np.float64) + 1
        seen = batch.contexts.sum() * 2 * 3 * 64 * 2
        error = self._attention_error(q, batch, cpu.attention(q, step, pool, 0))
        seconds = best(lambda: cpu.attention(q, step, pool, 0), self.repeats)
        self.row("attention", tokens, seconds, nbytes=float(seen), flop=float(lengths.sum()) * 9 * 64 * 4, error=error)

    def _attention_error(self, q: np.ndarray, batch: Batch, got: np.ndarray) -> float:
        """Of the first and the last token."""
        worst = 0.0
        for token in (0, batch.num_tokens - 1):
            row = int(np.searchsorted(batch.row_starts, token, side="right")) - 1
            own = np.arange(batch.positions[token] + 1)
            block = batch.tables[row, own // BLOCK_LEN]
            k, v = ((self.kv[0][block, kind, :, own % BLOCK_LEN].astype(np.uint32) << 16).view(np.float32) for kind in range(2))
            k, v = (np.repeat(a, 3, axis=1).astype(np.float64) for a in (k, v))
            scores = np.einsum("hd,khd->hk", q[token].astype(np.float64), k) / 8
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            true = np.einsum("hk,khd->hd", weights / weights.sum(-1, keepdims=True), v).reshape(-1)
            worst = max(worst, float(np.abs(got[token] - true).max() / np.abs(true).max()))
        return worst

    def whole(self, tokens: int) -> None:
        """A step without sampling: begin, embed, all layers, head."""
        cpu, batch = self.cpu, batch_of(tokens, self.context, self.rng)

        def step() -> np.ndarray:
            ready = cpu.begin(batch)
            hidden = cpu.run_layers(cpu.embed(self.embedding, ready), ready)
            if hidden is None:
                raise RuntimeError("The pass over all layers is not bound.")
            return cpu.to_numpy(cpu.logits(cpu.take(hidden, batch.sampled), self.head))

        seconds = best(step, self.repeats if tokens <= 64 else max(5, self.repeats // 3))
        weights = sum(getattr(layer, name).weight.packed.nbytes for layer in self.layers for name in PRODUCTS) + self.head.packed.nbytes
        flop = 2.0 * tokens * SPEC.num_layers * sum(n * k for n, k in PRODUCTS.values())
        flop += 2.0 * len(batch.sampled) * SPEC.vocab_size * SPEC.hidden_size
        self.row("pass", tokens, seconds, nbytes=weights, flop=flop)
        self.rows[-1]["tok_s"] = round(tokens / seconds, 1)
        print(f"{'':10} {tokens:4} {tokens / seconds:10.1f} tok/s", flush=True)


def run(threads: int, context: int, repeats: int, parts: set[str]) -> dict[str, Any]:
    """The parts asked for (products, small, pass; all where the set is empty), printed as they come; what `--json` prints."""
    bench = Bench(threads, context, repeats)
    print(f"{threads} threads; memory read {bench.read / 1e9:.1f} GB/s; multiply-add {bench.flops / 1e9:.0f} GFLOP/s", flush=True)
    for tokens in ROWS:
        for part, measure in (("products", bench.products), ("small", bench.small), ("pass", bench.whole)):
            if not parts or part in parts:
                measure(tokens)
    bench.cpu.close()
    ceilings = {"read_gb_s": bench.read / 1e9, "multiply_add_gflop_s": bench.flops / 1e9}
    return {"threads": threads, "context": context, **ceilings, "rows": bench.rows}
