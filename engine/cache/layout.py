"""Shapes and bytes of a KV block: the seeds' BlockSize formula as a function, the drawing the kernels read by.

    one pool      [num_layers, num_blocks, 2, num_kv_heads, block_seq_len, head_dim]      2: K, V
    one layer     pool[layer]             what kernels get
    one position  pool[layer, block, k_or_v, head, offset]   with slot = block * block_seq_len + offset

so that one head's K (or V) of one block is `block_seq_len * head_dim` consecutive elements.

    BlockSize = 2 x layers x kv heads x head_dim x block_seq_len x bytes an element

Pure wing: standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Of one rank: `num_kv_heads` is the rank's share."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_seq_len: int
    dtype: str  # key of ELEMENT_BYTES

    @property
    def block_bytes(self) -> int:
        elements = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_seq_len
        return elements * ELEMENT_BYTES[self.dtype]

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, self.block_seq_len, self.head_dim)
