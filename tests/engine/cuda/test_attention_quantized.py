"""Attention kernels over a quantized pool against engine/reference.py, in the emulator: what no token wrote is NaN."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import kv_quant, reference
from engine.cache.layout import KVLayout
from engine.cuda.attention_portable import PortableAttention
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.prefill_attention import PrefillAttention
from engine.cuda.target import PTX_ARCHITECTURES
from engine.cuda.tuning_attention import DecodeShape, PromptShape, decode_shape, prompt_shape
from tests.engine.cuda.test_attention import CC, ON_CARD, STATS, Card, World
from tests.ptx.device import KERNELS

# relative, of a row: q and P are rounded to 11 bits, the answer to 8 or 11; the codes are what they are
TOLERANCE = {"bfloat16": 4e-3, "float16": 1.5e-3}
PROMPT_TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}  # P, and what the codes stand for, are rounded to 8 or 11 bits too
SMALL = DecodeShape(warps=2, stages=3, blocks=1)


@pytest.fixture(scope="module")
def library():
    return Library(Card(CC), KERNELS)


class Quantized(World):
    """`World` with its pool in few bits; K and V have a mean, and V's size differs from token to token."""

    def __init__(self, heads, kv_heads, head_dim, bsl, dtype, contexts, counts=None, *, bits, seed=0):
        super().__init__(heads, kv_heads, head_dim, bsl, dtype, contexts, counts, seed)
        rng = np.random.default_rng(seed + 1)
        self.bits, self.layout = bits, KVLayout(1, kv_heads, head_dim, bsl, dtype, bits)
        spread = rng.uniform(-5, 5, (len(self.pool), 1, kv_heads, bsl, 1))
        sizes = np.exp(spread * np.array([0, 1])[None, :, None, None, None])
        means = rng.standard_normal((1, 2, kv_heads, 1, head_dim)) + 0.5
        values = (self.pool.float().numpy() + means) * sizes
        layer = np.full(self.layout.shape(len(values))[1:], 255, np.uint8)
        kv_quant.store(layer, self.layout, values.astype(np.float32))
        self.values = kv_quant.values(layer, self.layout)
        self.pool = torch.from_numpy(layer)

    def wanted(self, row, window):
        tokens = slice(self.starts[row], self.starts[row + 1])
        q = self.q[tokens, : self.heads * self.head_dim].float().numpy().reshape(-1, self.heads, self.head_dim)
        table = self.tables[self.slots[row]].numpy()[: -(-self.contexts[row] // self.bsl)]
        k, v = reference.gather_kv(self.values[table], np.arange(len(table)), self.contexts[row])
        answer = reference.attend(q, k, v, self.positions[tokens], window)
        return kv_quant.rotate(answer, self.bits).reshape(len(q), -1)

    def check(self, out, window=0, rows=None, tolerance=TOLERANCE):
        assert out[self.starts[-1] :].isnan().all()
        for row in range(len(self.contexts)) if rows is None else rows:
            got, wanted = out[self.starts[row] : self.starts[row + 1]].float().numpy(), self.wanted(row, window)
            error = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
            assert (error < tolerance[self.dtype]).all(), f"context {self.contexts[row]}, {self.counts[row]} tokens: {error.max()}"

    def decoder(self, library, window=0, multiprocessors=4, shape=None):
        op = PagedDecode(
            library, self.heads, self.kv_heads, self.head_dim, self.bsl, self.dtype, 512, multiprocessors, CC, window=window, shape=shape,
            bits=self.bits,
        )  # fmt: skip
        op.bind(torch.full((op.scratch_bytes,), 255, dtype=torch.uint8))
        return op


@pytest.mark.parametrize("bits, window, tiles", [(8, 0, 1), (8, 70, 2), (4, 0, 2), (4, 200, 1)])
def test_decode_of_many_contexts_in_one_batch(library, bits, window, tiles):
    world = Quantized(4, 1, 64, 16 * tiles, "bfloat16", [*range(1, 36), *range(36, 300, 29), 1023, 1024, 1025], bits=bits)
    world.check(world.decode(world.decoder(library, window, multiprocessors=30, shape=replace(SMALL, tiles=tiles))), window)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, bsl, dtype, contexts, bits",
    [
        (6, 2, 64, 8, "float16", [1, 31, 33, 64], 8),
        (20, 1, 64, 7, "bfloat16", [5, 70], 4),
        (4, 1, 256, 128, "float16", [70, 3], 4),
    ],
)  # fmt: skip
def test_decode_of_awkward_shapes(library, heads, kv_heads, head_dim, bsl, dtype, contexts, bits):
    world = Quantized(heads, kv_heads, head_dim, bsl, dtype, contexts, bits=bits)
    world.check(world.decode(world.decoder(library)))


@pytest.mark.parametrize("bits, tiles", [(8, 1), (8, 2), (4, 2)])
def test_codes_are_read_once_and_without_bank_conflicts_and_a_row_has_the_same_bits_alone(library, bits, tiles):
    contexts = [640, 1408]
    world = Quantized(8, 2, 128, 64, "bfloat16", contexts, bits=bits)
    op = world.decoder(library, multiprocessors=1, shape=DecodeShape(4, 3, 2, 16, tiles))  # one share: nothing of it is read again
    out = world.decode(op)
    world.check(out)
    if not ON_CARD:
        kernel = "paged_decode_2_4_128_64"
        stats = next(stats for entry, stats in STATS.items() if entry.startswith(kernel) and entry.endswith(f"_4_3_2_{bits}_{tiles}"))
        least = sum(contexts) * 2 * 2 * (16 * bits + 4)
        assert least < stats["global_bytes_read"] < 1.3 * least  # and what each lane asks for of rows and q
        ways = dict(stats["bank_conflicts"].values())
        loads = [ways[text] for text in ways if "ld.shared.v" in text]
        assert loads and max(loads) <= 1.05, ways
    for row in range(len(contexts)):
        assert torch.equal(world.decode(op, [row])[0], out[row])
    more = world.decoder(library, multiprocessors=40, shape=DecodeShape(4, 3, 2, 16, tiles))
    assert torch.equal(world.decode(more)[:-1], out[:-1])


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, bsl, dtype, window, shape, bits",
    [
        (4, 1, 64, 16, "bfloat16", 0, PromptShape(2, 2, 32, 3, 1), 8),
        (7, 1, 128, 64, "float16", 64, PromptShape(4, 1, 64, 2, 1), 4),
        (2, 1, 96, 7, "bfloat16", 5, PromptShape(2, 1, 16, 2, 1), 8),
        (4, 2, 64, 16, "bfloat16", 0, PromptShape(2, 1, 32, 2, 1), 4),
    ],
)  # fmt: skip
def test_prompt_parts_behind_prefixes(library, heads, kv_heads, head_dim, bsl, dtype, window, shape, bits):
    counts = [1, 3, 16, 31, 33, 70]
    contexts = [n + [0, 15, 64, 200][i % 4] for i, n in enumerate(counts)]
    world = Quantized(heads, kv_heads, head_dim, bsl, dtype, contexts, counts, bits=bits)
    op = PrefillAttention(library, heads, kv_heads, head_dim, bsl, dtype, 1, CC, window=window, shape=shape, bits=bits)
    world.check(world.prefill(op), window, tolerance=PROMPT_TOLERANCE)


@pytest.mark.parametrize("heads, kv_heads, head_dim, bsl, bits", [(6, 2, 64, 16, 4), (3, 1, 128, 7, 8)])
def test_the_portable_kernel(library, heads, kv_heads, head_dim, bsl, bits):
    world = Quantized(heads, kv_heads, head_dim, bsl, "float16", [1, 140], [1, 3], bits=bits)
    op, out = PortableAttention(library, heads, kv_heads, head_dim, bsl, window=100, bits=bits), world.empty()
    slots = torch.from_numpy(np.repeat(world.slots, world.counts))
    op(world.q, world.pool, world.tables, slots, torch.from_numpy(world.positions), out[:-1])
    world.check(out, 100)
    resources = assemble(to_ptx(op.variants[0], (7, 5)), (7, 5))[1]
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0)


@pytest.mark.parametrize("bits, made_for", [(8, ((9, 0), [(9, 0)])), (4, ((9, 0), [(9, 0)])), (4, ((8, 6), PTX_ARCHITECTURES))])
def test_no_stack_and_no_spills(bits, made_for):
    for shapes, architectures in (made_for,):
        s, p = decode_shape(shapes, 128, bits), prompt_shape(shapes, 128, bits)
        decode = Variant(
            "engine.cuda.paged_attention", "paged_decode", (2, 4, 128, 64, "bfloat16", 32, s.warps, s.stages, s.blocks, bits, s.tiles)
        )
        prompt = (2, 4, 128, 64, "bfloat16", 0, p.warps, p.tiles, p.keys, p.stages, p.blocks, bits)
        for variant in (decode, Variant("engine.cuda.prefill_attention", "prefill", prompt)):
            kernel, ptx = variant.make(), to_ptx(variant, architectures[0])
            for cc in architectures:
                resources = assemble(ptx, cc)[1]
                assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, variant.name, resources)
                shared = {(8, 0): 164, (9, 0): 228}.get(cc, 100) * 1024
                assert kernel.min_blocks * (kernel.shared_bytes + 1024) <= shared
                assert kernel.min_blocks * kernel.threads * resources.registers <= 65536
