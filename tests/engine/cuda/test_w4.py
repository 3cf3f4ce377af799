"""4-bit products and repacking against engine/w4.py and float64, in the emulator; outputs, guard bands and scratch start as NaN."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import awq, w4
from engine.cuda import tuning
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.parts import SumParts
from engine.cuda.target import PTX_ARCHITECTURES
from engine.cuda.tuning import FewLaunch, W4Launch, candidates, few_candidates, few_grid, few_launch, packed_bytes, w4_grid, w4_launch
from engine.cuda.w4_few import W4Few
from engine.cuda.w4_layout import W4Device
from engine.cuda.w4_matmul import W4Matmul
from engine.cuda.w4_portable import W4Portable
from engine.cuda.w4_repack import W4Repack
from tests.ptx.device import KERNELS, EmulatedDevice
from tests.ptx.emulator import Emulator, Memory

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PORTABLE = (7, 5)
NAN = float("nan")
# relative error of float32 results: the emulator's mma rounds to nearest, a card's cuts off what its accumulator cannot hold (3.7e-7 seen)
CLOSE = 1e-6 if os.environ.get("KERNEL_TESTS") == "card" else 3e-7
# small relatives of the tables' rows
SMALL: dict[str, FewLaunch | W4Launch] = {
    "one": FewLaunch(1, 2, 1, 2, 2, True),
    "eight": FewLaunch(8, 2, 1, 2, 3, False, 3),
    "apart": FewLaunch(8, 1, 3, 1, 2, False, 0),
    "sixteen": W4Launch(16, 1, 2, 2, 4),
    "direct": W4Launch(32, 2, 2, 1, 3),
    "added": W4Launch(32, 1, 1, 2, 3),
}


@pytest.fixture(scope="module")
def library():
    return Library(EmulatedDevice((9, 0)), KERNELS)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def random_w4(n, k, group, seed=0, zeros=True):
    """Scales are halves; biases are -integer * scale, or halves."""
    rng = np.random.default_rng(seed)
    scale = (rng.random((n, k // group)) * 0.01 + 0.002).astype(np.float16).astype(np.float32)
    bias = -rng.integers(0, 16, scale.shape) * scale if zeros else (rng.standard_normal(scale.shape) * 0.1).astype(np.float16)
    return w4.W4(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scale, bias.astype(np.float32))


def to_awq(weight):
    """The AWQ tensors of a weight whose biases are -integer * scale."""

    def pack(values):
        eights = values.reshape(len(values), -1, 8).astype(np.uint32)
        return sum(eights[:, :, channel] << np.uint32(4 * i) for i, channel in enumerate(awq.ORDER)).astype(np.uint32).view(np.int32)

    zeros = np.rint(-weight.bias / weight.scale)
    return awq.AWQ(pack(w4.unpack(weight.qweight).T), pack(zeros.T), weight.scale.T.astype(np.float16))


def packed(library, weight, form="zero", dtype="bfloat16", parts=()):
    """On the card, in parts that end at the given rows."""
    repack = W4Repack(library, weight.group_size, form, dtype)
    out = W4Device.zeros(weight.out_features, weight.in_features, weight.group_size, form, dtype, "cpu")
    for start, stop in zip((0, *parts), (*parts, weight.out_features), strict=True):
        part = weight.rows(start, stop)
        repack.from_w4(out, start, tensor(part.qweight), tensor(part.scale), tensor(part.bias))
    return out


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


class Product:
    """One product with room around its operands; blocks of K x N work are forced by `launch`."""

    def __init__(self, library, weight, device_weight, m, launch, *, multiprocessors=4, out_dtype="float32", bias=True, seed=0):
        torch.manual_seed(seed)
        w = device_weight
        self.op = (W4Few if isinstance(launch, FewLaunch) else W4Matmul)(
            library, w.n, w.k, w.group, w.form, w.dtype, cc=(9, 0), multiprocessors=multiprocessors, max_m=m, out_dtype=out_dtype, launch=launch
        )  # fmt: skip
        x = torch.randn(m, w.k).to(DTYPES[w.dtype])
        self.out = torch.full((m + 2, w.n), NAN, dtype=DTYPES[out_dtype])
        self.bias = torch.randn(w.n) if bias else None
        self.scratch = torch.full((self.op.scratch_floats + 8,), NAN)
        self.exact = x.double() @ tensor(w4.dequantize(weight)).double().T + (0 if self.bias is None else self.bias.double())
        self.got = self.run(x, w)

    def run(self, x, w):
        """The product, or the sum of its parts, in their order."""
        m = len(x)
        parts = self.op(x, w, self.out[:m], self.scratch, self.bias)
        assert self.out[m:].isnan().all()
        assert self.scratch[self.op.scratch_floats :].isnan().all()
        if parts.data_ptr() == self.out.data_ptr():
            return self.out[:m]
        assert len(parts) > 1 and self.out.isnan().all()
        total = torch.zeros_like(parts[0])
        for part in parts:
            total += part
        return total.to(self.out.dtype)

    @property
    def error(self):
        return error(self.got, self.exact)


# -- repack -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "k", "group", "form"), [(40, 96, 32, "bias"), (33, 192, 64, "zero"), (16, 128, 128, "bias"), (7, 32, 32, "zero")]
)
def test_what_is_packed_unpacks_to_the_reference(library, n, k, group, form, dtype):
    weight = random_w4(n, k, group, zeros=form == "zero")
    device_weight = packed(library, weight, form, dtype, parts=(n // 2,))
    out = torch.full((n + 1, k), NAN, dtype=DTYPES[dtype])
    W4Repack(library, group, form, dtype).dequantize(device_weight, out[:n])
    assert torch.equal(out[:n], tensor(w4.dequantize(weight)).to(DTYPES[dtype]))
    assert out[n:].isnan().all()


@pytest.mark.parametrize(("dtype", "group"), [("bfloat16", 32), ("float16", 128)])
def test_awq_and_canonical_weights_pack_to_the_same_bytes(library, dtype, group):
    weight = random_w4(56, 256, group)
    source = to_awq(weight)
    np.testing.assert_array_equal(w4.dequantize(awq.to_w4(source)), w4.dequantize(weight))
    repack = W4Repack(library, group, "zero", dtype)
    out = W4Device.zeros(56, 256, group, "zero", dtype, "cpu")
    for start, stop in ((0, 8), (8, 40), (40, 56)):  # parts that end within a tile
        part = source.rows(start, stop)
        repack.from_awq(out, start, tensor(part.qweight), tensor(part.qzeros), tensor(part.scales))
    canonical = packed(library, weight, "zero", dtype)
    assert torch.equal(out.packed, canonical.packed)
    assert torch.equal(out.pairs, canonical.pairs)


def test_part_of_the_rows_is_unpacked_alone(library):
    weight = random_w4(80, 64, 64)
    out = torch.full((33, 64), NAN, dtype=torch.bfloat16)
    W4Repack(library, 64, "zero", "bfloat16").dequantize(packed(library, weight), out, first_row=32)
    assert torch.equal(out, tensor(w4.dequantize(weight)[32:65]).to(torch.bfloat16))


def test_scales_that_are_no_numbers_are_counted(library):
    weight = random_w4(40, 64, 32, zeros=False)
    repack, counter = W4Repack(library, 32, "bias", "float16"), torch.zeros(1, dtype=torch.int32)
    repack.count_not_finite(packed(library, weight, "bias", "float16"), counter)
    assert int(counter) == 0
    weight.scale[3, 1], weight.bias[39, 0], weight.scale[17, 0] = NAN, np.inf, 1e6  # the last is too large for a half
    repack.count_not_finite(packed(library, weight, "bias", "float16"), counter)
    assert int(counter) == 3


def test_wrong_tensors_are_refused(library):
    weight = random_w4(40, 64, 32)
    repack = W4Repack(library, 32, "zero", "bfloat16")
    out = W4Device.zeros(40, 64, 32, "zero", "bfloat16", "cpu")
    with pytest.raises(ValueError, match="1:41 are not all within a weight of 40"):
        repack.from_w4(out, 1, tensor(weight.qweight), tensor(weight.scale), tensor(weight.bias))
    with pytest.raises(ValueError, match=r"expected torch.float32 \(40, 2\)"):
        repack.from_w4(out, 0, tensor(weight.qweight), tensor(weight.scale[:, :1]), tensor(weight.bias))
    with pytest.raises(ValueError, match="groups of 48"):
        W4Device.zeros(40, 96, 48, "zero", "bfloat16", "cpu")


# -- product ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "launch"),
    [(1, "one"), (1, "eight"), (2, "apart"), (3, "eight"), (7, "apart"), (8, "eight"), (9, "eight"), (1, "sixteen"), (8, "sixteen"), (15, "sixteen"),
     (16, "sixteen"), (17, "sixteen"), (31, "direct"), (32, "direct"), (33, "direct"), (31, "added"), (33, "added")],
)  # fmt: skip
def test_every_number_of_rows(library, m, launch):
    weight = random_w4(70, 640, 128)
    assert Product(library, weight, packed(library, weight), m, SMALL[launch]).error < CLOSE


@pytest.mark.parametrize("m", [63, 64, 65, 70, 127, 128, 129, 255, 256, 257])
def test_many_rows(library, m):
    weight = random_w4(40, 128, 128)
    assert Product(library, weight, packed(library, weight), m, W4Launch(64, 2, 2, 1, 3)).error < CLOSE


@pytest.mark.parametrize(("n", "k", "group", "launch", "form", "dtype"), [
    (40, 352, 32, "eight", "bias", "bfloat16"),  # K ends within a chunk, an odd number of groups
    (33, 32, 32, "sixteen", "zero", "float16"),  # K is one group and less than a chunk
    (17, 192, 64, "one", "zero", "bfloat16"), (33, 32, 32, "apart", "zero", "float16"), (40, 160, 32, "sixteen", "bias", "bfloat16"), (64, 64, 64, "direct", "bias", "float16"),
    (5, 128, 128, "eight", "bias", "float16"), (100, 384, 128, "added", "bias", "bfloat16"),
])  # fmt: skip
def test_every_group_size_form_and_dtype(library, n, k, group, launch, form, dtype):
    weight = random_w4(n, k, group, zeros=form == "zero")
    m = min(SMALL[launch].rows, 19)
    product = Product(library, weight, packed(library, weight, form, dtype), m, SMALL[launch], bias=False)
    assert product.error < CLOSE


@pytest.mark.parametrize("launch", ["eight", "direct"])
@pytest.mark.parametrize("multiprocessors", [1, 12, 25])
def test_split_input_channels_give_parts(library, launch, multiprocessors):
    """The same bits whether scratch is fresh or used, and the same numbers however the work is cut."""
    weight = random_w4(150, 1024, 128)
    device_weight = packed(library, weight)
    product = Product(library, weight, device_weight, 5, SMALL[launch], multiprocessors=multiprocessors)
    _, grid = product.op.launch(5)
    assert (grid.splits > 1) == (multiprocessors > 1)
    assert (product.op.scratch_floats > 0) == (grid.splits > 1)
    assert product.error < CLOSE
    torch.manual_seed(0)
    again = product.run(torch.randn(5, 1024).to(torch.bfloat16), device_weight)
    assert torch.equal(again, product.got)


@pytest.mark.parametrize(("rows", "width", "parts"), [(1, 8, 1), (3, 24, 2), (5, 264, 4), (2, 2048, 7)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parts_are_added_in_order(library, rows, width, parts, dtype):
    given = torch.randn(parts, rows, width) * 10 ** torch.arange(parts)[:, None, None]
    total = torch.zeros(rows, width)
    for part in given:
        total += part
    out = torch.full((rows + 1, width), NAN, dtype=DTYPES[dtype])
    SumParts(library, dtype)(given, out[:rows])
    assert torch.equal(out[:rows], total.to(DTYPES[dtype]))
    assert out[rows:].isnan().all()


@pytest.mark.parametrize("launch", ["one", "eight", "sixteen", "direct"])
def test_no_bank_conflicts_and_whole_sectors(library, launch):
    """Each shared access takes the fewest cycles, and of each 32 bytes that a copy touches it needs all."""
    made, n, k = SMALL[launch], 64, 512
    name = "w4_few" if isinstance(made, FewLaunch) else "w4_matmul"
    variant = Variant(f"engine.cuda.{name}", name, (128, "zero", "bfloat16", "float32", *made.constants))
    weight = W4Device.zeros(n, k, 128, "zero", "bfloat16", "cpu")
    x, out = torch.randn(made.rows, k).to(torch.bfloat16), torch.full((made.rows, n), NAN)
    cut = (made, made.rows, n, k, 128, 2)
    grid, memory = few_grid(*cut, tuning.most_shared((9, 0))) if isinstance(made, FewLaunch) else w4_grid(*cut), Memory()
    operands = (x, weight.packed, weight.pairs, None, out, torch.full((max(1, grid.part_floats),), NAN))
    for operand in operands:
        if operand is not None:
            memory.add(operand)
    sizes = (made.rows, n, k, k, n)
    library.load([variant])
    stats = Emulator(library._path(variant).read_text()).launch(
        variant.name, grid=grid.grid, block=(made.threads, 1, 1), args=[*(0 if o is None else o.data_ptr() for o in operands), *sizes],
        memory=memory, shared_bytes=grid.shared_bytes,
    )  # fmt: skip
    conflicts = dict(stats["bank_conflicts"].values())
    assert any(text.startswith("ld.shared.v4") for text in conflicts)
    assert max(conflicts.values()) == 1.0, conflicts
    copies = [ratio for text, ratio in stats["sectors"].values() if text.startswith("cp.async")]
    assert copies and max(copies) == 1.0
    assert not (operands[5] if grid.splits > 1 else out).isnan().any()


@pytest.mark.parametrize(("dtype", "form", "most"), [("bfloat16", "zero", 3e-3)])
def test_results_are_rounded_once(library, dtype, form, most):
    weight = random_w4(48, 256, 128, zeros=form == "zero")
    device_weight = packed(library, weight, form, dtype)
    product = Product(library, weight, device_weight, 3, SMALL["eight"], out_dtype=dtype)
    assert product.error < most
    wide = Product(library, weight, device_weight, 3, SMALL["eight"])
    assert torch.equal(wide.got.to(DTYPES[dtype]), product.got)


def test_rows_of_a_wider_buffer(library):
    """x and out are slices of rows that go on."""
    weight = random_w4(24, 64, 32)
    op = W4Matmul(library, 24, 64, 32, "zero", "bfloat16", cc=(9, 0), multiprocessors=2, max_m=3)
    scratch = torch.empty(max(1, op.scratch_floats))
    x, out = torch.full((3, 80), NAN, dtype=torch.bfloat16), torch.full((3, 32), NAN, dtype=torch.bfloat16)
    x[:, :64] = torch.randn(3, 64)

    class Whole:
        """Launches with the whole buffers: the emulator knows only tensors in one piece."""

        def __getitem__(self, variant):
            launch = library[variant]
            return lambda grid, *a, **more: launch(grid, *(x if t is x_view else out if t is out_view else t for t in a), **more)

    x_view, out_view = x[:, :64], out[:, :24]
    op._library = Whole()
    op(x_view, packed(library, weight), out_view, scratch)
    assert out[:, 24:].isnan().all()
    assert error(out_view, x_view.double() @ tensor(w4.dequantize(weight)).double().T) < 3e-3


def test_operands_that_do_not_fit_are_refused(library):
    weight = packed(library, random_w4(24, 64, 32))
    op = W4Matmul(library, 24, 64, 32, "zero", "bfloat16", cc=(9, 0), multiprocessors=2, max_m=3)
    scratch = torch.empty(max(1, op.scratch_floats))
    x, out = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 24, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="1 to 3 rows, 4 were given"):
        op(torch.zeros(4, 64, dtype=torch.bfloat16), weight, out, scratch)
    with pytest.raises(ValueError, match="x must be bfloat16"):
        op(x.half(), weight, out, scratch)
    with pytest.raises(ValueError, match="out must be"):
        op(x, weight, out[:, :23], scratch)
    with pytest.raises(ValueError, match="bias must be"):
        op(x, weight, out, scratch, torch.zeros(23))
    with pytest.raises(ValueError, match="does not fit a product"):
        op(x, packed(library, random_w4(40, 64, 32)), out, scratch)
    cut = W4Matmul(library, 24, 256, 32, "zero", "bfloat16", cc=(9, 0), multiprocessors=2, max_m=3, launch=W4Launch(16, 1, 1, 1, 3, 2))
    with pytest.raises(ValueError, match=f"needs {cut.scratch_floats} floats"):
        cut(torch.zeros(3, 256, dtype=torch.bfloat16), packed(library, random_w4(24, 256, 32)), out, scratch)


# -- the table --------------------------------------------------------------------------------------------------------------------

LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def constants():
    """What the tables can name, once: kernel, constants."""
    tables = {
        "w4_matmul": {*tuning.LARGE_SHARED.values(), *tuning.SMALL_SHARED.values(), *tuning.TUNED.values()},
        "w4_few": {*tuning.FEW.values(), *tuning.FEW_DEFAULTS.values()},
    }
    largest = {  # of those alike in what decides registers the one with most threads; bench.kernels --compile-only looks at all
        (name, launch.rows, launch.tiles, launch.ahead if name == "w4_few" else 0): launch.constants
        for name, launches in tables.items()
        for launch in sorted(launches, key=lambda launch: launch.threads)
    }
    return sorted((name, made) for (name, *_), made in largest.items())


@pytest.mark.parametrize(("name", "made"), constants())
def test_no_launch_of_the_table_needs_a_stack(name, made):
    """0 bytes of stack, 0 spills, registers for its threads, assembled for every architecture."""
    variant = Variant(f"engine.cuda.{name}", name, (128, "zero", "bfloat16", "bfloat16", *made))
    kernel, ptx = variant.make(), to_ptx(variant, PTX_ARCHITECTURES[0])
    for cc in PTX_ARCHITECTURES:
        _, resources = assemble(ptx, cc)
        assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (made, cc)
        assert -(-resources.registers // 8) * 8 * kernel.threads * kernel.min_blocks <= 65536


@pytest.mark.parametrize(("group", "form", "dtype"), [(32, "bias", "float16")])
def test_most_rows_need_no_stack_in_any_form(group, form, dtype):
    made = tuning.LARGE_SHARED["64 rows, wide"].constants
    ptx = to_ptx(Variant("engine.cuda.w4_matmul", "w4_matmul", (group, form, dtype, "float32", *made)), PTX_ARCHITECTURES[0])
    for cc in ((8, 0), (9, 0)):
        _, resources = assemble(ptx, cc)
        assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), cc


@pytest.mark.parametrize("cc", PTX_ARCHITECTURES)
def test_launches_fit_the_card(cc):
    for m in (1, 2, 8, 9, 32, 33, 64, 500):
        for n, k in [*LLAMA, (576, 576), (49152, 576)]:
            launch = w4_launch(cc, m, n, k)
            assert launch.rows >= min(m, 64)
            for group in (32, 64, 128):
                assert launch.shared_bytes(group) <= tuning.most_shared(cc)
                if m <= 8 and k % group == 0:
                    grid = few_grid(few_launch(cc, m, n, k), m, n, k, group, 100, tuning.most_shared(cc))
                    assert grid.row_blocks == 1 and grid.shared_bytes <= tuning.most_shared(cc)


@pytest.mark.parametrize(("n", "k"), LLAMA)
@pytest.mark.parametrize("m", [1, 2, 8, 16, 32, 64])
def test_every_multiprocessor_has_work(m, n, k):
    grid = w4_grid(w4_launch((9, 0), m, n, k), m, n, k, 128, 132)
    if m <= 8:
        grid = few_grid(few_launch((9, 0), m, n, k), m, n, k, 128, 132, tuning.most_shared((9, 0)))
    assert grid.column_blocks * grid.splits * grid.row_blocks >= 112
    assert grid.part_floats * 4 <= 64 << 20


def test_a_measured_row_goes_before_the_defaults(monkeypatch):
    exact, kind = W4Launch(16, 1, 1, 4, 3), W4Launch(16, 3, 1, 4, 3)
    monkeypatch.setattr(tuning, "TUNED", {})
    monkeypatch.setitem(tuning.TUNED, ("w4_matmul", (9, 0), "16 4096 4096"), exact)
    monkeypatch.setitem(tuning.TUNED, ("w4_matmul", (9, 0), "16 rows, narrow"), kind)
    assert w4_launch((9, 0), 11, 4096, 4096) == exact
    assert w4_launch((9, 0), 11, 4096, 1024) == kind
    assert w4_launch((9, 0), 11, 28672, 4096) == tuning.LARGE_SHARED["16 rows, wide"]
    assert w4_launch((8, 0), 11, 4096, 4096) == tuning.LARGE_SHARED["16 rows, narrow"]
    assert w4_launch((8, 9), 11, 4096, 4096) == tuning.SMALL_SHARED["16 rows, narrow"]


@pytest.mark.parametrize("m", [1, 8])
def test_candidates_of_few_rows_are_launches_that_fit(m):
    for cc in ((9, 0), (8, 6)):
        found = list(few_candidates(cc, m, 4096, 4096, 128))
        assert len(found) == len(set(found)) > 100 and all(launch.rows == m and launch.threads <= 1024 for launch in found)


def test_a_measured_row_of_few_rows_goes_before_the_defaults(monkeypatch):
    exact = FewLaunch(8, 1, 3, 1, 2)
    monkeypatch.setattr(tuning, "FEW", {((9, 0), "8 4096 4096"): exact})
    assert few_launch((9, 0), 2, 4096, 4096) == exact
    assert few_launch((9, 0), 1, 4096, 4096) == tuning.FEW_DEFAULTS["1 rows, narrow"]
    assert few_launch((8, 0), 8, 28672, 4096) == tuning.FEW_DEFAULTS["8 rows, wide"]


@pytest.mark.parametrize("m", [16, 32, 64])
def test_candidates_are_launches_that_fit(m):
    found = list(candidates((9, 0), m, 4096, 4096, 128))
    assert len(found) == len(set(found)) > 10
    assert all(launch.rows == m and launch.shared_bytes(128) <= tuning.most_shared((9, 0)) for launch in found)


def test_packed_bytes_is_what_is_allocated():
    for n, k, group in ((40, 96, 32), (4096, 4096, 128), (33, 192, 64)):
        weight = W4Device.zeros(n, k, group, "zero", "float16", "cpu")
        assert packed_bytes(n, k, group) == weight.packed.nbytes + weight.pairs.nbytes
    assert packed_bytes(4096, 4096, 128) == 4096 * 4096 // 2 * 17 // 16


def test_the_memory_plan_needs_no_compiler():
    code = "import sys, engine.cuda.tuning; print(sorted({'numba', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- portable ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k", "group", "form"), [(1, 40, 96, 32, "bias"), (6, 33, 256, 128, "zero"), (3, 16, 64, 64, "zero")])
def test_portable_product(tmp_path, m, n, k, group, form):
    library = Library(EmulatedDevice(PORTABLE), tmp_path)
    weight = random_w4(n, k, group, zeros=form == "zero")
    device_weight = packed(library, weight, form, "float16")
    x, out, bias = torch.randn(m, k).half(), torch.full((m + 1, n), NAN, dtype=torch.float16), torch.randn(n)
    W4Portable(library, n, k, group, form)(x, device_weight, out[:m], bias)
    assert error(out[:m], x.double() @ tensor(w4.dequantize(weight)).double().T + bias) < 5e-4
    assert out[m:].isnan().all()


SIMULATED = """
import sys
import numpy as np
from engine.cuda.target import cuda
from engine.cuda.w4_portable import w4_portable
folder, m, n, k = sys.argv[1], *map(int, sys.argv[2:])
kinds = {"x": np.float16, "packed": np.uint32, "pairs": np.float16, "bias": np.float32}
operands = {name: np.fromfile(f"{folder}/{name}", kind) for name, kind in kinds.items()}
kernel = w4_portable(64, "bias", 4)
out = np.full((m + 1) * n, np.nan, np.float16)
arguments = (*operands.values(), 1, out, m, n, k, k, n)
cuda.jit(kernel.function)[(-(-n // 16), -(-m // 4)), kernel.threads](*arguments)
out.tofile(f"{folder}/out")
"""


def test_portable_product_in_numbas_simulator(library, tmp_path, monkeypatch):
    m, n, k = 2, 20, 64
    weight = random_w4(n, k, 64, zeros=False)
    device_weight = packed(library, weight, "bias", "float16")
    x, bias = torch.randn(m, k).half(), torch.randn(n)
    for name, values in (("x", x), ("packed", device_weight.packed), ("pairs", device_weight.pairs), ("bias", bias)):
        values.numpy().tofile(tmp_path / name)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    subprocess.run([sys.executable, "-c", SIMULATED, str(tmp_path), str(m), str(n), str(k)], check=True, timeout=120)
    out = tensor(np.fromfile(tmp_path / "out", np.float16)).view(m + 1, n)
    assert error(out[:m], x.double() @ tensor(w4.dequantize(weight)).double().T + bias) < 5e-4
    assert out[m:].isnan().all()


@pytest.mark.parametrize("rows", [1, 4])
def test_portable_needs_no_stack(rows):
    _, resources = assemble(to_ptx(Variant("engine.cuda.w4_portable", "w4_portable", (128, "zero", rows)), PORTABLE), PORTABLE)
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0)
