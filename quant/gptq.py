"""`lite auto_gptq`: a model's linears in 4 bits by GPTQ (Frantar et al. 2023), in GPTQ's own layout, version 1.

Input channels are rounded one after the other, and what each changes at the output is made up for by those that are still to
come, as the Gram matrix G of the inputs says. With U the upper Cholesky factor of (G + damping)^-1:

    e = (w_k - w'_k) / U[k, k]            w_j -= e U[k, j]      for all j > k

    qweight  int32   [K / 8, N]       nibble i of qweight[c, n] is q[n, 8 c + i]
    qzeros   int32   [K / g, N / 8]   nibble i of qzeros[j, c] is zero[8 c + i, j] - 1
    scales   float16 [K / g, N]
    g_idx    int32   [K]              k // g

Symmetric: every zero is 8. Later layers see the rounded ones before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.errors import ConfigError, ModelError
from quant.auto_awq import check_group, relative_error
from quant.awq_search import Inputs
from quant.disk import Planned
from quant.forward import SITES, FloatLayer
from quant.groups import LEVELS, SMALLEST_SCALE, SYMMETRIC_ZERO, Rounded, round_groups
from quant.job import LayerResult
from quant.passes import Wanted
from quant.threads import Pool

PACK = 8  # 4-bit numbers in an int32
DAMPING = 0.01  # of the Gram matrix's mean diagonal
TRIES = 4  # each with ten times the damping
ROWS = 512  # output channels that go through the columns together


@dataclass(slots=True)
class AutoGptq:
    """The method."""

    group: int = 128
    name: str = "gptq"
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def settings(self) -> dict[str, Any]:
        return {"bits": 4, "group_size": self.group, "symmetric": True, "damping": DAMPING, "act_order": False}

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": True,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": False,
            "damp_percent": DAMPING,
            "lm_head": False,
        }

    def planned(self, rows: int, inputs: int) -> dict[str, Planned]:
        check_group(self.group, inputs)
        if rows % PACK:
            raise ConfigError(f"{rows} output channels are no whole int32s of {PACK}; this layout cannot hold them.")
        groups = inputs // self.group
        return {
            "qweight": Planned("I32", (inputs // PACK, rows)),
            "qzeros": Planned("I32", (groups, rows // PACK)),
            "scales": Planned("F16", (groups, rows)),
            "g_idx": Planned("I32", (inputs,)),
        }

    def quantize(self, layer: FloatLayer, seen: dict[str, Inputs], samples: dict[str, torch.Tensor], pool: Pool) -> LayerResult:
        stacks: dict[str, Any] = {}
        report: dict[str, dict[str, Any]] = {}
        for site in SITES:
            weight = layer.stacks[site]
            plain = nearest_symmetric(weight, self.group)
            if not seen:
                stacks[site], report[site] = plain, {}
                continue
            gram, ones = seen[site].gram, torch.ones(len(weight), device=weight.device)
            stacks[site] = compensated(weight, gram, self.group, pool, f"layers.{layer.index}.{site}")
            report[site] = {
                "error_nearest": float(f"{relative_error(plain.values(), weight, gram, ones):.6g}"),
                "error": float(f"{relative_error(stacks[site].values(), weight, gram, ones):.6g}"),
            }
        return LayerResult(stacks, dict(layer.norms), dict(layer.biases), report)

    def pack(self, stack: Rounded, rows: torch.Tensor) -> dict[str, np.ndarray]:
        q, zero, scale = (getattr(stack, name)[rows.to(stack.q.device)].T.contiguous().cpu().numpy() for name in ("q", "zero", "scale"))
        return {
            "qweight": pack_axis0(q),
            "qzeros": np.ascontiguousarray(pack_axis0(np.ascontiguousarray((zero - 1).T)).T),
            "scales": scale.astype(np.float16),
            "g_idx": np.arange(len(q), dtype=np.int32) // self.group,
        }

    def replace(self, layer: FloatLayer, result: LayerResult) -> bool:
        for site, rounded in result.stacks.items():
            layer.stacks[site].copy_(rounded.values())
        return True


def pack_axis0(q: np.ndarray) -> np.ndarray:
    """uint8 [R, C] -> int32 [R / 8, C]: eight consecutive rows, the first in the lowest bits."""
    eight = q.reshape(-1, PACK, q.shape[1]).astype(np.uint32)
    out = np.zeros((len(eight), q.shape[1]), np.uint32)
    for nibble in range(PACK):
        out |= eight[:, nibble] << np.uint32(4 * nibble)
    return out.view(np.int32)


def nearest_symmetric(weight: torch.Tensor, group: int) -> Rounded:
    return round_groups(weight, group, symmetric=True)


def compensated(weight: torch.Tensor, gram: torch.Tensor, group: int, pool: Pool, name: str) -> Rounded:
    """`weight` [N, K] rounded column after column."""
    upper = _inverse_factor(gram, name)
    parts = pool.map(lambda rows: _columns(rows.clone(), upper, group), weight.split(ROWS))
    return Rounded(*(torch.cat([part[i] for part in parts]) for i in range(3)))


def _inverse_factor(gram: torch.Tensor, name: str) -> torch.Tensor:
    """Upper Cholesky factor of the damped Gram matrix's inverse, float32 [K, K]; computed in float64."""
    wide = gram.to(torch.float64)
    diagonal = wide.diagonal()
    diagonal[diagonal == 0] = 1.0  # a channel that is never used
    damping = DAMPING * float(diagonal.mean())
    for _ in range(TRIES):
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(wide)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper.to(torch.float32)
        damping *= 10
    raise ModelError(f"{name}: the Gram matrix of its inputs has no Cholesky factor; use more or other calibration text")


def _columns(weight: torch.Tensor, upper: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, zero, scale) of some rows, which are used up."""
    n, k = weight.shape
    q = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, k // group), device=weight.device)
    for start in range(0, k, group):
        stop = start + group
        block, errors = weight[:, start:stop].contiguous(), torch.empty((n, group), device=weight.device)
        size = block.abs().amax(1)
        scale = (size * 2 / LEVELS).clamp(min=SMALLEST_SCALE).to(torch.float16).to(torch.float32)
        scales[:, start // group] = scale
        own = upper[start:stop, start:stop]
        for i in range(group):
            column = block[:, i]
            code = torch.round(column / scale).add_(SYMMETRIC_ZERO).clamp_(0, LEVELS)
            q[:, start + i] = code.to(torch.uint8)
            error = (column - (code - SYMMETRIC_ZERO) * scale) / own[i, i]
            errors[:, i] = error
            block[:, i + 1 :].addr_(error, own[i, i + 1 :], alpha=-1)
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return q, torch.full((n, k // group), SYMMETRIC_ZERO, dtype=torch.uint8, device=weight.device), scales
