"""Prompts whose attention torch computes: lengths, padding rows, and the same numbers as the reference; on the host, where the same
calls run without cuDNN."""

import numpy as np
import pytest
import torch

from engine import reference
from engine.cuda import tuning_attention
from engine.cuda.whole_prompts import WholePrompts


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(tuning_attention, "WHOLE_PROMPTS", {(9, 0): (16, 40, 4096)})
    return WholePrompts((9, 0), 4, 2, 64, 100)


def test_lengths_are_those_that_are_well_filled_and_fit_the_buffer(whole):
    assert whole.lengths == (16, 40)
    assert [whole.length(0, n) for n in (1, 12, 13, 16, 17, 31, 32, 40, 41)] == [0, 0, 16, 16, 0, 0, 40, 40, 0]
    assert whole.length(60, 33) == 40 and whole.length(61, 33) == 0  # rows behind the prompt are read, too
    assert WholePrompts((8, 0), 4, 2, 64, 100).lengths == WholePrompts((9, 0), 4, 2, 96, 100).lengths == ()
    assert WholePrompts((9, 0), 4, 2, 64, 0).lengths == ()


def test_attention_is_the_references_whatever_lies_behind_a_prompt(whole):
    torch.manual_seed(0)
    qkv = torch.randn(100, (4 + 2 * 2) * 64)
    out = torch.full((90, 4 * 64), torch.nan)
    prompts = [(first, count, whole.length(first, count)) for first, count in ((3, 14), (17, 33), (50, 40))]
    assert whole(qkv, prompts, out) is out
    for first, count, _ in prompts:
        q, k, v = reference.split_qkv(qkv[first : first + count].numpy(), 4, 2, 64)
        wanted = reference.attend(q, k, v, np.arange(count), 0)
        np.testing.assert_allclose(out[first : first + count].numpy().reshape(wanted.shape), wanted, rtol=2e-4, atol=2e-5)
    assert out[:3].isnan().all() and out[17 + 33 : 50].isnan().all() and not out[3:17].isnan().any()


def test_a_step_that_is_one_prompt_is_not_copied(whole):
    qkv = torch.randn(100, 8 * 64)
    out = torch.full((33, 4 * 64), torch.nan)
    found = whole(qkv, [(0, 33, 40)], out)
    assert found.shape == out.shape and found.is_contiguous() and out.isnan().all()
    again = torch.full((34, 4 * 64), torch.nan)
    whole(qkv, [(0, 33, 40)], again)
    assert torch.equal(again[:33], found)
