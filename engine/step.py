"""The values that cross between the wings: `StepPlan` one way, `StepResult` the other; `TokenEvent` outwards.

A plan is a delta to the *persistent batch*: the runner keeps, for each slot, the ids, the block table and the
sampling parameters, so a steady decode step names only slots. Both values have one flat int32 encoding (floats
and 64-bit ints as two words) which is what crosses a process boundary; no pickle does.

Because the runner writes each sampled id into its own slot state, a plan never carries sampled ids: row
(slot, start, count) computes positions start .. start+count-1 of the ids the slot holds *when the step runs*,
so plan N+1 may be sent before result N is back.

Order of effects when a plan is applied: releases, admits, new blocks, then the rows are computed and sampled.

Pure wing: standard library only.
"""

from __future__ import annotations

import array
import struct
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import BadParameter
from engine.sequence import FinishReason, SamplingParams

MAGIC_PLAN = 0x4E42_0101  # the third byte is the version of the encoding
MAGIC_RESULT = 0x4E42_0102


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence takes a slot: all ids known so far, the whole block table, and how it is sampled."""

    slot: int
    token_ids: tuple[int, ...]
    num_prompt: int
    blocks: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # masked while fewer than min_tokens are generated


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One pass over the persistent batch. Row i computes `counts[i]` positions of slot `slots[i]` from `starts[i]`.

    `samples[i]` is 1 when the row reaches the sequence's last id, so that a next id is sampled from it.
    Decode rows (count 1 and sampled) come first. `block_slots[j]` gets `block_ids[j]` appended to its table.
    """

    step: int
    releases: tuple[int, ...] = ()
    admits: tuple[Admit, ...] = ()
    block_slots: tuple[int, ...] = ()
    block_ids: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def encode(self) -> bytes:
        out = array.array("i", (MAGIC_PLAN, self.step & 0x7FFFFFFF))
        for ints in (self.releases, self.block_slots, self.block_ids, self.slots, self.starts, self.counts, self.samples):
            out.append(len(ints))
            out.extend(ints)
        out.append(len(self.admits))
        for admit in self.admits:
            _put_admit(out, admit)
        return out.tobytes()

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        ints = _Reader(data, MAGIC_PLAN)
        step = ints.count()
        lists = [ints.many() for _ in range(7)]
        admits = tuple([_get_admit(ints) for _ in range(ints.count())])
        ints.finish()
        releases, block_slots, block_ids, slots, starts, counts, samples = lists
        if len(block_slots) != len(block_ids) or not len(slots) == len(starts) == len(counts) == len(samples):
            raise ValueError("an encoded plan has lists of different lengths")
        return cls(step, releases, admits, block_slots, block_ids, slots, starts, counts, samples)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one sampled id, from the raw logits: its logprob, its rank (0 = most likely), and the k most likely."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


MAX_SCORED = 64  # positions of a step whose logits are computed for prompt_logprobs, beside those of sampled rows
BAD_LOGITS = -1  # in StepResult.token_ids: the logits of this row were not finite
NOTHING_LEFT = -2  # in StepResult.token_ids: the masks of this row leave no id


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled: one id for each row of the plan with `samples[i] == 1`, in row order."""

    step: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[int, Logprobs], ...] = ()  # (index into token_ids, value) where they were asked for
    elapsed_us: int = 0  # computing time of the step
    # (row of the plan, position of the prompt id, value): where a row computes a prompt that asked for prompt_logprobs
    prompt_logprobs: tuple[tuple[int, int, Logprobs], ...] = ()

    def encode(self) -> bytes:
        out = array.array("i", (MAGIC_RESULT, self.step & 0x7FFFFFFF, self.elapsed_us, len(self.token_ids)))
        out.extend(self.token_ids)
        out.append(len(self.logprobs))
        for index, item in self.logprobs:
            out.append(index)
            _put_logprobs(out, item)
        out.append(len(self.prompt_logprobs))
        for row, position, item in self.prompt_logprobs:
            out.extend((row, position))
            _put_logprobs(out, item)
        return out.tobytes()

    @classmethod
    def decode(cls, data: bytes) -> StepResult:
        ints = _Reader(data, MAGIC_RESULT)
        step, elapsed_us = ints.count(), ints.count()
        token_ids = ints.many()
        logprobs = []
        for _ in range(ints.count()):
            index = ints.one()
            if not 0 <= index < len(token_ids):
                raise ValueError(f"an encoded result has logprobs for id {index} of {len(token_ids)}")
            logprobs.append((index, _get_logprobs(ints)))
        prompt_logprobs = tuple([(ints.count(), ints.count(), _get_logprobs(ints)) for _ in range(ints.count())])
        ints.finish()
        return cls(step, token_ids, tuple(logprobs), elapsed_us, prompt_logprobs)


class TokenEvent(NamedTuple):
    """One sampled id on its way to whoever asked. Exactly one event of a sequence has a finish reason: its last.

    `token_id` is -1 on a last event that brings no id (aborted, bad logits, deadline). A tuple because one is made
    for every sampled id: four times cheaper than a frozen dataclass.
    """

    sequence_id: int
    token_id: int
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


def _put_logprobs(out: array.array[int], item: Logprobs) -> None:
    out.extend((*_words(item.logprob), item.rank, len(item.top_ids)))
    out.extend(item.top_ids)
    for logprob in item.top_logprobs:
        out.extend(_words(logprob))


def _get_logprobs(ints: _Reader) -> Logprobs:
    logprob, rank = ints.real(), ints.one()
    top_ids = ints.many()
    return Logprobs(logprob, rank, top_ids, tuple([ints.real() for _ in top_ids]))


def _put_admit(out: array.array[int], admit: Admit) -> None:
    p = admit.params
    out.extend((admit.slot, admit.num_prompt, p.max_tokens, p.min_tokens, p.top_k, int(p.ignore_eos), p.logprobs, p.prompt_logprobs))
    for value in (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty):
        out.extend(_words(value))
    out.extend(_seed_words(p.seed))
    bias_ids = tuple(token for token, _ in p.logit_bias)
    bias = tuple(word for _, addend in p.logit_bias for word in _words(addend))
    for ints in (p.stop_token_ids, admit.eos_token_ids, bias_ids, bias, p.allowed_token_ids, admit.blocks, admit.token_ids):
        out.append(len(ints))
        out.extend(ints)
    out.append(len(p.bad_words))
    for word in p.bad_words:
        out.append(len(word))
        out.extend(word)


def _get_admit(ints: _Reader) -> Admit:
    slot, num_prompt, max_tokens, min_tokens, top_k, ignore_eos, logprobs, prompt_logprobs = (ints.one() for _ in range(8))
    temperature, top_p, min_p, repetition, presence, frequency = (ints.real() for _ in range(6))
    (seed,) = struct.unpack("Q", struct.pack("2i", ints.one(), ints.one()))
    stop_ids, eos_ids, bias_ids, bias, allowed, blocks, token_ids = (ints.many() for _ in range(7))
    bad_words = tuple([ints.many() for _ in range(ints.count())])
    if len(bias) != 2 * len(bias_ids):
        raise ValueError(f"an encoded step has {len(bias_ids)} ids with a bias, but {len(bias)} words of addends")
    addends = struct.unpack(f"{len(bias_ids)}d", struct.pack(f"{len(bias)}i", *bias))
    try:
        params = SamplingParams(
            max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
            logit_bias=tuple(zip(bias_ids, addends, strict=True)), stop_token_ids=stop_ids,
            ignore_eos=bool(ignore_eos), seed=seed, logprobs=logprobs, allowed_token_ids=allowed, bad_words=bad_words,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
    except BadParameter as error:
        raise ValueError(f"an encoded step has bad sampling parameters: {error}") from error
    return Admit(slot, token_ids, num_prompt, blocks, params, eos_ids)


class _Reader:
    """Walks an encoded value; anything malformed is a ValueError, never a wrong value."""

    def __init__(self, data: bytes, magic: int) -> None:
        if len(data) % 4:
            raise ValueError(f"an encoded step is {len(data)} bytes, not a multiple of 4")
        self.ints = array.array("i")
        self.ints.frombytes(data)
        self.at = 0
        if self.one() != magic:
            raise ValueError("an encoded step begins with the wrong magic number")

    def one(self) -> int:
        if self.at >= len(self.ints):
            raise ValueError("an encoded step ends early")
        self.at += 1
        return self.ints[self.at - 1]

    def count(self) -> int:
        n = self.one()
        if n < 0:
            raise ValueError(f"an encoded step holds {n} where a count belongs")
        return n

    def many(self) -> tuple[int, ...]:
        n = self.one()
        if not 0 <= n <= len(self.ints) - self.at:
            raise ValueError(f"an encoded step announces {n} ints, {len(self.ints) - self.at} are left")
        self.at += n
        return tuple(self.ints[self.at - n : self.at])

    def real(self) -> float:
        return struct.unpack("d", struct.pack("2i", self.one(), self.one()))[0]

    def finish(self) -> None:
        if self.at != len(self.ints):
            raise ValueError(f"an encoded step has {len(self.ints) - self.at} ints too many")


def _words(value: float) -> tuple[int, ...]:
    """A float as the two words of its float64 pattern, so that a process gets exactly what a thread gets."""
    return struct.unpack("2i", struct.pack("d", value))


def _seed_words(seed: int) -> tuple[int, ...]:
    return struct.unpack("2i", struct.pack("Q", seed))
