"""LMDeploy 0.1's workspace: bytes checked by a reader written from the drawing alone, and served with the same ids."""

from __future__ import annotations

import asyncio
import base64
import configparser
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import quant.workspace
from engine import turbomind
from engine.awq import unpack
from engine.errors import ConfigError, EngineError, ModelError
from engine.models.spec import load_spec
from engine.sequence import SamplingParams
from engine.weight_files import expected_shapes, take_stock
from engine.weights import open_checkpoint
from formats.workspace import KEYS, is_workspace
from quant.workspace import convert
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint, toy_gguf
from tests.harness import answers, configure, running

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPTS = [[241], [160, 175, 229, 148, 198], [213, 57, 14, 76, 72, 223, 233, 1, 127, 210, 33, 204, 30, 119, 209, 77, 87]]
TOKENIZER = "tokenizer_config.json"


def checkpoint(path: Path, family: str = "llama", **more: Any) -> Path:
    path = toy_checkpoint(path, family, **{"dtype": "float16"} | more)
    (path / TOKENIZER).write_text("{}")
    if family == "qwen":  # whose config.json has no ids of BOS and EOS: 256 bytes, then the control tokens
        lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
        (path / "qwen.tiktoken").write_text("\n".join(lines))
    return path


def ids_of(path: Path, **engine: Any) -> list[list[int]]:
    config = configure(
        model={"path": str(path), "dtype": "float32"},
        engine={"device": "cpu", "max_batch_size": 8, "session_len": 128} | engine,
        cache={"num_blocks": 64, "cache_block_seq_len": 16},
    )

    async def run() -> list[list[int]]:
        async with running(config) as started:
            return await answers(started, PROMPTS, GREEDY, together=True)

    return asyncio.run(run())


def settings(workspace: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(workspace / "triton_models/weights/config.ini")
    assert parser.sections() == ["llama"]
    return dict(parser["llama"])


def change(workspace: Path, **values: Any) -> None:
    path = workspace / "triton_models/weights/config.ini"
    given = settings(workspace) | {k: str(v) for k, v in values.items()}
    path.write_text("[llama]\n" + "".join(f"{k} = {v}\n" for k, v in given.items()))


# ---- bytes


def raw(workspace: Path, name: str, *shape: int, kind: str = "<f2") -> np.ndarray:
    return np.fromfile(workspace / "triton_models/weights" / name, kind).reshape(shape)


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as TurboMind rotates them: of each head 0, d/2, 1, d/2 + 1, ..."""
    dim = len(weight) // heads
    order = [h * dim + i + half * dim // 2 for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return weight[order]


@pytest.mark.parametrize("tp", [1, 2])
def test_every_file_is_as_drawn(tp: int, tmp_path: Path) -> None:
    """InternLM-1 (bias on q, k, v and o), vocabulary of 261: padded for two ranks."""
    source = checkpoint(tmp_path / "hf", "internlm", vocab_size=261)
    made = convert(source, tmp_path / "workspace", model_name="internlm-chat-7b", tp=tp)
    w, t = tmp_path / "workspace", load_file(source / "model.safetensors")
    share, half = 64 // tp, 32 // tp
    names = set()
    for i in range(2):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        q, k = paired(t[f"{a}.q_proj.weight"], 4), paired(t[f"{a}.k_proj.weight"], 2)
        qb, kb = paired(t[f"{a}.q_proj.bias"], 4), paired(t[f"{a}.k_proj.bias"], 2)
        for r in range(tp):
            heads, kv = slice(r * share, (r + 1) * share), slice(r * half, (r + 1) * half)
            inner = slice(r * 128 // tp, (r + 1) * 128 // tp)
            qkv = np.concatenate([q[heads], k[kv], t[f"{a}.v_proj.weight"][kv]])
            expected = {
                f"attention.w_qkv.{r}.weight": qkv.T,
                f"attention.w_qkv.{r}.bias": np.concatenate([qb[heads], kb[kv], t[f"{a}.v_proj.bias"][kv]]),
                f"attention.wo.{r}.weight": t[f"{a}.o_proj.weight"][:, heads].T,
                f"attention.wo.{r}.bias": t[f"{a}.o_proj.bias"],
                f"feed_forward.w1.{r}.weight": t[f"{m}.gate_proj.weight"][inner].T,
                f"feed_forward.w3.{r}.weight": t[f"{m}.up_proj.weight"][inner].T,
                f"feed_forward.w2.{r}.weight": t[f"{m}.down_proj.weight"][:, inner].T,
            }
            for name, values in expected.items():
                names.add(f"layers.{i}.{name}")
                np.testing.assert_array_equal(raw(w, f"layers.{i}.{name}", *values.shape), values)
        for name, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            names.add(f"layers.{i}.{name}.weight")
            np.testing.assert_array_equal(raw(w, f"layers.{i}.{name}.weight", 64), t[f"model.layers.{i}.{theirs}.weight"])
    for name, theirs in (("tok_embeddings", "model.embed_tokens"), ("output", "lm_head")):
        names.add(f"{name}.weight")
        table = raw(w, f"{name}.weight", 260 + tp if tp == 2 else 261, 64)
        np.testing.assert_array_equal(table[:261], t[f"{theirs}.weight"])
        assert not table[261:].any()
    np.testing.assert_array_equal(raw(w, "norm.weight", 64), t["model.norm.weight"])
    assert {p.name for p in (w / "triton_models/weights").iterdir()} == names | {"norm.weight", "config.ini"}
    assert (made.files, made.weight_type, made.ranks) == (len(names) + 1, "fp16", tp)


def test_config_ini_has_the_28_keys_of_the_seed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", "internlm", rms_norm_eps=1e-6, kv_heads=4)
    convert(source, tmp_path / "w", model_name="internlm-chat-7b")
    assert settings(tmp_path / "w") == {
        "model_name": "internlm-chat-7b", "tensor_para_size": "1", "head_num": "4", "kv_head_num": "4", "vocab_size": "260",
        "num_layer": "2", "inter_size": "128", "norm_eps": "1e-06", "attn_bias": "1", "start_id": "256", "end_id": "257",
        "session_len": "520", "weight_type": "fp16", "rotary_embedding": "16", "rope_theta": "10000.0", "size_per_head": "16",
        "group_size": "0", "max_batch_size": "64", "max_context_token_num": "1", "step_length": "1", "cache_max_entry_count": "0.5",
        "cache_block_seq_len": "128", "cache_chunk_size": "1", "use_context_fmha": "1", "quant_policy": "0",
        "max_position_embeddings": "512", "rope_scaling_factor": "1.0", "use_logn_attn": "0",
    }  # fmt: skip
    assert list(settings(tmp_path / "w")) == list(KEYS) and len(KEYS) == 28


def test_the_folders_are_those_of_the_seed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    (source / "modeling_own.py").write_text("raise SystemExit")
    convert(source, tmp_path / "w", model_name="llama2")
    links = {
        "model_repository/turbomind": "../triton_models/interactive",
        "model_repository/preprocessing": "../triton_models/preprocessing",
        "model_repository/postprocessing": "../triton_models/postprocessing",
        "triton_models/interactive/1/weights": "../../weights",
        "triton_models/preprocessing/1/tokenizer": "../../tokenizer",
        "triton_models/postprocessing/1/tokenizer": "../../tokenizer",
    }
    for link, target in links.items():
        assert os.readlink(tmp_path / "w" / link) == target
        assert (tmp_path / "w" / link).is_dir()
    assert {p.name for p in (tmp_path / "w/triton_models/tokenizer").iterdir()} == {"config.json", TOKENIZER}  # and no code
    assert os.access(tmp_path / "w/service_docker_up.sh", os.X_OK)
    assert {p.name for p in (tmp_path / "w").iterdir()} == {"model_repository", "triton_models", "service_docker_up.sh"}


# ---- served


@pytest.mark.parametrize("family", ["llama", "qwen2", "internlm", "internlm2", "qwen", "baichuan"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_workspace_is_the_model_it_was_made_from(family: str, tp: int, tmp_path: Path) -> None:
    """Every parameter comes back bit for bit, whatever the number of ranks."""
    source = checkpoint(tmp_path / "hf", family, vocab_size=261)
    convert(source, tmp_path / "w", model_name="base", tp=tp)
    spec, own = load_spec(tmp_path / "w"), load_spec(source)
    assert (spec.rope.theta, spec.max_position, spec.use_logn_attn) == (own.rope.theta, own.max_position, own.use_logn_attn)
    back, given = open_checkpoint(tmp_path / "w", spec), open_checkpoint(source, own)
    for name in expected_shapes(spec):
        base, suffix = name.rsplit(".", 1)
        if suffix == "bias":
            wanted = given.bias(base) if name in expected_shapes(own) else torch.zeros(64, dtype=torch.float16)
            torch.testing.assert_close(back.bias(base), wanted, rtol=0, atol=0)
        else:
            torch.testing.assert_close(back.weight(base), given.weight(base), rtol=0, atol=0)
    back.finish()
    given.finish()
    if family == "qwen":
        assert (settings(tmp_path / "w")["start_id"], settings(tmp_path / "w")["end_id"]) == ("-1", "256")
        assert (tmp_path / "w/triton_models/tokenizer/qwen.tiktoken").is_file()


@pytest.mark.parametrize("made_for, served_on", [(1, 1), (2, 1), (2, 2)])
def test_ids_are_those_of_the_checkpoint(made_for: int, served_on: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", "internlm")
    convert(source, tmp_path / "w", model_name="internlm-chat-7b", tp=made_for)
    assert ids_of(tmp_path / "w", tp=served_on) == ids_of(source)


def test_bfloat16_stays(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", dtype="bfloat16")
    made = convert(source, tmp_path / "w", model_name="base")
    assert made.weight_type == settings(tmp_path / "w")["weight_type"] == "bf16" and not made.sentences
    weights = open_checkpoint(tmp_path / "w", load_spec(tmp_path / "w"))
    torch.testing.assert_close(weights.weight("layers.0.q"), open_checkpoint(source, load_spec(source)).weight("layers.0.q"))


def test_gguf_files_convert(tmp_path: Path) -> None:
    """Quantized types become fp16; the tokenizer is the file's keys without its tensors."""
    source = toy_gguf(tmp_path / "x.gguf", "llama", types="Q4_0", hidden=256, kv_heads=4)
    made = convert(source, tmp_path / "w", model_name="base", tp=2)
    assert "Q4_0" in made.sentences[0] and made.weight_type == "fp16"
    vocabulary = tmp_path / "w/triton_models/tokenizer/tokenizer.gguf"
    assert vocabulary.stat().st_size < 2000
    back, given = (open_checkpoint(p, load_spec(p)) for p in (tmp_path / "w", source))
    for name in ("layers.1.q", "layers.0.down"):
        torch.testing.assert_close(back.weight(name), given.weight(name, dense=True), rtol=0, atol=0)


# ---- four bits


def nibble_place(k: int, n: int, columns: int) -> int:
    """Where TurboMind's kernels find weight (k, n): written from the tile's drawing, digit by digit."""
    word, eighth = divmod(n % 32, 8)
    nibble = [0, 4, 1, 5, 2, 6, 3, 7][eighth]  # AWQ's order
    k4, k3, k2, k1 = (k // 16) % 2, (k // 8) % 2, (k // 2) % 4, k % 2
    n4, n3, n2, n1 = word // 2, word % 2, nibble // 4, nibble % 4
    digits = [(k // 32, 0), (n // 32, columns // 32), (n1, 4), (n2, 2), (k2, 4), (k4, 2), (n4, 2), (k1, 2), (k3, 2), (n3, 2)]
    place = 0
    for value, size in digits:
        place = place * size + value
    return place


def test_four_bit_tiles(tmp_path: Path) -> None:
    q = np.random.default_rng(0).integers(0, 16, (64, 96), dtype=np.uint8)
    words = turbomind.encode_s4(q)
    nibbles = [int(w) >> 4 * j & 15 for w in words for j in range(8)]
    assert all(nibbles[nibble_place(k, n, 96)] == q[k, n] for k in range(64) for n in range(96))
    np.testing.assert_array_equal(turbomind.decode_s4(words, 64, 96), q)


@pytest.mark.parametrize("made_for, served_on", [(1, 1), (2, 2)])
def test_awq_checkpoints(made_for: int, served_on: int, tmp_path: Path) -> None:
    awq_path, _ = awq_checkpoint(tmp_path, group=32, hidden=256, heads=4, kv_heads=4, intermediate_size=256, vocab_size=261)
    (awq_path / TOKENIZER).write_text("{}")
    made = convert(awq_path, tmp_path / "w", model_name="base", tp=made_for, model_format="awq", group_size=32)
    assert (made.weight_type, settings(tmp_path / "w")["group_size"]) == ("int4", "32")
    stock, own = take_stock(tmp_path / "w", load_spec(tmp_path / "w")), take_stock(awq_path, load_spec(awq_path))
    for name in (
        "layers.0.q.weight",
        "layers.1.v.weight",
        "layers.0.gate.weight",
        "layers.1.up.weight",
        "layers.0.o.weight",
        "layers.1.down.weight",
    ):
        for ours, theirs in zip(stock[name].parts, own[name].parts, strict=True):
            np.testing.assert_array_equal(ours.file.raw(ours.name), theirs.file.raw(theirs.name))
    assert ids_of(tmp_path / "w", tp=served_on) == ids_of(awq_path)


def test_scales_and_zeros(tmp_path: Path) -> None:
    """half2 (64 + zero, scale); columns of w13 are gate's and up's in turns."""
    awq_path, _ = awq_checkpoint(tmp_path, group=64, hidden=128, heads=2, kv_heads=2, intermediate_size=128)
    (awq_path / TOKENIZER).write_text("{}")
    convert(awq_path, tmp_path / "w", model_name="base")
    pairs = raw(tmp_path / "w", "layers.0.feed_forward.w13.0.scales_zeros", 2, 256, 2)
    t = load_file(awq_path / "model.safetensors")
    for at, part in enumerate(("gate", "up")):
        zeros = unpack(t[f"model.layers.0.mlp.{part}_proj.qzeros"])
        np.testing.assert_array_equal(pairs[:, at::2, 0], zeros.astype(np.float16) + 64)
        np.testing.assert_array_equal(pairs[:, at::2, 1], t[f"model.layers.0.mlp.{part}_proj.scales"])


# ---- refusals, and nothing half done


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        ({"family": "qwen3"}, {}, "norms of their own"),
        ({"family": "mistral", "sliding_window": 16}, {}, "a window of 16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}, "the linear way"),
        ({"mlp_bias": True}, {}, "MLP has biases"),
        ({"head_dim": 32}, {}, "4 heads of 32 dimensions beside a width of 64"),
        ({}, {"tp": 3}, "3 ranks cannot have equal parts of 4 heads"),
        ({}, {"tp": 4}, "4 ranks cannot have equal parts of 2 K/V heads"),
        ({}, {"tp": 0}, "at least one rank"),
        ({}, {"model_format": "awq"}, "not quantized"),
        ({}, {"model_format": "llama"}, "pickles"),
        ({}, {"model_format": "gptq"}, "unknown"),
        ({}, {"model_format": "qwen"}, "of the family llama"),
        ({}, {"group_size": 128}, "no 4-bit weights"),
        ({}, {"model_name": "a\nb"}, "MODEL_NAME"),
    ],
)
def test_refused_before_anything_is_written(source: dict[str, Any], arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "hf", **source)
    with pytest.raises(EngineError, match=says):
        convert(path, tmp_path / "w", **{"model_name": "base"} | arguments)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_numbers_too_large_for_fp16(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", dtype="float32", layers=1)
    from safetensors.numpy import save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match="final_norm: a number is too large"):
        convert(source, tmp_path / "w", model_name="base")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_an_older_workspace_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "w", model_name="base", tp=2)
    convert(source, tmp_path / "w", model_name="internlm2", tp=1)
    assert settings(tmp_path / "w")["model_name"] == "internlm2"
    assert not list((tmp_path / "w/triton_models/weights").glob("*.1.weight"))
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "w"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="is no workspace"):
        convert(source, tmp_path / "mine", model_name="base")
    with pytest.raises(ConfigError, match="is a workspace already"):
        convert(tmp_path / "w", tmp_path / "v", model_name="base")


@pytest.mark.parametrize("after", [0, 7, 19])
def test_a_full_disk_leaves_nothing_that_loads(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "w", model_name="old")
    write, count = quant.workspace._write, 0

    def full(path: Path, data: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            path.write_bytes(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(quant.workspace, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "w", model_name="new")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "w"}
    assert settings(tmp_path / "w")["model_name"] == "old"  # the older one is untouched
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="0.0 are free there"):
        convert(source, tmp_path / "w", model_name="new")


def test_progress_counts_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    made = convert(checkpoint(tmp_path / "hf"), tmp_path / "w", model_name="base", progress=lambda *args: seen.append(args))
    assert [n for n, _, _ in seen] == list(range(1, made.files + 1)) and {total for _, total, _ in seen} == {made.files}


# ---- a workspace that somebody has changed


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_layer": 1}, "num_layer: 1 contradicts the checkpoint's config.json, which says 2"),
        ({"norm_eps": 1e-3}, "norm_eps: 0.001 contradicts"),
        ({"rope_theta": 5e5}, "rope_theta: 500000 contradicts"),
        ({"head_num": 8}, "head_num: 8 contradicts"),
        ({"head_num": 7}, "7 heads of 16 dimensions"),
        ({"tensor_para_size": 2}, "layers.0.attention.w_qkv.0.weight: 16384 bytes, config.ini wants 8192"),
        ({"attn_bias": 1}, "layers.0.attention.w_qkv.0.bias: No such file"),
        ({"weight_type": "int4"}, "group_size: 0 is not supported"),
        ({"weight_type": "fp8"}, "weight_type: fp8"),
        ({"rotary_embedding": 8}, "only whole heads are rotated"),
        ({"rope_scaling_factor": 0.5}, "0 is off"),
        ({"use_dynamic_ntk": 1}, "use_dynamic_ntk: it is of a LMDeploy before 0.1"),
        ({"colour": "red"}, "colour: not a key"),
        ({"head_num": "four"}, "head_num: 'four' is not an integer"),
        ({"norm_eps": "nan"}, "norm_eps: 'nan' is out of range"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "hf"), tmp_path / "w", model_name="base")
    change(tmp_path / "w", **values)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(tmp_path / "w", load_spec(tmp_path / "w"))


def test_files_missing_cut_and_left_over(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "hf"), tmp_path / "w", model_name="base")
    folder = tmp_path / "w/triton_models/weights"
    spec = load_spec(tmp_path / "w")
    (folder / "layers.0.past_kv_scale.0.weight").write_bytes(b"1234")  # of LMDeploy's calibration: not needed
    weights = open_checkpoint(tmp_path / "w", spec)
    os.truncate(folder / "norm.weight", 126)
    with pytest.raises(ModelError, match="norm.weight: 126 bytes"):
        weights.weight("final_norm")
    with pytest.raises(ModelError, match="norm.weight: 126 bytes, config.ini wants 128"):
        open_checkpoint(tmp_path / "w", spec)
    (folder / "norm.weight").unlink()
    with pytest.raises(ModelError, match="norm.weight: No such file"):
        open_checkpoint(tmp_path / "w", spec)
    convert(tmp_path / "hf", tmp_path / "w", model_name="base")
    (folder / "layers.9.attention.wo.0.weight").write_bytes(b"")
    with pytest.raises(ModelError, match="no use for 1 files beside it: layers.9"):
        open_checkpoint(tmp_path / "w", spec)
    (folder / "config.ini").write_text("[llama]\nmodel_name = a\nmodel_name = b\n")
    assert is_workspace(tmp_path / "w")
    with pytest.raises(ModelError, match="model_name"):
        load_spec(tmp_path / "w")
    (folder / "config.ini").write_text("[llama]\n" + "x" * 70000)
    with pytest.raises(ModelError, match="larger than"):
        load_spec(tmp_path / "w")


def test_a_number_that_is_not_finite(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "hf"), tmp_path / "w", model_name="base")
    path = tmp_path / "w/triton_models/weights/layers.0.feed_forward.w2.0.weight"
    values = np.fromfile(path, "<f2")
    values[5] = np.nan
    values.tofile(path)
    with pytest.raises(ModelError, match="layers.0.down.weight: holds a number that is not finite"):
        open_checkpoint(tmp_path / "w", load_spec(tmp_path / "w")).weight("layers.0.down")


def test_config_json_of_the_copy_is_read_like_any(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "hf"), tmp_path / "w", model_name="base")
    (tmp_path / "w/triton_models/tokenizer/config.json").write_text(json.dumps({"architectures": ["Other"]}))
    with pytest.raises(ModelError, match="architectures: Other is not supported"):
        load_spec(tmp_path / "w")
    (tmp_path / "w/triton_models/tokenizer/config.json").unlink()
    assert load_spec(tmp_path / "w").num_layers == 2
