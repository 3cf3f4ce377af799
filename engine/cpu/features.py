"""What the CPU offers, for those who choose a dtype before anything is built."""

from __future__ import annotations


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 pairs are one instruction (AVX-512 BF16) here."""
    from engine.cpu.target import FEATURES

    return FEATURES.bf16_dot


def has_int8_products() -> bool:
    """Whether products of bytes are one instruction (AVX-512 VNNI) here."""
    from engine.cpu.target import FEATURES

    return FEATURES.int8_dot
