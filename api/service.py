"""What all endpoints share: the configuration, the engine once it is there, the text side, the counters.

The listener is open before the model is loaded, so a `Service` begins without an engine (everything but health
answers 503) and gets a `Served` model later. Nothing here parses a request or writes a response.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from api.access import Access, Caller
from api.counters import Metrics
from api.errors import NOT_READY_RETRY_S, ApiError, bad, from_engine, from_text, retry_headers
from api.generate import Answer, Choice
from api.protocol import Gate
from api.response_store import ResponseStore
from api.sampling import Wanted, read, room_for_answer, shared_fields, too_long
from api.schema import Table, table
from api.session_history import SessionHistory
from api.tracing import Tracing
from config.schema import Config, Request
from config.version import VERSION
from engine.errors import BadParameter, EngineDead, EngineDraining, EngineError, EngineNotReady
from engine.loop import Engine, EngineStatus, Generation
from text.errors import TextError
from text.stop import StopMatcher
from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from text.chat import ChatTemplate

T = TypeVar("T")

INLINE_CHARS = 1024  # shorter prompts are tokenized on the event loop: a thread would cost more
CHARS_PER_TOKEN = 8  # a prompt with more characters than this a token of context is refused unread
MIN_CHARS_LIMIT = 65536
TEXT_THREADS = 2


@dataclass(frozen=True, slots=True)
class Served:
    """The model behind the port."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the checkpoint has none, and chat is refused
    name: str
    created: int  # Unix time
    fingerprint: str

    @property
    def session_len(self) -> int:
        return self.engine.session_len

    @property
    def vocab_size(self) -> int:
        return self.engine.spec.vocab_size


class Service:
    def __init__(self, config: Config, model_name: str) -> None:
        self.config = config
        self.model_name = model_name
        self.access = Access(config)
        self.metrics = Metrics()
        self.gate: Gate | None = None
        self.tracing: Tracing | None = None  # where telemetry.otlp_endpoint asks for it
        self.engine: Engine | None = None
        self.reason = "starting"
        self.draining = False
        self.sleeping = False  # see api/control.py
        self.live: set[Answer] = set()
        self.responses = ResponseStore(config.request.max_stored_responses)
        self.sessions = SessionHistory(config.sessions.max_sessions)
        self.quiet = asyncio.Event()  # set while no request is live
        self.quiet.set()
        self._served: Served | None = None
        self._tables: dict[Callable[[Request, str, int, int], Table], Table] = {}
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")

    def serve(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """The engine has started: requests are answered from now on."""
        digest = hashlib.sha256(repr((VERSION, self.model_name, engine.spec, self.config.model.dtype)).encode()).hexdigest()
        self.engine = engine
        self.reason = ""
        engine.observers.append(self.metrics.step)
        self._served = Served(engine, tokenizer, template, self.model_name, int(time.time()), f"fp_{digest[:12]}")

    def served(self, awake: bool = True) -> Served:
        """The model, or the 503 that says why there is none (yet, or any more). `awake`: none while the server sleeps either."""
        if self.draining:
            raise from_engine(EngineDraining("The server is shutting down; try another replica."))
        if self._served is None:
            raise from_engine(EngineNotReady(f"The server is not ready: {self.reason}."))
        if self._served.engine.status is EngineStatus.DEAD:
            raise from_engine(EngineDead("The engine stopped."))
        if awake and self.sleeping:
            raise ApiError(503, "The server sleeps; POST /wakeup first.", code="sleeping", headers=retry_headers(NOT_READY_RETRY_S))
        return self._served

    def tables(self, build: Callable[[Request, str, int, int], Table]) -> Table:
        """The table of a request body for this model; built once."""
        if build not in self._tables:
            served = self.served()
            self._tables[build] = build(self.config.request, served.name, served.session_len, served.vocab_size)
        return self._tables[build]

    @property
    def described(self) -> Served | None:
        """The model whether or not it can be called now; None before it is loaded."""
        return self._served

    async def in_thread(self, work: Callable[[], T]) -> T:
        """CPU-heavy text work, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encode(self, text: str, param: str, *, add_special: bool = True) -> list[int]:
        """Ids of user text (never control tokens); refused unread when it cannot fit."""
        served = self.served()
        self.check_chars(len(text), served, param)
        encode = partial(served.tokenizer.encode, text, add_special=add_special, parse_special=False)
        try:
            return encode() if len(text) <= INLINE_CHARS else await self.in_thread(encode)
        except TextError as error:
            raise from_text(error, param) from None

    def check_chars(self, num_chars: int, served: Served, param: str) -> None:
        if num_chars > max(CHARS_PER_TOKEN * served.session_len, MIN_CHARS_LIMIT):
            raise too_long(param, f"{num_chars} characters", served.session_len)

    def submit(
        self,
        prompts: list[list[int]],
        wanted: Wanted,
        caller: Caller,
        *,
        default_tokens: int | None,
        param: str,
        started_s: float,
        chat: bool = False,
        names: Iterable[str] = (),
    ) -> Answer:
        """All choices of all prompts, or none. Choice i of prompt p has index p * n + i.

        `chat`: the prompts come from the chat template, whose ends count as well. `names`: what may cancel the answer.
        """
        served = self.served()
        most = self.config.admission.max_requests
        if len(prompts) * wanted.n > most:
            raise bad("n", f"n x prompts is {len(prompts) * wanted.n}; the server runs at most {most} sequences.", "invalid_value")
        wanted = _with_bad_words(_with_ends(wanted, served, chat), served)
        salt = self.access.salt(caller, wanted.cache_salt)
        session_id, timeout, user_id = (wanted.values[name] for name in ("session_id", "timeout", "user_id"))
        if session_id > 0 and (len(prompts) > 1 or wanted.n > 1):
            raise bad("session_id", "A session goes on with one answer to one prompt; leave n and further prompts out.", "invalid_value")
        session = lease_name(caller, session_id) if session_id > 0 else ""
        deadline_s = math.inf if timeout is None else started_s + timeout
        stops = StopMatcher(wanted.stop, include=wanted.include_stop) if wanted.stop else None
        choices: list[Choice] = []
        try:
            for prompt in prompts:
                max_tokens = room_for_answer(wanted, len(prompt), served.session_len, default_tokens, param)
                for i in range(wanted.n):
                    params = wanted.params(max_tokens, i)
                    generation = served.engine.submit(
                        prompt, params, priority=wanted.priority, salt=salt, key=caller.key, deadline_s=deadline_s, session=session,
                        user_id=user_id,
                    )  # fmt: skip
                    choices.append(Choice(len(choices), generation, served.tokenizer, wanted, stops))
        except (EngineError, ApiError) as error:
            for choice in choices:
                choice.generation.abort()
            raise self._refusal(error, param) from error
        answer = Answer(choices, wanted.n, self.metrics, started_s)
        answer.names = {name for name in (*names, wanted.values["request_id"]) if name}
        if session:
            answer.names.add(session_name(session_id))
        answer.key = caller.key
        self.live.add(answer)
        self.quiet.clear()
        self.metrics.live_requests += 1
        return answer

    def wanted(self, **fields: Any) -> Wanted:
        """For the protocols that are not OpenAI's: the fields of /v1/completions by name, the rest at their defaults."""
        defaults = {name: field.default for name, field in self.tables(_shared_table).items()}
        return read({**defaults, **fields}, fields.get("logprobs", -1))

    def end_session(self, caller: Caller, session_id: int) -> None:
        """Forget what was said, and give up its K/V."""
        self.sessions.end(caller.key, session_id)
        if self._served is not None:
            self._served.engine.manager.leases.end(lease_name(caller, session_id))

    def running(self, name: str, caller: Caller) -> list[Answer]:
        """The caller's own live answers of that name."""
        return [answer for answer in self.live if name in answer.names and answer.key == caller.key]

    def finished(self, answer: Answer) -> str:
        """Count a request that has ended, in whatever way; returns its part of the log line."""
        answer.close()
        if self.tracing is not None:
            self.tracing.ended(answer)
        if answer in self.live:
            self.live.discard(answer)
            if not self.live:
                self.quiet.set()
            self.metrics.live_requests -= 1
            self.metrics.request_done(answer, answer.choices[0].generation.sequence.params.max_tokens, time.monotonic())
        usage = answer.usage
        return (
            f" prompt={usage.prompt_tokens} cached={usage.cached_tokens} output={usage.completion_tokens}"
            f" choices={len(answer.choices)} finish={answer.outcome}"
        )

    def generations(self) -> list[Generation]:
        """What still runs, for a drain that ran out of time."""
        return [choice.generation for answer in self.live for choice in answer.choices if not choice.done]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _refusal(self, error: EngineError | ApiError, param: str) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, BadParameter) and error.param == "prompt":
            error.param = param
        refusal = from_engine(error)
        if refusal.code in self.metrics.refused:
            self.metrics.refused[refusal.code] += 1
        return refusal


def lease_name(caller: Caller, session_id: int | str) -> str:
    """Under which the engine keeps a session's K/V: no key can name another's."""
    return f"{caller.key}/{session_id}"


def session_name(session_id: int) -> str:
    """Under which a session's answer runs."""
    return f"session {session_id}"


def _shared_table(limits: Request, model: str, session_len: int, vocab_size: int) -> Table:
    return table(shared_fields(limits, model, session_len, vocab_size))


def _with_bad_words(wanted: Wanted, served: Served) -> Wanted:
    """Words as ids: at the beginning of a text, within one, and after a space, where these differ."""
    if not wanted.values["bad_words"]:
        return wanted
    encode = served.tokenizer.encode_segment
    ways: dict[tuple[int, ...], None] = {}
    try:
        for word in wanted.values["bad_words"]:
            for ids in (encode(word, first=True), encode(word, first=False), encode(" " + word.lstrip(), first=False)):
                ways[tuple(ids)] = None
    except TextError as error:
        raise from_text(error, "bad_words") from None
    return dataclasses.replace(wanted, values={**wanted.values, "bad_words": tuple(way for way in ways if way)})


def _with_ends(wanted: Wanted, served: Served, chat: bool) -> Wanted:
    """With what ends an answer beside the request's own stops: the tokenizer's and the chat template's."""
    template = served.template if chat else None
    stop = wanted.stop + (template.stop_strings if template else ())
    ids = wanted.values["stop_token_ids"]
    if not wanted.values["ignore_eos"]:
        known = {*ids, *served.engine.spec.eos_token_ids}
        ends = served.tokenizer.eos_ids | (template.stop_ids if template else frozenset())
        ids += tuple(i for i in sorted(ends - known) if i < served.vocab_size)
    return dataclasses.replace(wanted, stop=stop, values={**wanted.values, "stop_token_ids": ids})


SERVICE: web.AppKey[Service] = web.AppKey("service", Service)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("id", str)
CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
NOTE: web.RequestKey[str] = web.RequestKey("note", str)  # what the log line says about the answer
