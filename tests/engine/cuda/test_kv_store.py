"""Rope, q/k norm, logn and the KV write against engine/reference.py, in the emulator; the pool starts as NaN."""

import math

import numpy as np
import pytest
import torch

from engine import kv_quant, reference
from engine.cache.layout import KVLayout
from engine.cuda.kv_store import RopeStore
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from tests.ptx.device import KERNELS, EmulatedDevice

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half an ulp, relative
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EPS, SLOTS, BLOCKS, MAX_POSITION = 1e-6, 3, 14, 300
PORTABLE = (7, 5)


@pytest.fixture(scope="module")
def library():
    return Library(EmulatedDevice((9, 0)), KERNELS)


class World:
    """A step of ragged rows over scattered blocks, padding of the dummy slot at its end."""

    def __init__(self, heads, kv_heads, head_dim, rotary, bsl, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim, self.bsl, self.dtype = heads, kv_heads, head_dim, bsl, dtype
        per_slot = -(-MAX_POSITION // bsl)
        self.trash = BLOCKS
        self.tables = torch.full((SLOTS + 1, per_slot), self.trash, dtype=torch.int32)
        blocks = iter(rng.permutation(BLOCKS))
        rows = [(0, 3, 4), (2, MAX_POSITION - 2, 2), (1, 0, 1), (SLOTS, 0, 1), (SLOTS, 0, 1)]  # slot, first position, tokens
        slots, positions = [], []
        for slot, first, count in rows:
            for position in range(first, first + count):
                slots.append(slot)
                positions.append(position)
                if slot < SLOTS and self.tables[slot, position // bsl] == self.trash:
                    self.tables[slot, position // bsl] = int(next(blocks))
        self.token_slots = torch.tensor(slots, dtype=torch.int32)
        self.positions = torch.tensor(positions, dtype=torch.int32)
        tokens = len(slots)
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = torch.from_numpy(rng.standard_normal((tokens, width)).astype(np.float32)).to(dtype)
        angles = np.arange(MAX_POSITION)[:, None] / 50.0 ** (np.arange(rotary // 2) / (rotary / 2))
        self.cos = torch.from_numpy(np.cos(angles).astype(np.float32))
        self.sin = torch.from_numpy(np.sin(angles).astype(np.float32))
        self.q_norm = torch.from_numpy(1 + rng.standard_normal(head_dim).astype(np.float32) / 4)
        self.k_norm = torch.from_numpy(1 + rng.standard_normal(head_dim).astype(np.float32) / 4)
        self.pool = torch.full((BLOCKS + 1, 2, kv_heads, bsl, head_dim), float("nan"), dtype=dtype)

    def wanted(self, normed, trained):
        """q, k, v as `ReferenceBackend.rope_store` has them."""
        q, k, v = reference.split_qkv(self.qkv.float().numpy(), self.heads, self.kv_heads, self.head_dim)
        if normed:
            q, k = reference.rms_norm(q, self.q_norm.numpy(), EPS), reference.rms_norm(k, self.k_norm.numpy(), EPS)
        at = self.positions.numpy()
        q, k = (reference.rotate(part, self.cos.numpy()[at], self.sin.numpy()[at]) for part in (q, k))
        if trained:
            q = q * reference.logn_scale(at, trained)[:, None, None]
        return q, k, v

    def check(self, library, name, normed=False, trained=0, parts=0, **shape):
        """`parts`: qkv comes as the sum of so many parts, and its own memory holds nothing."""
        q, k, v = self.wanted(normed, trained)
        given = None
        if parts:
            shares = torch.tensor([0.5 ** (i + 1) for i in range(parts - 1)] + [0.5 ** (parts - 1)])
            given = shares[:, None, None] * self.qkv.float()
            self.qkv.fill_(float("nan"))
        rotary = 2 * self.cos.shape[1]
        before = self.qkv.clone()
        op = RopeStore(
            library, self.heads, self.kv_heads, self.head_dim, rotary, self.bsl, name, qk_norm=normed, trained_length=trained, **shape
        )
        norms = (self.q_norm, self.k_norm) if normed else (None, None)
        op(self.qkv, self.pool, self.token_slots, self.positions, self.tables, self.cos, self.sin, *norms, EPS, given)
        q_width = self.heads * self.head_dim
        self.close(self.qkv[:, :q_width].float().numpy().reshape(q.shape), q)
        if shape.get("keep_k"):
            k_width = q_width + self.kv_heads * self.head_dim
            self.close(self.qkv[:, q_width:k_width].float().numpy().reshape(k.shape), k)
            q_width = k_width
        assert torch.equal(self.qkv[:, q_width:].view(torch.int16), before[:, q_width:].view(torch.int16))
        untouched = torch.ones(self.pool.shape[0], self.bsl, dtype=torch.bool)
        for token, (slot, position) in enumerate(zip(self.token_slots.tolist(), self.positions.tolist(), strict=True)):
            block, offset = int(self.tables[slot, position // self.bsl]), position % self.bsl
            untouched[block, offset] = False
            if slot < SLOTS:
                self.close(self.pool[block, 0, :, offset].float().numpy(), k[token])
                assert torch.equal(self.pool[block, 1, :, offset].float(), torch.from_numpy(v[token]))
        written = torch.isfinite(self.pool).permute(0, 3, 1, 2, 4).reshape(*untouched.shape, -1)
        assert not written[untouched].any() and written[~untouched].all()
        assert not untouched[self.trash, 0] and untouched[self.trash, 1:].all()  # padding reaches the trash block only

    def close(self, got, wanted):
        assert np.isfinite(got).all()
        largest = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(got, wanted, rtol=1.05 * ROUNDING[self.dtype], atol=2e-6 * largest)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, rotary, bsl, name",
    [
        (4, 1, 64, 64, 16, "float16"), (7, 1, 128, 128, 64, "bfloat16"), (8, 2, 128, 128, 64, "float16"), (3, 3, 80, 32, 32, "bfloat16"),
        (2, 1, 256, 256, 128, "float16"), (4, 2, 16, 16, 64, "bfloat16"), (1, 1, 96, 20, 32, "float16"), (5, 2, 20, 8, 64, "bfloat16"),
    ],
)  # fmt: skip
def test_rope_store(library, heads, kv_heads, head_dim, rotary, bsl, name):
    World(heads, kv_heads, head_dim, rotary, bsl, DTYPES[name]).check(library, name)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, rotary, bsl, name, bits, normed, parted, framed",
    [
        (4, 1, 64, 64, 16, "float16", 8, False, False, True), (7, 1, 128, 128, 64, "bfloat16", 8, True, True, False),
        (6, 2, 96, 20, 7, "bfloat16", 8, False, False, True), (4, 2, 64, 64, 64, "bfloat16", 4, False, True, True),
        (7, 1, 128, 64, 16, "float16", 4, True, False, False), (2, 1, 256, 256, 32, "bfloat16", 4, False, False, True),
    ],
)  # fmt: skip
def test_a_quantized_pool(library, heads, kv_heads, head_dim, rotary, bsl, name, bits, normed, parted, framed):
    world = World(heads, kv_heads, head_dim, rotary, bsl, DTYPES[name], seed=7)
    q, k, v = world.wanted(normed, 0)
    frame = np.random.default_rng(9).standard_normal((2, kv_heads, head_dim)).astype(np.float32)
    frame[1] = np.exp2(np.rint(2 * frame[1]))
    if framed:
        q, k = q * frame[1].repeat(heads // kv_heads, axis=0), (k - frame[0]) / frame[1]
    wanted = [kv_quant.rotate(x, bits) for x in (q, k, v)]
    layout = KVLayout(1, kv_heads, head_dim, bsl, name, bits)
    world.pool = torch.full((BLOCKS + 1, layout.layer_block_bytes), 255, dtype=torch.uint8)
    op = RopeStore(library, heads, kv_heads, head_dim, rotary, bsl, name, qk_norm=normed, bits=bits)
    norms = (world.q_norm, world.k_norm) if normed else (None, None)
    parts = None
    if parted:
        parts = torch.stack([world.qkv.float() * 0.25, world.qkv.float() * 0.75])
        world.qkv.fill_(float("nan"))
    given = torch.from_numpy(frame.reshape(-1)) if framed else None
    op(world.qkv, world.pool, world.token_slots, world.positions, world.tables, world.cos, world.sin, *norms, EPS, parts, given)
    world.close(world.qkv[:, : heads * head_dim].float().numpy().reshape(wanted[0].shape), wanted[0])
    codes, pairs = kv_quant.parts(world.pool.numpy(), layout)
    got = kv_quant.values(world.pool.numpy(), layout)
    written = np.zeros((BLOCKS + 1, bsl), bool)
    for token, (slot, position) in enumerate(zip(world.token_slots.tolist(), world.positions.tolist(), strict=True)):
        block, offset = int(world.tables[slot, position // bsl]), position % bsl
        written[block, offset] = True
        for kind in range(2 if slot < SLOTS else 0):
            x = np.ascontiguousarray(wanted[1 + kind][token])
            true = kv_quant.dequantize(*kv_quant.quantize(x, bits), bits)
            scale = (pairs[block, kind, :, offset] << 16).view(np.float32)[:, None]
            off = np.abs(got[block, kind, :, offset] - true) / scale
            assert off.max() < 1.02 and off.mean() < 0.01, (token, kind, off.max(), off.mean())
    rest = world.pool.numpy()[:, layout.pairs_at + 8 * kv_heads * bsl :]
    assert (codes.transpose(0, 3, 1, 2, 4)[~written] == 255).all() and (pairs.transpose(0, 3, 1, 2)[~written] == 2**32 - 1).all()
    assert (rest == 255).all() and np.isfinite(got.transpose(0, 3, 1, 2, 4)[written]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_that_is_not_finite_spoils_its_head_only(library, bits):
    world = World(2, 2, 64, 64, 16, torch.float16, seed=8)
    layout = KVLayout(1, 2, 64, 16, "float16", bits)
    world.pool = torch.zeros((BLOCKS + 1, layout.layer_block_bytes), dtype=torch.uint8)
    world.qkv[0, 5 * 64 + 3] = float("inf")  # v of KV head 1
    op = RopeStore(library, 2, 2, 64, 64, 16, "float16", bits=bits)
    op(world.qkv, world.pool, world.token_slots, world.positions, world.tables, world.cos, world.sin)
    got = kv_quant.values(world.pool.numpy(), layout)
    block, offset = int(world.tables[int(world.token_slots[0]), 0]), int(world.positions[0]) % 16
    assert np.isnan(got[block, 1, 1, offset]).all()
    got[block, 1, 1, offset] = 0
    assert np.isfinite(got).all()


@pytest.mark.parametrize("head_dim, rotary", [(128, 128), (96, 20), (256, 64)])
def test_with_norms_of_q_and_k(library, head_dim, rotary):
    World(3, 1, head_dim, rotary, 64, torch.bfloat16, seed=1).check(library, "bfloat16", normed=True)


@pytest.mark.parametrize("trained", [2, 5, 4096])
def test_with_logn_scaling(library, trained):
    World(2, 1, 64, 64, 64, torch.float16, seed=2).check(library, "float16", trained=trained)


@pytest.mark.parametrize("normed", [False, True])
def test_k_stays_beside_q_where_that_is_asked_for(library, normed):
    World(4, 2, 64, 32, 64, torch.bfloat16, seed=7).check(library, "bfloat16", normed=normed, keep_k=True)


@pytest.mark.parametrize("parts", [1, 3, 4, 7])
@pytest.mark.parametrize("normed", [False, True])
def test_parts_of_a_product_are_added_up(library, parts, normed):
    World(4, 2, 80, 32, 64, torch.bfloat16, seed=6).check(library, "bfloat16", normed=normed, parts=parts)


@pytest.mark.parametrize("warps", [1, 3])
def test_any_number_of_warps(library, warps):
    World(4, 1, 64, 64, 64, torch.float16, seed=3).check(library, "float16", normed=True, trained=4, warps=warps)


def test_the_portable_variant_runs(tmp_path):
    portable = Library(EmulatedDevice(PORTABLE), tmp_path)
    World(4, 2, 64, 32, 64, torch.float16, seed=4).check(portable, "float16", normed=True, trained=100)


def test_a_pool_beyond_4_gib_is_addressed(library):
    """A large card has more than 4 GiB of one layer's pool; the pages of this one exist only where they are written."""
    blocks, bsl = 132_000, 64
    pool = torch.empty(blocks, 2, 2, bsl, 64, dtype=torch.float16)
    assert pool.numel() * 2 > 2**32
    zero = torch.zeros(1, dtype=torch.int32)
    tables = torch.tensor([[blocks - 1]], dtype=torch.int32)
    qkv = torch.arange(6 * 64).reshape(1, -1).to(torch.float16)
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    RopeStore(library, 2, 2, 64, 64, bsl, "float16")(qkv, pool, zero, zero, tables, cos, sin)
    assert torch.equal(pool[blocks - 1, :, :, 0].flatten(), qkv[0, 2 * 64 :])


def test_wrong_shapes_are_refused(library):
    for head_dim, rotary, words in (
        (12, 12, "head_dim is 12"),
        (260, 64, "head_dim is 260"),
        (64, 68, "rotary_dim is 68"),
        (64, 6, "is 6"),
    ):
        with pytest.raises(ValueError, match=words):
            RopeStore(library, 4, 2, head_dim, rotary, 64, "float16")
    world = World(2, 1, 64, 64, 64, torch.float16)
    op = RopeStore(library, 2, 1, 64, 64, 64, "float16")
    rest = (world.token_slots, world.positions, world.tables, world.cos, world.sin)
    with pytest.raises(ValueError, match="qkv is"):
        op(world.qkv[:2], world.pool, *rest)
    with pytest.raises(ValueError, match="the pool is"):
        op(world.qkv, world.pool.bfloat16(), *rest)
    with pytest.raises(ValueError, match="belong to a model with qk_norm"):
        op(world.qkv, world.pool, *rest, world.q_norm, world.k_norm)
    with pytest.raises(ValueError, match=r"key_frame is \(128,\); a quantized pool takes \(128,\), any other none"):
        op(world.qkv, world.pool, *rest, key_frame=torch.zeros(128))
    with pytest.raises(ValueError, match="qkv's parts is"):
        op(world.qkv, world.pool, *rest, parts=torch.zeros(2, len(world.qkv), 60))


def test_logn_of_the_reference_begins_beyond_the_trained_length():
    assert reference.logn_scale(np.array([3, 4]), 4).tolist() == [1.0, pytest.approx(math.log(5) / math.log(4))]


VARIANTS = [
    (32, 8, 128, 128, 64, "bfloat16", False, 0, 4, False, 0, True), (8, 8, 256, 256, 64, "float16", True, 2048, 4, True),
    (8, 1, 96, 20, 16, "bfloat16", True, 100, 4, True), (32, 8, 128, 128, 64, "bfloat16", False, 0, 4, True, 8),
    (8, 8, 256, 64, 64, "float16", True, 2048, 4, False, 4),
]  # fmt: skip


@pytest.mark.parametrize("constants", VARIANTS, ids=str)
def test_no_stack_and_no_spills(constants):
    portable = ((PORTABLE, (PORTABLE,)),) if "float16" in constants else ()
    for made_for, cards in (((8, 0), ((8, 0), (8, 6), (8, 9))), ((9, 0), ((9, 0),)), *portable):
        ptx = to_ptx(Variant("engine.cuda.kv_store", "rope_store", constants), made_for)
        for cc in cards:
            resources = assemble(ptx, cc)[1]
            assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, resources)
