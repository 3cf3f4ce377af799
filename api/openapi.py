"""GET /openapi.json and GET /docs: the surface, written from the tables that the parser uses.

Nothing is stated twice: request schemas come from the `Field` tables, so what this document allows is what the
server accepts. The page under /docs loads nothing from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

import orjson
from aiohttp import web

from api import native
from api.answer_schemas import COUNT, STRING, Schema, answer_schemas
from api.answer_schemas import object_of as _object
from api.chat import chat_fields
from api.completions import completion_fields
from api.control import NO_ENDPOINT, abort_fields
from api.errors import json_response
from api.interactive import interactive_fields
from api.kserve import MODEL_VERSION, infer_schema
from api.kserve import generate_fields as generate_v2_fields
from api.messages import count_fields, message_fields
from api.response_fields import response_fields
from api.sampling import MAX_SESSION_ID
from api.schema import Table, in_words, json_schema
from api.service import SERVICE, Service
from api.tokenize import detokenize_fields, tokenize_fields
from config.schema import Request
from config.version import VERSION

SSE = "text/event-stream"
TableBuilder = Callable[[Request, str, int, int], Table]
CSP = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    return json_response(document(request.app[SERVICE]))


async def docs(request: web.Request) -> web.Response:
    """GET /docs"""
    page = _page(document(request.app[SERVICE]))
    return web.Response(text=page, content_type="text/html", charset="utf-8", headers={"Content-Security-Policy": CSP})


def document(service: Service) -> Schema:
    """The OpenAPI 3.1 document of this server and its model; 503 while there is no model."""
    service.served()
    secured = bool(service.config.server.api_keys)
    result: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "numbatch", "version": VERSION, "description": "An inference server that speaks OpenAI's protocols and others."},
        "paths": _paths(service),
        "components": {
            "schemas": answer_schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    if secured:
        result["security"] = [{"key": []}, {"header": []}]
    return result


def _paths(service: Service) -> Schema:
    table = service.tables

    def body(build: TableBuilder) -> Schema:
        return json_schema(table(build))

    def post(summary: str, build: TableBuilder, answer: str, streams: str = "") -> Schema:
        return {"post": _post(summary, body(build), _ref(answer), streams)}

    return {
        "/v1/chat/completions": post("Answer a conversation.", chat_fields, "ChatCompletion", SSE),
        "/v1/completions": post("Continue a text.", completion_fields, "Completion", SSE),
        "/v1/responses": post("Answer a conversation, which is kept.", response_fields, "Response", SSE),
        "/v1/responses/{id}": {"get": _get("A stored response.", _ref("Response"), ID), "delete": _get("Forget it.", _ref("Deleted"), ID)},
        "/v1/responses/{id}/cancel": {"post": _get("End a response that is being streamed.", {"type": "object"}, ID)},
        "/v1/responses/{id}/input_items": {"get": _get("What a response was asked.", _ref("InputItems"), ID, PAGE)},
        "/v1/messages": {"post": _post("Answer a conversation (Anthropic).", body(message_fields), _ref("Message"), SSE, "AnthropicError")},
        "/v1/messages/count_tokens": {
            "post": _post("Count the tokens of a conversation.", body(count_fields), _object({"input_tokens": COUNT}), "", "AnthropicError")
        },
        "/v1/chat/interactive": post("A turn of a conversation that is kept.", interactive_fields, "Turn", "application/x-ndjson"),
        **{
            f"{path}_qos": post(f"{path} under LMDeploy's name for requests with user_id.", build, answer, streams)
            for path, build, answer, streams in (
                ("/v1/chat/completions", chat_fields, "ChatCompletion", SSE),
                ("/v1/completions", completion_fields, "Completion", SSE),
                ("/v1/chat/interactive", interactive_fields, "Turn", "application/x-ndjson"),
            )
        },
        "/v1/sessions": {"get": _get("The conversations that this API key keeps.", _ref("Sessions"))},
        "/v1/sessions/{id}": {
            "get": _get("One of them.", _ref("Session"), SESSION),
            "delete": _get("End it; an answer that runs is cancelled.", _ref("EndedSession"), SESSION),
        },
        "/generate": post("Continue texts or token ids (SGLang, LMDeploy).", native.generate_fields, "Generated", SSE),
        "/get_ppl": post("How well the model predicts texts.", native.ppl_fields, "Perplexity"),
        "/v1/encode": post("Texts to token ids (LMDeploy).", native.encode_fields, "Encoded"),
        "/tokenize": {"post": _post("Text or messages to token ids.", _either(body(tokenize_fields)), _ref("Tokens"))},
        "/detokenize": {"post": _post("Token ids to text.", body(detokenize_fields), _object({"prompt": STRING}))},
        "/abort_request": {"post": _optional_body(_post("End answers.", body(abort_fields), _object({"aborted": COUNT})))},
        "/reset_prefix_cache": {"post": _get("Forget all cached prefixes.", _object({"success": {"const": True}}))},
        "/sleep": {"post": _get("Finish what runs, refuse the rest, drop the KV cache.", _ref("Sleeping"), LEVEL)},
        "/wakeup": {"post": _get("Serve again.", _ref("Sleeping"))},
        "/is_sleeping": {"get": _get("Does the server sleep?", _ref("Sleeping"))},
        "/server_info": {"get": _get("The model, its limits, and how full the server is.", {"type": "object"})},
        "/v1/models": {"get": _get("The served model, as a list.", _ref("Models"))},
        "/v1/models/{model}": {"get": _get("The served model.", _ref("Model"), _model(service))},
        **_kserve(service, body(generate_v2_fields)),
        **{path: {"post": _refused(why)} for path, (why, _) in NO_ENDPOINT.items()},
        "/version": {"get": _get("Version of the server.", _object({"version": STRING}))},
        "/health": {"get": _health("Can a request be served now?")},
        "/health/ready": {"get": _health("The same.")},
        "/health/live": {"get": _health("Is the engine alive?")},
        "/metrics": {"get": _text("Counters for Prometheus.", "text/plain")},
        "/": {"get": {**_text("A page that shows the server at work.", "text/html"), "security": []}},
        "/status.json": {"get": _get("What the page at / shows: memory, blocks, sequences, counters.", {"type": "object"})},
        "/openapi.json": {"get": _get("This document.", {"type": "object"})},
        "/docs": {"get": _text("This document as a page.", "text/html")},
    }


def _kserve(service: Service, fields: Schema) -> Schema:
    """KServe v2: the routes of a model exist with and without its version."""
    metadata = _get("The model's tensors (KServe v2).", {"type": "object"}, error="KServeError")
    config = _get("The model's configuration, as Triton has it.", {"type": "object"}, error="KServeError")
    ready = {**_health("Can a request be served now?", _object({"ready": {"type": "boolean"}})), "security": []}
    del ready["security"]
    infer = _post("Texts as tensors; also Triton's binary form.", infer_schema(), _ref("Inferred"), "", "KServeError")
    infer["responses"]["200"]["content"]["application/octet-stream"] = {}
    once = _post("Continue a text (Triton).", fields, _ref("TritonText"), "", "KServeError")
    stream = _post("The same as a stream.", fields, _ref("TritonText"), SSE, "KServeError")
    del stream["responses"]["200"]["content"]["application/json"]
    out: Schema = {
        "/v2": {"get": _get("The server and its extensions.", {"type": "object"}, error="KServeError")},
        "/v2/health/live": {"get": _health("Is the engine alive?", _object({"live": {"type": "boolean"}}))},
        "/v2/health/ready": {"get": _health("Can a request be served now?", _object({"ready": {"type": "boolean"}}))},
        "/v2/repository/index": {"post": _get("The models there are.", {"type": "array"}, error="KServeError")},
    }
    for place, parameters in (("", _model(service)), ("/versions/{version}", [*_model(service), VERSION_PARAMETER])):
        for name, method, operation in (
            ("", "get", metadata), ("/ready", "get", ready), ("/config", "get", config), ("/infer", "post", infer),
            ("/generate", "post", once), ("/generate_stream", "post", stream),
        ):  # fmt: skip
            out[f"/v2/models/{{model}}{place}{name}"] = {method: {**operation, "parameters": parameters}}
    return out


def _post(summary: str, body: Schema, answer: Schema, streams: str = "", error: str = "Error") -> Schema:
    good: Schema = {"description": "The answer.", "content": {"application/json": {"schema": answer}}}
    if streams:
        good["content"][streams] = {}  # chunks as the protocol sends them; a schema would be of one event
    content = {"application/json": {"schema": body}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": {"200": good, **_errors(error)}}


def _optional_body(operation: Schema) -> Schema:
    return {**operation, "requestBody": {**operation["requestBody"], "required": False}}


def _get(summary: str, answer: Schema, *parameters: list[Schema], error: str = "Error") -> Schema:
    good = {"description": "The answer.", "content": {"application/json": {"schema": answer}}}
    listed = [item for group in parameters for item in group]
    operation = {"summary": summary, "responses": {"200": good, **_errors(error)}}
    return {**operation, "parameters": listed} if listed else operation


def _parameter(name: str, where: str, schema: Schema) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _model(service: Service) -> list[Schema]:
    return [_parameter("model", "path", {"type": "string", "enum": [service.model_name]})]


ID = [_parameter("id", "path", {"type": "string", "pattern": "^resp_[0-9a-f]{32}$"})]
SESSION = [_parameter("id", "path", {"type": "integer", "minimum": 1, "maximum": MAX_SESSION_ID})]
PAGE = [
    _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 100}),
    _parameter("order", "query", {"type": "string", "enum": ["asc", "desc"]}),
    _parameter("after", "query", STRING),
]
LEVEL = [
    _parameter("level", "query", {"type": "integer", "enum": [0, 1]}),
    _parameter("mode", "query", {"type": "string", "enum": ["wait", "abort"]}),
]
VERSION_PARAMETER = _parameter("version", "path", {"type": "string", "enum": [MODEL_VERSION]})


def _text(summary: str, media: str) -> Schema:
    good = {"description": "The answer.", "content": {media: {"schema": STRING}}}
    return {"summary": summary, "responses": {"200": good, **_errors()}}


def _refused(why: str) -> Schema:
    return {"summary": why, "responses": {"4XX": _error("Always.")}}


def _health(summary: str, answer: Schema | None = None) -> Schema:
    body = {"content": {"application/json": {"schema": answer or _ref("Health")}}}
    responses = {"200": {"description": "Yes.", **body}, "503": {"description": "No, and why.", **body}}
    return {"summary": summary, "security": [], "responses": {**responses, "4XX": _error("Refused.", "KServeError" if answer else "Error")}}


def _errors(name: str = "Error") -> Schema:
    return {"4XX": _error("Refused: the message says why, `param` names the field.", name), "5XX": _error("Not possible now.", name)}


def _error(description: str, name: str = "Error") -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(name)}}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _either(schema: Schema) -> Schema:
    """Of /tokenize: exactly one of prompt and messages."""
    given = {"prompt": STRING, "messages": {"type": "array"}}
    ways = [
        {"required": [name], "properties": {name: given[name], other: {"type": "null"}}}
        for name, other in (("prompt", "messages"), ("messages", "prompt"))
    ]
    return {**schema, "anyOf": ways}


def _page(document: Schema) -> str:
    """The document as one HTML page."""
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            rows.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>")
            rows.append(_fields_html(operation))
    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;width:100%}"
        "td,th{text-align:left;padding:.3em .8em .3em 0;vertical-align:top;border-top:1px solid #ddd}"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>numbatch</title><style>{style}</style>"
        f"<h1>numbatch {escape(VERSION)}</h1><p>Machine-readable: <code>/openapi.json</code>.</p>{''.join(rows)}</html>"
    )


def _fields_html(operation: Schema) -> str:
    body = operation.get("requestBody")
    if body is None:
        return ""
    schema = body["content"]["application/json"]["schema"]
    rows = []
    for name, field in schema["properties"].items():
        allowed = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(in_words(field)))
        default = orjson.dumps(field["default"]).decode() if "default" in field else ""
        cells = (f"<code>{escape(name)}</code>", escape(field.get("description", "")), allowed, f"<code>{escape(default)}</code>")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr><th>field<th>meaning<th>allowed<th>default</tr>{''.join(rows)}</table>"
