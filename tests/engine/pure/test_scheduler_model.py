"""The real scheduler with a fake runner: any order of events, and every sequence streams what it would stream alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.sessions import LeaseLimits
from engine.errors import EngineError
from engine.sequence import FinishReason, Sequence, Status
from engine.step import StepResult
from tests.engine.pure.world import World


class SchedulerModel(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 12),
        size=st.integers(1, 4),
        batch=st.integers(1, 4),
        budget=st.sampled_from((1, 2, 3, 7, 64)),
        session_len=st.sampled_from((9, 1 << 20)),
        caching=st.sampled_from((True, True, True, False)),
        encode=st.booleans(),
        limits=st.sampled_from((LeaseLimits(3, 30.0, 1.0), LeaseLimits(3, 30.0, 1.0), LeaseLimits(2, 5.0, 0.5))),
    )
    def start(self, num_blocks, size, batch, budget, session_len, caching, encode, limits) -> None:  # type: ignore[no-untyped-def]
        self.world = World(
            num_blocks, size, encode=encode, max_batch_size=batch, max_step_tokens=budget, session_len=session_len,
            caching=caching, max_queue_age_s=60.0, limits=limits,
        )  # fmt: skip
        self.last: dict[str, Sequence] = {}  # of each session
        self.capacity = min(num_blocks * size, session_len - 1)

    @rule(
        data=st.data(),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        seed=st.integers(0, 1),
        priority=st.sampled_from((0, 0, 0, 1, -1)),
        salt=st.sampled_from((b"", b"", b"a")),
        eos=st.sampled_from(((), (), (0,), (0, 1, 2, 3))),
        bad=st.sampled_from((-1, -1, -1, 0, 1)),
        n=st.sampled_from((1, 1, 2, 3)),
        patience=st.sampled_from((float("inf"), float("inf"), 12.0)),
    )
    def add(self, data, prompt, seed, priority, salt, eos, bad, n, patience) -> None:  # type: ignore[no-untyped-def]
        prompt = prompt[: self.capacity]
        max_tokens = data.draw(st.integers(1, self.capacity + 1 - len(prompt)))
        for _ in range(n):
            self.world.add(
                prompt, seed=seed, priority=priority, salt=salt, eos=eos, max_tokens=max_tokens,
                min_tokens=data.draw(st.integers(0, min(2, max_tokens))),
                bad_at=-1 if bad < 0 else len(prompt) + bad, stop_token_ids=data.draw(st.sampled_from(((), (4,)))),
                deadline_s=self.world.now + patience,
            )  # fmt: skip

    @rule(
        data=st.data(),
        session=st.sampled_from(("a", "b", "c", "d")),
        words=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        drop=st.sampled_from((0, 0, 0, 1, 3)),
        salt=st.sampled_from((b"", b"", b"", b"a")),
        bad=st.sampled_from((False, False, False, False, True)),
    )
    def turn_of_a_session(self, data, session, words, drop, salt, bad) -> None:  # type: ignore[no-untyped-def]
        """The history goes on, or (drop) branches off before its end; two turns of a session may run at a time."""
        history = self.last[session].token_ids if session in self.last else []
        prompt = (history[: max(0, len(history) - drop)] + words)[: self.capacity]
        most = data.draw(st.integers(1, self.capacity + 1 - len(prompt)))
        bad_at = len(prompt) + 1 if bad else -1
        eos = data.draw(st.sampled_from(((), (0,))))
        self.last[session] = self.world.add(prompt, session=session, salt=salt, max_tokens=min(most, 6), eos=eos, bad_at=bad_at)

    @rule(session=st.sampled_from(("a", "b", "c")))
    def end_session(self, session: str) -> None:
        known = self.world.manager.leases.get(session) is not None
        assert self.world.manager.leases.end(session) == known
        assert not self.world.manager.leases.end(session)

    @precondition(lambda self: len(self.world.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        self.world.plan()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def apply(self) -> None:
        self.world.apply()

    @rule(turns=st.integers(1, 5))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.world.turn()

    @precondition(lambda self: self.world.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.world.sequences)))
        alive = self.world.sequences[number].status is not Status.FINISHED
        assert (self.world.abort(number) is not None) == alive
        assert self.world.abort(number) is None, "an abort is a no-op the second time"

    @rule()
    def abort_unknown(self) -> None:
        assert self.world.abort(1 << 40) is None

    @precondition(lambda self: self.world.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        running = list(self.world.scheduler.running)
        self.world.scheduler._preempt(data.draw(st.sampled_from(running)))

    @rule(seconds=st.sampled_from((1.0, 10.0, 100.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.take(self.world.scheduler.expire(self.world.now))
        for seq in self.world.scheduler.sequences.values():
            assert seq.deadline_s > self.world.now
            assert seq.first_scheduled_s >= 0 or seq.arrival_s + 60.0 > self.world.now

    @rule(k=st.integers(1, 3))
    def alloc_fails_next(self, k: int) -> None:
        self.world.manager.failures = k

    @rule(on=st.booleans())
    def collide_hash(self, on: bool) -> None:
        self.world.manager.weak_hash(on)

    @rule()
    def reset_cache(self) -> None:
        self.world.manager.reset_cache()

    @rule()
    def a_result_nobody_waits_for(self) -> None:
        with pytest.raises(EngineError, match="A result came back for step 123456789"):
            self.world.scheduler.apply(StepResult(123456789), self.world.now)

    @invariant()
    def books_balance(self) -> None:
        self.world.check()

    @invariant()
    def ids_are_streamed_once(self) -> None:
        for number, seq in self.world.sequences.items():
            streamed = [e.token_id for e in self.world.events[number] if e.token_id >= 0]
            assert streamed == seq.token_ids[seq.num_prompt :]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.manager.failures = 0
            self.world.run()
            self.world.check()
            self.world.check_answers()
            self.world.check_quiet()


TestSchedulerModel = SchedulerModel.TestCase
TestSchedulerModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(20))
def test_five_hundred_random_steps(seed: int) -> None:
    """20 x 500 steps, integrity looked at after each; few blocks, so that preemption and eviction never rest."""
    rng = random.Random(seed)
    world = World(rng.randint(2, 12), rng.randint(1, 4), depth=rng.choice((1, 2, 2)), max_batch_size=rng.randint(1, 6),
                  max_step_tokens=rng.choice((1, 2, 3, 8, 64)), caching=rng.random() < 0.8, encode=seed % 4 == 0)  # fmt: skip
    capacity = world.manager.num_blocks * world.manager.block_seq_len
    for _ in range(500):
        while len(world.scheduler.waiting) < 3:
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, capacity))]
            most = rng.randint(1, capacity + 1 - len(prompt))
            world.add(prompt, max_tokens=most, seed=rng.randint(0, 1), priority=rng.choice((0, 0, 0, 1)), salt=rng.choice((b"", b"", b"a")),
                      session=rng.choice(("", "a", "b")), group=rng.choice((0, 0, 1)), turn=float(rng.randint(0, 2)), eos=(0,) if rng.random() < 0.2 else (), bad_at=len(prompt) + 1 if rng.random() < 0.05 else -1)  # fmt: skip
        if rng.random() < 0.05:
            world.abort(rng.choice(list(world.scheduler.sequences)))
        if rng.random() < 0.02:
            world.manager.failures = rng.randint(1, 3)
        if rng.random() < 0.02:
            world.manager.weak_hash(rng.random() < 0.5)
        if rng.random() < 0.05 and len(world.in_flight) < 2:
            world.plan()
            world.check()
        world.turn()
        world.check()
    world.manager.failures = 0
    world.run()
    world.check_answers()
    ended = [events[-1].finish_reason for events in world.events.values()]
    assert ended.count(FinishReason.ABORT) < len(ended) / 2
    world.check_quiet()
