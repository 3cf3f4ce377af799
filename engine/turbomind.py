"""TurboMind's weight files, as a LMDeploy 0.1 workspace has them: the drawing, which writer and reader both follow.

Raw little-endian files without headers, one a tensor and, where R stands, one a rank; `layers.N.` before the first six:

    attention.w_qkv.R.weight       [hidden, q_R | k_R | v_R]       linears are transposed: input channels first
    attention.wo.R.weight          [q_R, hidden]
    feed_forward.w1 w3 .R.weight   [hidden, inter_R]               w1 is the gate, w3 up
    feed_forward.w2.R.weight       [inter_R, hidden]
    attention.w_qkv wo .R.bias     [q_R | k_R | v_R], [hidden]     with attn_bias; wo's is the whole one in every rank
    attention_norm ffn_norm .weight, norm.weight                   [hidden]
    tok_embeddings output .weight  [vocab padded to a multiple of the ranks, hidden]

Columns of q and k have each head's rotated dimensions in pairs: Hugging Face's i and i + head_dim / 2 side by side.
Four bits (weight_type int4): `.qweight` and `.scales_zeros` stand for w_qkv, wo, w2 and w13, whose columns are w1's and
w3's in turns. scales_zeros is [in / g, out] of two float16, 64 + zero then scale; qweight see `encode_s4`.
numpy only; knows no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.awq import ORDER, PACK

S4_TILE = 32  # input and output channels of a tile
S4_IN = (2, 2, 4, 2)  # a tile's input channels as digits
S4_OUT = (2, 2, 2, 4)  # a tile's output channels as AWQ's int32s have them: 4 int32s, 8 nibbles
S4_ORDER = (0, 5, 9, 8, 3, 1, 6, 4, 2, 7)  # of (in tile, in digits, out tile, out digits) in the file, slowest first
ZERO_OFFSET = 64  # the kernels' nibbles become 64 + q in float16


@dataclass(frozen=True, slots=True)
class Layout:
    """The numbers that all files' sizes follow from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    ranks: int
    bias: bool
    group_size: int  # 0: 16 bits

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Columns of q, k and v in a rank's w_qkv."""
        q, kv = self.heads * self.head_dim // self.ranks, self.kv_heads * self.head_dim // self.ranks
        return q, kv, kv

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.ranks) * self.ranks

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name in a layer -> [in, out] of a rank's file."""
        q, inter = self.qkv[0], self.inter // self.ranks
        out = {"attention.w_qkv": (self.hidden, sum(self.qkv)), "attention.wo": (q, self.hidden)}
        if self.group_size:
            return out | {"feed_forward.w13": (self.hidden, 2 * inter), "feed_forward.w2": (inter, self.hidden)}
        return out | {f"feed_forward.w{n}": (inter, self.hidden) if n == 2 else (self.hidden, inter) for n in (1, 2, 3)}

    def files(self) -> dict[str, int]:
        """Every file's name -> its bytes."""
        out = {}
        for i in range(self.layers):
            base = f"layers.{i}"
            for name, (rows, columns) in self.linears().items():
                for rank in range(self.ranks):
                    if self.group_size:
                        out[f"{base}.{name}.{rank}.qweight"] = rows * columns // 2
                        out[f"{base}.{name}.{rank}.scales_zeros"] = rows // self.group_size * columns * 4
                    else:
                        out[f"{base}.{name}.{rank}.weight"] = rows * columns * 2
                    if self.bias and name.startswith("attention."):
                        out[f"{base}.{name}.{rank}.bias"] = columns * 2
            out |= {f"{base}.{name}.weight": 2 * self.hidden for name in ("attention_norm", "ffn_norm")}
        table = 2 * self.padded_vocab * self.hidden
        return out | {"norm.weight": 2 * self.hidden, "tok_embeddings.weight": table, "output.weight": table}


def to_pairs(columns: np.ndarray, head_dim: int) -> np.ndarray:
    """[..., heads * head_dim] of q or k, Hugging Face's order -> TurboMind's."""
    return _swap(columns, 2, head_dim // 2)


def from_pairs(columns: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `to_pairs`."""
    return _swap(columns, head_dim // 2, 2)


def _swap(columns: np.ndarray, first: int, second: int) -> np.ndarray:
    return columns.reshape(*columns.shape[:-1], -1, first, second).swapaxes(-1, -2).reshape(columns.shape)


def encode_s4(q: np.ndarray) -> np.ndarray:
    """uint8 [in, out] with values 0 .. 15 -> uint32 [in * out / 8], nibble j of a word its j-th: tiles of 32 x 32 channels
    in which the nibbles that a thread of the tensor cores' product holds lie side by side."""
    rows, columns = q.shape
    if rows % S4_TILE or columns % S4_TILE:
        raise ValueError(f"{rows} input and {columns} output channels are no whole tiles of {S4_TILE}")
    digits = q.reshape(rows, -1, PACK)[:, :, ORDER].reshape(rows // S4_TILE, *S4_IN, columns // S4_TILE, *S4_OUT)
    nibbles = digits.transpose(S4_ORDER).reshape(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view("<u4")


def decode_s4(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """uint32 [in * out / 8] -> uint8 [in, out]; the inverse of `encode_s4`."""
    packed = words.view(np.uint8)
    nibbles = np.empty((len(packed), 2), np.uint8)
    nibbles[:, 0], nibbles[:, 1] = packed & 15, packed >> 4
    shape = (rows // S4_TILE, *S4_IN, columns // S4_TILE, *S4_OUT)
    digits = nibbles.reshape([shape[axis] for axis in S4_ORDER]).transpose(np.argsort(S4_ORDER))
    out = np.empty((rows, columns // PACK, PACK), np.uint8)
    out[:, :, ORDER] = digits.reshape(rows, -1, PACK)
    return out.reshape(rows, columns)


def encode_scales_zeros(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """float16 and uint8 [in / g, out] -> float16 [in / g, out, 2]."""
    return np.stack([(zeros + np.uint8(ZERO_OFFSET)).astype("<f2"), scales.astype("<f2")], axis=-1)


def decode_scales_zeros(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 [in / g, out, 2] -> (scales float16, zeros uint8); ValueError where a zero is none of 0 .. 15."""
    zeros = pairs[..., 0].astype(np.float32) - ZERO_OFFSET
    if not np.isin(zeros, np.arange(16)).all():
        raise ValueError("a zero is no integer from 0 to 15")
    return np.ascontiguousarray(pairs[..., 1]), zeros.astype(np.uint8)


def in_turns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[in, out] twice -> [in, 2 out]: w13's columns."""
    return np.stack([first, second], axis=-1).reshape(len(first), -1)


def pack_awq(q: np.ndarray) -> np.ndarray:
    """uint8 [R, N] -> int32 [R, N / 8] as AWQ files have it: the inverse of `engine.awq.unpack`."""
    channels = q.reshape(len(q), -1, PACK)
    out = np.zeros(channels.shape[:2], np.uint32)
    for nibble, channel in enumerate(ORDER):
        out |= channels[:, :, channel].astype(np.uint32) << np.uint32(4 * nibble)
    return out.view(np.int32)
