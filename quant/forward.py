"""The float32 pass over one decoder layer that calibration watches: torch on one device, whole sequences, no KV blocks.

`TorchBackend` has the operations of `engine/backend.py` that a layer needs, so layers come from the engine's own
`LayerLoader` and mean what the decoder means by them. What linears read can be watched. Knows no quantization.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.models.layers import Layer, LayerLoader, to_dense
from engine.models.rope import rope_tables
from engine.models.spec import ModelSpec
from engine.parallel import Ranks
from engine.reference import logn_scale
from engine.weights import Checkpoint

SITES = ("qkv", "o", "gate_up", "down")  # the four inputs of a layer's linears

Watch = Callable[[str, torch.Tensor], None]  # site (or "k", "v"), [T, features]


@dataclass(slots=True, eq=False)
class Product:
    """A linear: weight float32 [N, K] and bias [N]. `site` is told to whoever watches its inputs."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    site: str = ""


@dataclass(slots=True, eq=False)
class Step:
    """`batch` sequences of `length` positions each, as T = batch * length rows."""

    batch: int
    length: int


@dataclass(slots=True, eq=False)
class FloatLayer:
    """One layer's parameters, float32 on the computing device, under their canonical names. Linears that read one input are
    rows of one tensor: `linears["q"]` is a view of the stack."""

    index: int
    layer: Layer
    linears: dict[str, torch.Tensor]  # q, k, v, o, gate, up, down: [N, K]
    stacks: dict[str, torch.Tensor]  # by site
    biases: dict[str, torch.Tensor]  # of the linears that have one
    norms: dict[str, torch.Tensor]  # input_norm, post_norm and, where there are such, q_norm, k_norm


@dataclass(slots=True, eq=False)
class TorchBackend:
    """float32 on `device`. A thread's own `watch` is called with what each linear reads, and with rotated keys and values."""

    device: torch.device
    stacks: bool = field(default=False, init=False)
    _local: threading.local = field(default_factory=threading.local, init=False)

    @property
    def watch(self) -> Watch | None:
        return getattr(self._local, "watch", None)

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self._local.watch = watch

    def prepare_linear(self, weight: Any, bias: torch.Tensor | None) -> Product:
        return Product(self.prepare_norm(to_dense(weight)), None if bias is None else self.prepare_norm(bias))

    def prepare_norm(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, torch.float32)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def linear(self, x: torch.Tensor, weight: Product) -> torch.Tensor:
        if (watch := self.watch) is not None:
            watch(weight.site, x)
        return F.linear(x, weight.weight, weight.bias)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope_store(
        self, qkv: torch.Tensor, step: Step, kv: list[torch.Tensor], rope: Any, q_norm: Any, k_norm: Any, spec: ModelSpec
    ) -> Any:
        """q [T, heads, head_dim]; keys and values [T, kv_heads, head_dim] are put into the list `kv`."""
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        x = qkv.view(len(qkv), heads + 2 * kv_heads, spec.head_dim)
        q, k, v = x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]
        if q_norm is not None:
            q, k = self.rms_norm(q, q_norm, spec.rms_norm_eps), self.rms_norm(k, k_norm, spec.rms_norm_eps)
        cos, sin = (table[: step.length].repeat(step.batch, 1)[:, None] for table in rope)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if spec.use_logn_attn:
            scale = logn_scale(np.arange(step.length), spec.max_position).astype(np.float32)
            q = q * torch.from_numpy(scale).to(self.device).repeat(step.batch)[:, None, None]
        kv[:] = [k, v]
        if (watch := self.watch) is not None:
            watch("k", k)
            watch("v", v)
        return q

    def attention(self, q: torch.Tensor, step: Step, kv: list[torch.Tensor], window: int) -> torch.Tensor:
        """Causal; [T, heads * head_dim]."""
        q, k, v = (x.reshape(step.batch, step.length, *x.shape[1:]).transpose(1, 2) for x in (q, *kv))
        mask = None
        if window and window < step.length:
            positions = torch.arange(step.length, device=self.device)
            mask = (positions[None] <= positions[:, None]) & (positions[None] > positions[:, None] - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).reshape(step.batch * step.length, -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rows_of(spec: ModelSpec, site: str) -> dict[str, int]:
    """Output channels of each linear that reads the input `site`, in the order in which they are stacked."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    sizes = {"qkv": {"q": q, "k": kv, "v": kv}, "o": {"o": spec.hidden_size}, "down": {"down": spec.hidden_size}}
    return sizes.get(site) or {"gate": spec.intermediate_size, "up": spec.intermediate_size}


class Float32Model:
    """A checkpoint's layers one at a time."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device, seqlen: int) -> None:
        self.spec = spec
        self.backend = TorchBackend(device)
        self._checkpoint = checkpoint
        ranks = Ranks(0, 1)
        self._loader = LayerLoader(checkpoint, spec, self.backend, ranks, exact=True)  # type: ignore[arg-type]
        self.rope = tuple(torch.from_numpy(table).to(device) for table in rope_tables(spec, seqlen))

    def embed(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """float32 [seqlen, hidden] of each sequence; the table is held meanwhile."""
        table = to_dense(self._checkpoint.weight("embed", dense=True))
        for row in ids:
            yield table[torch.from_numpy(row.astype(np.int64))].to(torch.float32).numpy()

    def load(self, index: int) -> FloatLayer:
        layer = self._loader.layer(index)
        out = FloatLayer(index, layer, {}, {}, {}, {"input_norm": layer.input_norm, "post_norm": layer.post_norm})
        for site, linear in zip(SITES, (layer.qkv, layer.o, layer.gate_up, layer.down), strict=True):
            product: Product = linear.weight
            product.site = site
            out.stacks[site] = product.weight
            sizes = rows_of(self.spec, site)
            out.linears |= dict(zip(sizes, product.weight.split(list(sizes.values())), strict=True))
            if product.bias is not None:
                out.biases |= dict(zip(sizes, product.bias.split(list(sizes.values())), strict=True))
        if layer.q_norm is not None:
            out.norms |= {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        return out

    def run(self, float_layer: FloatLayer, x: torch.Tensor, watch: Watch | None = None) -> torch.Tensor:
        """Hidden states [batch, length, hidden] after the layer: the decoder's equations, residuals added at once."""
        backend, layer, eps = self.backend, float_layer.layer, self.spec.rms_norm_eps
        backend.watch = watch
        step = Step(*x.shape[:2])
        flat = x.reshape(-1, x.shape[2])
        kv: list[torch.Tensor] = []
        qkv = layer.qkv(backend.rms_norm(flat, layer.input_norm, eps))
        q = backend.rope_store(qkv, step, kv, self.rope, layer.q_norm, layer.k_norm, self.spec)
        flat = flat + layer.o(backend.attention(q, step, kv, layer.window))
        flat = flat + layer.down(backend.silu_mul(layer.gate_up(backend.rms_norm(flat, layer.post_norm, eps))))
        return flat.view(x.shape)
