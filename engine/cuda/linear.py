"""Products with the weights of a model: uploaded, stacked and repacked at load, multiplied by whatever is quickest for the rows.

    weight in the checkpoint                on the card                      few rows        many rows
    16 or 32 bits, 8-bit GGUF, mixed forms  dense, computing dtype           torch.mm        torch.mm
    4 bits (GGUF, GPTQ, pack-quantized),    packed (w4_layout.py), and a     w4_by_rows      torch.mm with the dense copy,
    AWQ                                     dense copy where memory allows                   or with one made for the moment
    W8A8 int8, FP8                          8 bits (eight_bit.py), where     cuBLAS in 8 bits, activations quantized a token
                                            the card multiplies those

"Many" is `tuning.dense_from`. Of a weight with an order (act-order) activations are taken in that order first. Knows no layer and no step.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config.schema import Config
from engine.awq import AWQ
from engine.backend import Dense, Weight
from engine.cuda.eight_bit import EightBit, EightBitProducts, Gated
from engine.cuda.launch import Library, Variant
from engine.cuda.parts import DTYPES, SumParts
from engine.cuda.take_columns import TakeColumns
from engine.cuda.tuning import dense_from
from engine.cuda.w4_by_rows import W4ByRows
from engine.cuda.w4_layout import W4Device
from engine.cuda.w4_portable import W4Portable
from engine.cuda.w4_repack import W4Repack
from engine.errors import ModelError
from engine.models.layers import to_dense
from engine.plan_cuda import makes_dense_copy
from engine.w4 import W4, same_columns

TENSOR_CORES = (8, 0)  # the oldest card of which the kernels use them; older ones take the portable kernels, in float16


@dataclass(slots=True, eq=False)
class Linear:
    """y = x W^T + b. `dense` [N, K]: the weight itself, or the resident copy of a packed one (None: made when needed)."""

    n: int
    k: int
    bias: torch.Tensor | None  # float32 [N]
    bias16: torch.Tensor | None  # the same in the computing dtype
    dense: torch.Tensor | None
    packed: W4Device | None = None
    order: torch.Tensor | None = None  # int32 [K]: which activation each input channel of `packed` takes
    eight: EightBit | None = None
    gates: bool = False  # what it gives goes to `down` as `Gated`


class Linears:
    """All of one rank. `max_rows`: of the largest step."""

    def __init__(self, library: Library, device: Any, dtype: str, max_rows: int) -> None:
        self._library, self._device, self._dtype = library, device, dtype
        self._place = {"device": device.torch_device, "dtype": DTYPES[dtype]}
        self._all: list[Linear] = []
        self._products: dict[tuple[int, int, int, str, str], W4ByRows | W4Portable] = {}
        self._repacks: dict[tuple[int, str], W4Repack] = {}
        self._finite: list[torch.Tensor] = []  # of each upload: whether all its numbers are
        self._bad_scales = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
        self._sum = SumParts(library, dtype)
        self._scratch: torch.Tensor  # for the parts of a product
        self._eight = EightBitProducts(library, device, dtype, max_rows)
        self._take_columns, self._max_rows = TakeColumns(library), max_rows
        self._ordered: torch.Tensor  # activations in another order
        self._moment: torch.Tensor  # where a packed weight is unpacked for one product

    # -- load -----------------------------------------------------------------------------------------------------------

    def make(self, weight: Weight | list[Weight], bias: Dense | None, *, float32_out: bool = False) -> Linear:
        """`weight`: one, or several with the same input that are stacked."""
        parts = weight if isinstance(weight, list) else [weight]
        linear = self._pack(parts, float32_out)
        if linear is None and not float32_out and (eight := self._eight.load(parts)) is not None:
            linear = Linear(eight.n, eight.k, None, None, None, eight=eight)
        if linear is None:
            dense = self.upload([to_dense(part) for part in parts])
            linear = Linear(dense.shape[0], dense.shape[1], None, None, dense)
        if bias is not None:
            linear.bias = bias.to(self._device.torch_device, torch.float32, copy=True)
            linear.bias16 = self.upload([bias])
        self._all.append(linear)
        return linear

    def of_table(self, table: torch.Tensor) -> Linear:
        """The output head that is the embedding table."""
        return Linear(table.shape[0], table.shape[1], None, None, table)

    def upload(self, parts: list[Dense]) -> torch.Tensor:
        """In the computing dtype, one under the other."""
        out = torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), **self._place)
        at = 0
        for part in parts:
            out[at : at + part.shape[0]].copy_(part.to(self._device.torch_device))  # converted there
            at += part.shape[0]
        self._finite.append(torch.isfinite(out).all())
        return out

    def _pack(self, parts: list[Weight], float32_out: bool) -> Linear | None:
        """Parts of one 4-bit form stay 4-bit; None: they are something else, or mixed."""
        grouped = [part for part in parts if isinstance(part, W4 | AWQ)]
        if len(grouped) < len(parts) or len({(type(part), part.group_size) for part in grouped}) > 1:
            return None
        if float32_out and self._device.cc < TENSOR_CORES:
            return None
        if isinstance(grouped[0], W4) and not same_columns([part for part in grouped if isinstance(part, W4)]):
            return None
        first = grouped[0]
        n, k, group = sum(part.out_features for part in grouped), first.in_features, first.group_size
        form = "zero" if isinstance(first, AWQ) or first.integer_zeros else "bias"
        if (group, form) not in self._repacks:
            self._repacks[group, form] = W4Repack(self._library, group, form, self._dtype)
        repack = self._repacks[group, form]
        packed = W4Device.zeros(n, k, group, form, self._dtype, self._device.torch_device)
        row = 0
        for part in grouped:
            if isinstance(part, AWQ):
                repack.from_awq(packed, row, *(self._bytes(array) for array in (part.qweight, part.qzeros, part.scales)))
            else:
                repack.from_w4(packed, row, *(self._bytes(array) for array in (part.qweight, part.scale, part.bias)))
            row += part.out_features
        repack.count_not_finite(packed, self._bad_scales)
        order = first.order if isinstance(first, W4) else None
        linear = Linear(n, k, None, None, None, packed, None if order is None else self._bytes(order))
        self._product(linear, "float32" if float32_out else self._dtype)
        return linear

    def _bytes(self, array: np.ndarray) -> torch.Tensor:
        """As it is, on the card."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # a view of the file; nobody writes to it
            host = torch.from_numpy(np.ascontiguousarray(array))
        return host.to(self._device.torch_device, copy=True)

    def _product(self, linear: Linear, out_dtype: str) -> W4ByRows | W4Portable:
        assert linear.packed is not None
        key = (linear.n, linear.k, linear.packed.group, linear.packed.form, out_dtype)
        if key not in self._products and self._device.cc < TENSOR_CORES:
            self._products[key] = W4Portable(self._library, *key[:4])
        elif key not in self._products:
            self._products[key] = W4ByRows(
                self._library, *key[:4], self._dtype, cc=self._device.cc, multiprocessors=self._device.multiprocessors,
                max_m=self._most_packed(linear.packed.form), out_dtype=out_dtype,
            )  # fmt: skip
        return self._products[key]

    def finish(self, config: Config) -> None:
        """Wait for the uploads, refuse numbers that are not finite, make the dense copies that fit, and the scratch."""
        if self._finite and not bool(torch.stack(self._finite).all()) or int(self._bad_scales):
            raise ModelError(
                "The checkpoint holds a number that is not finite; fetch it again, or load it with engine.device = 'cpu' to learn which."
            )
        self._finite.clear()
        packed = [linear for linear in self._all if linear.packed is not None]
        products = [product for product in self._products.values() if isinstance(product, W4ByRows)]
        floats = max((product.scratch_floats for product in products), default=0)
        self._scratch = torch.empty(max(1, floats), dtype=torch.float32, device=self._device.torch_device)
        self._eight.finish()
        widest = max((linear.k for linear in self._all if linear.order is not None), default=0)
        self._ordered = torch.empty(self._max_rows * widest, **self._place)
        self._device.give_back()
        if makes_dense_copy(config, sum(2 * linear.n * linear.k for linear in packed), self._device.memory()[0]):
            for linear in packed:
                linear.dense = torch.empty((linear.n, linear.k), **self._place)
                self._unpack(linear, linear.dense)
        else:
            self._moment = torch.empty(max((linear.n * linear.k for linear in packed), default=0), **self._place)

    @property
    def variants(self) -> tuple[Variant, ...]:
        ordered = (self._take_columns,) if any(linear.order is not None for linear in self._all) else ()
        made = (*self._products.values(), *self._repacks.values(), self._sum, self._eight, *ordered)
        return tuple(variant for operation in made for variant in operation.variants)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def __call__(self, x: torch.Tensor | Gated, linear: Linear, out: torch.Tensor, *, whole: bool = False) -> torch.Tensor | Gated:
        """out [rows, N] = x [rows, K] W^T + b, all in the computing dtype. Returns out, or, unless `whole` is asked for, the parts
        whose sum it would be (`engine/cuda/parts.py`), which stay until the next product."""
        if linear.eight is not None and linear.gates:
            return self._eight.gate(x, linear.eight, out)
        if linear.eight is not None:
            self._eight(x, linear.eight, out, linear.bias, linear.bias16)
            return out
        x = self._in_order(x, linear)
        if self._takes_packed(linear, len(x)):
            product = self._product(linear, self._dtype)
            if isinstance(product, W4Portable):
                product(x, linear.packed, out, linear.bias)
                return out
            parts = product(x, linear.packed, out, self._scratch, linear.bias)
            if parts is out or not whole:
                return parts
            self._sum(parts, out)
        elif linear.bias16 is None:
            torch.mm(x, self._dense(linear).T, out=out)
        else:
            torch.addmm(linear.bias16, x, self._dense(linear).T, out=out)
        return out

    def float32(self, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """The same without bias into float32."""
        x = self._in_order(x, linear)
        if self._takes_packed(linear, len(x)):
            product = self._product(linear, "float32")
            parts = product(x, linear.packed, out, self._scratch)
            if parts is not out:
                torch.sum(parts, 0, out=out)
        else:
            self._device.matmul_f32(x, self._dense(linear), out)

    def fuse(self, gate_up: Linear, down: Linear) -> None:
        """Once, at load: gate_up's outputs go through SiLU into down's bytes where both are of a kind that does so."""
        gate_up.gates = gate_up.bias is None and self._eight.can_gate(gate_up.eight, down.eight)

    def _in_order(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        if linear.order is None:
            return x
        out = self._ordered[: x.numel()].view(x.shape)
        self._take_columns(x, linear.order, out)
        return out

    def _most_packed(self, form: str) -> int:
        """Rows that the packed product may get."""
        return max(1, min(self._max_rows, max(dense_from(self._device.cc, form, resident) for resident in (True, False)) - 1))

    def _takes_packed(self, linear: Linear, rows: int) -> bool:
        if linear.packed is None:
            return False
        form = linear.packed.form
        return 0 < rows < min(dense_from(self._device.cc, form, linear.dense is not None), self._most_packed(form) + 1)

    def _dense(self, linear: Linear) -> torch.Tensor:
        if linear.dense is not None:
            return linear.dense
        dense = self._moment[: linear.n * linear.k].view(linear.n, linear.k)
        self._unpack(linear, dense)
        return dense

    def _unpack(self, linear: Linear, out: torch.Tensor) -> None:
        assert linear.packed is not None
        self._repacks[linear.packed.group, linear.packed.form].dequantize(linear.packed, out)
