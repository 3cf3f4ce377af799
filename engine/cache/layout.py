"""Shapes and bytes of a KV block: the seeds' BlockSize formula as a function, the drawing the kernels read by.

    one pool      [num_layers, num_blocks, 2, num_kv_heads, block_seq_len, head_dim]      2: K, V
    one layer     pool[layer]             what kernels get
    one position  pool[layer, block, k_or_v, head, offset]   with slot = block * block_seq_len + offset

so that one head's K (or V) of one block is `block_seq_len * head_dim` consecutive elements.

    BlockSize = 2 x layers x kv heads x head_dim x block_seq_len x bytes an element

A quantized pool (`quant_policy` 8 or 4: bits a number; the numbers are those of `engine/kv_quant.py`) is bytes; one block
of one layer is

    codes    uint8  [2, num_kv_heads, block_seq_len, head_dim * bits / 8]
    pairs    uint32 [2, num_kv_heads, block_seq_len]     beside the codes: scale and zero of each, bfloat16, scale in the low half
    padding  to a multiple of 16 bytes                   (none where 2 kv heads x block_seq_len is a multiple of 4)

    BlockSize = layers x (2 x kv heads x block_seq_len x (head_dim x bits / 8 + 4), padded)

Pure wing: standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANT_POLICIES = (0, 4, 8)
PAIR_BYTES = 4
ALIGNMENT = 16  # of a quantized block: kernels read 16 bytes at a time


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Of one rank: `num_kv_heads` is the rank's share. dtype: of K and V as computed. quant_policy: bits they are kept in, 0: dtype."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_seq_len: int
    dtype: str  # key of ELEMENT_BYTES
    quant_policy: int = 0

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes

    @property
    def layer_block_bytes(self) -> int:
        """Of one block in one layer: the stride between blocks."""
        positions = 2 * self.num_kv_heads * self.block_seq_len
        if not self.quant_policy:
            return positions * self.head_dim * ELEMENT_BYTES[self.dtype]
        return -(-positions * (self.row_bytes + PAIR_BYTES) // ALIGNMENT) * ALIGNMENT

    @property
    def row_bytes(self) -> int:
        """Codes of one head at one position, of a quantized pool."""
        return self.head_dim * self.quant_policy // 8

    @property
    def pairs_at(self) -> int:
        """Where in a quantized block of a layer the scales and zeros begin."""
        return 2 * self.num_kv_heads * self.block_seq_len * self.row_bytes

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of the pool: elements of `dtype`, or bytes of a quantized one."""
        if self.quant_policy:
            return (self.num_layers, num_blocks, self.layer_block_bytes)
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, self.block_seq_len, self.head_dim)
