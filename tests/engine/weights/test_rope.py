"""Rope tables against numbers from transformers 5.23.0 (`modeling_rope_utils._compute_*_parameters`, head_dim 64, float32)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from engine.models.rope import attention_factor, inverse_frequencies, rope_tables
from engine.models.spec import ModelSpec, RopeSpec, spec_from_config
from tests.fixtures.toy import toy_config

DIMENSIONS = [0, 8, 16, 20, 24, 31]


def spec_of(**rope) -> ModelSpec:
    config = toy_config(hidden=2048, heads=32, max_position_embeddings=rope.pop("max_position", 131072))
    return spec_from_config(config | {"rope_parameters": {"rope_theta": 500000.0, **rope}}, {})


CASES: dict[str, tuple[dict, list[float], float]] = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.009401507675647736, 0.0003535533614922315, 6.856204709038138e-05, 1.3295739336172119e-05, 7.5346451922087e-07],
        1.0,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        [1.0, 0.03760603070259094, 0.000429556705057621, 8.570255886297673e-06, 1.6619674170215148e-06, 9.418306490260875e-08],
        1.0,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        [1.0, 0.03760603070259094, 0.0009428090415894985, 9.141606278717518e-05, 1.3295739336172119e-05, 7.5346451922087e-07],
        1.138629436111989,
    ),
    "yarn with mscale": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
        [1.0, 0.033532045781612396, 3.535533687681891e-05, 6.856204436189728e-06, 1.3295739336172119e-06, 7.534644907991606e-08],
        0.9210423553163399,
    ),
    "yarn, not truncated": (
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        [1.0, 0.034805312752723694, 4.4194170186528936e-05, 8.570255886297673e-06, 1.6619674170215148e-06, 9.418306490260875e-08],
        1.3465735902799727,
    ),
    "dynamic": (  # for 8,192 tokens
        {"rope_type": "dynamic", "factor": 2.0, "max_position": 4096},
        [1.0, 0.028322359547019005, 0.0008021560497581959, 0.0001349968370050192, 2.2718950276612304e-05, 1.0046193210655474e-06],
        1.0,
    ),
}
LLAMA3, YARN, DYNAMIC = (CASES[name][0] for name in ("llama3", "yarn", "dynamic"))


@pytest.mark.parametrize("rope, expected, scale", CASES.values(), ids=CASES)
def test_frequencies(rope: dict, expected: list[float], scale: float) -> None:
    spec = spec_of(**rope)
    np.testing.assert_allclose(inverse_frequencies(spec, 8192)[DIMENSIONS], expected, rtol=5e-7)
    assert attention_factor(spec.rope) == pytest.approx(scale, rel=1e-12)


def test_tables_are_cos_and_sin_of_position_times_frequency() -> None:
    spec = spec_of(rope_type="default")
    cos, sin = rope_tables(spec, 5)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (5, 32)
    for p in range(5):
        for i in range(32):
            angle = p * 500000.0 ** (-2 * i / 64)
            assert cos[p, i] == pytest.approx(math.cos(angle), abs=1e-6) and sin[p, i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_yarn_scales_the_tables() -> None:
    cos, sin = rope_tables(spec_of(**YARN), 3)
    np.testing.assert_allclose(cos**2 + sin**2, 1.138629436111989**2, rtol=1e-6)


def test_dynamic_is_plain_up_to_the_trained_length() -> None:
    spec = spec_of(**DYNAMIC)
    plain = inverse_frequencies(spec_of(rope_type="default"), 4096)
    np.testing.assert_array_equal(inverse_frequencies(spec, 4096), plain)
    np.testing.assert_array_equal(inverse_frequencies(spec, 17), plain)
    assert (inverse_frequencies(spec, 4097)[1:] < plain[1:]).all()


def test_gguf_factors_divide() -> None:
    spec = spec_of(rope_type="default")
    factors = tuple(float(i + 1) for i in range(32))
    scaled = dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, freq_factors=factors))
    np.testing.assert_allclose(inverse_frequencies(scaled, 8) * np.arange(1, 33), inverse_frequencies(spec, 8), rtol=1e-14)


def test_llama3_equals_the_factors_that_the_converter_writes() -> None:
    """llama.cpp's converter stores Llama 3.1's scaling as one factor a frequency; both ways give the same frequencies."""
    llama3, plain = spec_of(**LLAMA3), spec_of(rope_type="default")
    factors = inverse_frequencies(plain, 8) / inverse_frequencies(llama3, 8)
    assert factors[0] == 1 and factors[-1] == 32
    spec = dataclasses.replace(plain, rope=RopeSpec(theta=500000.0, rotary_dim=64, freq_factors=tuple(factors)))
    np.testing.assert_allclose(rope_tables(spec, 100)[0], rope_tables(llama3, 100)[0], atol=1e-6)


def test_partial_rotation_has_narrower_tables() -> None:
    cos, _ = rope_tables(spec_of(rope_type="default", partial_rotary_factor=0.5), 4)
    assert cos.shape == (4, 16)
    np.testing.assert_allclose(cos[1], np.cos(500000.0 ** (-np.arange(0, 32, 2) / 32)), atol=1e-6)
