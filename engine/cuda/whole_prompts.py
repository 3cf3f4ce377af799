"""Attention of prompts that begin in a step, by cuDNN (through torch), over q, k and v as they lie in the step's qkv buffer.

A prompt that begins needs no K and V but its own, and those lie beside its q: nothing is gathered from the pool. cuDNN's kernel is
the quickest for them (1.7 times our own, `bench/kernels.py` on an H200), but builds a plan for each length, which takes up to
half a second: it is used for a few lengths only (`tuning_attention.WHOLE_PROMPTS`), each tried at start, and for prompts that are a
little shorter, whose missing rows are whatever lies behind them: no query looks at later keys. Other parts of prompts go to
`engine/cuda/prefill_attention.py`. Knows no pool and no step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.cuda.tuning_attention import LEAST_FILLED, whole_prompt_lengths


class WholePrompts:
    """qkv [rows, heads q | kv_heads k | kv_heads v, head_dim], q and k rotated; `rows`: of the whole buffer."""

    def __init__(self, cc: tuple[int, int], heads: int, kv_heads: int, head_dim: int, rows: int) -> None:
        self._heads, self._kv_heads, self._head_dim, self._rows = heads, kv_heads, head_dim, rows
        self.lengths = tuple(length for length in whole_prompt_lengths(cc, head_dim) if length <= rows)

    def length(self, first: int, count: int) -> int:
        """For how many rows the attention of a prompt of `count` tokens from row `first` is computed; 0: not here."""
        found = next((length for length in self.lengths if count <= length), 0)
        return found if count >= LEAST_FILLED * found and first + found <= self._rows else 0

    def warm_up(self, qkv: torch.Tensor) -> None:
        """Let cuDNN make its plans; `qkv` is the whole buffer, and may hold anything."""
        if self.lengths and qkv.is_cuda:  # torch may not choose another one where it was made for this one
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
        for length in self.lengths:
            self._attend(qkv, 0, length)

    def __call__(self, qkv: torch.Tensor, prompts: Sequence[tuple[int, int, int]], out: torch.Tensor) -> torch.Tensor:
        """`prompts`: (first row, tokens, `length` of them). Rows of out [T, heads * head_dim] are written; returns out, or what is
        instead of it where the step is one prompt of just a length."""
        for first, count, length in prompts:
            found = self._attend(qkv, first, length)
            if count == len(out):
                return found[:count]
            out[first : first + count].copy_(found[:count])
        return out

    def _attend(self, qkv: torch.Tensor, first: int, length: int) -> torch.Tensor:
        rows = qkv[first : first + length].view(1, length, -1, self._head_dim).transpose(1, 2)
        q, k, v = rows.split((self._heads, self._kv_heads, self._kv_heads), 1)
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).reshape(length, self._heads * self._head_dim)
