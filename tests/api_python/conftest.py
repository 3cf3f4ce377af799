"""One mock pipeline for the tests that look at shapes, not at text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from numbatch import Pipeline, pipeline


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline(device="mock", session_len=512, num_blocks=512, cache_block_seq_len=16, max_batch_size=8) as made:
        yield made
