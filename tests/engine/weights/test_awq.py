"""AWQ checkpoints (gemm layout): what their numbers are, how they are cut and stacked, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import awq, w4
from engine.awq import AWQ
from engine.errors import ConfigError, ModelError
from engine.models.layers import stack, to_dense
from engine.models.shard import make_shard
from engine.models.spec import load_spec, spec_from_config
from engine.reference import dense
from engine.sequence import SamplingParams
from engine.weight_files import expected_shapes, take_stock
from engine.weights import open_checkpoint
from tests.fixtures.awq import awq_checkpoint, awq_config
from tests.fixtures.toy import save_tensors, toy_checkpoint
from tests.harness import answers, configure, running

REVERSE = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each output channel of eight


def random_awq(n: int, k: int, group: int, seed: int = 0) -> AWQ:
    rng = np.random.default_rng(seed)
    words = lambda rows: rng.integers(-(2**31), 2**31, (rows, n // 8), dtype=np.int64).astype(np.int32)  # noqa: E731
    return AWQ(words(k), words(k // group), rng.uniform(0.003, 0.005, (k // group, n)).astype(np.float16))


def transcribed(weight: AWQ) -> np.ndarray:
    """float32 [N, K], number by number from the drawing."""
    k, n = weight.qweight.shape[0], weight.qweight.shape[1] * 8
    group = k // weight.scales.shape[0]
    out = np.empty((n, k), np.float32)
    for row in range(k):
        for column in range(n):
            shift = 4 * REVERSE[column % 8]
            q = (int(weight.qweight[row, column // 8]) >> shift) & 15
            zero = (int(weight.qzeros[row // group, column // 8]) >> shift) & 15
            out[column, row] = float(weight.scales[row // group, column]) * (q - zero)
    return out


# ---- the numbers


@pytest.mark.parametrize("n, k, group", [(8, 32, 32), (24, 128, 64), (16, 256, 128), (40, 96, 32), (520, 64, 32)])
def test_numbers_are_those_of_the_drawing(n: int, k: int, group: int) -> None:
    weight = random_awq(n, k, group)
    assert (weight.out_features, weight.in_features, weight.group_size) == (n, k, group)
    canonical = awq.to_w4(weight)
    assert canonical.group_size == group and canonical.qweight.flags.c_contiguous and canonical.scale.flags.c_contiguous
    np.testing.assert_array_equal(w4.dequantize(canonical), transcribed(weight))
    np.testing.assert_array_equal(dense(weight), transcribed(weight))


def test_one_int32_by_hand() -> None:
    word = np.array([[0x76543210]], np.int32)
    assert awq.unpack(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert awq.unpack(awq.symmetric_zeros(3, 16)).tolist() == [[8] * 16] * 3


def test_slices_and_stacks() -> None:
    weight = random_awq(48, 256, 64)
    whole = transcribed(weight)
    np.testing.assert_array_equal(dense(weight.rows(8, 32)), whole[8:32])
    np.testing.assert_array_equal(dense(weight.columns(64, 192)), whole[:, 64:192])
    np.testing.assert_array_equal(dense(weight.rows(40, 48).columns(0, 64)), whole[40:48, :64])
    assert np.shares_memory(weight.rows(8, 32).qweight, weight.qweight)
    stacked = stack([weight.rows(0, 8), weight.rows(40, 48), weight.rows(8, 32)])
    assert isinstance(stacked, AWQ)
    np.testing.assert_array_equal(dense(stacked), np.concatenate([whole[:8], whole[40:], whole[8:32]]))
    mixed = stack([weight.rows(0, 8), torch.ones(4, 256, dtype=torch.float16)])
    assert isinstance(mixed, torch.Tensor) and mixed.shape == (12, 256)
    torch.testing.assert_close(mixed[:8], torch.from_numpy(whole[:8]).to(torch.float16), rtol=0, atol=0)
    for cut in (lambda: weight.rows(4, 16), lambda: weight.rows(0, 47), lambda: weight.columns(32, 64), lambda: weight.columns(0, 250)):
        with pytest.raises(ValueError, match="in two"):
            cut()


# ---- checkpoints


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("shards", [1, 5])
def test_a_checkpoint_and_its_dense_twin(tmp_path: Path, family: str, zero_point: bool, shards: int) -> None:
    """Tensors of one linear may lie in several files; biases, norms, head and embedding are dense."""
    quantized, twin = awq_checkpoint(tmp_path, family, zero_point=zero_point, shards=shards, layers=1)
    spec, plain = load_spec(quantized), load_spec(twin)
    checkpoint, expected = open_checkpoint(quantized, spec), open_checkpoint(twin, plain)
    assert spec.awq is not None and plain.awq is None and spec.dtype == "float16"
    for canonical, shape in expected_shapes(spec).items():
        name, suffix = canonical.rsplit(".", 1)
        got = checkpoint.bias(name) if suffix == "bias" else checkpoint.weight(name)
        want = expected.bias(name) if suffix == "bias" else expected.weight(name)
        assert isinstance(got, AWQ) == (len(shape) == 2 and name not in ("embed", "lm_head"))
        np.testing.assert_array_equal(dense(got), dense(want))
        if isinstance(got, AWQ):
            assert (got.out_features, got.in_features) == shape
            assert not got.qweight.flags.writeable and not got.qweight.flags.owndata  # the file itself
            rounded = torch.from_numpy(dense(want)).to(torch.float16)
            torch.testing.assert_close(checkpoint.weight(name, dense=True), rounded, rtol=0, atol=0)
            torch.testing.assert_close(to_dense(got), rounded, rtol=0, atol=0)
    checkpoint.finish()


def test_slices_of_a_checkpoint(tmp_path: Path) -> None:
    quantized, _ = awq_checkpoint(tmp_path, hidden=128, layers=1)
    checkpoint = open_checkpoint(quantized, load_spec(quantized))
    whole = checkpoint.weight("layers.0.down", dense=True).float().numpy()
    for rows in (slice(None), slice(0, 64), slice(64, 128), slice(3, 77), slice(127, 128)):
        for columns in (slice(None), slice(0, 128), slice(96, 256), slice(5, 70), slice(255, 256)):
            part = checkpoint.weight("layers.0.down", rows=rows, columns=columns)
            whole_groups = rows.indices(128)[0] % 8 == rows.indices(128)[1] % 8 == 0
            whole_groups &= columns.indices(256)[0] % 32 == columns.indices(256)[1] % 32 == 0
            assert isinstance(part, AWQ) == whole_groups
            np.testing.assert_array_equal(dense(part).astype(np.float16).astype(np.float32), whole[rows, columns])
            np.testing.assert_array_equal(
                checkpoint.weight("layers.0.down", rows=rows, columns=columns, dense=True).float().numpy(), whole[rows, columns]
            )


def test_linears_that_were_left_alone(tmp_path: Path) -> None:
    quantized, twin = awq_checkpoint(tmp_path, dense=("v_proj", "layers.1.mlp"), layers=2)
    checkpoint, expected = (open_checkpoint(path, load_spec(path)) for path in (quantized, twin))
    for name, form in {"layers.0.v": torch.Tensor, "layers.1.up": torch.Tensor, "layers.0.up": AWQ, "layers.1.q": AWQ}.items():
        assert isinstance(checkpoint.weight(name), form)
    stacked = [stack([c.weight(f"layers.0.{part}") for part in "qkv"]) for c in (checkpoint, expected)]
    assert isinstance(stacked[0], torch.Tensor)
    torch.testing.assert_close(stacked[0].float(), stacked[1].to(torch.float16).float(), rtol=0, atol=0)


def benchmark_checkpoint(path: Path, hidden: int = 256, heads: int = 4, kv: int = 2, inner: int = 384, vocab: int = 512) -> Path:
    """As the writer of the checkpoints that the benchmarks use has them, in small: random bits, one file a layer and an index."""
    path.mkdir()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads, "intermediate_size": inner,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float16", "bos_token_id": 500, "eos_token_id": 501,
        "attention_bias": False, "mlp_bias": False,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None,
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 500, "eos_token_id": 501}))
    generator = torch.Generator().manual_seed(0)

    def linear(name: str, k: int, n: int, into: dict[str, torch.Tensor]) -> None:
        into[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (k, n // 8), dtype=torch.int32, generator=generator)
        into[f"{name}.qzeros"] = torch.full((k // 128, n // 8), -2004318072, dtype=torch.int32)
        into[f"{name}.scales"] = (torch.rand(k // 128, n, generator=generator) * 0.002 + 0.003).half()

    index: dict[str, str] = {}
    for i in range(3):
        tensors: dict[str, torch.Tensor] = {}
        if i < 2:
            base = f"model.layers.{i}."
            for name, k, n in (("q", hidden, hidden), ("k", hidden, hidden // heads * kv), ("v", hidden, hidden // heads * kv)):
                linear(f"{base}self_attn.{name}_proj", k, n, tensors)
            linear(base + "self_attn.o_proj", hidden, hidden, tensors)
            for name, k, n in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
                linear(f"{base}mlp.{name}_proj", k, n, tensors)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{base}{name}.weight"] = torch.ones(hidden).half()
        else:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = (torch.randn(vocab, hidden, generator=generator) * 0.02).half()
            tensors["model.norm.weight"] = torch.ones(hidden).half()
        save_tensors(path, tensors)
        (path / "model.safetensors").rename(path / f"model-{i:05d}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{i:05d}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def ids(path: Path, **engine: Any) -> list[list[int]]:
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(20, 61))]

    async def run() -> list[list[int]]:
        dtype = engine.pop("dtype", "float32")
        config = configure(
            model={"path": str(path), "dtype": dtype},
            engine={"device": "cpu", "max_batch_size": 4, "session_len": 96} | engine,
            cache={"num_blocks": 32, "cache_block_seq_len": 16},
        )
        async with running(config) as started:
            return await answers(started, prompts, SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True), together=True)

    return asyncio.run(run())


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("engine", [{"device": "reference"}, {}, {"tp": 2}], ids=["reference", "cpu", "cpu, two ranks"])
def test_ids_equal_those_of_the_dense_twin(tmp_path: Path, group: int, engine: dict[str, Any]) -> None:
    quantized, twin = awq_checkpoint(tmp_path, group=group, hidden=128, tie_word_embeddings=group == 64)
    assert ids(quantized, **engine) == ids(twin, device="reference")


def test_ids_in_four_bits_equal_those_of_the_dense_twin(tmp_path: Path) -> None:
    """bfloat16 on the CPU computes with the 4-bit weights themselves."""
    quantized, twin = awq_checkpoint(tmp_path, hidden=128)
    assert ids(quantized, dtype="bfloat16")[0][:4] == ids(twin, device="reference")[0][:4]


def test_a_checkpoint_of_the_benchmarks_runs(tmp_path: Path) -> None:
    path = benchmark_checkpoint(tmp_path / "x")
    spec = load_spec(path)
    checkpoint = open_checkpoint(path, spec)
    weight = checkpoint.weight("layers.1.down")
    assert isinstance(weight, AWQ) and weight.group_size == 128
    np.testing.assert_array_equal(dense(weight), transcribed(weight))
    assert ids(path) == ids(path, device="reference")


# ---- refusals


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        spec = load_spec(path)
        checkpoint = open_checkpoint(path, spec)
        checkpoint.weight("layers.0.q")
    return str(caught.value)


def test_what_the_configuration_may_say(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    for change, reason in (
        ({"version": "gemv"}, "version: gemv is not supported; supported: gemm"),
        ({"version": "exllama"}, "version: exllama is not supported"),
        ({"version": "marlin"}, "version: marlin is not supported"),
        ({"version": 3}, "version: 3 is not a string"),
        ({"bits": 8}, "bits: 8 is not supported; supported: 4"),
        ({"bits": None}, "bits: missing"),
        ({"group_size": -1}, "group_size: -1 (one scale for all of an output channel) is not supported; supported: 32, 64, 128"),
        ({"group_size": 48}, "group_size: 48 is not supported"),
        ({"group_size": None}, "group_size: missing"),
        ({"zero_point": 1}, "zero_point: 1 is not true or false"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: 'lm_head' is not a list of strings"),
        ({"desc_act": True}, "desc_act: True is not supported"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        assert refusal(path).startswith(f"config.json:quantization_config.{reason}")
    for method in ("bitsandbytes", None):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        assert refusal(path).startswith("config.json:quantization_config: quantized by ") and "supported: AWQ (version gemm)" in refusal(
            path
        )
    more = {"backend": "autoawq", "do_fuse": False, "fuse_max_seq_len": None, "exllama_config": None, "version": "GEMM"}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | more}))
    assert load_spec(path).awq is not None


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path)
    good = tensors_of(path)
    q = "model.layers.0.self_attn.q_proj"
    broken = good[f"{q}.scales"].clone()
    broken[1, 5] = float("nan")
    for change, reason in (
        ({f"{q}.qzeros": None}, f"missing: {q}.qzeros"),
        ({f"{q}.scales": None, f"{q}.qweight": None}, f"missing: {q}.qweight, {q}.scales"),
        ({f"{q}.qweight": torch.zeros(64, 7, dtype=torch.int32)}, f"{q}.qweight: I32 (64, 7), the model's configuration wants I32 (64, 8)"),
        ({f"{q}.qzeros": torch.zeros(1, 8, dtype=torch.int32)}, f"{q}.qzeros: I32 (1, 8), the model's configuration wants I32 (2, 8)"),
        ({f"{q}.scales": torch.zeros(2, 64)}, f"{q}.scales: F32 (2, 64), the model's configuration wants F16 (2, 64)"),
        ({f"{q}.scales": broken}, f"{q}.scales: a scale is not a finite number"),
        ({f"{q}.weight": torch.zeros(64, 64)}, f"{q}.weight: is a dense weight; quantization_config says that this linear is quantized"),
        ({f"{q}.g_idx": torch.zeros(64, dtype=torch.int32)}, f"tensors that the model's configuration has no use for: {q}.g_idx"),
    ):
        save_tensors(path, {k: v for k, v in (good | change).items() if v is not None})
        assert refusal(path) == f"model.safetensors: {reason}"
    save_tensors(path, good)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["q_proj"]
    (path / "config.json").write_text(json.dumps(config))
    assert refusal(path) == f"model.safetensors: missing: {q}.weight, {q.replace('0', '1')}.weight"
    config["quantization_config"] |= {"group_size": 128, "modules_to_not_convert": None}
    (path / "config.json").write_text(json.dumps(config))
    assert "64 output and 64 input channels are no whole int32s of 8 and groups of 128" in refusal(path)
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert refusal(path).startswith("model.safetensors: missing: ")


def test_without_zero_points(tmp_path: Path) -> None:
    """zero_point = false: a file without qzeros has zeros of 8; one with them is read as it is."""
    path, _ = awq_checkpoint(tmp_path, zero_point=False)
    spec = load_spec(path)
    good = tensors_of(path)
    assert not any("qzeros" in name for name in good)
    before = dense(open_checkpoint(path, spec).weight("layers.0.q"))
    save_tensors(path, good | {"model.layers.0.self_attn.q_proj.qzeros": torch.full((2, 8), 0x77777777, dtype=torch.int32)})
    weight = open_checkpoint(path, spec).weight("layers.0.q")
    assert isinstance(weight, AWQ)
    np.testing.assert_allclose(dense(weight) - before, np.repeat(weight.scales.T.astype(np.float32), 32, axis=1), rtol=1e-6)


def test_a_quantized_head_is_read_as_one(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path, vocab_size=264)
    good = tensors_of(path)
    head = {f"lm_head.{k.rsplit('.', 1)[1]}": v for k, v in good.items() if ".0.self_attn.q_proj." in k}
    head = {k: torch.cat([v] * 5, dim=1)[:, : 264 if "scales" in k else 33].contiguous() for k, v in head.items()}
    save_tensors(path, {k: v for k, v in good.items() if k != "lm_head.weight"} | head)
    weight = open_checkpoint(path, load_spec(path)).weight("lm_head")
    assert isinstance(weight, AWQ) and weight.out_features == 264


# ---- shares of ranks

SHAPES = {  # hidden, heads, KV heads, head_dim, intermediate
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336),
    "Llama-3.1-70B": (8192, 64, 8, 128, 28672),
    "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "Qwen2.5-14B": (5120, 40, 8, 128, 13824),
    "Qwen2.5-32B": (5120, 40, 8, 128, 27648),
    "Qwen2.5-72B": (8192, 64, 8, 128, 29568),
}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("model", SHAPES)
def test_shares_are_whole_groups(model: str, size: int) -> None:
    hidden, heads, kv_heads, head_dim, inner = SHAPES[model]
    config = awq_config(group=128, hidden=hidden, heads=heads, kv_heads=kv_heads, intermediate_size=inner, head_dim=head_dim)
    spec = spec_from_config(config, {})
    if model == "Qwen2.5-7B" and size == 8:  # 28 heads
        with pytest.raises(ConfigError, match=r"engine\.tp = 8 does not fit 28 heads over 4 KV heads; use fewer ranks"):
            make_shard(spec, 0, size)
        return
    shards = [make_shard(spec, rank, size) for rank in range(size)]
    assert [s.intermediate.start for s in shards] + [inner] == [0] + [s.intermediate.stop for s in shards]
    for shard in shards:
        width = shard.intermediate.stop - shard.intermediate.start
        assert width % 128 == 0 and abs(width - inner / size) < 128
        assert shard.heads.start * head_dim % 128 == shard.heads.stop * head_dim % 128 == 0
        assert shard.num_heads * size == heads and shard.num_kv_heads * size == max(kv_heads, size)
    assert {s.intermediate.stop - s.intermediate.start for s in shards} == {inner // 128 // size * 128, -(-inner // 128 // size) * 128}


def test_shares_that_cut_a_group(tmp_path: Path) -> None:
    half = spec_from_config(awq_config(group=128, hidden=896, heads=14, kv_heads=2, intermediate_size=4864), {})
    make_shard(half, 0, 1)
    with pytest.raises(ConfigError) as caught:
        make_shard(half, 0, 2)
    assert str(caught.value) == (
        "engine.tp = 2 gives a rank heads' outputs 0 to 447, which cuts a group of 128 of this AWQ checkpoint in two; use fewer ranks."
    )
    narrow = spec_from_config(awq_config(group=128, hidden=512, heads=8, kv_heads=8, intermediate_size=384, head_dim=128), {})
    with pytest.raises(ConfigError, match="intermediate channels 0 to 63, which cuts a group of 128"):
        make_shard(narrow, 0, 4)
    path = toy_checkpoint(tmp_path / "dense", hidden=896, heads=14, kv_heads=2)
    assert make_shard(load_spec(path), 0, 2).num_heads == 7  # a dense one may be cut there


def test_stock_lists_one_parameter_a_linear(tmp_path: Path) -> None:
    path, _ = awq_checkpoint(tmp_path, layers=1)
    stored = take_stock(path, load_spec(path))["layers.0.gate.weight"]
    assert (stored.type, stored.shape, [part.name.rsplit(".")[-1] for part in stored.parts]) == (
        "AWQ",
        (128, 64),
        ["qweight", "qzeros", "scales"],
    )
