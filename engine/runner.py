"""plan -> batch -> backend -> decoder -> logits -> sampler: what a rank does with each `StepPlan`.

Owns the tensors: weights, KV pool, the persistent batch's slots and sampling state. Order of effects in a step:
releases, admits and new blocks of the plan, forward, sample, then the sampled ids are written into their slots, where
the next plan (already queued) finds them.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config.schema import Config
from engine.batch import Batch, Scored, Slots
from engine.cache.layout import KVLayout
from engine.errors import DeviceError
from engine.host import free_bytes
from engine.load_backend import computing_dtype, load_backend, resolve_device
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.parallel import Ranks
from engine.plan import kv_blocks, kv_layout
from engine.sampler import Sampler
from engine.sequence import SamplingParams
from engine.step import Admit, Logprobs, StepPlan, StepResult
from engine.weights import open_checkpoint


class Runner:
    """One rank. Construction loads, allocates and warms up; then `step` is called with each plan, in order."""

    def __init__(self, config: Config, spec: ModelSpec, session_len: int, ranks: Ranks) -> None:
        self._ranks = ranks
        self._check_ranks = config.engine.check_ranks
        device = resolve_device(config)
        dtype = computing_dtype(config, device)
        self._backend = load_backend(config, spec, device, dtype)
        checkpoint = open_checkpoint(Path(config.model.path), spec)
        exact = dtype == "float32"
        few_bits = config.cache.quant_policy != 0
        self._decoder = Decoder(spec, checkpoint, self._backend, ranks, session_len=session_len, exact=exact, few_bits=few_bits)
        checkpoint.finish()
        cache = config.cache
        layout = kv_layout(config, spec, self._decoder.shard.num_kv_heads, dtype)
        self.num_blocks = ranks.smallest(self._affordable_blocks(config, layout, session_len))
        self._kv = self._backend.make_kv(layout, self.num_blocks)
        max_batch_size = config.engine.max_batch_size
        self._slots = Slots(max_batch_size, session_len, cache.cache_block_seq_len)
        self._sampler = Sampler(max_batch_size, session_len, spec.vocab_size)
        self._warm_up(session_len, config.engine.max_prefill_token_num)

    def step(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        self._slots.apply(plan)
        for slot in plan.releases:
            self._sampler.release(slot)
        for admit in plan.admits:
            self._sampler.admit(admit)
        if not plan.slots:
            return StepResult(plan.step)
        batch = self._slots.batch(plan)
        scored = self._slots.scored(plan)
        logits = self._decoder.forward(_with_scored(batch, scored), self._kv)
        ids: list[int] = []
        logprobs: list[tuple[int, Logprobs]] = []
        prompt: list[tuple[int, int, Logprobs]] = []
        if logits is not None:
            rows = self._backend.to_numpy(logits)
            sampled = len(batch.sampled_slots)
            if len(scored) and self._ranks.rank == 0:
                prompt = self._sampler.score(rows[sampled:], scored)
            if sampled:
                ids, logprobs = self._sample(rows[:sampled], batch.sampled_slots, plan.step)
        self._remember(plan, ids)
        elapsed_us = int((time.perf_counter() - started) * 1e6)
        return StepResult(plan.step, tuple(ids), tuple(logprobs), elapsed_us, tuple(prompt))

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.step(plan)
        return lambda: result

    def close(self) -> None:
        self._backend.close()

    def _sample(self, logits: np.ndarray, slots: tuple[int, ...], step: int) -> tuple[list[int], list]:
        """Rank 0 samples, the others are told."""
        if self._ranks.size == 1:
            return self._sampler.sample(logits, slots)
        if self._check_ranks:
            self._ranks.check_same(zlib.crc32(logits.tobytes()), step)
        ids, logprobs = np.zeros(len(slots), np.int64), []
        if self._ranks.rank == 0:
            sampled, logprobs = self._sampler.sample(logits, slots)
            ids[:] = sampled
        return self._ranks.from_rank0(ids).tolist(), logprobs

    def _remember(self, plan: StepPlan, ids: list[int]) -> None:
        """A sampled id is the slot's next one (bad logits end the sequence; any valid id may stand there)."""
        position = iter(ids)
        for slot, start, count, sampled in zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True):
            if sampled:
                self._slots.ids[slot, start + count] = max(next(position), 0)

    def _affordable_blocks(self, config: Config, layout: KVLayout, session_len: int) -> int:
        """KV blocks for this rank's part of what is free now that the weights are loaded."""
        free = free_bytes() // self._ranks.size
        blocks = kv_blocks(config, layout, session_len, free)
        if blocks < 1 or (config.cache.num_blocks and blocks * layout.block_bytes > free):
            raise DeviceError(
                f"A KV block is {layout.block_bytes / 2**20:.3f} MiB and {free / 2**20:.1f} MiB are free: no room for "
                f"{max(blocks, 1)}; raise cache.cache_max_entry_count, lower cache.num_blocks, or see --plan."
            )
        return blocks

    def _warm_up(self, session_len: int, max_step_tokens: int) -> None:
        """Run a prompt part and a decode step, so that no request waits for a compiler; within the pool and the rope tables."""
        room = min(session_len, self.num_blocks * self._slots.block_seq_len)
        tokens = max(1, min(32, max_step_tokens, room - 1))
        blocks = tuple(range(-(-min(tokens + 1, room) // self._slots.block_seq_len)))
        admit = Admit(0, (0,) * tokens, tokens, blocks, SamplingParams(max_tokens=2, temperature=1.0, top_k=2, top_p=0.9, logprobs=1))
        self.step(StepPlan(0, admits=(admit,), slots=(0,), starts=(0,), counts=(tokens,), samples=(1,)))
        if tokens < room:
            self.step(StepPlan(1, slots=(0,), starts=(tokens,), counts=(1,), samples=(1,)))
        self.step(StepPlan(2, releases=(0,)))


def _with_scored(batch: Batch, scored: Scored) -> Batch:
    """Logits of the scored tokens come after those of the sampled rows."""
    return dataclasses.replace(batch, sampled=np.concatenate([batch.sampled, scored.tokens])) if len(scored) else batch
