"""Prompt logprobs come once for every prompt id but the first, whatever is cached, cut or preempted; masks can end a sequence."""

from __future__ import annotations

from engine.scheduler import MAX_SCORED
from engine.sequence import FinishReason
from engine.step import NOTHING_LEFT, Logprobs, StepPlan, StepResult
from tests.engine.pure.world import World


class ScoringWorld(World):
    """The fake runner also scores: the logprob of the id at position p is -p."""

    most_scored = 0

    def execute(self, plan: StepPlan, info: dict[int, tuple[bytes, int]]) -> StepResult:
        result = self.runner.execute(plan, info)
        found = []
        for row, (slot, start, count) in enumerate(zip(plan.slots, plan.starts, plan.counts, strict=True)):
            held = self.runner.rows[slot]
            if held.params.prompt_logprobs >= 0:
                found += [(row, p, Logprobs(-float(p), p)) for p in range(start + 1, min(start + count, held.num_prompt - 1) + 1)]
        self.most_scored = max(self.most_scored, len(found))
        return StepResult(result.step, result.token_ids, prompt_logprobs=tuple(found))

    def apply(self) -> list:
        plan, info = self.in_flight.popleft()
        return self.take(self.scheduler.apply(self.execute(plan, info), self.now))


def logprobs_of(world: World, number: int) -> list[float]:
    return [value.logprob for value in world.sequences[number].prompt_logprobs]  # type: ignore[attr-defined]


def test_a_cached_prompt_is_computed_again_for_its_logprobs() -> None:
    world = ScoringWorld(64, 2, max_step_tokens=4)
    prompt = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    world.add(prompt)
    world.run()
    world.add(prompt)
    world.add(prompt, prompt_logprobs=0)
    world.add(prompt, prompt_logprobs=2)
    world.run()
    assert [seq.num_cached for seq in world.sequences.values()] == [0, 10, 0, 0]
    assert logprobs_of(world, 1) == []
    assert logprobs_of(world, 2) == logprobs_of(world, 3) == [-float(p) for p in range(1, len(prompt))]
    world.check_answers()
    world.check_quiet()


def test_preemption_neither_loses_nor_repeats_any() -> None:
    world = ScoringWorld(9, 2, max_step_tokens=3, max_batch_size=3)
    for i in range(3):
        world.add([i, 1, 2, 3, 4, 1], max_tokens=9, prompt_logprobs=1)
    for i in range(3):  # of a better class: they take the place of the others, in the middle of their prompts as well
        world.turn()
        world.add([i, 3, 3, 3], max_tokens=5, priority=-1, prompt_logprobs=1)
        world.check()
    world.run()
    assert world.scheduler.num_preemptions > 0
    for number, seq in world.sequences.items():
        assert logprobs_of(world, number) == [-float(p) for p in range(1, seq.num_prompt)]
    world.check_answers()
    world.check_quiet()


def test_a_step_scores_a_bounded_number_of_positions() -> None:
    world = ScoringWorld(400, 2, max_step_tokens=500, max_batch_size=6)
    for _ in range(3):
        world.add([1, 2] * 40, prompt_logprobs=0)
    plain = world.add([2, 1] * 60)
    while world.scheduler.has_work:
        world.turn()
        assert world.most_scored <= MAX_SCORED
        world.check()
    assert world.most_scored > MAX_SCORED // 2
    assert [len(logprobs_of(world, i)) for i in range(4)] == [79, 79, 79, 0]
    assert plain.finish_reason is FinishReason.LENGTH


def test_a_sequence_for_which_the_masks_leave_nothing_stops() -> None:
    world = World(64, 2)
    seq = world.add([1, 2, 3], max_tokens=9, min_tokens=9)
    assert world.plan() is not None and world.plan() is not None
    events = []
    for token in (7, NOTHING_LEFT):
        plan, _ = world.in_flight.popleft()
        events += world.scheduler.apply(StepResult(plan.step, (token,)), 0.0)
    assert [(e.token_id, e.finish_reason) for e in events] == [(7, None), (-1, FinishReason.STOP)]
    assert seq.token_ids == [1, 2, 3, 7]
    world.scheduler.check_integrity()
