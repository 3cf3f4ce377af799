"""Warm-up stays inside what there is, however little: the kernels check no bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.build import build_runner
from engine.parallel import Ranks
from tests.fixtures.toy import toy_checkpoint
from tests.harness import configure


@pytest.mark.parametrize(
    ("num_blocks", "block_seq_len", "session_len"), [(1, 1, 64), (2, 1, 64), (3, 1, 64), (1, 2, 64), (1, 16, 64), (8, 16, 1), (8, 16, 2)]
)
def test_a_tiny_pool_and_a_short_session_warm_up(tmp_path: Path, num_blocks: int, block_seq_len: int, session_len: int) -> None:
    """On the reference backend, whose numpy indexing raises where a kernel would write to foreign memory."""
    model = toy_checkpoint(tmp_path / "model")
    cache = {"num_blocks": num_blocks, "cache_block_seq_len": block_seq_len}
    engine = {"device": "reference", "session_len": session_len, "max_batch_size": 2}
    runner = build_runner(configure(model={"path": str(model)}, engine=engine, cache=cache), Ranks())
    assert runner.num_blocks == num_blocks
    runner.close()
