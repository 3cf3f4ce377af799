"""The frame in which a K with biases is quantized: from the biases alone, and no score but by its rounding is another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import kv_quant, reference
from engine.batch import Slots
from engine.cache.layout import KVLayout
from engine.models.decoder import Decoder
from engine.models.rope import rope_tables
from engine.models.spec import load_spec
from engine.parallel import Ranks
from engine.reference import ReferenceBackend
from engine.step import Admit, StepPlan
from engine.weights import open_checkpoint
from tests.engine.judge import greedy
from tests.fixtures.toy import biased_checkpoint, toy_checkpoint

IDS = tuple(range(3, 60))
SESSION_LEN = 64


def decoder_of(model: Path, *, few_bits: bool) -> Decoder:
    spec = load_spec(model)
    checkpoint = open_checkpoint(model, spec)
    return Decoder(spec, checkpoint, ReferenceBackend(), Ranks(), session_len=SESSION_LEN, exact=True, few_bits=few_bits)


def logits(decoder: Decoder, bits: int) -> np.ndarray:
    """float32 [vocab] after IDS, taken in two parts."""
    spec, n, first = decoder.spec, len(IDS), 40
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, SESSION_LEN, "float32", bits)
    kv, slots = decoder.backend.make_kv(layout, 1), Slots(1, SESSION_LEN, SESSION_LEN)
    admit = Admit(0, IDS, n, (0,), greedy(1))
    out = None
    for admits, start, count, samples in (((admit,), 0, first, 0), ((), first, n - first, 1)):
        plan = StepPlan(0, admits=admits, slots=(0,), starts=(start,), counts=(count,), samples=(samples,))
        slots.apply(plan)
        out = decoder.forward(slots.batch(plan), kv)
    assert out is not None
    return out[0]


def tables(positions: int, rotary: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(positions), 0.0005 ** (np.arange(rotary // 2) / 5)).astype(np.float32)
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


@pytest.mark.parametrize("rotary", [16, 12])
def test_the_origin_is_the_mean_of_the_turned_bias(rotary: int) -> None:
    bias, q_bias = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    cos, sin = tables(kv_quant.FRAMED_BY + 100, rotary)
    for positions in (7, kv_quant.FRAMED_BY, len(cos)):
        used = min(positions, kv_quant.FRAMED_BY)
        turned = reference.rotate(np.broadcast_to(bias, (used, 3, 16)), cos[:used], sin[:used])
        frame = kv_quant.frame_of_keys(bias, q_bias, cos[:positions], sin[:positions])
        np.testing.assert_allclose(frame[0], turned.mean(axis=0, dtype=np.float64), atol=2e-6)
        assert frame.dtype == np.float32 and frame.shape == (2, *bias.shape)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_units_are_powers_of_2_alike_for_a_pair_and_larger_where_k_is(factor: float) -> None:
    k_bias, q_bias = np.zeros((2, 20), np.float32), np.zeros((6, 20), np.float32)
    k_bias[0, 0], q_bias[4, 1], k_bias[1, 7], q_bias[2, 18] = 64 / factor, 64 / factor, 300, 30  # pairs (i, i + 8); 16 .. 19 do not turn
    cos, sin = tables(1 << 14, 16, factor)
    _, unit = kv_quant.frame_of_keys(k_bias, q_bias, cos, sin)
    np.testing.assert_array_equal(np.frexp(unit)[0], 0.5)
    np.testing.assert_array_equal(unit[:, :8], unit[:, 8:16])
    # k: 1 + 64^2 / 2; q: over three heads as well; of 300, which turns slowly, the origin takes most: the unit is not 16
    assert unit[0, 0] == 8 and unit[1, 1] == 2.0**-2 and unit[0, 18] == 2.0**-2 and unit[1, 7] <= 4
    unbiased = np.ones((2, 20), bool)
    unbiased[0, [0, 8, 18]] = unbiased[1, [1, 9]] = unbiased[1, [7, 15]] = False
    assert (unit[unbiased] == 1).all()


def test_in_16_bits_a_frame_changes_nothing_and_in_few_it_saves_most_of_the_loss(tmp_path: Path) -> None:
    model = biased_checkpoint(tmp_path, kv_heads=1, heads=2, hidden=64)
    plain, framed = decoder_of(model, few_bits=False), decoder_of(model, few_bits=True)
    true = logits(plain, 0)
    np.testing.assert_allclose(logits(framed, 0), true, atol=2e-4 * true.std())
    for bits in (8, 4):
        lost, kept = (np.abs(logits(decoder, bits) - true).mean() for decoder in (plain, framed))
        assert kept < lost / 3, (bits, kept, lost)


def test_packed_biases_make_a_frame_too(tmp_path: Path) -> None:
    """Qwen-1: q, k and v are one tensor, every head has its own K."""
    model = toy_checkpoint(tmp_path, "qwen")
    plain, framed = decoder_of(model, few_bits=False), decoder_of(model, few_bits=True)
    assert all(layer.key_frame is not None for layer in framed.layers)
    true = logits(plain, 0)
    np.testing.assert_allclose(logits(framed, 0), true, atol=1e-4 * true.std())


def test_only_biases_that_reach_the_keys_as_they_are_make_a_frame(tmp_path: Path) -> None:
    model = biased_checkpoint(tmp_path / "qwen2")
    spec = load_spec(model)
    k_bias, q_bias = (open_checkpoint(model, spec).bias(f"layers.1.{name}").numpy().reshape(-1, spec.head_dim) for name in "kq")
    frame = decoder_of(model, few_bits=True).layers[1].key_frame
    wanted = kv_quant.frame_of_keys(k_bias, q_bias, *rope_tables(spec, SESSION_LEN))
    np.testing.assert_array_equal(frame.reshape(wanted.shape), wanted)
    normed = toy_checkpoint(tmp_path / "qwen3", "qwen3", attention_bias=True)
    for path in (normed, toy_checkpoint(tmp_path / "llama")):
        assert [layer.key_frame for layer in decoder_of(path, few_bits=True).layers] == [None, None]
