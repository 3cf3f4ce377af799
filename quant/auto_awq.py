"""`lite auto_awq`: a model's linears in 4 bits, as AWQ makes them and AWQ's gemm layout holds them (`engine/awq.py`).

For each of a layer's four inputs: find the scales, fold them into what makes that input, clip, round.

    q k v      <- input_norm          gate up  <- post_norm          the norm's weights are divided by s
    o          <- v                   down     <- up                 its rows (and bias) are divided by s

A folded norm is rounded to the copy's own type first, and s is taken from what came of it: nothing is lost on that side.
Query heads that share a KV head read the same channels of v, so they share their scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.awq import PACK
from engine.errors import ConfigError
from engine.models.spec import ModelSpec
from engine.turbomind import pack_awq
from engine.w4 import GROUP_SIZES
from quant.awq_search import Inputs, Scales, clipped, find_scales
from quant.disk import Planned
from quant.forward import SITES, FloatLayer
from quant.groups import Rounded, output_error, round_groups
from quant.job import TORCH_DTYPES, LayerResult
from quant.passes import Wanted
from quant.threads import Pool

FOLDED_INTO = {"qkv": "input_norm", "gate_up": "post_norm", "o": "v", "down": "up"}


@dataclass(slots=True)
class AutoAwq:
    """The method. `search`: try every ratio, else 0.5 only. `dtype`: of the norms that scales are folded into."""

    spec: ModelSpec
    group: int = 128
    symmetric: bool = False
    search: bool = True
    clip: bool = True
    dtype: str = "float16"
    name: str = "awq"
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "bits": 4, "group_size": self.group, "symmetric": self.symmetric, "search_scale": self.search, "clip": self.clip,
        }  # fmt: skip

    def quantization_config(self) -> dict[str, Any]:
        # zero points are always written, as readers differ in what they take for granted where there are none
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": self.group, "zero_point": True,
            "modules_to_not_convert": None,
        }  # fmt: skip

    def planned(self, rows: int, inputs: int) -> dict[str, Planned]:
        check_group(self.group, inputs)
        if rows % PACK:
            raise ConfigError(f"{rows} output channels are no whole int32s of {PACK}; this layout cannot hold them.")
        groups = inputs // self.group
        return {
            "qweight": Planned("I32", (inputs, rows // PACK)),
            "qzeros": Planned("I32", (groups, rows // PACK)),
            "scales": Planned("F16", (groups, rows)),
        }

    def quantize(self, layer: FloatLayer, seen: dict[str, Inputs], samples: dict[str, torch.Tensor], pool: Pool) -> LayerResult:
        scales = {site: self._scales(layer, site, seen, pool) for site in SITES} if seen else {}
        norms, biases = dict(layer.norms), dict(layer.biases)
        divided = {site: torch.ones(len(layer.stacks[site]), device=layer.stacks[site].device) for site in SITES}
        by = {site: fold(layer, norms, biases, divided, self.spec, site, found.values, self.dtype) for site, found in scales.items()}
        stacks: dict[str, Any] = {}
        report: dict[str, dict[str, Any]] = {}
        for site in SITES:
            weight = layer.stacks[site]
            if site not in by:
                stacks[site], report[site] = round_groups(weight, self.group, symmetric=self.symmetric), {}
                continue
            gram = seen[site].gram / by[site][:, None] / by[site]
            weight = weight * by[site]
            stacks[site] = self._rounded(weight, gram, pool)
            report[site] = _report(scales[site], relative_error(stacks[site].values(), weight, gram, divided[site]))
        return LayerResult(stacks, norms, biases, report)

    def pack(self, stack: Rounded, rows: torch.Tensor) -> dict[str, np.ndarray]:
        q, zero, scale = (getattr(stack, name)[rows.to(stack.q.device)].T.contiguous().cpu() for name in ("q", "zero", "scale"))
        return {"qweight": pack_awq(q.numpy()), "qzeros": pack_awq(zero.numpy()), "scales": scale.to(torch.float16).numpy()}

    def replace(self, layer: FloatLayer, result: LayerResult) -> bool:
        return False

    def _scales(self, layer: FloatLayer, site: str, seen: dict[str, Inputs], pool: Pool) -> Scales:
        owner = shared_owner(self.spec, seen[site].mean.device) if site == "o" else None
        weight = layer.stacks[site]
        return find_scales(weight, seen[site], self.group, self.symmetric, search=self.search, owner=owner, pool=pool)

    def _rounded(self, weight: torch.Tensor, gram: torch.Tensor, pool: Pool) -> Rounded:
        if self.clip:
            return clipped(weight, gram, self.group, self.symmetric, pool)
        return round_groups(weight, self.group, symmetric=self.symmetric)


def check_group(group: int, inputs: int) -> None:
    """ConfigError where the layout has no such groups, or they do not divide the input channels."""
    if group not in GROUP_SIZES:
        raise ConfigError(f"--w-group-size {group}: not supported; supported: {', '.join(map(str, GROUP_SIZES))}.")
    if inputs % group:
        fits = [str(size) for size in sorted(GROUP_SIZES, reverse=True) if inputs % size == 0]
        advice = f"use --w-group-size {fits[0]}" if fits else "no group size that is supported does"
        raise ConfigError(f"--w-group-size {group} does not divide its {inputs} input channels; {advice}.")


def shared_owner(spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """int64 [heads * head_dim]: the channel of v that each input channel of o comes from."""
    channel = torch.arange(spec.num_heads * spec.head_dim, device=device)
    head, place = channel // spec.head_dim, channel % spec.head_dim
    return head // (spec.num_heads // spec.num_kv_heads) * spec.head_dim + place


def fold(
    layer: FloatLayer,
    norms: dict[str, torch.Tensor],
    biases: dict[str, torch.Tensor],
    divided: dict[str, torch.Tensor],
    spec: ModelSpec,
    site: str,
    scales: torch.Tensor,
    dtype: str,
) -> torch.Tensor:
    """Divide what makes the input `site` by `scales` [K] (norms and biases by new entries; rows of v and up in place, with what
    they were divided by put into `divided`); the scales that the site's own weights must be multiplied by, [K]."""
    into = FOLDED_INTO[site]
    if into in norms:
        rounded = (norms[into] / scales).to(TORCH_DTYPES[dtype]).to(torch.float32)
        exact = norms[into] / rounded
        norms[into] = rounded
        return torch.where(torch.isfinite(exact) & (exact > 0), exact, scales)
    own = scales
    if site == "o":
        own = torch.empty(spec.num_kv_heads * spec.head_dim, device=scales.device)
        own[shared_owner(spec, scales.device)] = scales
    layer.linears[into].div_(own[:, None])
    divided["qkv" if into == "v" else "gate_up"][-len(own) :] = own  # the last rows of their stacks
    if into in biases:
        biases[into] = biases[into] / own
    return scales


def relative_error(rounded: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, divided: torch.Tensor) -> float:
    """Squared error of the outputs over their squared size, both of rows as they were before they were `divided`."""
    size = float((output_error(weight, gram) * divided.square()).sum())
    return float((output_error(rounded - weight, gram) * divided.square()).sum()) / size if size else 0.0


def _report(found: Scales, error: float) -> dict[str, Any]:
    return {
        "ratio": found.ratio, "form": found.form,
        "error_nearest": float(f"{found.plain:.6g}"), "error_scaled": float(f"{found.scaled:.6g}"), "error": float(f"{error:.6g}"),
    }  # fmt: skip
