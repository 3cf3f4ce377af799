"""Who computes what in the next step: persistent batch, split & fuse, preemption, priorities.

`plan` hands out a budget of tokens, no phases: decoding sequences first, then prompt parts, then admissions by rank:
(priority, QoS group, turn within it, arrival). `apply` takes what a step sampled. Plan N+1 may leave before result N is
applied, so an id may be *pending*: it exists, the runner knows it, we do not yet.

Order of effects in `plan`: blocks for sequences that crossed a boundary (preempting if need be), room for a waiting
sequence of a better class, prompt parts, admissions, decode rows. In `apply`: full blocks become findable, blocks
behind the fence go back, ids are appended, finished sequences leave.

Must not know clocks (time is an argument), tensors or text. Pure wing: standard library only.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Collection, Iterable
from functools import partial
from itertools import count, repeat
from operator import attrgetter
from typing import NamedTuple

from engine.cache.blocks import IntegrityError
from engine.cache.manager import CacheManager, Match
from engine.errors import BadParameter, ContextLengthExceeded, EngineError
from engine.sequence import FinishReason, SamplingParams, Sequence, Status
from engine.step import BAD_LOGITS, MAX_SCORED, NOTHING_LEFT, Admit, StepPlan, StepResult, TokenEvent

FINISHED, RUNNING = Status.FINISHED, Status.RUNNING
_rank = attrgetter("rank")  # smaller goes first and is preempted last
_token_event = partial(tuple.__new__, TokenEvent)  # from a tuple of its fields, without a Python frame


class _Rows(NamedTuple):
    """Decode rows of a step."""

    sequences: tuple[Sequence, ...]
    ids: tuple[int, ...]
    slots: tuple[int, ...]
    ones: tuple[int, ...]


class _Decoding:
    """Running sequences that need one token a step, in slot order; identical steps reuse the same tuples."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._slots: list[int] = []
        self._all: _Rows | None = None
        self._turn = 0  # slot that goes first when not all fit into a step

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, seq: Sequence) -> bool:
        at = bisect_left(self._slots, seq.slot)
        return at < len(self._slots) and self._sequences[at] is seq

    def add(self, seq: Sequence) -> None:
        at = bisect_left(self._slots, seq.slot)
        self._slots.insert(at, seq.slot)
        self._sequences.insert(at, seq)
        self._all = None

    def discard(self, seq: Sequence) -> None:
        at = bisect_left(self._slots, seq.slot)
        if at < len(self._slots) and self._sequences[at] is seq:
            del self._slots[at], self._sequences[at]
            self._all = None

    def rows(self, most: int) -> _Rows:
        """All of them, or the next `most` in turn."""
        if len(self._slots) <= most:
            if self._all is None:
                self._all = _rows(self._sequences)
            return self._all
        first = bisect_left(self._slots, self._turn)
        turns = [(first + i) % len(self._slots) for i in range(most + 1)]
        self._turn = self._slots[turns.pop()]
        return _rows([self._sequences[i] for i in sorted(turns)])


def _rows(sequences: list[Sequence]) -> _Rows:
    return _Rows(tuple(sequences), tuple([s.id for s in sequences]), tuple([s.slot for s in sequences]), (1,) * len(sequences))


class _Part(NamedTuple):
    """One row of a prompt (or of a preempted sequence that is computed again)."""

    seq: Sequence
    start: int
    length: int
    sampled: bool


class _Step(NamedTuple):
    """What the scheduler remembers of a step in flight."""

    number: int
    sampled: tuple[Sequence, ...]  # in the order of the result's ids
    ids: tuple[int, ...]  # their sequence ids
    filled: list[tuple[Sequence, list[int], int, int]]  # (sequence, its table, first, last): blocks this step completes
    scored: dict[int, Sequence]  # row of the plan -> sequence, where prompt logprobs come back


class Scheduler:
    """See the module's text. All methods are called from one thread; none blocks."""

    def __init__(
        self, manager: CacheManager, *, max_batch_size: int, max_step_tokens: int, session_len: int, max_queue_age_s: float = math.inf
    ) -> None:
        self.manager = manager
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.session_len = session_len
        self.max_queue_age_s = max_queue_age_s
        self.sequences: dict[int, Sequence] = {}  # waiting and running
        self.waiting: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._running: dict[int, Sequence] = {}
        self._classes: Counter[int] = Counter()  # running sequences by priority
        self._growing: Counter[int] = Counter()  # of these, the ones whose table may still grow
        self._free_slots = list(range(max_batch_size))  # heap: low slots first
        self._decoding = _Decoding()
        self._prompting: list[Sequence] = []  # running, more than one token to compute; by rank
        self._needing: list[Sequence] = []  # running, cannot go on without a new block
        self._newcomers: dict[int, Sequence] = {}  # admitted, first token not there yet
        self._blocked: tuple[Sequence | None, int] = (None, 0)  # head of the line that did not fit, and what it needs
        self._alarms: list[tuple[float, int]] = []  # heap: (when to look at it, sequence id)
        self._releases: list[int] = []  # slots left since the last plan
        self._new_blocks: list[tuple[int, int]] = []  # (slot, block) since the last plan
        self._steps: deque[_Step] = deque()  # in flight
        self._next_step = 0

    @property
    def running(self) -> Collection[Sequence]:
        """A view; in order of admission."""
        return self._running.values()

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._steps)

    # -- in and out ---------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Put a new sequence in line, or refuse what could never run (`BadParameter`, `ContextLengthExceeded`)."""
        if seq.id in self.sequences:
            raise BadParameter("id", f"A sequence with id {seq.id} is already here.")
        if not seq.token_ids:
            raise BadParameter("prompt", "The prompt is empty; give at least 1 token.")
        if seq.num_prompt >= self.session_len:
            raise ContextLengthExceeded(
                "prompt",
                f"The prompt has {seq.num_prompt} tokens, but with its answer a sequence holds at most {self.session_len}; shorten it.",
            )
        limit = min(seq.num_prompt + seq.params.max_tokens, self.session_len)
        blocks = self.manager.blocks_for(limit - 1)  # the last id is never computed
        if blocks > self.manager.num_blocks:
            raise ContextLengthExceeded(
                "max_tokens",
                f"Prompt and answer of up to {limit} tokens need {blocks} KV blocks, but there are {self.manager.num_blocks}; "
                f"ask for fewer tokens, or raise cache_max_entry_count.",
            )
        seq.limit = limit
        own = () if seq.params.ignore_eos else seq.eos_token_ids
        seq.rank = (seq.priority, seq.group, seq.turn, seq.arrival_s, seq.id)
        seq.stop_ids = frozenset(seq.params.stop_token_ids).union((BAD_LOGITS, NOTHING_LEFT), own)
        self.sequences[seq.id] = seq
        insort(self.waiting, seq, key=_rank)
        for when in (seq.deadline_s, seq.arrival_s + self.max_queue_age_s):
            if when < math.inf:
                heapq.heappush(self._alarms, (when, seq.id))

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> TokenEvent | None:
        """End a sequence now; its terminal event, or None when it has ended already (or never was)."""
        seq = self.sequences.get(sequence_id)
        if seq is None:
            return None
        self._finish(seq, reason)
        return TokenEvent(sequence_id, -1, None, reason)

    def expire(self, now: float) -> list[TokenEvent]:
        """End sequences past their deadline, those that waited `max_queue_age_s` without ever being scheduled, and leases."""
        self.manager.leases.expire(now)
        events: list[TokenEvent] = []
        while self._alarms and self._alarms[0][0] <= now:
            _, sequence_id = heapq.heappop(self._alarms)
            seq = self.sequences.get(sequence_id)
            if seq is None:
                continue
            too_old = seq.first_scheduled_s < 0 and seq.arrival_s + self.max_queue_age_s <= now
            if seq.deadline_s <= now or too_old:
                self._finish(seq, FinishReason.ABORT)
                events.append(TokenEvent(sequence_id, -1, None, FinishReason.ABORT))
        return events

    # -- plan ---------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do before a result or a sequence comes in."""
        if self._needing:
            self._grow()
        if self.waiting:
            self._make_room()
        admits: list[Admit] = []
        parts = self._parts(admits, now) if self._prompting or self.waiting else []
        rows = self._decoding.rows(self.max_step_tokens - sum([part.length for part in parts]))
        if not parts and not rows.slots:
            return None
        scored = {len(rows.slots) + i: part.seq for i, part in enumerate(parts) if part.seq.scoring}
        step = _Step(self._next_step, rows.sequences, rows.ids, [], scored)
        self._next_step += 1
        starts = tuple(self._advance(rows.sequences, step))
        plan = self._assemble(step.number, admits, rows, starts, parts)
        if parts:
            step = self._advance_parts(parts, step)
        self._steps.append(step)
        return plan

    def _assemble(self, number: int, admits: list[Admit], rows: _Rows, starts: tuple[int, ...], parts: list[_Part]) -> StepPlan:
        releases, self._releases = self._releases, []
        blocks, self._new_blocks = self._new_blocks, []
        _, _, slots, counts = rows
        samples = counts
        if parts:
            slots += tuple([part.seq.slot for part in parts])
            starts += tuple([part.start for part in parts])
            counts += tuple([part.length for part in parts])
            samples += tuple([int(part.sampled) for part in parts])
        block_slots = tuple([slot for slot, _ in blocks])
        block_ids = tuple([block for _, block in blocks])
        return StepPlan(number, tuple(releases), tuple(admits), block_slots, block_ids, slots, starts, counts, samples)

    def _advance(self, sequences: tuple[Sequence, ...], step: _Step) -> list[int]:
        """Count one position and one pending id for each; their starts. The hot loop."""
        starts, due = [], []
        for seq in sequences:
            start = seq.num_computed
            starts.append(start)
            seq.num_computed = start = start + 1
            seq.num_pending += 1
            if start == seq.horizon:
                due.append(seq)
        size = self.manager.block_seq_len
        for seq in due:
            if seq.num_computed % size == 0:
                last = seq.num_computed // size
                step.filled.append((seq, seq.blocks, last - 1, last))
            if seq.num_tokens >= seq.limit:
                self._decoding.discard(seq)
            else:
                self._needing.append(seq)
        return starts

    def _advance_parts(self, parts: list[_Part], step: _Step) -> _Step:
        size = self.manager.block_seq_len
        for seq, start, length, sampled in parts:
            end = seq.num_computed = start + length
            seq.num_pending += sampled
            if end // size > start // size:
                step.filled.append((seq, seq.blocks, start // size, end // size))
            if seq.num_tokens - end == 1:
                self._prompting.remove(seq)
                if seq.num_tokens < seq.limit:
                    self._start_decoding(seq)
        sampled_now = tuple([part.seq for part in parts if part.sampled])
        return step._replace(sampled=step.sampled + sampled_now, ids=step.ids + tuple([s.id for s in sampled_now]))

    def _start_decoding(self, seq: Sequence) -> None:
        self._set_horizon(seq)
        if seq.num_computed == seq.horizon:
            self._needing.append(seq)
        self._decoding.add(seq)

    def _set_horizon(self, seq: Sequence) -> None:
        seq.horizon = min(len(seq.blocks) * self.manager.block_seq_len, seq.limit - 1)

    # -- blocks -------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """A block for each sequence that cannot go on without, best rank first; those that get none stall."""
        needing, self._needing = sorted(self._needing, key=_rank), []
        for seq in needing:
            while seq.status is RUNNING and not self.manager.grow(seq.blocks):
                if self.manager.num_returning > len(self._needing):  # enough comes back when the step in flight ends
                    self._needing.append(seq)
                    self._decoding.discard(seq)
                    break
                self._preempt(max(self._running.values(), key=_rank))
            else:
                if seq.status is RUNNING:
                    self._grown(seq)

    def _grown(self, seq: Sequence) -> None:
        self._new_blocks.append((seq.slot, seq.blocks[-1]))
        self._set_horizon(seq)
        if seq.horizon == seq.limit - 1:
            self._growing[seq.priority] -= 1
        if seq not in self._decoding:
            self._decoding.add(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Take slot and blocks; its ids stay, also the one that a step in flight is sampling, and are computed again."""
        self._leave(seq)
        seq.move(Status.WAITING)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, seq, key=_rank)

    def _make_room(self) -> None:
        """Preempt sequences of worse classes for the first in line, if that lets it in."""
        head = self.waiting[0]
        if head.num_pending or not self._classes or head.priority >= max(self._classes):
            return
        match = self._match(head)
        short = self._needs(head, match.num_taken) + self._spare(head) - self.manager.num_available - self.manager.num_returning
        victims: list[Sequence] = []
        for seq in sorted(self._running.values(), key=_rank, reverse=True):
            if seq.priority <= head.priority or (short <= 0 and (self._free_slots or victims)):
                break
            victims.append(seq)
            short -= self.manager.num_sole(seq.blocks)
        if short <= 0 and (self._free_slots or victims):
            for seq in victims:
                self._preempt(seq)

    def _match(self, seq: Sequence) -> Match:
        """Of a sequence that is owed prompt logprobs nothing is found: every position must be computed."""
        if seq.num_unscored:
            num_new = self.manager.blocks_for(len(seq.token_ids))
            return Match([], num_new, num_new)
        return self.manager.match(seq.token_ids, seq.salt, seq.lease)

    def _needs(self, seq: Sequence, num_taken: int) -> int:
        """Blocks to admit it, and the one it needs right afterwards when its last block is full."""
        num_tokens = len(seq.token_ids)
        return num_taken + (num_tokens % self.manager.block_seq_len == 0 and num_tokens < seq.limit - 1)

    def _spare(self, seq: Sequence) -> int:
        """Blocks that an admission must leave: one for each running sequence that it could not preempt and that may grow.

        Without them the newcomer would take the blocks that the others are about to need, and be preempted for it.
        """
        return sum([number for priority, number in self._growing.items() if priority <= seq.priority])

    # -- prompts and admissions ---------------------------------------------------------------------------

    def _parts(self, admits: list[Admit], now: float) -> list[_Part]:
        """Prompt parts from what decoding leaves of the budget; 1 token (every other step, if it is all) where it leaves none."""
        budget = self.max_step_tokens - len(self._decoding)
        if budget <= 0:
            budget = 1 if self.max_step_tokens > 1 else self._next_step % 2
        parts: list[_Part] = []
        scores = MAX_SCORED
        for seq in self._prompting:
            if budget == 0:
                return parts
            most = min(budget, scores) if seq.scoring else budget
            if most:
                parts.append(_part(seq, most))
                budget -= parts[-1].length
                scores -= parts[-1].length if seq.scoring else 0
        while budget and self.waiting and (scores or not self.waiting[0].num_unscored):
            newcomer = self._admit(admits, now)
            if newcomer is None:
                break
            parts.append(_part(newcomer, min(budget, scores) if newcomer.scoring else budget))
            budget -= parts[-1].length
            scores -= parts[-1].length if newcomer.scoring else 0
        return parts

    def _admit(self, admits: list[Admit], now: float) -> Sequence | None:
        """The first in line takes a slot and the blocks of all its ids, or nobody does (so nobody is overtaken)."""
        seq, manager = self.waiting[0], self.manager
        if not self._free_slots or seq.num_pending or self._still_written(seq):
            return None
        room = manager.num_available - self._spare(seq)
        if seq is self._blocked[0] and self._blocked[1] > room:
            return None
        match = self._match(seq)
        if self._soon_cached(seq, match.num_cached // manager.block_seq_len):
            return None
        needs = self._needs(seq, match.num_taken)
        blocks = manager.reserve(match) if needs <= room else None
        if blocks is None:
            self._blocked = (seq, needs)
            return None
        self._blocked = (None, 0)
        del self.waiting[0]
        self._enter(seq, blocks, match.num_cached, now)
        eos = tuple(sorted(seq.eos_token_ids))
        seq.scoring = seq.num_unscored > 0
        admits.append(Admit(seq.slot, tuple(seq.token_ids), seq.num_prompt, tuple(blocks), _slot_params(seq), eos))
        return seq

    def _still_written(self, seq: Sequence) -> bool:
        """Whether a step in flight may write what its session's last turn left behind."""
        return seq.lease is not None and bool(self._steps) and bool(seq.lease.table) and self._steps[0].number <= seq.lease.fence

    def _soon_cached(self, seq: Sequence, num_hits: int) -> bool:
        """Whether the block after its hits is being computed for another sequence (n > 1, a burst with one system prompt).

        Waiting the step or two until that can be matched is cheaper than computing it again. Nobody waits for good: the
        other one is running or its step is in flight, and in the next plan this is asked anew.
        """
        end = (num_hits + 1) * self.manager.block_seq_len
        if not self.manager.enable_prefix_caching or end >= len(seq.token_ids) or seq.num_unscored:
            return False
        last = seq.token_ids[end - 1]
        writers = [*self._prompting, *(writer for step in self._steps for writer, *_ in step.filled)]
        return any(
            len(w.token_ids) >= end and w.token_ids[end - 1] == last and w.salt == seq.salt and w.token_ids[:end] == seq.token_ids[:end]
            for w in writers
        )

    def _enter(self, seq: Sequence, blocks: list[int], num_cached: int, now: float) -> None:
        seq.move(RUNNING)
        seq.slot = heapq.heappop(self._free_slots)
        seq.blocks = blocks
        seq.num_computed = num_cached
        self._running[seq.id] = seq
        self._classes[seq.priority] += 1
        self._growing[seq.priority] += self._may_grow(seq)
        insort(self._prompting, seq, key=_rank)
        if seq.first_scheduled_s < 0:
            seq.first_scheduled_s = now
            seq.num_cached = num_cached
            self._newcomers[seq.id] = seq
            if self.manager.enable_prefix_caching:
                self.manager.prefix_queries += len(seq.token_ids)
                self.manager.prefix_hits += num_cached

    def _leave(self, seq: Sequence) -> None:
        """Give slot and blocks back; the blocks as soon as no step in flight can touch them."""
        self._decoding.discard(seq)
        for crowd in (self._prompting, self._needing):
            if seq in crowd:
                crowd.remove(seq)
        del self._running[seq.id]
        self._classes[seq.priority] -= 1
        self._growing[seq.priority] -= self._may_grow(seq)
        if not self._classes[seq.priority]:
            del self._classes[seq.priority], self._growing[seq.priority]
        if self._new_blocks:
            self._new_blocks = [(slot, block) for slot, block in self._new_blocks if slot != seq.slot]
        self._releases.append(seq.slot)
        heapq.heappush(self._free_slots, seq.slot)
        self.manager.release(seq.blocks, self._fence)
        seq.slot, seq.blocks = -1, []

    @property
    def _fence(self) -> int | None:
        return self._next_step - 1 if self._steps else None

    def _may_grow(self, seq: Sequence) -> bool:
        return len(seq.blocks) * self.manager.block_seq_len < seq.limit - 1

    # -- apply --------------------------------------------------------------------------------------------

    def apply(self, result: StepResult, now: float) -> list[TokenEvent]:
        """Take what the oldest step in flight sampled; one event for each id of a sequence that is still there."""
        step = self._check_result(result)
        for seq, table, first, last in step.filled:
            if len(seq.token_ids) >= last * self.manager.block_seq_len:  # else it ended before its last id came back
                self.manager.commit(table, seq.token_ids, seq.salt, first, last)
        self.manager.step_ended(step.number)
        for row, position, value in result.prompt_logprobs:
            seq = step.scored[row]
            if position == len(seq.prompt_logprobs) + 1:  # else it was preempted, and these come again
                seq.prompt_logprobs.append(value)
        events = self._take_ids(step, result)
        if self._newcomers:
            for seq in [s for s in self._newcomers.values() if len(s.token_ids) > s.num_prompt]:
                seq.first_token_s = now
                del self._newcomers[seq.id]
        return events

    def _check_result(self, result: StepResult) -> _Step:
        if not self._steps:
            raise EngineError(f"A result came back for step {result.step}, but no step is in flight.")
        step = self._steps[0]
        if result.step != step.number & 0x7FFFFFFF:
            raise EngineError(f"A result came back for step {result.step}, but step {step.number} is the oldest in flight.")
        if len(result.token_ids) != len(step.sampled):
            raise EngineError(f"Step {step.number} sampled {len(step.sampled)} ids, but {len(result.token_ids)} came back.")
        return self._steps.popleft()

    def _take_ids(self, step: _Step, result: StepResult) -> list[TokenEvent]:
        """Append each id to its sequence and see whether that ends it. The other hot loop."""
        events: list[TokenEvent] = list(map(_token_event, zip(step.ids, result.token_ids, _logprobs(result), repeat(None))))
        late: list[int] = []
        for i, seq, token_id in zip(count(), step.sampled, result.token_ids):
            if seq.status is FINISHED:  # aborted, or stopped by an earlier id: this one was computed for nothing
                late.append(i)
                continue
            seq.num_pending -= 1
            ids = seq.token_ids
            ids.append(token_id)
            if token_id in seq.stop_ids or len(ids) == seq.limit:
                reason = _reason(seq, token_id)
                if reason is not None:
                    events[i] = events[i]._replace(token_id=max(token_id, -1), finish_reason=reason)
                    self._finish(seq, reason)
        for i in reversed(late):
            del events[i]
        return events

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.status is RUNNING:
            if seq.lease is not None and reason is not FinishReason.ERROR:
                self.manager.keep(seq.lease, seq.blocks, seq.token_ids, seq.num_computed, seq.salt, self._fence)
            self._leave(seq)
        else:
            del self.waiting[bisect_left(self.waiting, seq.rank, key=_rank)]
        seq.move(FINISHED)
        seq.finish_reason = reason
        del self.sequences[seq.id]
        if seq.lease is not None:
            self.manager.leases.close(seq.lease)
        if seq.num_generated == 0:
            self._newcomers.pop(seq.id, None)
        if reason is FinishReason.ERROR:
            self.manager.distrust(seq.token_ids, seq.salt)

    # -- our own invariants -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise `IntegrityError` where the bookkeeping contradicts itself; cheap enough for tests and idle moments."""
        self.manager.check_integrity([seq.blocks for seq in self._running.values()])
        for seq in self.sequences.values():
            self._check_sequence(seq)
        if sorted(self.waiting, key=_rank) != self.waiting or len(self.waiting) + len(self._running) != len(self.sequences):
            raise IntegrityError(f"{len(self.sequences)} sequences, but {len(self.waiting)} wait in line and {len(self._running)} run.")
        taken = [seq.slot for seq in self._running.values()]
        if sorted(taken + self._free_slots) != list(range(self.max_batch_size)):
            raise IntegrityError(f"slots {sorted(taken)} are taken and {sorted(self._free_slots)} free, of {self.max_batch_size}.")
        if self._classes != Counter(seq.priority for seq in self._running.values()):
            raise IntegrityError("running sequences are counted in wrong classes.")
        if self._growing != Counter(seq.priority for seq in self._running.values() if self._may_grow(seq)):
            raise IntegrityError("sequences that may grow are counted wrongly.")

    def _check_sequence(self, seq: Sequence) -> None:
        pending = sum(s is seq for step in self._steps for s in step.sampled)
        if seq.num_pending != pending:
            raise IntegrityError(f"sequence {seq.id} says {seq.num_pending} ids are pending, {pending} are.")
        if seq.status is not RUNNING:
            if seq.status is FINISHED or seq.blocks or seq.slot >= 0 or seq.num_computed or seq not in self.waiting:
                raise IntegrityError(f"sequence {seq.id} is {seq.status.name} in line, with slot {seq.slot} and blocks {seq.blocks}.")
            return
        size = self.manager.block_seq_len
        if not seq.num_computed < seq.num_tokens <= seq.limit or len(seq.blocks) < self.manager.blocks_for(seq.num_computed):
            raise IntegrityError(f"sequence {seq.id}: {seq.num_computed} of {seq.num_tokens} computed in {len(seq.blocks)} blocks.")
        self.manager.check_writable(seq.blocks, seq.num_computed // size)
        places = (seq in self._prompting) + (seq in self._decoding) + (seq in self._needing and seq not in self._decoding)
        if places != (seq.num_tokens < seq.limit):
            raise IntegrityError(f"sequence {seq.id} runs in {places} places, with {seq.num_tokens} of at most {seq.limit} tokens.")


def _part(seq: Sequence, budget: int) -> _Part:
    owed = seq.num_tokens - seq.num_computed
    return _Part(seq, seq.num_computed, min(owed, budget), owed <= budget)


def _slot_params(seq: Sequence) -> SamplingParams:
    """A sequence that comes back has the logprobs of its prompt already."""
    done = seq.params.prompt_logprobs >= 0 and not seq.scoring
    return dataclasses.replace(seq.params, prompt_logprobs=-1) if done else seq.params


def _logprobs(result: StepResult) -> Iterable[object]:
    """One for each sampled id, None where none was asked for."""
    if not result.logprobs:
        return repeat(None)
    found = dict(result.logprobs)
    return map(found.get, range(len(result.token_ids)))


def _reason(seq: Sequence, token_id: int) -> FinishReason | None:
    """Why the id just appended ends the sequence, if it does. One that is no id is taken back."""
    if token_id in (BAD_LOGITS, NOTHING_LEFT):
        seq.token_ids.pop()
        return FinishReason.ERROR if token_id == BAD_LOGITS else FinishReason.STOP
    if token_id in seq.stop_ids and seq.num_generated >= seq.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(seq.token_ids) == seq.limit else None
