"""A fake model: the next id is a hash of all ids before it, so that every ordering mistake changes an answer.

`MockRunner` interprets each `StepPlan` in full, as the real runner does, and beside it keeps a *canary store*: for
every KV slot the position and the hash of the id prefix that the row which computed it had. Before a row is sampled
its whole context is read back through its block table and compared, so a wrong block table, a stale block, a skipped
or doubled position raises `MockCanaryError` in the step where it happens. Numpy only; no model, no tensors.

    hash of ids[0 .. p]   H(p) = sum of (ids[i] + 1) * R(i) modulo 2**64, R(i) = mix(i) | 1
    next id               x = mix(H(last) + mix(seed)); end of sequence where x % 64 == 0, else 32 + (x >> 8) % 95
    seed                  the sequence's; 0 where it is sampled greedily
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from config.schema import Config
from engine.batch import Batch, Slots
from engine.models.spec import ModelSpec
from engine.sequence import SamplingParams
from engine.step import Admit, Logprobs, StepPlan, StepResult

EOS_ONE_IN = 64  # the share of answers' ids that are the end of the sequence
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95  # ids that are bytes: the ASCII characters from space to ~
MOCK_EOS = 257  # of the ByteTokenizer
_WORD = (1 << 64) - 1


class MockCanaryError(Exception):
    """The plan contradicts what was computed before: our own bug, found by the fake model."""


class MockRunner:
    """Stands where `engine.runner.Runner` stands. `verify`: "full" reads back every position of every row in every
    step, "fast" the last position of each block and of each row."""

    def __init__(self, config: Config, spec: ModelSpec, session_len: int, num_blocks: int, verify: str = "full") -> None:
        if verify not in ("full", "fast"):
            raise ValueError(f"verify must be full or fast, not {verify!r}.")
        max_batch_size, self._block_seq_len = config.engine.max_batch_size, config.cache.cache_block_seq_len
        self.num_blocks = num_blocks
        self._step_s = config.engine.mock_step_s
        self._verify_full = verify == "full"
        self._slots = Slots(max_batch_size, session_len, self._block_seq_len)
        self._admits: list[Admit | None] = [None] * max_batch_size
        self._num_ids = np.zeros(max_batch_size, np.int64)  # ids known
        self._hashes = np.empty((max_batch_size, session_len + 1), np.uint64)  # H of every known position
        self._salts = np.zeros(max_batch_size, np.uint64)
        self._factors = mix(np.arange(session_len + 1, dtype=np.uint64)) | np.uint64(1)
        self._kv_hashes = np.zeros(num_blocks * self._block_seq_len, np.uint64)
        self._kv_positions = np.full(num_blocks * self._block_seq_len, -1, np.int32)
        self._eos = spec.eos_token_ids[0] if spec.eos_token_ids else -1

    def step(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        self._apply(plan)
        if self._step_s:
            time.sleep(self._step_s)
        if not plan.slots:
            return StepResult(plan.step)
        self._check_rows(plan)
        batch = self._slots.batch(plan)
        slots = np.asarray(plan.slots)
        self._compute(batch, np.repeat(slots, np.asarray(plan.counts)))
        self._read_back(batch, slots)
        ids, logprobs = self._sample(batch)
        return StepResult(plan.step, tuple(ids), tuple(logprobs), int((time.perf_counter() - started) * 1e6))

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.releases:
            self._need(self._admits[slot] is not None, f"slot {slot} is released but holds no sequence")
            self._admits[slot] = None
        for admit in plan.admits:
            slot, n = admit.slot, len(admit.token_ids)
            self._need(self._admits[slot] is None, f"slot {slot} is given away while a sequence holds it")
            self._admits[slot] = admit
            self._num_ids[slot] = n
            np.cumsum((np.asarray(admit.token_ids, np.uint64) + np.uint64(1)) * self._factors[:n], out=self._hashes[slot, :n])
            self._salts[slot] = mix(np.uint64(0 if admit.params.greedy else admit.params.seed))
        for slot in plan.block_slots:
            self._need(self._admits[slot] is not None, f"slot {slot} gets a block but holds no sequence")
        self._slots.apply(plan)

    def _check_rows(self, plan: StepPlan) -> None:
        self._need(len(set(plan.slots)) == len(plan.slots), "a slot has two rows")
        decodes_ended = False
        for slot, start, count, sampled in zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True):
            n, end = int(self._num_ids[slot]), start + count
            self._need(self._admits[slot] is not None, f"slot {slot} has a row but holds no sequence")
            self._need(count >= 1 and start >= 0 and end <= n, f"slot {slot} has {n} ids, its row asks for {start}..{end - 1}")
            self._need(sampled == (end == n), f"slot {slot}: a row to {end} of {n} ids has samples = {sampled}")
            self._need(end <= self._slots.num_blocks[slot] * self._block_seq_len, f"slot {slot} has no block for position {end - 1}")
            decode = count == 1 and sampled
            self._need(not (decode and decodes_ended), "a decode row comes after a prompt part")
            decodes_ended = decodes_ended or not decode

    def _compute(self, batch: Batch, slot_of: np.ndarray) -> None:
        """Write the canary of every position of this step."""
        kv_slots = batch.kv_slots
        self._need(0 <= kv_slots.min() and kv_slots.max() < len(self._kv_hashes), "a block table names a block that does not exist")
        self._need(len(np.unique(kv_slots)) == len(kv_slots), "two rows write the same KV slot")
        self._kv_hashes[kv_slots] = self._hashes[slot_of, batch.positions]
        self._kv_positions[kv_slots] = batch.positions

    def _read_back(self, batch: Batch, slots: np.ndarray) -> None:
        """Compare what the rows' block tables lead to with what the rows' ids say, for all positions before their end."""
        size, ends = self._block_seq_len, batch.contexts
        if self._verify_full:
            positions = np.broadcast_to(np.arange(ends.max()), (len(ends), ends.max()))
        else:
            block_ends = np.arange(size - 1, ends.max(), size)
            positions = np.concatenate((np.broadcast_to(block_ends, (len(ends), len(block_ends))), ends[:, None] - 1), axis=1)
        kv_slots = np.take_along_axis(batch.tables, positions // size, axis=1)
        kv_slots = kv_slots.astype(np.int64) * size + positions % size
        needed = positions < ends[:, None]
        bad_table = needed & ((kv_slots < 0) | (kv_slots >= len(self._kv_hashes)))
        self._need(not bad_table.any(), "a block table names a block that does not exist")
        kv_slots[~needed] = 0
        expected = self._hashes[slots[:, None], positions]
        wrong = needed & ((self._kv_hashes[kv_slots] != expected) | (self._kv_positions[kv_slots] != positions))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            position, kv_slot = int(positions[row, column]), int(kv_slots[row, column])
            raise MockCanaryError(
                f"slot {slots[row]} reads position {position} from KV slot {kv_slot}, "
                f"which holds position {self._kv_positions[kv_slot]}, or that position of another prefix."
            )

    def _sample(self, batch: Batch) -> tuple[list[int], list[tuple[int, Logprobs]]]:
        slots = np.asarray(batch.sampled_slots, np.int64)
        last = batch.positions[batch.sampled]
        x = mix(self._hashes[slots, last] + self._salts[slots])
        ids = np.where(x % np.uint64(EOS_ONE_IN) == 0, self._eos, printable(x)).astype(np.int64)
        logprobs = []
        for row, slot in enumerate(batch.sampled_slots):
            admit = self._admits[slot]
            if admit is not None and (admit.params.min_tokens or self._eos < 0):
                ids[row] = unmasked(int(ids[row]), int(x[row]), masked(admit, int(last[row]) + 1 - admit.num_prompt))
            if admit is not None and admit.params.logprobs >= 0:
                logprobs.append((row, mock_logprobs(int(ids[row]), admit.params.logprobs)))
        self._slots.ids[slots, last + 1] = ids
        self._hashes[slots, last + 1] = self._hashes[slots, last] + (ids.astype(np.uint64) + np.uint64(1)) * self._factors[last + 1]
        self._num_ids[slots] += 1
        return ids.tolist(), logprobs

    @staticmethod
    def _need(condition: bool, what: str) -> None:
        if not condition:
            raise MockCanaryError(what + ".")


def mix(x: Any) -> Any:
    """splitmix64's output function (Steele, Lea, Flood 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(_WORD)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def printable(x: np.ndarray) -> np.ndarray:
    return np.uint64(FIRST_PRINTABLE) + (x >> np.uint64(8)) % np.uint64(NUM_PRINTABLE)


def masked(admit: Admit, num_generated: int) -> frozenset[int]:
    """The ids that may not follow: what would end the answer before min_tokens; -1 where there is no end-of-sequence id."""
    params = admit.params
    ends = {-1, *params.stop_token_ids, *(() if params.ignore_eos else admit.eos_token_ids)}
    return frozenset(ends if num_generated < params.min_tokens else {-1})


def unmasked(token: int, x: int, banned: frozenset[int]) -> int:
    """`token`, or where it is banned the next printable id that is not."""
    step = 0
    while token in banned and step < NUM_PRINTABLE:
        token = FIRST_PRINTABLE + ((x >> 8) + step) % NUM_PRINTABLE
        step += 1
    return token


def mock_logprobs(token: int, k: int) -> Logprobs:
    """The chosen id has probability 1/2, the printable ids after it 1/4, 1/8, ..."""
    others = [FIRST_PRINTABLE + (max(token - FIRST_PRINTABLE, 0) + j) % NUM_PRINTABLE for j in range(1, NUM_PRINTABLE)]
    top = tuple([token, *(other for other in others if other != token)][:k])
    return Logprobs(float(-np.log(2.0)), 0, top, tuple(float(-np.log(2.0)) * (j + 1) for j in range(len(top))))


def mock_answer(prompt_ids: Sequence[int], params: SamplingParams, eos_token_ids: Sequence[int] = (MOCK_EOS,)) -> list[int]:
    """The whole answer, one id at a time, naively: the id that ended it is its last. Python integers only."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & _WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
        return x ^ (x >> 31)

    ids = list(prompt_ids)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    salt = mixed(0 if params.greedy else params.seed)
    hashed = sum((token + 1) * (mixed(i) | 1) for i, token in enumerate(ids)) & _WORD
    answer: list[int] = []
    while len(answer) < params.max_tokens and not (answer and answer[-1] in ends):
        x = mixed((hashed + salt) & _WORD)
        token = eos_token_ids[0] if x % EOS_ONE_IN == 0 else FIRST_PRINTABLE + (x >> 8) % NUM_PRINTABLE
        step = 0
        while len(answer) < params.min_tokens and token in ends and step < NUM_PRINTABLE:
            token = FIRST_PRINTABLE + ((x >> 8) + step) % NUM_PRINTABLE
            step += 1
        hashed = (hashed + (token + 1) * (mixed(len(ids)) | 1)) & _WORD
        ids.append(token)
        answer.append(token)
    return answer
