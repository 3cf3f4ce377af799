"""A pool with room for half of the sequences, on the real CPU engine; and how answers are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import memory


def test_agreement() -> None:
    assert memory.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == {"equal_sequences": 0.5, "equal_prefix": 4 / 6}


def test_a_small_pool_gives_the_same_answers(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--sequences",
        "5",
        "--length",
        "96",
        "--tokens",
        "48",
        "--set",
        "cache.cache_block_seq_len=16",
        "--set",
        "engine.session_len=512",
    ]
    assert memory.main(["--model", str(smollm2), "--device", "cpu", *words, "--json"]) == 0
    pressure = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["pressure"]
    assert pressure["tight"]["num_blocks"] == 15 and pressure["roomy"]["num_blocks"] == 35
    assert pressure["roomy"]["preemptions"] == 0 and pressure["tight"]["preemptions"] > 0
    assert pressure["equal_sequences"] == 1.0


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--model", "x", "--length", "10", "--tokens", "10"])
    assert memory.main(["--model", "nowhere.gguf", "--device", "cpu"]) == 2
