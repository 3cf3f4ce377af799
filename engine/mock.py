"""A fake model: the next id is a hash of all ids before it, so that every ordering mistake changes an answer.

`MockRunner` interprets each `StepPlan` in full, as the real runner does, and beside it keeps a *canary store*: for
every KV slot a hash of the offset in its block and of the whole id prefix of the row that computed it. Before a row
is sampled its whole context is read back through its block table and compared, so a wrong block table, a stale block,
a skipped or doubled position raises `MockCanaryError` in the step where it happens. Numpy only; no model, no tensors.

    hash of ids[0 .. p]   H(p) = sum of (ids[i] + 1) * R(i) modulo 2**64, R(i) = mix(i) | 1
    canary of p           C(p) = mix(H(p) + R(p mod block_seq_len)); compared as sums over whole blocks
    next id               x = mix(H(last) + mix(seed)); end of sequence where x % 64 == 0, else 32 + (x >> 8) % 95;
                          where a mask forbids it, the next that is not: of the allowed ids, else of the printable ones
    prompt logprobs       prompt id p has rank r = mix(H(p)) % 8 and logprob -(r + 1)
    seed                  the sequence's; 0 where it is sampled greedily
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from config.schema import Config
from engine.batch import Batch, Slots
from engine.models.spec import ModelSpec
from engine.sequence import SamplingParams
from engine.step import NOTHING_LEFT, Admit, Logprobs, StepPlan, StepResult

EOS_ONE_IN = 64  # the share of answers' ids that are the end of the sequence
FIRST_PRINTABLE, NUM_PRINTABLE = 32, 95  # ids that are bytes: the ASCII characters from space to ~
MOCK_EOS = 257  # of the ByteTokenizer
_WORD = (1 << 64) - 1


class MockCanaryError(Exception):
    """The plan contradicts what was computed before: our own bug, found by the fake model."""


class MockRunner:
    """Stands where `engine.runner.Runner` stands."""

    def __init__(self, config: Config, spec: ModelSpec, session_len: int, num_blocks: int) -> None:
        max_batch_size, size = config.engine.max_batch_size, config.cache.cache_block_seq_len
        self.num_blocks = num_blocks
        self._block_seq_len = size
        self._step_s = config.engine.mock_step_s
        self._slots = Slots(max_batch_size, session_len, size)
        self._admits: list[Admit | None] = [None] * max_batch_size
        self._num_ids = np.zeros(max_batch_size, np.int64)  # ids known
        self._hashes = np.empty((max_batch_size, session_len + 1), np.uint64)  # H(p) of every known position
        self._sums = np.zeros((max_batch_size, session_len + 2), np.uint64)  # [slot, p]: C(0) + .. + C(p - 1)
        self._salts = np.zeros(max_batch_size, np.uint64)
        self._factors = mix(np.arange(session_len + 1, dtype=np.uint64)) | np.uint64(1)
        self._offset_factors = np.resize(self._factors[:size], session_len + 1) if size <= session_len else self._factors
        self._canaries = np.zeros((num_blocks, size), np.uint64)
        self._block_sums = np.zeros(num_blocks, np.uint64)
        self._eos = spec.eos_token_ids[0] if spec.eos_token_ids else -1

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.step(plan)
        return lambda: result

    def close(self) -> None:
        """Nothing was started."""

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
        prompt = self._score(plan)
        ids, logprobs = self._sample(batch)
        return StepResult(plan.step, tuple(ids), tuple(logprobs), int((time.perf_counter() - started) * 1e6), tuple(prompt))

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
            np.cumsum(mix(self._hashes[slot, :n] + self._offset_factors[:n]), out=self._sums[slot, 1 : n + 1])
            self._salts[slot] = mix(np.uint64(0 if admit.params.greedy else admit.params.seed))
        for slot in plan.block_slots:
            self._need(self._admits[slot] is not None, f"slot {slot} gets a block but holds no sequence")
        self._slots.apply(plan)

    def _check_rows(self, plan: StepPlan) -> None:
        self._need(len(set(plan.slots)) == len(plan.slots), "a slot has two rows")
        for slot, start, count, sampled in zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True):
            n, end = int(self._num_ids[slot]), start + count
            self._need(self._admits[slot] is not None, f"slot {slot} has a row but holds no sequence")
            self._need(count >= 1 and start >= 0 and end <= n, f"slot {slot} has {n} ids, its row asks for {start}..{end - 1}")
            self._need(sampled == (end == n), f"slot {slot}: a row to {end} of {n} ids has samples = {sampled}")
            self._need(end <= self._slots.num_blocks[slot] * self._block_seq_len, f"slot {slot} has no block for position {end - 1}")

    def _compute(self, batch: Batch, slot_of: np.ndarray) -> None:
        """Write the canary of every position of this step; a block whose first position is written starts anew."""
        kv_slots, size = batch.kv_slots, self._block_seq_len
        self._need(0 <= kv_slots.min() and kv_slots.max() < self._canaries.size, "a block table names a block that does not exist")
        self._need(len(np.unique(kv_slots)) == len(kv_slots), "two rows write the same KV slot")
        blocks, offsets = kv_slots // size, kv_slots % size
        started = blocks[offsets == 0]
        self._canaries[started] = 0
        self._block_sums[started] = 0
        written = mix(self._hashes[slot_of, batch.positions] + self._factors[offsets])
        np.add.at(self._block_sums, blocks, written - self._canaries[blocks, offsets])
        self._canaries[blocks, offsets] = written

    def _read_back(self, batch: Batch, slots: np.ndarray) -> None:
        """Compare what the rows' block tables lead to with what the rows' ids say, for all positions before their end."""
        size, ends, tables = self._block_seq_len, batch.contexts[:, None], batch.tables
        starts = np.arange(tables.shape[1])[None, :] * size
        needed = starts < ends
        self._need(not (needed & ((tables < 0) | (tables >= self.num_blocks))).any(), "a block table names a block that does not exist")
        last, first = np.minimum(starts + size, ends), np.minimum(starts, ends)
        expected = self._sums[slots[:, None], last] - self._sums[slots[:, None], first]
        for row, column in np.argwhere(needed & (self._block_sums[np.where(needed, tables, 0)] != expected)):
            self._read_block(int(slots[row]), int(tables[row, column]), int(first[row, column]), int(last[row, column]))

    def _read_block(self, slot: int, block: int, first: int, last: int) -> None:
        """Position by position: what lies beyond the row's end may be anything."""
        held = self._canaries[block, : last - first]
        wrong = np.flatnonzero(held != np.diff(self._sums[slot, first : last + 1]))
        if len(wrong):
            raise MockCanaryError(
                f"slot {slot} reads position {first + wrong[0]} from offset {wrong[0]} of block {block}, "
                "which was not computed from the ids of this sequence."
            )

    def _sample(self, batch: Batch) -> tuple[list[int], list[tuple[int, Logprobs]]]:
        slots = np.asarray(batch.sampled_slots, np.int64)
        last = batch.positions[batch.sampled]
        x = mix(self._hashes[slots, last] + self._salts[slots])
        ids = np.where(x % np.uint64(EOS_ONE_IN) == 0, self._eos, printable(x)).astype(np.int64)
        logprobs = []
        for row, slot in enumerate(batch.sampled_slots):
            admit = self._admits[slot]
            if admit is not None and (self._eos < 0 or not admit.params.plain):
                n = int(last[row]) + 1
                answer = self._slots.ids[slot, admit.num_prompt : n].tolist()
                ids[row] = unmasked(int(ids[row]), int(x[row]), admit.params, masked(admit.params, admit.eos_token_ids, answer))
            if admit is not None and admit.params.logprobs >= 0 and ids[row] >= 0:
                logprobs.append((row, mock_logprobs(int(ids[row]), admit.params.logprobs)))
        self._append(slots, last + 1, np.maximum(ids, 0))
        return ids.tolist(), logprobs

    def _score(self, plan: StepPlan) -> list[tuple[int, int, Logprobs]]:
        scored = self._slots.scored(plan)
        out = []
        for row, position, token, k in zip(scored.rows.tolist(), scored.positions.tolist(), scored.ids.tolist(), scored.top):
            hashed = int(mix(self._hashes[plan.slots[row], position]))
            out.append((row, position, mock_prompt_logprobs(token, hashed, k)))
        return out

    def _append(self, slots: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> None:
        """A sampled id is the slot's next one."""
        self._slots.ids[slots, positions] = ids
        hashes = self._hashes[slots, positions - 1] + (ids.astype(np.uint64) + np.uint64(1)) * self._factors[positions]
        self._hashes[slots, positions] = hashes
        self._sums[slots, positions + 1] = self._sums[slots, positions] + mix(hashes + self._offset_factors[positions])
        self._num_ids[slots] += 1

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


def masked(params: SamplingParams, eos_token_ids: Sequence[int], answer: Sequence[int]) -> frozenset[int]:
    """The ids that may not follow `answer`: what would end it before min_tokens, and what completes a bad word.

    -1 stands for the end-of-sequence id where there is none.
    """
    banned = {-1}
    if len(answer) < params.min_tokens:
        banned |= {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    for *before, last in params.bad_words:
        if list(answer[len(answer) - len(before) :]) == before and len(answer) >= len(before):
            banned.add(last)
    return frozenset(banned)


def unmasked(token: int, x: int, params: SamplingParams, banned: frozenset[int]) -> int:
    """`token`, or where it is forbidden the next id that is not: allowed ones, else printable ones; NOTHING_LEFT without."""
    allowed = sorted(set(params.allowed_token_ids))
    if token not in banned and (not allowed or token in allowed):
        return token
    others = allowed or range(FIRST_PRINTABLE, FIRST_PRINTABLE + NUM_PRINTABLE)
    turned = (others[((x >> 8) + step) % len(others)] for step in range(len(others)))
    return next((other for other in turned if other not in banned), NOTHING_LEFT)


def mock_logprobs(token: int, k: int) -> Logprobs:
    """The chosen id has probability 1/2, the printable ids after it 1/4, 1/8, ..."""
    others = [FIRST_PRINTABLE + (max(token - FIRST_PRINTABLE, 0) + j) % NUM_PRINTABLE for j in range(1, NUM_PRINTABLE)]
    top = tuple([token, *(other for other in others if other != token)][:k])
    return Logprobs(float(-np.log(2.0)), 0, top, tuple(float(-np.log(2.0)) * (j + 1) for j in range(len(top))))


def mock_prompt_logprobs(token: int, hashed: int, k: int) -> Logprobs:
    """Of a prompt id with mixed hash `hashed`: rank r = hashed % 8, and the ids ranked before and after it are printable."""
    rank = hashed % 8
    others = [other for other in range(FIRST_PRINTABLE, FIRST_PRINTABLE + NUM_PRINTABLE) if other != token]
    top = tuple([*others[:rank], token, *others[rank:]][:k])
    return Logprobs(-1.0 - rank, rank, top, tuple(-1.0 - j for j in range(len(top))))


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
        token = unmasked(token, x, params, masked(params, eos_token_ids, answer))
        if token == NOTHING_LEFT:
            break
        hashed = (hashed + (token + 1) * (mixed(len(ids)) | 1)) & _WORD
        ids.append(token)
        answer.append(token)
    return answer
