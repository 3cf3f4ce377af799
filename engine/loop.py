"""The engine as the server sees it: ids go in through `submit`, `TokenEvent`s come out of a `Generation`.

One asyncio task plans, sends, receives, applies and delivers. Step N+1 is planned and sent before the result of
step N is awaited. Delivery never blocks (unbounded per-sequence queue, no await); death is loud: whatever ends the
task is given to every waiter and every later caller, and `wait_dead` returns it so that the process can exit.
Knows no strings and no HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from config.qos import read_qos
from config.schema import Config
from engine.admission import Admission
from engine.cache.manager import CacheManager
from engine.cache.sessions import LeaseLimits
from engine.errors import BadParameter, ContextLengthExceeded, EngineDead, EngineDraining, EngineNotReady
from engine.executor import Executor
from engine.load_backend import resolved
from engine.models.spec import ModelSpec
from engine.qos import Qos
from engine.scheduler import Scheduler
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.step import StepPlan, StepResult, TokenEvent

STEPS_IN_FLIGHT = 2  # the one that computes and the one that waits behind it
EXIT_ENGINE_DIED, EXIT_WATCHDOG = 5, 6


class EngineStatus(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step was, for the trace line and the metrics; the seeds' names."""

    step: int
    dc_bsz: int  # decode rows
    pf_bsz: int  # rows of prompt parts
    n_tok: int
    max_q: int  # longest row
    max_k: int  # longest context
    elapsed_us: int


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    num_running: int
    num_waiting: int
    waiting_tokens: int
    num_blocks: int
    free: int
    active: int
    cached: int
    prefix_queries: int  # prompt tokens looked up
    prefix_hits: int  # of these, found
    preemptions: int
    steps: int
    last_progress_s: float  # monotonic time of the last result, or of the last idle moment
    leases: int = 0  # that hold K/V
    pinned: int = 0  # blocks that they pin
    leases_broken: int = 0  # because memory was short


class Generation:
    """The receiving end of one sequence. One consumer; `next` may return several events to one that is behind."""

    __slots__ = ("_dead", "_engine", "_events", "_waiter", "sequence")

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self.sequence = sequence
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._dead: EngineDead | None = None

    @property
    def sequence_id(self) -> int:
        return self.sequence.id

    @property
    def num_prompt(self) -> int:
        return self.sequence.num_prompt

    @property
    def num_cached(self) -> int:
        return self.sequence.num_cached

    async def next(self) -> list[TokenEvent]:
        """At least one event; raises `EngineDead` once all events before the death were taken."""
        if not self._events:
            if self._dead is not None:
                raise self._dead
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if not self._events:
                raise self._dead or EngineDead("The engine stopped.")
        events, self._events = self._events, []
        return events

    def abort(self) -> None:
        """Idempotent: a finished sequence is left alone."""
        self._engine.abort(self.sequence.id)

    def _push(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def _kill(self, error: EngineDead) -> None:
        self._dead = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Engine:
    """Built by `engine.build.build_engine`; `start` before anything else."""

    def __init__(self, config: Config, spec: ModelSpec, session_len: int, executor: Executor) -> None:
        self.config = resolved(config)
        self.spec = spec
        self.session_len = session_len
        self.status = EngineStatus.STARTING
        self.reason = "loading the model"
        self.observers: list[Callable[[StepRecord], None]] = []
        self.scheduler: Scheduler
        self.manager: CacheManager
        self._admission: Admission
        self._executor = executor
        self._generations: dict[int, Generation] = {}
        self._next_id = 0
        self._steps = 0
        self._in_flight: deque[StepPlan] = deque()
        self._last_progress_s = time.monotonic()
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._dead: asyncio.Future[EngineDead] | None = None
        self._eos = frozenset(spec.eos_token_ids)
        qos = read_qos(config.admission.qos_config_path) if config.admission.qos_config_path else None
        self._qos = Qos(qos) if qos is not None else None

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load, warm up, and begin to serve; returns when a first token can be served, or raises `EngineError`."""
        self._dead = asyncio.get_running_loop().create_future()
        self.reason = "warming up"
        self._executor.on_error = self._wakeup.set
        num_blocks = await self._executor.start()
        cache, knobs = self.config.cache, self.config.engine
        # the last id of a sequence is never computed; a longer one than the pool holds could never finish
        self.session_len = min(self.session_len, num_blocks * cache.cache_block_seq_len + 1)
        kept = self.config.sessions
        self.manager = CacheManager(
            num_blocks,
            cache.cache_block_seq_len,
            enable_prefix_caching=cache.enable_prefix_caching,
            limits=LeaseLimits(kept.max_sessions, kept.lease_s, kept.max_pool_share),
        )
        self.scheduler = Scheduler(
            self.manager,
            max_batch_size=knobs.max_batch_size,
            max_step_tokens=knobs.max_prefill_token_num,
            session_len=self.session_len,
            max_queue_age_s=self.config.admission.max_queue_age_s,
        )
        self._admission = Admission(self.config.admission, num_blocks * cache.cache_block_seq_len)
        self._last_progress_s = time.monotonic()
        self._task = asyncio.create_task(self._run(), name="engine-loop")
        self.status, self.reason = EngineStatus.READY, ""

    def drain(self) -> None:
        """Refuse new sequences; running and waiting ones finish."""
        if self.status is not EngineStatus.DEAD:
            self.status, self.reason = EngineStatus.DRAINING, "shutting down"

    async def idle(self) -> None:
        """Returns when no sequence is waiting or running."""
        await self._idle.wait()

    async def stop(self) -> None:
        """End the loop and the executor; waiters get `EngineDead`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._executor.close()
        self._die(EngineDead("The server is shutting down."), 0)

    async def wait_dead(self) -> EngineDead:
        """Returns when the engine died, with the error (`exit_code` says how the process should end)."""
        if self._dead is None:
            raise EngineNotReady("The engine was not started.")
        return await asyncio.shield(self._dead)

    # -- requests -----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        key: str = "",
        deadline_s: float = math.inf,
        session: str = "",
        user_id: str = "",
    ) -> Generation:
        """Queue a sequence. `key` counts against `admission.max_requests_per_key`; `deadline_s` is monotonic time.

        `session`: the K/V of prompt and answer is leased under this name, and taken from there. `user_id`: whose place
        in line it takes, where there is QoS; `priority` must be 0 then.

        Raises BadParameter, ContextLengthExceeded, QueueFull, EngineDraining, EngineNotReady or EngineDead.
        """
        self._check_status()
        self._check_prompt(prompt_ids, params)
        if self._qos is not None and priority:
            raise BadParameter("priority", "The user's group decides who goes first (admission.qos_config_path); leave priority out.")
        self._admission.check(len(prompt_ids), key, self.scheduler.waiting)
        self._next_id += 1
        place = self._qos.place(user_id, len(prompt_ids), params.max_tokens) if self._qos is not None else None
        sequence = Sequence(
            id=self._next_id,
            token_ids=list(prompt_ids),
            num_prompt=len(prompt_ids),
            params=params,
            eos_token_ids=self._eos,
            priority=priority,
            group=place.group if place is not None else 0,
            turn=place.turn if place is not None else 0.0,
            arrival_s=time.monotonic(),
            deadline_s=deadline_s,
            salt=salt,
        )
        self.scheduler.add(sequence)
        if session:
            sequence.lease = self.manager.leases.open(session, salt, sequence.arrival_s)
        if self._qos is not None and place is not None:
            self._qos.waits(sequence, place)
        self._admission.admitted(sequence, key)
        generation = Generation(self, sequence)
        self._generations[sequence.id] = generation
        self._idle.clear()
        self._wakeup.set()
        return generation

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence now (STOP: the API saw a stop string); unknown and finished ones are left alone."""
        if sequence_id in self._generations and self.status is not EngineStatus.DEAD:
            event = self.scheduler.abort(sequence_id, reason)
            self._admission.queue_changed()
            if event is not None:
                self._deliver([event])
            self._wakeup.set()

    def snapshot(self) -> EngineSnapshot:
        """Counts for /metrics, /health and the throughput line."""
        if self._task is None:
            return EngineSnapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, self._last_progress_s)
        scheduler, manager = self.scheduler, self.manager
        manager.leases.expire(now := time.monotonic())
        if not scheduler.has_work:
            self._last_progress_s = now
        return EngineSnapshot(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_tokens=self._admission.waiting_tokens(scheduler.waiting),
            num_blocks=manager.num_blocks,
            free=manager.num_free,
            active=manager.num_active,
            cached=manager.num_cached,
            prefix_queries=manager.prefix_queries,
            prefix_hits=manager.prefix_hits,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            last_progress_s=self._last_progress_s,
            leases=manager.leases.num_pinned,
            pinned=manager.num_pinned,
            leases_broken=manager.leases.num_broken,
        )

    def _check_status(self) -> None:
        if self.status is EngineStatus.DEAD:
            raise EngineDead(f"The engine stopped: {self.reason}")
        if self.status is EngineStatus.DRAINING:
            raise EngineDraining("The server is shutting down; try another replica.")
        if self.status is EngineStatus.STARTING:
            raise EngineNotReady(f"The server is not ready: {self.reason}.")

    def _check_prompt(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise BadParameter("prompt", "The prompt is empty; give at least 1 token.")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self.spec.vocab_size:
            raise BadParameter("prompt", f"The prompt holds an id outside 0..{self.spec.vocab_size - 1}.")
        if len(prompt_ids) + params.max_tokens > self.session_len:
            raise ContextLengthExceeded(
                "max_tokens",
                f"The prompt has {len(prompt_ids)} tokens and max_tokens asks for {params.max_tokens} more, "
                f"but a sequence holds at most {self.session_len}; shorten one of them.",
            )
        params.check_vocabulary(self.spec.vocab_size)

    # -- the loop -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            message = f"a step took longer than engine.step_timeout_s = {self.config.engine.step_timeout_s:g} s"
            self._die(EngineDead(f"The engine hangs: {message}."), EXIT_WATCHDOG)
        except EngineDead as error:
            self._die(error, EXIT_ENGINE_DIED)
        except Exception as error:  # whatever ends the loop ends the engine, loudly
            dead = EngineDead(f"The engine failed: {type(error).__name__}.")
            dead.__cause__ = error
            self._die(dead, EXIT_ENGINE_DIED)

    async def _turn(self) -> None:
        """One round: plan and send while there is room in flight, then take one result."""
        if self._executor.error is not None:
            raise self._executor.error
        now = time.monotonic()
        self._admission.queue_changed()
        self._deliver(self.scheduler.expire(now))
        while len(self._in_flight) < STEPS_IN_FLIGHT and (plan := self.scheduler.plan(now)) is not None:
            self._executor.send(plan)
            self._in_flight.append(plan)
        if not self._in_flight:
            await self._sleep()
            return
        async with asyncio.timeout(self.config.engine.step_timeout_s):
            result = await self._executor.recv()
        plan = self._in_flight.popleft()
        self._steps += 1
        self._last_progress_s = now = time.monotonic()
        self._deliver(self.scheduler.apply(result, now))
        self._observe(plan, result)

    async def _sleep(self) -> None:
        """Nothing to compute: wait for a submit or abort, but look at deadlines twice a second while any sequence is there."""
        self._wakeup.clear()
        if self._executor.error is not None:
            return
        try:
            async with asyncio.timeout(0.5 if self._generations else None):
                await self._wakeup.wait()
        except TimeoutError:
            return
        finally:
            self._last_progress_s = time.monotonic()

    def _deliver(self, events: list[TokenEvent]) -> None:
        generations = self._generations
        for event in events:
            generation = generations.get(event.sequence_id)
            if generation is None:
                continue
            if event.finish_reason is not None:
                self._forget(generation.sequence)
            generation._push(event)

    def _forget(self, sequence: Sequence) -> None:
        del self._generations[sequence.id]
        self._admission.finished(sequence.id)
        if self._qos is not None:
            self._qos.finished(sequence)
        if not self._generations:
            self._idle.set()

    def _observe(self, plan: StepPlan, result: StepResult) -> None:
        if not self.observers or not plan.slots:
            return
        decodes = sum(1 for count, sampled in zip(plan.counts, plan.samples, strict=True) if count == 1 and sampled)
        contexts = map(int.__add__, plan.starts, plan.counts)
        record = StepRecord(
            plan.step, decodes, len(plan.slots) - decodes, plan.num_tokens, max(plan.counts), max(contexts), result.elapsed_us
        )
        for observer in self.observers:
            observer(record)

    def _die(self, error: EngineDead, exit_code: int) -> None:
        if self.status is EngineStatus.DEAD:
            return
        error.exit_code = exit_code
        self.status, self.reason = EngineStatus.DEAD, str(error)
        for generation in list(self._generations.values()):
            generation._kill(error)
        self._generations.clear()
        self._idle.set()
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(error)

    def check_integrity(self) -> None:
        """Every block in exactly one state, every count equal to what tables say (our own invariant)."""
        self.scheduler.check_integrity()
