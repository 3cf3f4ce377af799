"""Tables of cos and sin for rotary position embedding, for every kind of scaling that `RopeSpec` names.

Dynamic NTK follows TurboMind's idea and not Hugging Face's: theta is chosen once, here once per engine for the longest
sequence it can hold (`max_len`, the session length), and never again. Hugging Face lets theta grow with the current
length, which changes the frequencies under keys that were cached with the old ones; with blocks of rotated keys shared
between sequences that is not an option. For `max_len` up to the trained length the two agree exactly, and so they do
for a sequence of exactly `max_len`. Formulas: Llama 3.1's model card (llama3), Peng et al. 2023 (yarn); numpy only.
"""

from __future__ import annotations

import math

import numpy as np

from engine.models.spec import ModelSpec, RopeSpec


def rope_tables(spec: ModelSpec, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each float32 [max_len, rotary_dim / 2], yarn's attention factor included."""
    frequencies = inverse_frequencies(spec, max_len)
    # the angle is rounded to float32 before cos and sin are taken, as the models were trained
    angles = np.outer(np.arange(max_len, dtype=np.float32), frequencies.astype(np.float32))
    scale = np.float32(attention_factor(spec.rope))
    return np.cos(angles) * scale, np.sin(angles) * scale


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied by."""
    if rope.kind != "yarn":
        return 1.0
    return rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0


def inverse_frequencies(spec: ModelSpec, max_len: int) -> np.ndarray:
    """float64 [rotary_dim / 2]: radians a position."""
    rope, dim = spec.rope, spec.rope.rotary_dim or spec.head_dim
    theta = _ntk_theta(rope, dim, max_len) if rope.kind == "dynamic" else rope.theta
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, dim, plain)
    return plain / np.asarray(rope.freq_factors) if rope.freq_factors else plain


def _ntk_theta(rope: RopeSpec, dim: int, max_len: int) -> float:
    longest = max(max_len, rope.original_max_position)
    stretch = rope.factor * longest / rope.original_max_position - (rope.factor - 1)
    return rope.theta * stretch ** (dim / (dim - 2))


def _llama3(rope: RopeSpec, plain: np.ndarray) -> np.ndarray:
    """Short waves stay, long ones are divided by the factor, those between are blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # full turns within the trained length
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return plain * (kept + (1 - kept) / rope.factor)


def _yarn(rope: RopeSpec, dim: int, plain: np.ndarray) -> np.ndarray:
    """Dimensions that turn often stay, those that turn seldom are divided by the factor, a linear ramp between."""

    def dimension(turns: float) -> float:
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain * (1 - divided + divided / rope.factor)
