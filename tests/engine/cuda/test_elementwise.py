"""Norms, SiLU, embed, rows and table updates against engine/reference.py, in the emulator; every output pre-filled with NaN."""

import numpy as np
import pytest
import torch

from engine import reference
from engine.cuda.elementwise import AddRmsNorm, ApplyUpdates, Embed, RmsNorm, SiluMul, TakeRows
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from tests.ptx.device import KERNELS, EmulatedDevice

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half an ulp, relative
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5
PORTABLE = (7, 5)


@pytest.fixture(scope="module")
def library():
    return Library(EmulatedDevice((9, 0)), KERNELS)


@pytest.fixture(scope="module")
def portable():
    return Library(EmulatedDevice(PORTABLE), KERNELS)


def random(rng, *shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 3).to(dtype)


def blank(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def close(out, wanted, dtype, roundings=1.05):
    got = out.float().numpy()
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, wanted, rtol=roundings * ROUNDING[dtype], atol=1e-6)


HALF, BRAIN = "float16", "bfloat16"
SHAPES = [
    (1, 16, HALF), (3, 64, BRAIN), (2, 104, HALF), (5, 576, BRAIN), (5, 576, HALF), (2, 4096, BRAIN), (1, 5128, HALF), (1, 16384, BRAIN),
]  # fmt: skip


@pytest.mark.parametrize("rows, hidden, name", SHAPES)
def test_norms(library, rows, hidden, name):
    dtype, rng = DTYPES[name], np.random.default_rng(hidden)
    x, residual = random(rng, rows, hidden, dtype=dtype), random(rng, rows, hidden, dtype=torch.float32)
    weight = torch.from_numpy(rng.standard_normal(hidden).astype(np.float32))
    out = blank(rows, hidden, dtype=dtype)
    RmsNorm(library, hidden, name)(residual, weight, out, EPS)
    close(out, reference.rms_norm(residual.numpy(), weight.numpy(), EPS), dtype)

    total = x.float() + residual
    stream, added = residual.clone(), blank(rows, hidden, dtype=dtype)
    AddRmsNorm(library, hidden, name)(x, stream, weight, added, EPS)
    assert torch.equal(stream, total)
    alone = blank(rows, hidden, dtype=dtype)
    RmsNorm(library, hidden, name)(total, weight, alone, EPS)
    assert torch.equal(added, alone)  # exactly "add, then norm"

    AddRmsNorm(library, hidden, name)(x, residual, weight, x, EPS)  # in place
    assert torch.equal(x, added)


@pytest.mark.parametrize("parts", [1, 3, 5])
@pytest.mark.parametrize("rows, hidden, name", [(2, 104, HALF), (3, 576, BRAIN), (1, 5128, HALF)])
def test_norm_and_silu_of_parts_are_those_of_their_sum(library, parts, rows, hidden, name):
    """x as a sum of parts that float32 adds without rounding."""
    dtype, rng = DTYPES[name], np.random.default_rng(hidden + parts)
    x, residual = random(rng, rows, hidden, dtype=dtype), random(rng, rows, hidden, dtype=torch.float32)
    weight = torch.from_numpy(rng.standard_normal(hidden).astype(np.float32))
    shares = torch.tensor([0.5 ** (i + 1) for i in range(parts - 1)] + [0.5 ** (parts - 1)])[:, None, None]
    stream, out, gated, wanted = residual.clone(), *(blank(rows, hidden, dtype=dtype) for _ in range(3))
    norm = AddRmsNorm(library, hidden, name)
    norm(x, residual, weight, wanted, EPS)
    norm((shares * x.float()).contiguous(), stream, weight, out, EPS)
    assert torch.equal(stream, residual) and torch.equal(out, wanted)
    wide = random(rng, rows, 2 * hidden, dtype=dtype)
    silu = SiluMul(library, hidden, name)
    silu(wide, wanted)
    silu((shares * wide.float()).contiguous(), gated)
    assert torch.equal(gated, wanted)


@pytest.mark.parametrize("threads", [32, 160])
def test_any_number_of_threads_gives_the_norm(library, threads):
    rng = np.random.default_rng(threads)
    x = random(rng, 3, 1048, dtype=torch.float32)
    weight = torch.ones(1048)
    out = blank(3, 1048, dtype=torch.float16)
    RmsNorm(library, 1048, "float16", threads)(x, weight, out, 0.0)
    close(out, reference.rms_norm(x.numpy(), weight.numpy(), 0.0), torch.float16)


def test_a_row_does_not_depend_on_its_neighbours(library):
    rng = np.random.default_rng(0)
    x, weight = random(rng, 4, 576, dtype=torch.float32), torch.ones(576)
    norm = RmsNorm(library, 576, "bfloat16")
    many, one = blank(4, 576, dtype=torch.bfloat16), blank(1, 576, dtype=torch.bfloat16)
    norm(x, weight, many, EPS)
    norm(x[2:3], weight, one, EPS)
    assert torch.equal(many[2:3], one)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 16), (7, 64), (3, 1536), (2, 2056)])
def test_silu_mul(library, name, rows, width):
    dtype, rng = DTYPES[name], np.random.default_rng(width)
    gate_up = random(rng, rows, 2 * width, dtype=dtype) * 4
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0  # exp overflows on one side
    out = blank(rows + 1, width, dtype=dtype)
    SiluMul(library, width, name)(gate_up, out[:rows])
    with np.errstate(over="ignore"):
        close(out[:rows], reference.silu_mul(gate_up.float().numpy()), dtype)
    assert torch.isnan(out[rows]).all()  # nothing beyond the rows


@pytest.mark.parametrize("hidden", [16, 64, 576, 4096])
def test_embed_and_take(library, hidden):
    rng = np.random.default_rng(hidden)
    table = random(rng, 50, hidden, dtype=torch.bfloat16)
    ids = torch.from_numpy(rng.integers(0, 50, (4, 9)).astype(np.int32))
    slots, positions = torch.tensor([0, 3, 3, 1, 2], dtype=torch.int32), torch.tensor([8, 0, 1, 5, 2], dtype=torch.int32)
    out = blank(5, hidden, dtype=torch.float32)
    Embed(library, hidden, "bfloat16")(table, ids, slots, positions, out)
    wanted = ids[slots.long(), positions.long()].long()
    assert torch.equal(out, torch.from_numpy(reference.embed(table.float().numpy(), wanted.numpy())))

    indices = torch.tensor([4, 0, 49], dtype=torch.int32)
    taken = blank(3, hidden, dtype=torch.bfloat16)
    TakeRows(library, hidden)(table, indices, taken)
    assert torch.equal(taken, table[indices.long()])


def test_updates_reach_their_tables_and_nothing_else(library):
    rng = np.random.default_rng(0)
    tables = torch.full((6, 40), 99, dtype=torch.int32)
    wanted = tables.clone()
    places = rng.permutation(5 * 40)[:150]
    updates = torch.from_numpy(np.stack([places // 40, places % 40, rng.integers(0, 90, 150)], axis=1).astype(np.int32))
    wanted[updates[:, 0].long(), updates[:, 1].long()] = updates[:, 2]
    padding = torch.tensor([[5, 0, 99]] * 3, dtype=torch.int32)
    ApplyUpdates(library)(tables, torch.cat([updates, padding]))
    assert torch.equal(tables, wanted)


def test_the_portable_variants_run(portable):
    rng = np.random.default_rng(1)
    x, residual = random(rng, 3, 576, dtype=torch.float16), random(rng, 3, 576, dtype=torch.float32)
    weight, out = torch.ones(576), blank(3, 576, dtype=torch.float16)
    AddRmsNorm(portable, 576, "float16")(x, residual, weight, out, EPS)
    close(out, reference.rms_norm(residual.numpy(), weight.numpy(), EPS), torch.float16)
    half = blank(3, 288, dtype=torch.float16)
    SiluMul(portable, 288, "float16")(x, half)
    close(half, reference.silu_mul(x.float().numpy()), torch.float16)
    rows = blank(2, 576, dtype=torch.float16)
    TakeRows(portable, 576)(x, torch.tensor([2, 0], dtype=torch.int32), rows)
    assert torch.equal(rows, x[[2, 0]])
    embedded = blank(1, 576, dtype=torch.float32)
    zero = torch.zeros(1, dtype=torch.int32)
    Embed(portable, 576, "float16")(x, torch.tensor([[1]], dtype=torch.int32), zero, zero, embedded)
    assert torch.equal(embedded, x[1:2].float())
    tables = zero.reshape(1, 1).clone()
    ApplyUpdates(portable)(tables, torch.tensor([[0, 0, 7]], dtype=torch.int32))
    assert tables.item() == 7


def test_empty_steps_launch_nothing(tmp_path):
    device = EmulatedDevice()
    library = Library(device, tmp_path)
    none = torch.empty(0, 64, dtype=torch.float16)
    RmsNorm(library, 64, "float16")(none.float(), torch.ones(64), none, EPS)
    ApplyUpdates(library)(torch.zeros(2, 2, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32))
    assert device.launches == []


def test_wrong_shapes_are_refused(library):
    good = torch.zeros(2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="a multiple of 8 from 16 to 16384"):
        RmsNorm(library, 60, "float16")
    with pytest.raises(ValueError, match=r"residual is torch.bfloat16 \(2, 64\)"):
        RmsNorm(library, 64, "float16")(good.bfloat16(), torch.ones(64), good, EPS)
    with pytest.raises(ValueError, match="gate_up is"):
        SiluMul(library, 64, "float16")(good, good)
    with pytest.raises(ValueError, match="gate_up is"):
        SiluMul(library, 64, "float16")(torch.zeros(3, 2, 64), good)
    with pytest.raises(ValueError, match="x is"):
        AddRmsNorm(library, 64, "float16")(torch.zeros(3, 1, 64), good.float(), torch.ones(64), good, EPS)
    with pytest.raises(ValueError, match="residual is"):
        AddRmsNorm(library, 64, "float16")(good, good[:1], torch.ones(64), good, EPS)


FACTORY = "engine.cuda.elementwise"
VARIANTS = [
    Variant(FACTORY, "rms_norm", (16384, "bfloat16", "rows", 512)), Variant(FACTORY, "rms_norm", (5120, "float16", "parts", 512)),
    Variant(FACTORY, "rms_norm", (576, "bfloat16", "", 96)), Variant(FACTORY, "silu_mul", (14336, "bfloat16", 256, True)),
    Variant(FACTORY, "embed", (4096, "bfloat16")), Variant(FACTORY, "take_rows", (576,)), Variant(FACTORY, "apply_updates"),
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_no_stack_and_no_spills(variant):
    portable = ((PORTABLE, (PORTABLE,)),) if "bfloat16" not in variant.constants else ()
    for made_for, cards in (((8, 0), ((8, 0), (8, 6), (8, 9))), ((9, 0), ((9, 0),)), *portable):
        ptx = to_ptx(variant, made_for)
        for cc in cards:
            resources = assemble(ptx, cc)[1]
            assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, resources)
