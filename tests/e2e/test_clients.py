"""The clients that people have, unchanged: openai, langchain-openai, curl. The server is the mock engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from engine.mock import mock_answer
from engine.sequence import SamplingParams
from tests.e2e.support import Server
from text.tokenizer import ByteTokenizer

KEY = "a-key-for-tests"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
IGNORE_EOS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("engine.max_batch_size=64", api_key=KEY) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def chat_ids(messages: list[dict[str, str]]) -> list[int]:
    """The prompt that ByteTokenizer's template makes: control tokens are one id each."""
    ids: list[int] = []
    for message in messages:
        ids += [ByteTokenizer.IM_START, *f"{message['role']}\n{message['content']}".encode(), ByteTokenizer.IM_END, *b"\n"]
    return [*ids, ByteTokenizer.IM_START, *b"assistant\n"]


def text_of(ids: list[int]) -> str:
    return bytes(token for token in ids if token < ByteTokenizer.BOS).decode()


def expected_chat(messages: list[dict[str, str]], **fields: object) -> str:
    return text_of(mock_answer(chat_ids(messages), SamplingParams(ignore_eos=True, **fields)))  # type: ignore[arg-type]


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["mock"]
    assert client.models.retrieve("mock").id == "mock"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat_is_the_one_at_a_time_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=40, seed=11, extra_body=IGNORE_EOS)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert choice.message.content == expected_chat(MESSAGES, max_tokens=40, seed=11)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(chat_ids(MESSAGES)), 40)


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock", messages=MESSAGES, max_completion_tokens=7, extra_body=IGNORE_EOS)  # type: ignore[arg-type]
    assert answer.usage is not None and answer.usage.completion_tokens == 7


def test_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_tokens=40, seed=11, stream=True, stream_options={"include_usage": True}, extra_body=IGNORE_EOS
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected_chat(MESSAGES, max_tokens=40, seed=11)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({c.id for c in chunks}) == 1


def test_several_choices_streamed_and_not(client: openai.OpenAI) -> None:
    wanted = {"model": "mock", "messages": MESSAGES, "max_tokens": 20, "seed": 5, "n": 3, "extra_body": IGNORE_EOS}
    whole = client.chat.completions.create(**wanted)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == expected_chat(MESSAGES, max_tokens=20, seed=5)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**wanted, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs(client: openai.OpenAI) -> None:
    wanted = {
        "model": "mock",
        "messages": MESSAGES,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 2,
        "extra_body": IGNORE_EOS,
    }
    content = client.chat.completions.create(**wanted).choices[0].logprobs.content
    assert "".join(item.token for item in content) == expected_chat(MESSAGES, max_tokens=6, seed=2)
    assert all(len(item.top_logprobs) == 3 and item.logprob == pytest.approx(-0.6931, abs=1e-3) for item in content)
    assert all(bytes(item.bytes).decode() == item.token for item in content)
    streamed = [
        item
        for c in client.chat.completions.create(**wanted, stream=True)
        for item in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])
    ]
    assert [item.token for item in streamed] == [item.token for item in content]


def test_stop_strings_end_the_text_before_themselves(client: openai.OpenAI) -> None:
    full = expected_chat(MESSAGES, max_tokens=60, seed=3)
    stop = full[20:23]
    wanted = {"model": "mock", "messages": MESSAGES, "max_tokens": 60, "seed": 3, "stop": [stop, "not there"], "extra_body": IGNORE_EOS}
    choice = client.chat.completions.create(**wanted).choices[0]
    assert (choice.message.content, choice.finish_reason) == (full[: full.index(stop)], "stop")
    chunks = list(client.chat.completions.create(**wanted, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == full[: full.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seed(client: openai.OpenAI) -> None:
    texts = [
        client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=20, seed=seed).choices[0].message.content  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_completions(client: openai.OpenAI) -> None:
    prompts = ["first", "second"]
    answer = client.completions.create(model="mock", prompt=prompts, max_tokens=15, seed=4, n=2, echo=True, extra_body=IGNORE_EOS)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[: len(prompts[i // 2])] for i, choice in enumerate(answer.choices)] == ["first", "first", "second", "second"]
    streamed = "".join(
        c.choices[0].text
        for c in client.completions.create(model="mock", prompt="first", max_tokens=15, seed=4, stream=True, extra_body=IGNORE_EOS)
    )
    params = SamplingParams(max_tokens=15, seed=4, ignore_eos=True)
    assert streamed == text_of(mock_answer(list(b"first"), params))


@pytest.mark.parametrize(
    "change, error, param",
    [
        ({"model": "gpt-x"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
    ],
)
def test_errors_name_the_field(client: openai.OpenAI, change: dict[str, object], error: type[openai.APIStatusError], param: str) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": "mock", "messages": MESSAGES} | change))  # type: ignore[call-overload]
    assert caught.value.param == param
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_async_client_with_many_streams(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> bool:
        messages = [{"role": "user", "content": f"number {i}"}]
        stream = await client.chat.completions.create(
            model="mock", messages=messages, max_tokens=30, seed=i, stream=True, extra_body=IGNORE_EOS
        )  # type: ignore[call-overload]
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        return text == expected_chat(messages, max_tokens=30, seed=i)

    async def main() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(50)))

    assert all(asyncio.run(main()))


def test_leaving_a_stream_early_frees_the_engine(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=4000, stream=True, extra_body=IGNORE_EOS)  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == 0:
            return
    raise AssertionError("the sequence of a closed stream still runs")


def test_langchain(server: Server) -> None:
    chat = ChatOpenAI(model="mock", base_url=server.url + "/v1", api_key=KEY, max_tokens=25, seed=6, max_retries=0, extra_body=IGNORE_EOS)  # type: ignore[call-arg, arg-type]
    messages = [SystemMessage("Be brief."), HumanMessage("Say something.")]
    expected = expected_chat(MESSAGES, max_tokens=25, seed=6)
    answer = chat.invoke(messages)
    assert answer.content == expected
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 25
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == expected
    assert [a.content for a in chat.batch([messages, messages])] == [expected, expected]


def test_langchain_completions(server: Server) -> None:
    model = OpenAI(model="mock", base_url=server.url + "/v1", api_key=KEY, max_tokens=12, seed=8, max_retries=0, extra_body=IGNORE_EOS)  # type: ignore[call-arg, arg-type]
    expected = text_of(mock_answer(list(b"Once"), SamplingParams(max_tokens=12, seed=8, temperature=model.temperature, ignore_eos=True)))
    assert model.invoke("Once") == expected
    assert "".join(model.stream("Once")) == expected


def curl(server: Server, *words: str, body: dict[str, object] | None = None) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    data = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
    command = [program, "-sN", "--noproxy", "*", "-H", f"Authorization: Bearer {KEY}", *data, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def test_curl(server: Server) -> None:
    body: dict[str, object] = {"model": "mock", "messages": MESSAGES, "max_tokens": 10, "seed": 1, "ignore_eos": True}
    whole = json.loads(curl(server, server.url + "/v1/chat/completions", body=body))
    assert whole["choices"][0]["message"]["content"] == expected_chat(MESSAGES, max_tokens=10, seed=1)
    streamed = curl(server, server.url + "/v1/chat/completions", body=body | {"stream": True})
    assert streamed.endswith("data: [DONE]\n\n")
    assert curl(server, "-o", "/dev/null", "-w", "%{http_code}", server.url + "/health") == "200"
