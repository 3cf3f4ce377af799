"""`GpuSampler`: the sampling state of the persistent batch on the card, and the launches that turn logits into ids there.

What `Sampler` of `engine/sampler.py` is on the host, with the same ids: no logits and no parameters cross the bus, only the ids
(and logprobs where asked for) come back, through pinned memory, when the caller's step has ended. The host keeps of each slot
what decides which kernels a step needs: a step of greedy rows without edits is one launch. Everything is queued on the device's
one stream, so `admit` may follow `sample` at once. Knows no KV, no plan, no text; the kernels are in `sampling_kernels.py`.

The grammar seam is `allow`: a bit for each id of a slot, applied with the other edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.batch import Scored
from engine.cuda import sampling_kernels as kernels
from engine.cuda.launch import Library, Variant
from engine.cuda.sampling_select import WEIGHT_BITS, chunks_of
from engine.step import Admit, Logprobs

MAX_INVERSE_TEMPERATURE = 1e30  # a smaller temperature than its inverse is as good as 0
RING = 4  # host buffers of steps that may be in flight: more than the loop ever has
LIST_ROOM = 512  # int32 of a slot's lists at first; they grow, in admit, to what a request brings

Collected = tuple[tuple[int, ...], tuple[tuple[int, Logprobs], ...]]


@dataclass(frozen=True, slots=True)
class SamplingShape:
    """Threads of a block of each kernel, and how many thread blocks a multiprocessor should get where the rows have as many parts.

    Estimates, not measured.
    """

    scan_threads: int = 256
    draw_threads: int = 512
    logprobs_threads: int = 512
    blocks_per_multiprocessor: int = 4


DEFAULT_SHAPE = SamplingShape()


class GpuSampler:
    """Sampling of one card. `ids` int32 [slots + 1, session_len + 1], the sequences on the card, is given to each `sample`."""

    def __init__(self, library: Library, device: Any, max_batch_size: int, vocab_size: int, shape: SamplingShape = DEFAULT_SHAPE) -> None:
        self._library, self._device = library, device
        self._vocab, self._slots = vocab_size, max_batch_size
        chunks = chunks_of(vocab_size)
        self._parts = -(-vocab_size // (32 * chunks))
        self._blocks = shape.blocks_per_multiprocessor * device.multiprocessors
        self._shape = shape
        module = kernels.__name__
        self._scan = Variant(module, "scan", (chunks, False, shape.scan_threads))
        self._edit_scan = Variant(module, "scan", (chunks, True, shape.scan_threads))
        self._draw = Variant(module, "draw", (chunks, shape.draw_threads))
        self._logprobs = Variant(module, "logprobs", (chunks, shape.logprobs_threads))
        self.variants = (self._scan, self._edit_scan, self._draw, self._logprobs)

        shapes = self._shapes(max_batch_size, vocab_size, self._blocks)
        buffers = {name: torch.zeros(shape, dtype=dtype, device=device.torch_device) for name, (shape, dtype) in shapes.items()}
        self._params, self._lists = buffers["params"], buffers["lists"]
        self._seen, self._mask, self._raw = buffers["seen"], buffers["mask"], buffers["raw"]
        self._partial, self._arrivals, self._best = buffers["partial"], buffers["arrivals"], buffers["best"]
        self._tops, self._sums, self._out = buffers["tops"], buffers["sums"], buffers["out"]
        self._params[max_batch_size, kernels.FLAGS] = kernels.GREEDY  # padding rows take the shortest way
        self._params[max_batch_size, kernels.LOGPROBS] = -1
        self._host_ids = [device.pinned((max_batch_size,), torch.int32) for _ in range(RING)]
        self._step = 0
        # of each slot and the dummy one, what decides which kernels are launched
        self._flags = np.zeros(max_batch_size + 1, np.int32)
        self._greedy = np.ones(max_batch_size + 1, bool)
        self._edited = np.zeros(max_batch_size + 1, bool)  # every step: bias, penalties, words that must not come
        self._to_end = np.zeros(max_batch_size + 1, np.int64)  # ids until min_tokens
        self._logprobs_of = np.full(max_batch_size + 1, -1, np.int64)
        self._allowed: dict[int, np.ndarray] = {}  # masks of `allowed_token_ids`

    @staticmethod
    def _shapes(slots: int, vocab: int, blocks: int) -> dict[str, Any]:
        parts = -(-vocab // (32 * chunks_of(vocab)))
        return {
            "params": ((slots + 1, kernels.WORDS), torch.int32),
            "lists": ((slots + 1, LIST_ROOM), torch.int32),
            "seen": ((slots + 1, -(-vocab // 8) * 8), torch.int16),
            "mask": ((slots + 1, -(-vocab // 32)), torch.int32),
            "raw": ((slots, vocab), torch.float32),
            "tops": ((slots, parts), torch.int32),
            "sums": ((slots, parts), torch.int64),
            "partial": ((2 * (blocks + slots),), torch.int32),
            "best": ((slots, 2), torch.int32),
            "arrivals": ((slots,), torch.int32),
            "out": ((slots,), torch.int32),
        }

    @staticmethod
    def nbytes(max_batch_size: int, vocab_size: int, multiprocessors: int, shape: SamplingShape = DEFAULT_SHAPE) -> int:
        """Bytes on the card: for the memory plan."""
        shapes = GpuSampler._shapes(max_batch_size, vocab_size, shape.blocks_per_multiprocessor * multiprocessors)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())

    # -- slots ------------------------------------------------------------------------------------------------------------

    def admit(self, admit: Admit) -> None:
        """A slot takes a sequence: prompt and answer ids known so far, parameters, end-of-sequence ids. Queued, not waited for."""
        slot, params = admit.slot, admit.params
        params.check_vocabulary(self._vocab)
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self._flags[slot] = (
            kernels.GREEDY * params.greedy
            + kernels.EDITED * (not params.plain)
            + kernels.PENALISED * penalised
            + kernels.MASKED * bool(params.allowed_token_ids)
            + kernels.CHOOSES * bool(params.allowed_token_ids or params.bad_words)
        )
        self._greedy[slot] = params.greedy
        self._edited[slot] = penalised or bool(params.logit_bias or params.allowed_token_ids or params.bad_words)
        self._to_end[slot] = max(0, params.min_tokens - (len(admit.token_ids) - admit.num_prompt))
        self._logprobs_of[slot] = min(params.logprobs, self._vocab)
        self._allowed.pop(slot, None)
        ends = _ends(admit)
        lists = _lists(admit, ends)
        if len(lists):
            self._make_room(len(lists))
            self._put(self._lists[slot], lists)
        self._put(self._params[slot], self._words(admit, len(ends)))
        if penalised:
            self._put(self._seen[slot], self._count(admit))
        if params.allowed_token_ids:
            bits = np.zeros(32 * self._mask.shape[1], np.uint8)
            bits[list(params.allowed_token_ids)] = 1
            self._allowed[slot] = np.packbits(bits, bitorder="little").view(np.uint32)
            self._put(self._mask[slot], self._allowed[slot].view(np.int32))

    def release(self, slot: int) -> None:
        self._greedy[slot] = True
        self._edited[slot] = False
        self._to_end[slot] = 0
        self._logprobs_of[slot] = -1
        self._allowed.pop(slot, None)

    def allow(self, slot: int, words: np.ndarray) -> None:
        """From the next `sample` on, only ids whose bit is set (and which `allowed_token_ids` has, where that is given) may come
        from this slot, until it is released or another mask is given; uint32 [ceil(vocab / 32)], bit i of word w is id 32 w + i.
        """
        if words.shape != (self._mask.shape[1],) or words.dtype != np.uint32:
            raise ValueError(f"a mask is {words.dtype} {words.shape}, not uint32 {(self._mask.shape[1],)}")
        if slot in self._allowed:
            words = words & self._allowed[slot]
        self._put(self._mask[slot], words.view(np.int32))
        self._edited[slot] = True
        self._flags[slot] |= kernels.MASKED | kernels.EDITED | kernels.CHOOSES
        self._put(self._params[slot], self._flags[slot : slot + 1])

    def _make_room(self, length: int) -> None:
        """Wider lists, where a request brings more than any before it."""
        rows, width = self._lists.shape
        if length > width:
            wider = torch.zeros((rows, max(length, 2 * width)), dtype=torch.int32, device=self._lists.device)
            wider[:, :width].copy_(self._lists)
            self._lists = wider

    def _words(self, admit: Admit, num_ends: int) -> np.ndarray:
        params = admit.params
        words = np.zeros(kernels.WORDS, np.int32)
        words[kernels.FLAGS] = self._flags[admit.slot]
        words[kernels.POSITION] = len(admit.token_ids)
        words[kernels.GENERATED] = len(admit.token_ids) - admit.num_prompt
        words[kernels.MIN_TOKENS] = params.min_tokens
        words[kernels.TOP_K] = params.top_k if params.top_k < self._vocab else 0
        words[kernels.NUM_BIAS], words[kernels.NUM_ENDS] = len(params.logit_bias), num_ends
        words[kernels.NUM_BAD] = len(params.bad_words)
        words[kernels.LOGPROBS] = self._logprobs_of[admit.slot]
        floats = words.view(np.float32)
        inverse = MAX_INVERSE_TEMPERATURE if params.greedy else min(1.0 / params.temperature, MAX_INVERSE_TEMPERATURE)
        floats[kernels.INVERSE_TEMPERATURE] = inverse
        floats[kernels.REPETITION], floats[kernels.PRESENCE] = params.repetition_penalty, params.presence_penalty
        floats[kernels.FREQUENCY] = params.frequency_penalty
        words[kernels.SEED : kernels.SEED + 2] = np.array([params.seed], np.uint64).view(np.int32)
        words[kernels.TOP_P : kernels.TOP_P + 2] = np.array([params.top_p], np.float64).view(np.int32)
        least = math.ceil(params.min_p * (1 << WEIGHT_BITS))  # the most likely id weighs 2**WEIGHT_BITS
        words[kernels.LEAST : kernels.LEAST + 2] = np.array([least], np.int64).view(np.int32)
        return words

    def _count(self, admit: Admit) -> np.ndarray:
        """A row of `seen`, as int16."""
        counts = np.bincount(np.array(admit.token_ids[admit.num_prompt :], np.int64), minlength=self._seen.shape[1])
        row = np.minimum(counts, kernels.COUNTED).astype(np.uint16)
        if admit.params.repetition_penalty != 1.0:
            row[np.array(admit.token_ids[: admit.num_prompt], np.int64)] |= np.uint16(kernels.IN_PROMPT)
        return row.view(np.int16)

    def _put(self, row: torch.Tensor, values: np.ndarray) -> None:
        """Queue a copy to the card. Torch keeps pinned memory that a queued copy reads from being given out again."""
        staged = self._device.pinned(values.shape, row.dtype)
        staged.numpy()[...] = values
        row[: len(values)].copy_(staged, non_blocking=True)

    # -- a step -----------------------------------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, sample_slots: torch.Tensor, slots: Sequence[int], ids: torch.Tensor) -> Callable[[], Collected]:
        """Queue the sampling of a step. logits float32 [S or more, vocab], changed in place; row i is of slot `slots[i]`, which
        sample_slots int32 [S or more] says on the card. Each id is written to its sequence's next place in `ids`.

        -> what gives (ids, ((index, logprobs), ..)), to be called when the step has ended. A row holding NaN or +inf, or nothing above
        -inf, gives BAD_LOGITS; one of which the masks leave nothing gives NOTHING_LEFT; `ids` gets 0 there.
        """
        rows = len(slots)
        self._check(logits, rows)
        if rows > self._slots:
            raise ValueError(f"{rows} rows are sampled by a sampler for {self._slots}")
        chosen = np.asarray(slots, np.int64)
        edits = bool((self._edited[chosen] | (self._to_end[chosen] > 0)).any())
        self._to_end[chosen] = np.maximum(self._to_end[chosen] - 1, 0)
        self._launch_scan(logits, sample_slots, rows, edits, ids)
        if not self._greedy[chosen].all():
            self._launch_draw(logits, sample_slots, rows, ids)
        host_ids = self._host_ids[self._step % RING][:rows]
        self._step += 1
        host_ids.copy_(self._out[:rows], non_blocking=True)
        width = int(self._logprobs_of[chosen].max())
        if width < 0:
            return lambda: (tuple(host_ids.tolist()), ())
        asked = np.flatnonzero(self._logprobs_of[chosen] >= 0).tolist()
        answer = self._launch_logprobs(logits, rows, self._raw if edits else None, sample_slots, self._out, None, width)

        def collect() -> Collected:
            sampled = tuple(host_ids.tolist())
            return sampled, tuple((row, read_logprobs(answer.numpy()[row], self._vocab)) for row in asked if sampled[row] >= 0)

        return collect

    def score(self, logits: torch.Tensor, scored: Scored) -> Callable[[], list[tuple[int, int, Logprobs]]]:
        """Queue the logprobs of prompt ids: logits float32 [P or more, vocab], row i at token index `scored.tokens[i]`.

        -> what gives (row of the plan, position, logprobs) of each, to be called when the step has ended.
        """
        rows = len(scored)
        self._check(logits, rows)
        top = np.minimum(np.array(scored.top, np.int32), self._vocab)
        if top.max() > kernels.MOST_TOP:
            raise ValueError(f"{top.max()} likeliest ids are wanted of a prompt id; at most {kernels.MOST_TOP} can be given")
        wanted = torch.empty((2, rows), dtype=torch.int32, device=self._out.device)
        self._put(wanted[0], scored.ids)
        self._put(wanted[1], top)
        answer = self._launch_logprobs(logits, rows, None, None, wanted[0], wanted[1], int(top.max()))

        def collect() -> list[tuple[int, int, Logprobs]]:
            places = zip(scored.rows.tolist(), scored.positions.tolist(), answer.numpy(), strict=True)
            return [(row, position, read_logprobs(words, self._vocab)) for row, position, words in places]

        return collect

    def _check(self, logits: torch.Tensor, rows: int) -> None:
        if logits.shape[1] != self._vocab or logits.dtype != torch.float32 or logits.stride(1) != 1 or not 1 <= rows <= len(logits):
            raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, not float32 [{rows}, {self._vocab}]")

    def _launch_scan(self, logits: torch.Tensor, sample_slots: torch.Tensor, rows: int, edits: bool, ids: torch.Tensor) -> None:
        splits, share = self._split(rows, self._shape.scan_threads)
        self._library[self._edit_scan if edits else self._scan](
            (splits, rows, 1), logits, self._vocab, logits.stride(0), sample_slots, self._slots, share,
            self._params, self._lists, self._lists.shape[1], self._seen, self._mask, self._raw,
            self._partial, self._arrivals, self._tops, self._best, ids, ids.stride(0), self._out,
        )  # fmt: skip

    def _launch_draw(self, logits: torch.Tensor, sample_slots: torch.Tensor, rows: int, ids: torch.Tensor) -> None:
        splits, share = self._split(rows, self._shape.draw_threads)
        self._library[self._draw](
            (splits, rows, 1), logits, self._vocab, logits.stride(0), sample_slots, self._slots, share,
            self._params, self._seen, self._arrivals, self._tops, self._sums, self._best, ids, ids.stride(0), self._out,
        )  # fmt: skip

    def _launch_logprobs(
        self,
        logits: torch.Tensor,
        rows: int,
        raw: torch.Tensor | None,
        sample_slots: torch.Tensor | None,
        chosen: torch.Tensor,
        counts: torch.Tensor | None,
        width: int,
    ) -> torch.Tensor:
        """-> the answer in pinned memory, there when the step has ended. Steps that ask for logprobs pay for its allocation."""
        shape = (rows, kernels.ANSWER_WORDS + 2 * width)
        answer = torch.empty(shape, dtype=torch.int32, device=self._out.device)
        self._library[self._logprobs](
            (1, rows, 1),
            logits,
            self._vocab,
            logits.stride(0),
            raw,
            int(raw is not None),
            sample_slots,
            self._params,
            chosen,
            counts,
            answer,
            width,
        )
        host = self._device.pinned(shape, torch.int32)
        host.copy_(answer, non_blocking=True)
        return host

    def _split(self, rows: int, threads: int) -> tuple[int, int]:
        """(thread blocks of a row, parts of each): as many as fill the card, each with work for its warps."""
        most = -(-self._parts // (threads // 32))
        splits = min(max(1, -(-self._blocks // rows)), most)
        share = -(-self._parts // splits)
        return -(-self._parts // share), share


def _ends(admit: Admit) -> list[int]:
    """What would end the answer, where min_tokens forbids that."""
    params = admit.params
    if not params.min_tokens:
        return []
    return sorted(set(params.stop_token_ids) | (set() if params.ignore_eos else set(admit.eos_token_ids)))


def _lists(admit: Admit, ends: Sequence[int]) -> np.ndarray:
    """A row of `lists`."""
    params = admit.params
    bias = np.array([addend for _, addend in params.logit_bias], np.float32).view(np.int32)
    starts = np.cumsum([0, *(len(word) for word in params.bad_words)]) if params.bad_words else ()
    bad = [token for word in params.bad_words for token in word]
    parts = ([token for token, _ in params.logit_bias], bias, ends, starts, bad)
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def read_logprobs(words: np.ndarray, vocab: int) -> Logprobs:
    """One row of the logprobs kernel's answer, int32, as the value that a step's result holds."""
    if words[kernels.TOP_COUNT] == np.array(kernels.UNUSABLE, np.uint32).view(np.int32):
        return Logprobs(-math.inf, vocab)
    floats = words.view(np.float32)
    (total,) = words[kernels.TOTAL : kernels.TOTAL + 2].copy().view(np.int64)
    base = float(floats[kernels.HIGHEST]) + (math.log(float(total)) - WEIGHT_BITS * math.log(2.0))
    n, first = int(words[kernels.TOP_COUNT]), kernels.ANSWER_WORDS
    width = (len(words) - first) // 2
    top = tuple(value - base for value in floats[first + width : first + width + n].tolist())
    return Logprobs(float(floats[kernels.OWN]) - base, int(words[kernels.RANK]), tuple(words[first : first + n].tolist()), top)
