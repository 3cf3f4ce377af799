"""`CudaBackend`: the protocol of engine/backend.py on one card. Arrays are torch tensors in the computing dtype.

Every buffer a step writes to is made once, for the largest step, and lives at a fixed address: what graphs need, and what
makes the memory plan exact. All kernels are compiled before the first step (`load_kernels`). 4-bit weights are uploaded as
the checkpoint has them and repacked on the card; products of many rows use a dense copy of them, resident or made for the
moment. Knows no family and no order of operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.schema import Config
from engine.backend import Dense, Weight
from engine.cache.layout import KVLayout
from engine.cuda.all_reduce import summed_norm_of
from engine.cuda.attention_portable import PortableAttention
from engine.cuda.eight_bit import Gated
from engine.cuda.elementwise import AddRmsNorm, ApplyUpdates, Embed, RmsNorm, SiluMul, TakeRows
from engine.cuda.kv_store import RopeStore
from engine.cuda.launch import Library, Variant
from engine.cuda.linear import DTYPES, TENSOR_CORES, Linear, Linears
from engine.cuda.paged_attention import PagedDecode
from engine.cuda.prefill_attention import PrefillAttention
from engine.cuda.state import State
from engine.cuda.step import Step, Tiles
from engine.cuda.whole_prompts import WholePrompts
from engine.host import usable_cores
from engine.models.layers import to_dense
from engine.models.shard import Share, make_shard
from engine.models.spec import ModelSpec
from engine.parallel import Ranks, Unsummed
from engine.plan_cuda import activation_widths
from engine.step import MAX_SCORED, StepPlan

Array = torch.Tensor
TILE_TOKENS = 2  # column of a tile: how many tokens it has


@dataclass(frozen=True, slots=True)
class Rope:
    cos: torch.Tensor
    sin: torch.Tensor


class Buffers:
    """[rows, width] buffers for the largest step, all made at once; `get` gives the first rows of one, at the same address
    each time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int, widths: dict[str, int]) -> None:
        self._held = {name: torch.empty((rows, width), dtype=dtype, device=device) for name, width in widths.items()}

    def get(self, name: str, rows: int) -> torch.Tensor:
        return self._held[name][:rows]


class CudaBackend:
    """See the module. `dtype`: "bfloat16" or "float16"."""

    name = "cuda"
    stacks = True

    def __init__(self, config: Config, spec: ModelSpec, dtype: str, ranks: Ranks, device: Any) -> None:
        self._config, self._spec, self._device = config, spec, device
        self._dtype = DTYPES[dtype]
        self._place = {"device": device.torch_device, "dtype": self._dtype}
        knobs, cache, bits = config.engine, config.cache, config.cache.quant_policy
        shard = make_shard(spec, ranks.rank, ranks.size)
        own = Share(
            shard.num_heads, shard.num_kv_heads, shard.intermediate.stop - shard.intermediate.start, shard.vocab.stop - shard.vocab.start
        )
        self._heads, self._kv_heads = shard.num_heads, shard.num_kv_heads
        self._intermediate = own.intermediate
        self.library = library = Library(device, Path(config.engine.kernel_cache_dir), processes=usable_cores())
        rows = max(knobs.max_prefill_token_num, knobs.max_batch_size)
        self._buffers = Buffers(device.torch_device, self._dtype, rows, activation_widths(spec, own))
        self._taken = torch.empty((knobs.max_batch_size + MAX_SCORED, spec.hidden_size), **self._place)
        self._logits = torch.empty((knobs.max_batch_size + MAX_SCORED, spec.vocab_size), dtype=torch.float32, device=device.torch_device)
        hidden = spec.hidden_size
        self._embed, self._take, self._updates = Embed(library, hidden, dtype), TakeRows(library, hidden), ApplyUpdates(library)
        self._rms_norm, self._add_rms_norm = RmsNorm(library, hidden, dtype), AddRmsNorm(library, hidden, dtype)
        self._silu_mul = SiluMul(library, self._intermediate, dtype)
        # K and V of a prompt are read as every later token will read them: windowed, or in few bits
        ours = bits or any(spec.window(i) for i in range(spec.num_layers))
        self._whole = WholePrompts(device.cc, self._heads, self._kv_heads, spec.head_dim, 0 if ours else rows)
        rope_dim = spec.rope.rotary_dim or spec.head_dim
        self._rope_store = RopeStore(
            library, self._heads, self._kv_heads, spec.head_dim, rope_dim, cache.cache_block_seq_len, dtype, bits=bits,
            qk_norm=spec.qk_norm, trained_length=spec.max_position if spec.use_logn_attn else 0, keep_k=bool(self._whole.lengths),
        )  # fmt: skip
        self._portable: dict[int, PortableAttention] = {}  # all three by window
        self._decode: dict[int, PagedDecode] = {}
        self._prefill: dict[int, PrefillAttention] = {}
        for window in sorted({spec.window(i) for i in range(spec.num_layers)}):
            shape = (library, self._heads, self._kv_heads, spec.head_dim, cache.cache_block_seq_len)
            if device.cc < TENSOR_CORES:
                self._portable[window] = PortableAttention(*shape, window=window, bits=bits)
                continue
            decode = PagedDecode(*shape, dtype, knobs.max_batch_size, device.multiprocessors, device.cc, window=window, bits=bits)
            decode.bind(torch.empty(decode.scratch_bytes, dtype=torch.uint8, device=device.torch_device))
            self._decode[window] = decode
            self._prefill[window] = PrefillAttention(*shape, dtype, device.multiprocessors, device.cc, window=window, bits=bits)
        self._rows = rows
        self._summed_norm = summed_norm_of(library, device, ranks, hidden, dtype)
        if self._summed_norm is not None:
            ranks.defers = self._summed_norm.takes
        kv_width = 2 * self._kv_heads * spec.head_dim
        self._out = {  # which buffer the products of a width go to
            hidden: "hidden", 2 * self._intermediate: "gate_up", self._heads * spec.head_dim + kv_width: "qkv",
        }  # fmt: skip
        self._linears = Linears(library, device, dtype, rows)
        self._reduced = ranks.size > 1  # what has the width of the residual stream is summed over ranks
        self._state: State
        self._only_decode = False

    # -- load -----------------------------------------------------------------------------------------------------------

    def prepare_linear(self, weight: Weight | list[Weight], bias: Dense | None) -> Linear:
        return self._linears.make(weight, bias)

    def prepare_head(self, weight: Weight) -> Linear:
        return self._linears.make(weight, None, float32_out=True)

    def prepare_embedding(self, weight: Weight) -> torch.Tensor:
        return self._linears.upload([to_dense(weight)])

    def prepare_tied(self, weight: Weight) -> tuple[torch.Tensor, Linear]:
        table = self.prepare_embedding(weight)
        return table, self._linears.of_table(table)

    def prepare_norm(self, weight: Dense) -> torch.Tensor:
        return weight.to(self._device.torch_device, torch.float32, copy=True)

    def prepare_rope(self, cos: np.ndarray, sin: np.ndarray) -> Rope:
        return Rope(*(torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(self._device.torch_device, copy=True) for x in (cos, sin)))

    def finish_loading(self) -> None:
        self._linears.finish(self._config)

    def load_kernels(self, others: Iterable[Variant]) -> None:
        """Compile what the disk cache lacks, in parallel, and load everything, `others` too."""
        self.library.load([*(variant for operation in self._operations() for variant in operation.variants), *others])

    def _operations(self) -> list[Any]:
        fixed: list[Any] = [self._embed, self._take, self._updates, self._rms_norm, self._add_rms_norm, self._silu_mul, self._rope_store]
        if self._summed_norm is not None:
            fixed.append(self._summed_norm)
        return [*fixed, *self._portable.values(), *self._decode.values(), *self._prefill.values(), self._linears]

    def warm_up(self) -> None:
        """What is not a kernel of ours and takes its time at first."""
        self._whole.warm_up(self._buffers.get("qkv", self._rows))

    def make_kv(self, layout: KVLayout, num_blocks: int) -> list[torch.Tensor]:
        """One view a layer, with num_blocks + 1 blocks; the last one is for padding rows."""
        kind = torch.uint8 if layout.quant_policy else self._dtype
        return list(torch.empty(layout.shape(num_blocks + 1), dtype=kind, device=self._device.torch_device))

    def attach(self, state: State) -> None:
        self._state = state

    def bind(self, decoder: Any) -> None:
        """8-bit products of gate and up that go straight into down's bytes. Decode steps are captured as graphs by the runner."""
        for layer in decoder.layers:
            self._linears.fuse(layer.gate_up.weight, layer.down.weight)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def tiles(self, plan: StepPlan, num_decode: int) -> Tiles:
        """How the prompt parts of a plan, its rows `num_decode` and on, are cut for attention."""
        if not self._prefill:
            return Tiles()
        first, parts, whole = num_decode, [], []
        for slot, start, count in zip(plan.slots[num_decode:], plan.starts[num_decode:], plan.counts[num_decode:], strict=True):
            if length := 0 if start else self._whole.length(first, count):
                whole.append((first, count, length))
            else:
                parts.append((slot, first, count, start))
            first += count
        pieces = next(iter(self._prefill.values())).tiles(parts)
        return Tiles(pieces, int(pieces[:, TILE_TOKENS].max()) if len(pieces) else 0, tuple(whole))

    def most_tiles(self, tokens: int, rows: int) -> int:
        return next(iter(self._prefill.values())).most_tiles(tokens, rows) if self._prefill else 0

    def begin(self, batch: Step) -> Step:
        self._only_decode = batch.num_decode == batch.num_tokens
        self._updates(self._state.tables, batch.updates)
        if batch.num_decode:
            for decode in self._decode.values():
                decode.schedule(batch.contexts, batch.row_slots, batch.num_decode)
        return batch

    def run_layers(self, x: Array, step: Step) -> None:
        return None

    def embed(self, table: torch.Tensor, step: Step) -> Array:
        out = self._buffers.get("residual", step.num_tokens).view(torch.float32)
        self._embed(table, self._state.ids, step.token_slots, step.positions, out)
        return out

    def rms_norm(self, x: Array, weight: torch.Tensor, eps: float) -> Array:
        out = self._buffers.get("normed", len(x))
        self._rms_norm(x, weight, out, eps)
        return out

    def add_rms_norm(self, x: Array, residual: Array, weight: torch.Tensor, eps: float) -> tuple[Array, Array]:
        out = self._buffers.get("normed", len(residual))
        if isinstance(x, Unsummed):
            assert self._summed_norm is not None
            self._summed_norm(x.x, residual, weight, out, eps)
        else:
            self._add_rms_norm(x, residual, weight, out, eps)
        return out, residual

    def linear(self, x: Array, weight: Linear) -> Array:
        """The output, or its parts, float32 [S, T, N], for the operation that reads it: one of the three below, not NCCL."""
        out = self._buffers.get(self._out[weight.n], len(x))
        return self._linears(x, weight, out, whole=weight.n == self._spec.hidden_size and self._by_nccl(len(x)))

    def _by_nccl(self, rows: int) -> bool:
        """Whether what has the width of the residual stream is summed over ranks by itself."""
        return self._reduced and (self._summed_norm is None or not self._summed_norm.takes_rows(rows))

    def logits(self, x: Array, weight: Linear) -> Array:
        out = self._logits.view(-1)[: len(x) * weight.n].view(len(x), weight.n)
        self._linears.float32(x, weight, out)
        return out

    def rope_store(
        self, qkv: Array, step: Step, kv: torch.Tensor, rope: Rope, q_norm: Any, k_norm: Any, spec: ModelSpec, key_frame: Any = None
    ) -> Array:
        parts = qkv if qkv.ndim == 3 else None
        if parts is not None:
            qkv = self._buffers.get("qkv", qkv.shape[1])
        self._rope_store(
            qkv, kv, step.token_slots, step.positions, self._state.tables, rope.cos, rope.sin, q_norm, k_norm, spec.rms_norm_eps, parts,
            key_frame,
        )  # fmt: skip
        return qkv  # q lies in front, rotated

    def attention(self, q: Array, step: Step, kv: torch.Tensor, window: int) -> Array:
        out = self._buffers.get("attended", len(q))
        tables = self._state.tables
        if self._portable:
            self._portable[window](q, kv, tables, step.token_slots, step.positions, out)
            return out
        if step.num_decode:
            self._decode[window](q, kv, tables, out)
        if len(step.tiles):
            self._prefill[window](q, kv, tables, step.tiles, step.max_tile, out)
        if step.whole:
            return self._whole(self._buffers.get("qkv", self._rows), step.whole, out)
        return out

    def silu_mul(self, gate_up: Array) -> Array:
        if isinstance(gate_up, Gated):
            return gate_up
        out = self._buffers.get("gated", gate_up.shape[-2])
        self._silu_mul(gate_up, out)
        return out

    def take(self, x: Array, indices: torch.Tensor) -> Array:
        if self._only_decode:  # every token is sampled, in order
            return x
        out = self._taken[: len(indices)]
        self._take(x, indices, out)
        return out

    def to_numpy(self, logits: Array) -> np.ndarray:
        return logits.cpu().numpy()

    def close(self) -> None:
        self._device.synchronize()
