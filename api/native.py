"""The endpoints that SGLang and LMDeploy call their own: POST /generate, /get_ppl and /v1/encode.

/generate takes text or ids as they are (no chat template), the parameters of sampling beside them as LMDeploy has them or
in `sampling_params` as SGLang has them. Chunks of a stream hold what is new, not the text so far.
"""

from __future__ import annotations

import math
import secrets
import time
from typing import Any

from aiohttp import web

from api.body import read_object
from api.chat import render_messages
from api.completions import prompts_field
from api.errors import ApiError, bad, json_response
from api.generate import MIN_LOGPROB, Answer, Choice, Delta, TokenLogprob
from api.logprobs import prompt_ids
from api.respond import respond
from api.sampling import LATER, NOT_SUPPORTED, REQUEST_NAME, Wanted, model_field, shared_fields
from api.schema import Field, Table, boolean, check_bool, check_list, check_str, integer, nested, parse_object, pattern, table, unsupported
from api.service import CALLER, NOTE, REQUEST_ID, SERVICE, Served, Service
from api.sse import Framing, event
from config.schema import Request

DEFAULT_TOKENS = 128  # of both
# fields of /v1/completions that mean the same here; LMDeploy has them beside the prompt, SGLang in sampling_params
SAMPLING = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
    "stop_token_ids", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "bad_words",
    "spaces_between_special_tokens",
)  # fmt: skip


def sampling_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    """SGLang's `sampling_params`."""
    known = table(shared_fields(limits, model, session_len, vocab_size))
    later = {name: why for name, why in NOT_SUPPORTED.items() if "structured" in why}
    return table([
        integer("max_new_tokens", 1, session_len - 1, "Most ids to generate.", DEFAULT_TOKENS),
        integer("min_new_tokens", 0, session_len - 1, "Nothing ends the answer before so many ids.", 0),
        integer("top_k", -1, (1 << 31) - 1, "Keep this many most likely ids; -1 and 0 switch it off.", 0),
        integer("n", 1, limits.max_n, "Answers for each prompt.", 1),
        Field("sampling_seed", "Same seed, same answer.", known["seed"].schema, known["seed"].parse),
        boolean("no_stop_trim", "Keep the stop string that ended the answer in its text."),
        *(known[name] for name in SAMPLING),
        *(unsupported(name, why) for name, why in later.items()),
    ])  # fmt: skip


def generate_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    known = table(shared_fields(limits, model, session_len, vocab_size))
    prompts = prompts_field(limits.max_prompts, session_len, vocab_size)
    text = {"anyOf": [way for way in prompts.schema["anyOf"] if _is_text(way)]}
    ids = {"anyOf": [way for way in prompts.schema["anyOf"] if not _is_text(way)]}
    return table([
        model_field(model),
        Field("text", "The prompt, or an array of prompts.", text, prompts.parse),
        Field("prompt", "The same; LMDeploy's name.", text, prompts.parse),
        Field("input_ids", "Or the prompt (prompts) as token ids.", ids, prompts.parse),
        nested("sampling_params", sampling_fields(limits, model, session_len, vocab_size), "How to sample; or the fields below."),
        integer("max_tokens", 1, session_len - 1, "Most ids to generate.", DEFAULT_TOKENS),
        integer("top_k", 0, (1 << 31) - 1, "Keep this many most likely ids; 0 switches it off.", 0),
        *(known[name] for name in (*SAMPLING, "seed", "n", "min_tokens", "stream", "priority", "cache_salt", "truncate_prompt_tokens")),
        boolean("return_logprob", "Give the logprob of each id of the answer (and, with logprob_start_len, of the prompt)."),
        integer("top_logprobs_num", 0, limits.max_top_logprobs, "Likeliest ids at each position; needs return_logprob.", 0),
        integer("logprob_start_len", -1, session_len, "From this position of the prompt on, logprobs of the prompt; -1: none.", -1),
        pattern("rid", REQUEST_NAME, "A name for /abort_request."),
        unsupported("image_data", "this server reads text only."),
        unsupported("session_id", "use /v1/chat/interactive for sessions.", (-1,), {"type": "integer", "const": -1}),
        unsupported("return_routed_experts", f"mixtures of experts {LATER}", (False,), {"type": "boolean", "const": False}),
        unsupported("lora_path", NOT_SUPPORTED["lora_path"]),
    ])  # fmt: skip


def _is_text(way: dict[str, Any]) -> bool:
    return "string" in (way.get("type"), way.get("items", {}).get("type"))


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /generate"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(generate_fields), body)
    name, given = _prompt_of(values)
    wanted = _wanted(service, values, body)
    prompts = [await service.encode(prompt, name) if isinstance(prompt, str) else prompt for prompt in given]
    frames = GenerateFrames(served, values, wanted, many=type(body[name][0]) in (str, list) and type(body[name]) is list)
    answer = service.submit(
        prompts, wanted, request[CALLER], default_tokens=DEFAULT_TOKENS, param=name, started_s=started_s,
        names=(request[REQUEST_ID], frames.id, values["rid"]),
    )  # fmt: skip
    return await respond(request, answer, frames, stream=wanted.stream)


def _prompt_of(values: dict[str, Any]) -> tuple[str, list[str | list[int]]]:
    given = [name for name in ("text", "prompt", "input_ids") if values[name] is not None]
    if len(given) != 1:
        raise bad("text", "Give exactly one of text, prompt and input_ids.", "invalid_value")
    return given[0], values[given[0]]


def _wanted(service: Service, values: dict[str, Any], body: dict[str, Any]) -> Wanted:
    chosen = {name: values[name] for name in (*SAMPLING, "top_k", "seed", "n", "min_tokens", "max_tokens")}
    if values["sampling_params"] is not None:
        both = sorted(set(chosen) & {name for name, value in body.items() if value is not None})
        if both:
            raise bad(both[0], f"{both[0]} is given beside sampling_params; put it there.", "invalid_value")
        inner = values["sampling_params"]
        chosen = {name: inner[name] for name in (*SAMPLING, "n")} | {
            "max_tokens": inner["max_new_tokens"],
            "min_tokens": inner["min_new_tokens"],
            "top_k": max(inner["top_k"], 0),
            "seed": inner["sampling_seed"],
        }
        chosen["include_stop_str_in_output"] = inner["include_stop_str_in_output"] or inner["no_stop_trim"]
    if values["top_logprobs_num"] and not values["return_logprob"]:
        raise bad("top_logprobs_num", "top_logprobs_num needs return_logprob = true.", "invalid_value")
    start = values["logprob_start_len"]
    if start >= 0 and (not values["return_logprob"] or values["stream"]):
        raise bad("logprob_start_len", "logprob_start_len needs return_logprob = true, and no stream.", "invalid_value")
    k = values["top_logprobs_num"]
    return service.wanted(
        **chosen, stream=values["stream"], priority=values["priority"], cache_salt=values["cache_salt"],
        truncate_prompt_tokens=values["truncate_prompt_tokens"], return_token_ids=True,
        logprobs=k if values["return_logprob"] else -1, prompt_logprobs=k if start >= 0 else None,
    )  # fmt: skip


class GenerateFrames(Framing):
    """One object a choice; a stream's objects hold what came since the last one."""

    def __init__(self, served: Served, values: dict[str, Any], wanted: Wanted, many: bool) -> None:
        """`many`: an array was asked, so an array is answered."""
        self.id = values["rid"] or secrets.token_hex(16)
        self._tokenizer = served.tokenizer
        self._wanted = wanted
        self._many = many or wanted.n > 1
        self._start = values["logprob_start_len"]
        self._started_s = time.monotonic()

    def delta(self, delta: Delta) -> bytes:
        return event(self._object(delta.index, delta.text, list(delta.token_ids), list(delta.logprobs)))

    async def fold(self, answer: Answer) -> Any:
        n = len(answer.choices)
        texts: list[list[str]] = [[] for _ in range(n)]
        ids: list[list[int]] = [[] for _ in range(n)]
        notes: list[list[TokenLogprob]] = [[] for _ in range(n)]
        async for batch in answer.deltas():
            for delta in batch:
                texts[delta.index].append(delta.text)
                ids[delta.index] += delta.token_ids
                notes[delta.index] += delta.logprobs
        out = [self._object(i, "".join(texts[i]), ids[i], notes[i]) for i in range(n)]
        return out if self._many else out[0]

    def _object(self, index: int, text: str, ids: list[int], notes: list[TokenLogprob]) -> dict[str, Any]:
        assert self._answer is not None
        choice = self._answer.choices[index]
        meta: dict[str, Any] = {
            "id": self.id if not self._many else f"{self.id}-{index}",
            "finish_reason": self._reason(choice),
            "prompt_tokens": choice.generation.num_prompt,
            "completion_tokens": choice.num_generated,
            "cached_tokens": choice.generation.num_cached,
            "e2e_latency": time.monotonic() - self._started_s,
        }
        if self._wanted.logprobs >= 0:
            name = self._tokenizer.token_text
            meta["output_token_logprobs"] = [[item.logprob, item.token_id, name(item.token_id)] for item in notes]
            if self._wanted.logprobs:
                meta["output_top_logprobs"] = [[[p, i, name(i)] for i, p in item.top] for item in notes]
        if self._start >= 0:
            meta["input_token_logprobs"] = self._prompt(self._answer.choices[index - index % self._wanted.n])
        many = {"index": index} if self._many else {}
        return {"text": text, "output_ids": ids, "meta_info": meta, **many}

    def _prompt(self, choice: Choice) -> list[list[Any]]:
        name = self._tokenizer.token_text
        found = [None, *(max(value.logprob, MIN_LOGPROB) for value in choice.prompt_logprobs)]
        return [[p, token, name(token)] for token, p in zip(prompt_ids(choice), found)][self._start :]

    @staticmethod
    def _reason(choice: Choice) -> dict[str, Any] | None:
        if not choice.finish_reason:
            return None
        out: dict[str, Any] = {"type": choice.finish_reason}
        if choice.finish_reason == "length":
            out["length"] = choice.num_generated
        elif choice.finish_reason == "stop":
            out["matched"] = choice.matched_stop or choice.generation.sequence.token_ids[-1]
        return out


# -- perplexity ---------------------------------------------------------------------------------------------


def ppl_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    prompts = prompts_field(limits.max_prompts, session_len, vocab_size)
    doc = "A text, token ids, or an array of either; at least two tokens each. No chat template is applied."
    return table([model_field(model), Field("input", doc, prompts.schema, prompts.parse, required=True)])


async def get_ppl(request: web.Request) -> web.Response:
    """POST /get_ppl: how well the model predicts a text."""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    given = parse_object(service.tables(ppl_fields), body)["input"]
    prompts = [await service.encode(prompt, "input") if isinstance(prompt, str) else prompt for prompt in given]
    for ids in prompts:
        if len(ids) < 2:
            raise bad("input", "A text of one token has no perplexity; give at least two.", "invalid_value")
    wanted = service.wanted(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    answer = service.submit(
        prompts, wanted, request[CALLER], default_tokens=None, param="input", started_s=started_s, names=(request[REQUEST_ID],)
    )
    try:
        async for _ in answer.deltas():
            pass
        losses = [_loss(choice) for choice in answer.choices]
    finally:
        request[NOTE] = service.finished(answer)
    many = type(body["input"]) is list and type(body["input"][0]) in (str, list)
    perplexities = [math.exp(min(loss, 700.0)) for loss in losses]
    tokens = [len(ids) for ids in prompts]
    if many:
        return json_response({"ppl": losses, "perplexity": perplexities, "num_tokens": tokens})
    return json_response({"ppl": losses[0], "perplexity": perplexities[0], "num_tokens": tokens[0]})


def _loss(choice: Choice) -> float:
    """Mean cross entropy of the prompt's ids after the first, in nats."""
    found = [value.logprob for value in choice.prompt_logprobs]
    if len(found) < choice.generation.num_prompt - 1:
        raise ApiError(503, "This request was cancelled before its text was scored.", code="aborted")
    if not all(map(math.isfinite, found)):
        raise ApiError(500, "The model produced numbers that are not finite; this text has no perplexity.", code="bad_logits")
    return -math.fsum(found) / len(found)


# -- LMDeploy's tokenize ------------------------------------------------------------------------------------


def encode_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": limits.max_prompts}]}

    def parse(name: str, value: Any) -> list[str]:
        given = value if type(value) is list else [value]
        return [check_str(name, text, 1 << 26) for text in check_list(name, given, limits.max_prompts)]

    return table([
        model_field(model),
        Field("input", "A text or an array of texts.", texts, parse, required=True),
        Field("do_preprocess", "Through the chat template, as a user's message.", {"type": "boolean"}, check_bool, False),
        Field("add_bos", "Begin as the model's prompts begin.", {"type": "boolean"}, check_bool, True),
    ])  # fmt: skip


async def encode(request: web.Request) -> web.Response:
    """POST /v1/encode"""
    service = request.app[SERVICE]
    served = service.served()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(encode_fields), body)
    out: list[list[int]] = []
    for text in values["input"]:
        if values["do_preprocess"]:
            out.append(await render_messages(service, served, [{"role": "user", "content": text}], param="input"))
        else:
            out.append(await service.encode(text, "input", add_special=values["add_bos"]))
    if type(body["input"]) is list:
        return json_response({"input_ids": out, "length": [len(ids) for ids in out]})
    return json_response({"input_ids": out[0], "length": len(out[0])})
