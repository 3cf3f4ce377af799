"""Clients that people use, unchanged: the openai package, langchain-openai, curl (bar 9)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.api.harness import Running

MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=40, seed=2)
    assert whole.usage is not None and whole.usage.prompt_tokens > 0 and whole.object == "chat.completion"
    text, finish, usage = "", None, None
    stream = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_tokens=40, seed=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content and finish == whole.choices[0].finish_reason
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_n_logprobs_stop_and_extra_fields(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_completion_tokens=10, seed=4, n=3, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True, "top_k": 50, "min_p": 0.0, "skip_special_tokens": False},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None and len(choice.logprobs.content) == 10
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    text = answer.choices[0].message.content
    assert text is not None
    stopped = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_completion_tokens=10, seed=4, stop=[text[4:6]], extra_body={"ignore_eos": True}
    )
    assert stopped.choices[0].message.content == text[: text.index(text[4:6])] and stopped.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mock", prompt=["a", "b"], max_tokens=5, seed=1, n=2, echo=True)
    assert len(answer.choices) == 4 and answer.choices[3].text.startswith("b")
    chunks = list(client.completions.create(model="mock", prompt="a", max_tokens=5, seed=1, logprobs=1, stream=True))
    assert (
        "".join(c.choices[0].text for c in chunks)
        == client.completions.create(model="mock", prompt="a", max_tokens=5, seed=1).choices[0].text
    )


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="mock", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature" and bad.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="mock", prompt="a" * 2000)
    assert long.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mock"]
    assert client.models.retrieve("mock").owned_by == "numbatch"


def test_the_async_client_and_leaving_a_stream(server: Running) -> None:
    async def work() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            text = ""
            stream = await client.chat.completions.create(model="mock", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True})
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if len(text) >= 5:
                    await stream.close()
                    break
            return text

    assert len(asyncio.run(work())) >= 5
    server.settled()


def test_langchain(server: Running) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="mock", temperature=0, max_retries=0, seed=3, max_tokens=30)
    whole = model.invoke("hi")
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in model.stream("hi")) == whole.content
    assert len(model.batch(["a", "b", "c"])) == 3
    with pytest.raises(openai.BadRequestError):
        model.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("hi")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Running) -> None:
    body = '{"model": "mock", "stream": true, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}'
    command = [
        "curl",
        "-sS",
        "-N",
        "--noproxy",
        "*",
        f"{server.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")
