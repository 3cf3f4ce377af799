"""The one decoder, top to bottom like the paper (Vaswani et al. 2017; Touvron et al. 2023): families differ by data.

Knows no backend and no family by name. Shapes: T tokens of a step, S of them sampled.
"""

from __future__ import annotations

from typing import Any

from engine.backend import Array, Backend
from engine.models.layers import Layer, LayerLoader
from engine.models.rope import rope_tables
from engine.models.spec import ModelSpec
from engine.parallel import Ranks
from engine.weights import Checkpoint


class Decoder:
    """This rank's part of a model, ready to run on `backend`; `few_bits`: over a quantized KV pool."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        backend: Backend,
        ranks: Ranks,
        *,
        session_len: int,
        exact: bool,
        few_bits: bool = False,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self._ranks = ranks
        tables = rope_tables(spec, session_len)
        loader = LayerLoader(checkpoint, spec, backend, ranks, exact=exact, turned_by=tables if few_bits else None)
        self.shard = loader.shard
        self.embedding, self.head = loader.embedding_and_head()
        self.layers: list[Layer] = [loader.layer(i) for i in range(spec.num_layers)]
        self.final_norm = loader.norm("final_norm")
        self.rope = backend.prepare_rope(*tables)
        if ranks.size == 1:
            backend.bind(self)

    def forward(self, batch: Any, kv: Any) -> Array | None:
        """Logits float32 [S, vocab] of the sampled rows, where the backend has its arrays (None: no row is sampled); K/V of
        all tokens is written. `batch` is what the backend's `begin` takes."""
        backend = self.backend
        step = backend.begin(batch)
        x = backend.embed(self.embedding, step)  # [T, hidden]
        hidden = backend.run_layers(x, step) if self._ranks.size == 1 else None
        if hidden is None:
            hidden = self._layers(x, step, kv)
        if not len(batch.sampled):
            return None
        logits = backend.logits(backend.take(hidden, batch.sampled), self.head.weight)  # [S, vocab share]
        return self._ranks.gather_columns(logits, self.spec.vocab_size)

    def _layers(self, x: Array, step: Any, kv: Any) -> Array:
        """Hidden states [T, hidden] after all layers and the final norm."""
        backend, eps = self.backend, self.spec.rms_norm_eps
        residual = x
        for index, layer in enumerate(self.layers):
            if index == 0:
                h = backend.rms_norm(x, layer.input_norm, eps)
            else:
                h, residual = backend.add_rms_norm(x, residual, layer.input_norm, eps)
            h, residual = backend.add_rms_norm(self._attention(h, step, kv[index], layer), residual, layer.post_norm, eps)
            x = layer.down(backend.silu_mul(layer.gate_up(h)))
        hidden, _ = backend.add_rms_norm(x, residual, self.final_norm, eps)
        return hidden

    def _attention(self, h: Array, step: Any, kv: Any, layer: Layer) -> Array:
        backend = self.backend
        q = backend.rope_store(layer.qkv(h), step, kv, self.rope, layer.q_norm, layer.k_norm, self.spec, layer.key_frame)
        return layer.o(backend.attention(q, step, kv, layer.window))
