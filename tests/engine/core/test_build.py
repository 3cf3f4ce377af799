"""What is said before an engine is built."""

import dataclasses
import logging

import pytest

from engine.build import build_engine, mock_spec
from tests.harness import configure


@pytest.mark.parametrize(("policy", "biased", "warned"), [(8, True, True), (4, True, True), (0, True, False), (8, False, False)])
def test_few_bits_of_a_k_with_biases_are_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, policy: int, biased: bool, warned: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("numbatch"), "propagate", True)  # a server's log set-up may have been here
    spec = dataclasses.replace(mock_spec(), qkv_bias=biased)
    with caplog.at_level(logging.WARNING, logger="numbatch.load"):
        build_engine(configure(engine={"device": "mock"}, cache={"quant_policy": policy}), spec)
    assert any(f"quant_policy = {policy}: K of this model has biases" in message for message in caplog.messages) == warned
