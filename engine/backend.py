"""The `Backend` protocol: the operations a model is made of, done by `reference.py`, `cpu/` and `cuda/`.

What each must compute is the function of the same name in `engine/reference.py`. `Array` is whatever the backend
computes with (numpy for reference, torch tensors for cpu and cuda); the decoder only passes it on. Activations are
[T, features] for the T tokens of a step. Handles returned by `prepare_*` are opaque and belong to one backend.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from engine.awq import AWQ
from engine.batch import Batch
from engine.cache.layout import KVLayout
from engine.eight_bit import Float8, Int8
from engine.models.spec import ModelSpec
from engine.w4 import W4
from engine.w8 import W8

Array = Any
Dense = torch.Tensor  # float32, float16 or bfloat16, on the CPU as read from the file
Weight = Dense | W4 | W8 | AWQ | Int8 | Float8


class Backend(Protocol):
    name: str
    stacks: bool  # whether `prepare_linear` takes a list of weights with one input, to be stacked where they are repacked

    def prepare_linear(self, weight: Any, bias: Dense | None) -> Any:  # a Weight; a list of them too where `stacks`
        """Repack a weight [N, K] (+ bias [N]) once, at load, into what `linear` reads."""

    def prepare_head(self, weight: Weight) -> Any:
        """The same for the output head [vocab, hidden], which `logits` reads."""

    def prepare_embedding(self, weight: Weight) -> Any:
        """A table [vocab, hidden] for `embed`; a tied one is passed to `prepare_tied` instead."""

    def prepare_tied(self, weight: Weight) -> tuple[Any, Any]:
        """(embedding handle, linear handle) over one copy of the table."""

    def prepare_norm(self, weight: Dense) -> Any:
        """A vector that is read in float32: an RMSNorm weight [features], a frame of keys [2 * kv_heads * head_dim]."""

    def prepare_rope(self, cos: np.ndarray, sin: np.ndarray) -> Any:
        """float32 [max_position, rotary_dim / 2] tables for `rope_store`."""

    def make_kv(self, layout: KVLayout, num_blocks: int) -> Any:
        """Allocate the KV pool; `pool[layer]` is what `rope_store` and `attention` get. Contents undefined."""

    def begin(self, batch: Batch) -> Any:
        """What the operations below need of a step, put where they read it; once a step."""

    def embed(self, table: Any, step: Any) -> Array:
        """[T, hidden] in the computing dtype."""

    def rms_norm(self, x: Array, weight: Any, eps: float) -> Array:
        """Over the last axis, computed in float32."""

    def add_rms_norm(self, x: Array, residual: Array, weight: Any, eps: float) -> tuple[Array, Array]:
        """(rms_norm(x + residual), x + residual); may work in place."""

    def linear(self, x: Array, weight: Any) -> Array:
        """x [T, K] -> [T, N] in the computing dtype: x @ w.T + bias, accumulated in float32."""

    def logits(self, x: Array, weight: Any) -> Array:
        """Like `linear`, float32 out."""

    def rope_store(
        self, qkv: Array, step: Any, kv: Any, rope: Any, q_norm: Any, k_norm: Any, spec: ModelSpec, key_frame: Any = None
    ) -> Array:
        """qkv [T, (heads + 2 kv_heads) * head_dim] -> q [T, heads, head_dim], normed (where there is a norm), rotated
        (and scaled by log_n where the spec says so); k, likewise, and v are written to their KV slots. q and k are in the frame
        `key_frame`, if there is one (engine/kv_quant.py)."""

    def attention(self, q: Array, step: Any, kv: Any, window: int) -> Array:
        """Causal paged attention, scale head_dim ** -0.5: q [T, heads, head_dim] -> [T, heads * head_dim]. Every row
        attends to its own positions 0 .. own (the last `window` of them where window > 0)."""

    def silu_mul(self, gate_up: Array) -> Array:
        """[T, 2 I] -> silu(first half) * second half, [T, I]."""

    def take(self, x: Array, indices: np.ndarray) -> Array:
        """Rows of x."""

    def bind(self, decoder: Any) -> None:
        """Called once after loading: prepare a fused pass over the decoder's layers where the backend has one."""

    def run_layers(self, x: Array, step: Any) -> Array | None:
        """All layers in one call: hidden states [T, hidden] after the last layer and final norm; None: use the
        operations one by one (a step this backend has no fused pass for)."""

    def to_numpy(self, logits: Array) -> np.ndarray:
        """float32 [S, vocab] on the host."""

    def close(self) -> None:
        """End the threads it started."""
