"""Attention kernels against engine/reference.py, in the emulator: free blocks, what lies beyond a context and outputs start as NaN."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import reference
from engine.cuda.attention_portable import PortableAttention
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.prefill_attention import PrefillAttention, query_tiles
from engine.cuda.target import PTX_ARCHITECTURES
from engine.cuda.tuning_attention import DecodeShape, PromptShape, decode_shape, prompt_shape
from tests.ptx.device import KERNELS, EmulatedDevice
from tests.ptx.emulator import Emulator, Memory

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"bfloat16": 6e-3, "float16": 8e-4}  # relative, of a row: P and the answer are rounded to 8 or 11 bits
SMALL = DecodeShape(warps=2, stages=2, blocks=1)
CC = (9, 0)
ON_CARD = os.environ.get("KERNEL_TESTS") == "card"


STATS = {}


class Card(EmulatedDevice):
    """Keeps what the emulator counted in the last launch of each kernel; a real card counts nothing."""

    def load(self, image, entry, kernel):
        if ON_CARD:
            return super().load(image, entry, kernel)
        emulator = Emulator(image.decode())

        def call(grid, *arguments, shared_bytes=kernel.shared_bytes):
            memory, tensors = Memory(), [a for a in arguments if isinstance(a, torch.Tensor)]
            for tensor in tensors:
                memory.add(tensor)
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            STATS[entry] = dict(emulator.launch(entry, grid, kernel.threads, values, memory, shared_bytes))

        return call


@pytest.fixture(scope="module")
def library():
    return Library(Card(CC), KERNELS)


class World:
    """Rows of `counts` query tokens at the end of `contexts` positions, over scattered blocks; the last slot is the dummy."""

    def __init__(self, heads, kv_heads, head_dim, bsl, dtype, contexts, counts=None, seed=0):
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim, self.bsl, self.dtype = heads, kv_heads, head_dim, bsl, dtype
        self.contexts, self.counts = list(contexts), list(counts or [1] * len(contexts))
        kind, rows = DTYPES[dtype], len(self.contexts)
        blocks = [-(-c // bsl) for c in self.contexts]
        self.trash = sum(blocks) + 5
        self.tables = torch.full((rows + 3, max(blocks) + 2), self.trash, dtype=torch.int32)
        self.pool = torch.full((self.trash + 1, 2, kv_heads, bsl, head_dim), float("nan"), dtype=kind)
        self.slots = rng.permutation(rows + 2)[:rows].astype(np.int32)
        free = rng.permutation(self.trash).astype(np.int32)
        for slot, context, own in zip(self.slots, self.contexts, blocks, strict=True):
            table, free = free[:own], free[own:]
            self.tables[slot, :own] = torch.from_numpy(table)
            values = torch.from_numpy(rng.standard_normal((2, kv_heads, own * bsl, head_dim)).astype(np.float32)).to(kind)
            values[:, :, context:] = float("nan")
            self.pool[torch.from_numpy(table).long()] = values.reshape(2, kv_heads, own, bsl, head_dim).permute(2, 0, 1, 3, 4)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.q = torch.full((self.starts[-1], (heads + 2 * kv_heads) * head_dim), float("nan"), dtype=kind)
        self.q[:, : heads * head_dim] = torch.from_numpy(rng.standard_normal((self.starts[-1], heads * head_dim)).astype(np.float32)).to(
            kind
        )
        self.positions = np.concatenate([np.arange(c - n, c) for c, n in zip(self.contexts, self.counts, strict=True)]).astype(np.int32)

    def empty(self):
        return torch.full((self.starts[-1] + 1, self.heads * self.head_dim), float("nan"), dtype=DTYPES[self.dtype])

    def wanted(self, row, window):
        tokens = slice(self.starts[row], self.starts[row + 1])
        q = self.q[tokens, : self.heads * self.head_dim].float().numpy().reshape(-1, self.heads, self.head_dim)
        blocks = self.tables[self.slots[row]].long()[: -(-self.contexts[row] // self.bsl)]
        k, v = reference.gather_kv(self.pool[blocks].float().numpy(), np.arange(len(blocks)), self.contexts[row])
        return reference.attend(q, k, v, self.positions[tokens], window).reshape(len(q), -1)

    def check(self, out, window=0, rows=None):
        assert out[self.starts[-1] :].isnan().all()
        for row in range(len(self.contexts)) if rows is None else rows:
            got, wanted = out[self.starts[row] : self.starts[row + 1]].float().numpy(), self.wanted(row, window)
            error = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
            assert (error < TOLERANCE[self.dtype]).all(), f"context {self.contexts[row]}, {self.counts[row]} tokens: {error.max()}"

    # -- decode -----------------------------------------------------------------------------------------------------------

    def decoder(self, library, window=0, multiprocessors=4, shape=None):
        op = PagedDecode(
            library, self.heads, self.kv_heads, self.head_dim, self.bsl, self.dtype, 512, multiprocessors, CC, window=window, shape=shape
        )  # fmt: skip
        op.bind(torch.full((op.scratch_bytes,), 255, dtype=torch.uint8))
        return op

    def decode(self, op, rows=None):
        """The answers for some rows, in that order, as one step."""
        chosen = np.arange(len(self.contexts)) if rows is None else np.array(rows)
        contexts, slots = torch.tensor(self.contexts, dtype=torch.int32)[chosen], torch.from_numpy(self.slots[chosen])
        out = self.empty()[: len(chosen) + 1]
        op.schedule(contexts, slots, len(chosen))
        op(self.q[chosen], self.pool, self.tables, out)
        assert out[len(chosen)].isnan().all()
        return out

    # -- prompt parts ---------------------------------------------------------------------------------------------------------

    def prefill(self, op, rows=None):
        chosen = range(len(self.contexts)) if rows is None else rows
        parts = [(self.slots[r], self.starts[r], self.counts[r], self.contexts[r] - self.counts[r]) for r in chosen]
        tiles, out = op.tiles(parts), self.empty()
        op(self.q, self.pool, self.tables, torch.from_numpy(tiles), int(tiles[:, 2].max()), out)
        return out

    def prefiller(self, library, window=0, multiprocessors=1, shape=None):
        return PrefillAttention(
            library, self.heads, self.kv_heads, self.head_dim, self.bsl, self.dtype, multiprocessors, CC, window=window, shape=shape
        )  # fmt: skip


# -- decode -------------------------------------------------------------------------------------------------------------------


DENSE = [*range(1, 301), 1023, 1024, 1025, 4097]


@pytest.mark.parametrize("window", [0, 1, 5, 64, 200])
def test_decode_of_every_context_in_one_batch(library, window):
    contexts = DENSE if not window else [*range(1, 300, 7), 1025]
    world = World(4, 1, 16, 16, "bfloat16", contexts)
    world.check(world.decode(world.decoder(library, window, multiprocessors=100, shape=SMALL)), window)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, bsl, dtype, contexts",
    [
        (6, 2, 64, 32, "float16", [1, 31, 33, 64, 257]),
        (7, 1, 80, 64, "bfloat16", [5, 64, 65, 300]),
        (16, 2, 128, 128, "bfloat16", [129, 1, 400]),
        (16, 1, 96, 16, "float16", [17, 200, 1]),
        (20, 1, 256, 64, "bfloat16", [70, 3]),
        (3, 3, 48, 8, "float16", [8, 9, 100]),
    ],
)  # fmt: skip
def test_decode_of_awkward_shapes(library, heads, kv_heads, head_dim, bsl, dtype, contexts):
    world = World(heads, kv_heads, head_dim, bsl, dtype, contexts)
    world.check(world.decode(world.decoder(library)))


def test_a_row_has_the_same_bits_alone_in_any_batch_on_any_card_and_again(library):
    contexts = [700, 1, 64, 65, 130, 1025, 33, 257, 2049]
    world = World(4, 1, 16, 16, "bfloat16", contexts, seed=3)
    op = world.decoder(library, multiprocessors=5, shape=SMALL)
    whole = world.decode(op)
    world.check(whole)
    for _ in range(2):
        assert torch.equal(world.decode(op)[:-1].view(torch.int16), whole[:-1].view(torch.int16))  # the counters are back at 0
    order = [5, 3, 0, 8]
    assert torch.equal(world.decode(op, order)[:-1], whole[order])
    for row in range(len(contexts)):
        assert torch.equal(world.decode(op, [row])[0], whole[row]), contexts[row]
    for multiprocessors in (1, 3, 40):  # whole rows in one share, and every section in a share of its own
        other = world.decoder(library, multiprocessors=multiprocessors, shape=SMALL)
        assert torch.equal(world.decode(other)[:-1], whole[:-1]), multiprocessors


def test_padding_rows_of_the_dummy_slot_harm_nobody(library):
    world = World(4, 1, 16, 16, "bfloat16", [40, 7], seed=4)
    op = world.decoder(library, shape=SMALL)
    alone = world.decode(op)
    dummy = len(world.tables) - 1
    q = torch.cat([world.q, torch.full_like(world.q, float("nan"))])
    out = torch.full((4, 64), float("nan"), dtype=torch.bfloat16)
    op.schedule(torch.tensor([40, 7, 1, 1], dtype=torch.int32), torch.tensor([*world.slots, dummy, dummy], dtype=torch.int32), 4)
    op(q, world.pool, world.tables, out)
    assert torch.equal(out[:2], alone[:2])


@pytest.mark.parametrize("few", [0, 4])
def test_a_schedule_deals_every_section_out_once_and_evenly(library, few):
    rng = random.Random(7)
    op = PagedDecode(library, 8, 8, 16, 16, "bfloat16", 512, 66, CC, shape=DecodeShape(2, 2, 1, few=few))
    op.bind(torch.zeros(op.scratch_bytes, dtype=torch.uint8))
    for case in range(12):
        count = rng.choice([1, 2, 3, 9, 64, 256, 300, 512])
        contexts = [1] * count if case == 0 else [rng.choice([1, 40, 300, 5000, 40000]) + rng.randrange(64) for _ in range(count)]
        op.schedule(torch.tensor(contexts, dtype=torch.int32), torch.arange(count, dtype=torch.int32), count)
        shares, rows, counters, _ = op._scratch
        rows, shares = rows.view(-1, 8)[:count].tolist(), shares.view(-1, 4).tolist()
        dealt, costs, first_of = {}, [], {}
        for share, (row, section, last_row, last_stop) in enumerate(shares):
            cost = 0
            while row <= last_row:
                stop = last_stop if row == last_row else rows[row][5]
                assert section < stop <= rows[row][5]
                for s in range(section, stop):
                    assert (row, s) not in dealt
                    dealt[row, s] = share
                    first_of.setdefault(row, share)
                cost += min(stop * rows[row][4], rows[row][7]) - section * rows[row][4]
                row, section = row + 1, 0
            costs.append(cost)
        for row, (slot, base, low, stop, length, sections, first, strips) in enumerate(rows):
            assert (slot, base, low, stop, first) == (row, 0, 0, contexts[row], first_of[row])
            assert strips == -(-stop // 32) and (sections - 1) * length < strips <= sections * length and sections <= 32
            assert not few or sections <= few or length >= 8
        assert len(dealt) == sum(row[5] for row in rows)
        used = min(len(dealt), len(shares))
        longest = max(row[4] for row in rows)
        total = sum(row[7] for row in rows)
        assert max(costs) <= (total + count) / used + 2 * longest
        split = [row[6] for row in rows if len({dealt[rows.index(row), s] for s in range(row[5])}) > 1]
        assert len(set(split)) == len(split)  # no two rows share counters and partials


def test_decode_refuses_what_it_cannot_do(library):
    world = World(4, 1, 16, 16, "bfloat16", [40, 7])
    with pytest.raises(ValueError, match="head_dim is 40"):
        PagedDecode(library, 4, 1, 40, 16, "bfloat16", 4, 4, CC)
    with pytest.raises(ValueError, match="5 query heads"):
        PagedDecode(library, 5, 2, 16, 16, "bfloat16", 4, 4, CC)
    op = world.decoder(library, shape=SMALL)
    with pytest.raises(ValueError, match="513 rows"):
        op.schedule(torch.ones(600, dtype=torch.int32), torch.ones(600, dtype=torch.int32), 513)
    with pytest.raises(ValueError, match="the pool is"):
        op(world.q, world.pool[:, :, :, :8], world.tables, world.empty())
    with pytest.raises(ValueError, match="q is"):
        op(world.q[:, :32], world.pool, world.tables, world.empty())
    with pytest.raises(ValueError, match="the scratch is"):
        op.bind(torch.zeros(16, dtype=torch.uint8))


# -- prompt parts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, bsl, dtype, window, shape",
    [
        (4, 1, 64, 16, "bfloat16", 0, PromptShape(2, 2, 32, 3, 1)),
        (6, 2, 16, 32, "float16", 5, PromptShape(2, 1, 16, 2, 1)),
        (7, 1, 80, 64, "bfloat16", 64, PromptShape(4, 1, 64, 2, 1)),
    ],
)  # fmt: skip
def test_prompt_parts_of_all_lengths_behind_prefixes(library, heads, kv_heads, head_dim, bsl, dtype, window, shape):
    counts = [*range(1, 20), 31, 33, 63, 65, 127, 128, 129, 130]
    prefixes = [0, 1, 15, 16, 17, 64, 200]
    contexts = [n + prefixes[i % len(prefixes)] for i, n in enumerate(counts)]
    world = World(heads, kv_heads, head_dim, bsl, dtype, contexts, counts)
    world.check(world.prefill(world.prefiller(library, window, shape=shape)), window)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, bsl, dtype, parts",
    [
        (4, 1, 128, 128, "bfloat16", [(70, 70), (90, 3)]),
        (1, 1, 256, 8, "float16", [(40, 35)]),
    ],
)  # fmt: skip
def test_prompt_parts_in_the_shapes_of_the_tuning_table(library, heads, kv_heads, head_dim, bsl, dtype, parts):
    world = World(heads, kv_heads, head_dim, bsl, dtype, [c for c, _ in parts], [n for _, n in parts])
    world.check(world.prefill(world.prefiller(library)))


def test_a_token_has_the_same_bits_however_its_prompt_is_cut(library):
    shape = PromptShape(2, 2, 32, 3, 1)
    whole = World(4, 1, 64, 16, "bfloat16", [150, 20], [150, 20], seed=5)
    large, small = whole.prefiller(library, shape=shape), whole.prefiller(library, multiprocessors=1000, shape=shape)
    out = whole.prefill(large)
    whole.check(out)
    assert torch.equal(whole.prefill(small)[:-1], out[:-1])
    assert torch.equal(whole.prefill(large, [1])[150:170], out[150:170])
    tiles = query_tiles([(int(whole.slots[0]), 61, 40, 61), (int(whole.slots[0]), 101, 7, 101)], 16, 0)
    part = whole.empty()
    large(whole.q, whole.pool, whole.tables, torch.from_numpy(tiles), 16, part)
    assert torch.equal(part[61:108], out[61:108]) and part[:61].isnan().all() and part[108:].isnan().all()


def test_tiles_cover_every_token_once_longest_work_first(library):
    op = PrefillAttention(library, 4, 1, 64, 16, "bfloat16", 4, CC, shape=PromptShape(2, 2, 32, 3, 1))
    parts = [(3, 0, 100, 0), (1, 100, 1, 900), (0, 101, 33, 17)]
    tiles = op.tiles(parts)
    assert tiles.dtype == np.int32 and tiles[:, 2].max() <= 16 and len(tiles) <= op.most_tiles(134, 3)
    covered = sorted((int(t) + i, int(s), int(p) + i) for s, t, n, p in tiles for i in range(n))
    assert covered == sorted((first + i, slot, position + i) for slot, first, count, position in parts for i in range(count))
    seen = (tiles[:, 2] + tiles[:, 3]).tolist()
    assert seen == sorted(seen, reverse=True)
    assert op.tiles([]).shape == (0, 4)
    windowed = query_tiles([(0, 0, 16, 500), (1, 16, 16, 8)], 16, 32)
    assert windowed[0].tolist() == [0, 0, 16, 500]


def test_prompt_parts_refuse_what_they_cannot_do(library):
    world = World(4, 1, 64, 16, "bfloat16", [20], [20])
    op = world.prefiller(library, shape=PromptShape(2, 2, 32, 3, 1))
    tiles = torch.from_numpy(op.tiles([(int(world.slots[0]), 0, 20, 0)]))
    with pytest.raises(ValueError, match="up to 17 tokens"):
        op(world.q, world.pool, world.tables, tiles, 17, world.empty())
    with pytest.raises(ValueError, match="out is"):
        op(world.q, world.pool, world.tables, tiles, 16, world.empty()[:, 4:])
    with pytest.raises(ValueError, match="head_dim is 8"):
        PrefillAttention(library, 4, 1, 8, 16, "bfloat16", 4, CC)
    with pytest.raises(ValueError, match="200 query heads"):
        PrefillAttention(library, 200, 1, 64, 16, "bfloat16", 4, CC)


# -- plain arithmetic ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, kv_heads, head_dim, bsl, window", [(6, 2, 64, 16, 0), (12, 1, 160, 7, 40)])
def test_the_portable_kernel_in_the_emulator(library, heads, kv_heads, head_dim, bsl, window):
    world = World(heads, kv_heads, head_dim, bsl, "float16", [1, 140, 260], [1, 9, 2])
    op, out = PortableAttention(library, heads, kv_heads, head_dim, bsl, window=window), world.empty()
    slots = torch.from_numpy(np.repeat(world.slots, world.counts))
    op(world.q, world.pool, world.tables, slots, torch.from_numpy(world.positions), out[:-1])
    world.check(out, window)
    resources = assemble(to_ptx(op.variants[0], (7, 5)), (7, 5))[1]
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0)


SIMULATED = """
import numpy as np
from engine import reference
from engine.cuda.attention_portable import THREADS, attend
from engine.cuda.target import cuda
heads, kv_heads, head_dim, bsl, window = 4, 2, 4, 4, 6
kernel = attend(kv_heads, heads // kv_heads, head_dim, bsl, window)
rng = np.random.default_rng(0)
tables = np.array([[5, 2, 9], [7, 9, 9]], np.int32)
pool = np.full((10, 2, kv_heads, bsl, head_dim), np.nan, np.float16)
pool[[5, 2, 7]] = rng.standard_normal((3, 2, kv_heads, bsl, head_dim))
slots, positions = np.array([0, 1], np.int32), np.array([6, 3], np.int32)
q = rng.standard_normal((2, heads * head_dim)).astype(np.float16)
out = np.full((2, heads * head_dim), np.nan, np.float16)
simulated = cuda.jit(kernel.function)
simulated[2 * kv_heads, THREADS](q.ravel(), heads * head_dim, pool.ravel(), tables.ravel(), 3, slots, positions, out.ravel())
for row in range(2):
    k, v = reference.gather_kv(pool.astype(np.float32), tables[slots[row]], positions[row] + 1)
    wanted = reference.attend(q[row].astype(np.float32).reshape(1, heads, head_dim), k, v, positions[row : row + 1], window)
    assert np.abs(out[row] - wanted.ravel()).max() < 4e-3, (out[row], wanted)
print("agrees")
"""


def test_the_portable_kernel_in_the_simulator(root):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, "-c", SIMULATED], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]


# -- what the machine code takes ------------------------------------------------------------------------------------------------------


def test_no_stack_and_no_spills():
    """Of a model with 4 query heads a KV head; `bench/kernels.py --compile-only` looks at all kernels."""
    for shapes, architectures in (((9, 0), [(9, 0)]), ((8, 6), PTX_ARCHITECTURES)):
        s, p = decode_shape(shapes, 128), prompt_shape(shapes, 128)
        decode = Variant("engine.cuda.paged_attention", "paged_decode", (2, 4, 128, 64, "bfloat16", 32, s.warps, s.stages, s.blocks))
        constants = (2, 4, 128, 64, "bfloat16", 0, p.warps, p.tiles, p.keys, p.stages, p.blocks)
        for variant in (decode, Variant("engine.cuda.prefill_attention", "prefill", constants)):
            kernel, ptx = variant.make(), to_ptx(variant, architectures[0])  # what 8.0 takes, the others take too
            for cc in architectures:
                resources = assemble(ptx, cc)[1]
                assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, variant.name, resources)
                shared = {(8, 0): 164, (9, 0): 228}.get(cc, 100) * 1024  # of a multiprocessor; 1 KB of a thread block is the system's
                assert kernel.min_blocks * (kernel.shared_bytes + 1024) <= shared
                assert kernel.min_blocks * kernel.threads * resources.registers <= 65536


def test_keys_and_values_are_read_once_and_without_bank_conflicts(library):
    contexts = [256, 128, 512]
    world = World(16, 2, 128, 128, "bfloat16", contexts)
    world.check(world.decode(world.decoder(library, multiprocessors=1, shape=DecodeShape(4, 3, 2))))
    if ON_CARD:
        pytest.skip("a card does not count what a kernel reads")
    (entry,) = (entry for entry in STATS if entry.startswith("paged_decode_2_8_128_128") and entry.endswith("_4_3_2_0"))
    stats = STATS[entry]
    least = sum(contexts) * 2 * 2 * 2 * 128
    assert least < stats["global_bytes_read"] < 1.15 * least
    ways = dict(stats["bank_conflicts"].values())
    assert any("ldmatrix" in text for text in ways) and max(ways.values()) <= 1.01, ways
