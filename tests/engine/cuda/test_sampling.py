"""Sampling on the (emulated) card: the CPU sampler's ids and logprobs, bit for bit, and the promises that `SamplingParams` makes.

Rows and columns that no kernel may read hold NaN; places that none may write are compared afterwards.
"""

import numpy as np
import pytest
import torch

from engine.batch import Scored
from engine.cuda.launch import Library, Variant, assemble, to_ptx
from engine.cuda.sampling import GpuSampler
from engine.sampler import Sampler
from engine.sampler_reference import reference_distribution, reference_logprobs, sample_reference
from engine.sequence import SamplingParams
from engine.step import BAD_LOGITS, NOTHING_LEFT, Admit
from tests.ptx.device import KERNELS, EmulatedDevice

SESSION, UNWRITTEN = 64, -7
PORTABLE = (7, 5)
ROWS = 18  # steps are padded to a multiple: the emulator prepares a kernel for each size of grid


@pytest.fixture(scope="module")
def library():
    """cc -> (library, device): each kernel is compiled and prepared once."""
    made = {}

    def of(cc=(9, 0)):
        if cc not in made:
            device = EmulatedDevice(cc)
            made[cc] = (Library(device, KERNELS), device)
        return made[cc]

    return of


def params_of(**fields):
    fields.setdefault("max_tokens", SESSION)
    return SamplingParams(**fields)


class Card:
    """A sampler on the card and one on the host, told the same."""

    def __init__(self, library, vocab, slots=ROWS, multiprocessors=4, cc=(9, 0)):
        self.vocab, self.slots = vocab, slots
        made, self.device = library(cc)
        self.device.multiprocessors = multiprocessors  # so that a row is split over some or many thread blocks
        self.sampler = GpuSampler(made, self.device, slots, vocab)
        self.host = Sampler(slots, SESSION, vocab)
        self.ids = torch.full((slots + 1, SESSION + 1), UNWRITTEN, dtype=torch.int32)
        self.known = {}

    def admit(self, slot, params, token_ids=(0,), num_prompt=None, eos=()):
        num_prompt = len(token_ids) if num_prompt is None else num_prompt
        admit = Admit(slot, tuple(token_ids), num_prompt, (), params, tuple(eos))
        self.sampler.admit(admit)
        self.host.admit(admit)
        self.ids[slot] = UNWRITTEN
        self.ids[slot, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32)
        self.known[slot] = list(token_ids)

    def step(self, logits, slots, gap=0):
        """Both sample; -> the card's ids and logprobs, after comparing all that they must share."""
        logits, rows = np.asarray(logits, np.float32), len(slots)
        padded = [*slots, *[self.slots] * (-rows % ROWS)]
        memory = torch.full((len(padded) + 1, self.vocab + gap), float("nan"))
        memory[:rows, : self.vocab] = torch.from_numpy(logits)
        given = torch.tensor([*padded, 0], dtype=torch.int32)
        self.device.launches.clear()
        ids, logprobs = self.sampler.sample(memory[:, : self.vocab] if gap else memory, given, padded, self.ids)()
        assert ids[rows:] == (BAD_LOGITS,) * (-rows % ROWS) and (self.ids[self.slots] == UNWRITTEN).all()
        ids = ids[:rows]
        wanted, wanted_logprobs = self.host.sample(logits.copy(), list(slots))
        assert list(ids) == wanted
        assert list(logprobs) == wanted_logprobs
        for slot, token in zip(slots, ids, strict=True):
            self.known[slot].append(max(token, 0))
        for slot, known in self.known.items():
            assert self.ids[slot, : len(known)].tolist() == known
            assert (self.ids[slot, len(known) :] == UNWRITTEN).all()
            if any(token < 0 for at, token in zip(slots, ids, strict=True) if at == slot):
                known.pop()
                self.ids[slot, len(known)] = UNWRITTEN
        assert torch.isnan(memory[rows:]).all() and torch.isnan(memory[:, self.vocab :]).all()
        return ids, logprobs


def random_logits(rng, rows, vocab, kind):
    if kind == "ties":
        return rng.integers(-2, 3, (rows, vocab)).astype(np.float32)
    if kind == "equal":
        return np.zeros((rows, vocab), np.float32) - np.float32(0.0)
    scale = {"flat": 0.01, "usual": 3.0, "sharp": 30.0}[kind]
    return (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)


FILTERS = [
    {"temperature": 0.0}, {"top_k": 1}, {}, {"temperature": 0.3}, {"temperature": 2.0}, {"temperature": 1e-9}, {"top_k": 2}, {"top_k": 40},
    {"top_k": 63}, {"top_k": 1 << 20}, {"top_p": 0.0}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.02}, {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.1, "temperature": 0.7}, {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["flat", "usual", "sharp", "ties", "equal"])
def test_ids_are_the_cpus_whatever_the_filters(library, kind):
    vocab, rng = 1000, np.random.default_rng(1)
    card = Card(library, vocab, slots=ROWS)
    for slot, fields in enumerate(FILTERS):
        card.admit(slot, params_of(seed=int(rng.integers(1 << 63)) * 2 + slot, **fields), (1,) * (slot % 5 + 1))
    for _ in range(2):
        card.step(random_logits(rng, len(FILTERS), vocab, kind), rng.permutation(len(FILTERS)).tolist())


@pytest.mark.parametrize("vocab", [1, 2, 31, 64, 257])
def test_ids_are_the_cpus_in_small_vocabularies(library, vocab):
    rng = np.random.default_rng(vocab)
    card = Card(library, vocab)
    filters = ({}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9})
    for slot, fields in enumerate(filters):
        card.admit(slot, params_of(seed=slot, logprobs=slot * 20, **fields))
    for kind in ("usual", "ties"):
        card.step(random_logits(rng, 6, vocab, kind), range(6), gap=3)


def test_ids_are_the_cpus_in_a_large_vocabulary(library):
    vocab, rng = 50_257, np.random.default_rng(3)
    card = Card(library, vocab, multiprocessors=9)
    fields = ({}, {"top_k": 50}, {"top_p": 0.95}, {"top_k": 40_000, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 20}, {"min_p": 1e-4})
    for slot, field in enumerate(fields):
        card.admit(slot, params_of(seed=slot + 77, **field))
    card.step(random_logits(rng, 6, vocab, "usual"), range(6))
    card.step(np.round(random_logits(rng, 6, vocab, "usual")), range(6))


@pytest.mark.parametrize("multiprocessors", [1, 2, 60])
def test_how_a_row_is_split_does_not_matter(library, multiprocessors):
    vocab, rng = 9_000, np.random.default_rng(4)
    card = Card(library, vocab, multiprocessors=multiprocessors)
    card.admit(0, params_of(seed=1, top_p=0.9, repetition_penalty=1.2, logit_bias=((vocab - 1, 3.0),)), (3, 4, 8_999))
    card.admit(1, params_of(temperature=0.0), (5,))
    for _ in range(2):
        card.step(random_logits(rng, 2, vocab, "usual"), [1, 0])
    card.step(np.repeat(random_logits(rng, 1, vocab, "ties"), 1, axis=0), [1])  # equal logits: the lowest id


def test_frequencies_are_the_probabilities(library):
    vocab, rows, steps = 20, 3 * ROWS, 9
    rng = np.random.default_rng(5)
    card = Card(library, vocab, slots=3 * ROWS)
    params = params_of(temperature=0.8, top_p=0.9)
    logits = random_logits(rng, 1, vocab, "usual") / 2
    for slot in range(rows):
        card.admit(slot, params_of(temperature=0.8, top_p=0.9, seed=(slot << 40) + slot))
    counts = np.zeros(vocab)
    for _ in range(steps):
        ids, _ = card.step(np.repeat(logits, rows, axis=0), range(rows))
        np.add.at(counts, list(ids), 1)
    expected = reference_distribution(logits[0], params, (0,), 1) * rows * steps
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom > 4 and chi < freedom + 4 * np.sqrt(2 * freedom)


def test_seeds_are_64_bits(library):
    rng = np.random.default_rng(6)
    logits = random_logits(rng, 1, 1000, "flat")
    seeds = (1, 1 + (1 << 32), 1 + (1 << 63), (1 << 64) - 1)
    card = Card(library, 1000)
    for slot, seed in enumerate(seeds):
        card.admit(slot, params_of(seed=seed))
    ids, _ = card.step(np.repeat(logits, 4, axis=0), range(4))
    assert len(set(ids)) == 4
    for token, seed in zip(ids, seeds, strict=True):
        assert token == sample_reference(logits[0], params_of(seed=seed), (0,), 1)[0]


def test_penalties_grow_with_the_answer(library):
    vocab, rng = 300, np.random.default_rng(7)
    card = Card(library, vocab)
    fields = (
        {"repetition_penalty": 1.5}, {"presence_penalty": 1.7}, {"frequency_penalty": -1.3}, {"repetition_penalty": 0.5, "frequency_penalty": 0.7},
        {"repetition_penalty": 3.0, "presence_penalty": -0.5, "frequency_penalty": 2.0, "logit_bias": ((7, 3.5), (8, -100.0)), "min_tokens": 3},
    )  # fmt: skip
    for slot, field in enumerate(fields):
        card.admit(slot, params_of(temperature=0.0 if slot % 2 else 0.9, seed=slot, **field), (7, 8, 9, 9, 7, 7), num_prompt=3, eos=(7, 12))
    logits = random_logits(rng, 1, vocab, "usual")  # the same each step: what was said is what changes
    logits[0, [7, 9]] += 6
    for _ in range(6):
        known = {slot: tuple(ids) for slot, ids in card.known.items()}
        ids, _ = card.step(np.repeat(logits, 5, axis=0), range(5))
        for slot in (1, 3):
            params = params_of(temperature=0.0, **fields[slot])
            assert ids[slot] == sample_reference(logits[0], params, known[slot], 3, (7, 12))[0]


def test_a_count_stops_at_what_15_bits_hold(library):
    card = Card(library, 64, slots=1)
    admit = Admit(0, (5,) * 40_000, 1, (), params_of(max_tokens=50_000, temperature=0.0, presence_penalty=0.5))
    ids = torch.full((2, 40_010), UNWRITTEN, dtype=torch.int32)
    card.sampler.admit(admit)
    logits = torch.zeros(1, 64)
    logits[0, 5] = 10.0
    sampled, _ = card.sampler.sample(logits, torch.zeros(1, dtype=torch.int32), [0], ids)()
    assert sampled == (5,) and ids[0, 40_000] == 5
    assert int(card.sampler._seen[0, 5]) == 0x7FFF


def test_min_tokens_and_the_kernels_that_a_step_needs(library):
    card = Card(library, 64)
    logits = np.zeros((1, 64), np.float32)
    logits[0, [3, 9, 11]] = (9, 8, 7)
    card.admit(0, params_of(temperature=0.0, min_tokens=2, stop_token_ids=(9,)), eos=(3,))
    launched = []
    for _ in range(3):
        launched.append((card.step(logits, [0])[0], tuple(card.device.launches)))
    edits, plain = ("scan_8_True_256",), ("scan_8_False_256",)
    assert launched == [((11,), edits), ((11,), edits), ((3,), plain)]
    card.admit(1, params_of(seed=3, logprobs=2))
    card.step(np.repeat(logits, 2, axis=0), [0, 1])
    assert card.device.launches == ["scan_8_False_256", "draw_8_512", "logprobs_8_512"]
    card.sampler.release(1)
    card.host.release(1)
    card.admit(0, params_of(temperature=0.0, min_tokens=1, ignore_eos=True, stop_token_ids=(9,)), eos=(3,))
    assert card.step(logits, [0])[0] == (3,)


BAD = [np.nan, -np.nan, np.inf]


def test_bad_rows_are_marked_and_their_neighbours_are_not_touched(library):
    vocab, rng = 1000, np.random.default_rng(9)
    card = Card(library, vocab)
    logits = random_logits(rng, 12, vocab, "usual")
    for slot in range(12):
        fields = ({"temperature": 0.0}, {"top_p": 0.9, "logprobs": 3}, {"repetition_penalty": 1.1, "logprobs": 3})[slot % 3]
        card.admit(slot, params_of(seed=slot, **fields), (1, 2, 999))
    for slot, bad in zip(range(3, 9), BAD * 2, strict=True):
        logits[slot, (slot * 300) % vocab] = np.copysign(bad, -1.0) if slot == 4 else bad
    logits[9:12] = -np.inf
    ids, logprobs = card.step(logits, range(12))
    assert ids[3:] == (BAD_LOGITS,) * 9 and min(ids[:3]) >= 0
    assert [row for row, _ in logprobs] == [1, 2]
    good = random_logits(rng, 12, vocab, "usual")
    assert min(card.step(good, range(12))[0]) >= 0  # a bad row left its slot as it was


def test_what_masks_leave_nothing_of(library):
    vocab = 64
    card = Card(library, vocab)
    everything = tuple((token,) for token in range(vocab))
    card.admit(0, params_of(bad_words=everything))
    card.admit(1, params_of(bad_words=everything[1:], temperature=0.0))
    card.admit(2, params_of(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2))
    card.admit(3, params_of(stop_token_ids=tuple(range(vocab)), min_tokens=2))
    card.admit(4, params_of(allowed_token_ids=(5, 9), logit_bias=((9, 4.0),), logprobs=2))
    card.admit(5, params_of(allowed_token_ids=(5, 9)))
    logits = np.random.default_rng(0).standard_normal((6, vocab)).astype(np.float32)
    logits[5] = -np.inf
    ids, _ = card.step(logits, range(6))
    assert ids[:4] == (NOTHING_LEFT, 0, NOTHING_LEFT, BAD_LOGITS) and ids[4] in (5, 9) and ids[5] == BAD_LOGITS
    logits[0, 3], logits[2, 5] = np.nan, np.inf
    assert card.step(logits, range(6))[0][:3:2] == (BAD_LOGITS, BAD_LOGITS)  # masks hide no bad logit


def test_bad_words_go_on_from_the_answer(library):
    vocab = 64
    card = Card(library, vocab)
    words = ((1, 2, 3), (3, 3), (4,), (9, 8, 7, 6, 5))
    card.admit(0, params_of(temperature=0.0, bad_words=words, repetition_penalty=1.01), (9, 8, 7, 6), num_prompt=4)
    card.admit(1, params_of(temperature=0.0, bad_words=words), (9, 8, 7, 6, 1), num_prompt=4)
    ranked = np.zeros((2, vocab), np.float32)
    for order, token in enumerate((5, 1, 2, 3, 4)):
        ranked[:, token] = 20 - order
    for best in (4, 2, 3, 3, 3, 1, 2, 3):
        logits = ranked.copy()
        logits[:, best] = 30
        card.step(logits, [0, 1])
    assert 4 not in card.known[0] and card.known[1][:7] == [9, 8, 7, 6, 1, 5, 2]


def test_a_grammar_says_what_may_come(library):
    vocab = 100
    card = Card(library, vocab, slots=3)
    slots = torch.arange(3, dtype=torch.int32)
    for slot in range(3):
        card.sampler.admit(Admit(slot, (1,), 1, (), params_of(temperature=0.0, allowed_token_ids=(3, 40, 99) if slot == 1 else ()), ()))
    logits = torch.arange(100.0).repeat(3, 1)
    words = np.zeros(4, np.uint32)
    words[0], words[1] = 1 << 3 | 1 << 17, 1 << 8  # ids 3, 17, 40
    card.sampler.allow(0, words)
    card.sampler.allow(1, words)
    sample = card.sampler.sample
    assert sample(logits.clone(), slots, [0, 1, 2], card.ids)()[0] == (40, 40, 99)
    words[1] = 0
    card.sampler.allow(0, words)
    card.sampler.allow(1, np.zeros(4, np.uint32))
    assert sample(logits.clone(), slots, [0, 1, 2], card.ids)()[0] == (17, NOTHING_LEFT, 99)
    card.sampler.release(0)
    card.sampler.admit(Admit(0, (1,), 1, (), params_of(temperature=0.0), ()))
    assert sample(logits.clone(), slots, [0, 1, 2], card.ids)()[0] == (99, NOTHING_LEFT, 99)
    with pytest.raises(ValueError, match="a mask is"):
        card.sampler.allow(0, words[:3])


def test_lists_grow_to_what_a_request_brings(library):
    vocab, rng = 2000, np.random.default_rng(11)
    card = Card(library, vocab)
    card.admit(0, params_of(seed=1, logit_bias=tuple((token, 1.5) for token in range(40))))
    many = tuple((int(token), float(rng.normal())) for token in rng.permutation(vocab)[:1500])
    card.admit(1, params_of(seed=2, logit_bias=many, stop_token_ids=tuple(range(300)), min_tokens=1, bad_words=((3, 4), (5,))))
    for _ in range(2):
        card.step(random_logits(rng, 2, vocab, "flat"), [0, 1])


def test_logprobs_are_of_the_raw_logits(library):
    vocab, rng = 700, np.random.default_rng(12)
    card = Card(library, vocab)
    for slot, k in enumerate((0, 1, 20, 128, -1)):
        card.admit(slot, params_of(seed=slot, logprobs=k, logit_bias=((5, 50.0),) if slot % 2 else ()), (1, 2))
    logits = random_logits(rng, 5, vocab, "usual")
    logits[2, 15:] = -np.inf  # fewer than were asked for
    logits[3] = np.round(logits[3])
    ids, logprobs = card.step(logits, range(5))
    assert [row for row, _ in logprobs] == [0, 1, 2, 3] and ids[1] == 5
    for row, given in logprobs:
        wanted = reference_logprobs(logits[row], ids[row], (0, 1, 20, 128)[row])
        assert (given.rank, given.top_ids) == (wanted.rank, wanted.top_ids)
        np.testing.assert_allclose([given.logprob, *given.top_logprobs], [wanted.logprob, *wanted.top_logprobs], atol=1e-5)


def test_prompt_ids_are_scored_as_on_the_host(library):
    vocab, rng = 300, np.random.default_rng(13)
    card = Card(library, vocab)
    count = 7
    logits = random_logits(rng, count, vocab, "usual")
    logits[2, 5], logits[3] = np.nan, -np.inf
    numbers = np.arange(count, dtype=np.int32)
    scored = Scored(numbers, numbers // 4, numbers + 1, rng.integers(0, vocab, count).astype(np.int32), [0, 5, 3, 3, 128, 9, 1])
    assert card.sampler.score(torch.from_numpy(logits.copy()), scored)() == card.host.score(logits, scored)


def test_padding_rows_touch_nothing(library):
    vocab, rng = 64, np.random.default_rng(14)
    card = Card(library, vocab, slots=4)
    card.admit(0, params_of(seed=1, frequency_penalty=0.5))
    card.admit(1, params_of(seed=2, logprobs=2))
    logits = torch.from_numpy(random_logits(rng, 4, vocab, "usual"))
    slots = [0, 4, 1, 4]  # 4: the dummy
    before = card.sampler._params[4].clone()
    padded, logprobs = card.sampler.sample(logits.clone(), torch.tensor(slots, dtype=torch.int32), slots, card.ids)()
    assert [row for row, _ in logprobs] == [2]
    assert torch.equal(card.sampler._params[4], before) and (card.ids[4] == UNWRITTEN).all()
    wanted, _ = card.host.sample(logits.numpy()[[0, 2]], [0, 1])
    assert [padded[0], padded[2]] == wanted


def test_a_slot_forgets_who_had_it(library):
    vocab, rng = 64, np.random.default_rng(15)
    card = Card(library, vocab)
    busy = params_of(
        seed=9, temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0, frequency_penalty=1.0, logit_bias=((1, 9.0),), min_tokens=9,
        stop_token_ids=(2,), logprobs=3, allowed_token_ids=(1, 2, 3), bad_words=((1,),),
    )  # fmt: skip
    card.admit(0, busy, (1, 2, 3, 3), num_prompt=2)
    card.step(random_logits(rng, 1, vocab, "usual"), [0])
    for fields in ({"temperature": 0.0}, {"presence_penalty": 1.0, "seed": 4}, {"bad_words": ((5, 6),), "min_tokens": 1}):
        card.admit(0, params_of(**fields), (7,))
        for _ in range(2):
            card.step(random_logits(rng, 1, vocab, "usual"), [0])


def test_the_portable_variants_run(library):
    vocab, rng = 500, np.random.default_rng(16)
    card = Card(library, vocab, cc=PORTABLE)
    fields = ({"top_k": 30, "top_p": 0.9}, {"temperature": 0.0}, {"repetition_penalty": 1.2, "logprobs": 4}, {"min_p": 0.1, "logprobs": 9})
    for slot, field in enumerate(fields):
        card.admit(slot, params_of(seed=slot, **field), (1, 2, 3))
    for _ in range(2):
        card.step(random_logits(rng, 4, vocab, "usual"), [3, 1, 0, 2])


def test_wrong_shapes_are_refused(library):
    card = Card(library, 64, slots=2)
    slots = torch.zeros(2, dtype=torch.int32)
    for logits, rows in ((torch.zeros(1, 63), [0]), (torch.zeros(1, 64, dtype=torch.float64), [0]), (torch.zeros(1, 64), [0, 1])):
        with pytest.raises(ValueError, match="logits are"):
            card.sampler.sample(logits, slots, rows, card.ids)
    with pytest.raises(ValueError, match="a vocabulary of 524289 ids"):
        GpuSampler(library()[0], card.device, 1, (1 << 19) + 1)


def test_the_bytes_are_those_that_are_allocated(library):
    card = Card(library, 1000, slots=5)
    held = {t.data_ptr(): t.nbytes for t in vars(card.sampler).values() if isinstance(t, torch.Tensor)}
    assert sum(held.values()) == GpuSampler.nbytes(5, 1000, card.device.multiprocessors)


def check(ptx, *cards):
    for cc in cards:
        resources = assemble(ptx, cc)[1]
        assert (resources.stack_bytes, resources.spill_bytes) == (0, 0), (cc, resources)


def test_no_stack_and_no_spills(library):
    """Nothing in these kernels depends on the card, so one text stands for 7.5 to 8.9; `bench/compile_only.py` makes one for each."""
    for cards in (((9, 0),), (PORTABLE, (8, 0), (8, 6), (8, 9))):
        made, device = library(cards[0])
        for variant in GpuSampler(made, device, 1, 1000).variants:
            made.load([variant])
            check(made._path(variant).read_text(), *cards)


def test_a_vocabulary_beyond_262144_has_kernels_of_its_own():
    sampler = GpuSampler(None, EmulatedDevice(), 1, 300_000)
    draw = sampler.variants[2]
    assert draw == Variant("engine.cuda.sampling_kernels", "draw", (10, 512))
    check(to_ptx(draw, (9, 0)), (9, 0))
