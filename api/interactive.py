"""POST /v1/chat/interactive: a conversation that the server remembers, as LMDeploy 0.4 had it.

`interactive_mode = true` keeps the session open for the next turn, false ends it after this one. `prompt = ""` with
`request_output_len = 0` and interactive_mode = false only ends it; `cancel = true` interrupts the answer that runs and
keeps the history. A stream is newline-delimited JSON. Who remembers is `api/session_history.py`.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from aiohttp import web

from api.access import Caller
from api.body import read_object
from api.chat import messages_field, render_messages
from api.errors import ApiError, bad, json_response
from api.generate import Answer, Delta
from api.respond import respond
from api.sampling import LATER, Wanted, session_field, shared_fields
from api.schema import Field, Table, boolean, integer, number, parse_object, table, unsupported
from api.service import CALLER, REQUEST_ID, SERVICE, Served, Service, session_name
from api.session_history import Session
from api.sse import Framing
from config.schema import Request

DEFAULT_TOKENS = 512
SHARED = ("repetition_penalty", "min_p", "stop", "ignore_eos", "skip_special_tokens", "seed", "stream", "user_id", "timeout")


def interactive_fields(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    known = table(shared_fields(limits, model, session_len, vocab_size))
    messages = messages_field(limits.max_messages)
    prompt = {"anyOf": [{"type": "string"}, messages.schema]}

    def parse(name: str, value: Any) -> list[dict[str, str]]:
        if type(value) is str:
            return [{"role": "user", "content": value}] if value else []
        parsed: list[dict[str, str]] = messages.parse(name, value)
        return parsed

    return table([
        Field("prompt", "The user's next words, or messages. Empty: only end or cancel.", prompt, parse, required=True),
        session_field("Which conversation; -1: a new one that nobody can go on with."),
        boolean("interactive_mode", "Keep the conversation for another turn."),
        boolean("cancel", "Interrupt the answer of this session that runs; its history stays."),
        integer("request_output_len", 0, session_len - 1, f"Most tokens to generate. Default: {DEFAULT_TOKENS}, or what fits."),
        number("top_p", 0, 1, "Keep the most likely ids whose probabilities sum to this.", 0.8),
        integer("top_k", 0, (1 << 31) - 1, "Keep this many most likely ids; 0 switches it off.", 40),
        number("temperature", 0, 2, "0 is greedy.", 0.8),
        *(known[name] for name in (*SHARED, "model")),
        unsupported("adapter_name", f"LoRA adapters {LATER}"),
        unsupported("image_url", "this server reads text only."),
    ])  # fmt: skip


async def interactive(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/interactive"""
    service = request.app[SERVICE]
    served, started_s = service.served(), time.monotonic()
    body = await read_object(request, service.config.http, served.session_len)
    values = parse_object(service.tables(interactive_fields), body)
    session_id, key = values["session_id"], request[CALLER].key
    if values["cancel"]:
        return _cancel(service, request, values)
    if not values["prompt"]:
        return _only_end(service, values, request[CALLER])
    if values["request_output_len"] == 0:
        raise bad("request_output_len", "request_output_len must be at least 1 where there is a prompt.", "invalid_value")
    if values["interactive_mode"] and session_id < 0:
        raise bad("session_id", "interactive_mode needs a session_id of at least 1.", "invalid_value")
    session = service.sessions.get(key, session_id) or Session()
    if session.busy:
        raise ApiError(409, f"Session {session_id} is answering; cancel it or wait.", param="session_id", code="session_busy")
    turn = Turn(service, request, values, session)
    return await turn.run(served, started_s)


def _cancel(service: Service, request: web.Request, values: dict[str, Any]) -> web.Response:
    session_id = values["session_id"]
    running = service.running(session_name(session_id), request[CALLER])
    for answer in running:
        answer.cancel()
    session = service.sessions.get(request[CALLER].key, session_id)
    return json_response(_reply("", 0, 0, session.num_tokens if session else 0, "abort" if running else "stop"))


def _only_end(service: Service, values: dict[str, Any], caller: Caller) -> web.Response:
    if values["interactive_mode"]:
        raise bad("prompt", "prompt is empty; give some text, or end the session with interactive_mode = false.", "invalid_value")
    session = service.sessions.get(caller.key, values["session_id"])
    if session is not None and session.busy:
        raise ApiError(409, "The session is answering; cancel it first.", param="session_id", code="session_busy")
    service.end_session(caller, values["session_id"])
    return json_response(_reply("", 0, 0, session.num_tokens if session else 0, "stop"))


class Turn:
    """One turn of a session, from the prompt to what is remembered of it."""

    def __init__(self, service: Service, request: web.Request, values: dict[str, Any], session: Session) -> None:
        self._service = service
        self._request = request
        self._values = values
        self._session = session
        self._id: int = values["session_id"]
        self._caller = request[CALLER]
        self._key = self._caller.key

    async def run(self, served: Served, started_s: float) -> web.StreamResponse:
        service, request = self._service, self._request
        wanted = self._wanted()
        conversation = self._session.messages + self._values["prompt"]
        if self._id > 0:
            self._session = service.sessions.begin(self._key, self._id)
        answer: Answer | None = None
        text = ""
        try:
            prompt = await self._prompt(served, conversation)
            known = min(self._session.num_tokens, len(prompt))
            frames = LineFrames(len(prompt) - known, known)
            answer = service.submit(
                [prompt], wanted, request[CALLER], default_tokens=DEFAULT_TOKENS, param="prompt", started_s=started_s, chat=True,
                names=(request[REQUEST_ID],),
            )  # fmt: skip
            try:
                return await respond(request, answer, frames, stream=wanted.stream)
            finally:
                text = frames.text
        finally:
            self._remember([*conversation, {"role": "assistant", "content": text}], answer)

    async def _prompt(self, served: Served, conversation: list[dict[str, str]]) -> list[int]:
        """The ids of the last turn and what the new one adds to them; the whole conversation where that cannot be told apart."""
        service, ids = self._service, self._session.ids
        if served.template is None:  # a model that was never taught to chat goes on with the text
            text = "".join(message["content"] for message in self._values["prompt"])
            return ids + await service.encode(text, "prompt", add_special=not ids)
        whole = await render_messages(service, served, conversation, param="prompt")
        if not ids:
            return whole
        try:
            before = await render_messages(
                service, served, self._session.messages, add_generation_prompt=False, continue_final_message=True, param="prompt"
            )
        except ApiError:  # the last answer was empty, or the template writes it in its own way
            return whole
        if whole[: len(before)] != before:
            return whole
        ends = served.tokenizer.eos_ids | served.template.stop_ids | frozenset(served.engine.spec.eos_token_ids)
        kept = len(ids)
        while kept and ids[kept - 1] in ends:  # the template writes the end of a turn itself
            kept -= 1
        return ids[:kept] + whole[len(before) :]

    def _remember(self, conversation: list[dict[str, str]], answer: Answer | None) -> None:
        """A turn that never began leaves the session as it was; one that broke off is remembered as far as it came."""
        if self._id < 0:
            return
        sessions = self._service.sessions
        if not self._values["interactive_mode"]:
            self._service.end_session(self._caller, self._id)
        elif answer is None:
            sessions.leave(self._key, self._id)
        else:
            choice = answer.choices[0]
            ids = choice.generation.sequence.token_ids
            sessions.finish(self._session, conversation, list(ids), exact=not choice.matched_stop)

    def _wanted(self) -> Wanted:
        names = ("top_p", "top_k", "temperature", "session_id", *SHARED)
        return self._service.wanted(**{name: self._values[name] for name in names}, max_tokens=self._values["request_output_len"])


class LineFrames(Framing):
    """LMDeploy's objects, one a line."""

    headers = {"Content-Type": "application/x-ndjson; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    ping = b""
    done = b""

    def __init__(self, input_tokens: int, history_tokens: int) -> None:
        self._input = input_tokens
        self._history = history_tokens
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def delta(self, delta: Delta) -> bytes:
        self._texts.append(delta.text)
        return orjson.dumps(self._object(delta.text, delta.finish_reason)) + b"\n"

    def failed(self, error: ApiError) -> bytes:
        return orjson.dumps({**self._object("", "error"), **error.body()}) + b"\n"

    async def fold(self, answer: Answer) -> dict[str, Any]:
        async for batch in answer.deltas():
            self._texts += [delta.text for delta in batch]
        return self._object(self.text, answer.choices[0].finish_reason)

    def _object(self, text: str, reason: str | None) -> dict[str, Any]:
        tokens = self._answer.choices[0].num_generated if self._answer is not None else 0
        cached = self._answer.choices[0].generation.num_cached if self._answer is not None else 0
        return {**_reply(text, tokens, self._input, self._history, reason), "cached_tokens": cached}


def _reply(text: str, tokens: int, input_tokens: int, history_tokens: int, reason: str | None) -> dict[str, Any]:
    """LMDeploy's object; a turn's own answer also says how many tokens of its prompt were not computed again."""
    return {"text": text, "tokens": tokens, "input_tokens": input_tokens, "history_tokens": history_tokens, "finish_reason": reason}
