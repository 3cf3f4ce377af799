"""Many clients at once, in small; `python -m tests.e2e.streams` and `python -m tests.e2e.storm` are the full numbers."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.storm import storm
from tests.e2e.streams import WIDE, run
from tests.e2e.support import Server, many_files


@pytest.mark.parametrize(
    "streams, sets", [(300, ()), (100, ("cache.num_blocks=300", "engine.max_batch_size=32"))], ids=["roomy", "preempting"]
)
def test_nothing_is_left_of_dropped_streams(streams: int, sets: tuple[str, ...]) -> None:
    results = asyncio.run(storm(streams, 1, 5, sets))
    assert results[0].outcomes["some events"] > streams // 10


def test_concurrent_streams_are_complete_and_right() -> None:
    many_files()
    streams = 600
    with Server("engine.mock_step_s=0.1", *WIDE) as server:
        outcome = asyncio.run(run(server.ready().port, streams, 24))
        assert outcome.wrong == []
        assert outcome.peak > streams // 2
        assert server.metric("vllm:num_requests_running") == 0
