"""The seeds' BlockSize formula, with the figures they give."""

from __future__ import annotations

import pytest

from engine.cache.layout import KVLayout


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "block_seq_len", "dtype", "block_bytes"),
    [
        (32, 32, 128, 128, "float16", 64 << 20),  # llama-7b: 2,048 tokens are 16 blocks, 1 GiB
        (32, 8, 128, 64, "bfloat16", 8 << 20),  # llama-3-8b
        (32, 8, 128, 64, "float32", 16 << 20),
    ],
)
def test_block_bytes(layers: int, heads: int, head_dim: int, block_seq_len: int, dtype: str, block_bytes: int) -> None:
    layout = KVLayout(layers, heads, head_dim, block_seq_len, dtype)
    assert layout.block_bytes == block_bytes
    assert layout.shape(10) == (layers, 10, 2, heads, block_seq_len, head_dim)
