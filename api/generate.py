"""From token events to text: one async generator of `Delta`s, of which streaming and non-streaming are two folds.

`Choice` holds the text state of one sequence (detokenizer, stop strings, logprobs); `Answer` holds all choices of a
request, submits them together and ends them together: whoever leaves the generator, for whatever reason, leaves no
sequence running. Nothing here knows JSON or HTTP status lines beyond `ApiError`.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from api.counters import Metrics
from api.errors import ApiError, from_engine, retry_headers
from api.sampling import Wanted
from engine.errors import EngineError
from engine.loop import Generation
from engine.sequence import FinishReason
from engine.step import Logprobs, TokenEvent
from text.detokenizer import Detokenizer
from text.stop import StopMatcher
from text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled id with its logprob; `offset` is where its text starts in the answer, in characters."""

    token_id: int
    logprob: float
    offset: int
    top: tuple[tuple[int, float], ...]  # (id, logprob), most likely first


class Delta:
    """A piece of one choice's text; exactly one delta of a choice has a finish reason: its last."""

    __slots__ = ("finish_reason", "index", "logprobs", "text", "token_ids")

    def __init__(
        self,
        index: int,
        text: str,
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: str | None = None,
        token_ids: tuple[int, ...] = (),
    ) -> None:
        self.index = index
        self.text = text
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.token_ids = token_ids  # where they were asked for: all ids since the last delta


class Choice:
    """One sequence and its text. `feed` takes its events one at a time, so a batch of events changes no answer."""

    __slots__ = (
        "_detokenizer", "_ids", "_include_stop", "_matcher", "_min_tokens", "only_prompt", "_notes", "_offset", "_want_ids",
        "_want_logprobs", "cancelled", "done", "finish_reason", "generation", "index", "last_s", "num_generated",
    )  # fmt: skip

    def __init__(self, index: int, generation: Generation, tokenizer: Tokenizer, wanted: Wanted, stops: StopMatcher | None) -> None:
        """`stops`: an unused matcher, of which each choice takes a copy (making one of long strings takes milliseconds)."""
        self.index = index
        self.generation = generation
        self.done = False  # the text is complete, or the answer failed
        self.finish_reason = ""
        self.num_generated = 0
        self.last_s = 0.0
        self._detokenizer = Detokenizer(tokenizer, skip_special=wanted.skip_special, continuation=True)
        self._matcher = copy.copy(stops)
        self._min_tokens = wanted.values["min_tokens"]
        self._include_stop = wanted.include_stop
        self._want_logprobs = wanted.logprobs >= 0
        self._want_ids = wanted.values["return_token_ids"]
        self.only_prompt = wanted.max_tokens == 0
        self._notes: list[TokenLogprob] = []
        self._ids: list[int] = []
        self._offset = 0
        self.cancelled = False  # somebody asked for its end: not a failure

    @property
    def matched_stop(self) -> str:
        """The stop string that ended the answer, "" where none did."""
        return self._matcher.matched if self._matcher is not None else ""

    @property
    def prompt_logprobs(self) -> list[Logprobs]:
        """Of prompt ids 1, 2, ...; complete with the first id of the answer."""
        return cast(list[Logprobs], self.generation.sequence.prompt_logprobs)

    def feed(self, event: TokenEvent) -> Delta | None:
        """The delta that this event completes; None while text is held back (half a character, maybe a stop string)."""
        if self.only_prompt and event.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR):
            # only the prompt was of interest: the one id that had to be sampled is nobody's
            self.generation.abort()
            return self._finish("length", "")
        if event.finish_reason is not None:
            return self._last(event)
        self.num_generated += 1
        if self._want_ids:
            self._ids.append(event.token_id)
        text = self._detokenizer.push((event.token_id,))
        if self._want_logprobs:
            self._note(event, text)
        if self._matcher is not None and self.num_generated > self._min_tokens:
            text, stopped = self._matcher.push(text)
            if stopped:
                self.generation.abort()
                return self._finish("stop", text)
        if not text:
            return None
        return Delta(self.index, text, self._take_notes() if self._notes else (), None, self._take_ids() if self._ids else ())

    def _last(self, event: TokenEvent) -> Delta:
        reason = event.finish_reason
        if reason is FinishReason.ABORT and self.cancelled:
            held = self._matcher.flush() if self._matcher is not None else ""
            return self._finish("abort", held + self._detokenizer.flush())
        if reason is FinishReason.ABORT or reason is FinishReason.ERROR:
            raise self._failed(reason)
        text, stopped = "", False
        if event.token_id >= 0:
            self.num_generated += 1
            if self._want_ids:
                self._ids.append(event.token_id)
            # the token that ended the answer belongs to the text only when it was asked for
            if reason is FinishReason.LENGTH or self._include_stop:
                text = self._detokenizer.push((event.token_id,))
                if self._want_logprobs:
                    self._note(event, text)
        text += self._detokenizer.flush()
        if self._matcher is not None:
            if self.num_generated > self._min_tokens:
                text, stopped = self._matcher.push(text)
            if not stopped:
                text += self._matcher.flush()
        return self._finish("stop" if stopped or reason is FinishReason.STOP else "length", text)

    def _finish(self, reason: str, text: str) -> Delta:
        self.done = True
        self.finish_reason = reason
        return Delta(self.index, text, self._take_notes(), reason, self._take_ids())

    def _failed(self, reason: FinishReason) -> ApiError:
        """An end that the client did not ask for: never dressed up as an answer."""
        self.done = True
        if reason is FinishReason.ERROR:
            self.finish_reason = "error"
            return ApiError(500, "The model produced numbers that are not finite; this answer cannot go on.", code="bad_logits")
        self.finish_reason = "abort"
        if self.generation.sequence.deadline_s <= time.monotonic():
            return ApiError(504, "The answer was not complete within the request's timeout.", param="timeout", code="deadline_exceeded")
        if self.generation.sequence.first_scheduled_s < 0:
            message = "The server could not begin this request in time; try again later."
            return ApiError(503, message, code="overloaded", headers=retry_headers(2))
        return ApiError(503, "The server ended this answer before it was complete.", code="aborted", headers=retry_headers(2))

    def _note(self, event: TokenEvent, text: str) -> None:
        found = event.logprobs
        if found is not None:
            self._notes.append(TokenLogprob(event.token_id, max(found.logprob, MIN_LOGPROB), self._offset, _top(found)))
        self._offset += len(text)

    def _take_ids(self) -> tuple[int, ...]:
        ids, self._ids = tuple(self._ids), []
        return ids

    def _take_notes(self) -> tuple[TokenLogprob, ...]:
        notes, self._notes = tuple(self._notes), []
        return notes


def _top(found: Logprobs) -> tuple[tuple[int, float], ...]:
    return tuple((i, max(p, MIN_LOGPROB)) for i, p in zip(found.top_ids, found.top_logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """All choices of one request. `deltas()` is consumed once; `close()` aborts whatever still runs, and is idempotent."""

    def __init__(self, choices: list[Choice], per_prompt: int, metrics: Metrics, started_s: float) -> None:
        self.choices = choices
        self.first_token_s = 0.0
        self.started_s = started_s
        self.names: set[str] = set()  # by which its caller may cancel it
        self.key = ""
        self._per_prompt = per_prompt
        self._metrics = metrics

    def cancel(self) -> None:
        """End what runs; the answer so far is delivered with the finish reason "abort"."""
        for choice in self.choices:
            if not choice.done:
                choice.cancelled = True
                choice.generation.abort()

    @property
    def scheduled(self) -> bool:
        """True once the engine has begun with any choice: from here on an error is an event, not a status."""
        return any(choice.generation.sequence.first_scheduled_s >= 0 for choice in self.choices)

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, however many answers it has; cached tokens are those its first choice found."""
        firsts = self.choices[:: self._per_prompt]
        return Usage(
            sum(choice.generation.num_prompt for choice in firsts),
            sum(choice.num_generated for choice in self.choices),
            sum(choice.generation.num_cached for choice in firsts),
        )

    @property
    def outcome(self) -> str:
        """stop, length, abort or error: of the first choice that did not end well, else of the first."""
        reasons = [choice.finish_reason or "abort" for choice in self.choices]
        return next((reason for reason in reasons if reason in ("abort", "error")), reasons[0])

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Batches of deltas, each not empty, until every choice has finished. Raises `ApiError`; always closes."""
        try:
            if len(self.choices) > 1:
                async with aclosing(self._merged()) as batches:
                    async for batch in batches:
                        yield batch
                return
            choice = self.choices[0]
            arrived = choice.generation.next
            while not choice.done:
                if batch := self._feed(choice, await arrived()):
                    yield batch
        except EngineError as error:
            self._mark_failed()
            raise from_engine(error) from error
        finally:
            self.close()

    def close(self) -> None:
        for choice in self.choices:
            if not choice.done:
                choice.done = True
                choice.generation.abort()

    async def _merged(self) -> AsyncGenerator[list[Delta], None]:
        """Several sequences, one consumer: a pump a sequence fills the inbox."""
        inbox: list[tuple[Choice, list[TokenEvent] | EngineError]] = []
        filled = asyncio.Event()
        pumps = [asyncio.create_task(_pump(choice, inbox, filled)) for choice in self.choices]
        try:
            while not all(choice.done for choice in self.choices):
                await filled.wait()
                filled.clear()
                arrived = inbox[:]
                inbox.clear()
                batch: list[Delta] = []
                for choice, events in arrived:
                    if isinstance(events, EngineError):
                        raise events
                    batch += self._feed(choice, events)
                if batch:
                    yield batch
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _feed(self, choice: Choice, events: Iterable[TokenEvent]) -> list[Delta]:
        before = choice.num_generated
        batch = []
        for event in events:
            if choice.done:
                break  # sampled before the engine heard of the stop string
            delta = choice.feed(event)
            if delta is not None:
                batch.append(delta)
        self._count(choice, choice.num_generated - before)
        if choice.only_prompt and choice.done and choice.index % self._per_prompt == 0:
            self._metrics.prompt_computed(choice.generation.num_prompt, choice.generation.num_cached)
        return batch

    def _count(self, choice: Choice, num_new: int) -> None:
        if not num_new:
            return
        now = time.monotonic()
        if choice.last_s:
            self._metrics.inter_token(now - choice.last_s, num_new)
        else:
            self._count_first(choice, now)
        self._metrics.generation_tokens += num_new
        choice.last_s = now

    def _count_first(self, choice: Choice, now: float) -> None:
        if not self.first_token_s:
            self.first_token_s = now
            self._metrics.first_token(now - self.started_s)
        if choice.index % self._per_prompt == 0:
            self._metrics.prompt_computed(choice.generation.num_prompt, choice.generation.num_cached)

    def _mark_failed(self) -> None:
        for choice in self.choices:
            if not choice.done:
                choice.done, choice.finish_reason = True, "error"


async def _pump(choice: Choice, inbox: list[tuple[Choice, list[TokenEvent] | EngineError]], filled: asyncio.Event) -> None:
    try:
        last = False
        while not last:
            events = await choice.generation.next()
            last = events[-1].finish_reason is not None
            inbox.append((choice, events))
            filled.set()
    except EngineError as error:
        inbox.append((choice, error))
        filled.set()
