"""InternLM, InternLM2, Qwen-1 and Baichuan2 give the ids of the plain model that their files hold in another form.

The ids in `families.transformers.json` were made by transformers from plain Llama and Qwen2 models; the checkpoints here
hold the same tensors packed and named as the old families do. Real models are repacked where they are present. Beyond
the trained length, Qwen-1's scaling is compared with a whole model in numpy, written from TurboMind's formulas.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.spec import load_spec, spec_from_config
from engine.sequence import SamplingParams
from engine.weight_files import expected_shapes
from engine.weights import open_checkpoint
from tests.fixtures.families import with_all_heads
from tests.fixtures.toy import old_checkpoint, toy_checkpoint, toy_config, toy_weights
from tests.harness import answers, configure, running

HERE = Path(__file__).parent
PROMPTS = json.loads((HERE / "toys.transformers.json").read_text())["prompts"]
CASES = json.loads((HERE / "families.transformers.json").read_text())["cases"]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


async def run(model: Path, prompts: list[list[int]], tokens: int, session_len: int = 128, **engine: Any) -> list[list[int]]:
    config = configure(
        model={"path": str(model), "dtype": "float32"},
        engine={"device": "cpu", "max_batch_size": 8, "session_len": session_len} | engine,
        cache={"num_blocks": 96, "cache_block_seq_len": 16},
    )
    async with running(config) as started:
        return await answers(started, prompts, greedy(tokens), together=True)


WAYS: dict[str, dict[str, Any]] = {"reference": {"device": "reference"}, "cpu": {}, "two ranks": {"tp": 2}}
# two ranks where something is cut in a way of its own: biases, rows by KV head, rows of unit length
RUNS = [(case, way) for i, case in enumerate(CASES) for way in WAYS if way != "two ranks" or i in (0, 2, 4)]


@pytest.mark.parametrize(("case", "way"), RUNS, ids=[f"{case['family']} {case['config']} {way}" for case, way in RUNS])
def test_ids_equal_those_of_the_plain_model(case: dict[str, Any], way: str, tmp_path: Path) -> None:
    plain = toy_config(case["plain"], **case["config"])
    weights = toy_weights(spec_from_config(plain, {}))
    own: dict[str, Any] = {}
    if case["family"].startswith("internlm"):
        own["bias"] = plain.get("attention_bias", False)
    if case["family"] == "baichuan":  # any length of the head's rows gives the same model
        weights["lm_head.weight"] = weights["lm_head.weight"] * np.linspace(0.5, 2, plain["vocab_size"], dtype=np.float32)[:, None]
    path = old_checkpoint(tmp_path / "model", case["family"], plain, weights, **own)
    assert asyncio.run(run(path, PROMPTS, 24, **WAYS[way])) == case["ids"]


# ---- real models, repacked


def dense_weights(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json of a plain 16-bit checkpoint of a GGUF model, and its parameters, float16 (biases and norms float32)."""
    spec = load_spec(path)
    checkpoint = open_checkpoint(path, spec)
    weights = {}
    for name in expected_shapes(spec):
        base, suffix = name.rsplit(".", 1)
        weights[name] = (checkpoint.bias(base) if suffix == "bias" else checkpoint.weight(base, dense=True)).numpy()
    config = {
        "hidden_act": "silu", "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position, "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope.theta,
        "vocab_size": spec.vocab_size, "tie_word_embeddings": spec.tie_word_embeddings,
    }  # fmt: skip
    return config, weights


@pytest.mark.timeout(300)
def test_smollm2_as_internlm2(smollm2: Path, assets: Path, tmp_path: Path) -> None:
    """The golden ids are transformers', from the same weights."""
    golden = json.loads((assets / "golden" / "smollm2-135m-instruct.float32.transformers.json").read_text())
    cases = next(value for value in golden.values() if isinstance(value, list))[:4]
    config, weights = dense_weights(smollm2)
    path = old_checkpoint(tmp_path / "internlm2", "internlm2", config, weights, dtype="float16")
    ids = asyncio.run(run(path, [case["prompt_ids"] for case in cases], 24, session_len=256))
    assert ids == [case["ids_64_ignore_eos"][:24] for case in cases]


@pytest.mark.timeout(300)
def test_qwen_coder_as_qwen_1(qwen05: Path, tmp_path: Path) -> None:
    """Qwen-1 has as many KV heads as heads: each of the 2 is written 7 times."""
    config, weights = dense_weights(qwen05)
    prompts = [[750, 912, 2877, 11, 293, 982]]
    expected = asyncio.run(run(qwen05, prompts, 6))
    many = with_all_heads(weights, config["num_attention_heads"], config["num_key_value_heads"])
    config["num_key_value_heads"] = config["num_attention_heads"]
    path = old_checkpoint(tmp_path / "qwen", "qwen", config, many, dtype="float16")
    assert asyncio.run(run(path, prompts, 6)) == expected


# ---- beyond the trained length, against numpy


class TurboMind:
    """A Qwen-1 in float64 from its file's tensors: theta chosen once for a length, queries scaled by log n beyond the
    trained one. Formulas and names as TurboMind had them (rope_scaling_factor, use_logn_attn, max_position_embeddings)."""

    def __init__(self, tensors: dict[str, np.ndarray], config: dict[str, Any], factor: float, length: int) -> None:
        self.t = {name: a.astype(np.float64) for name, a in tensors.items()}
        self.c = config
        self.dim = config["kv_channels"]
        trained = config["seq_length"]
        theta = config["rotary_emb_base"]
        if factor >= 1 and length > trained:
            theta *= (factor * length / trained - (factor - 1)) ** (self.dim / (self.dim - 2))
        self.frequencies = [theta ** -(2 * i / self.dim) for i in range(self.dim // 2)]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["layer_norm_epsilon"]) * self.t[name]

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """x [T, heads, dim]; dimension i turns with i + dim / 2 (checkpoints in Hugging Face's order)."""
        out = x.copy()
        half = self.dim // 2
        for position in range(len(x)):
            for i, f in enumerate(self.frequencies):
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i] = a * math.cos(position * f) - b * math.sin(position * f)
                out[position, :, i + half] = b * math.cos(position * f) + a * math.sin(position * f)
        return out

    def logits(self, ids: list[int], logn: bool) -> np.ndarray:
        x = self.t["transformer.wte.weight"][ids]
        heads, count, trained = self.c["num_attention_heads"], len(ids), self.c["seq_length"]
        for i in range(self.c["num_hidden_layers"]):
            base = f"transformer.h.{i}"
            packed = self.norm(x, f"{base}.ln_1.weight") @ self.t[f"{base}.attn.c_attn.weight"].T + self.t[f"{base}.attn.c_attn.bias"]
            q, k, v = (part.reshape(count, heads, self.dim) for part in np.split(packed, 3, axis=1))
            q, k = self.rotated(q), self.rotated(k)
            if logn:  # context length of a query = its position + 1
                q = q * np.array([math.log2(n) / math.log2(trained) if n > trained else 1.0 for n in range(1, count + 1)])[:, None, None]
            out = np.zeros_like(q)
            for p in range(count):
                for h in range(heads):
                    scores = k[: p + 1, h] @ q[p, h] / math.sqrt(self.dim)
                    weights = np.exp(scores - scores.max())
                    out[p, h] = weights @ v[: p + 1, h] / weights.sum()
            x = x + out.reshape(count, -1) @ self.t[f"{base}.attn.c_proj.weight"].T
            h2 = self.norm(x, f"{base}.ln_2.weight")
            up, gate = h2 @ self.t[f"{base}.mlp.w1.weight"].T, h2 @ self.t[f"{base}.mlp.w2.weight"].T
            x = x + (up * gate / (1 + np.exp(-gate))) @ self.t[f"{base}.mlp.c_proj.weight"].T
        return self.norm(x, "transformer.ln_f.weight")[-1] @ self.t["lm_head.weight"].T

    def greedy(self, prompt: list[int], tokens: int, logn: bool) -> tuple[list[int], float]:
        """Ids, and the smallest distance between the best two of a step."""
        ids, margin = list(prompt), math.inf
        for _ in range(tokens):
            logits = self.logits(ids, logn)
            second, first = np.sort(logits)[-2:]
            margin = min(margin, first - second)
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :], margin


@pytest.mark.parametrize(
    ("own", "engine", "factor", "logn"),
    [
        ({"use_dynamic_ntk": True, "use_logn_attn": True}, {}, 1.0, True),
        ({"use_dynamic_ntk": True, "use_logn_attn": False}, {}, 1.0, False),
        ({"use_dynamic_ntk": False, "use_logn_attn": False}, {"rope_scaling_factor": 4.0, "use_logn_attn": True}, 4.0, True),
    ],
    ids=["as the file says", "without logn", "as [engine] says"],
)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_beyond_the_trained_length(
    own: dict[str, Any], engine: dict[str, Any], factor: float, logn: bool, device: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    path = toy_checkpoint(tmp_path / "model", "qwen", layers=2, hidden=32, heads=2, max_position_embeddings=6, **own)
    config = json.loads((path / "config.json").read_text())
    prompt = [211, 7, 90, 18, 133, 4, 250, 61, 99, 42]
    model = TurboMind(load_file(path / "model.safetensors"), config, factor, 24)
    expected, margin = model.greedy(prompt, 12, logn)
    assert margin > 1e-4
    assert asyncio.run(run(path, [prompt], 12, session_len=24, device=device, **engine)) == [expected]
    plain, _ = TurboMind(load_file(path / "model.safetensors"), config, 0.0, 24).greedy(prompt, 12, False)
    assert plain != expected  # it matters here
