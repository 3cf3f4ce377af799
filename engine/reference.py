"""Every operation in plain numpy, float32, slow and obvious: the page that says what each kernel must compute.

It is also a complete backend (`device = "reference"`), on which a whole model runs. Kernels are compared with these
functions and never with each other. Shapes are those of `engine/backend.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import awq, eight_bit, kv_quant, w4, w8
from engine.backend import Dense, Weight
from engine.batch import Batch
from engine.cache.layout import KVLayout
from engine.models.spec import ModelSpec


def dense(weight: Weight) -> np.ndarray:
    """float32 values of a weight in any of its forms."""
    if isinstance(weight, awq.AWQ):
        weight = awq.to_w4(weight)
    if isinstance(weight, w4.W4):
        return w4.dequantize(weight)
    if isinstance(weight, w8.W8):
        return w8.dequantize(weight)
    if isinstance(weight, eight_bit.Int8 | eight_bit.Float8):
        return eight_bit.dequantize(weight)
    return weight.to(torch.float32).numpy()


def embed(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return table[ids]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * weight


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [T, K], weight [N, K] -> [T, N]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up of [T, gate | up] (Shazeer 2020, SwiGLU)."""
    gate, up = np.split(gate_up, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [T, heads, head_dim] with cos, sin [T, rotary_dim / 2]: dimension i pairs with i + rotary_dim / 2."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def logn_scale(positions: np.ndarray, trained_length: int) -> np.ndarray:
    """log(position + 1) / log(trained_length) beyond the trained length, else 1 (Su 2021; Qwen-1)."""
    n = positions.astype(np.float32) + 1
    return np.where(n > trained_length, np.log(n) / np.log(np.float32(trained_length)), np.float32(1))


def split_qkv(qkv: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, (heads + 2 kv_heads) * head_dim] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
    x = qkv.reshape(len(qkv), heads + 2 * kv_heads, head_dim)
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


def store_kv(pool: np.ndarray, kv_slots: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """pool [num_blocks, 2, kv_heads, block_seq_len, head_dim]; k, v [T, kv_heads, head_dim] go to their slots."""
    block, offset = np.divmod(kv_slots, pool.shape[3])
    pool[block, 0, :, offset] = k
    pool[block, 1, :, offset] = v


def store_kv_quantized(layer: np.ndarray, layout: KVLayout, kv_slots: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """The same into one layer of a quantized pool, uint8 [num_blocks, bytes]."""
    codes, pairs = kv_quant.parts(layer, layout)
    block, offset = np.divmod(kv_slots, layout.block_seq_len)
    for kind, x in enumerate((k, v)):
        new, pairs[block, kind, :, offset] = kv_quant.quantize(x, layout.quant_policy)
        codes[block, kind, :, offset] = kv_quant.pack(new, layout.quant_policy)


def gather_kv(pool: np.ndarray, table: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V [context, kv_heads, head_dim] of one sequence, through its block table."""
    positions = np.arange(context)
    block, offset = table[positions // pool.shape[3]], positions % pool.shape[3]
    return pool[block, 0, :, offset], pool[block, 1, :, offset]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, window: int) -> np.ndarray:
    """q [n, heads, head_dim] at `positions` over k, v [context, kv_heads, head_dim] -> [n, heads, head_dim].

    Causal; the last `window` positions where window > 0; heads // kv_heads query heads share a KV head (Ainslie et
    al. 2023, GQA).
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(q.shape[-1] ** -0.5)
    keys = np.arange(len(k))
    visible = keys[None] <= positions[:, None]
    if window:
        visible &= keys[None] > positions[:, None] - window
    scores = np.where(visible[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: np.ndarray
    bias: np.ndarray | None


class ReferenceBackend:
    """The protocol of `engine/backend.py` over the functions above; arrays are numpy float32."""

    name = "reference"
    stacks = False
    _layout: KVLayout  # of the pool that make_kv made

    def prepare_linear(self, weight: Weight, bias: Dense | None) -> _Linear:
        return _Linear(dense(weight), None if bias is None else dense(bias))

    def prepare_head(self, weight: Weight) -> _Linear:
        return self.prepare_linear(weight, None)

    def prepare_embedding(self, weight: Weight) -> np.ndarray:
        return dense(weight)

    def prepare_tied(self, weight: Weight) -> tuple[np.ndarray, _Linear]:
        table = dense(weight)
        return table, _Linear(table, None)

    def prepare_norm(self, weight: Dense) -> np.ndarray:
        return dense(weight)

    def prepare_rope(self, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cos, sin

    def make_kv(self, layout: KVLayout, num_blocks: int) -> np.ndarray:
        self._layout = layout
        if layout.quant_policy:
            return np.full(layout.shape(num_blocks), 255, np.uint8)  # every scale and zero a NaN
        return np.full(layout.shape(num_blocks), np.nan, np.float32)

    def begin(self, batch: Batch) -> Batch:
        return batch

    def embed(self, table: np.ndarray, step: Batch) -> np.ndarray:
        return embed(table, step.ids)

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
        total = x + residual
        return rms_norm(total, weight, eps), total

    def linear(self, x: np.ndarray, weight: _Linear) -> np.ndarray:
        return linear(x, weight.weight, weight.bias)

    def logits(self, x: np.ndarray, weight: _Linear) -> np.ndarray:
        return linear(x, weight.weight, weight.bias)

    def rope_store(
        self, qkv: np.ndarray, step: Batch, kv: np.ndarray, rope: Any, q_norm: Any, k_norm: Any, spec: ModelSpec, key_frame: Any = None
    ) -> np.ndarray:
        quantized = kv.dtype == np.uint8
        kv_heads = self._layout.num_kv_heads if quantized else kv.shape[2]
        heads = qkv.shape[1] // spec.head_dim - 2 * kv_heads
        q, k, v = split_qkv(qkv, heads, kv_heads, spec.head_dim)
        if q_norm is not None:
            q, k = rms_norm(q, q_norm, spec.rms_norm_eps), rms_norm(k, k_norm, spec.rms_norm_eps)
        cos, sin = rope[0][step.positions], rope[1][step.positions]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if key_frame is not None:
            origin, unit = key_frame.reshape(2, kv_heads, spec.head_dim)
            q, k = q * unit.repeat(heads // kv_heads, axis=0), (k - origin) / unit
        if spec.use_logn_attn:
            q = q * logn_scale(step.positions, spec.max_position)[:, None, None]
        if quantized:
            q, k, v = (kv_quant.rotate(x, self._layout.quant_policy) for x in (q, k, v))
            store_kv_quantized(kv, self._layout, step.kv_slots, k, v)
        else:
            store_kv(kv, step.kv_slots, k, v)
        return q

    def attention(self, q: np.ndarray, step: Batch, kv: np.ndarray, window: int) -> np.ndarray:
        out = np.empty_like(q)
        for row, context in enumerate(step.contexts):
            tokens = slice(step.row_starts[row], step.row_starts[row + 1])
            k, v = self._keys_and_values(kv, step.tables[row], int(context))
            out[tokens] = attend(q[tokens], k, v, step.positions[tokens], window)
        if kv.dtype == np.uint8:
            out = kv_quant.rotate(out, self._layout.quant_policy)
        return out.reshape(len(q), -1)

    def _keys_and_values(self, kv: np.ndarray, table: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
        if kv.dtype != np.uint8:
            return gather_kv(kv, table, context)
        own = table[: -(-context // self._layout.block_seq_len)]
        return gather_kv(kv_quant.values(kv[own], self._layout), np.arange(len(own)), context)

    def silu_mul(self, gate_up: np.ndarray) -> np.ndarray:
        return silu_mul(gate_up)

    def take(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return x[indices]

    def bind(self, decoder: Any) -> None:
        """No fused pass."""

    def run_layers(self, x: np.ndarray, step: Batch) -> np.ndarray | None:
        return None

    def to_numpy(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def close(self) -> None:
        """Nothing was started."""
