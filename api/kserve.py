"""The KServe v2 protocol under /v2, with Triton's generate extension: health, metadata, infer, generate, generate_stream.

The model takes `text_input` (BYTES, one element a prompt) and any parameter of sampling, as an input tensor of its own, as
a member of `parameters`, or (generate) beside text_input; it gives `text_output`, `finish_reason` and `output_tokens`.
Errors are `{"error": sentence}`.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import orjson
from aiohttp import web

from api.body import parse_json, read_bytes, read_object, read_optional
from api.errors import ApiError, bad, json_response, no_such_model
from api.generate import Answer, Delta
from api.health import verdict
from api.kserve_tensors import Tensor, read_tensors, write_tensors
from api.respond import respond
from api.sampling import REQUEST_NAME, Wanted, shared_fields
from api.schema import Field, Table, boolean, check_str, integer, parse_object, pattern, table, wrong_type
from api.service import CALLER, NOTE, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, event
from config.schema import Request
from config.version import VERSION

DEFAULT_TOKENS = 16  # as /v1/completions
MODEL_VERSION = "1"
INPUTS = {
    "temperature": "FP32", "top_p": "FP32", "min_p": "FP32", "repetition_penalty": "FP32", "presence_penalty": "FP32",
    "frequency_penalty": "FP32", "top_k": "INT32", "max_tokens": "INT32", "min_tokens": "INT32", "seed": "UINT64", "random_seed": "UINT64",
    "ignore_eos": "BOOL", "skip_special_tokens": "BOOL", "exclude_input_in_output": "BOOL", "stop": "BYTES", "stop_words": "BYTES",
    "bad_words": "BYTES", "sampling_parameters": "BYTES",
}  # fmt: skip
OUTPUTS = {"text_output": "BYTES", "finish_reason": "BYTES", "output_tokens": "INT32"}
LISTS = ("stop", "stop_words", "bad_words")
SHARED = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k", "min_tokens", "seed",
    "ignore_eos", "skip_special_tokens", "stop", "bad_words", "stop_token_ids", "logit_bias", "priority", "cache_salt",
)  # fmt: skip


def parameter_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """How to sample: the names of /v1/completions, and of TensorRT-LLM and vLLM in Triton."""
    known = table(shared_fields(limits, model, session_len, vocab_size))
    return table([
        integer("max_tokens", 1, session_len - 1, f"Most ids to generate; {DEFAULT_TOKENS} by default."),
        *(known[name] for name in SHARED),
        Field("random_seed", "The same as seed.", known["seed"].schema, known["seed"].parse),
        Field("stop_words", "The same as stop.", known["stop"].schema, known["stop"].parse, ()),
        boolean("exclude_input_in_output", "Give only what is new; false puts the prompt before it.", True),
        boolean("stream", "Only with generate_stream, where it goes without saying."),
    ])  # fmt: skip


def generate_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    parameters = parameter_fields(limits, model, session_len, vocab_size)
    properties = {name: {**field.schema, "description": field.doc} for name, field in parameters.items()}
    nested = {"type": "object", "properties": properties, "additionalProperties": False}
    return table([
        Field("text_input", "The prompt, as it is.", {"type": "string", "minLength": 1}, _prompt, required=True),
        pattern("id", REQUEST_NAME, "Comes back with the answer."),
        Field("parameters", "The fields below, together.", nested, _as_object),
        *parameters.values(),
    ])  # fmt: skip


def _prompt(name: str, value: Any) -> str:
    text = check_str(name, value, 1 << 26)
    if not text:
        raise bad(name, f"{name} is empty; give at least one character.", "invalid_value")
    return text


def _as_object(name: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise wrong_type(name, "an object", value)
    return value


# -- health and metadata -----------------------------------------------------------------------------------


async def server_live(request: web.Request) -> web.Response:
    """GET /v2/health/live"""
    status, _ = verdict(request.app[SERVICE])
    return json_response({"live": status != "dead"}, 503 if status == "dead" else 200)


async def server_ready(request: web.Request) -> web.Response:
    """GET /v2/health/ready"""
    status, _ = verdict(request.app[SERVICE])
    return json_response({"ready": status == "ready"}, 200 if status == "ready" else 503)


async def server_metadata(request: web.Request) -> web.Response:
    """GET /v2"""
    return json_response({"name": "numbatch", "version": VERSION, "extensions": ["binary_tensor_data", "generate", "model_repository"]})


async def model_ready(request: web.Request) -> web.Response:
    """GET /v2/models/{model}/ready"""
    _check_model(request)
    return await server_ready(request)


async def model_metadata(request: web.Request) -> web.Response:
    """GET /v2/models/{model}"""
    name = _check_model(request)
    required = {"name": "text_input", "datatype": "BYTES", "shape": [-1]}
    inputs = [required, *({"name": each, "datatype": datatype, "shape": [-1]} for each, datatype in INPUTS.items())]
    outputs = [{"name": each, "datatype": datatype, "shape": [-1]} for each, datatype in OUTPUTS.items()]
    return json_response({"name": name, "versions": [MODEL_VERSION], "platform": "numbatch", "inputs": inputs, "outputs": outputs})


async def model_config(request: web.Request) -> web.Response:
    """GET /v2/models/{model}/config: Triton's model configuration, as far as it says something here."""
    name = _check_model(request)
    service = request.app[SERVICE]

    def tensor(each: str, datatype: str) -> dict[str, Any]:
        return {"name": each, "data_type": f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}", "dims": [-1]}

    optional = [{**tensor(each, datatype), "optional": True} for each, datatype in INPUTS.items()]
    return json_response({
        "name": name,
        "platform": "",
        "backend": "numbatch",
        "max_batch_size": 0,
        "input": [tensor("text_input", "BYTES"), *optional],
        "output": [tensor(each, datatype) for each, datatype in OUTPUTS.items()],
        "model_transaction_policy": {"decoupled": False},
        "parameters": {"session_len": {"string_value": str(service.served().session_len)}},
    })  # fmt: skip


async def repository_index(request: web.Request) -> web.Response:
    """POST /v2/repository/index"""
    service = request.app[SERVICE]
    await read_optional(request, service.config.http, 1)
    ready = verdict(service)[0] == "ready"
    return json_response(
        [{"name": service.model_name, "version": MODEL_VERSION, "state": "READY" if ready else "UNAVAILABLE", "reason": ""}]
    )


def _check_model(request: web.Request) -> str:
    service = request.app[SERVICE]
    if request.match_info["model"] != service.model_name:
        raise no_such_model(request.match_info["model"], service.model_name)
    if request.match_info.get("version", MODEL_VERSION) != MODEL_VERSION:
        raise ApiError(404, f"There is no such version; the model has version {MODEL_VERSION}.", param="version", code="model_not_found")
    return service.model_name


# -- generate ----------------------------------------------------------------------------------------------


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /v2/models/{model}/generate"""
    return await _generate(request, stream=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """POST /v2/models/{model}/generate_stream"""
    return await _generate(request, stream=True)


async def _generate(request: web.Request, stream: bool) -> web.StreamResponse:
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    _check_model(request)
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(generate_fields), body)
    flat = {name: value for name, value in body.items() if name not in ("text_input", "id", "parameters")}
    values = {**values, **_parameters(service, flat, values["parameters"] or {})}
    if values["stream"] and not stream:
        raise bad("stream", "generate answers at once; generate_stream streams.", "invalid_value")
    wanted, echo = _wanted(service, values, stream)
    ids = await service.encode(values["text_input"], "text_input")
    frames = GenerateFrames(served, values["id"], "" if not echo else values["text_input"])
    answer = service.submit(
        [ids], wanted, request[CALLER], default_tokens=DEFAULT_TOKENS, param="text_input", started_s=started_s,
        names=(request[REQUEST_ID], values["id"]),
    )  # fmt: skip
    return await respond(request, answer, frames, stream=stream)


def _parameters(service: Service, *given: dict[str, Any]) -> dict[str, Any]:
    """Parameters from several places, each of which may say something the others do not."""
    merged: dict[str, Any] = {}
    for part in given:
        for name, value in part.items():
            if name in merged:
                raise bad(name, f"{name} is given twice.", "invalid_value")
            merged[name] = value
    return parse_object(service.tables(parameter_fields), merged)


def _wanted(service: Service, values: dict[str, Any], stream: bool) -> tuple[Wanted, bool]:
    """-> (how to sample, whether the prompt comes first)."""
    for name, other in (("random_seed", "seed"), ("stop_words", "stop")):
        if values[name] and values[other]:
            raise bad(name, f"{name} is the same as {other}; give one of them.", "invalid_value")
    chosen = {name: values[name] for name in SHARED}
    chosen["seed"] = values["seed"] if values["random_seed"] is None else values["random_seed"]
    chosen["stop"] = values["stop"] or values["stop_words"]
    return service.wanted(**chosen, max_tokens=values["max_tokens"], stream=stream), not values["exclude_input_in_output"]


class GenerateFrames(Framing):
    """An object with text_output; in a stream each holds what is new."""

    done = b""

    def __init__(self, served: Served, name: str, echo: str) -> None:
        self._base = {"model_name": served.name, "model_version": MODEL_VERSION, **({"id": name} if name else {})}
        self._echo = echo

    def opening(self) -> bytes:
        return event({**self._base, "text_output": self._echo}) if self._echo else b""

    def delta(self, delta: Delta) -> bytes:
        last = {"finish_reason": delta.finish_reason} if delta.finish_reason is not None else {}
        return event({**self._base, "text_output": delta.text, **last})

    def failed(self, error: ApiError) -> bytes:
        return event({"error": str(error)})

    async def fold(self, answer: Answer) -> dict[str, Any]:
        texts = [delta.text async for batch in answer.deltas() for delta in batch]
        return {**self._base, "text_output": self._echo + "".join(texts), "finish_reason": answer.choices[0].finish_reason}


# -- infer -------------------------------------------------------------------------------------------------


async def infer(request: web.Request) -> web.Response:
    """POST /v2/models/{model}/infer"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    _check_model(request)
    head, binary = await _read_request(request, service, served.session_len)
    tensors = {tensor.name: tensor for tensor in read_tensors(head.get("inputs"), binary)}
    name, wants_binary, from_head = _read_head(head)
    prompts = tensors.pop("text_input", None)
    if prompts is None or prompts.datatype != "BYTES":
        raise bad("inputs", "inputs need a tensor text_input of BYTES.", "invalid_value")
    if len(prompts.values) > service.config.request.max_prompts or not all(prompts.values):
        raise bad("text_input", f"text_input holds 1 to {service.config.request.max_prompts} prompts, none of them empty.", "invalid_value")
    from_tensors, from_json = _from_tensors(tensors)
    wanted, echo = _wanted(service, _parameters(service, from_tensors, from_json, from_head), stream=False)
    outputs = _read_outputs(head.get("outputs"), wants_binary)
    ids = [await service.encode(text, "text_input") for text in prompts.values]
    answer = service.submit(
        ids,
        wanted,
        request[CALLER],
        default_tokens=DEFAULT_TOKENS,
        param="text_input",
        started_s=started_s,
        names=(request[REQUEST_ID], name),
    )
    texts = [[text] if echo else [] for text in prompts.values]
    try:
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
    finally:
        request[NOTE] = service.finished(answer)
    found: dict[str, list[Any]] = {
        "text_output": ["".join(parts) for parts in texts],
        "finish_reason": [choice.finish_reason for choice in answer.choices],
        "output_tokens": [choice.num_generated for choice in answer.choices],
    }
    base = {"model_name": served.name, "model_version": MODEL_VERSION, "id": name or secrets.token_hex(8)}
    body, length = write_tensors(base, [(Tensor(n, OUTPUTS[n], prompts.shape, found[n]), wants) for n, wants in outputs])
    response = web.Response(body=body, content_type="application/json" if length is None else "application/octet-stream")
    if length is not None:
        response.headers["Inference-Header-Content-Length"] = str(length)
    return response


async def _read_request(request: web.Request, service: Service, session_len: int) -> tuple[dict[str, Any], bytes]:
    """JSON, and the binary data behind it. Triton's client sends no Content-Type."""
    service.access.check_origin(request)
    media = request.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if media not in ("application/json", "application/octet-stream"):
        raise ApiError(415, "Content-Type must be application/json or application/octet-stream.", code="unsupported_media_type")
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Compressed bodies are not accepted.", code="unsupported_media_type")
    body = await read_bytes(request, service.config.http)
    length = request.headers.get("Inference-Header-Content-Length")
    if length is None:
        return await parse_json(body, session_len), b""
    if not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= len(body)):
        raise bad(None, "Inference-Header-Content-Length must say how many bytes of the body are JSON.", "invalid_value")
    return await parse_json(body[: int(length)], session_len), body[int(length) :]


def _read_head(head: dict[str, Any]) -> tuple[str, bool, dict[str, Any]]:
    """-> (id, whether outputs are binary, parameters of sampling)."""
    for key in head:
        if key not in ("id", "inputs", "outputs", "parameters"):
            raise bad(key[:64], f"There is no field {key[:64]!r}.", "unknown_parameter")
    given = _as_object("parameters", head.get("parameters") or {})
    binary = given.get("binary_data_output", False)
    if type(binary) is not bool:
        raise wrong_type("parameters.binary_data_output", "true or false", binary)
    for name in ("sequence_id", "sequence_start", "sequence_end", "timeout"):
        if given.get(name):
            raise bad(f"parameters.{name}", f"{name} is not supported; sessions are at /v1/chat/interactive.", "unsupported_parameter")
    rest = {
        name: value for name, value in given.items() if name not in ("binary_data_output", "sequence_id", "sequence_start", "sequence_end")
    }
    identity = head.get("id")
    return ("" if identity is None else check_str("id", identity, 64)), binary, rest


def _read_outputs(given: Any, binary: bool) -> list[tuple[str, bool]]:
    if given is None:
        return [("text_output", binary)]
    if type(given) is not list or not 1 <= len(given) <= len(OUTPUTS):
        raise bad("outputs", f"outputs must name one to {len(OUTPUTS)} tensors.", "invalid_value")
    out = []
    for i, item in enumerate(given):
        if type(item) is not dict or type(item.get("name")) is not str or item["name"] not in OUTPUTS:
            raise bad(f"outputs[{i}]", f"outputs[{i}].name must be one of {', '.join(OUTPUTS)}.", "invalid_value")
        parameters = _as_object(f"outputs[{i}].parameters", item.get("parameters") or {})
        wants = parameters.get("binary_data", binary)
        if set(item) - {"name", "parameters"} or set(parameters) - {"binary_data", "classification"} or parameters.get("classification"):
            raise bad(f"outputs[{i}]", f"outputs[{i}] may hold name and parameters.binary_data.", "unsupported_parameter")
        if type(wants) is not bool:
            raise wrong_type(f"outputs[{i}].parameters.binary_data", "true or false", wants)
        out.append((item["name"], wants))
    if len({name for name, _ in out}) != len(out):
        raise bad("outputs", "outputs name a tensor twice.", "invalid_value")
    return out


def _from_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters that came as tensors, and those in the JSON text of `sampling_parameters`."""
    found: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in INPUTS:
            raise bad("inputs", f"There is no input {name!r}; see the model's metadata.", "unknown_parameter")
        if (tensor.datatype == "BYTES") != (INPUTS[name] == "BYTES") or (tensor.datatype == "BOOL") != (INPUTS[name] == "BOOL"):
            raise bad(name, f"{name} must be a tensor of {INPUTS[name]}.", "invalid_type")
        if name in LISTS:
            found[name] = tensor.values
        elif any(value != tensor.values[0] for value in tensor.values):
            raise bad(name, f"{name} must be the same for all prompts of a request.", "invalid_value")
        elif name == "sampling_parameters":
            inner = _parse_inner(tensor.values[0])
        else:
            found[name] = tensor.values[0]
    return found, inner


def _parse_inner(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise bad("sampling_parameters", "sampling_parameters must hold a JSON object.", "invalid_json") from None
    return _as_object("sampling_parameters", value)


def infer_schema() -> dict[str, Any]:
    """The JSON form of an infer request; the binary one has no schema."""
    parameters = {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}, "additionalProperties": False}
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 4}
    tensor = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": ["text_input", *INPUTS]},
            "datatype": {"type": "string"},
            "shape": shape,
            "data": {"type": "array"},
            "parameters": parameters,
        },
        "required": ["name", "datatype", "shape"],
        "additionalProperties": False,
    }
    output = {"type": "object", "properties": {"name": {"enum": list(OUTPUTS)}, "parameters": {"type": "object"}}, "required": ["name"]}
    return {
        "type": "object",
        "properties": {
            "id": {"type": ["string", "null"], "maxLength": 64, "description": "Comes back with the answer."},
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "description": "text_input, and parameters of sampling."},
            "outputs": {"type": ["array", "null"], "items": output, "minItems": 1, "description": "Which tensors to give back."},
            "parameters": {"type": ["object", "null"], "description": "Parameters of sampling; binary_data_output."},
        },
        "required": ["inputs"],
        "additionalProperties": False,
    }
