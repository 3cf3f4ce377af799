"""A model in this process, without a port: an engine on an event loop of its own thread, called from plain code.

What a request may ask for is read by the tables of the HTTP endpoints, so an answer here equals the one over HTTP.
Callers may be synchronous, in any number of threads, and inside a running event loop (a notebook): nothing here
touches theirs. Knows no JSON and no status codes: a refusal is a `ValueError`, a failure a `RuntimeError`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import sys
import threading
import time
import types
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import uvloop

from api.access import Caller
from api.chat import chat_fields, render_messages
from api.completions import completion_fields
from api.errors import ApiError, bad, from_engine
from api.generate import Answer
from api.loading import Loaded, load, model_name
from api.sampling import read
from api.schema import parse_object
from api.service import Service
from config.schema import Config
from engine.errors import EngineError

T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, ids, or the messages of a conversation

log = logging.getLogger("numbatch.local")

NOBODY = Caller()
STOP_S = 15.0  # for the engine to end its threads or processes


class LocalModel:
    """One loaded model. Use as a context manager, or `close` it; it closes itself when the interpreter ends."""

    def __init__(self, config: Config) -> None:
        """Load and warm up; returns when a first token can be had. Raises ConfigError, ModelError, DeviceError, FormatError."""
        self.config = config
        self.service: Service
        self._loaded: Loaded | None = None
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="numbatch", daemon=True)
        self._thread.start()
        self._closed = False
        _close_at_exit(self)
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()  # its errors are the rooms' own
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError("The model is closed.")
        return self._loaded

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A coroutine on the model's loop, waited for; an interrupt here cancels it there."""
        if self._closed:
            raise RuntimeError("The model is closed.")
        if threading.current_thread() is self._thread:
            raise RuntimeError("This was called from the model's own thread; call it from another one.")
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except (ApiError, EngineError) as error:
            raise plain(error) from error
        finally:
            future.cancel()

    def iterate(self, make: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
        """An async generator of the model's loop as a plain one; leaving it early closes it there."""
        arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(make()) as items:
                    async for item in items:
                        arrived.put(("item", item))
                arrived.put(("end", None))
            except BaseException as error:  # carried over to the caller, who decides
                arrived.put(("error", error))
                raise

        if self._closed:
            raise RuntimeError("The model is closed.")
        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while True:
                kind, value = arrived.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise (plain(value) if isinstance(value, ApiError | EngineError) else value)
                yield value
        finally:
            future.cancel()

    async def submit(self, prompt: Prompt, body: Mapping[str, Any], *, logprobs: int, default_tokens: int) -> Answer:
        """On the model's loop: one request. `body`: fields of /v1/chat/completions (messages) or /v1/completions (text,
        ids), without the prompt. Give the answer back to `finished`. Raises ApiError."""
        service, started_s = self.service, time.monotonic()
        served = service.served()
        chat = bool(prompt) and not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        param = "messages" if chat else "prompt"
        values = parse_object(service.tables(chat_fields if chat else completion_fields), {**body, param: _plain_list(prompt)})
        if logprobs > self.config.request.max_top_logprobs:
            raise bad("logprobs", f"logprobs must be at most request.max_top_logprobs = {self.config.request.max_top_logprobs}.")
        if chat:
            ids = await render_messages(service, served, values["messages"], values["chat_template_kwargs"])
        else:
            text = values["prompt"][0]
            ids = await service.encode(text, "prompt") if isinstance(text, str) else text
        return service.submit(
            [ids], read(values, logprobs), NOBODY, default_tokens=default_tokens, param=param, started_s=started_s, chat=chat
        )

    async def loss(self, prompt: str | Sequence[int]) -> float:
        """On the model's loop: mean cross entropy (nats) of the prompt's ids after the first. Raises ApiError."""
        service, started_s = self.service, time.monotonic()
        ids = await service.encode(prompt, "input") if isinstance(prompt, str) else [int(i) for i in prompt]
        if len(ids) < 2:
            raise bad("input", "A text of one token has no perplexity; give at least two.", "invalid_value")
        wanted = service.wanted(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        answer = service.submit([ids], wanted, NOBODY, default_tokens=None, param="input", started_s=started_s)
        try:
            async for _ in answer.deltas():
                pass
            found = [value.logprob for value in answer.choices[0].prompt_logprobs]
            return -math.fsum(found) / len(found)
        finally:
            service.finished(answer)

    def close(self) -> None:
        """End the engine and its thread; idempotent. Answers that still run fail."""
        if self._closed:
            return
        self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(2 * STOP_S)
        except TimeoutError:
            log.warning("the model did not stop within %g s; its threads are left to the end of the process", 2 * STOP_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _start(self) -> None:
        self.service = Service(self.config, model_name(self.config))
        loaded = await asyncio.to_thread(load, self.config)
        self._loaded = loaded
        with _main_is_not_run_again():
            await loaded.engine.start()
        self.service.serve(loaded.engine, loaded.tokenizer, loaded.template)

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            await asyncio.wait_for(loaded.engine.stop(), STOP_S)
            if loaded.template is not None:
                loaded.template.close()
            self.service.close()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()


def plain(error: ApiError | EngineError) -> ValueError | RuntimeError:
    """What a caller in Python catches: ValueError for what he asked, RuntimeError for what went wrong here."""
    refusal = from_engine(error) if isinstance(error, EngineError) else error
    return ValueError(str(refusal)) if refusal.status < 500 else RuntimeError(str(refusal))


def _plain_list(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [dict(item) if isinstance(item, Mapping) else item for item in prompt]


def _close_at_exit(model: LocalModel) -> None:
    """Before the interpreter ends its thread pools, which the engine needs to stop; `atexit` comes after them."""
    alive = weakref.ref(model)

    def close() -> None:
        left = alive()
        if left is not None:
            left.close()

    register = getattr(threading, "_register_atexit")  # noqa: B009  concurrent.futures uses it for the same reason
    register(close)


@contextmanager
def _main_is_not_run_again() -> Iterator[None]:
    """Ranks are spawned, and spawn runs the main script again in each of them. A script that calls `pipeline` at its top
    level would load the model in every rank; ranks need nothing of it, so they are shown an empty one."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
