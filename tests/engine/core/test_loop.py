"""The engine loop with a runner that does as it is told: delivery, refusal, drain, and every way to die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from engine.build import mock_spec
from engine.errors import BadParameter, ContextLengthExceeded, EngineDead, EngineDraining, EngineNotReady, QueueFull
from engine.executor import ThreadExecutor
from engine.loop import EXIT_ENGINE_DIED, EXIT_WATCHDOG, Engine, EngineStatus
from engine.sequence import FinishReason, SamplingParams
from engine.step import StepPlan, StepResult
from tests.harness import collect, configure

SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


class CountingRunner:
    """Samples 100, 101, ... for every sampled row; `before` may block, fail or look at the plan."""

    num_blocks = 64

    def __init__(self, before: Callable[[StepPlan], None] = lambda plan: None) -> None:
        self.before = before
        self.sampled = 99

    def close(self) -> None:
        """Nothing to end."""

    def step(self, plan: StepPlan) -> StepResult:
        self.before(plan)
        ids = []
        for _ in range(sum(plan.samples)):
            self.sampled += 1
            ids.append(self.sampled % 200)
        return StepResult(plan.step, tuple(ids), (), 7)


def make(runner: CountingRunner, **sections: dict) -> Engine:
    config = configure(engine={"device": "mock", "step_timeout_s": 0.5} | sections.pop("engine", {}), **sections)
    return Engine(config, mock_spec(), 512, ThreadExecutor(lambda: runner))


async def started(runner: CountingRunner, **sections: dict) -> Engine:
    engine = make(runner, **sections)
    await engine.start()
    return engine


def test_events_come_in_order_and_exactly_one_is_terminal() -> None:
    async def main() -> None:
        engine = await started(CountingRunner())
        events = await collect(engine.submit([1, 2, 3], SHORT))
        assert [e.token_id for e in events] == [100, 101, 102, 103, 104]
        assert [e.finish_reason for e in events] == [None] * 4 + [FinishReason.LENGTH]
        await asyncio.wait_for(engine.idle(), 1)
        engine.check_integrity()
        await engine.stop()

    asyncio.run(main())


def test_a_step_is_sent_while_the_one_before_computes() -> None:
    """Plan N+1 leaves before result N is back: the runner's queue is never empty in steady decode."""
    gate, seen = threading.Semaphore(0), []

    def before(plan: StepPlan) -> None:
        seen.append(plan.step)
        gate.acquire()

    async def main() -> None:
        runner = CountingRunner(before)
        engine = await started(runner, engine={"step_timeout_s": 10.0})
        generation = engine.submit([1], SHORT)
        while len(engine._in_flight) < 2:
            await asyncio.sleep(0.001)
        assert len(seen) == 1
        for _ in range(16):
            gate.release()
        assert len(await collect(generation)) == 5
        for _ in range(16):
            gate.release()
        await engine.stop()

    asyncio.run(main())


def test_refusals_name_the_field_and_a_number() -> None:
    async def main() -> None:
        engine = make(CountingRunner(), admission={"max_requests": 2, "max_requests_per_key": 1})
        with pytest.raises(EngineNotReady, match="not ready"):
            engine.submit([1], SHORT)
        await engine.start()
        with pytest.raises(BadParameter, match="at least 1"):
            engine.submit([], SHORT)
        for bad in ([-1], [260], [1, 1 << 31]):
            with pytest.raises(BadParameter, match=r"0\.\.259"):
                engine.submit(bad, SHORT)
        with pytest.raises(ContextLengthExceeded, match="512"):
            engine.submit([1] * 510, SHORT)
        with pytest.raises(BadParameter, match="260"):
            engine.submit([1], SamplingParams(max_tokens=1, stop_token_ids=(260,)))
        slow = SamplingParams(max_tokens=400, ignore_eos=True)
        first = engine.submit([1], slow, key="a")
        with pytest.raises(QueueFull) as per_key:
            engine.submit([1], slow, key="a")
        assert per_key.value.per_key and per_key.value.retry_after_s >= 1
        engine.submit([1], slow, key="b")
        with pytest.raises(QueueFull) as full:
            engine.submit([1], slow, key="c")
        assert not full.value.per_key
        first.abort()
        first.abort()
        assert (await collect(first))[-1].finish_reason is FinishReason.ABORT
        engine.drain()
        with pytest.raises(EngineDraining):
            engine.submit([1], SHORT)
        await engine.stop()

    asyncio.run(main())


def test_a_runner_that_fails_is_given_to_every_waiter() -> None:
    def before(plan: StepPlan) -> None:
        if plan.step > 3:
            raise RuntimeError("a kernel failed")

    async def main() -> None:
        engine = await started(CountingRunner(before))
        slow = SamplingParams(max_tokens=400, ignore_eos=True)
        waiters = [asyncio.create_task(collect(engine.submit([1], slow))) for _ in range(3)]
        dead = await asyncio.wait_for(engine.wait_dead(), 5)
        assert dead.exit_code == EXIT_ENGINE_DIED
        assert isinstance(dead.__cause__, RuntimeError)
        for result in await asyncio.gather(*waiters, return_exceptions=True):
            assert isinstance(result, EngineDead)
        with pytest.raises(EngineDead):
            engine.submit([1], SHORT)
        assert engine.status is EngineStatus.DEAD
        await engine.stop()

    asyncio.run(main())


def test_a_hung_step_is_noticed_by_the_watchdog() -> None:
    release = threading.Event()

    async def main() -> None:
        engine = await started(CountingRunner(lambda plan: (release.wait(), None)[1]))
        waiter = asyncio.create_task(collect(engine.submit([1], SHORT)))
        dead = await asyncio.wait_for(engine.wait_dead(), 5)
        assert dead.exit_code == EXIT_WATCHDOG
        assert "0.5 s" in str(dead)
        assert isinstance((await asyncio.gather(waiter, return_exceptions=True))[0], EngineDead)
        release.set()
        await engine.stop()

    asyncio.run(main())


def test_a_consumer_that_never_reads_blocks_nobody() -> None:
    async def main() -> None:
        engine = await started(CountingRunner())
        engine.submit([1], SamplingParams(max_tokens=400, ignore_eos=True))
        events = await asyncio.wait_for(collect(engine.submit([1], SHORT)), 5)
        assert len(events) == 5
        await engine.stop()

    asyncio.run(main())


def test_a_deadline_ends_a_waiting_and_a_running_sequence() -> None:
    import time

    async def main() -> None:
        engine = await started(CountingRunner(lambda plan: time.sleep(0.01)))
        slow = SamplingParams(max_tokens=400, ignore_eos=True)
        events = await asyncio.wait_for(collect(engine.submit([1], slow, deadline_s=time.monotonic() + 0.1)), 5)
        assert events[-1].finish_reason is FinishReason.ABORT
        assert 1 < len(events) < 100
        await engine.stop()

    asyncio.run(main())


def test_waiting_tokens_are_bounded_and_counted_once() -> None:
    release = threading.Event()

    async def main() -> None:
        runner = CountingRunner(lambda plan: (release.wait(), None)[1])
        engine = await started(runner, engine={"max_batch_size": 1, "step_timeout_s": 20.0}, admission={"max_queue_tokens": 25})
        generations = [engine.submit([1] * 10, SHORT)]
        while not engine.snapshot().num_running:
            await asyncio.sleep(0.001)
        generations += [engine.submit([1] * 10, SHORT) for _ in range(2)]
        assert engine.snapshot().waiting_tokens == 20
        with pytest.raises(QueueFull, match="20 prompt tokens already wait, the bound is 25"):
            engine.submit([1] * 10, SHORT)
        generations.append(engine.submit([1] * 5, SHORT))
        generations[1].abort()
        assert engine.snapshot().waiting_tokens == 15
        release.set()
        for generation in (generations[0], *generations[2:]):
            assert len(await collect(generation)) == 5
        assert engine.snapshot().waiting_tokens == 0
        await engine.stop()

    asyncio.run(main())
