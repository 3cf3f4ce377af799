"""One noun for a generation: `Sequence`, its status, the allowed moves, and how it is sampled.

Pure wing: standard library only. A sequence knows ids and counts, never text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from engine.errors import BadParameter, InvalidMove

if TYPE_CHECKING:
    from engine.cache.sessions import Lease


class Status(IntEnum):
    WAITING = 0  # owns no KV blocks
    RUNNING = 1  # has a slot in the persistent batch and KV blocks
    FINISHED = 2  # has a finish reason; its blocks go back when no step in flight can touch them


MOVES: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),  # WAITING: preempted
    Status.FINISHED: frozenset(),
}


class FinishReason(IntEnum):
    STOP = 0  # an end-of-sequence or stop token was sampled, or the API saw a stop string
    LENGTH = 1  # max_tokens or session_len reached
    ABORT = 2  # the client went away or cancelled
    ERROR = 3  # the logits of this sequence were not finite


MAX_SEED = (1 << 64) - 1
MAX_TOP_LOGPROBS = 128
MAX_BAD_WORDS, MAX_BAD_WORD_IDS = 1024, 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled; every field is finite, of its exact type and in range, or `BadParameter`.

    `temperature` 0 means greedy (so does `top_k` 1). Penalties: `repetition_penalty` divides or multiplies the
    logits of ids in prompt + answer (Keskar et al. 2019, CTRL); `presence_penalty` and `frequency_penalty` are
    subtracted once / per occurrence for ids of the answer only (OpenAI's definition). Order: logit_bias and
    penalties, masks, (raw logprobs are taken before all of these), temperature, top_k, top_p, min_p.
    Masks: min_tokens (what would end the answer), `allowed_token_ids` (what is not among them; empty: all are), and
    `bad_words`: id sequences of which the last id may not follow an answer that ends with the ids before it. A
    sequence for which the masks leave no id ends with STOP.
    `logprobs` -1: none; k >= 0: the chosen id's logprob and the k most likely, from the raw logits.
    `prompt_logprobs` is the same for each prompt id but the first; such a prompt is computed whole, cached or not.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, addend), ids distinct
    stop_token_ids: tuple[int, ...] = ()  # beside the model's end-of-sequence ids
    ignore_eos: bool = False
    seed: int = 0  # of the counter-based generator keyed by (seed, position); 0 .. 2**64-1
    logprobs: int = -1
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: int = -1

    def __post_init__(self) -> None:
        _int("max_tokens", self.max_tokens, 1, (1 << 31) - 1)
        _int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _float("temperature", self.temperature, 0.0, 2.0)
        _int("top_k", self.top_k, 0, (1 << 31) - 1)
        _float("top_p", self.top_p, 0.0, 1.0)
        _float("min_p", self.min_p, 0.0, 1.0)
        _float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _int("seed", self.seed, 0, MAX_SEED)
        _int("logprobs", self.logprobs, -1, MAX_TOP_LOGPROBS)
        _int("prompt_logprobs", self.prompt_logprobs, -1, MAX_TOP_LOGPROBS)
        for token, addend in self.logit_bias:
            _int("logit_bias", token, 0, (1 << 31) - 1)
            _float("logit_bias", addend, -100.0, 100.0)
        if len({token for token, _ in self.logit_bias}) != len(self.logit_bias):
            raise BadParameter("logit_bias", "logit_bias names an id twice; give each id once.")
        for token in self.stop_token_ids:
            _int("stop_token_ids", token, 0, (1 << 31) - 1)
        if type(self.ignore_eos) is not bool:
            raise BadParameter("ignore_eos", f"ignore_eos must be true or false, not {self.ignore_eos!r}.")
        if self.allowed_token_ids or self.bad_words:
            self._check_masks()

    def _check_masks(self) -> None:
        for token in self.allowed_token_ids:
            _int("allowed_token_ids", token, 0, (1 << 31) - 1)
        if len(self.bad_words) > MAX_BAD_WORDS or not all(1 <= len(word) <= MAX_BAD_WORD_IDS for word in self.bad_words):
            message = f"bad_words holds at most {MAX_BAD_WORDS} words of 1 to {MAX_BAD_WORD_IDS} ids each."
            raise BadParameter("bad_words", message)
        for word in self.bad_words:
            for token in word:
                _int("bad_words", token, 0, (1 << 31) - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def plain(self) -> bool:
        """True when the sampled distribution is that of the raw logits: no bias, no penalty, no mask."""
        return (
            not self.logit_bias
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.min_tokens == 0
            and not self.allowed_token_ids
            and not self.bad_words
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that the model does not have (`BadParameter`), so that none can reach a kernel."""
        named = [("logit_bias", [t for t, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)]
        named += [("allowed_token_ids", self.allowed_token_ids), *(("bad_words", word) for word in self.bad_words)]
        for name, ids in named:
            for token in ids:
                if token >= vocab_size:
                    raise BadParameter(name, f"{name} holds id {token}, but the vocabulary ends at {vocab_size - 1}.")


def _int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:
        raise BadParameter(name, f"{name} must be an integer, not {type(value).__name__}.")
    if not low <= value <= high:
        raise BadParameter(name, f"{name} must be between {low} and {high}, not {str(value)[:24]}.")


def _float(name: str, value: object, low: float, high: float) -> None:
    if type(value) is not float and type(value) is not int:
        raise BadParameter(name, f"{name} must be a number, not {type(value).__name__}.")
    if not (math.isfinite(value) and low <= value <= high):
        raise BadParameter(name, f"{name} must be between {low:g} and {high:g}, not {str(value)[:24]}.")


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt ids + generated ids, and how far the engine is with them.

    `num_tokens` counts ids that exist, of which the last `num_pending` are being sampled by steps in flight (0 or 1
    when a step is planned, one more once it is); `num_computed` counts positions whose K/V is written by the steps
    issued so far. A step is owed for `num_tokens - num_computed` positions: prefill, prompt part, decode and resumed
    preemption are this one line.
    """

    id: int
    token_ids: list[int]  # prompt, then what was sampled
    num_prompt: int
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0  # smaller goes first
    group: int = 0  # QoS (qos.py): among equal priorities smaller goes first; never preempts
    turn: float = 0.0  # QoS: the same within a group
    arrival_s: float = 0.0  # monotonic
    deadline_s: float = math.inf  # monotonic; past it the sequence is aborted wherever it is
    salt: bytes = b""  # part of the first block's hash: equal salts may share cached prefixes
    lease: Lease | None = None  # of its session: where its table comes from and goes to
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    slot: int = -1  # row of the persistent batch while RUNNING
    blocks: list[int] = field(default_factory=list)  # block table
    num_computed: int = 0
    num_cached: int = 0  # of num_computed: found in the prefix cache at (the first) admission
    num_pending: int = 0
    num_preemptions: int = 0
    first_scheduled_s: float = -1.0
    first_token_s: float = -1.0
    prompt_logprobs: list[object] = field(default_factory=list)  # `Logprobs` of prompt ids 1, 2, ... as steps bring them
    # the scheduler's own, set by `Scheduler.add` and kept by it
    rank: tuple[int, int, float, float, int] = (0, 0, 0.0, 0.0, 0)  # smaller goes first
    limit: int = 0  # num_tokens at which it ends for its length
    stop_ids: frozenset[int] = frozenset()  # sampled ids that may end it, BAD_LOGITS among them
    scoring: bool = False  # its slot brings prompt logprobs
    horizon: int = 0  # num_computed at which planning it needs more than one token more: a new block, or its end

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_unscored(self) -> int:
        """Prompt ids whose logprobs are owed: asked for, and no step has brought them."""
        return 0 if self.params.prompt_logprobs < 0 else self.num_prompt - 1 - len(self.prompt_logprobs)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def move(self, to: Status) -> None:
        if to not in MOVES[self.status]:
            raise InvalidMove(f"sequence {self.id} cannot move from {self.status.name} to {to.name}.")
        self.status = to
