"""`numbatch serve gradio`: the talks behind its buttons, its command line, and the page in a browser."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.remote import APIClient, RunningServer
from cli import serve_gradio
from cli.arguments import UsageError
from cli.serve_gradio import Talks, main, plain, to_answer
from tests.api.harness import Running, mock_config, serving, until
from tests.web.browser import browser, needs_browser

ENDLESS = {"max_tokens": 380, "ignore_eos": True, "temperature": 0.0}
ASK = [{"role": "user", "content": "hello"}]


class Endless(APIClient):
    """Its answers do not end by themselves: the mock engine's may after a few tokens, as it draws."""

    def chat(self, messages: Any, **fields: Any) -> Iterator[str]:
        return super().chat(messages, **fields, ignore_eos=True)


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A step takes 20 ms: an answer can be stopped."""
    with serving(mock_config(engine={"mock_step_s": 0.02})) as running:
        yield running
        running.settled()


def test_an_answer_grows_and_stop_ends_it_here_and_on_the_server(slow: Running) -> None:
    with APIClient(slow.url) as client:
        talks = Talks(client)
        seen: list[str] = []
        for text in talks.answer("one", ASK, ENDLESS):
            seen.append(text)
            if len(seen) == 4:
                talks.stop("two")  # somebody else's
                assert slow.service.live
                talks.stop("one")
        assert 4 <= len(seen) < 12 and all(b.startswith(a) for a, b in zip(seen, seen[1:], strict=False))
        slow.settled()
        talks.stop("one")  # nothing runs any more


def test_stop_before_the_first_token(slow: Running) -> None:
    with APIClient(slow.url) as client, APIClient(slow.url) as other:
        talks = Talks(client)
        done: list[list[str]] = []
        thread = threading.Thread(target=lambda: done.append(list(talks.answer("one", ASK, ENDLESS))))
        thread.start()
        until(lambda: bool(slow.service.live), 5, "the request did not begin")
        talks._client = other
        talks.stop("one")
        thread.join(5)
        assert done and len(done[0][-1]) < 300
        slow.settled()


def test_messages_are_plain_text() -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "metadata": None},
        {"role": "assistant", "content": "b", "options": None},
    ]
    assert plain(history) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert to_answer(history) == history[:1] and to_answer(history[1:]) == [] and to_answer([]) == []


def test_without_gradio_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match=r"numbatch\[web\]"):
        main(["http://127.0.0.1:9"])


def test_the_command_line_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(UsageError, match="--restful-api False"):
        main(["http://127.0.0.1:9", "--restful-api", "False"])
    assert main(["http://127.0.0.1:9"]) == 1
    assert "Nobody answers at http://127.0.0.1:9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


@needs_browser
def test_a_browser_sends_watches_stops_and_regenerates(slow: Running) -> None:
    gradio = pytest.importorskip("gradio")

    async def use(address: str) -> None:
        async with browser() as page:
            await page.open(address)
            await page.until("!!document.querySelector('#text textarea') && !!document.querySelector('#send')")
            text = (
                "(Array.from(document.querySelectorAll('#chat .bot.message, #chat [data-testid=bot]')).pop() || {innerText: ''}).innerText"
            )
            await page.value("document.querySelector('#text textarea').focus()")
            await page.type("hello page")
            await page.value("document.querySelector('#send').click()")
            await asyncio.to_thread(until, lambda: bool(slow.service.live), 5, "nothing was asked")
            early = await page.until(f"{text}.length > 20 && {text}.length")
            await page.until(f"{text}.length > {early + 10}")  # it streams
            assert slow.service.live, "the answer came in one piece"
            await page.value("document.querySelector('#stop').click()")
            await asyncio.to_thread(until, lambda: not slow.service.live, 5, "stop did not reach the server")
            await asyncio.sleep(0.5)
            assert "hello page" in await page.value("document.querySelector('#chat').innerText")
            stopped = await page.value(text)
            assert len(stopped) >= early
            await page.value("document.querySelector('#again').click()")
            await asyncio.to_thread(until, lambda: bool(slow.service.live), 5, "regenerate asked nothing")
            await page.value("document.querySelector('#stop').click()")
            await asyncio.to_thread(until, lambda: not slow.service.live, 5, "stop did not reach the server")
            assert await page.value("document.querySelectorAll('#sampling').length") == 1
            await page.value("document.querySelector('#clear').click()")
            await page.until("!document.querySelector('#chat').innerText.includes('hello page')")
            assert not page.errors
            await page.value("document.querySelector('#text textarea').focus()")
            await page.type("and then")
            await page.value("document.querySelector('#send').click()")
            await asyncio.to_thread(until, lambda: bool(slow.service.live), 5, "nothing was asked")
            await page.open("about:blank")
            await asyncio.to_thread(until, lambda: not slow.service.live, 4, "the page was left, its answer was not")
            assert all(url.startswith((address, "about:", "data:", "blob:", address.replace("http", "ws"))) for url in page.requests), (
                page.requests
            )

    with Endless(slow.url) as client:
        page = serve_gradio.build(gradio, client)
        _, address, _ = page.launch(
            server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, ssr_mode=False, theme=serve_gradio._theme(gradio),
            head=serve_gradio.QUIET_HEAD, footer_links=[],
        )  # fmt: skip
        try:
            asyncio.run(use(address.rstrip("/")))
        finally:
            page.close()


def test_before_a_model_a_server_is_started_that_only_the_page_can_call(smollm2: Path) -> None:
    args = serve_gradio.parser().parse_args([str(smollm2), "--device", "mock", "--session-len", "256"])
    with serve_gradio._client(args) as client:
        assert client.url.startswith("http://127.0.0.1:") and client.get("/server_info")["session_len"] == 256
        assert "".join(client.chat(ASK, max_tokens=3)) != ""
        with APIClient(client.url) as stranger, pytest.raises(ValueError, match="API key"):
            stranger.get("/server_info")
    assert isinstance(client, RunningServer) and client.process.poll() == 0
