"""GET /openapi.json and GET /docs: the surface, written from the tables that the parser uses.

Nothing is stated twice: request schemas come from the `Field` tables, so what this document allows is what the
server accepts. The page under /docs loads nothing from anywhere.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

import orjson
from aiohttp import web

from api.chat import chat_fields
from api.completions import completion_fields
from api.errors import json_response
from api.schema import in_words, json_schema
from api.service import SERVICE, Service
from api.tokenize import detokenize_fields, tokenize_fields
from config.version import VERSION

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
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
        "info": {"title": "numbatch", "version": VERSION, "description": "An OpenAI-compatible inference server."},
        "paths": _paths(service),
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    if secured:
        result["security"] = [{"key": []}]
    return result


def _paths(service: Service) -> Schema:
    table = service.tables
    chat, text = _ref("ChatCompletion"), _ref("Completion")
    return {
        "/v1/chat/completions": {"post": _post("Answer a conversation.", json_schema(table(chat_fields)), chat, streams=True)},
        "/v1/completions": {"post": _post("Continue a text.", json_schema(table(completion_fields)), text, streams=True)},
        "/tokenize": {"post": _post("Text or messages to token ids.", _either(json_schema(table(tokenize_fields))), _ref("Tokens"))},
        "/detokenize": {"post": _post("Token ids to text.", json_schema(table(detokenize_fields)), _object({"prompt": STRING}))},
        "/v1/models": {"get": _get("The served model, as a list.", _ref("Models"))},
        "/v1/models/{model}": {"get": _one_model(service.model_name)},
        "/version": {"get": _get("Version of the server.", _object({"version": STRING}))},
        "/health": {"get": _health("Can a request be served now?")},
        "/health/ready": {"get": _health("The same.")},
        "/health/live": {"get": _health("Is the engine alive?")},
        "/metrics": {"get": _text("Counters for Prometheus.", "text/plain")},
        "/openapi.json": {"get": _get("This document.", {"type": "object"})},
        "/docs": {"get": _text("This document as a page.", "text/html")},
    }


def _post(summary: str, body: Schema, answer: Schema, streams: bool = False) -> Schema:
    good: Schema = {"description": "The answer.", "content": {"application/json": {"schema": answer}}}
    if streams:
        good["content"]["text/event-stream"] = {}  # chunks as OpenAI sends them; a schema would be of one event
    content = {"application/json": {"schema": body}}
    return {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": {"200": good, **_errors()}}


def _get(summary: str, answer: Schema) -> Schema:
    good = {"description": "The answer.", "content": {"application/json": {"schema": answer}}}
    return {"summary": summary, "responses": {"200": good, **_errors()}}


def _one_model(name: str) -> Schema:
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [name]}}
    return {**_get("The served model.", _ref("Model")), "parameters": [parameter]}


def _text(summary: str, media: str) -> Schema:
    good = {"description": "The answer.", "content": {media: {"schema": STRING}}}
    return {"summary": summary, "responses": {"200": good, **_errors()}}


def _health(summary: str) -> Schema:
    body = {"content": {"application/json": {"schema": _ref("Health")}}}
    responses = {"200": {"description": "Yes.", **body}, "503": {"description": "No, and why.", **body}}
    return {"summary": summary, "security": [], "responses": {**responses, "4XX": _error("Refused.")}}


def _errors() -> Schema:
    return {"4XX": _error("Refused: the message says why, `param` names the field."), "5XX": _error("Not possible now.")}


def _error(description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref("Error")}}}


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


def _object(properties: Schema, optional: tuple[str, ...] = ()) -> Schema:
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in optional]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _schemas() -> Schema:
    """What comes back."""
    entry = {"token": STRING, "logprob": NUMBER, "bytes": _list(COUNT)}
    chat_logprobs = _object({"content": _list(_object({**entry, "top_logprobs": _list(_object(entry))})), "refusal": {"type": "null"}})
    text_logprobs = _object({
        "tokens": _list(STRING),
        "token_logprobs": _list(NUMBER),
        "top_logprobs": _list({"type": "object", "additionalProperties": NUMBER}),
        "text_offset": _list(COUNT),
    })  # fmt: skip
    reason = {"type": "string", "enum": ["stop", "length"]}
    message = _object({"role": {"const": "assistant"}, "content": STRING, "refusal": {"type": "null"}})
    head = {"id": STRING, "created": COUNT, "model": STRING, "system_fingerprint": STRING, "usage": _ref("Usage")}
    chat = {"index": COUNT, "message": message, "logprobs": _or_null(chat_logprobs), "finish_reason": reason}
    text = {"index": COUNT, "text": STRING, "logprobs": _or_null(text_logprobs), "finish_reason": reason}
    model = {"id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING, "max_model_len": _or_null(COUNT)}
    error = {"message": STRING, "type": STRING, "param": _or_null(STRING), "code": _or_null(STRING)}
    return {
        "ChatCompletion": _object({**head, "object": {"const": "chat.completion"}, "choices": _list(_object(chat))}),
        "Completion": _object({**head, "object": {"const": "text_completion"}, "choices": _list(_object(text))}),
        "Usage": _object({
            "prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT,
            "prompt_tokens_details": _object({"cached_tokens": COUNT}),
        }),
        "Tokens": _object({
            "count": COUNT, "max_model_len": COUNT, "tokens": _list(COUNT), "token_strs": _or_null(_list(STRING)),
        }),
        "Model": _object(model),
        "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
        "Health": _object({"status": {"enum": ["ready", "starting", "draining", "stalled", "dead"]}, "reason": STRING}),
        "Error": _object({"error": _object(error)}),
    }  # fmt: skip


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
        cells = (f"<code>{escape(name)}</code>", escape(field["description"]), allowed, f"<code>{escape(default)}</code>")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr><th>field<th>meaning<th>allowed<th>default</tr>{''.join(rows)}</table>"
