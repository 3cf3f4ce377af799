"""What a model takes on one NVIDIA card: the formulas of weights and buffers, for the plan and for who allocates them.

Weights lie on a card in three forms: 4-bit matrices as `engine/w4.py` counts them, W8A8 and FP8 ones in 8 bits where the card
multiplies those (`eight_bit_kind`), everything else (8-bit and odd GGUF types too) in 16 bits. All buffers of a step are made
once, for the largest step. Named lines of bytes; no torch, no card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from config.schema import Config
from engine.cuda.tuning import most_part_floats
from engine.models.shard import Share
from engine.models.spec import ModelSpec
from engine.packed_ints import w4_group
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
SECTIONS = 64  # most sections of a context in decode attention
MULTIPROCESSORS = 148  # of the largest card so far
THREAD_BLOCKS = 2 * MULTIPROCESSORS  # of decode attention
SUM_BYTES = 4 * MIB  # that a rank sends to the others in one sum of few rows (an estimate)
SUM_TURNS = 3  # slots of so many sums
PLANNED_CC = (9, 0)  # where no card is here to ask
FP8_SINCE, INT8_SINCE, FP8_BLOCKS_ON = (8, 9), (8, 0), (9, 0)  # compute capabilities
EIGHT_BIT_PIECE = 1024  # rows of an int8 product at a time
FEW_FP8_ROWS, LARGE_FP8 = 256, 1 << 25  # rows and elements of an FP8 weight whose products are scaled afterwards
BLOCK = 128  # of FP8, both ways
BLOCKS_TOGETHER = 4  # K of FP8 blocks is padded to a multiple of so many


@dataclass(frozen=True, slots=True)
class CardWeights:
    """Bytes on the largest rank."""

    parts: dict[str, int]
    copy_bytes: int  # of a 16-bit copy of all 4-bit matrices
    scratch_bytes: int  # of the largest of them, dequantized
    eight_bit: tuple[tuple[str, int, int], ...] = ()  # (kind, N, K) of the 8-bit products
    gated: int = 0  # intermediate channels of a token that are kept in 8 bits between gate, up and down
    ordered: int = 0  # most input channels of a 4-bit product whose activations come in another order
    split_bytes: int = 0  # float32 parts of a 4-bit product whose input channels are split over thread blocks


def card_weights(
    stock: Mapping[str, Stored], spec: ModelSpec, share: Share, tp: int, *, dtype: str = "bfloat16", cc: tuple[int, int] = PLANNED_CC
) -> CardWeights:
    """`stock` as `engine/weight_files.py` takes it. A stack of mixed forms is dense; so is a tied table on one rank."""
    shapes = rank_shapes(spec, share)
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms and biases", "output head"), 0)
    matrices = [(f"layers.{i}.", name) for i in range(spec.num_layers) for name in LINEARS]
    sizes, eight_bit, packed = [], set(), set()
    stacks = [(PART[name], [(place + m, shapes[m]) for m in LINEARS[name]]) for place, name in matrices]
    if not spec.tie_word_embeddings or tp > 1:
        table = "embed" if spec.tie_word_embeddings else "lm_head"
        stacks.append(("output head", [(table, (share.vocab, spec.hidden_size))]))
    for part, members in stacks:
        n, k, group = _stack(stock, members, spec)
        if part != "output head" and (kind := _eight_bits(stock, members, cc, dtype)):
            sizes.append((part, _eight_bit_bytes(*kind), 0))
            eight_bit.add(kind)
        elif group:
            sizes.append((part, cuda_w4_bytes(n, k, group), 2 * n * k))
            packed.add((n, k, group))
        else:
            sizes.append((part, 2 * n * k, 0))
    parts["embedding"] = 2 * spec.vocab_size * spec.hidden_size
    for part, size, _ in sizes:
        parts[part] += size
    parts["norms and biases"] = sum(4 * stored.shape[0] for stored in stock.values() if len(stored.shape) == 1)
    copies = [copy for _, _, copy in sizes]
    ordered = max((s.shape[1] for s in stock.values() if s.part("g_idx") or s.part("weight_g_idx")), default=0)
    fused = tp == 1 and not spec.mlp_bias and any(kind != "fp8 blocks" and n == 2 * share.intermediate for kind, n, _ in eight_bit)
    gated = share.intermediate if fused and any(k == share.intermediate for _, _, k in eight_bit) else 0
    split = 4 * max((most_part_floats(cc, MULTIPROCESSORS, *shape) for shape in packed), default=0)
    return CardWeights(parts, sum(copies), max(copies), tuple(sorted(eight_bit)), gated, ordered, split)


def _eight_bits(
    stock: Mapping[str, Stored], members: list[tuple[str, tuple[int, int]]], cc: tuple[int, int], dtype: str
) -> tuple[str, int, int] | None:
    """(kind, N, K) of weights stacked into one 8-bit product, None where they are none."""
    stored = [stock[f"{name}.weight"] for name, _ in members]
    schemes = {s.scheme for s in stored}
    scheme = schemes.pop()
    if schemes or scheme is None or not scheme.activations:
        return None
    n, k = sum(rows for _, (rows, _) in members), members[0][1][1]
    blocks = scheme.form == "FP8" and scheme.group_size > 0
    if blocks and any(rows % BLOCK for _, (rows, _) in members):
        return None
    wanted = "int8" if scheme.form == "INT8" else "fp8 blocks" if blocks else "fp8"
    kind = eight_bit_kind(wanted, n, k, cc, dtype, cc == FP8_BLOCKS_ON)
    return (kind, n, k) if kind else None


def eight_bit_kind(wanted: str, n: int, k: int, cc: tuple[int, int], dtype: str, block_scaling: bool) -> str:
    """`wanted` (int8, fp8, fp8 blocks) where a card of compute capability `cc` multiplies a weight [n, k] so, else "": it is
    dequantized to 16 bits. cuBLAS wants multiples of 16, and bfloat16 of fp8. `block_scaling`: of cuBLAS 12.9 and newer."""
    if n % 16 or k % 16:
        return ""
    if wanted == "int8":
        return wanted if cc >= INT8_SINCE else ""
    if dtype != "bfloat16" or cc < FP8_SINCE:
        return ""
    return wanted if wanted == "fp8" or block_scaling and not n % BLOCK else ""


def is_large(n: int, k: int) -> bool:
    """Whether FP8 products of few rows with a weight [n, k] leave the scaling to a kernel of their own."""
    return n * k >= LARGE_FP8


def padded_inputs(kind: str, k: int) -> int:
    """Input channels of an 8-bit weight as it lies on the card."""
    unit = BLOCK * BLOCKS_TOGETHER if kind == "fp8 blocks" else 1
    return -(-k // unit) * unit


def _eight_bit_bytes(kind: str, n: int, k: int) -> int:
    width = padded_inputs(kind, k)
    return n * width + 4 * (n // BLOCK * (width // BLOCK) if kind == "fp8 blocks" else n)


def eight_bit_workspace(products: tuple[tuple[str, int, int], ...], tokens: int, gated: int = 0) -> int:
    """Quantized activations with their scales (`gated` channels of those between gate, up and down beside the others), the sums
    of int8 products, a few rows of fp8 blocks' outputs."""
    if not products:
        return 0
    widest = max(padded_inputs(kind, k) for kind, _, k in products)
    groups = max((padded_inputs(kind, k) // BLOCK for kind, _, k in products if kind == "fp8 blocks"), default=1)
    sums = min(tokens, EIGHT_BIT_PIECE) * max((n for kind, n, _ in products if kind == "int8"), default=0)
    sums = max(sums, min(tokens, FEW_FP8_ROWS) * max((n for kind, n, k in products if kind == "fp8" and is_large(n, k)), default=0))
    few = BLOCKS_TOGETHER * max((n for kind, n, _ in products if kind == "fp8 blocks"), default=0)
    between = gated + 4 if gated else 0
    return (tokens + BLOCKS_TOGETHER) * (widest + 4 * groups + between) + 4 * sums + 2 * few


def rank_shapes(spec: ModelSpec, share: Share) -> dict[str, tuple[int, int]]:
    """[N, K] of each matrix of a layer on the largest rank."""
    hidden, q, kv, inner = spec.hidden_size, share.heads * spec.head_dim, share.kv_heads * spec.head_dim, share.intermediate
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    return shapes | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


def _stack(stock: Mapping[str, Stored], members: list[tuple[str, tuple[int, int]]], spec: ModelSpec) -> tuple[int, int, int]:
    """(N, K, group size) of weights stacked into one; group size 0: the stack is dense."""
    groups = {_group(stock[f"{name}.weight"], spec) for name, _ in members}
    n, k = sum(rows for _, (rows, _) in members), members[0][1][1]
    group = groups.pop()
    return n, k, 0 if groups or not group or k % group else group  # a share that cuts a group is dense


def _group(stored: Stored, spec: ModelSpec) -> int:
    """Group size of a 4-bit matrix, 0 of any other."""
    if stored.type in ("GPTQ", "PACKED") and stored.scheme is not None:
        return w4_group(stored.scheme.group_size or stored.shape[1], stored.shape[1]) if stored.scheme.bits == 4 else 0
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


def attention_bytes(spec: ModelSpec, share: Share) -> int:
    """float32 partial outputs, with a maximum and a sum for each head, of the sections of contexts that thread blocks share in
    decode attention (`engine/cuda/paged_attention.py`)."""
    group = share.heads // share.kv_heads
    return THREAD_BLOCKS * SECTIONS * group * (spec.head_dim + 2) * 4


def state_bytes(slots: int, length: int, block_seq_len: int) -> int:
    """Ids and block tables of the persistent batch, int32, with one slot for padding rows."""
    return 4 * (slots + 1) * (length + 1 + -(-(length + 1) // block_seq_len))


def summed_rows(hidden: int, tp: int) -> int:
    """Most rows of a sum over ranks that goes through their own memory (`engine/cuda/all_reduce.py`); larger ones go to NCCL."""
    return SUM_BYTES // (4 * hidden * (tp - 1)) if tp > 1 else 0


def summed_bytes(hidden: int, tp: int) -> int:
    """Of the slots for such sums, float32, of each rank's rows, three times."""
    return 4 * SUM_TURNS * tp * summed_rows(hidden, tp) * hidden


def sampling_bytes(slots: int, vocab: int) -> int:
    """How often each id was seen (uint16) and which may come (a bit) for every slot and a dummy one, and a copy of the logits
    before they are edited (float32) (`engine/cuda/sampling_kernels.py`)."""
    return (slots + 1) * (2 * vocab + -(-vocab // 32) * 4) + 4 * slots * vocab


def workspace(
    config: Config,
    spec: ModelSpec,
    share: Share,
    length: int,
    scratch_bytes: int,
    quantized: CardWeights | None = None,
) -> dict[str, int]:
    """Named lines. `config` with its auto settings filled in."""
    knobs = config.engine
    slots, tokens = knobs.max_batch_size, max(knobs.max_prefill_token_num, knobs.max_batch_size)
    rotary = spec.rope.rotary_dim or spec.head_dim
    return {
        "activations": 2 * tokens * sum(activation_widths(spec, share).values()) + 2 * (slots + MAX_SCORED) * spec.hidden_size,
        "logits": 4 * (slots + MAX_SCORED) * spec.vocab_size * (2 if knobs.tp > 1 else 1),
        "dequantized matrix": scratch_bytes,
        "8-bit products": eight_bit_workspace(quantized.eight_bit, tokens, quantized.gated) if quantized else 0,
        "activations in another order": 2 * tokens * quantized.ordered if quantized else 0,
        "split products": quantized.split_bytes if quantized else 0,
        "split attention": attention_bytes(spec, share),
        "sums over ranks": summed_bytes(spec.hidden_size, knobs.tp),
        "sampling": sampling_bytes(slots, spec.vocab_size),
        "batch tables": state_bytes(slots, length, config.cache.cache_block_seq_len),
        "inputs of a step": 4 * INPUTS_PER_TOKEN * tokens,
        "rope tables": 4 * (length + 1) * rotary,
        "CUDA context": CONTEXT_BYTES,
        "CUDA graphs": GRAPHS_BYTES,
    }
