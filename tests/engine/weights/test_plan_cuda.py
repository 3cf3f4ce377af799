"""The plan for a card: formulas of real shapes, the optional copy, one spare block, and what is said without a card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from config.schema import Cache, Config, Engine, Model
from engine import plan, plan_cuda
from engine.build import resolve_spec
from engine.cards import Card
from engine.errors import ConfigError
from engine.models.shard import largest_share
from engine.models.spec import ModelSpec, load_spec, spec_from_config
from engine.plan import MemoryPlan, free_memory, plan_memory
from engine.plan_cuda import CardWeights, card_weights, makes_dense_copy
from engine.w4 import W4, cuda_w4_bytes
from engine.weight_files import Stored, expected_shapes, take_stock
from tests.fixtures.awq import awq_checkpoint, awq_config
from tests.fixtures.toy import toy_checkpoint, toy_gguf

GIB = 1 << 30


def config_of(path: Path, cache: Cache | None = None, **engine: object) -> Config:
    knobs = Engine(device="cuda", **engine)  # type: ignore[arg-type]
    return Config(model=Model(path=str(path)), engine=knobs, cache=cache or Cache())


def planned(path: Path, free: int = 80 * GIB, cache: Cache | None = None, **engine: object) -> MemoryPlan:
    config = config_of(path, cache, **engine)
    return plan_memory(config, resolve_spec(config), path, free)


class NoFile:
    """Where a parameter of a model that exists only as a shape lies."""

    path = Path("none")

    def raw(self, name: str) -> np.ndarray:
        raise AssertionError("the plan reads no tensor data")


def shape_only(spec: ModelSpec) -> dict[str, Stored]:
    """The stock of an AWQ checkpoint of this shape, without one."""
    linears = ("q", "k", "v", "o", "gate", "up", "down")
    return {
        name: Stored(NoFile(), name, shape, "AWQ" if name.split(".")[-2] in linears and len(shape) == 2 else "F16")
        for name, shape in expected_shapes(spec).items()
    }


def weights_of(tp: int, **config: object) -> CardWeights:
    spec = spec_from_config(awq_config(group=128, **config), {})  # type: ignore[arg-type]
    return card_weights(shape_only(spec), spec, largest_share(spec, tp), tp)


LLAMA_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
QWEN_7B = {"layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}


def test_bytes_of_a_matrix() -> None:
    assert cuda_w4_bytes(6144, 4096, 128) == 6144 * 4096 // 2 + 6144 * 32 * 4
    assert cuda_w4_bytes(1, 32, 32) == 64 * 16 + 64 * 4 == cuda_w4_bytes(64, 1, 32)
    assert cuda_w4_bytes(65, 129, 128) == cuda_w4_bytes(128, 256, 128)


def test_a_model_of_8b() -> None:
    one = weights_of(1, **LLAMA_8B)
    elements = {"attention": 4096 * (6144 + 4096), "mlp": 3 * 4096 * 14336}
    for name, count in elements.items():
        assert one.parts[name] == 32 * (count // 2 + count // 128 * 4)
    assert one.parts["embedding"] == one.parts["output head"] == 2 * 128256 * 4096
    assert one.copy_bytes == 32 * 2 * sum(elements.values()) and one.scratch_bytes == 2 * 28672 * 4096
    eight = weights_of(8, **LLAMA_8B)
    for name in ("attention", "mlp", "output head"):
        assert eight.parts[name] * 8 == one.parts[name]
    assert eight.parts["embedding"] == one.parts["embedding"]


def test_uneven_shares_count_the_largest() -> None:
    four = weights_of(4, **QWEN_7B)
    assert four.parts["mlp"] * 4 == weights_of(1, **QWEN_7B).parts["mlp"]
    large = {"layers": 2, "hidden": 8192, "heads": 64, "kv_heads": 8, "intermediate_size": 29568, "vocab_size": 152064}
    eight = weights_of(8, **large)  # 231 groups of 128
    assert eight.parts["mlp"] == 2 * (cuda_w4_bytes(2 * 29 * 128, 8192, 128) + cuda_w4_bytes(8192, 29 * 128, 128))


def test_forms(tmp_path: Path) -> None:
    """Stacks of one 4-bit form stay 4-bit; 8-bit weights, odd types, mixed stacks and the embedding are 16-bit."""
    types = {
        "q": "Q4_K",
        "k": "Q4_K",
        "v": "Q6_K",
        "o": "Q4_0",
        "gate": "Q4_1",
        "up": "Q4_0",
        "down": "Q8_0",
        "embed": "Q4_0",
        "lm_head": "Q4_K",
    }
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types=types, hidden=256, layers=3)
    spec = load_spec(path)
    stock, share = take_stock(path, spec), largest_share(spec, 1)
    weights = card_weights(stock, spec, share, 1)
    h, kv, inner = 256, 128, 512
    assert weights.parts["attention"] == 3 * (2 * (h + 2 * kv) * h + h * h * 5 // 8)
    assert weights.parts["mlp"] == 3 * (2 * inner * h * 5 // 8 + 2 * inner * h)
    assert weights.parts["embedding"] == 2 * 260 * h and weights.parts["output head"] == cuda_w4_bytes(260, h, 32)
    assert weights.copy_bytes == 2 * (3 * (h * h + 2 * inner * h) + 260 * h) and weights.scratch_bytes == 2 * 2 * inner * h
    assert weights.parts["norms and biases"] == 4 * (3 * (2 * h + h + 2 * kv) + h)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_table(tmp_path: Path, tp: int) -> None:
    path = toy_gguf(tmp_path / "x.gguf", "qwen2", types="Q4_0", hidden=128, tie_word_embeddings=True)
    spec = load_spec(path)
    weights = card_weights(take_stock(path, spec), spec, largest_share(spec, tp), tp)
    assert weights.parts["output head"] == (0 if tp == 1 else cuda_w4_bytes(130, 128, 32))
    assert weights.parts["embedding"] == 2 * 260 * 128


def test_the_decoder_hands_over_what_was_counted(tmp_path: Path) -> None:
    """A backend that weighs what it is given in the layout of the card."""
    from engine.awq import AWQ
    from engine.models.decoder import Decoder
    from engine.parallel import Ranks
    from engine.reference import ReferenceBackend
    from engine.weights import open_checkpoint

    class Scales(ReferenceBackend):
        def __init__(self) -> None:
            self.nbytes = 0

        def prepare_linear(self, weight, bias):  # type: ignore[no-untyped-def]
            if isinstance(weight, W4 | AWQ):
                self.nbytes += cuda_w4_bytes(weight.out_features, weight.in_features, weight.group_size)
            else:
                self.nbytes += 2 * weight.numel()
            return super().prepare_linear(weight, bias)

        def prepare_embedding(self, weight):  # type: ignore[no-untyped-def]
            self.nbytes += 2 * weight.numel()
            return super().prepare_embedding(weight)

    path, _ = awq_checkpoint(tmp_path, hidden=256, group=64, dense=("layers.1.self_attn.k_proj",))
    spec, backend = load_spec(path), Scales()
    Decoder(spec, open_checkpoint(path, spec, views=True), backend, Ranks(), session_len=64, exact=False)
    weights = card_weights(take_stock(path, spec), spec, largest_share(spec, 1), 1)
    assert backend.nbytes == sum(weights.parts.values()) - weights.parts["norms and biases"]


def test_the_copy(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert makes_dense_copy(config, 100, 400) and not makes_dense_copy(config, 100, 399) and not makes_dense_copy(config, 0, 400)
    always, never = (dataclasses.replace(config, engine=dataclasses.replace(config.engine, w4_dense_copy=v)) for v in ("true", "false"))
    assert makes_dense_copy(always, 100, 0) and not makes_dense_copy(always, 0, 400) and not makes_dense_copy(never, 100, 4000)
    path, dense = awq_checkpoint(tmp_path)
    with_copy, without = planned(path), planned(path, w4_dense_copy="false")
    assert with_copy.dense_copy and not without.dense_copy and not planned(dense).dense_copy
    assert with_copy.weights["16-bit copy"] == 2 * 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128) and without.weights["16-bit copy"] == 0
    assert with_copy.workspace["dequantized matrix"] == 0 and without.workspace["dequantized matrix"] == 2 * 2 * 128 * 64


def test_a_spare_block_and_no_bound_in_bytes(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path)
    p = planned(path, cache=Cache(cache_max_bytes=1, cache_block_seq_len=16), max_batch_size=4)
    assert p.spare_blocks == 1 and p.num_blocks == 4 * 4 * 33 and p.kv_bytes == (p.num_blocks + 1) * p.block_bytes
    assert p.dtype == "float16" and p.block_bytes == 2 * 2 * 2 * 16 * 16 * 2 and not p.shortfall
    fixed = p.weight_bytes + p.workspace_bytes
    for blocks in (6, 5):  # five and the spare one
        exact = planned(path, fixed + blocks * p.block_bytes, Cache(cache_block_seq_len=16, num_blocks=5), max_batch_size=4)
        assert exact.kv_bytes == 6 * p.block_bytes
        assert exact.shortfall.startswith("One sequence of 512" if blocks == 6 else "Too little memory: cache.num_blocks = 5")
    table = p.table()
    assert "memory (cuda), float16" in table and f"{p.num_blocks} + 1 blocks" in table and "workspace: CUDA context" in table


def test_a_shortfall_names_what_mends_it(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path)
    p = planned(path, w4_dense_copy="false")
    need = p.weight_bytes + p.workspace_bytes
    assert "engine.w4_dense_copy = 'false'" in planned(path, need + 1000, w4_dense_copy="true").shortfall
    assert "lower engine.max_prefill_token_num, raise engine.tp" in planned(path, need // 2).shortfall
    none = planned(path, need + 3 * p.block_bytes, w4_dense_copy="false", cache=Cache(cache_max_entry_count=0.1, cache_max_bytes=1))
    assert none.num_blocks == 0 and "raise cache.cache_max_entry_count" in none.shortfall


def test_lines_are_buffers(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path / "x", dtype="bfloat16")
    p = planned(path, max_batch_size=8, max_prefill_token_num=32)
    heads, kv = 4 * 16, 2 * 16
    assert p.workspace["activations"] == 2 * 32 * (4 * 64 + (heads + 2 * kv) + heads + 3 * 128) + 2 * (8 + 64) * 64
    assert p.workspace["logits"] == (8 + 64) * 260 * 4 and p.workspace["rope tables"] == 513 * 16 * 4
    assert p.workspace["batch tables"] == 9 * (513 + 9) * 4
    assert p.dtype == "bfloat16" and p.ranks == 1
    assert planned(path, tp=2).free_bytes == p.free_bytes  # a card each


# ---- how much there is


def cards_are(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    monkeypatch.setattr(plan, "cards", lambda: [Card("a card", (9, 0), 2 * f, f) for f in free])


def test_memory_of_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards_are(monkeypatch, 60 * GIB, 50 * GIB, GIB)
    assert free_memory(config_of(tmp_path)) == 60 * GIB and free_memory(config_of(tmp_path, tp=2)) == 50 * GIB
    assert free_memory(config_of(tmp_path, device_memory_gib=10.5)) == 10.5 * GIB
    assert free_memory(config_of(tmp_path, device_memory_gib=70.0)) == 60 * GIB
    with pytest.raises(ConfigError, match=r"engine\.tp = 4, and the driver shows 3 cards here; set engine\.device_memory_gib"):
        free_memory(config_of(tmp_path, tp=4))
    assert free_memory(config_of(tmp_path, tp=4, device_memory_gib=80.0)) == 80 * GIB


def test_a_machine_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards_are(monkeypatch)
    with pytest.raises(ConfigError, match=r"the driver shows 0 cards here; set engine\.device_memory_gib to the memory of one card"):
        free_memory(config_of(tmp_path))
    assert free_memory(config_of(tmp_path, device_memory_gib=141.0)) == 141 * GIB
    assert 0 < free_memory(Config(engine=Engine(device="cpu"))) < 1 << 50


def test_formulas_are_those_of_who_allocates() -> None:
    pytest.importorskip("numba_cuda")
    from engine.cuda.paged_attention import PagedDecode
    from engine.cuda.state import State
    from tests.ptx.device import EmulatedDevice

    state = State(EmulatedDevice(), 2, 100, 64, trash=9)
    assert plan_cuda.state_bytes(2, 100, 64) == 4 * 3 * (101 + 2) == state.ids.nbytes + state.tables.nbytes
    assert plan_cuda.sampling_bytes(3, 33) == 4 * (2 * 33 + 2 * 4) + 4 * 3 * 33
    for heads, kv_heads, head_dim, multiprocessors in (
        (32, 8, 128, 132),
        (28, 4, 128, 132),
        (9, 3, 64, 132),
        (32, 32, 128, 108),
        (4, 1, 256, 84),
    ):
        spec = spec_from_config(awq_config(hidden=heads * head_dim, heads=heads, kv_heads=kv_heads), {})
        held = PagedDecode(None, heads, kv_heads, head_dim, 64, "float16", 256, multiprocessors, (9, 0)).scratch_bytes  # type: ignore[arg-type]
        planned_bytes = plan_cuda.attention_bytes(spec, largest_share(spec, 1))
        assert planned_bytes / 8 < held < 2 * planned_bytes, (heads, held, planned_bytes)
