"""The first layers of SmolLM2, real weights of real widths (576 is no multiple of 128), in other people's formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.spec import ModelSpec, load_spec
from engine.weight_files import expected_shapes
from engine.weights import open_checkpoint
from tests.engine.judge import MARGIN, Reference
from tests.engine.weights.test_quantized import PROMPTS, ids
from tests.fixtures.quantized import Quantizer, fp8, gptq, packed, quantized_tensors, w8a8, write_pair

LAYERS, VOCAB = 2, 4096
FORMS: dict[str, tuple[tuple[dict[str, Any], Quantizer], float]] = {
    "GPTQ v1 act-order": (gptq(group=64, act_order=True), MARGIN),
    "GPTQ v2": (gptq(group=32, version=2), MARGIN),
    "packed int4, zeros": (packed(group=64, symmetric=False), MARGIN),
    "packed int8": (packed(bits=8, group=0), MARGIN),
    "W8A8": (w8a8(), 6 * MARGIN),  # SmolLM2's activations have outliers, and nobody smoothed them
    "FP8 blocks": (fp8("block", method="fp8"), MARGIN),
}


def first_layers(path: Path) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """Parameters of a GGUF file with fewer layers and ids, float32."""
    whole = load_spec(path)
    checkpoint, spec = open_checkpoint(path, whole), dataclasses.replace(whole, num_layers=LAYERS, vocab_size=VOCAB)
    names = [name.removesuffix(".weight") for name in expected_shapes(spec)]
    rows = {"embed": slice(0, VOCAB)}
    return spec, {f"{name}.weight": checkpoint.weight(name, rows=rows.get(name), dense=True).float().numpy() for name in names}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size, "num_hidden_layers": LAYERS, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope.theta, "vocab_size": spec.vocab_size, "tie_word_embeddings": True,
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_ids_are_those_of_the_dense_twin(form: str, smollm2: Path, tmp_path: Path) -> None:
    spec, weights = first_layers(smollm2)
    (quantization, quantize), margin = FORMS[form]
    made, twin = quantized_tensors(config_of(spec), weights, quantize)
    path, dense = write_pair(tmp_path, config_of(spec), quantization, made, twin)
    judge = Reference(dense, load_spec(dense))
    for prompt, answer in zip(PROMPTS, ids(path, dtype="bfloat16"), strict=True):
        judge.check(prompt, answer[:4], margin)
