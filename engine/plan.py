"""The memory plan: what will be resident, computed from headers and configuration before anything is allocated.

No torch, no CUDA context, no tensor data is read. `memory_parts` counts a rank's weights in the layout of the CPU kernels,
`engine/plan_cuda.py` in that of a card; `plan_memory` adds what a step works on and divides the rest into KV blocks, as
the runner will after loading.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from config.schema import Config
from engine import host, plan_cuda
from engine.build import session_len
from engine.cache.layout import ELEMENT_BYTES, KVLayout
from engine.cards import cards
from engine.errors import ConfigError
from engine.load_backend import computing_dtype, resolved
from engine.models.shard import Share, largest_share
from engine.models.spec import ModelSpec
from engine.packed_ints import w4_group
from engine.plan_config import stock_for_plan
from engine.weight_files import Stored

# Bytes an element of a weight takes once packed for the CPU kernels (the table in engine/cpu/matmul.py): nibbles with
# 16-bit scale and bias, or 32-bit ones where 16 bits would round them (of AWQ, most zeros); int8 with a 32-bit scale. The
# rest is dense.
PACKED_BYTES = {"Q4_0": 320 / 512, "Q4_1": 320 / 512, "Q4_K": 384 / 512, "AWQ": 384 / 512, "Q5_0": 576 / 512, "Q8_0": 576 / 512}
FORM = {
    "Q4_0": "w4",
    "Q4_1": "w4",
    "Q4_K": "w4",
    "AWQ": "w4",
    "Q5_0": "w8",
    "Q8_0": "w8",
}  # weights of one form stay as they are when stacked
INT8_BYTES = 512 / 512 + 128 / (512 * 4)  # with the scales of a tile, at least four chunks long
STACKED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
PART = {"embed": "embedding", "lm_head": "output head", "qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp"}
MIB = 2**20
# of what head_dim must be a multiple where K and V are quantized: what the kernels read at a time
QUANTIZED_HEAD_DIM = {"cpu": {8: 16, 4: 16}, "cuda": {8: 32, 4: 64}, "reference": {4: 2, 8: 1}}


def memory_parts(path: Path | str, spec: ModelSpec, *, dtype: str, tp: int = 1) -> dict[str, int]:
    """Resident bytes of the weights on the largest rank: embedding, attention, mlp, norms and biases, output head.

    `dtype` is the computing one: float32 is the exact mode, in which every weight is dense.
    """
    stock = stock_for_plan(path, spec)
    share = largest_share(spec, tp)
    cut = _cuts(spec, share)
    forms = _forms(stock)
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms and biases", "output head"), 0.0)
    for canonical, stored in stock.items():
        *place, name, suffix = canonical.split(".")
        if len(stored.shape) == 1:
            parts["norms and biases"] += 4 * stored.shape[0]
            continue
        elements = stored.shape[0] * stored.shape[1] * cut.get(name, 1.0)
        group = STACKED.get(name, name)
        mixed = len(forms[".".join([*place, group])]) > 1
        parts[PART[group]] += elements * _element_bytes(stored, dtype, mixed)
    if spec.tie_word_embeddings and tp > 1:  # the table is whole on every rank, the head is a share of it
        parts["output head"] = parts["embedding"] * share.vocab / spec.vocab_size
    return {name: round(value) for name, value in parts.items()}


def _cuts(spec: ModelSpec, share: Share) -> dict[str, float]:
    """Part of each matrix that the rank holds."""
    heads, kv = share.heads / spec.num_heads, share.kv_heads / spec.num_kv_heads
    inner = share.intermediate / spec.intermediate_size
    return {"q": heads, "o": heads, "k": kv, "v": kv, "gate": inner, "up": inner, "down": inner, "lm_head": share.vocab / spec.vocab_size}


def _forms(stock: dict[str, Stored]) -> dict[str, set[str]]:
    """Layer and stacked name -> the forms of the weights in it: more than one, and the stack becomes dense."""
    out: dict[str, set[str]] = {}
    for canonical, stored in stock.items():
        *place, name, suffix = canonical.split(".")
        if suffix == "weight":
            out.setdefault(".".join([*place, STACKED.get(name, name)]), set()).add(_form(stored))
    return out


def _form(stored: Stored) -> str:
    """w4, w8, int8 or dense: how a weight lies in memory for the CPU kernels."""
    scheme = stored.scheme
    if scheme is None or stored.type == "AWQ":
        return FORM.get(stored.type, "dense")
    if stored.type in ("GPTQ", "PACKED"):
        k = stored.shape[1]
        fits = w4_group(scheme.group_size or k, k) > 0
        return "dense" if not fits or scheme.bits == 8 and scheme.zeros else "w4" if scheme.bits == 4 else "w8"
    if stored.type == "INT8":
        from engine.cpu.features import has_int8_products

        return ("int8" if has_int8_products() else "dense") if scheme.activations else "w8"
    return "dense"


def _element_bytes(stored: Stored, dtype: str, mixed: bool) -> float:
    if dtype == "float32":
        return 4
    if mixed:
        return 2
    by_form = {"w4": PACKED_BYTES["AWQ"], "w8": PACKED_BYTES["Q8_0"], "int8": INT8_BYTES, "dense": 2}
    return PACKED_BYTES.get(stored.type, by_form[_form(stored)])


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one rank, and what fits into the rest."""

    dtype: str
    ranks: int
    free_bytes: int  # for one rank, before anything is loaded
    weights: dict[str, int]
    workspace: dict[str, int]
    block_bytes: int
    block_seq_len: int
    num_blocks: int
    session_len: int
    device: str = "cpu"
    spare_blocks: int = 0  # allocated beside num_blocks: where padding rows of a card's steps write
    dense_copy: bool = False  # 4-bit weights are kept in 16 bits too (a line of `weights`)
    shortfall: str = field(default="")  # what is missing and which key to change; "" when the model fits

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def workspace_bytes(self) -> int:
        return sum(self.workspace.values())

    @property
    def kv_bytes(self) -> int:
        return (self.num_blocks + self.spare_blocks) * self.block_bytes

    @property
    def tokens(self) -> int:
        """Positions whose K/V fits at a time."""
        return self.num_blocks * self.block_seq_len

    @property
    def sessions(self) -> int:
        """Sequences of full session_len that fit at a time."""
        return self.num_blocks // -(-self.session_len // self.block_seq_len)

    def table(self) -> str:
        """For people: one line a part, MiB."""
        lines = [("", f"{'MiB':>12}")]
        lines += [(f"weights: {name}", _mib(size)) for name, size in self.weights.items() if size]
        lines += [(f"workspace: {name}", _mib(size)) for name, size in self.workspace.items()]
        spare = f" + {self.spare_blocks}" if self.spare_blocks else ""
        lines += [(f"KV cache: {self.num_blocks}{spare} blocks of {self.block_bytes / MIB:.3f} MiB", _mib(self.kv_bytes))]
        lines += [("together", _mib(self.weight_bytes + self.workspace_bytes + self.kv_bytes)), ("free now", _mib(self.free_bytes))]
        text = [f"{name:<44}{size}" for name, size in lines]
        rank = f", each of {self.ranks} ranks" if self.ranks > 1 else ""
        text[0] = f"{f'memory ({self.device}), {self.dtype}{rank}':<44}{lines[0][1]}"
        text.append(f"room for {self.tokens} tokens: {self.sessions} sequences of session_len {self.session_len}, or shorter ones")
        return "\n".join([*text, *([self.shortfall] if self.shortfall else [])])


def _mib(size: int) -> str:
    return f"{size / MIB:12.1f}"


def free_memory(config: Config) -> int:
    """What the plan of this configuration may fill: the machine's free memory, or that of the card with least of the first
    engine.tp. ConfigError where it wants cards that are not here and does not say how large they are."""
    knobs = resolved(config).engine
    if knobs.device != "cuda":
        return host.free_bytes()
    limit, found = int(knobs.device_memory_gib * 2**30), cards()[: knobs.tp]
    if limit and len(found) < knobs.tp:
        return limit
    if len(found) < knobs.tp:
        raise ConfigError(
            f"engine.device = 'cuda' with engine.tp = {knobs.tp}, and the driver shows {len(found)} cards here; set "
            "engine.device_memory_gib to the memory of one card to plan for it."
        )
    free = min(card.free_bytes for card in found)
    return min(free, limit) if limit else free


def plan_memory(config: Config, spec: ModelSpec, path: Path | str, free_bytes: int) -> MemoryPlan:
    """`free_bytes`: memory of the machine, or of each rank's card, that can be had now (`free_memory`). A shortfall is
    reported in the plan, not raised."""
    config = resolved(config)
    device = config.engine.device
    if device == "mock":
        raise ConfigError("engine.device = 'mock' loads no model; there is no memory to plan.")
    dtype, tp, length = computing_dtype(config, device, spec.dtype), config.engine.tp, session_len(config, spec)
    share = largest_share(spec, tp)
    layout = kv_layout(config, spec, share.kv_heads, dtype)
    empty = MemoryPlan(
        dtype=dtype,
        ranks=tp,
        free_bytes=free_bytes,
        weights={},
        workspace={},
        block_bytes=layout.block_bytes,
        block_seq_len=layout.block_seq_len,
        num_blocks=0,
        session_len=length,
        device=device,
    )
    plan = _on_cards(config, spec, path, share, empty) if device == "cuda" else _on_host(config, spec, path, share, empty)
    left = plan.free_bytes - plan.weight_bytes - plan.workspace_bytes - plan.spare_blocks * plan.block_bytes
    plan = dataclasses.replace(plan, num_blocks=kv_blocks(config, layout, length, left))
    return dataclasses.replace(plan, shortfall=_shortfall(config, plan, left))


def kv_layout(config: Config, spec: ModelSpec, kv_heads: int, dtype: str) -> KVLayout:
    """Of a rank with so many KV heads. ConfigError where this model's heads cannot be kept in the bits that are wanted."""
    policy = config.cache.quant_policy
    device = resolved(config).engine.device
    multiple = QUANTIZED_HEAD_DIM.get(device, {}).get(policy, 1)
    if spec.head_dim % multiple:
        raise ConfigError(
            f"cache.quant_policy = {policy} on {device} needs a head_dim that is a multiple of {multiple}; this model's is "
            f"{spec.head_dim}. Set it to {'8 or 0' if policy == 4 and spec.head_dim % QUANTIZED_HEAD_DIM[device][8] == 0 else '0'}."
        )
    return KVLayout(spec.num_layers, kv_heads, spec.head_dim, config.cache.cache_block_seq_len, dtype, policy)


def _on_host(config: Config, spec: ModelSpec, path: Path | str, share: Share, empty: MemoryPlan) -> MemoryPlan:
    """The ranks share the machine's memory."""
    return dataclasses.replace(
        empty,
        free_bytes=empty.free_bytes // empty.ranks,
        weights=memory_parts(path, spec, dtype=empty.dtype, tp=empty.ranks),
        workspace=workspace_parts(config, spec, share, empty.dtype, empty.session_len),
    )


def _on_cards(config: Config, spec: ModelSpec, path: Path | str, share: Share, empty: MemoryPlan) -> MemoryPlan:
    """Every rank has a card of its own."""
    cc = min((card.cc for card in cards()[: empty.ranks]), default=plan_cuda.PLANNED_CC)
    weights = plan_cuda.card_weights(stock_for_plan(path, spec), spec, share, empty.ranks, dtype=empty.dtype, cc=cc)
    free = empty.free_bytes - sum(weights.parts.values())
    copy = plan_cuda.makes_dense_copy(config, weights.copy_bytes, free)
    return dataclasses.replace(
        empty,
        weights=weights.parts | {"16-bit copy": weights.copy_bytes if copy else 0},
        workspace=plan_cuda.workspace(config, spec, share, empty.session_len, 0 if copy else weights.scratch_bytes, weights),
        spare_blocks=1,
        dense_copy=copy,
    )


def workspace_parts(config: Config, spec: ModelSpec, share: Share, dtype: str, length: int) -> dict[str, int]:
    """Upper bounds of what a step works on."""
    knobs, size = config.engine, ELEMENT_BYTES[dtype]
    tokens = max(knobs.max_prefill_token_num, knobs.max_batch_size)
    heads = share.heads + 2 * share.kv_heads
    width = 3 * spec.hidden_size + (heads + share.heads) * spec.head_dim + 3 * share.intermediate
    rotary = spec.rope.rotary_dim or spec.head_dim
    return {
        "activations": tokens * width * size,
        "logits": min(knobs.max_batch_size, tokens) * spec.vocab_size * 4 * (2 if knobs.tp > 1 else 1),
        "rope tables": (length + 1) * rotary * 4,
        "batch tables": knobs.max_batch_size * (length + 1) * 4,
    }


def kv_blocks(config: Config, layout: KVLayout, length: int, free: int) -> int:
    """Blocks of the pool when `free` bytes are left beside weights and workspace: cache.num_blocks, or what the share
    cache_max_entry_count of them holds, up to cache_max_bytes (not on a card, which has nothing else to do) and four times
    what all batch slots can fill."""
    config = resolved(config)
    cache = config.cache
    if cache.num_blocks:
        return cache.num_blocks
    budget = int(max(0, free) * cache.cache_max_entry_count)
    if cache.cache_max_bytes and config.engine.device != "cuda":
        budget = min(budget, cache.cache_max_bytes)
    useful = 4 * config.engine.max_batch_size * -(-(length + 1) // layout.block_seq_len)
    return min(budget // layout.block_bytes, useful)


def _shortfall(config: Config, plan: MemoryPlan, left: int) -> str:
    """One sentence: the numbers, and the key that mends it."""
    if left <= 0:
        need = -left / MIB
        mend = _mend(plan, -left)
        return f"Too little memory: weights and workspace need {need:.1f} MiB more than is free; {mend} or free memory."
    if plan.num_blocks * plan.block_bytes > left:
        fits = left // plan.block_bytes
        return f"Too little memory: cache.num_blocks = {plan.num_blocks} needs {plan.kv_bytes / MIB:.1f} MiB, {left / MIB:.1f} MiB are left; set it to at most {fits} or 0."  # noqa: E501
    if plan.num_blocks == 0:
        bounded = plan.device != "cuda" and 0 < config.cache.cache_max_bytes < plan.block_bytes
        key = "cache.cache_max_bytes" if bounded else "cache.cache_max_entry_count"
        return f"The KV pool has room for 0 blocks: one block is {plan.block_bytes / MIB:.3f} MiB; raise {key}."
    if plan.sessions == 0:
        return (
            f"One sequence of {plan.session_len} tokens does not fit into {plan.tokens} tokens of KV cache: set engine.session_len "
            f"to at most {plan.tokens}, or give the cache more memory (cache.cache_max_entry_count, cache.cache_max_bytes)."
        )
    return ""


def _mend(plan: MemoryPlan, missing: int) -> str:
    if plan.dtype == "float32":
        return "set model.dtype = 'bfloat16'"
    if plan.dense_copy and plan.weights["16-bit copy"] >= missing:
        return "set engine.w4_dense_copy = 'false'"
    if plan.device == "cuda":
        return "lower engine.max_prefill_token_num, raise engine.tp, take a smaller model or one of fewer bits,"
    return "take a smaller model or one of fewer bits"
