"""Logits -> ids, on the host: what `SamplingParams` asks for, row by row, in the order its docstring states.

    raw logprobs | logit_bias, repetition, presence and frequency penalty | masks | temperature, top_k,
    top_p, min_p | draw

The answer of a sequence is a function of its logits, its parameters and the position of the id: not of slot,
batch-mates, preemption or prompt parts. The random number of a row is Philox4x32-10 keyed by the seed at counter
`position`. Editing a row costs O(ids concerned); a plain greedy row costs one pass. The loops are in
`engine/sampler_kernels.py`; `engine/sampler_reference.py` says the same slowly. Knows no KV, no plan, no text.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from engine import sampler_kernels as kernels
from engine.batch import Scored
from engine.sequence import SamplingParams
from engine.step import BAD_LOGITS, NOTHING_LEFT, Admit, Logprobs

MAX_INVERSE_TEMPERATURE = 1e30  # a smaller temperature than its inverse is as good as 0


class Sampler:
    """The sampling state of the persistent batch: parameters of each slot, and counts where there are penalties."""

    def __init__(self, max_batch_size: int, session_len: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.session_len = session_len
        self._edits: list[_Edits | None] = [None] * max_batch_size
        self._logprobs = [-1] * max_batch_size
        self._knobs = kernels.Knobs(
            greedy=np.zeros(max_batch_size, np.uint8),
            inverse_temperature=np.ones(max_batch_size, np.float32),
            top_k=np.zeros(max_batch_size, np.int64),
            top_p=np.ones(max_batch_size, np.float64),
            min_p=np.zeros(max_batch_size, np.float64),
            seeds=np.zeros(max_batch_size, np.uint64),
            positions=np.zeros(max_batch_size, np.int64),
        )
        self._scratch = kernels.make_scratch(vocab_size)
        self._top_ids = np.zeros(vocab_size, np.int64)

    def admit(self, admit: Admit) -> None:
        """A slot takes a sequence: prompt and answer ids known so far, parameters, end-of-sequence ids."""
        slot, params, knobs = admit.slot, admit.params, self._knobs
        params.check_vocabulary(self.vocab_size)
        knobs.greedy[slot] = params.greedy
        if not params.greedy:
            knobs.inverse_temperature[slot] = min(1.0 / params.temperature, MAX_INVERSE_TEMPERATURE)
        knobs.top_k[slot] = params.top_k
        knobs.top_p[slot] = params.top_p
        knobs.min_p[slot] = params.min_p
        knobs.seeds[slot] = params.seed
        knobs.positions[slot] = len(admit.token_ids)
        self._logprobs[slot] = params.logprobs
        self._edits[slot] = None if params.plain else _Edits(admit)

    def release(self, slot: int) -> None:
        self._edits[slot] = None
        self._logprobs[slot] = -1

    def sample(self, logits: np.ndarray, slots: Sequence[int]) -> tuple[list[int], list[tuple[int, Logprobs]]]:
        """logits float32 [S, vocab], row i of slot `slots[i]`; may be changed in place. -> ids, (index, logprobs) pairs.

        A row holding NaN or +inf, or nothing above -inf, gives BAD_LOGITS and leaves its slot as it was; one of which the
        masks leave nothing gives NOTHING_LEFT.
        """
        if logits.shape != (len(slots), self.vocab_size) or logits.dtype != np.float32:
            raise ValueError(f"logits are {logits.dtype} {logits.shape}, not float32 {(len(slots), self.vocab_size)}.")
        logits = np.ascontiguousarray(logits)
        raw: dict[int, np.ndarray] = {}
        exhausted: set[int] = set()
        for row, slot in enumerate(slots):
            edits = self._edits[slot]
            if edits is not None:
                if self._logprobs[slot] >= 0:
                    raw[row] = logits[row].copy()
                edits.apply(logits[row])
                if not edits.mask(logits[row]) and edits.chooses:
                    exhausted.add(row)
        chosen = np.empty(len(slots), np.int64)
        rows = np.asarray(slots, np.int64)
        kernels.sample_rows(logits, logits.view(np.int32), rows, self._knobs, self._scratch, chosen)
        self._knobs.positions[rows] += chosen >= 0
        ids: list[int] = chosen.tolist()
        asked: list[tuple[int, Logprobs]] = []
        for row, slot in enumerate(slots):
            token = ids[row]
            if token == kernels.NO_ID:
                ids[row] = NOTHING_LEFT if row in exhausted else BAD_LOGITS
                continue
            edits = self._edits[slot]
            if edits is not None:
                edits.append(token)
            if self._logprobs[slot] >= 0:
                asked.append((row, self._describe(raw.get(row, logits[row]), token, self._logprobs[slot])))
        return ids, asked

    def score(self, logits: np.ndarray, scored: Scored) -> list[tuple[int, int, Logprobs]]:
        """logits float32 [P, vocab], row i at token index `scored.tokens[i]` -> (row of the plan, position, logprobs) of prompt ids."""
        logits = np.ascontiguousarray(logits)
        usable = np.isfinite(logits.max(axis=1)) if len(logits) else ()  # NaN and +inf are the maximum of their row
        rows, positions, ids = scored.rows.tolist(), scored.positions.tolist(), scored.ids.tolist()
        return [
            (rows[i], positions[i], self._describe(logits[i], ids[i], scored.top[i]) if usable[i] else Logprobs(-math.inf, self.vocab_size))
            for i in range(len(logits))
        ]

    def _describe(self, row: np.ndarray, token: int, k: int) -> Logprobs:
        highest, log_total, rank, n = kernels.row_logprobs(
            row, row.view(np.int32), token, min(k, self.vocab_size), self._scratch, self._top_ids
        )
        base = float(highest) + log_total
        top = self._top_ids[:n]
        logprobs = (row[top].astype(np.float64) - base).tolist()
        return Logprobs(float(row[token]) - base, int(rank), tuple(top.tolist()), tuple(logprobs))


class _Edits:
    """What changes the logits of one slot before temperature: bias, penalties, and masks."""

    def __init__(self, admit: Admit) -> None:
        params = admit.params
        self.params = params
        self.bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self.bias = np.array([addend for _, addend in params.logit_bias], np.float32)
        self.num_generated = len(admit.token_ids) - admit.num_prompt
        self.allowed = np.unique(np.array(params.allowed_token_ids, np.int64))
        self.bad_words = params.bad_words
        longest = max((len(word) for word in params.bad_words), default=1)
        answer = admit.token_ids[admit.num_prompt :]
        self.tail: deque[int] = deque(answer, maxlen=longest - 1)  # of the answer: what a bad word may go on from
        self.chooses = bool(params.allowed_token_ids or params.bad_words)  # masks that a request may well exhaust
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(admit.eos_token_ids))
        self.end_ids = np.array(sorted(ends), np.int64)  # what would end the answer
        self.seen: _Seen | None = None
        if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0):
            prompt = admit.token_ids[: admit.num_prompt] if params.repetition_penalty != 1.0 else ()
            self.seen = _Seen(prompt, admit.token_ids[admit.num_prompt :])

    def append(self, token: int) -> None:
        self.num_generated += 1
        self.tail.append(token)
        if self.seen is not None:
            self.seen.append(token)

    def apply(self, row: np.ndarray) -> None:
        """row float32 [vocab], in place. Overflow to -inf is a mask; to +inf, or NaN, is found by the sampler's scan."""
        with np.errstate(over="ignore", invalid="ignore"):
            if len(self.bias_ids):
                row[self.bias_ids] += self.bias
            if self.seen is not None:
                self.seen.penalise(row, self.params)

    def mask(self, row: np.ndarray) -> bool:
        """Apply the masks in place; False where nothing above -inf is left of a row that had something.

        A row with NaN or +inf stays as it is, to be found.
        """
        ending = self.num_generated < self.params.min_tokens
        if not (ending or self.chooses) or not np.isfinite(row.max()):
            return True
        if ending:
            row[self.end_ids] = -np.inf
        if len(self.allowed):
            kept = row[self.allowed]
            row[:] = -np.inf
            row[self.allowed] = kept
        tail = tuple(self.tail)
        for *before, last in self.bad_words:
            if not before or tail[-len(before) :] == tuple(before):
                row[last] = -np.inf
        return bool(row.max() > -np.inf)


class _Seen:
    """The distinct ids of prompt and answer, and how often the answer has each. Appending is O(1)."""

    def __init__(self, prompt: Iterable[int], answer: Iterable[int]) -> None:
        self.index: dict[int, int] = {}
        for token in prompt:
            self.index.setdefault(token, len(self.index))
        capacity = 2 * len(self.index) + 64
        self.ids = np.zeros(capacity, np.int64)
        self.counts = np.zeros(capacity, np.float32)  # occurrences in the answer
        self.ids[: len(self.index)] = list(self.index)
        for token in answer:
            self.append(token)

    def append(self, token: int) -> None:
        at = self.index.setdefault(token, len(self.index))
        if at == len(self.ids):
            self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
            self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
        self.ids[at] = token
        self.counts[at] += 1

    def penalise(self, row: np.ndarray, params: SamplingParams) -> None:
        n = len(self.index)
        ids, counts = self.ids[:n], self.counts[:n]
        values = row[ids]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values
