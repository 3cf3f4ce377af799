"""/generate, /get_ppl, /v1/encode, and KServe's generate: the endpoints that are SGLang's, LMDeploy's and Triton's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from engine.mock import mix, mock_answer
from engine.sequence import SamplingParams
from tests.api.harness import Running

V2 = "/v2/models/mock/"


def text_of(prompt: bytes, **params: Any) -> str:
    ids = mock_answer(list(prompt), SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params}))
    return bytes(token for token in ids if token < 256).decode()


def refused(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = server.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_generate_as_lmdeploy_and_as_sglang_asks(server: Running) -> None:
    flat = {"prompt": "Once", "max_tokens": 12, "seed": 7, "ignore_eos": True, "temperature": 0.5}
    inner = {
        "text": "Once",
        "sampling_params": {"max_new_tokens": 12, "sampling_seed": 7, "ignore_eos": True, "temperature": 0.5, "top_k": -1},
    }
    for body in (flat, inner, {**flat, "prompt": None, "input_ids": list(b"Once")}):
        status, answer = server.post("/generate", body)
        assert status == 200 and answer["text"] == text_of(b"Once", seed=7, temperature=0.5)
        meta = answer["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["finish_reason"]) == (4, 12, {"type": "length", "length": 12})
        assert bytes(answer["output_ids"]).decode() == answer["text"]


def test_generate_many(server: Running) -> None:
    body = {"text": ["Once", "Twice"], "sampling_params": {"max_new_tokens": 5, "n": 2, "sampling_seed": 7, "ignore_eos": True}}
    found = server.post("/generate", body)[1]
    assert [item["index"] for item in found] == [0, 1, 2, 3]
    assert [found[0]["text"], found[2]["text"]] == [text_of(b"Once", seed=7, max_tokens=5), text_of(b"Twice", seed=7, max_tokens=5)]
    assert isinstance(server.post("/generate", {"input_ids": [[104, 105]], "max_tokens": 1})[1], list)
    assert isinstance(server.post("/generate", {"input_ids": [104, 105], "max_tokens": 1})[1], dict)


def test_generate_stream_adds_up(server: Running) -> None:
    body = {"text": "Once", "max_tokens": 12, "seed": 7, "return_logprob": True, "top_logprobs_num": 2, "rid": "mine"}
    whole = server.post("/generate", body)[1]
    events = server.events("/generate", body)
    assert events.pop() == "[DONE]"
    assert "".join(event["text"] for event in events) == whole["text"]
    assert [i for event in events for i in event["output_ids"]] == whole["output_ids"]
    notes = [item for event in events for item in event["meta_info"]["output_token_logprobs"]]
    assert notes == whole["meta_info"]["output_token_logprobs"] and len(whole["meta_info"]["output_top_logprobs"][0]) == 2
    assert {event["meta_info"]["id"] for event in events} == {"mine"}
    assert [bool(event["meta_info"]["finish_reason"]) for event in events].index(True) == len(events) - 1


def test_generate_says_what_stopped_it(server: Running) -> None:
    whole = text_of(b"Once", seed=7)
    body = {"text": "Once", "sampling_params": {"max_new_tokens": 12, "sampling_seed": 7, "stop": [whole[4:6]], "ignore_eos": True}}
    answer = server.post("/generate", body)[1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[4:6]}
    assert answer["text"] == whole[: whole.index(whole[4:6])]
    body["sampling_params"]["no_stop_trim"] = True
    assert server.post("/generate", body)[1]["text"] == whole[: whole.index(whole[4:6]) + 2]


def test_generate_gives_the_prompts_logprobs(server: Running) -> None:
    body = {"text": "Once", "max_tokens": 1, "return_logprob": True, "logprob_start_len": 1}
    found = server.post("/generate", body)[1]["meta_info"]["input_token_logprobs"]
    assert [item[2] for item in found] == ["n", "c", "e"] and all(item[0] < 0 for item in found)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": None}, "text"),
        ({"input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"regex": "a"}}, "sampling_params.regex"),
        ({"sampling_params": {}, "temperature": 1}, "temperature"),
        ({"top_logprobs_num": 2}, "top_logprobs_num"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"session_id": 3}, "session_id"),
        ({"image_data": "x"}, "image_data"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_generate_refuses(server: Running, fields: dict[str, Any], param: str) -> None:
    refused(server, "/generate", {"text": "Once", **fields}, param)


def loss(text: bytes) -> float:
    """Mean cross entropy of the mock's prompt logprobs."""
    factors = [int(mix(i)) | 1 for i in range(len(text))]
    hashes = [sum((text[i] + 1) * factors[i] for i in range(p + 1)) % (1 << 64) for p in range(len(text))]
    return sum(1 + int(mix(h)) % 8 for h in hashes[1:]) / (len(text) - 1)


def test_perplexity(server: Running) -> None:
    import numpy as np

    with np.errstate(over="ignore"):
        expected = [loss(b"hello there"), loss(b"x" * 200)]
    one = server.post("/get_ppl", {"input": "hello there"})[1]
    assert (
        one["ppl"] == pytest.approx(expected[0]) and one["perplexity"] == pytest.approx(math.exp(expected[0])) and one["num_tokens"] == 11
    )
    for _ in range(2):  # cached or not
        many = server.post("/get_ppl", {"input": ["hello there", "x" * 200]})[1]
        assert many["ppl"] == pytest.approx(expected)
    assert server.post("/get_ppl", {"input": list(b"hello there")})[1] == one
    for bad in ("", "x", [1], [], [[1, 2], [3]], 5, "y" * 600):
        assert server.post("/get_ppl", {"input": bad})[0] == 400


def test_encode(server: Running) -> None:
    assert server.post("/v1/encode", {"input": "hi"})[1] == {"input_ids": [104, 105], "length": 2}
    assert server.post("/v1/encode", {"input": ["hi", ""]})[1] == {"input_ids": [[104, 105], []], "length": [2, 0]}
    wrapped = server.post("/v1/encode", {"input": "hi", "do_preprocess": True})[1]
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})[1]["tokens"]
    assert wrapped == {"input_ids": tokens, "length": len(tokens)}
    refused(server, "/v1/encode", {"input": 3}, "input")


def test_triton_generate(server: Running) -> None:
    expected = text_of(b"Once", seed=7)
    for body in (
        {"text_input": "Once", "max_tokens": 12, "seed": 7, "ignore_eos": True},
        {"text_input": "Once", "parameters": {"max_tokens": 12, "random_seed": 7, "ignore_eos": True}},
        {"text_input": "Once", "max_tokens": 12, "parameters": {"seed": 7, "ignore_eos": True}, "id": "mine"},
    ):
        status, answer = server.post(V2 + "generate", body)
        assert (status, answer["text_output"], answer["finish_reason"]) == (200, expected, "length")
        assert answer.get("id") == body.get("id")
        events = server.request("POST", V2 + "generate_stream", body)[2].decode().split("\n\n")
        parts = [json.loads(event.removeprefix("data: ")) for event in events if event]
        assert "".join(part["text_output"] for part in parts) == expected and parts[-1]["finish_reason"] == "length"
    echoed = server.post("/v2/models/mock/versions/1/generate", {"text_input": "Once", "max_tokens": 1, "exclude_input_in_output": False})[
        1
    ]
    assert echoed["text_output"].startswith("Once")


def test_triton_errors_have_tritons_shape(server: Running) -> None:
    for path, body, status, words in (
        (V2 + "generate", {}, 400, "text_input"),
        (V2 + "generate", {"text_input": "x", "temperature": 9}, 400, "temperature"),
        (V2 + "generate", {"text_input": "x", "seed": 1, "parameters": {"seed": 1}}, 400, "twice"),
        (V2 + "generate", {"text_input": "x", "stream": True}, 400, "generate_stream"),
        ("/v2/models/another/generate", {"text_input": "x"}, 404, "There is no model"),
        ("/v2/models/mock/versions/2/generate", {"text_input": "x"}, 404, "version"),
        ("/v2/nowhere", {}, 404, "no such path"),
    ):
        code, answer = server.post(path, body)
        assert code == status and set(answer) == {"error"} and words in answer["error"], answer


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"], **fields}


@pytest.mark.parametrize(
    "body",
    [
        {}, {"inputs": []}, {"inputs": [tensor(shape=[2])]}, {"inputs": [tensor(shape=[0])]}, {"inputs": [tensor(shape=[1 << 40])]},
        {"inputs": [tensor(datatype="FP16")]}, {"inputs": [tensor(data=[3])]}, {"inputs": [tensor(data="x")]}, {"inputs": [tensor(), tensor()]},
        {"inputs": [tensor(parameters={"binary_data_size": 5})]}, {"inputs": [tensor(parameters={"shared_memory_region": "a"})]},
        {"inputs": [tensor(data=None, parameters={"binary_data_size": 5})]}, {"inputs": [tensor(name="")]}, {"inputs": [tensor(more=1)]},
        {"inputs": [tensor(name="seed", datatype="INT32", data=[1])]}, {"inputs": [tensor()], "outputs": [{"name": "logits"}]},
        {"inputs": [tensor()], "parameters": {"sequence_id": 3}}, {"inputs": [tensor()], "parameters": {"binary_data_output": 1}},
        {"inputs": [tensor()], "outputs": [{"name": "text_output", "parameters": {"classification": 3}}]}, {"inputs": [tensor()], "more": 1},
        {"inputs": [tensor(), tensor(name="sampling_parameters", data=["[]"])]}, {"inputs": [tensor(), tensor(name="sampling_parameters", data=["{"])]},
        {"inputs": [tensor(shape=[2], data=["x", "y"]), tensor(name="seed", datatype="INT32", shape=[2], data=[1, 2])]},
    ],
)  # fmt: skip
def test_infer_refuses_tensors_that_are_none(server: Running, body: dict[str, Any]) -> None:
    status, answer = server.post(V2 + "infer", body)
    assert status == 400 and set(answer) == {"error"}, answer


@pytest.mark.parametrize("length", ["0", "3", "999", "-1", "x", "9" * 30])
def test_a_binary_request_that_lies_about_its_length(server: Running, length: str) -> None:
    head = json.dumps(
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}]}
    ).encode()
    status, _, data = server.request("POST", V2 + "infer", head + b"\x01\x00\x00\x00x", {"Inference-Header-Content-Length": length})
    assert status == 400 and set(json.loads(data)) == {"error"}
    good = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    assert server.request("POST", V2 + "infer", head + b"\x01\x00\x00\x00x", good)[0] == 200
    for tail in (b"\x02\x00\x00\x00x", b"\x00\x00\x00\x00x", b"\x01\x00\x00\x00\xff", b"\xff\xff\xff\xffx"):
        assert server.request("POST", V2 + "infer", head + tail, good)[0] == 400
