"""A world around the real scheduler: a fake runner with a shadow K/V store, and the naive reference it is compared with.

The runner applies `StepPlan`s exactly as step.py says. Its "K/V" of a position is the digest of all ids up to
there, computed *from what the previous position's slot holds*; so reading a stale, stolen or wrongly shared block
gives a wrong digest, and a wrong next id. What a slot should hold is recomputed from the sequence's own ids.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

from engine.cache.manager import CacheManager, Match
from engine.cache.prefix import sha256
from engine.cache.sessions import LeaseLimits
from engine.scheduler import Scheduler
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.step import BAD_LOGITS, Admit, StepPlan, StepResult, TokenEvent

VOCAB = 5
LONG = 1 << 10
ALL_PINNED = LeaseLimits(max_pool_share=1.0, lease_s=1e6)


def fold(digest: bytes, token_id: int) -> bytes:
    """K/V of a position, from that of the position before."""
    return hashlib.blake2b(digest + token_id.to_bytes(4, "little"), digest_size=8).digest()


def choose(digest: bytes, seed: int, vocab: int = VOCAB) -> int:
    """The model: next id from everything before it."""
    return hashlib.blake2b(digest + seed.to_bytes(8, "little"), digest_size=2).digest()[0] % vocab


@dataclass
class Row:
    """A slot of the persistent batch, as a runner keeps it."""

    ids: list[int]
    table: list[int]
    params: SamplingParams
    num_prompt: int
    salt: bytes
    bad_at: int


@dataclass
class Runner:
    """Executes plans. `salt_of(slot)` and `bad_at(slot)` are asked when a sequence is admitted (the plan does not carry them)."""

    num_blocks: int
    block_seq_len: int
    rows: dict[int, Row] = field(default_factory=dict)
    store: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # slot -> (digest, salt)

    def execute(self, plan: StepPlan, info: dict[int, tuple[bytes, int]]) -> StepResult:
        for slot in plan.releases:
            del self.rows[slot]
        for admit in plan.admits:
            self._admit(admit, *info[admit.slot])
        for slot, block in zip(plan.block_slots, plan.block_ids, strict=True):
            self.rows[slot].table.append(block)
        assert len(set(plan.slots)) == len(plan.slots), "a slot has two rows in one step"
        sampled = []
        for slot, start, count, sample in zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True):
            digest = self._compute(self.rows[slot], start, count)
            if sample:
                sampled.append(self._sample(self.rows[slot], digest))
        return StepResult(plan.step, tuple(sampled))

    def _admit(self, admit: Admit, salt: bytes, bad_at: int) -> None:
        assert admit.slot not in self.rows, "a slot was given to two sequences"
        self.rows[admit.slot] = Row(list(admit.token_ids), list(admit.blocks), admit.params, admit.num_prompt, salt, bad_at)

    def _compute(self, row: Row, start: int, count: int) -> bytes:
        size = self.block_seq_len
        digest = b""
        for position in range(start):  # attention reads every earlier position, through the table
            slot = row.table[position // size] * size + position % size
            digest = fold(digest, row.ids[position])
            assert self.store.get(slot) == (digest, row.salt), f"position {position} reads K/V that is not its own"
        for position in range(start, start + count):
            digest = fold(digest, row.ids[position])
            self.store[row.table[position // size] * size + position % size] = (digest, row.salt)
        return digest

    def _sample(self, row: Row, digest: bytes) -> int:
        if len(row.ids) == row.bad_at:
            row.ids.append(0)
            return BAD_LOGITS
        row.ids.append(choose(digest, row.params.seed))
        return row.ids[-1]


def reference(
    prompt: list[int], params: SamplingParams, eos: frozenset[int], session_len: int, bad_at: int = -1
) -> tuple[list[int], FinishReason]:
    """One sequence alone, the obvious way: its answer (an id of -1 stands for bad logits) and why it ends."""
    ids, answer = list(prompt), []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
    digest = b""
    for token_id in ids:
        digest = fold(digest, token_id)
    while True:
        if len(ids) == bad_at:
            return [*answer, -1], FinishReason.ERROR
        token_id = choose(digest, params.seed)
        ids.append(token_id)
        answer.append(token_id)
        digest = fold(digest, token_id)
        if token_id in stops and len(answer) >= params.min_tokens:
            return answer, FinishReason.STOP
        if len(answer) == params.max_tokens or len(ids) == session_len:
            return answer, FinishReason.LENGTH


class FlakyManager(CacheManager):
    """The next `failures` requests for blocks find none; `weak_hash` makes nearly every key collide."""

    failures = 0

    def grow(self, table: list[int]) -> bool:
        return False if self._fails() else super().grow(table)

    def reserve(self, match: Match) -> list[int] | None:
        return None if self._fails() else super().reserve(match)

    def weak_hash(self, on: bool) -> None:
        self.index.digest = (lambda data: bytes((sum(data) % 2,))) if on else sha256

    def _fails(self) -> bool:
        failing = self.failures > 0
        self.failures -= failing
        return failing


class World:
    """Scheduler, runner, the steps between them (at most two in flight), and everything that was streamed."""

    def __init__(self, num_blocks: int = 8, block_seq_len: int = 2, *, depth: int = 2, encode: bool = False,
                 limits: LeaseLimits | None = None, **knobs: int | float) -> None:  # fmt: skip
        caching = bool(knobs.pop("caching", True))
        self.manager = FlakyManager(num_blocks, block_seq_len, enable_prefix_caching=caching, limits=limits or ALL_PINNED)
        settings = {"max_batch_size": 4, "max_step_tokens": 8, "session_len": 1 << 20} | knobs
        self.scheduler = Scheduler(self.manager, **settings)  # type: ignore[arg-type]
        self.session_len = int(settings["session_len"])
        self.runner = Runner(num_blocks, block_seq_len)
        self.depth = depth
        self.encode = encode
        self.now = 0.0
        self.in_flight: deque[tuple[StepPlan, dict[int, tuple[bytes, int]]]] = deque()
        self.sequences: dict[int, Sequence] = {}
        self.bad_at: dict[int, int] = {}
        self.events: dict[int, list[TokenEvent]] = {}
        self.plans: list[StepPlan] = []

    def add(self, prompt: list[int], *, bad_at: int = -1, eos: tuple[int, ...] = (), priority: int = 0, salt: bytes = b"",
            deadline_s: float = float("inf"), session: str = "", group: int = 0, turn: float = 0.0,
            **params: int | bool | tuple[int, ...]) -> Sequence:  # fmt: skip
        number = len(self.sequences)
        seq = Sequence(number, list(prompt), len(prompt), SamplingParams(**({"max_tokens": 4} | params)), frozenset(eos),  # type: ignore[arg-type]
                       priority=priority, arrival_s=self.now, deadline_s=deadline_s, salt=salt, group=group, turn=turn)  # fmt: skip
        self.scheduler.add(seq)
        if session:
            seq.lease = self.manager.leases.open(session, salt, self.now)
        self.sequences[number], self.events[number], self.bad_at[number] = seq, [], bad_at
        return seq

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            if self.encode:
                plan = StepPlan.decode(plan.encode())
            info = {s.slot: (s.salt, self.bad_at[s.id]) for s in self.scheduler.running}
            self.in_flight.append((plan, info))
            self.plans.append(plan)
        return plan

    def apply(self) -> list[TokenEvent]:
        plan, info = self.in_flight.popleft()
        return self.take(self.scheduler.apply(self.runner.execute(plan, info), self.now))

    def abort(self, number: int, reason: FinishReason = FinishReason.ABORT) -> TokenEvent | None:
        event = self.scheduler.abort(number, reason)
        self.take([] if event is None else [event])
        return event

    def take(self, events: list[TokenEvent]) -> list[TokenEvent]:
        for event in events:
            seen = self.events[event.sequence_id]
            assert not seen or seen[-1].finish_reason is None, "an event after the terminal one"
            seen.append(event)
        return events

    def turn(self) -> None:
        """As the engine's loop does: fill the flight, then take one result."""
        self.now += 1.0
        failing = self.manager.failures
        while len(self.in_flight) < self.depth and self.plan() is not None:
            pass
        if self.in_flight:
            self.apply()
        else:
            assert failing or not self.scheduler.sequences, "nothing in flight, sequences left, and nothing planned"

    def run(self, most: int = 100_000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            self.turn()
        raise AssertionError(f"not done after {most} turns")

    def answer(self, number: int) -> list[int]:
        return [e.token_id for e in self.events[number] if e.finish_reason is not FinishReason.ABORT]

    def check(self) -> None:
        """Our own invariants, and the shadow store: what is computed and ended is what it should be."""
        self.scheduler.check_integrity()
        manager = self.manager
        assert manager.num_free + manager.num_active + manager.num_cached == manager.num_blocks

    def check_answers(self) -> None:
        """Every ended sequence streamed what it would have streamed alone; an aborted one a beginning of that."""
        for number, seq in self.sequences.items():
            events = self.events[number]
            assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
            if not events or events[-1].finish_reason is None:
                continue
            prompt = seq.token_ids[: seq.num_prompt]
            expected, reason = reference(prompt, seq.params, seq.eos_token_ids, self.session_len, self.bad_at[number])
            if events[-1].finish_reason is FinishReason.ABORT:
                streamed = [e.token_id for e in events[:-1]]
                assert streamed == expected[: len(streamed)]
            else:
                assert ([e.token_id for e in events], events[-1].finish_reason) == (expected, reason)

    def check_quiet(self) -> None:
        """Nothing runs: every block FREE or CACHED, and after a reset all FREE."""
        assert self.manager.num_active == 0
        self.manager.reset_cache()
        assert len(self.manager.leases) == self.manager.num_pinned == 0
        self.scheduler.check_integrity()
        assert self.manager.num_free == self.manager.num_blocks


def roomy(**knobs: int | float) -> World:
    """A pool that never runs out."""
    return World(400, 4, **({"max_batch_size": 8, "max_step_tokens": 64, "session_len": LONG} | knobs))  # type: ignore[arg-type]


def feed(world: World, *token_ids: int) -> list[tuple[int, int, FinishReason | None]]:
    """Apply the oldest step in flight with made-up ids."""
    plan, _ = world.in_flight.popleft()
    events = world.scheduler.apply(StepResult(plan.step, token_ids), world.now)
    return [(e.sequence_id, e.token_id, e.finish_reason) for e in events]


def rows(world: World) -> list[tuple[int, int, int, int]]:
    """Rows of the next plan: (slot, start, count, sampled)."""
    plan = world.plan()
    return [] if plan is None else list(zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True))
