"""plan -> card -> decoder -> sampler -> ids, without ever waiting: what a rank does with each `StepPlan` on a card.

`launch` queues a whole step on the card's stream and returns at once; the sampled ids are written on the card where the
next step reads them, and come back to the host through pinned memory. So a plan that is queued behind another costs the
card no pause. Decode steps replay a captured graph (`graphs.py`), others run operation by operation. Every rank samples the
same logits by the same arithmetic, so that no ids are exchanged.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.schema import Config
from engine.batch import Scored
from engine.cache.layout import KVLayout
from engine.cuda.backend import CudaBackend
from engine.cuda.graphs import DecodeGraphs
from engine.cuda.sampling import GpuSampler
from engine.cuda.state import State
from engine.cuda.step import Shape, Step, Tiles, fill, views
from engine.errors import DeviceError
from engine.load_backend import computing_dtype
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.parallel import Ranks
from engine.plan import kv_blocks, kv_layout
from engine.plan_cuda import GRAPHS_BYTES, state_bytes
from engine.sequence import SamplingParams
from engine.step import MAX_SCORED, Admit, StepPlan, StepResult
from engine.weights import open_checkpoint

RING = 4  # host buffers of steps that may be in flight: more than the loop ever has


class CudaRunner:
    """One rank on one card. Construction loads, allocates, compiles, captures and warms up."""

    def __init__(self, config: Config, spec: ModelSpec, session_len: int, ranks: Ranks, device: Any) -> None:
        self._config, self._spec, self._ranks, self._device = config, spec, ranks, device
        knobs, cache = config.engine, config.cache
        self._free_at_start = device.memory()[0]
        dtype = computing_dtype(config, "cuda", spec.dtype, device.cc)
        self._backend = CudaBackend(config, spec, dtype, ranks, device)
        checkpoint = open_checkpoint(Path(config.model.path), spec, views=True)
        few_bits = config.cache.quant_policy != 0
        self._decoder = Decoder(spec, checkpoint, self._backend, ranks, session_len=session_len, exact=False, few_bits=few_bits)
        self._backend.finish_loading()
        checkpoint.finish()
        layout = kv_layout(config, spec, self._decoder.shard.num_kv_heads, dtype)
        self._sampler = GpuSampler(self._backend.library, device, knobs.max_batch_size, spec.vocab_size)
        self.num_blocks = ranks.smallest(self._affordable_blocks(layout, session_len))
        self._state = State(device, knobs.max_batch_size, session_len, cache.cache_block_seq_len, trash=self.num_blocks)
        self._kv = self._backend.make_kv(layout, self.num_blocks)
        self._backend.attach(self._state)
        largest = self._largest_shape().size
        self._inputs = torch.empty(largest, dtype=torch.int32, device=device.torch_device)
        self._staged = [device.pinned((largest,), torch.int32) for _ in range(RING)]
        self._step = 0
        self._finished_s = 0.0
        self._graphs = DecodeGraphs(device, knobs.max_batch_size)
        self._warm_up(session_len)

    def step(self, plan: StepPlan) -> StepResult:
        return self.launch(plan)()

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        started = time.perf_counter()
        for slot in plan.releases:
            self._state.release(slot)
            self._sampler.release(slot)
        for admit in plan.admits:
            self._state.admit(admit)
            self._sampler.admit(admit)
        updates = self._state.updates(plan)
        if not plan.slots:
            return lambda: StepResult(plan.step)
        scored = self._state.scores.scored(plan)
        logits, step = self._forward(plan, updates, scored)
        slots = [slot for slot, sampled in zip(plan.slots, plan.samples, strict=True) if sampled]
        ids = scores = None
        if logits is not None and len(scored):  # first: sampling changes its own rows only
            scores = self._sampler.score(logits[len(slots) :], scored)
        if slots:
            ids = self._sampler.sample(logits, step.sample_slots, slots, self._state.ids)
        done = self._device.event()
        return lambda: self._collect(plan.step, ids, scores, done, started)

    def close(self) -> None:
        self._device.synchronize()

    # -- a step ---------------------------------------------------------------------------------------------------------

    def _forward(self, plan: StepPlan, updates: np.ndarray, scored: Scored) -> tuple[torch.Tensor | None, Step]:
        rows, decode = len(plan.slots), _num_decode(plan)
        graph = self._graphs.find(rows, len(updates)) if decode == rows else None
        tiles = Tiles() if graph is not None else self._backend.tiles(plan, decode)
        if graph is not None:
            shape, inputs = graph.shape, graph.inputs
        else:
            shape = Shape(plan.num_tokens, rows, sum(plan.samples) + len(scored), len(updates), len(tiles.pieces))
            inputs = self._inputs[: shape.size]
        staged = self._staged[self._step % RING]
        self._step += 1
        fill(staged.numpy(), shape, plan, updates, self._state.dummy, self._state.trash, tiles.pieces, scored.tokens)
        inputs.copy_(staged[: shape.size], non_blocking=True)
        step = views(inputs, shape, shape.rows if graph is not None else decode, tiles)
        if graph is not None:
            graph.replay()
            return graph.logits[:rows], step
        return self._decoder.forward(step, self._kv), step

    def _collect(self, number: int, sampled: Any, scores: Any, done: Any, started: float) -> StepResult:
        """Waits for the card. Called in the order of `launch`, in another thread than `launch` may be."""
        done.synchronize()
        ended = time.perf_counter()
        elapsed = ended - max(started, self._finished_s)  # a step that waited behind another is not charged for it
        self._finished_s = ended
        ids, logprobs = ((), ()) if sampled is None else sampled()
        prompt = () if scores is None else tuple(scores())
        if self._config.engine.check_ranks:
            self._ranks.check_same(zlib.crc32(np.array(ids, np.int32).tobytes()), number)
        return StepResult(number, ids, logprobs, int(elapsed * 1e6), prompt)

    # -- start ----------------------------------------------------------------------------------------------------------

    def _affordable_blocks(self, layout: KVLayout, session_len: int) -> int:
        """KV blocks, beside one that padding writes to."""
        knobs = self._config.engine
        self._device.give_back()
        free = self._device.memory()[0]
        if knobs.device_memory_gib:  # of what this process may use, what it has not used yet
            free = min(free, int(knobs.device_memory_gib * 2**30) - (self._free_at_start - free))
        free -= state_bytes(knobs.max_batch_size, session_len, layout.block_seq_len) + GRAPHS_BYTES + layout.block_bytes
        blocks = kv_blocks(self._config, layout, session_len, free)
        if blocks < 1 or blocks * layout.block_bytes > free:
            raise DeviceError(
                f"A KV block is {layout.block_bytes / 2**20:.3f} MiB and {free / 2**20:.1f} MiB of the card are free: no room for "
                f"{max(blocks, 1)}; raise cache.cache_max_entry_count, lower cache.num_blocks, or see --plan."
            )
        return blocks

    def _largest_shape(self) -> Shape:
        knobs = self._config.engine
        tokens, rows = max(knobs.max_prefill_token_num, knobs.max_batch_size), knobs.max_batch_size
        return Shape(
            tokens, rows, rows + MAX_SCORED, tokens // self._config.cache.cache_block_seq_len + rows, self._backend.most_tiles(tokens, rows)
        )

    def _warm_up(self, session_len: int) -> None:
        """Load kernels, run the largest prompt part and a decode step, capture the graphs: no request waits for any of it."""
        for others in (False, True):  # rank 0 first: the others find in the disk cache what it compiled
            if others == (self._ranks.rank > 0):
                self._backend.load_kernels(self._sampler.variants)
            self._ranks.smallest(0)
        self._backend.warm_up()
        room = min(session_len, self.num_blocks * self._config.cache.cache_block_seq_len)
        tokens = max(1, min(self._config.engine.max_prefill_token_num, room - 1))
        blocks = tuple(range(-(-min(tokens + 1, room) // self._config.cache.cache_block_seq_len)))
        admit = Admit(0, (0,) * tokens, tokens, blocks, SamplingParams(max_tokens=2, temperature=1.0, top_k=2, top_p=0.9, logprobs=1))
        self.step(StepPlan(0, admits=(admit,), slots=(0,), starts=(0,), counts=(tokens,), samples=(1,)))
        self._graphs.capture(lambda step: self._decoder.forward(step, self._kv), self._fill_padding)
        if tokens < room:
            self.step(StepPlan(1, slots=(0,), starts=(tokens,), counts=(1,), samples=(1,)))
        self.step(StepPlan(2, releases=(0,)))

    def _fill_padding(self, inputs: torch.Tensor, shape: Shape) -> None:
        host = np.empty(shape.size, np.int32)
        fill(host, shape, StepPlan(0), np.empty((0, 3), np.int32), self._state.dummy, self._state.trash)
        inputs.copy_(torch.from_numpy(host))


def _num_decode(plan: StepPlan) -> int:
    """Rows 0 .. n - 1 have one token each and are sampled."""
    for row, (count, sampled) in enumerate(zip(plan.counts, plan.samples, strict=True)):
        if count != 1 or not sampled:
            return row
    return len(plan.counts)
