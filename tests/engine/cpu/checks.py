"""Every operation of the CPU backend against engine/reference.py on awkward shapes; run by the tests in this process and, for
the portable code path, in one that compiles for an older CPU.

Buffers that an operation must not read are full of NaN: free KV blocks, positions beyond a context, entries of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from engine import kv_quant, reference, w4, w8
from engine.batch import Batch
from engine.cache.layout import KVLayout
from engine.cpu.backend import CpuBackend
from engine.models.spec import ModelSpec, RopeSpec

ROWS = ((1, 1), (5, 1), (300, 1), (1100, 1), (70, 70), (600, 33), (2, 2), (257, 1), (65, 3))  # (context, tokens)
HEADS = ((9, 3, 64), (4, 4, 80), (8, 2, 128), (7, 1, 96), (8, 1, 64), (8, 4, 8), (3, 3, 128))


def spec(heads: int = 9, kv_heads: int = 3, head_dim: int = 64, *, layers: int = 2, window: int = 0, qk_norm: bool = False) -> ModelSpec:
    return ModelSpec(
        "llama", 512, 576, 1536, layers, heads, kv_heads, head_dim, 1e-5, 4096, RopeSpec(), sliding_window=window, qk_norm=qk_norm
    )


@contextmanager
def backend(model: ModelSpec, dtype: str, threads: int) -> Iterator[CpuBackend]:
    made = CpuBackend(model, dtype, threads)
    try:
        yield made
    finally:
        made.close()


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded, as float32."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().float().numpy()


def bits_of(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.uint16).numpy()


def values_of(pool: np.ndarray) -> np.ndarray:
    return pool if pool.dtype == np.float32 else (pool.astype(np.uint32) << 16).view(np.float32)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def make_batch(rows: tuple[tuple[int, int], ...], block_len: int, rng: np.random.Generator, *, spare: int = 3) -> tuple[Batch, int]:
    """Rows over a shuffled pool of blocks; and how many blocks the pool has."""
    needs = [-(-context // block_len) for context, _ in rows]
    order = rng.permutation(sum(needs) + spare)
    tables = np.full((len(rows), max(needs)), -1, np.int32)
    positions, slots, starts = [], [], [0]
    for row, ((context, count), need) in enumerate(zip(rows, needs, strict=True)):
        tables[row, :need] = order[sum(needs[:row]) :][:need]
        own = np.arange(context - count, context)
        positions.append(own)
        slots.append(tables[row, own // block_len].astype(np.int64) * block_len + own % block_len)
        starts.append(starts[-1] + count)
    last = np.array(starts[1:], np.int32) - 1
    batch = Batch(
        ids=rng.integers(0, 512, starts[-1]).astype(np.int32), positions=np.concatenate(positions).astype(np.int32),
        kv_slots=np.concatenate(slots), row_starts=np.array(starts, np.int32), contexts=np.array([c for c, _ in rows], np.int32),
        tables=tables, sampled=last, sampled_slots=tuple(range(len(rows))), num_decode=0,
    )  # fmt: skip
    return batch, len(order)


def check_linear(dtype: str, threads: int, n: int, k: int) -> None:
    rng = np.random.default_rng(n * k)
    with backend(spec(), dtype, threads) as cpu:
        dense, bias = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        weights = [(torch.from_numpy(dense), dense if dtype == "float32" else to_bfloat16(dense), torch.from_numpy(bias))]
        for group in (g for g in w4.GROUP_SIZES if k % g == 0):
            for exact_scales in (True, False):
                scale, add = rng.standard_normal((2, n, k // group)).astype(np.float32)
                if exact_scales:
                    scale, add = scale.astype(np.float16).astype(np.float32), add.astype(np.float16).astype(np.float32)
                four = w4.W4(w4.pack(rng.integers(0, 16, (n, k), dtype=np.uint8)), scale, add)
                weights.append((four, w4.dequantize(four), None))
        if k % w8.GROUP_SIZE == 0:
            eight = w8.W8(rng.integers(-128, 128, (n, k)).astype(np.int8), rng.standard_normal((n, k // 32)).astype(np.float32))
            weights.append((eight, w8.dequantize(eight), None))
        for weight, values, vector in weights:
            handle = cpu.prepare_linear(weight, vector)
            for rows in (1, 2, 3, 7, 8, 11, 16, 31, 70, 97):
                x = rng.standard_normal((rows, k)).astype(np.float32)
                given = x if dtype == "float32" else to_bfloat16(x)
                wanted = given.astype(np.float64) @ values.astype(np.float64).T + (0 if vector is None else bias)
                y = cpu.linear(x, handle)
                assert error(y, wanted) < 3e-6, (type(weight).__name__, rows)
                alone = cpu.linear(x[rows // 2 : rows // 2 + 1], handle)
                np.testing.assert_array_equal(alone[0], y[rows // 2])


def check_attention(dtype: str, threads: int, heads: tuple[int, int, int], block_len: int, window: int) -> None:
    """rope_store, then attention, for decode rows and prompt parts in one batch."""
    num_heads, kv_heads, head_dim = heads
    model = spec(num_heads, kv_heads, head_dim)
    rng = np.random.default_rng(block_len + window)
    batch, blocks = make_batch(ROWS, block_len, rng)
    layout = KVLayout(1, kv_heads, head_dim, block_len, dtype)
    truth = np.full(layout.shape(blocks)[1:], np.nan, np.float32)
    for row, (context, _) in enumerate(ROWS):
        own = np.arange(context)
        for kind in range(2):
            values = rng.standard_normal((context, kv_heads, head_dim)).astype(np.float32)
            truth[batch.tables[row, own // block_len], kind, :, own % block_len] = to_bfloat16(values)
    cos, sin = rng.standard_normal((2, 1200, head_dim // 2)).astype(np.float32)
    q_norm, k_norm = rng.standard_normal((2, head_dim)).astype(np.float32)
    qkv = rng.standard_normal((batch.num_tokens, (num_heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    plain = reference.ReferenceBackend()
    with backend(model, dtype, threads) as cpu:
        pool = cpu.make_kv(layout, blocks)[0]
        pool[:] = truth if dtype == "float32" else bits_of(truth)
        step = cpu.begin(batch)
        q = cpu.rope_store(qkv, step, pool, cpu.prepare_rope(cos, sin), q_norm, k_norm, model)
        wanted_q = plain.rope_store(qkv, batch, truth, (cos, sin), q_norm, k_norm, model)
        assert error(np.ascontiguousarray(q), wanted_q) < 1e-5
        stored = values_of(pool)
        np.testing.assert_array_equal(np.isnan(stored), np.isnan(truth))
        known = ~np.isnan(truth)
        assert np.abs(stored[known] - truth[known]).max() <= (1e-5 if dtype == "float32" else 2**-8) * np.abs(truth[known]).max()
        got = cpu.attention(wanted_q, step, pool, window)
        wanted = plain.attention(wanted_q, batch, np.ascontiguousarray(stored), window)
        # bfloat16: q and the softmax weights are rounded, 2^-9 each
        assert error(got, wanted) < (2e-6 if dtype == "float32" else 1e-2)


def check_quantized(dtype: str, threads: int, heads: tuple[int, int, int], block_len: int, window: int, bits: int) -> None:
    """The same over a quantized pool. Free blocks and positions beyond a context are NaN: every byte is 255."""
    num_heads, kv_heads, head_dim = heads
    model, rng = spec(num_heads, kv_heads, head_dim), np.random.default_rng(block_len + window + bits)
    batch, blocks = make_batch(ROWS, block_len, rng)
    layout, plain = KVLayout(1, kv_heads, head_dim, block_len, dtype, bits), reference.ReferenceBackend()
    given = rng.standard_normal((blocks, 2, kv_heads, block_len, head_dim)).astype(np.float32)
    truth = plain.make_kv(layout, blocks)[0]
    filled = truth.copy()
    kv_quant.store(filled, layout, given)
    (codes, pairs), (filled_codes, filled_pairs) = kv_quant.parts(truth, layout), kv_quant.parts(filled, layout)
    for row, (context, _) in enumerate(ROWS):
        own = np.arange(context)
        at = (batch.tables[row, own // block_len], slice(None), slice(None), own % block_len)
        codes[at], pairs[at] = filled_codes[at], filled_pairs[at]
    cos, sin = rng.standard_normal((2, 1200, head_dim // 2)).astype(np.float32)
    qkv = rng.standard_normal((batch.num_tokens, (num_heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    frame = None
    if block_len % 2 == 0:
        frame = np.stack([rng.standard_normal(kv_heads * head_dim), np.exp2(rng.integers(-1, 2, kv_heads * head_dim))]).astype(np.float32).ravel()
    with backend(model, dtype, threads) as cpu:
        pool = cpu.make_kv(layout, blocks)[0]
        assert pool.nbytes == blocks * layout.layer_block_bytes
        pool[:] = truth
        step = cpu.begin(batch)
        cpu.rope_store(qkv, step, pool, cpu.prepare_rope(cos, sin), None, None, model, frame)
        wanted_q = plain.rope_store(qkv, batch, truth, (cos, sin), None, None, model, frame)
        stored, wanted = kv_quant.values(pool, layout), kv_quant.values(truth, layout)
        np.testing.assert_array_equal(np.isnan(stored), np.isnan(wanted))
        # a number that lies between two codes may get the other one: K was turned in another order of operations
        scale = (kv_quant.parts(truth, layout)[1] << 16).view(np.float32)[..., None]
        off = np.abs(stored - wanted) / scale
        assert np.nanmax(off) < 1.01 and np.nanmean(off) < 2e-3
        got = cpu.attention(wanted_q, step, pool, window)
        # bfloat16: what the codes stand for is rounded too
        assert error(got, plain.attention(wanted_q, batch, pool, window)) < (2e-6 if dtype == "float32" else 1.5e-2)


def check_rows(dtype: str, threads: int) -> None:
    """Norms, silu_mul, embed, take."""
    rng = np.random.default_rng(3)
    with backend(spec(), dtype, threads) as cpu:
        for rows, width in ((1, 576), (3, 576), (17, 64), (5, 50)):
            x, r = rng.standard_normal((2, rows, width)).astype(np.float32)
            weight = cpu.prepare_norm(torch.from_numpy(rng.standard_normal(width).astype(np.float32)))
            assert error(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < 1e-6
            normed, total = cpu.add_rms_norm(x, r, weight, 1e-5)
            np.testing.assert_array_equal(total, x + r)
            assert error(normed, reference.rms_norm(x + r, weight, 1e-5)) < 1e-6
            gate_up = (rng.standard_normal((rows, 2 * width)) * 20).astype(np.float32)
            assert error(cpu.silu_mul(gate_up), reference.silu_mul(gate_up)) < 1e-6
            np.testing.assert_array_equal(cpu.take(x, np.array([rows - 1, 0])), x[[rows - 1, 0]])
        batch, _ = make_batch(((20, 20),), 16, rng)
        for table, values in tables(rng, dtype):
            handle, head = cpu.prepare_tied(table)
            got = cpu.embed(handle, cpu.begin(batch))
            np.testing.assert_allclose(got, values[batch.ids], rtol=1e-6, atol=1e-6)
            assert cpu.to_numpy(cpu.logits(got, head)).shape == (20, 512)


def tables(rng: np.random.Generator, dtype: str) -> Iterator[tuple[object, np.ndarray]]:
    """A [512, 96] table in each form, and its values."""
    dense = rng.standard_normal((512, 96)).astype(np.float32)
    yield torch.from_numpy(dense), dense if dtype == "float32" else to_bfloat16(dense)
    for exact_scales in (True, False):
        scale, bias = rng.standard_normal((2, 512, 3)).astype(np.float32)
        if exact_scales:
            scale, bias = scale.astype(np.float16).astype(np.float32), bias.astype(np.float16).astype(np.float32)
        four = w4.W4(w4.pack(rng.integers(0, 16, (512, 96), dtype=np.uint8)), scale, bias)
        yield four, w4.dequantize(four)
    eight = w8.W8(rng.integers(-128, 128, (512, 96)).astype(np.int8), rng.standard_normal((512, 3)).astype(np.float32))
    yield eight, w8.dequantize(eight)


def make_decoder(cpu: CpuBackend, model: ModelSpec, rng: np.random.Generator, kind: str) -> SimpleNamespace:
    """Random layers with the attributes that `bind` reads, 4-bit or dense."""
    heads, inner, hidden = model.num_heads, model.intermediate_size, model.hidden_size
    width = heads * model.head_dim

    def linear(n: int, k: int) -> SimpleNamespace:
        if kind == "w4":
            scale, bias = rng.random((2, n, k // 32)).astype(np.float16).astype(np.float32) * np.float32(2**-8)
            weight: object = w4.W4(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scale, -bias * 8)
        else:
            weight = torch.from_numpy((rng.standard_normal((n, k)) * k**-0.5).astype(np.float32))
        return SimpleNamespace(weight=cpu.prepare_linear(weight, torch.from_numpy(rng.standard_normal(n).astype(np.float32))))

    def norm(count: int) -> np.ndarray:
        return cpu.prepare_norm(torch.from_numpy(rng.random(count).astype(np.float32) + 0.5))

    layers = [
        SimpleNamespace(
            input_norm=norm(hidden), qkv=linear((heads + 2 * model.num_kv_heads) * model.head_dim, hidden),
            q_norm=norm(model.head_dim) if model.qk_norm else None, k_norm=norm(model.head_dim) if model.qk_norm else None, key_frame=None,
            o=linear(hidden, width), post_norm=norm(hidden), gate_up=linear(2 * inner, hidden), down=linear(hidden, inner),
            window=model.window(index),
        )
        for index in range(model.num_layers)
    ]  # fmt: skip
    angles = np.outer(np.arange(2048), 10000.0 ** (-np.arange(0, model.head_dim, 2) / model.head_dim))
    rope = cpu.prepare_rope(np.cos(angles), np.sin(angles))
    return SimpleNamespace(spec=model, layers=layers, final_norm=norm(hidden), rope=rope)


def one_by_one(cpu: CpuBackend, decoder: SimpleNamespace, kv: np.ndarray, batch: Batch, x: np.ndarray) -> np.ndarray:
    """The operations in the order of engine/models/decoder.py."""
    model, step = decoder.spec, cpu.begin(batch)
    h, residual = cpu.rms_norm(x, decoder.layers[0].input_norm, model.rms_norm_eps), x
    for index, layer in enumerate(decoder.layers):
        if index:
            h, residual = cpu.add_rms_norm(x, residual, layer.input_norm, model.rms_norm_eps)
        q = cpu.rope_store(cpu.linear(h, layer.qkv.weight), step, kv[index], decoder.rope, layer.q_norm, layer.k_norm, model)
        attended = cpu.linear(cpu.attention(q, step, kv[index], layer.window), layer.o.weight)
        h, residual = cpu.add_rms_norm(attended, residual, layer.post_norm, model.rms_norm_eps)
        x = cpu.linear(cpu.silu_mul(cpu.linear(h, layer.gate_up.weight)), layer.down.weight)
    return cpu.add_rms_norm(x, residual, decoder.final_norm, model.rms_norm_eps)[0]


def check_pass(dtype: str, threads: int, kind: str, window: int) -> None:
    """The pass over all layers equals the operations one by one, bit for bit; a row does not depend on its neighbours."""
    rng = np.random.default_rng(5)
    model = spec(window=window, qk_norm=window > 0)
    with backend(model, dtype, threads) as cpu:
        decoder = make_decoder(cpu, model, rng, kind)
        cpu.bind(decoder)
        batch, blocks = make_batch(ROWS, 16, rng)
        kv = cpu.make_kv(KVLayout(2, 3, 64, 16, dtype), blocks)
        before = rng.standard_normal(kv.shape).astype(np.float32)
        x = rng.standard_normal((batch.num_tokens, 576)).astype(np.float32)

        def fill() -> None:
            kv[:] = before if dtype == "float32" else bits_of(before)

        fill()
        wanted, wanted_kv = one_by_one(cpu, decoder, kv, batch, x.copy()), kv.copy()
        fill()
        got = cpu.run_layers(x.copy(), cpu.begin(batch))
        assert got is not None
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(kv, wanted_kv)
        for row in range(len(ROWS)):
            fill()
            tokens = slice(batch.row_starts[row], batch.row_starts[row + 1])
            alone = cpu.run_layers(x[tokens].copy(), cpu.begin(only(batch, row)))
            assert alone is not None
            np.testing.assert_array_equal(alone, got[tokens])


def only(batch: Batch, row: int) -> Batch:
    """One row of a batch."""
    tokens = slice(batch.row_starts[row], batch.row_starts[row + 1])
    count = tokens.stop - tokens.start
    return Batch(
        batch.ids[tokens], batch.positions[tokens], batch.kv_slots[tokens], np.array([0, count], np.int32), batch.contexts[row : row + 1],
        batch.tables[row : row + 1], np.array([count - 1], np.int32), (0,), 0,
    )  # fmt: skip


def check_everything_once() -> None:
    """A small tour for a process that compiles for another CPU."""
    for dtype in ("bfloat16", "float32"):
        check_linear(dtype, 2, 100, 96)
        check_rows(dtype, 2)
        for heads in ((9, 3, 64), (4, 4, 80)):
            check_attention(dtype, 2, heads, 16, 100)
            for bits in (8, 4):
                check_quantized(dtype, 2, heads, 16, 100, bits)
        check_pass(dtype, 2, "w4", 0)


if __name__ == "__main__":
    check_everything_once()
