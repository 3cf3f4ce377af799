"""POST /v1/completions: text (or ids) in, its continuation out, at once or as chunks."""

from __future__ import annotations

import secrets
import time
from typing import Any

import orjson
from aiohttp import web

from api.body import read_object
from api.errors import bad
from api.generate import Answer, Choice, Delta
from api.logprobs import LOGPROB_LISTS, lists, prompt_ids, prompt_lists, prompt_logprobs_json
from api.respond import respond
from api.sampling import Wanted, read, shared_fields, too_long, truncated
from api.schema import Field, Table, boolean, check_list, integer, kind, parse_object, table, unsupported, wrong_type
from api.service import CALLER, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, event, joined
from api.text_parts import ONLY_TEXT
from config.schema import Request

DEFAULT_MAX_TOKENS = 16  # OpenAI's
TEXT_FORMAT = {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"], "additionalProperties": False}


def completion_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """The whole body of a completion request."""
    return table([
        prompts_field(limits.max_prompts, session_len, vocab_size),
        *shared_fields(limits, model, session_len, vocab_size),
        integer("max_tokens", 0, session_len - 1, "Most ids to generate; 0 only with echo. Prompt and answer together must fit."),
        integer("logprobs", 0, limits.max_top_logprobs, "Give the logprob of each token and of this many likeliest ones."),
        boolean("echo", "Put the prompt before its continuation; with logprobs, also those of the prompt's tokens."),
        boolean("add_special_tokens", "Begin a text as the model's prompts begin (a BOS token, where it has one).", True),
        unsupported("response_format", ONLY_TEXT, ({"type": "text"},), TEXT_FORMAT),
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
    logprobs = -1 if values["logprobs"] is None else values["logprobs"]
    wanted = read(values, logprobs, logprobs if values["echo"] else None)
    prompts = [truncated(await _ids(service, prompt, values), values, served.session_len) for prompt in values["prompt"]]
    echoes = [_echo(served, wanted, prompt, ids) for prompt, ids in zip(values["prompt"], prompts, strict=True)] if values["echo"] else []
    frames = CompletionFrames(served, wanted, len(prompts) * wanted.n, [text for text in echoes for _ in range(wanted.n)])
    answer = service.submit(
        prompts, wanted, request[CALLER], default_tokens=DEFAULT_MAX_TOKENS, param="prompt", started_s=started_s,
        names=(request[REQUEST_ID], frames.id),
    )  # fmt: skip
    return await respond(request, answer, frames, stream=wanted.stream)


class CompletionFrames(Framing):
    """Completions' two folds."""

    def __init__(self, served: Served, wanted: Wanted, num_choices: int, echoes: list[str]) -> None:
        self.id = f"cmpl-{secrets.token_hex(16)}"
        self._tokenizer = served.tokenizer
        self._wanted = wanted
        self._want_logprobs = wanted.logprobs >= 0
        self._want_ids = wanted.values["return_token_ids"]
        self._echoes = echoes
        self._due = set(range(num_choices)) if echoes else set()  # choices whose prompt has not been echoed yet
        self._num_choices = num_choices
        self._base = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        opening = b"data: " + orjson.dumps(self._base)[:-1] + b',"choices":[{"index":'
        self._text = [opening + b'%d,"text":' % i for i in range(num_choices)]
        self._end = b'}],"usage":null}\n\n' if wanted.include_usage else b"}]}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null' + self._end
        self._simple = not wanted.continuous_usage and not self._want_ids

    def opening(self) -> bytes:
        if self._want_logprobs:
            return b""  # the prompt's logprobs of a choice are there when its first delta is
        self._due.clear()
        return b"".join(self._text[i] + orjson.dumps(text) + self._plain for i, text in enumerate(self._echoes))

    def delta(self, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs and self._simple and not self._due:  # the hot path
            return self._text[delta.index] + orjson.dumps(delta.text) + self._plain
        out = b""
        if delta.index in self._due and self._answer is not None:
            self._due.discard(delta.index)
            prompt = self._prompt_lists(self._answer.choices[delta.index])
            out = self._text[delta.index] + orjson.dumps(self._echoes[delta.index])
            out += b',"logprobs":' + orjson.dumps(prompt) + b',"finish_reason":null' + self._tail()
        logprobs = orjson.dumps(self._lists(delta) if delta.logprobs else None)
        reason = orjson.dumps(delta.finish_reason)
        out += self._text[delta.index] + orjson.dumps(delta.text) + b',"logprobs":' + logprobs + b',"finish_reason":' + reason
        if self._want_ids:
            out += b',"token_ids":' + orjson.dumps(delta.token_ids)
        return out + self._tail()

    def _tail(self) -> bytes:
        if self._wanted.continuous_usage and self._answer is not None:
            return b'}],"usage":' + orjson.dumps(self._answer.usage.as_json()) + b"}\n\n"
        return self._end

    def closing(self, answer: Answer) -> bytes:
        if not self._wanted.include_usage:
            return b""
        return event({**self._base, "choices": [], "usage": answer.usage.as_json()})

    async def fold(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        n = self._num_choices
        texts = [[text] for text in self._echoes] or [[] for _ in range(n)]
        notes: list[dict[str, list[bytes]]] = [{key: [] for key in LOGPROB_LISTS} for _ in range(n)]
        ids: list[list[int]] = [[] for _ in range(n)]
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
                ids[delta.index] += delta.token_ids
                if delta.logprobs:  # rendered as they come: a long answer must not stop the loop at its end
                    for key, values in self._lists(delta).items():
                        notes[delta.index][key].append(orjson.dumps(values)[1:-1])
        choices = [self._choice(i, answer, "".join(texts[i]), notes[i], ids[i]) for i in range(n)]
        return {**self._base, "choices": choices, "usage": answer.usage.as_json()}

    def _choice(self, i: int, answer: Answer, text: str, notes: dict[str, list[bytes]], ids: list[int]) -> dict[str, Any]:
        scored = answer.choices[i - i % self._wanted.n]  # of its prompt, the one that brought the prompt's logprobs
        if self._echoes and self._want_logprobs:
            for key, values in self._prompt_lists(scored).items():
                notes[key].insert(0, orjson.dumps(values)[1:-1])
        out: dict[str, Any] = {
            "index": i,
            "text": text,
            "logprobs": {key: joined([part for part in parts if part]) for key, parts in notes.items()} if self._want_logprobs else None,
            "finish_reason": answer.choices[i].finish_reason,
        }
        if self._want_ids:
            out |= {"prompt_token_ids": prompt_ids(scored), "token_ids": ids}
        if self._wanted.values["prompt_logprobs"] is not None:
            out["prompt_logprobs"] = prompt_logprobs_json(scored, self._tokenizer)
        return out

    def _prompt_lists(self, choice: Choice) -> dict[str, list[Any]]:
        return prompt_lists(choice, self._tokenizer, self._wanted.skip_special)

    def _lists(self, delta: Delta) -> dict[str, list[Any]]:
        """Offsets count from the beginning of the text, an echo included."""
        found = lists(delta.logprobs, self._tokenizer)
        if self._echoes:
            found["text_offset"] = [len(self._echoes[delta.index]) + offset for offset in found["text_offset"]]
        return found


def _check_together(values: dict[str, Any], service: Service) -> None:
    """Fields that are fine alone and wrong together."""
    n = values["n"]
    if values["best_of"] is not None and values["best_of"] != n:
        raise bad("best_of", f"best_of must equal n ({n}): every answer is returned.", "unsupported_value")
    if values["max_tokens"] == 0 and not values["echo"]:
        raise bad("max_tokens", "max_tokens = 0 needs echo = true: else there is nothing to answer.", "invalid_value")


async def _ids(service: Service, prompt: str | list[int], values: dict[str, Any]) -> list[int]:
    return await service.encode(prompt, "prompt", add_special=values["add_special_tokens"]) if isinstance(prompt, str) else prompt


def _echo(served: Served, wanted: Wanted, prompt: str | list[int], ids: list[int]) -> str:
    whole = isinstance(prompt, str) and wanted.values["truncate_prompt_tokens"] is None
    return str(prompt) if whole else served.tokenizer.decode(ids, skip_special=wanted.skip_special)


def prompts_field(most: int, session_len: int, vocab_size: int) -> Field:
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
        at = next(i for i, each in enumerate(ids) if type(each) is not int)
        raise bad(where, f"{where}[{at}] must be an integer, not {kind(ids[at])}.", "invalid_type")
    if min(ids) < 0 or max(ids) >= vocab_size:
        at = next(i for i, each in enumerate(ids) if not 0 <= each < vocab_size)
        raise bad(where, f"{where}[{at}] is {ids[at]}; this vocabulary has the ids 0 to {vocab_size - 1}.", "invalid_value")
    return ids
