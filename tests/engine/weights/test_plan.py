"""The memory plan: its bytes are those of the tensors, its blocks those of the formula, its advice mends what it names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from config.schema import Cache, Config, Engine, Model
from engine.build import resolve_spec
from engine.errors import ConfigError
from engine.models.layers import make_shard
from engine.models.spec import load_spec
from engine.plan import PACKED_BYTES, MemoryPlan, kv_layout, largest_share, memory_parts, plan_memory
from engine.reference import ReferenceBackend
from engine.weights import open_checkpoint
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint, toy_gguf

GIB = 1 << 30


def plan(
    path: Path, free: int = 16 * GIB, *, dtype: str = "float32", engine: Engine | None = None, cache: Cache | None = None
) -> MemoryPlan:
    config = Config(model=Model(path=str(path), dtype=dtype), engine=engine or Engine(), cache=cache or Cache())
    return plan_memory(config, resolve_spec(config), path, free)


def test_packed_sizes_are_the_kernels() -> None:
    from engine.cpu.matmul import CHUNK_BYTES, D16, D32, W4, W4F, W8

    per_element = {kind: CHUNK_BYTES[kind] / 512 for kind in (W4, W4F, W8, D16, D32)}  # 16 channels x 32
    assert PACKED_BYTES == {
        "Q4_0": per_element[W4],
        "Q4_1": per_element[W4],
        "Q4_K": per_element[W4F],
        "AWQ": per_element[W4F],
        "Q5_0": per_element[W8],
        "Q8_0": per_element[W8],
    }
    assert (per_element[D16], per_element[D32]) == (2, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_dense_weights_are_counted_exactly(tmp_path: Path, tied: bool) -> None:
    path = toy_checkpoint(tmp_path / "x", "qwen2", tie_word_embeddings=tied)
    spec = load_spec(path)
    from engine.weight_files import expected_shapes

    elements = sum(torch.Size(shape).numel() for shape in expected_shapes(spec).values())
    assert sum(memory_parts(path, spec, dtype="float32").values()) == 4 * elements
    vectors = sum(shape[0] for shape in expected_shapes(spec).values() if len(shape) == 1)
    assert sum(memory_parts(path, spec, dtype="bfloat16").values()) == 2 * (elements - vectors) + 4 * vectors


def test_group_quantized_weights(tmp_path: Path) -> None:
    types = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "o": "Q4_K", "gate": "Q4_1", "up": "Q4_1", "down": "Q8_0", "embed": "Q8_0"}
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types=types, hidden=256, layers=3)
    spec = load_spec(path)
    parts = memory_parts(path, spec, dtype="bfloat16")
    h, kv, inner = 256, 128, 512
    assert parts["attention"] == 3 * ((h + 2 * kv) * h * 2 + h * h * 0.75)  # q, k, v are stacked: a Q6_K v makes all dense
    assert parts["mlp"] == 3 * (2 * inner * h * 0.625 + inner * h * 1.125)
    assert parts["embedding"] == 260 * h * 1.125
    assert parts["output head"] == 260 * h * 2  # F32 in the file
    assert memory_parts(path, spec, dtype="float32")["mlp"] == 3 * 3 * inner * h * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("heads, kv_heads, inner", [(8, 4, 256), (9, 3, 1536), (14, 2, 4864), (32, 8, 11008), (8, 1, 344), (6, 6, 100)])
def test_the_largest_share_is_the_loaders(size: int, heads: int, kv_heads: int, inner: int, tmp_path: Path) -> None:
    spec = load_spec(toy_checkpoint(tmp_path / "x", layers=1))
    spec = dataclasses.replace(spec, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner)
    try:
        shards = [make_shard(spec, rank, size) for rank in range(size)]
    except ConfigError:
        with pytest.raises(ConfigError, match="use fewer ranks"):
            largest_share(spec, size)
        return
    share = largest_share(spec, size)
    assert share.heads == max(s.num_heads for s in shards) and share.kv_heads == max(s.num_kv_heads for s in shards)
    assert share.intermediate == max(s.intermediate.stop - s.intermediate.start for s in shards)
    assert share.vocab == max(s.vocab.stop - s.vocab.start for s in shards)


def test_two_ranks_hold_half_of_what_is_cut(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    spec = load_spec(path)
    one, two = (memory_parts(path, spec, dtype="float32", tp=tp) for tp in (1, 2))
    assert two["attention"] * 2 == one["attention"] and two["mlp"] * 2 == one["mlp"] and two["output head"] * 2 == one["output head"]
    assert two["embedding"] == one["embedding"]
    # what a rank really reads
    shard, checkpoint = make_shard(spec, 1, 2), open_checkpoint(path, spec)
    down = checkpoint.weight("layers.0.down", columns=shard.intermediate)
    gate = checkpoint.weight("layers.0.gate", rows=shard.intermediate)
    assert isinstance(down, torch.Tensor) and isinstance(gate, torch.Tensor)
    assert two["mlp"] == spec.num_layers * (down.nbytes + 2 * gate.nbytes)


def test_blocks_follow_the_formula(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    p = plan(path, cache=Cache(cache_max_bytes=1 << 20, cache_block_seq_len=64))
    assert p.block_bytes == 2 * 2 * 2 * 16 * 64 * 4  # K and V, layers, KV heads, head_dim, positions, float32
    assert p.num_blocks == (1 << 20) // p.block_bytes and p.tokens == 64 * p.num_blocks
    assert p.sessions == p.num_blocks // 8 and p.session_len == 512
    assert not p.shortfall
    half = plan(path, dtype="bfloat16", cache=Cache(cache_max_bytes=1 << 20))
    assert half.block_bytes * 2 == p.block_bytes
    fixed = plan(path, cache=Cache(num_blocks=17))
    assert fixed.num_blocks == 17
    slots = plan(path, engine=Engine(max_batch_size=2))
    assert slots.num_blocks == 4 * 2 * 9  # four times what both slots fill: 513 positions are 9 blocks


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_blocks_are_counted_with_their_scales(tmp_path: Path, bits: int) -> None:
    path = toy_checkpoint(tmp_path / "x")
    p = plan(path, cache=Cache(cache_max_bytes=1 << 20, cache_block_seq_len=64, quant_policy=bits))
    assert p.block_bytes == 2 * (2 * 2 * 64 * (16 * bits // 8 + 4)) and p.num_blocks == (1 << 20) // p.block_bytes
    kv = ReferenceBackend().make_kv(kv_layout(Config(cache=Cache(quant_policy=bits)), load_spec(path), 2, "float32"), p.num_blocks)
    assert kv.nbytes == p.kv_bytes


def test_heads_that_no_kernel_reads_in_few_bits_are_refused(tmp_path: Path) -> None:
    spec = dataclasses.replace(load_spec(toy_checkpoint(tmp_path / "x")), head_dim=96)
    card = Config(engine=Engine(device="cuda"), cache=Cache(quant_policy=4))
    with pytest.raises(
        ConfigError, match="quant_policy = 4 on cuda needs a head_dim that is a multiple of 64; this model's is 96. Set it to 8 or 0"
    ):
        kv_layout(card, spec, 2, "float16")
    with pytest.raises(ConfigError, match="Set it to 0"):
        kv_layout(card, dataclasses.replace(spec, head_dim=80), 2, "float16")
    assert kv_layout(dataclasses.replace(card, cache=Cache(quant_policy=8)), spec, 2, "float16").row_bytes == 96


def test_the_share_of_what_is_free(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    fixed = plan(path)
    free = fixed.weight_bytes + fixed.workspace_bytes + (8 << 20)
    p = plan(path, free, cache=Cache(cache_max_entry_count=0.5))
    assert p.kv_bytes == 4 << 20


def test_the_ranks_share_the_machine(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    p = plan(path, 2 * GIB, engine=Engine(tp=2))
    assert p.free_bytes == GIB and p.ranks == 2 and "each of 2 ranks" in p.table()


def test_a_shortfall_names_the_key_that_mends_it(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x")
    enough = plan(path)
    fixed = enough.weight_bytes + enough.workspace_bytes
    assert "model.dtype = 'bfloat16'" in plan(path, fixed // 2).shortfall
    assert "fewer bits" in plan(path, 1 << 16, dtype="bfloat16").shortfall
    many = plan(path, fixed + (1 << 20), cache=Cache(num_blocks=1000))
    assert "cache.num_blocks = 1000" in many.shortfall and "at most 32 or 0" in many.shortfall
    assert not plan(path, fixed + (1 << 20), cache=Cache(num_blocks=32)).shortfall
    none = plan(path, fixed + (1 << 20), cache=Cache(cache_max_entry_count=0.01))
    assert none.num_blocks == 0 and "cache.cache_max_entry_count" in none.shortfall
    assert "cache.cache_max_bytes" in plan(path, cache=Cache(cache_max_bytes=1000)).shortfall
    short = plan(path, cache=Cache(num_blocks=3))
    assert "engine.session_len to at most 192" in short.shortfall
    assert not plan(path, cache=Cache(num_blocks=3), engine=Engine(session_len=192)).shortfall
    assert short.table().splitlines()[-1] == short.shortfall


def test_the_table_adds_up(tmp_path: Path) -> None:
    p = plan(toy_gguf(tmp_path / "x.gguf", hidden=256))
    rows = {line[:44].strip(): float(line[44:]) for line in p.table().splitlines()[1:-1]}
    parts = sum(value for name, value in rows.items() if name.startswith(("weights", "workspace", "KV cache")))
    assert parts == pytest.approx(rows["together"], abs=0.05 * len(rows))
    assert rows["together"] == pytest.approx((p.weight_bytes + p.workspace_bytes + p.kv_bytes) / 2**20, abs=0.05)


def test_a_mock_has_no_memory_to_plan(tmp_path: Path) -> None:
    config = Config(engine=Engine(device="mock"))
    with pytest.raises(ConfigError, match="mock"):
        plan_memory(config, resolve_spec(config), tmp_path, GIB)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_awq_weights_are_counted_as_the_backend_holds_them(tmp_path: Path, dtype: str) -> None:
    path, _ = awq_checkpoint(tmp_path, hidden=128, vocab_size=272, dense=("v_proj",))
    assert held_by_the_cpu(path, dtype) == weight_bytes(path, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "types", ["Q4_1", "Q4_K", "Q5_0", "Q8_0", "Q6_K", {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q4_1", "up": "Q4_1"}]
)
def test_the_plan_is_what_the_backend_holds(tmp_path: Path, dtype: str, types: str | dict[str, str]) -> None:
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types=types, hidden=256, layers=2, vocab_size=272)  # no padding to 16 x 32
    assert held_by_the_cpu(path, dtype) == weight_bytes(path, dtype)


def weight_bytes(path: Path, dtype: str) -> int:
    parts = memory_parts(path, load_spec(path), dtype=dtype)
    return sum(size for name, size in parts.items() if name != "norms and biases")


def held_by_the_cpu(path: Path, dtype: str) -> int:
    from engine.cpu.backend import CpuBackend
    from engine.models.decoder import Decoder
    from engine.parallel import Ranks

    spec = load_spec(path)
    decoder = Decoder(spec, open_checkpoint(path, spec), CpuBackend(spec, dtype, 1), Ranks(), session_len=64, exact=dtype == "float32")
    linears = [decoder.head.weight, decoder.embedding]
    linears += [part.weight for layer in decoder.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum(linear.packed.data.nbytes for linear in linears)
