"""What a decoder layer is made of, loaded from a checkpoint: tensor parallelism is an argument here and nowhere else.

`split="out"` gives a rank its share of the output channels, `split="in"` its share of the input channels (the
products are then summed over the ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import awq, eight_bit, kv_quant, w4, w8
from engine.backend import Array, Backend, Weight
from engine.eight_bit import Float8, Int8
from engine.models.shard import make_shard
from engine.models.spec import ModelSpec
from engine.packed_ints import Rows
from engine.parallel import Ranks
from engine.weights import Checkpoint


def _channels(heads: slice, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


class Linear:
    """y = x W^T + b over this rank's channels; `split="in"` sums the ranks' parts."""

    def __init__(self, weight: Any, backend: Backend, ranks: Ranks, split: str | None) -> None:
        self.weight = weight
        self._backend = backend
        self._ranks = ranks if split == "in" else None

    def __call__(self, x: Array) -> Array:
        y = self._backend.linear(x, self.weight)
        return y if self._ranks is None else self._ranks.all_reduce(y)


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one decoder layer; norms and q/k norms are backend handles."""

    input_norm: Any
    qkv: Linear
    q_norm: Any  # None without q/k norm
    k_norm: Any
    key_frame: Any  # in which q and k are where K is kept in few bits; None: their own
    o: Linear
    post_norm: Any
    gate_up: Linear
    down: Linear
    window: int


class LayerLoader:
    """Reads layers of one checkpoint for one rank. `exact`: every weight dense, for float32 computing; `turned_by`: the tables of
    rope, where K is kept in few bits."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        backend: Backend,
        ranks: Ranks,
        *,
        exact: bool,
        turned_by: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._backend = backend
        self._ranks = ranks
        self._exact = exact
        self._turned_by = turned_by
        self.shard = make_shard(spec, ranks.rank, ranks.size)

    def layer(self, index: int) -> Layer:
        spec, shard = self._spec, self.shard
        base = f"layers.{index}"
        q, kv = _channels(shard.heads, spec.head_dim), _channels(shard.kv_heads, spec.head_dim)
        # down's input channels in the order in which they were quantized: gate and up bring them so, at no cost
        order = self._checkpoint.order(f"{base}.down")
        inner = shard.intermediate if order is None else order[shard.intermediate]
        return Layer(
            input_norm=self.norm(f"{base}.input_norm"),
            qkv=self._out([(f"{base}.q", q), (f"{base}.k", kv), (f"{base}.v", kv)], spec.qkv_bias),
            q_norm=self.norm(f"{base}.q_norm") if spec.qk_norm else None,
            k_norm=self.norm(f"{base}.k_norm") if spec.qk_norm else None,
            key_frame=self._key_frame(base, q, kv),
            o=self._in(f"{base}.o", q, spec.o_bias),
            post_norm=self.norm(f"{base}.post_norm"),
            gate_up=self._out([(f"{base}.gate", inner), (f"{base}.up", inner)], spec.mlp_bias),
            down=self._in(f"{base}.down", shard.intermediate, spec.mlp_bias, in_order=order is not None),
            window=spec.window(index),
        )

    def norm(self, name: str) -> Any:
        return self._backend.prepare_norm(self._checkpoint.weight(name, dense=True))

    def _key_frame(self, base: str, q: slice, kv: slice) -> Any:
        """None where keys are stored as they are: K has no bias, or it is normed, and then the bias says little of it.

        An origin is lost in a plain softmax only: a family with sinks or soft caps (spec.py refuses both) must have none."""
        spec = self._spec
        if self._turned_by is None or not spec.qkv_bias or spec.qk_norm:
            return None
        k_bias, q_bias = (
            self._checkpoint.bias(f"{base}.{name}", rows=rows).to(torch.float32).numpy().reshape(-1, spec.head_dim)
            for name, rows in (("k", kv), ("q", q))
        )
        frame = kv_quant.frame_of_keys(k_bias, q_bias, *self._turned_by)
        return self._backend.prepare_norm(torch.from_numpy(frame.reshape(-1)))

    def embedding_and_head(self) -> tuple[Any, Linear]:
        """The token table (whole on every rank) and the output head (cut by vocabulary)."""
        table = self._checkpoint.weight("embed", dense=self._exact)
        vocab = self.shard.vocab
        if self._spec.tie_word_embeddings and self._ranks.size == 1:
            embedding, head = self._backend.prepare_tied(table)
        else:
            embedding = self._backend.prepare_embedding(table)
            head_name = "embed" if self._spec.tie_word_embeddings else "lm_head"
            head = self._backend.prepare_head(self._checkpoint.weight(head_name, rows=vocab, dense=self._exact))
        return embedding, Linear(head, self._backend, self._ranks, "out")

    def _out(self, parts: list[tuple[str, Rows]], bias: bool) -> Linear:
        """Several weights that read the same input, as one: their output channels one after the other."""
        weights = [self._checkpoint.weight(name, rows=rows, dense=self._exact) for name, rows in parts]
        weight = weights if self._backend.stacks else stack(weights)
        biases = [self._checkpoint.bias(name, rows=rows) for name, rows in parts] if bias else []
        return Linear(self._backend.prepare_linear(weight, torch.cat(biases) if bias else None), self._backend, self._ranks, "out")

    def _in(self, name: str, columns: slice, bias: bool, *, in_order: bool = False) -> Linear:
        weight = self._checkpoint.weight(name, columns=columns, dense=self._exact, in_order=in_order)
        # the ranks' products are summed: the bias must come in once
        vector = self._checkpoint.bias(name) if bias else None
        if self._ranks.rank != 0:
            vector = None
        return Linear(self._backend.prepare_linear(weight, vector), self._backend, self._ranks, "in")


def stack(parts: list[Weight]) -> Weight:
    """Weights with the same input, one under the other. Mixed forms (a Q4_K q beside a Q6_K v) become dense."""
    if all(isinstance(p, w4.W4) for p in parts) and w4.same_columns(parts):
        return w4.concat_rows(parts)
    if all(isinstance(p, w8.W8) for p in parts):
        return w8.concat_rows(parts)
    if all(isinstance(p, awq.AWQ) for p in parts):  # one checkpoint has one group size
        return awq.concat_rows(parts)
    if all(isinstance(p, Int8) for p in parts):
        return eight_bit.concat_int8(parts)
    if all(isinstance(p, Float8) for p in parts) and len({p.scale.shape[1] for p in parts}) == 1:
        return eight_bit.concat_float8(parts)
    tensors = [to_dense(p) for p in parts]
    widest = max((t.dtype for t in tensors), key=lambda d: (d.itemsize, d == torch.bfloat16))
    return torch.cat([t.to(widest) for t in tensors])


def to_dense(weight: Weight) -> torch.Tensor:
    """A 16/32-bit tensor; group-quantized weights become float16, as a 16-bit checkpoint would hold them."""
    if isinstance(weight, awq.AWQ):
        weight = awq.to_w4(weight)
    if isinstance(weight, w4.W4):
        return torch.from_numpy(w4.dequantize(weight)).to(torch.float16)
    if isinstance(weight, w8.W8):
        return torch.from_numpy(w8.dequantize(weight)).to(torch.float16)
    if isinstance(weight, Int8 | Float8):
        return torch.from_numpy(eight_bit.dequantize(weight)).to(torch.float16)
    return weight
