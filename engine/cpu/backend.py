"""`CpuBackend`: the protocol of engine/backend.py over the pool's jobs (program.py). Arrays are numpy float32.

Activations between operations stay float32; the input of a product is rounded to bfloat16 (computing dtype "bfloat16") or
not at all ("float32", the exact mode: every weight dense float32). A step's buffers are made once and grow with the largest
step. One pass over all layers is one job (`run_layers`) for every step size; the single operations serve tensor-parallel
ranks and shapes that the pass does not take. Knows no layer of a particular family and no order of operations.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import awq, eight_bit, w4, w8
from engine.backend import Dense, Weight
from engine.batch import Batch
from engine.cache.layout import KVLayout
from engine.cpu import matmul, program
from engine.cpu.kv_quant import rows_bytes, take_rows_function
from engine.cpu.matmul import CHUNK, Packed
from engine.cpu.paged_attention import SPLIT, split_function, split_scratch_bytes
from engine.cpu.prefill_attention import piece_function, scratch_bytes, tokens_of_piece
from engine.cpu.program import L, P
from engine.cpu.target import FEATURES
from engine.cpu.threads import Pool, aligned
from engine.cpu.vector import compiled
from engine.errors import ConfigError
from engine.kv_quant import rotated
from engine.models.layers import to_dense
from engine.models.spec import ModelSpec

Array = np.ndarray
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A packed weight and the eight words by which a job names it."""

    packed: Packed
    words: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    cos: np.ndarray
    sin: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A batch and what attention needs of it; `held` keeps alive what a job addresses."""

    batch: Batch
    splits: np.ndarray  # int32 [splits, 4]: token, row, first position, stop
    pieces: np.ndarray  # int32 [pieces, 4]: row, first token, tokens, position of the first
    token_splits: np.ndarray  # int32 [T, 2]: first split, number of splits
    ids: np.ndarray
    positions: np.ndarray
    kv_slots: np.ndarray
    tables: np.ndarray


class Pass:
    """What `run_layers` addresses of a bound decoder."""

    def __init__(self, backend: CpuBackend, decoder: Any) -> None:
        self.table = aligned(len(decoder.layers) * L.COUNT, np.int64).reshape(-1, L.COUNT)
        self.final_norm = decoder.final_norm
        self.rope: Rope = decoder.rope
        self.held = decoder.layers
        # where down takes bytes, rows are float32 until they are quantized
        self.wide_h = any(linear.weight.packed.kind in (matmul.D32, matmul.I8) for linear in (layer.down for layer in decoder.layers))
        for row, layer in zip(self.table, decoder.layers, strict=True):
            row[L.INPUT_NORM], row[L.POST_NORM] = _address(layer.input_norm), _address(layer.post_norm)
            row[L.Q_NORM] = 0 if layer.q_norm is None else _address(layer.q_norm)
            row[L.K_NORM] = 0 if layer.k_norm is None else _address(layer.k_norm)
            row[L.KEY_FRAME] = 0 if layer.key_frame is None else _address(layer.key_frame)
            row[L.WINDOW] = layer.window
            for place, linear in ((L.QKV, layer.qkv), (L.O, layer.o), (L.GATE_UP, layer.gate_up), (L.DOWN, layer.down)):
                row[place : place + 8] = linear.weight.words


class Buffers:
    """Named float32 or byte buffers that grow and are never given back."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def get(self, name: str, nbytes: int) -> int:
        """Address of at least `nbytes` on a cache line; contents undefined."""
        held = self._held.get(name)
        if held is None or held.nbytes < nbytes:
            held = aligned(nbytes, np.uint8)
            self._held[name] = held
        return _address(held)


class CpuBackend:
    """See the module. `dtype`: "float32" or "bfloat16"."""

    name = "cpu"
    stacks = False

    def __init__(self, spec: ModelSpec, dtype: str, num_threads: int) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model.dtype = '{dtype}' is not computed on the CPU; use 'bfloat16' or 'float32'.")
        if not 1 <= num_threads <= MAX_THREADS:
            raise ConfigError(f"engine.num_threads = {num_threads} is not in 1 .. {MAX_THREADS}.")
        self._spec = spec
        self._exact = dtype == "float32"
        self._pool = Pool(num_threads, program.serve, program.STAGES_OF_A_LAYER * spec.num_layers + 4)
        self._buffers = Buffers()
        self._pass: Pass | None = None
        self._kv: np.ndarray | None = None
        self._layout: KVLayout  # of the pool that make_kv made
        self._only_block = aligned(1, np.int32)
        self._only_block[0] = 0

    # -- load -----------------------------------------------------------------------------------------------------

    def prepare_linear(self, weight: Weight, bias: Dense | None) -> Linear:
        vector = None if bias is None else bias.to(torch.float32).numpy()
        packed = self._pack(weight, vector)
        function = matmul.tile_function(packed.kind)
        mode, order = matmul.input_mode(packed.kind), 0 if packed.order is None else _address(packed.order)
        words = (function, _address(packed.data), _address(packed.bias), packed.tiles, packed.chunks, packed.tile_bytes, mode, order)
        return Linear(packed, words)

    def _pack(self, weight: Weight, bias: np.ndarray | None) -> Packed:
        if isinstance(weight, awq.AWQ):
            weight = awq.to_w4(weight)
        if isinstance(weight, eight_bit.Int8):
            if not self._exact and FEATURES.int8_dot and weight.in_features <= matmul.MOST_INT8:
                return matmul.pack_i8(weight.q, weight.scale, bias)
            weight = to_dense(weight)
        if isinstance(weight, eight_bit.Float8):  # no CPU multiplies them
            weight = to_dense(weight)
        if isinstance(weight, w4.W4):
            if not self._exact:
                packed = matmul.pack_w4(weight.qweight, weight.scale, weight.bias, bias)
                return packed if weight.order is None else dataclasses.replace(packed, order=np.ascontiguousarray(weight.order, np.int32))
            return matmul.pack_d32(w4.dequantize(weight), bias)
        if isinstance(weight, w8.W8):
            return matmul.pack_d32(w8.dequantize(weight), bias) if self._exact else matmul.pack_w8(weight.q, weight.scale, bias)
        if self._exact:
            return matmul.pack_d32(weight.to(torch.float32).numpy(), bias)
        return matmul.pack_d16(weight.to(torch.bfloat16).contiguous().view(torch.uint16).numpy(), bias)

    def prepare_head(self, weight: Weight) -> Linear:
        return self.prepare_linear(weight, None)

    def prepare_embedding(self, weight: Weight) -> Linear:
        return self.prepare_linear(weight, None)

    def prepare_tied(self, weight: Weight) -> tuple[Linear, Linear]:
        table = self.prepare_linear(weight, None)
        return table, table

    def prepare_norm(self, weight: Dense) -> np.ndarray:
        return np.array(weight.to(torch.float32).numpy())

    def prepare_rope(self, cos: np.ndarray, sin: np.ndarray) -> Rope:
        return Rope(np.ascontiguousarray(cos, np.float32), np.ascontiguousarray(sin, np.float32))

    def make_kv(self, layout: KVLayout, num_blocks: int) -> np.ndarray:
        """[layers, ...] of float32, of uint16 that hold bfloat16, or bytes of a quantized one. Compiles what no weight has asked for."""
        if layout.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"A KV cache of {layout.dtype} is not computed on the CPU; use 'bfloat16' or 'float32'.")
        kind = np.uint8 if layout.quant_policy else np.float32 if layout.dtype == "float32" else np.uint16
        self._layout, self._kv = layout, np.empty(layout.shape(num_blocks), kind)
        self._warm_up(layout)
        return self._kv

    def _warm_up(self, layout: KVLayout) -> None:
        """Compile, or read from the disk cache, every function a step can need, so that the first step does not wait."""
        exact = layout.dtype == "float32"
        matmul.tile_function(matmul.D32 if exact else matmul.D16)
        piece_function()
        split_function(layout.head_dim, exact)
        if layout.quant_policy:
            take_rows_function()
        for job in program.JOBS:
            compiled(job)

    def bind(self, decoder: Any) -> None:
        spec = decoder.spec
        heads = decoder.layers[0].qkv.weight.packed.out_features // spec.head_dim - 2 * spec.num_kv_heads
        inputs = (spec.hidden_size, heads * spec.head_dim, spec.intermediate_size)
        if all(size % CHUNK == 0 for size in inputs) and spec.head_dim % 16 == 0:
            self._pass = Pass(self, decoder)

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> Step:
        counts = np.diff(batch.row_starts)
        group = self._spec.num_heads // self._spec.num_kv_heads
        # the prompt's way takes heads of any size
        singles = counts == 1 if self._spec.head_dim % 16 == 0 else np.zeros(len(counts), bool)
        token_splits = np.zeros((batch.num_tokens, 2), np.int32)
        rows = np.flatnonzero(singles)
        tokens, contexts = batch.row_starts[rows], batch.contexts[rows]
        numbers = -(-contexts // SPLIT)
        ends = np.cumsum(numbers)
        token_splits[tokens, 0], token_splits[tokens, 1] = ends - numbers, numbers
        total = int(ends[-1]) if len(ends) else 0
        splits = np.empty((total, 4), np.int32)
        splits[:, 0], splits[:, 1] = np.repeat(tokens, numbers), np.repeat(rows, numbers)
        splits[:, 2] = (np.arange(total) - np.repeat(ends - numbers, numbers)) * SPLIT
        splits[:, 3] = np.minimum(splits[:, 2] + SPLIT, np.repeat(contexts, numbers))
        return Step(
            batch, splits, _pieces(batch, np.flatnonzero(~singles & (counts > 0)), tokens_of_piece(group)), token_splits,
            ids=np.ascontiguousarray(batch.ids, np.int32), positions=np.ascontiguousarray(batch.positions, np.int32),
            kv_slots=np.ascontiguousarray(batch.kv_slots, np.int64), tables=np.ascontiguousarray(batch.tables, np.int32),
        )  # fmt: skip

    def run_layers(self, x: Array, step: Step) -> Array | None:
        if self._pass is None or self._kv is None:
            return None
        spec, tokens = self._spec, step.batch.num_tokens
        out = np.empty((tokens, spec.hidden_size), np.float32)
        if not tokens:
            return out
        p = self._step_params(program.layers, step, self._kv, self._kv[0].nbytes, self._pass.rope)
        attended = p[P.HEADS] * spec.head_dim
        element = 4 if self._exact else 2
        residual = np.array(x, np.float32, order="C")
        p[P.TABLE], p[P.NUM_LAYERS] = _address(self._pass.table), len(self._pass.table)
        p[P.FINAL_NORM], p[P.RESIDUAL], p[P.OUT] = _address(self._pass.final_norm), _address(residual), _address(out)
        self._place(p, (P.X, P.X_STRIDE), "x", tokens, element * max(spec.hidden_size, attended))
        self._place(p, (P.SUMS, P.SUMS_STRIDE), "sums", tokens, 4 * max(spec.hidden_size, attended) // CHUNK)
        self._place(p, (P.QKV, P.QKV_STRIDE), "qkv", tokens, 4 * (attended + 2 * p[P.KV_HEADS] * spec.head_dim))
        self._place(p, (P.H, P.H_STRIDE), "h", tokens, (4 if self._pass.wide_h else 2) * spec.intermediate_size)
        self._place(p, (P.H_SUMS, P.H_SUMS_STRIDE), "h_sums", tokens, 4 * spec.intermediate_size // CHUNK)
        p[P.ATTENDED] = self._buffers.get("attended", 4 * tokens * attended)
        self._run(p)
        return out

    def _place(self, p: list[int], places: tuple[int, int], name: str, rows: int, stride: int) -> None:
        p[places[0]], p[places[1]] = self._buffers.get(name, rows * stride), stride

    def _step_params(self, job: Callable[..., None], step: Step, kv: np.ndarray, layer_bytes: int, rope: Rope | None) -> list[int]:
        """kv: the whole pool or one layer of it."""
        spec, p = self._spec, [0] * P.COUNT
        kv_heads, block_len, bits = self._layout.num_kv_heads, self._layout.block_seq_len, self._layout.quant_policy
        group, exact = spec.num_heads // spec.num_kv_heads, self._layout.dtype == "float32"
        heads = kv_heads * group
        p[P.FUNCTION], p[P.TOKENS], p[P.EPS], p[P.EXACT] = (
            compiled(job),
            step.batch.num_tokens,
            _double_bits(spec.rms_norm_eps),
            int(self._exact),
        )
        p[P.HIDDEN], p[P.INTERMEDIATE] = spec.hidden_size, spec.intermediate_size
        p[P.HEADS], p[P.KV_HEADS], p[P.HEAD_DIM] = heads, kv_heads, spec.head_dim
        if rope is not None:
            p[P.COS], p[P.SIN], p[P.HALF] = _address(rope.cos), _address(rope.sin), rope.cos.shape[1]
        p[P.LOGN_LENGTH] = spec.max_position if spec.use_logn_attn else 0
        p[P.POOL], p[P.POOL_LAYER_BYTES], p[P.BLOCK_LEN], p[P.POOL_EXACT] = (
            _address(kv),
            layer_bytes,
            block_len,
            int(exact),
        )
        p[P.POOL_BITS], p[P.ONLY_BLOCK] = bits, _address(self._only_block)
        p[P.TAKE_ROWS] = take_rows_function() if bits else 0
        p[P.ROTATED] = rotated(spec.head_dim, bits)
        p[P.POSITIONS], p[P.SLOTS] = _address(step.positions), _address(step.kv_slots)
        p[P.BLOCK_TABLES], p[P.BLOCK_TABLE_STRIDE] = _address(step.tables), step.tables.strides[0]
        p[P.NUM_SPLITS], p[P.SPLITS] = len(step.splits), _address(step.splits)
        p[P.NUM_PIECES], p[P.PIECES] = len(step.pieces), _address(step.pieces)
        p[P.TOKEN_SPLITS] = _address(step.token_splits)
        p[P.PARTIAL] = self._buffers.get("partial", 4 * len(step.splits) * heads * (spec.head_dim + 2))
        p[P.PIECE_FUNCTION], p[P.SPLIT_FUNCTION] = piece_function(), split_function(spec.head_dim, exact)
        p[P.TILE_FUNCTION] = matmul.tile_function(matmul.D32 if exact else matmul.D16)
        p[P.STAGES] = program.STAGES_OF_A_LAYER * spec.num_layers + 1 if job is program.layers else 2
        p[P.NORM_STAGE], p[P.MERGE] = compiled(program.norm_stage), compiled(program.merge_stage)
        p[P.PRODUCT], p[P.GATE_UP] = compiled(program.product_stage), compiled(program.gate_up_stage)
        p[P.QUANTIZE] = compiled(program.quantize_stage)
        p[P.ROPE_STORE], p[P.ATTEND] = compiled(program.store_stage), compiled(program.attend_stage)
        p[P.ROWS_AT] = self._scratch_bytes(group)
        p[P.SCRATCH_BYTES] = p[P.ROWS_AT] + (rows_bytes(SPLIT, spec.head_dim) if bits else 0)
        p[P.SCRATCH] = self._buffers.get("scratch", p[P.SCRATCH_BYTES] * self._pool.num_threads)
        return p

    def _scratch_bytes(self, group: int) -> int:
        """Of one thread: the largest of the stages that share it, and a page so that threads never share a line."""
        spec = self._spec
        gate_up = (matmul.ROW_BLOCK + 1) * 256
        rows = max(8 * spec.hidden_size, 4 * spec.num_heads * spec.head_dim)  # one, and the same in another order
        largest = max(scratch_bytes(spec.head_dim, group), split_scratch_bytes(spec.head_dim, group), gate_up, rows)
        return (largest + 2 * 4096 - 1) // 4096 * 4096

    def _run(self, p: list[int]) -> None:
        self._pool.run(*p)

    # -- the operations one by one --------------------------------------------------------------------------------

    def embed(self, table: Linear, step: Step) -> Array:
        packed = table.packed
        out = np.empty((len(step.ids), packed.in_features), np.float32)
        self._pool.run(
            compiled(program.embed), 1, len(step.ids), _address(step.ids), _address(out), out.strides[0], packed.in_features, packed.kind,
            _address(packed.data), packed.tile_bytes, packed.data.shape[2],
        )  # fmt: skip
        return out

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float) -> Array:
        x = np.ascontiguousarray(x)
        out = np.empty_like(x)
        rows, count = x.size // x.shape[-1], x.shape[-1]
        self._pool.run(compiled(program.norm), 1, _double_bits(eps), rows, _address(x), _address(weight), _address(out), count)
        return out

    def add_rms_norm(self, x: Array, residual: Array, weight: np.ndarray, eps: float) -> tuple[Array, Array]:
        x, residual = np.ascontiguousarray(x), np.ascontiguousarray(residual)
        out, total = np.empty_like(x), np.empty_like(x)
        self._pool.run(
            compiled(program.add_norm), 1, _double_bits(eps), len(x), _address(x), _address(residual), _address(total), _address(weight),
            _address(out), x.shape[-1],
        )  # fmt: skip
        return out, total

    def linear(self, x: Array, weight: Linear) -> Array:
        packed, rows = weight.packed, len(x)
        if packed.order is not None:
            x = x[:, packed.order]
        width = packed.chunks * CHUNK
        if packed.in_features != width:
            x = np.pad(x, ((0, 0), (0, width - packed.in_features)))
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((rows, packed.tiles * 16), np.float32)
        if rows:
            inputs = self._buffers.get("x", rows * width * 4), width * (4 if self._exact else 2)
            sums = self._buffers.get("sums", rows * packed.chunks * 4), packed.chunks * 4
            self._pool.run(
                compiled(program.linear),
                2,
                rows,
                _address(x),
                x.strides[0],
                *inputs,
                *sums,
                _address(y),
                y.strides[0],
                *weight.words,
            )
        return y if packed.out_features == y.shape[1] else np.ascontiguousarray(y[:, : packed.out_features])

    def logits(self, x: Array, weight: Linear) -> Array:
        return self.linear(x, weight)

    def rope_store(
        self, qkv: Array, step: Step, kv: np.ndarray, rope: Rope, q_norm: Any, k_norm: Any, spec: ModelSpec, key_frame: Any = None
    ) -> Array:
        qkv = np.array(qkv, np.float32, order="C")
        p = self._step_params(program.rope_store, step, kv, 0, rope)
        p[P.QKV], p[P.QKV_STRIDE] = _address(qkv), qkv.strides[0]
        p[P.Q_NORM] = 0 if q_norm is None else _address(q_norm)
        p[P.K_NORM] = 0 if k_norm is None else _address(k_norm)
        p[P.KEY_FRAME] = 0 if key_frame is None else _address(key_frame)
        self._run(p)
        return qkv[:, : p[P.HEADS] * spec.head_dim].reshape(len(qkv), p[P.HEADS], spec.head_dim)

    def attention(self, q: Array, step: Step, kv: np.ndarray, window: int) -> Array:
        q = np.ascontiguousarray(q, np.float32)
        out = np.empty((len(q), q.shape[1] * q.shape[2]), np.float32)
        p = self._step_params(program.attention, step, kv, 0, None)
        p[P.QKV], p[P.QKV_STRIDE], p[P.WINDOW], p[P.ATTENDED] = _address(q), q.strides[0], window, _address(out)
        self._run(p)
        return out

    def silu_mul(self, gate_up: Array) -> Array:
        gate_up = np.ascontiguousarray(gate_up)
        count = gate_up.shape[1] // 2
        out = np.empty((len(gate_up), count), np.float32)
        self._pool.run(compiled(program.silu_mul), 1, len(out), _address(gate_up), gate_up.strides[0], _address(out), out.strides[0], count)
        return out

    def take(self, x: Array, indices: np.ndarray) -> Array:
        return x[indices]

    def to_numpy(self, logits: Array) -> np.ndarray:
        return logits

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def _pieces(batch: Batch, rows: np.ndarray, most: int) -> np.ndarray:
    """Rows of several tokens cut into pieces of at most `most`, those with the longest context first."""
    out = []
    for row in rows.tolist():
        first, stop = int(batch.row_starts[row]), int(batch.row_starts[row + 1])
        position = int(batch.contexts[row]) - (stop - first)
        out += [(row, at, min(most, stop - at), position + at - first) for at in range(first, stop, most)]
    out.sort(key=lambda piece: -(piece[3] + piece[2]) * piece[2])
    return np.array(out, np.int32).reshape(-1, 4)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _double_bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
