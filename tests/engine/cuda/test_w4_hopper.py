"""4-bit products with wgmma against float64, in the emulator; outputs, guard bands and scratch start as NaN."""

import pytest
import torch

from engine import w4
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.tuning import (
    HOPPER,
    HOPPER_BUCKETS,
    HopperLaunch,
    dense_from,
    hopper_candidates,
    hopper_grid,
    hopper_launch,
    most_part_floats,
    most_shared,
)
from engine.cuda.w4_by_rows import W4ByRows
from engine.cuda.w4_few import W4Few
from engine.cuda.w4_hopper import W4Hopper
from engine.cuda.w4_layout import W4Device
from tests.engine.cuda.test_w4 import DTYPES, NAN, error, packed, random_w4, tensor
from tests.ptx.device import KERNELS, EmulatedDevice
from tests.ptx.emulator import Emulator, Memory

CC = (9, 0)
# rows, warpgroups, tiles, x_stages, w_stages, ahead, parts, together
SMALL = {
    "plain": HopperLaunch(32, 2, 1, 3, 4, 2, 1, 4),
    "uneven": HopperLaunch(24, 1, 1, 2, 3, 1, 1, 8),
    "two tiles": HopperLaunch(64, 1, 2, 3, 2, 3),
    "two passes": HopperLaunch(128, 1, 1, 2, 2, 1, 2, 4),
    "eight": HopperLaunch(8, 1, 1, 3, 4, 2, 1, 4),
}


@pytest.fixture(scope="module")
def library():
    return Library(EmulatedDevice(CC), KERNELS)


class Product:
    """One product with room around its results."""

    def __init__(self, library, weight, m, launch, *, dtype="bfloat16", out_dtype="float32", multiprocessors=4, bias=True):
        torch.manual_seed(0)
        n, k, group = weight.out_features, weight.in_features, weight.group_size
        self.op = W4Hopper(
            library, n, k, group, "zero", dtype, cc=CC, multiprocessors=multiprocessors, max_m=m, out_dtype=out_dtype, launch=launch
        )
        self.weight = packed(library, weight, "zero", dtype)
        self.x = torch.randn(m, k).to(DTYPES[dtype])
        self.out = torch.full((m + 2, n), NAN, dtype=DTYPES[out_dtype])
        self.bias = torch.randn(n) if bias else None
        self.scratch = torch.full((self.op.scratch_floats + 8,), NAN)
        self.exact = self.x.double() @ tensor(w4.dequantize(weight)).double().T + (0 if self.bias is None else self.bias.double())
        self.splits = 1
        self.got = self.run()

    def run(self):
        """The product, or the sum of its parts, in their order."""
        m = len(self.x)
        parts = self.op(self.x, self.weight, self.out[:m], self.scratch, self.bias)
        assert self.out[m:].isnan().all()
        assert self.scratch[self.op.scratch_floats :].isnan().all()
        if parts.data_ptr() == self.out.data_ptr():
            return self.out[:m].clone()
        self.splits = len(parts)
        assert self.splits > 1 and self.out.isnan().all()
        total = torch.zeros_like(parts[0])
        for part in parts:
            total += part
        return total.to(self.out.dtype)

    @property
    def error(self):
        return error(self.got, self.exact)


@pytest.mark.parametrize(("m", "launch"), [(1, "eight"), (31, "plain"), (33, "plain"), (24, "uneven"), (129, "two passes"), (9, "eight")])
def test_every_number_of_rows(library, m, launch):
    assert Product(library, random_w4(150, 640, 128), m, SMALL[launch]).error < 3e-7


@pytest.mark.parametrize(("n", "k", "group", "launch", "dtype"), [
    (40, 352, 32, "two tiles", "bfloat16"),  # K ends within a chunk
    (17, 192, 64, "two passes", "bfloat16"), (70, 384, 128, "two tiles", "float16"),
])  # fmt: skip
def test_every_group_size_and_dtype(library, n, k, group, launch, dtype):
    assert Product(library, random_w4(n, k, group), 19, SMALL[launch], dtype=dtype, bias=False).error < 3e-7


@pytest.mark.parametrize("multiprocessors", [1, 9])
def test_split_input_channels_give_parts(library, multiprocessors):
    """The same bits whether scratch is fresh or used."""
    product = Product(library, random_w4(150, 1152, 128), 5, SMALL["plain"], multiprocessors=multiprocessors)
    assert (product.splits > 1) == (multiprocessors > 1) == (product.op.scratch_floats > 0)
    assert product.error < 3e-7
    assert torch.equal(product.run(), product.got)


def test_results_are_rounded_once(library):
    weight = random_w4(130, 256, 128)
    narrow, wide = (Product(library, weight, 9, SMALL["plain"], out_dtype=each) for each in ("bfloat16", "float32"))
    assert torch.equal(wide.got.to(torch.bfloat16), narrow.got)


def test_rows_that_are_not_there_do_not_matter(library):
    """x ends with its last row: what lies behind it, here NaN, is not read into any result."""
    weight = random_w4(64, 256, 128)
    op = W4Hopper(library, 64, 256, 128, "zero", "bfloat16", cc=CC, multiprocessors=1, max_m=7, launch=SMALL["plain"])
    x = torch.full((32, 256), NAN, dtype=torch.bfloat16)
    x[:7] = torch.randn(7, 256)
    out = torch.full((7, 64), NAN, dtype=torch.bfloat16)
    op(x[:7], packed(library, weight), out, torch.empty(1))
    assert error(out, x[:7].double() @ tensor(w4.dequantize(weight)).double().T) < 3e-3


@pytest.mark.parametrize("launch", ["plain", "two passes"])
def test_no_bank_conflicts_and_whole_sectors(library, launch):
    """Each shared access takes the fewest cycles, and of each 32 bytes that a copy or a load touches it needs all."""
    made, n, k = SMALL[launch], 128, 512
    variant = Variant("engine.cuda.w4_hopper", "w4_hopper", (128, "bfloat16", "float32", *made.constants))
    weight = W4Device.zeros(n, k, 128, "zero", "bfloat16", "cpu")
    x, out = torch.randn(made.rows, k).to(torch.bfloat16), torch.full((made.rows, n), NAN)
    grid, memory = hopper_grid(made, made.rows, n, k, 128, 1), Memory()
    operands = (x, weight.packed, weight.pairs, None, out, torch.empty(1))
    for operand in operands:
        if operand is not None:
            memory.add(operand)
    library.load([variant])
    stats = Emulator(library._path(variant).read_text()).launch(
        variant.name, grid=grid.grid, block=(made.threads, 1, 1), args=[*(0 if o is None else o.data_ptr() for o in operands), made.rows, n, k, k, n],
        memory=memory, shared_bytes=made.shared_bytes(128),
    )  # fmt: skip
    conflicts = dict(stats["bank_conflicts"].values())
    assert any(text.startswith("st.shared.u32") for text in conflicts)
    assert max(conflicts.values()) == 1.0, conflicts
    read = [ratio for text, ratio in stats["sectors"].values() if text.startswith(("cp.async", "ld.global.v4"))]
    assert read and max(read) == 1.0
    assert not out.isnan().any()


def test_operands_that_do_not_fit_are_refused(library):
    weight = packed(library, random_w4(64, 128, 128))
    op = W4Hopper(library, 64, 128, 128, "zero", "bfloat16", cc=CC, multiprocessors=1, max_m=3, launch=SMALL["plain"])
    x, out, scratch = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(3, 64, dtype=torch.bfloat16), torch.empty(1)
    with pytest.raises(ValueError, match="1 to 3 rows, 4 were given"):
        op(torch.zeros(4, 128, dtype=torch.bfloat16), weight, out, scratch)
    with pytest.raises(ValueError, match="x must be bfloat16"):
        op(x.half(), weight, out, scratch)
    with pytest.raises(ValueError, match="out must be"):
        op(x, weight, out[:, :63], scratch)
    with pytest.raises(ValueError, match="bias must be"):
        op(x, weight, out, scratch, torch.zeros(23))
    with pytest.raises(ValueError, match="does not fit a product"):
        op(x, packed(library, random_w4(64, 128, 128, zeros=False), "bias"), out, scratch)
    with pytest.raises(ValueError, match="rows are a multiple of 8"):
        Variant("engine.cuda.w4_hopper", "w4_hopper", (128, "bfloat16", "bfloat16", *HopperLaunch(30, 1, 1, 3, 4).constants)).make()


def of_the_card(library, form="zero", cc=CC, max_m=200, **more):
    return W4ByRows(library, 96, 256, 128, form, "bfloat16", cc=cc, multiprocessors=4, max_m=max_m, **more)


def test_the_kernel_of_so_many_rows(library):
    chosen = of_the_card(library)
    assert all(isinstance(chosen.family(m), W4Few) for m in (1, 2, 8))
    for m in (9, 16, 17, 128, 200):
        assert isinstance(chosen.family(m), W4Hopper)
        assert chosen.family(m).launch(m)[0] in chosen.variants
    for other in (of_the_card(library, "bias"), of_the_card(library, cc=(8, 0)), of_the_card(library, cc=(12, 0))):
        assert {variant.factory for variant in other.variants} == {"w4_few", "w4_matmul"}
    assert {hopper_launch(m, 96, 256).rows for m in range(9, 129)} == {16, 24, 32, 48, 64}
    with pytest.raises(ValueError, match="1 to 200 rows, 201 were given"):
        of_the_card(library).family(201)
    with pytest.raises(ValueError, match=r"9\.0 alone, not 8\.0"):
        W4Hopper(library, 96, 256, 128, "zero", "bfloat16", cc=(8, 0), multiprocessors=4, max_m=9)
    with pytest.raises(ValueError, match="form zero, not bias"):
        W4Hopper(library, 96, 256, 128, "bias", "bfloat16", cc=CC, multiprocessors=4, max_m=9)


@pytest.mark.parametrize("m", [1, 8, 9, 17])
def test_the_chosen_kernel_gives_the_product(library, m):
    op, weight = of_the_card(library, max_m=20, out_dtype="float32"), random_w4(96, 256, 128)
    x, bias, scratch = torch.randn(m, 256).to(torch.bfloat16), torch.randn(96), torch.full((op.scratch_floats + 1,), NAN)
    out = torch.full((m, 96), NAN)
    parts = op(x, packed(library, weight), out, scratch, bias)
    got = out if parts is out else parts.sum(0)
    assert error(got, x.double() @ tensor(w4.dequantize(weight)).double().T + bias.double()) < 1e-6


def test_every_launch_of_the_table_fits():
    for bucket in HOPPER_BUCKETS:
        assert {f"{bucket} rows, narrow", f"{bucket} rows, wide"} <= HOPPER.keys()
    for launch in HOPPER.values():
        for group in (32, 64, 128):
            assert launch.shared_bytes(group) <= most_shared(CC)
            Variant("engine.cuda.w4_hopper", "w4_hopper", (group, "float16", "float32", *launch.constants)).make()
    assert hopper_launch(30, 6144, 4096) == HOPPER["32 6144 4096"] and hopper_launch(500, 8192, 64) == HOPPER["256 rows, wide"]
    found = list(hopper_candidates(60, 4096, 4096, 128))
    assert {launch.rows for launch in found} == {64} and HOPPER["64 rows, narrow"] in found


@pytest.mark.parametrize("cc", [(8, 0), (8, 9), CC, (12, 0)])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (28672, 4096), (96, 512)])
def test_the_plan_counts_the_parts_of_every_product(library, cc, n, k):
    made = [
        W4ByRows(library, n, k, 128, form, "bfloat16", cc=cc, multiprocessors=mps, max_m=max_m).scratch_floats
        for form in ("zero", "bias") for mps in (4, 148) for max_m in (1, 30, dense_from(cc, form, resident=False) - 1)
    ]  # fmt: skip
    assert max(made) == most_part_floats(cc, 148, n, k, 128) < 3 << 20
    assert most_part_floats((7, 5), 40, n, k, 128) == 0


@pytest.mark.parametrize("made", [HopperLaunch(64, 2, 2, 3, 5, 2)])
def test_no_stack_and_no_spills(made):
    variant = Variant("engine.cuda.w4_hopper", "w4_hopper", (128, "bfloat16", "bfloat16", *made.constants))
    _, resources = assemble(to_ptx(variant, CC), CC, "a")
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0)
    assert resources.registers * made.threads <= 65536
