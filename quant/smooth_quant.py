"""`lite smooth_quant`: weights and activations in 8 bits, int8 or fp8, as compressed-tensors checkpoints hold them.

    weight        int8 or float8_e4m3fn [N, K]      w' = weight_scale[n] * weight[n, k]
    weight_scale  [N, 1], of the copy's type        largest |w| of the row / 127 (fp8: 448)

Activations are rounded as they come, one scale a token: x' = s_t q. SmoothQuant (Xiao et al. 2023) first moves outliers of the
activations into the weights: each input channel is divided by s and its weights are multiplied by it, folded as AWQ folds,

    s = (largest |x|)^a / (largest |w|)^(1 - a)

with the a of 0 (no smoothing), 0.3 ... 0.9 whose products, both sides rounded, are nearest to those in floating point on some
tokens of the calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.models.spec import ModelSpec
from quant.auto_awq import fold, shared_owner
from quant.awq_search import SMALLEST, Inputs, Scales, bounded, together
from quant.disk import Planned
from quant.forward import SITES, FloatLayer
from quant.job import FILE_DTYPES, TORCH_DTYPES, LayerResult
from quant.passes import Wanted
from quant.threads import Pool

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FIXED_STRENGTH = 0.5
SAMPLE_ROWS = 512
LARGEST = {"int8": 127.0, "fp8": 448.0}
SMALLEST_SCALE = 2.0**-24


@dataclass(slots=True, eq=False)
class Rows8:
    """q [N, K] int8 or float8_e4m3fn, scale [N] in the copy's type."""

    q: torch.Tensor
    scale: torch.Tensor

    def values(self) -> torch.Tensor:
        return self.q.to(torch.float32) * self.scale.to(torch.float32)[:, None]


@dataclass(slots=True)
class SmoothQuant:
    """The method. `kind`: "int8" or "fp8"."""

    spec: ModelSpec
    kind: str = "int8"
    search: bool = True
    dtype: str = "float16"
    name: str = "smooth_quant"
    wanted: Wanted = field(default_factory=lambda: Wanted(gram=False, rows=SAMPLE_ROWS))

    @property
    def settings(self) -> dict[str, Any]:
        return {"quant_dtype": self.kind, "search_scale": self.search}

    def quantization_config(self) -> dict[str, Any]:
        both = {"num_bits": 8, "type": "int" if self.kind == "int8" else "float", "symmetric": True}
        rest: dict[str, Any] = {"group_size": None, "block_structure": None, "actorder": None, "observer_kwargs": {}}
        weights = {**both, "strategy": "channel", "dynamic": False, "observer": "minmax", **rest}
        activations = {**both, "strategy": "token", "dynamic": True, "observer": None, **rest}
        form = "int-quantized" if self.kind == "int8" else "float-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None, "format": form}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def planned(self, rows: int, inputs: int) -> dict[str, Planned]:
        return {
            "weight": Planned("I8" if self.kind == "int8" else "F8_E4M3", (rows, inputs)),
            "weight_scale": Planned(FILE_DTYPES[self.dtype], (rows, 1)),
        }

    def quantize(self, layer: FloatLayer, seen: dict[str, Inputs], samples: dict[str, torch.Tensor], pool: Pool) -> LayerResult:
        found = {site: self._scales(layer.stacks[site], seen[site], samples[site], site, pool) for site in SITES} if seen else {}
        norms, biases = dict(layer.norms), dict(layer.biases)
        divided = {site: torch.ones(len(layer.stacks[site]), device=layer.stacks[site].device) for site in SITES}
        by = {site: fold(layer, norms, biases, divided, self.spec, site, scales.values, self.dtype) for site, scales in found.items()}
        stacks: dict[str, Any] = {}
        report: dict[str, dict[str, Any]] = {}
        for site in SITES:
            weight = layer.stacks[site] * by[site] if site in by else layer.stacks[site]
            stacks[site] = rows8(weight, self.kind, TORCH_DTYPES[self.dtype])
            if site in found:
                report[site] = {
                    "strength": found[site].ratio,
                    "error_plain": float(f"{found[site].plain:.6g}"),
                    "error": float(f"{found[site].scaled:.6g}"),
                }
            else:
                report[site] = {}
        return LayerResult(stacks, norms, biases, report)

    def pack(self, stack: Rows8, rows: torch.Tensor) -> dict[str, np.ndarray]:
        rows = rows.to(stack.q.device)
        q = stack.q.view(torch.int8)[rows].contiguous().cpu().numpy()
        return {"weight": q, "weight_scale": stack.scale.view(torch.int16)[rows].cpu().numpy()[:, None]}

    def replace(self, layer: FloatLayer, result: LayerResult) -> bool:
        return False

    def _scales(self, weight: torch.Tensor, inputs: Inputs, x: torch.Tensor, site: str, pool: Pool) -> Scales:
        owner = shared_owner(self.spec, weight.device) if site == "o" else None
        activation = together(inputs.largest, owner)
        largest = together(weight.abs().amax(0), owner)
        strengths = STRENGTHS if self.search else (FIXED_STRENGTH,)
        candidates = [(0.0, torch.ones_like(activation))]
        candidates += [(a, bounded(activation.pow(a) / largest.clamp(min=SMALLEST).pow(1 - a))) for a in strengths]
        exact = x @ weight.T
        size = float(exact.square().sum()) or 1.0

        def error(candidate: tuple[float, torch.Tensor]) -> float:
            rounded = rows8(weight * candidate[1], self.kind, TORCH_DTYPES[self.dtype]).values()
            return float((tokens8(x / candidate[1], self.kind) @ rounded.T).sub_(exact).square_().sum()) / size

        errors = pool.map(error, candidates)
        best = min(range(len(errors)), key=errors.__getitem__)
        return Scales(candidates[best][1], candidates[best][0], "largest", errors[0], errors[best])


def rows8(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> Rows8:
    """Rounded to nearest with one scale a row, which is rounded to `dtype` first."""
    scale = (weight.abs().amax(1) / LARGEST[kind]).clamp(min=SMALLEST_SCALE).to(dtype)
    return Rows8(_eight_bits(weight / scale.to(torch.float32)[:, None], kind), scale)


def tokens8(x: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [T, K]: what is left of activations that are rounded with one scale a token."""
    scale = (x.abs().amax(1, keepdim=True) / LARGEST[kind]).clamp(min=1e-12)
    return _eight_bits(x / scale, kind).to(torch.float32) * scale


def _eight_bits(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        return torch.round(x).clamp_(-127, 127).to(torch.int8)
    return x.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
