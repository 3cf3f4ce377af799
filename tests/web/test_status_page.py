"""The status page and its numbers: what they say of a running server, what they do not say, and how a browser shows them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.loading import memory_plan
from api.status import MAX_CELLS, block_map, memory
from engine.cache.blocks import BlockPool
from engine.loop import Engine
from tests.api.harness import Running, mock_config, serving, until
from tests.harness import configure
from tests.web.browser import browser, needs_browser

LONG: dict[str, Any] = {"prompt": "x" * 100, "max_tokens": 380, "ignore_eos": True, "seed": 1}
SECRET = "sk-status-page"
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A step takes 20 ms: an answer runs while it is looked at."""
    with serving(mock_config(engine={"mock_step_s": 0.02}, cache={"num_blocks": 1024}, model={"model_name": HOSTILE})) as running:
        yield running
        running.settled()


def numbers(server: Running, key: str = "") -> Any:
    status, headers, data = server.request("GET", "/status.json", headers={"Authorization": f"Bearer {key}"} if key else {})
    assert status == 200 and headers["cache-control"] == "no-store", data
    return json.loads(data)


def ask(server: Running, **fields: Any) -> threading.Thread:
    """A long answer, until it runs."""
    thread = threading.Thread(target=lambda: server.post("/v1/completions", {**LONG, **fields}), daemon=True)
    thread.start()
    until(lambda: any(a.choices[0].num_generated > 3 for a in list(server.service.live)), 5, "no token came")
    return thread


def end(server: Running, *threads: threading.Thread) -> None:
    server.post("/abort_request", {"abort_all": True})
    for thread in threads:
        thread.join(10)


def test_the_numbers_are_those_of_the_engine(slow: Running) -> None:
    before = numbers(slow)
    thread = ask(slow)
    time.sleep(0.6)  # an answer is kept for half a second
    seen = numbers(slow)
    end(slow, thread)
    blocks, (sequence,) = seen["blocks"], seen["sequences"]
    assert seen["status"] == "ready" and seen["queue"] == {"running": 1, "waiting": 0, "waiting_tokens": 0}
    assert (sequence["status"], sequence["prompt"]) == ("RUNNING", 100) and sequence["generated"] > 3
    assert blocks["total"] == len(blocks["cells"]) == 1024 and blocks["per_cell"] == 1
    held = [cell for cell in blocks["cells"] if cell and cell[0]]
    assert len(held) == blocks["active"] == sequence["blocks"] >= 7
    assert {cell[3] for cell in held} == {sequence["id"]}
    assert 0.3 < max(cell[4] for cell in held) <= sequence["age_s"] + 0.2
    assert blocks["free"] + blocks["active"] + blocks["cached"] == 1024
    assert seen["counters"]["generation_tokens"] > before["counters"]["generation_tokens"] and seen["now_s"] > before["now_s"]


def test_what_was_computed_stays_cached_and_ages(slow: Running) -> None:
    slow.post("/reset_prefix_cache", None)
    slow.post("/v1/completions", {"prompt": "y" * 64, "max_tokens": 1})
    time.sleep(0.6)
    first = numbers(slow)
    kept = [i for i, cell in enumerate(first["blocks"]["cells"]) if cell]
    assert len(kept) == first["blocks"]["cached"] == 4
    time.sleep(0.7)
    second = numbers(slow)["blocks"]["cells"]
    for i in kept:
        assert second[i][:2] == [0, 1] and second[i][4] > first["blocks"]["cells"][i][4]


def test_one_answer_serves_everybody_for_half_a_second(slow: Running) -> None:
    time.sleep(0.6)
    assert len({numbers(slow)["now_s"] for _ in range(5)}) <= 2


def test_a_large_pool_is_shown_in_few_cells() -> None:
    pool = BlockPool(100_000, lambda block: None, lambda: None)
    pool.now_s = 5.0
    table = [pool.take().id for _ in range(30)]
    turns = 0

    async def beside() -> dict[str, Any]:
        nonlocal turns
        making = asyncio.ensure_future(block_map(pool.blocks, [(7, table)], 8.0))
        while not making.done():
            turns += 1
            await asyncio.sleep(0)
        return await making

    shown = asyncio.run(beside())
    assert turns > 40  # others had their turn
    assert len(shown["cells"]) <= MAX_CELLS and shown["per_cell"] == 25
    assert shown["cells"][:3] == [[25, 0, 0, 7, 3.0], [5, 0, 0, 7, 3.0], 0]


def test_the_numbers_need_a_key_and_name_none() -> None:
    with serving(mock_config(server={"api_keys": [SECRET]})) as server:
        assert server.request("GET", "/status.json")[0] == 401
        status, _, page = server.request("GET", "/")
        assert status == 200 and b"data-asks-key" in page.split(b"<header>")[0]
        headers = {"Authorization": f"Bearer {SECRET}"}
        body = {"prompt": "a private matter", "max_tokens": 2, "session_id": 77}
        assert server.request("POST", "/v1/completions", body, headers)[0] == 200
        text = json.dumps(numbers(server, SECRET))
        assert SECRET not in text and hashlib.sha256(SECRET.encode()).hexdigest() not in text and "private" not in text
        server.settled()


def test_before_the_model_is_there_the_numbers_say_so() -> None:
    with serving(mock_config()) as server:
        served, server.service._served = server.service._served, None
        seen = numbers(server)
        assert seen["status"] == "starting" and seen["memory"] is None and seen["blocks"] is None and seen["sequences"] == []
        server.service._served = served
        time.sleep(0.6)
        assert numbers(server)["status"] == "ready"


def test_the_page_allows_its_own_script_and_nothing_else(slow: Running) -> None:
    status, headers, data = slow.request("GET", "/")
    page, policy = data.decode(), headers["content-security-policy"]
    assert status == 200 and headers["content-type"].startswith("text/html") and "default-src 'none'" in policy and "unsafe" not in policy
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"{directive} 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}';" in policy
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|https?://(?!www\.w3\.org)|@import|url\(| on\w+=| style=", page
    )
    assert HOSTILE not in page and "data-asks-key>" not in page


@needs_browser
def test_a_browser_shows_the_blocks_and_no_error(slow: Running) -> None:
    async def look() -> None:
        async with browser() as page:
            await page.open(slow.url + "/")
            await page.until("document.querySelectorAll('#map i').length === 1024")
            threads = [await asyncio.to_thread(ask, slow, prompt=f"{i}" * 120) for i in range(3)]
            await page.until("document.querySelectorAll('#map i.active').length > 20")
            title = await page.value("document.querySelector('#map i.active').title")
            assert re.fullmatch(r"block \d+ ACTIVE, sequence \d+, [\d.]+ s", title)
            assert await page.value("document.querySelectorAll('#line tr').length") == 3
            await page.until("document.querySelector('#s-out polyline').getAttribute('points').split(' ').length >= 3")
            await page.until("parseFloat(document.getElementById('v-out').textContent) > 10")
            assert await page.value("document.getElementById('state').textContent") == "ready"
            assert await page.value("document.getElementById('name').textContent") == HOSTILE  # as text
            assert await page.value("document.images.length") == 0
            light = await page.value("getComputedStyle(document.body).backgroundColor")
            await page.scheme("dark")
            assert await page.value("getComputedStyle(document.body).backgroundColor") != light
            await asyncio.to_thread(end, slow, *threads)
            await page.until(
                "document.querySelectorAll('#map i.active').length === 0 && document.querySelectorAll('#map i.cached').length > 5"
            )
            assert not page.errors
            assert all(url.startswith((slow.url, "data:")) for url in page.requests)

    asyncio.run(look())


@needs_browser
def test_a_browser_is_asked_for_the_key() -> None:
    async def look(server: Running) -> None:
        async with browser() as page:
            await page.open(server.url + "/")
            assert not await page.value("document.getElementById('ask').hidden")
            await page.value("document.getElementById('key').focus()")
            await page.type(SECRET)
            await page.value("document.querySelector('#form button').click()")
            await page.until("document.querySelectorAll('#map i').length === 512")
            assert await page.value("document.getElementById('ask').hidden")
            assert not page.errors

    with serving(mock_config(server={"api_keys": [SECRET]})) as server:
        asyncio.run(look(server))
        server.settled()


def test_the_memory_plan_of_a_model(smollm2: Path) -> None:
    """What `--plan` prints for weights and workspace, and the KV blocks that there are."""
    knobs = {"engine": {"device": "reference", "session_len": 128, "max_batch_size": 2}, "cache": {"num_blocks": 40}}
    config = configure(model={"path": str(smollm2)}, server={"log_stats_s": 0.0}, **knobs)
    plan = memory_plan(config)
    with serving(config) as server:
        seen = numbers(server)["memory"]
        assert (seen["weights"], seen["workspace"], seen["block_bytes"]) == (plan.weights, plan.workspace, plan.block_bytes)
        assert seen["kv_bytes"] == 40 * plan.block_bytes and sum(seen["weights"].values()) > 50 << 20
        gone = Engine(replace(config, model=replace(config.model, path="no such file")), server.engine.spec, 128, server.engine._executor)
        assert memory(gone) == {"problem": "The plan cannot be made: ModelError."}


def test_the_mock_engine_has_no_memory_plan(slow: Running) -> None:
    assert numbers(slow)["memory"] is None
