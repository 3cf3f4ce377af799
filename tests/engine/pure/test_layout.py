"""The seeds' BlockSize formula, with the figures they give; what a quantized block takes."""

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


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_seq_len", "bits", "layer_block_bytes"),
    [
        (8, 128, 64, 8, 2 * 8 * 64 * (128 + 4)),
        (8, 128, 64, 4, 2 * 8 * 64 * (64 + 4)),
        (2, 64, 64, 8, 2 * 2 * 64 * (64 + 4)),
        (1, 48, 1, 4, 64),  # 2 x (24 + 4), padded to 16
        (1, 64, 1, 8, 144),  # 2 x (64 + 4), padded
    ],
)
def test_quantized_block_bytes(heads: int, head_dim: int, block_seq_len: int, bits: int, layer_block_bytes: int) -> None:
    layout = KVLayout(3, heads, head_dim, block_seq_len, "bfloat16", bits)
    assert layout.layer_block_bytes == layer_block_bytes and layout.block_bytes == 3 * layer_block_bytes
    assert layout.shape(10) == (3, 10, layer_block_bytes)
    assert layout.pairs_at + 2 * heads * block_seq_len * 4 <= layer_block_bytes


@pytest.mark.parametrize(("bits", "times"), [(8, 1.9), (4, 3.6)])
def test_so_many_more_tokens_fit_at_the_shape_of_llama_3_8b(bits: int, times: float) -> None:
    whole, small = (KVLayout(32, 8, 128, 64, "bfloat16", policy).block_bytes for policy in (0, bits))
    assert whole / small > times
