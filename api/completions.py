"""POST /v1/completions: text (or ids) in, its continuation out, at once or as chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.errors import bad, json_response
from api.generate import Answer, Delta, TokenLogprob
from api.sampling import Wanted, read, shared_fields, too_long
from api.schema import Field, Table, boolean, check_list, integer, parse_object, table, unsupported, wrong_type
from api.service import CALLER, NOTE, SERVICE, Served, Service
from api.sse import event, joined, stream_answer
from config.schema import Request
from text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def completion_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The whole body of a completion request."""
    return table([
        _prompts(limits.max_prompts, session_len, vocab_size),
        *shared_fields(limits, model, session_len, vocab_size),
        integer("logprobs", 0, limits.max_top_logprobs, "Give the logprob of each token and of this many likeliest ones."),
        boolean("echo", "Put the prompt before its continuation."),
        integer("best_of", 1, limits.max_n, "Must equal n."),
        unsupported("suffix", "the model continues text; it does not fill in.", ("",), {"type": "string", "maxLength": 0}),
    ])  # fmt: skip


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(completion_fields), body)
    _check_together(values, service)
    wanted = read(values, -1 if values["logprobs"] is None else values["logprobs"])
    prompts = [await _ids(service, prompt) for prompt in values["prompt"]]
    echoes = [_echo(served, prompt, ids) for prompt, ids in zip(values["prompt"], prompts, strict=True)] if values["echo"] else []
    answer = service.submit(prompts, wanted, request[CALLER], default_tokens=DEFAULT_MAX_TOKENS, param="prompt", started_s=started_s)
    frames = CompletionFrames(served, wanted, len(answer.choices), [text for text in echoes for _ in range(wanted.n)])
    try:
        if wanted.stream:
            return await stream_answer(request, answer, frames, service.config.http)
        return json_response(await frames.fold(answer))
    finally:
        request[NOTE] = service.finished(answer)


class CompletionFrames:
    """Completions' two folds."""

    def __init__(self, served: Served, wanted: Wanted, num_choices: int, echoes: list[str]) -> None:
        self._tokenizer = served.tokenizer
        self._include_usage = wanted.include_usage
        self._want_logprobs = wanted.logprobs >= 0
        self._echoes = echoes
        self._num_choices = num_choices
        self._base = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        opening = b"data: " + orjson.dumps(self._base)[:-1] + b',"choices":[{"index":'
        self._text = [opening + b'%d,"text":' % i for i in range(num_choices)]
        self._end = b'}],"usage":null}\n\n' if wanted.include_usage else b"}]}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null' + self._end

    def opening(self) -> bytes:
        return b"".join(self._text[i] + orjson.dumps(text) + self._plain for i, text in enumerate(self._echoes))

    def delta(self, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs:  # the hot path
            return self._text[delta.index] + orjson.dumps(delta.text) + self._plain
        logprobs = orjson.dumps(_lists(delta.logprobs, self._tokenizer) if delta.logprobs else None)
        reason = orjson.dumps(delta.finish_reason)
        text = orjson.dumps(delta.text)
        return self._text[delta.index] + text + b',"logprobs":' + logprobs + b',"finish_reason":' + reason + self._end

    def closing(self, answer: Answer) -> bytes:
        if not self._include_usage:
            return b""
        return event({**self._base, "choices": [], "usage": answer.usage.as_json()})

    async def fold(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        texts = [[text] for text in self._echoes] or [[] for _ in range(self._num_choices)]
        notes: list[dict[str, list[bytes]]] = [{key: [] for key in LOGPROB_LISTS} for _ in range(self._num_choices)]
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
                if delta.logprobs:  # rendered as they come: a long answer must not stop the loop at its end
                    for key, values in _lists(delta.logprobs, self._tokenizer).items():
                        notes[delta.index][key].append(orjson.dumps(values)[1:-1])
        choices = [
            {
                "index": i,
                "text": "".join(texts[i]),
                "logprobs": {key: joined(parts) for key, parts in notes[i].items()} if self._want_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(answer.choices)
        ]
        return {**self._base, "choices": choices, "usage": answer.usage.as_json()}


def _lists(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    text = tokenizer.token_text
    tops = [{text(token): logprob for token, logprob in item.top} for item in logprobs]
    columns = ([text(item.token_id) for item in logprobs], [item.logprob for item in logprobs], tops, [item.offset for item in logprobs])
    return dict(zip(LOGPROB_LISTS, columns, strict=True))


def _check_together(values: dict[str, Any], service: Service) -> None:
    """Fields that are fine alone and wrong together."""
    n = values["n"]
    if values["best_of"] is not None and values["best_of"] != n:
        raise bad("best_of", f"best_of must equal n ({n}): every answer is returned.", "unsupported_value")
    if values["echo"] and values["logprobs"] is not None:
        raise bad("echo", "echo with logprobs is not supported: prompt tokens have no logprobs here.", "unsupported_value")
    most = service.config.admission.max_requests
    if n * len(values["prompt"]) > most:
        raise bad("n", f"n x prompts is {n * len(values['prompt'])}; the server runs at most {most} sequences.", "invalid_value")


async def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    return await service.encode(prompt, "prompt") if isinstance(prompt, str) else prompt


def _echo(served: Served, prompt: str | list[int], ids: list[int]) -> str:
    return prompt if isinstance(prompt, str) else served.tokenizer.decode(ids, skip_special=True)


def _prompts(most: int, session_len: int, vocab_size: int) -> Field:
    def parse(name: str, value: Any) -> list[str | list[int]]:
        if type(value) is str:
            return [_check_text(name, value)]
        if type(value) is not list:
            raise wrong_type(name, "a string, an array of strings, or (arrays of) token ids", value)
        if not value:
            raise bad(name, "prompt is an empty array.", "invalid_value")
        if type(value[0]) is str or type(value[0]) is list:
            prompts = check_list(name, value, most)
            if type(value[0]) is str:
                return [_check_text(f"{name}[{i}]", text) for i, text in enumerate(prompts)]
            return [check_ids(f"{name}[{i}]", ids, session_len, vocab_size) for i, ids in enumerate(prompts)]
        return [check_ids(name, value, session_len, vocab_size)]

    text = {"type": "string", "minLength": 1}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}, "minItems": 1}
    ids["maxItems"] = session_len - 1
    lists = [{"type": "array", "items": item, "minItems": 1, "maxItems": most} for item in (text, ids)]
    doc = "Text or token ids; an array of several gives each its own choices."
    return Field("prompt", doc, {"anyOf": [text, *lists, ids]}, parse, required=True)


def _check_text(where: str, text: Any) -> str:
    if type(text) is not str:
        raise wrong_type(where, "a string", text)
    if not text:
        raise bad(where, f"{where} is empty; give at least one character.", "invalid_value")
    return text


def check_ids(where: str, ids: Any, session_len: int, vocab_size: int) -> list[int]:
    """Token ids of one prompt: exact integers of the vocabulary, not none, not more than the context holds."""
    if type(ids) is not list:
        raise wrong_type(where, "an array of token ids", ids)
    if not ids:
        raise bad(where, f"{where} is empty; give at least one token id.", "invalid_value")
    if len(ids) >= session_len:
        raise too_long(where, f"{len(ids)} tokens", session_len)
    if set(map(type, ids)) != {int}:
        raise bad(where, f"{where} must hold integers only.", "invalid_type")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise bad(where, f"{where} holds an id outside 0..{vocab_size - 1}.", "invalid_value")
    return ids
