"""Philox4x32-10 against the known answers of its authors (Random123, kat_vectors)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sampler_kernels as kernels
from engine.sampler_reference import philox_reference

ONES = (1 << 64) - 1
KNOWN = [  # counter, key, answer, as 32-bit words, least significant first
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    low_first = [int(word, 16) for word in text.split()]
    return tuple(low_first[i] | low_first[i + 1] << 32 for i in range(0, len(low_first), 2))


def fast(counter, key):
    return tuple(int(word) for word in kernels.philox(tuple(np.uint64(word) for word in counter), np.uint64(key)))


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert philox_reference(words(counter), words(key)[0]) == words(answer)
    assert fast(words(counter), words(key)[0]) == words(answer)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, ONES), st.integers(0, ONES), st.integers(0, ONES))
def test_fast_equals_reference(low, high, key):
    assert fast((low, high), key) == philox_reference((low, high), key)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, ONES), st.integers(0, ONES))
def test_high_half_of_a_product(a, b):
    assert int(kernels._mul_high(np.uint64(a), np.uint64(b))) == (a * b) >> 64


@pytest.mark.parametrize("point, index", [(0, 1), (4, 1), (5, 3), (7, 3)])
def test_a_point_lands_where_the_running_weight_exceeds_it(point, index):
    """At exact boundaries, too: an id without weight is never drawn."""
    assert kernels._walk(np.array([0, 5, 0, 3]), 0, point) == index
