"""The golden answers over HTTP: chat and completions, streamed and not, all ten at once, twice (the second time cached)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.harness import Running, serving
from tests.harness import configure


@pytest.fixture(scope="module")
def golden(assets: Path) -> list[dict[str, Any]]:
    file = json.loads((assets / "golden" / "smollm2-135m-instruct.float32.transformers.json").read_text())
    return file["prompts"]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Running]:
    config = configure(
        model={"path": str(smollm2), "dtype": "float32"},
        engine={"device": "cpu", "session_len": 512, "max_batch_size": 16},
        cache={"num_blocks": 256, "cache_block_seq_len": 16},
    )
    with serving(config) as running:
        yield running
        running.settled()


def streamed(server: Running, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason, put together from the events."""
    events = server.events(path, body)
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)
    return text, choices[-1]["finish_reason"]


def whole(server: Running, path: str, body: dict[str, Any]) -> tuple[str, str]:
    status, answer = server.post(path, body)
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fold", [streamed, whole])
def test_chat_ends_where_the_golden_answer_ends(server: Running, golden: list[dict[str, Any]], fold: Any) -> None:
    def ask(case: dict[str, Any]) -> tuple[str, str]:
        return fold(server, "/v1/chat/completions", {"messages": case["messages"], "max_tokens": 64, "temperature": 0})

    for _ in range(2):
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, golden))
        assert answers == [(case["text"], case["finish_reason"]) for case in golden]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fold", [streamed, whole])
def test_sixty_four_ids_of_each_prompt(server: Running, golden: list[dict[str, Any]], fold: Any) -> None:
    for case in golden:
        body = {"prompt": case["prompt_ids"], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        assert fold(server, "/v1/completions", {**body, "skip_special_tokens": False}) == (case["text_64_ignore_eos"], "length")
