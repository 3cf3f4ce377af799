"""The SSE parser, and the load generator against a small server that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from bench import load
from bench.client import SseParser, Target
from bench.load import Pace
from bench.workload import Job


def events(data: bytes, size: int) -> list[tuple[bytes, bytes]]:
    parser = SseParser()
    return [event for at in range(0, len(data), size) for event in parser.feed(data[at : at + size])]


STREAM = b': ping\n\ndata: {"a": 1}\n\ndata: one\r\ndata:two\r\nid: 4\r\n\r\nevent: error\ndata:  x\n\n\n\ndata: [DONE]\n\ndata: unfinished'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_sse_cut_anywhere(size: int) -> None:
    assert events(STREAM, size) == [(b"", b'{"a": 1}'), (b"", b"one\ntwo"), (b"error", b" x"), (b"", b"[DONE]")]


def test_sse_event_size_is_bounded() -> None:
    parser = SseParser()
    with pytest.raises(ValueError, match="longer than"):
        for _ in range(9):
            list(parser.feed(b"x" * (1 << 20)))


def chunk(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


class Fake:
    """A server that streams `max_tokens` chunks and usage; the first prompt id chooses how it misbehaves."""

    def __init__(self, gap_s: float) -> None:
        self.gap_s = gap_s
        self.seen: list[dict] = []
        self.running = self.peak = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self.stream(request, body)
        finally:
            self.running -= 1

    async def stream(self, request: web.Request, body: dict) -> web.StreamResponse:
        kind = body["prompt"][0] if "prompt" in body else 0
        if kind == 503:
            return web.json_response({"error": {"message": "the queue is full", "type": "x"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(self.gap_s)
            piece = {"delta": {"content": f"t{i} "}} if "messages" in body else {"text": f"t{i} "}
            await response.write(chunk(choices=[piece | {"index": 0, "finish_reason": None}]))
            if kind == 1:
                await response.write(b'event: error\ndata: {"error": {"message": "rank 0 died"}}\n\n')
                return response
            if kind == 2:
                assert request.transport is not None
                request.transport.abort()
                return response
        await response.write(chunk(choices=[{"text": "", "index": 0, "finish_reason": "length"}]))
        await response.write(chunk(choices=[], usage={"prompt_tokens": 11, "completion_tokens": body["max_tokens"]}))
        if kind != 3:
            await response.write(b"data: [DONE]\n\n")
        return response


def with_server(test: Callable[[str, Fake], Awaitable[None]], gap_s: float = 0.0) -> None:
    async def body() -> None:
        fake, app = Fake(gap_s), web.Application()
        app.router.add_post("/v1/completions", fake.answer)
        app.router.add_post("/v1/chat/completions", fake.answer)
        app.router.add_get("/v1/models", _models)
        app.router.add_get("/health", _models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            await asyncio.wait_for(test(f"http://127.0.0.1:{runner.addresses[0][1]}", fake), 30)
        finally:
            await runner.cleanup()

    asyncio.run(body())


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "tiny"}]})


def jobs(count: int, kind: int = 0, tokens: int = 3) -> list[Job]:
    return [Job(0.0, [kind, 5], 2, tokens) for _ in range(count)]


def test_answers_are_counted_from_usage() -> None:
    async def test(url: str, fake: Fake) -> None:
        answers, duration, _ = await load.run(Target(url, "tiny", ignore_eos=True), jobs(5), Pace(False, 2), keep_text=True)
        assert [a.error for a in answers] == [""] * 5
        assert all((a.output_len, a.input_len, a.text, len(a.chunk_s)) == (3, 11, "t0 t1 t2 ", 3) for a in answers)
        assert fake.peak <= 2 and duration >= max(a.end_s for a in answers)
        assert fake.seen[0] == {
            "prompt": [0, 5], "model": "tiny", "max_tokens": 3, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip

    with_server(test)


def test_chat_sends_messages() -> None:
    async def test(url: str, fake: Fake) -> None:
        answers, _, _ = await load.run(Target(url, "tiny", "chat"), [Job(0.0, "hello", 0, 2)], Pace(False), keep_text=True)
        assert answers[0].text == "t0 t1 " and fake.seen[0]["messages"] == [{"role": "user", "content": "hello"}]
        with pytest.raises(ValueError, match="not token ids"):
            await load.run(Target(url, "tiny", "chat"), jobs(1), Pace(False))

    with_server(test)


@pytest.mark.parametrize(
    ("kind", "reason"), [(503, "HTTP 503: the queue is full"), (1, "rank 0 died"), (2, "Client"), (3, r"without \[DONE\]")]
)
def test_failures_keep_their_reason_and_hurt_nobody(kind: int, reason: str) -> None:
    async def test(url: str, _: Fake) -> None:
        answers, _, _ = await load.run(Target(url, "tiny"), [*jobs(2), *jobs(1, kind), *jobs(2)], Pace(False))
        assert [a.ok for a in answers] == [True, True, False, True, True]
        assert reason.replace("\\", "") in answers[2].error

    with_server(test)


def test_nobody_listening_is_an_error_not_an_exception() -> None:
    answers, _, _ = asyncio.run(load.run(Target("http://127.0.0.1:9", "tiny"), jobs(2), Pace(False)))
    assert all("Connect" in a.error for a in answers)


def test_open_loop_counts_waiting_in_the_client() -> None:
    """Four requests due at once through one connection: each waits for those before it, and that wait is latency."""

    async def test(url: str, _: Fake) -> None:
        open_loop, _, _ = await load.run(Target(url, "tiny"), jobs(4, tokens=5), Pace(True, 1))
        closed, _, _ = await load.run(Target(url, "tiny"), jobs(4, tokens=5), Pace(False, 1))
        assert sorted(a.ttft_s for a in open_loop)[-1] > 0.10  # three answers of 5 x 10 ms went first
        assert all(a.ttft_s < 0.10 for a in closed)

    with_server(test, gap_s=0.01)


def test_arrivals_keep_their_schedule() -> None:
    async def test(url: str, _: Fake) -> None:
        plan = [Job(0.03 * i, [0, 5], 2, 20) for i in range(5)]
        answers, _, _ = await load.run(Target(url, "tiny"), plan, Pace(True))
        for job, a in zip(plan, answers, strict=True):
            assert a.ok and a.intended_s == job.at_s and a.sent_s >= job.at_s
        assert answers[4].sent_s < answers[0].end_s  # arrivals did not wait for answers

    with_server(test, gap_s=0.01)


def test_the_run_is_bounded() -> None:
    async def test(url: str, fake: Fake) -> None:
        plan = [*jobs(1, tokens=1000), Job(60.0, [0, 5], 2, 1)]
        answers, duration, _ = await load.run(Target(url, "tiny"), plan, Pace(True, max_seconds=0.3))
        assert "cut off" in answers[0].error and "not sent" in answers[1].error and duration < 5
        answers, _, _ = await load.run(Target(url, "tiny", timeout_s=0.2), jobs(1, tokens=1000), Pace(True))
        assert answers[0].error == "no end within 0.2 s"

    with_server(test, gap_s=0.01)


def command(*words: str) -> load.argparse.Namespace:
    return load.parser().parse_args(words)


def test_the_command_line_from_end_to_end() -> None:
    async def test(url: str, fake: Fake) -> None:
        lengths = ["--num-prompts", "6", "--num-warmups", "2", "--input-len", "4", "--output-len", "2", "--request-rate", "200"]
        rest = ["--goodput", "ttft:60000", "--ready-check-timeout-sec", "5", "--extra-body", '{"cache_prompt": false}', "--save-detailed"]
        out = await load.bench(command("--url", url + "/", *lengths, *rest))
        assert out["completed"] == 6 and out["model_id"] == "tiny" and out["request_goodput"] > 0
        assert len(fake.seen) == 8 and fake.seen[0]["cache_prompt"] is False
        assert out["generated_texts"] == ["t0 t1 "] * 6
        json.dumps(out)

    with_server(test)


def test_exit_codes_and_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", "http://127.0.0.1:9", "--model", "x", "--num-prompts", "2", "--json"]) == 1
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["completed"] == 0 and last["failed"] == 2 and sum(last["error_counts"].values()) == 2
    assert load.main(["--url", "http://127.0.0.1:9"]) == 2  # the model's name cannot be asked for
    assert load.main(["--model", "x", "--dataset", "corpus"]) == 2
    assert "--dataset-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--num-prompts", "0"],
        ["--request-rate", "-1"],
        ["--request-rate", "nan"],
        ["--num-prompts", "9999999"],
        ["--extra-body", "[]"],
        ["--nonsense"],
    ],
)
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(*words)
    assert words[0] in capsys.readouterr().err


def test_results_are_saved_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "runs.jsonl"

    def serve_and_save() -> None:
        async def test(url: str, _: Fake) -> None:
            words = ["--url", url, "--num-prompts", "4", "--input-len", "4", "--output-len", "2", "--save-result", str(saved)]
            assert await asyncio.to_thread(load.main, words) == 0

        with_server(test)

    serve_and_save()
    serve_and_save()
    assert [json.loads(line)["completed"] for line in saved.read_text().splitlines()] == [4, 4]
    assert load.main(["--compare", str(saved), str(saved), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["compare"]
    assert [row["ratio"] for row in rows] == [1.0] * 4


def test_importing_the_load_generator_loads_no_torch() -> None:
    import subprocess

    code = "import sys, bench.load; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
