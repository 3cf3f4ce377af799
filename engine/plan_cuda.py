"""What a model takes on one NVIDIA card: the formulas of weights and buffers, for the plan and for who allocates them.

Weights lie on a card in two forms: 4-bit matrices as `engine/w4.py` counts them, everything else (8-bit and odd GGUF
types too) in 16 bits. All buffers of a step are made once, for the largest step. Named lines of bytes; no torch, no card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from config.schema import Config
from engine.models.shard import Share
from engine.models.spec import ModelSpec
from engine.step import MAX_SCORED
from engine.w4 import cuda_w4_bytes
from engine.weight_files import Stored

MIB = 2**20
GGUF_W4 = {"Q4_0": 32, "Q4_1": 32, "Q4_K": 32}  # group sizes
LINEARS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}  # stacked as the decoder reads them
PART = {"qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp"}
# Estimates, until they are measured on a card: context, cuBLAS and kernel images; the decode graphs, which share a pool.
CONTEXT_BYTES = 640 * MIB
GRAPHS_BYTES = 128 * MIB
INPUTS_PER_TOKEN = 5  # int32: its slot, its position, and room for a step's rows, updates and attention tiles
SPLIT_ROWS = 64  # most rows of a product whose input channels are split over thread blocks
SPLITS = 8  # most parts they are split into
SECTIONS = 64  # most sections of a context in decode attention
THREAD_BLOCKS = 2 * 148  # of decode attention on the largest card so far


@dataclass(frozen=True, slots=True)
class CardWeights:
    """Bytes on the largest rank."""

    parts: dict[str, int]
    copy_bytes: int  # of a 16-bit copy of all 4-bit matrices
    scratch_bytes: int  # of the largest of them, dequantized


def card_weights(stock: Mapping[str, Stored], spec: ModelSpec, share: Share, tp: int) -> CardWeights:
    """`stock` as `engine/weight_files.py` takes it. A stack of mixed forms is dense; so is a tied table on one rank."""
    shapes = rank_shapes(spec, share)
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms and biases", "output head"), 0)
    matrices = [(f"layers.{i}.", name) for i in range(spec.num_layers) for name in LINEARS]
    sizes = [(PART[name], *_linear(stock, [(place + m, shapes[m]) for m in LINEARS[name]], spec)) for place, name in matrices]
    parts["embedding"] = 2 * spec.vocab_size * spec.hidden_size
    if not spec.tie_word_embeddings or tp > 1:
        table = "embed" if spec.tie_word_embeddings else "lm_head"
        sizes.append(("output head", *_linear(stock, [(table, (share.vocab, spec.hidden_size))], spec)))
    for part, size, _ in sizes:
        parts[part] += size
    parts["norms and biases"] = sum(4 * stored.shape[0] for stored in stock.values() if len(stored.shape) == 1)
    copies = [copy for _, _, copy in sizes]
    return CardWeights(parts, sum(copies), max(copies))


def rank_shapes(spec: ModelSpec, share: Share) -> dict[str, tuple[int, int]]:
    """[N, K] of each matrix of a layer on the largest rank."""
    hidden, q, kv, inner = spec.hidden_size, share.heads * spec.head_dim, share.kv_heads * spec.head_dim, share.intermediate
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    return shapes | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


def _linear(stock: Mapping[str, Stored], members: list[tuple[str, tuple[int, int]]], spec: ModelSpec) -> tuple[int, int]:
    """(bytes, bytes of its 16-bit copy: 0 where it is dense itself) of weights stacked into one."""
    groups = {_group(stock[f"{name}.weight"], spec) for name, _ in members}
    rows, columns = sum(n for _, (n, _) in members), members[0][1][1]
    group = groups.pop()
    if groups or not group or columns % group:  # a share that cuts a group is dense
        return 2 * rows * columns, 0
    return cuda_w4_bytes(rows, columns, group), 2 * rows * columns


def _group(stored: Stored, spec: ModelSpec) -> int:
    """Group size of a 4-bit matrix, 0 of any other."""
    if stored.type == "AWQ" and spec.awq is not None:
        return spec.awq.group_size
    return GGUF_W4.get(stored.type, 0)


def makes_dense_copy(config: Config, copy_bytes: int, free_after_weights: int) -> bool:
    """Whether 4-bit matrices are kept in 16 bits too: engine.w4_dense_copy; auto where the copy takes at most a quarter of
    what is free after the weights."""
    wanted = config.engine.w4_dense_copy
    if wanted != "auto":
        return wanted == "true" and copy_bytes > 0
    return 0 < 4 * copy_bytes <= free_after_weights


def activation_widths(spec: ModelSpec, share: Share) -> dict[str, int]:
    """16-bit elements a token of each buffer that a step's operations write to; the residual stream is float32."""
    q, kv = share.heads * spec.head_dim, share.kv_heads * spec.head_dim
    return {
        "hidden": spec.hidden_size,
        "residual": 2 * spec.hidden_size,
        "normed": spec.hidden_size,
        "qkv": q + 2 * kv,
        "attended": q,
        "gate_up": 2 * share.intermediate,
        "gated": share.intermediate,
    }


def split_bytes(spec: ModelSpec, share: Share) -> int:
    """float32 partial sums of a product whose input channels are split."""
    widest = max(n for n, _ in _stacked_shapes(spec, share))
    return SPLITS * SPLIT_ROWS * widest * 4


def _stacked_shapes(spec: ModelSpec, share: Share) -> list[tuple[int, int]]:
    shapes = rank_shapes(spec, share)
    return [(sum(shapes[m][0] for m in members), shapes[members[0]][1]) for members in LINEARS.values()]


def attention_bytes(spec: ModelSpec, share: Share) -> int:
    """float32 partial outputs, with a maximum and a sum for each head, of the sections of contexts that thread blocks share in
    decode attention (`engine/cuda/paged_attention.py`)."""
    group = share.heads // share.kv_heads
    return THREAD_BLOCKS * SECTIONS * group * (spec.head_dim + 2) * 4


def state_bytes(slots: int, length: int, block_seq_len: int) -> int:
    """Ids and block tables of the persistent batch, int32, with one slot for padding rows."""
    return 4 * (slots + 1) * (length + 1 + -(-(length + 1) // block_seq_len))


def sampling_bytes(slots: int, vocab: int) -> int:
    """How often each id was seen (uint16) and which may come (a bit) for every slot and a dummy one, and a copy of the logits
    before they are edited (float32) (`engine/cuda/sampling_kernels.py`)."""
    return (slots + 1) * (2 * vocab + -(-vocab // 32) * 4) + 4 * slots * vocab


def workspace(config: Config, spec: ModelSpec, share: Share, length: int, scratch_bytes: int) -> dict[str, int]:
    """Named lines. `config` with its auto settings filled in."""
    knobs = config.engine
    slots, tokens = knobs.max_batch_size, max(knobs.max_prefill_token_num, knobs.max_batch_size)
    rotary = spec.rope.rotary_dim or spec.head_dim
    return {
        "activations": 2 * tokens * sum(activation_widths(spec, share).values()) + 2 * (slots + MAX_SCORED) * spec.hidden_size,
        "logits": 4 * (slots + MAX_SCORED) * spec.vocab_size * (2 if knobs.tp > 1 else 1),
        "dequantized matrix": scratch_bytes,
        "split products": split_bytes(spec, share),
        "split attention": attention_bytes(spec, share),
        "sampling": sampling_bytes(slots, spec.vocab_size),
        "batch tables": state_bytes(slots, length, config.cache.cache_block_seq_len),
        "inputs of a step": 4 * INPUTS_PER_TOKEN * tokens,
        "rope tables": 4 * (length + 1) * rotary,
        "CUDA context": CONTEXT_BYTES,
        "CUDA graphs": GRAPHS_BYTES,
    }
