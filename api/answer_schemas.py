"""What comes back, as JSON Schema for the OpenAPI document: one entry of `components.schemas` a kind of answer."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANY: Schema = {"type": "object"}


def object_of(properties: Schema, optional: tuple[str, ...] = ()) -> Schema:
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in optional]}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def either(schema: Schema) -> Schema:
    """One, or an array of them."""
    return {"anyOf": [schema, list_of(schema)]}


def answer_schemas() -> Schema:
    return {**_openai(), **_responses(), **_others()}


def _openai() -> Schema:
    entry = {"token": STRING, "logprob": NUMBER, "bytes": list_of(COUNT)}
    chat_logprobs = object_of({
        "content": list_of(object_of({**entry, "top_logprobs": list_of(object_of(entry))})), "refusal": {"type": "null"},
    })  # fmt: skip
    text_logprobs = object_of({
        "tokens": list_of(STRING),
        "token_logprobs": list_of(or_null(NUMBER)),
        "top_logprobs": list_of(or_null({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": list_of(COUNT),
    })  # fmt: skip
    reason = {"type": "string", "enum": ["stop", "length", "abort"]}
    scored = {"prompt_logprobs": list_of(or_null(ANY)), "prompt_token_ids": list_of(COUNT)}
    ids = {"token_ids": list_of(COUNT)}
    message = object_of({"role": {"const": "assistant"}, "content": STRING, "refusal": {"type": "null"}})
    head = {"id": STRING, "created": COUNT, "model": STRING, "system_fingerprint": STRING, "usage": _ref("Usage")}
    chat = {"index": COUNT, "message": message, "logprobs": or_null(chat_logprobs), "finish_reason": reason, **ids}
    text = {"index": COUNT, "text": STRING, "logprobs": or_null(text_logprobs), "finish_reason": reason, **ids, **scored}
    model = {"id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING, "max_model_len": or_null(COUNT)}
    error = {"message": STRING, "type": STRING, "param": or_null(STRING), "code": or_null(STRING)}
    chat_object = {**head, "object": {"const": "chat.completion"}, "choices": list_of(object_of(chat, ("token_ids",))), **scored}
    text_choice = object_of(text, ("token_ids", *scored))
    return {
        "ChatCompletion": object_of(chat_object, tuple(scored)),
        "Completion": object_of({**head, "object": {"const": "text_completion"}, "choices": list_of(text_choice)}),
        "Usage": object_of({
            "prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT,
            "prompt_tokens_details": object_of({"cached_tokens": COUNT}),
        }),
        "Model": object_of(model),
        "Models": object_of({"object": {"const": "list"}, "data": list_of(_ref("Model"))}),
        "Error": object_of({"error": object_of(error)}),
    }  # fmt: skip


def _responses() -> Schema:
    usage = {
        "input_tokens": COUNT, "input_tokens_details": object_of({"cached_tokens": COUNT}), "output_tokens": COUNT,
        "output_tokens_details": object_of({"reasoning_tokens": COUNT}), "total_tokens": COUNT,
    }  # fmt: skip
    status = {"enum": ["in_progress", "completed", "incomplete", "cancelled", "failed"]}
    item = {"id": STRING, "type": {"const": "message"}, "role": {"const": "assistant"}, "content": list_of(ANY)}
    return {
        "Response": object_of({
            "id": STRING, "object": {"const": "response"}, "created_at": COUNT, "status": status, "model": STRING,
            "output": list_of(object_of(item)),
            "usage": or_null(object_of(usage)),
        }),
        "Deleted": object_of({"id": STRING, "object": {"const": "response"}, "deleted": {"const": True}}),
        "InputItems": object_of({
            "object": {"const": "list"}, "data": list_of(ANY), "first_id": STRING, "last_id": STRING, "has_more": {"type": "boolean"},
        }),
    }  # fmt: skip


def _others() -> Schema:
    usage = dict.fromkeys(("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"), COUNT)
    why = {"enum": ["end_turn", "max_tokens", "stop_sequence"]}
    meta = {"id": STRING, "finish_reason": or_null(ANY), "prompt_tokens": COUNT, "completion_tokens": COUNT, "cached_tokens": COUNT}
    generated = object_of({"text": STRING, "output_ids": list_of(COUNT), "meta_info": object_of(meta)})
    return {
        "Message": object_of({
            "id": STRING, "type": {"const": "message"}, "role": {"const": "assistant"}, "model": STRING,
            "content": list_of(object_of({"type": {"const": "text"}, "text": STRING})), "stop_reason": why,
            "stop_sequence": or_null(STRING), "usage": object_of(usage),
        }),
        "AnthropicError": object_of({"type": {"const": "error"}, "error": object_of({"type": STRING, "message": STRING})}),
        "KServeError": object_of({"error": STRING}),
        "Turn": object_of({
            "text": STRING, "tokens": COUNT, "input_tokens": COUNT, "history_tokens": COUNT,
            "finish_reason": {"enum": ["stop", "length", "abort"]}, "cached_tokens": COUNT,
        }, ("cached_tokens",)),
        "Session": object_of({
            "id": COUNT, "object": {"const": "session"}, "busy": {"type": "boolean"}, "history_tokens": COUNT, "leased_tokens": COUNT,
            "expires_in_s": or_null(NUMBER),
        }),
        "Sessions": object_of({"object": {"const": "list"}, "data": list_of(_ref("Session"))}),
        "EndedSession": object_of({"id": COUNT, "object": {"const": "session"}, "deleted": {"const": True}}),
        "Generated": either(generated),
        "Perplexity": object_of({"ppl": either(NUMBER), "perplexity": either(NUMBER), "num_tokens": either(COUNT)}),
        "Encoded": object_of({"input_ids": either(either(COUNT)), "length": either(COUNT)}),
        "Tokens": object_of({
            "count": COUNT, "max_model_len": COUNT, "tokens": list_of(COUNT), "token_strs": or_null(list_of(STRING)),
        }),
        "Sleeping": object_of({"is_sleeping": {"type": "boolean"}}),
        "TritonText": object_of({"model_name": STRING, "model_version": STRING, "text_output": STRING, "finish_reason": STRING}),
        "Inferred": object_of({"model_name": STRING, "model_version": STRING, "id": STRING, "outputs": list_of(ANY)}),
        "Health": object_of({"status": {"enum": ["ready", "starting", "sleeping", "draining", "stalled", "dead"]}, "reason": STRING}),
    }  # fmt: skip


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
