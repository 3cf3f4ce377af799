"""One toy model behind several configurations of the whole server: the same requests get the same answers everywhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Server, parse

PLAIN = ("engine.device=cpu", "model.dtype=float32", "engine.session_len=160", "engine.num_threads=1", "server.log_level=WARNING")
WAYS: dict[str, tuple[str, ...]] = {
    "plain": ("cache.num_blocks=256", "cache.cache_block_seq_len=16"),
    "preempting, prompt parts of 11": (
        "cache.num_blocks=20",
        "cache.cache_block_seq_len=8",
        "engine.max_prefill_token_num=11",
        "admission.max_queue_tokens=100000",
    ),
    "two ranks, no prefix cache": ("cache.num_blocks=64", "engine.tp=2", "engine.executor=process", "cache.enable_prefix_caching=false"),
}


def requests() -> list[dict[str, Any]]:
    """Every kind of sampling; prompts that share beginnings, of 1 to 100 ids."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0, "repetition_penalty": 1.4, "logit_bias": {"65": 2.5}, "min_tokens": 10},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0, "echo": True},
        {"temperature": 1.0, "allowed_token_ids": list(range(97, 123)), "bad_words": ["e", "st", "and"]},
        {"temperature": 0.7, "stop": ["e", "K", "o", "t", "f", "_"], "min_tokens": 4},
    ]
    prompts = ["x", "The same beginning, " * 4 + "then one", "The same beginning, " * 4 + "then another", "é€😀 and more"]
    return [
        {"prompt": prompt, "max_tokens": 24, "seed": 100 + i, "logprobs": 2, **kind}
        for i, (prompt, kind) in enumerate((prompt, kind) for prompt in prompts for kind in kinds)
    ]


def ask(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    return [summary(choice["text"], choice["finish_reason"], choice["logprobs"]) for choice in answer["choices"]]


def ask_streamed(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, raw = server.post_raw("/v1/completions", body | {"stream": True})
    assert status == 200, raw
    events = list(parse(raw))
    assert events[-1].data == "[DONE]"
    found = [{"text": "", "finish": None, "logprobs": {"tokens": [], "token_logprobs": []}} for _ in range(body.get("n", 1))]
    for event in events[:-1]:
        for choice in event.json()["choices"]:
            mine = found[choice["index"]]
            mine["text"] += choice["text"]
            assert mine["finish"] is None
            mine["finish"] = choice["finish_reason"]
            for name, values in mine["logprobs"].items():
                values += (choice["logprobs"] or {}).get(name, [])
    return [summary(f["text"], f["finish"], f["logprobs"]) for f in found]


def summary(text: str, finish: str, logprobs: dict[str, Any]) -> dict[str, Any]:
    return {"text": text, "finish": finish, "tokens": logprobs["tokens"], "logprobs": [round(p or 0.0, 3) for p in logprobs["token_logprobs"]]}


def together(server: Server, bodies: list[dict[str, Any]], streamed: bool) -> list[list[dict[str, Any]]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: (ask_streamed if streamed else ask)(server, body), bodies))


def close(mine: list[list[dict[str, Any]]], expected: list[list[dict[str, Any]]]) -> None:
    for got, wanted in zip(mine, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert {**a, "logprobs": None} == {**b, "logprobs": None}
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=2e-3)


@pytest.fixture(scope="module")
def alone(toy: Path) -> list[list[dict[str, Any]]]:
    """The reference: plain numpy, one request at a time."""
    with Server(*PLAIN, *WAYS["plain"], "engine.device=reference", f"model.path={toy}") as server:
        server.ready()
        return [ask(server, body) for body in requests()]


@pytest.mark.parametrize("way", WAYS)
def test_answers_do_not_depend_on_the_way(way: str, toy: Path, alone: list[list[dict[str, Any]]]) -> None:
    bodies = requests()
    if "ranks" in way:
        bodies, alone = bodies[::3], alone[::3]
    with Server(*PLAIN, *WAYS[way], f"model.path={toy}") as server:
        server.ready()
        close(together(server, bodies, streamed=False), alone)
        close(together(server, bodies[::-1], streamed=True)[::-1], alone)
        close([ask_streamed(server, body) for body in bodies[::3]], alone[::3])
        if "preempting" in way:
            assert server.metric("vllm:num_preemptions_total") > 0
        assert server.metric("vllm:num_requests_running") == 0


def test_the_kinds_differ(alone: list[list[dict[str, Any]]]) -> None:
    """So that equality above is worth something."""
    assert len({json.dumps(answers) for answers in alone}) == len(alone)
    assert {choice["finish"] for answers in alone for choice in answers} == {"stop", "length"}


def test_a_prompt_is_scored_as_its_answer_was(toy: Path) -> None:
    """Logprobs of an answer, and those of the same ids given as a prompt; perplexity is made of them. Cached or not."""
    with Server(*PLAIN, *WAYS["plain"], f"model.path={toy}") as server:
        server.ready()
        body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
        choice = server.post("/v1/completions", body)[1]["choices"][0]
        ids = choice["prompt_token_ids"] + choice["token_ids"]
        scored = server.post("/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1})[1]["choices"][0]["logprobs"]
        assert scored["token_logprobs"][-40:] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)
        assert scored["top_logprobs"][-1] == pytest.approx(choice["logprobs"]["top_logprobs"][-1], abs=1e-3)
        loss = -sum(scored["token_logprobs"][1:]) / (len(ids) - 1)
        for _ in range(2):
            assert server.post("/get_ppl", {"input": ids})[1]["ppl"] == pytest.approx(loss, abs=1e-4)
