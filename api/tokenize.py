"""POST /tokenize and POST /detokenize: text to ids and back, with the server's own tokenizer and template."""

from __future__ import annotations

from aiohttp import web

from api.body import read_object
from api.chat import chat_fields, render_messages
from api.completions import check_ids
from api.errors import bad, json_response
from api.sampling import model_field
from api.schema import Field, Table, boolean, parse_object, table
from api.service import SERVICE
from config.schema import Request


def tokenize_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """`prompt` or `messages`, not both."""
    chat = chat_fields(limits, model, session_len, vocab_size)
    messages, values = chat["messages"], chat["chat_template_kwargs"]
    return table([
        model_field(model),
        Field("prompt", "Text to encode; may be empty.", {"type": "string"}, _text),
        Field("messages", "Or a conversation, through the chat template.", messages.schema, messages.parse),
        boolean("add_special_tokens", "Begin as the model's prompts begin (a BOS token, where it has one). With prompt only.", True),
        boolean("add_generation_prompt", "End with the opening of the assistant's turn. With messages only.", True),
        values,
        boolean("return_token_strs", "Also give the text of each token."),
    ])  # fmt: skip


def detokenize_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    def ids(name: str, value: object) -> list[int]:
        return [] if value == [] else check_ids(name, value, session_len + 1, vocab_size)

    items = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    schema = {"type": "array", "items": items, "maxItems": session_len}
    return table([model_field(model), Field("tokens", "Token ids to decode.", schema, ids, required=True)])


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize"""
    service = request.app[SERVICE]
    served = service.served()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(tokenize_fields), body)
    prompt, messages = values["prompt"], values["messages"]
    if (prompt is None) == (messages is None):
        raise bad("prompt", "Give either prompt or messages.", "invalid_value")
    if prompt is not None:
        ids = await service.encode(prompt, "prompt", add_special=values["add_special_tokens"])
    else:
        ids = await render_messages(
            service, served, messages, values["chat_template_kwargs"], add_generation_prompt=values["add_generation_prompt"]
        )
    texts = [served.tokenizer.token_text(token) for token in ids] if values["return_token_strs"] else None
    return json_response({"count": len(ids), "max_model_len": served.session_len, "tokens": ids, "token_strs": texts})


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize"""
    service = request.app[SERVICE]
    served = service.served()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(detokenize_fields), body)
    tokens = values["tokens"]
    text = await service.in_thread(lambda: served.tokenizer.decode(tokens, skip_special=False))
    return json_response({"prompt": text})


def _text(name: str, value: object) -> str:
    if type(value) is not str:
        raise bad(name, f"{name} must be a string.", "invalid_type")
    return value
