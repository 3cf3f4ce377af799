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
from typing import Any

import numpy as np
import torch

from engine.cuda import sampling_kernels as kernels
from engine.cuda.launch import Library, Variant
from engine.cuda.sampling_select import WEIGHT_BITS, part_of
from engine.errors import BadParameter
from engine.sequence import SamplingParams
from engine.step import Admit, Logprobs

MAX_INVERSE_TEMPERATURE = 1e30  # a smaller temperature than its inverse is as good as 0
RING = 4  # host buffers of steps that may be in flight: more than the loop ever has
SCAN_THREADS, DRAW_THREADS, LOGPROBS_THREADS = 256, 512, 512
BLOCKS_PER_MULTIPROCESSOR = 4  # thread blocks that a launch should have, where the rows have that many parts
ROOM_FOR_EOS = 16

Collected = tuple[tuple[int, ...], tuple[tuple[int, Logprobs], ...]]


class GpuSampler:
    """`max_bias`, `max_ends`, `max_top`: the longest lists of a request (config: request.max_logit_bias, ..)."""

    def __init__(
        self,
        library: Library,
        device: Any,
        max_batch_size: int,
        vocab_size: int,
        *,
        max_bias: int = 300,
        max_ends: int = 64 + ROOM_FOR_EOS,
        max_top: int = 20,
    ) -> None:
        if not 0 <= max_top <= kernels.MOST_TOP:
            raise ValueError(f"{max_top} likeliest ids cannot be given; 0 to {kernels.MOST_TOP} can")
        self._library, self._device = library, device
        self._vocab, self._slots = vocab_size, max_batch_size
        self._part = part_of(vocab_size)
        self._parts = -(-vocab_size // self._part)
        self._max_top = max_top
        self._blocks = BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors
        module = kernels.__name__
        self._scan = Variant(module, "scan", (vocab_size, False, SCAN_THREADS))
        self._edit_scan = Variant(module, "scan", (vocab_size, True, SCAN_THREADS))
        self._draw = Variant(module, "draw", (vocab_size, DRAW_THREADS))
        self._logprobs = Variant(module, "logprobs", (vocab_size, max_top, LOGPROBS_THREADS))
        self.variants = (self._scan, self._edit_scan, self._draw, self._logprobs)

        shapes = self._shapes(max_batch_size, vocab_size, max_bias, max_ends, max_top, device.multiprocessors)
        buffers = {name: torch.zeros(shape, dtype=dtype, device=device.torch_device) for name, (shape, dtype) in shapes.items()}
        self._params, self._seen, self._raw = buffers["params"], buffers["seen"], buffers["raw"]
        self._bias_ids, self._bias, self._ends = buffers["bias_ids"], buffers["bias"], buffers["ends"]
        self._partial, self._arrivals, self._best = buffers["partial"], buffers["arrivals"], buffers["best"]
        self._tops, self._sums = buffers["tops"], buffers["sums"]
        self._out, self._answer = buffers["out"], buffers["answer"]
        self._mask: torch.Tensor | None = None
        self._params[max_batch_size, kernels.FLAGS] = kernels.GREEDY  # padding rows take the shortest way
        self._params[max_batch_size, kernels.LOGPROBS] = -1
        self._host_ids = [device.pinned((max_batch_size,), torch.int32) for _ in range(RING)]
        self._step = 0
        # of each slot, what decides which kernels are launched
        self._flags = np.zeros(max_batch_size, np.int32)
        self._greedy = np.ones(max_batch_size, bool)
        self._edited = np.zeros(max_batch_size, bool)  # bias or penalties: every step
        self._masked = np.zeros(max_batch_size, bool)  # by `allow`
        self._to_end = np.zeros(max_batch_size, np.int64)  # ids until min_tokens
        self._wants = np.zeros(max_batch_size, bool)  # logprobs

    @staticmethod
    def _shapes(slots: int, vocab: int, bias: int, ends: int, top: int, multiprocessors: int) -> dict[str, Any]:
        parts = -(-vocab // part_of(vocab))
        return {
            "params": ((slots + 1, kernels.WORDS), torch.int32),
            "seen": ((slots + 1, -(-vocab // 8) * 8), torch.int16),
            "bias_ids": ((slots + 1, max(1, bias)), torch.int32),
            "bias": ((slots + 1, max(1, bias)), torch.float32),
            "ends": ((slots + 1, max(1, ends)), torch.int32),
            "raw": ((slots, vocab), torch.float32),
            "tops": ((slots, parts), torch.int32),
            "sums": ((slots, parts), torch.int64),
            "partial": ((2 * (BLOCKS_PER_MULTIPROCESSOR * multiprocessors + slots),), torch.int32),
            "best": ((slots, 2), torch.int32),
            "arrivals": ((slots,), torch.int32),
            "out": ((slots,), torch.int32),
            "answer": ((slots, kernels.ANSWER_WORDS + 2 * top), torch.int32),
        }

    @staticmethod
    def nbytes(
        max_batch_size: int,
        vocab_size: int,
        multiprocessors: int,
        *,
        max_bias: int = 300,
        max_ends: int = 64 + ROOM_FOR_EOS,
        max_top: int = 20,
    ) -> int:
        """Bytes on the card: for the memory plan."""
        shapes = GpuSampler._shapes(max_batch_size, vocab_size, max_bias, max_ends, max_top, multiprocessors)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())

    # -- slots ------------------------------------------------------------------------------------------------------------

    def admit(self, admit: Admit) -> None:
        """A slot takes a sequence: prompt and answer ids known so far, parameters, end-of-sequence ids. Queued, not waited for."""
        slot, params = admit.slot, admit.params
        params.check_vocabulary(self._vocab)
        ends = sorted(set(params.stop_token_ids) | (set() if params.ignore_eos else set(admit.eos_token_ids))) if params.min_tokens else []
        self._check_room(params, ends)
        generated = len(admit.token_ids) - admit.num_prompt
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self._flags[slot] = (
            kernels.GREEDY * params.greedy + kernels.EDITED * (not params.plain) + kernels.PENALISED * penalised
        )  # fmt: skip
        self._greedy[slot] = params.greedy
        self._edited[slot] = penalised or bool(params.logit_bias)
        self._masked[slot] = False
        self._to_end[slot] = max(0, params.min_tokens - generated)
        self._wants[slot] = params.logprobs >= 0
        self._put(self._params[slot], self._words(admit, int(self._flags[slot]), len(ends)))
        if params.logit_bias:
            self._put(self._bias_ids[slot], np.array([token for token, _ in params.logit_bias], np.int32))
            self._put(self._bias[slot], np.array([addend for _, addend in params.logit_bias], np.float32))
        if ends:
            self._put(self._ends[slot], np.array(ends, np.int32))
        if penalised:
            self._put(self._seen[slot], self._count(admit))

    def release(self, slot: int) -> None:
        self._greedy[slot] = True
        self._edited[slot] = self._masked[slot] = self._wants[slot] = False
        self._to_end[slot] = 0

    def allow(self, slot: int, words: np.ndarray | None) -> None:
        """From the next `sample` on, only ids whose bit is set may come from this slot; uint32 [ceil(vocab / 32)]; None: all.

        Bit i of word w is id 32 w + i. `admit` allows all.
        """
        if words is not None:
            if words.shape != (-(-self._vocab // 32),) or words.dtype != np.uint32:
                raise ValueError(f"a mask is {words.dtype} {words.shape}, not uint32 {(-(-self._vocab // 32),)}")
            if self._mask is None:  # a server without grammars does not pay for them
                shape = (self._slots + 1, len(words))
                self._mask = torch.zeros(shape, dtype=torch.int32, device=self._device.torch_device)
            self._put(self._mask[slot], words.view(np.int32))
        self._masked[slot] = words is not None
        flags = self._flags[slot] if words is None else self._flags[slot] | kernels.MASKED | kernels.EDITED
        self._put(self._params[slot], np.array([flags], np.int32))

    def _check_room(self, params: SamplingParams, ends: Sequence[int]) -> None:
        for name, asked, room in (
            ("logit_bias", len(params.logit_bias), self._bias.shape[1]),
            ("stop_token_ids", len(ends), self._ends.shape[1]),
            ("logprobs", params.logprobs, self._max_top),
        ):
            if asked > room:
                raise BadParameter(name, f"{name} asks for {asked} ids, but this engine was made for {room}.")

    def _words(self, admit: Admit, flags: int, num_ends: int) -> np.ndarray:
        params = admit.params
        words = np.zeros(kernels.WORDS, np.int32)
        words[kernels.FLAGS] = flags
        words[kernels.POSITION] = len(admit.token_ids)
        words[kernels.GENERATED] = len(admit.token_ids) - admit.num_prompt
        words[kernels.MIN_TOKENS] = params.min_tokens
        words[kernels.TOP_K] = params.top_k if params.top_k < self._vocab else 0
        words[kernels.NUM_BIAS], words[kernels.NUM_ENDS] = len(params.logit_bias), num_ends
        words[kernels.LOGPROBS] = min(params.logprobs, self._vocab)
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
        sample_slots int32 [S or more] says on the card. Each id is written to its sequence's next place in ids int32 [slots + 1, ..].

        -> what gives (ids, ((index, logprobs), ..)), to be called when the step has ended. A row holding NaN or +inf, or nothing above
        -inf after its edits, gives BAD_LOGITS; ids get 0 there.
        """
        rows = len(slots)
        if logits.shape[1] != self._vocab or logits.dtype != torch.float32 or logits.stride(1) != 1 or not 1 <= rows <= len(logits):
            raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, not float32 [{rows}, {self._vocab}]")
        chosen = np.asarray(slots, np.int64)
        edits = bool((self._edited[chosen] | self._masked[chosen] | (self._to_end[chosen] > 0)).any())
        self._launch_scan(logits, sample_slots, rows, edits, ids)
        if not self._greedy[chosen].all():
            self._launch_draw(logits, sample_slots, rows, ids)
        self._to_end[chosen] = np.maximum(self._to_end[chosen] - 1, 0)
        host_ids = self._host_ids[self._step % RING][:rows]
        self._step += 1
        host_ids.copy_(self._out[:rows], non_blocking=True)
        asked = [row for row in range(rows) if self._wants[slots[row]]]
        if not asked:
            return lambda: (tuple(host_ids.tolist()), ())
        answer = self._launch_logprobs(logits, sample_slots, rows, edits)
        return lambda: self._collect(host_ids, answer, asked)

    def _launch_scan(self, logits: torch.Tensor, sample_slots: torch.Tensor, rows: int, edits: bool, ids: torch.Tensor) -> None:
        splits, share = self._split(rows, SCAN_THREADS)
        self._library[self._edit_scan if edits else self._scan](
            (splits, rows, 1), logits, logits.stride(0), sample_slots, self._slots, share, self._params, self._bias_ids, self._bias,
            self._bias.shape[1], self._ends, self._ends.shape[1], self._seen, self._mask, self._raw, self._partial, self._arrivals,
            self._tops, self._best, ids, ids.stride(0), self._out,
        )  # fmt: skip

    def _launch_draw(self, logits: torch.Tensor, sample_slots: torch.Tensor, rows: int, ids: torch.Tensor) -> None:
        splits, share = self._split(rows, DRAW_THREADS)
        self._library[self._draw](
            (splits, rows, 1), logits, logits.stride(0), sample_slots, self._slots, share, self._params, self._seen, self._arrivals,
            self._tops, self._sums, self._best, ids, ids.stride(0), self._out,
        )  # fmt: skip

    def _launch_logprobs(self, logits: torch.Tensor, sample_slots: torch.Tensor, rows: int, edits: bool) -> torch.Tensor:
        self._library[self._logprobs](
            (1, rows, 1), logits, logits.stride(0), self._raw, int(edits), sample_slots, self._params, self._out, self._answer
        )
        answer = self._device.pinned((rows, self._answer.shape[1]), torch.int32)
        answer.copy_(self._answer[:rows], non_blocking=True)
        return answer

    def _split(self, rows: int, threads: int) -> tuple[int, int]:
        """(thread blocks of a row, parts of each): as many as fill the card, each with work for its warps."""
        most = -(-self._parts // (threads // 32))
        splits = min(max(1, -(-self._blocks // rows)), most)
        share = -(-self._parts // splits)
        return -(-self._parts // share), share

    def _collect(self, host_ids: torch.Tensor, answer: torch.Tensor, asked: Sequence[int]) -> Collected:
        ids = tuple(host_ids.tolist())
        words = answer.numpy()
        return ids, tuple((row, read_logprobs(words[row], self._max_top)) for row in asked if ids[row] >= 0)


def read_logprobs(words: np.ndarray, max_top: int) -> Logprobs:
    """One row of the logprobs kernel's answer, int32, as the value that a step's result holds."""
    floats = words.view(np.float32)
    (total,) = words[kernels.TOTAL : kernels.TOTAL + 2].copy().view(np.int64)
    base = float(floats[kernels.HIGHEST]) + (math.log(float(total)) - WEIGHT_BITS * math.log(2.0))
    n, first = int(words[kernels.TOP_COUNT]), kernels.ANSWER_WORDS
    top_ids = tuple(words[first : first + n].tolist())
    top = tuple(value - base for value in floats[first + max_top : first + max_top + n].tolist())
    return Logprobs(float(floats[kernels.OWN]) - base, int(words[kernels.RANK]), top_ids, top)
