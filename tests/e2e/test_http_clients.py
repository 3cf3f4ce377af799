"""More of the clients that people have, unchanged: openai's responses, anthropic, litellm, tritonclient. The mock engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI

from engine.mock import mock_answer
from engine.sequence import SamplingParams
from tests.api.harness import Running, mock_config, serving
from text.tokenizer import ByteTokenizer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks the network for prices

import litellm
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

KEY = "a-key-for-tests"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(mock_config(server={"api_keys": [KEY]})) as running:
        yield running
        running.settled()


def chat_ids(*messages: tuple[str, str], opened: str = "") -> list[int]:
    """The prompt that ByteTokenizer's template makes; `opened`: the beginning of an answer that is gone on with."""
    ids: list[int] = []
    for role, content in messages:
        ids += [ByteTokenizer.IM_START, *f"{role}\n{content}".encode(), ByteTokenizer.IM_END, *b"\n"]
    return [*ids, ByteTokenizer.IM_START, *b"assistant\n", *opened.encode()]


def answer_to(prompt: list[int], **fields: Any) -> str:
    ids = mock_answer(prompt, SamplingParams(**fields), (ByteTokenizer.EOS,))
    return bytes(token for token in ids if token < ByteTokenizer.BOS).decode()


# -- openai ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_a_conversation_over_responses(client: openai.OpenAI) -> None:
    seeded: dict[str, Any] = {"model": "mock", "max_output_tokens": 12, "extra_body": {"seed": 3, "ignore_eos": True}}
    first = client.responses.create(input="hi", instructions="Be brief.", **seeded)
    assert first.output_text == answer_to(chat_ids(("system", "Be brief."), ("user", "hi")), max_tokens=12, seed=3, ignore_eos=True)
    second = client.responses.create(input="and then?", previous_response_id=first.id, **seeded)
    history = ("user", "hi"), ("assistant", first.output_text), ("user", "and then?")
    assert second.output_text == answer_to(chat_ids(*history), max_tokens=12, seed=3, ignore_eos=True)
    items: list[Any] = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and then?"}]
    assert client.responses.create(input=items, **seeded).output_text == second.output_text
    assert client.responses.retrieve(second.id) == second
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in listed] == ["and then?"]  # type: ignore[union-attr]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError, match="no response") as caught:
        client.responses.create(input="x", previous_response_id=second.id, **seeded)
    assert caught.value.param == "previous_response_id"


def test_streamed_responses(client: openai.OpenAI) -> None:
    seeded: dict[str, Any] = {"model": "mock", "max_output_tokens": 12, "extra_body": {"seed": 3, "ignore_eos": True}}
    events = list(client.responses.create(input="hi", stream=True, **seeded))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer_to(chat_ids(("user", "hi")), max_tokens=12, seed=3, ignore_eos=True)
    assert events[-1].type == "response.incomplete" and events[-1].response.usage.output_tokens == 12
    with client.responses.stream(input="hi", model="mock", temperature=0) as stream:  # to its own end
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == answer_to(chat_ids(("user", "hi")), max_tokens=400, temperature=0.0)
    assert final.status == "completed"


def test_a_streamed_response_is_cancelled() -> None:
    with (
        serving(mock_config(engine={"mock_step_s": 0.01})) as slow,
        openai.OpenAI(base_url=slow.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.responses.create(input="hi", model="mock", max_output_tokens=450, stream=True, extra_body={"ignore_eos": True})
        events = iter(stream)
        name = next(events).response.id  # type: ignore[union-attr]
        assert client.responses.cancel(name).status == "cancelled"
        last = list(events)[-1]
        assert last.type == "response.failed" and last.response.status == client.responses.retrieve(name).status == "cancelled"
        assert 0 < last.response.usage.output_tokens < 450  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="not running"):
            client.responses.cancel(name)


def test_a_response_of_another_key_is_nobodys(server: Running) -> None:
    with serving(mock_config(server={"api_keys": [KEY, "another"]})) as both:
        mine = openai.OpenAI(base_url=both.url + "/v1", api_key=KEY, max_retries=0)
        other = openai.OpenAI(base_url=both.url + "/v1", api_key="another", max_retries=0)
        made = mine.responses.create(input="hi", model="mock", max_output_tokens=2)
        assert mine.responses.retrieve(made.id).id == made.id
        for call in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                call(made.id)


def test_what_is_not_there_is_refused_by_name(client: openai.OpenAI) -> None:
    calls = {
        "input": lambda: client.embeddings.create(model="mock", input="hi"),
        "prompt": lambda: client.images.generate(model="mock", prompt="hi"),
        "tools": lambda: client.responses.create(model="mock", input="hi", tools=[{"type": "web_search"}]),
        "text.format": lambda: client.responses.create(model="mock", input="hi", text={"format": {"type": "json_object"}}),
    }
    for param, call in calls.items():
        with pytest.raises(openai.BadRequestError, match="support") as caught:
            call()
        assert caught.value.param == param


def test_langchain_over_responses(server: Running) -> None:
    chat = ChatOpenAI(
        model="mock",
        base_url=server.url + "/v1",
        api_key=KEY,
        use_responses_api=True,
        max_tokens=9,
        max_retries=0,
        temperature=0.5,
        extra_body={"seed": 8, "ignore_eos": True},
    )  # type: ignore[call-arg, arg-type]
    expected = answer_to(chat_ids(("user", "hi")), max_tokens=9, seed=8, temperature=0.5, ignore_eos=True)
    assert chat.invoke("hi").text == expected
    assert "".join(chunk.text for chunk in chat.stream("hi")) == expected


# -- anthropic ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    body: dict[str, Any] = {"model": "mock", "max_tokens": 12, "messages": HI, "system": "Be brief.", "extra_body": {"temperature": 0}}
    prompt = chat_ids(("system", "Be brief."), ("user", "hi"))
    expected = answer_to(prompt, max_tokens=12, temperature=0.0)
    made = claude.messages.create(**body)
    assert made.content[0].text == expected and made._request_id  # type: ignore[union-attr]
    with claude.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().usage.output_tokens == made.usage.output_tokens
    counted = claude.messages.count_tokens(model="mock", messages=HI, system="Be brief.")  # type: ignore[arg-type]
    assert counted.input_tokens == len(prompt)


def test_anthropic_goes_on_with_the_assistants_words(claude: anthropic.Anthropic) -> None:
    messages: Any = [*HI, {"role": "assistant", "content": "Well"}]
    made = claude.messages.create(model="mock", max_tokens=7, messages=messages, extra_body={"temperature": 0})
    assert made.content[0].text == answer_to(chat_ids(("user", "hi"), opened="Well"), max_tokens=7, temperature=0.0)  # type: ignore[union-attr]


def test_anthropic_models(claude: anthropic.Anthropic) -> None:
    (only,) = claude.models.list()
    assert only.id == claude.models.retrieve("mock").id == "mock" and only.max_input_tokens == 511


def test_anthropic_errors(server: Running, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="another", max_tokens=1, messages=HI)  # type: ignore[arg-type]
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="tools is not supported"):
        claude.messages.create(model="mock", max_tokens=1, messages=HI, tools=[{"name": "f", "input_schema": {"type": "object"}}])  # type: ignore[arg-type]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
        claude.messages.create(model="mock", max_tokens=1, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.AuthenticationError), anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as wrong:
        wrong.messages.create(model="mock", max_tokens=1, messages=HI)  # type: ignore[arg-type]


# -- litellm -----------------------------------------------------------------------------------------------


def test_litellm(server: Running) -> None:
    expected = answer_to(chat_ids(("user", "hi")), max_tokens=10, seed=2, ignore_eos=True)
    common: dict[str, Any] = {"messages": HI, "max_tokens": 10, "api_key": KEY}
    seeded = {"seed": 2, "extra_body": {"ignore_eos": True}}
    made = litellm.completion("openai/mock", api_base=server.url + "/v1", **common, **seeded)
    assert made.choices[0].message.content == expected and made.usage.completion_tokens == 10
    stream = litellm.completion("openai/mock", api_base=server.url + "/v1", stream=True, **common, **seeded)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    text = litellm.text_completion(
        "Once", model="text-completion-openai/mock", max_tokens=6, api_key=KEY, api_base=server.url + "/v1", **seeded
    )
    assert text.choices[0].text == answer_to([*b"Once"], max_tokens=6, seed=2, ignore_eos=True)
    greedy = answer_to(chat_ids(("user", "hi")), max_tokens=10, temperature=0.0)
    assert litellm.completion("anthropic/mock", api_base=server.url, temperature=0.0, **common).choices[0].message.content == greedy
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion("openai/mock", api_base=server.url + "/v1", **{**common, "api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion("openai/mock", api_base=server.url + "/v1", temperature=9, **common)


# -- tritonclient ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tritons(server: Running) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(f"{server.host}:{server.port}")
    yield made
    made.close()


def auth() -> dict[str, str]:
    """The client writes into it."""
    return {"Authorization": f"Bearer {KEY}"}


def tensor(name: str, values: list[Any], datatype: str, binary: bool = True) -> triton.InferInput:
    kinds = {"BYTES": object, "FP32": np.float32, "INT32": np.int32, "UINT64": np.uint64, "BOOL": bool}
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array([v.encode() if isinstance(v, str) else v for v in values], kinds[datatype]), binary_data=binary)
    return made


def test_triton_health_and_metadata(tritons: triton.InferenceServerClient) -> None:
    assert tritons.is_server_live() and tritons.is_server_ready()
    assert tritons.is_model_ready("mock", headers=auth()) and tritons.is_model_ready("mock", "1", headers=auth())
    assert not tritons.is_model_ready("another", headers=auth())
    assert tritons.get_server_metadata(headers=auth())["name"] == "numbatch"
    metadata = tritons.get_model_metadata("mock", headers=auth())
    assert metadata["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": [-1]}
    config = tritons.get_model_config("mock", headers=auth())
    assert [each["name"] for each in config["output"]] == ["text_output", "finish_reason", "output_tokens"]
    assert tritons.get_model_repository_index(headers=auth())[0]["state"] == "READY"
    with pytest.raises(InferenceServerException, match="Incorrect API key"):
        tritons.get_server_metadata()


@pytest.mark.parametrize("binary", [True, False])
def test_triton_infer(tritons: triton.InferenceServerClient, binary: bool) -> None:
    inputs = [
        tensor("text_input", ["Once", "Twice ü"], "BYTES", binary), tensor("max_tokens", [9], "INT32", binary),
        tensor("seed", [5], "UINT64", binary), tensor("ignore_eos", [True], "BOOL", binary), tensor("temperature", [0.5], "FP32", binary),
    ]  # fmt: skip
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("text_output", "finish_reason", "output_tokens")]
    made = tritons.infer("mock", inputs, outputs=outputs, request_id="mine", headers=auth())
    expected = [answer_to([*text.encode()], max_tokens=9, seed=5, ignore_eos=True, temperature=0.5) for text in ("Once", "Twice ü")]
    as_text = [item.decode() if isinstance(item, bytes) else item for item in made.as_numpy("text_output")]
    assert as_text == expected and made.get_response()["id"] == "mine"
    assert made.as_numpy("output_tokens").tolist() == [9, 9]
    assert [item.decode() if isinstance(item, bytes) else item for item in made.as_numpy("finish_reason")] == ["length"] * 2


def test_triton_parameters_and_stops(tritons: triton.InferenceServerClient) -> None:
    greedy = answer_to([*b"Once"], max_tokens=40, temperature=0.0)
    stop = greedy[5:7]
    inputs = [tensor("text_input", ["Once"], "BYTES"), tensor("stop_words", [stop], "BYTES")]
    made = tritons.infer(
        "mock", inputs, headers=auth(), parameters={"max_tokens": 40, "temperature": 0.0, "exclude_input_in_output": False}
    )
    assert made.as_numpy("text_output")[0].decode() == "Once" + greedy[: greedy.index(stop)]
    inner = tensor("sampling_parameters", ['{"max_tokens": 4, "temperature": 0}'], "BYTES")
    assert tritons.infer("mock", [inputs[0], inner], headers=auth()).as_numpy("text_output")[0].decode() == greedy[:4]


def test_triton_async_and_errors(tritons: triton.InferenceServerClient) -> None:
    asked = [tritons.async_infer("mock", [tensor("text_input", [f"{i}"], "BYTES")], headers=auth()) for i in range(5)]
    assert all(len(each.get_result().as_numpy("text_output")) == 1 for each in asked)
    for inputs, words in (
        ([tensor("text_input", [""], "BYTES")], "empty"),
        ([tensor("max_tokens", [1], "INT32")], "text_input"),
        ([tensor("text_input", ["x"], "BYTES"), tensor("nonsense", [1], "INT32")], "nonsense"),
        ([tensor("text_input", ["x"], "BYTES"), tensor("temperature", [3.0], "FP32")], "temperature"),
        ([tensor("text_input", ["x"], "BYTES"), tensor("temperature", ["3"], "BYTES")], "FP32"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            tritons.infer("mock", inputs, headers=auth())
    with pytest.raises(InferenceServerException, match="There is no model"):
        tritons.infer("another", [tensor("text_input", ["x"], "BYTES")], headers=auth())
