"""Quality: how texts become windows, and that the distances are the textbook's."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest

import numbatch
from bench import quality
from bench.quality import Scores, Text, distance, divergence
from bench.texts import Piece, Window, read_pieces, windows
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.toy import toy_checkpoint
from text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def ids_scored(work: list[Window]) -> list[int]:
    return [i for window in work for i in window.ids[window.first :]]


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 14, 15, 29, 100])
@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (10, 1), (2, 1)])
def test_every_id_is_scored_once_with_enough_before_it(length: int, window: int, stride: int) -> None:
    work = windows([Piece(list(range(length)))], window, stride, 10_000)
    assert ids_scored(work) == list(range(1, length))
    assert all(len(w.ids) <= window and w.scored >= 1 for w in work)
    assert all(w.ids == list(range(w.ids[0], w.ids[0] + len(w.ids))) for w in work)
    for w in work[1:]:
        assert w.first >= max(1, min(window - stride, w.ids[w.first]))  # what stands before the first that it scores


def test_a_window_inside_a_text_begins_as_the_text_does() -> None:
    work = windows([Piece([256, *range(20)])], 8, 4, 10_000, bos=256)
    assert all(w.ids[0] == 256 and len(w.ids) <= 8 for w in work)
    assert ids_scored(work) == list(range(20))


def test_given_ids_are_not_scored_and_the_budget_is_kept() -> None:
    pieces = [Piece(list(range(10)), 6), Piece(list(range(100, 140)), 30)]
    assert ids_scored(windows(pieces, 16, 8, 1000)) == [6, 7, 8, 9, *range(130, 140)]
    assert ids_scored(windows(pieces, 16, 8, 6)) == [6, 7, 8, 9, 130, 131]


def test_json_lines_say_what_is_predicted(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows: list[object] = [
        {"text": "ab"}, "cd", {"prompt": "q", "completion": "xy"}, {"prompt": "q", "answer": "z"},
        {"messages": [{"role": "user", "content": "u"}]}, {"conversations": [{"from": "gpt", "value": "v"}]},
    ]  # fmt: skip
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    pieces = read_pieces(file, TOKENIZER, lambda messages: [len(messages), *messages[0]["role"].encode()], 1000)
    assert [(bytes(p.ids), p.first) for p in pieces[:4]] == [(b"ab", 1), (b"cd", 1), (b"qxy", 1), (b"qz", 1)]
    assert [bytes(p.ids) for p in pieces[4:]] == [b"\x01user", b"\x01assistant"]
    assert len(read_pieces(file, TOKENIZER, None, 1)) == 1  # no more than is needed


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "mine.jsonl:2: this is not JSON"),
        ("[1]", "a JSON object or a string"),
        ('{"question": "q"}', "none of text, messages, or prompt with completion; it has question"),
        ('{"text": 3}', "text is not a string"),
        ('{"messages": [{"role": "user"}]}', "objects with role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "a conversation needs a chat template"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl:2: ") as caught:
        read_pieces(file, TOKENIZER, None, 1000)
    assert sentence in str(caught.value)


def scores(rows: np.ndarray, ids: list[int], k: int) -> Scores:
    """As an engine gives them for logits `rows` [N, vocab]."""
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    picked = np.take_along_axis(logprobs, order, axis=1).astype(np.float32)
    return Scores(logprobs[np.arange(len(ids)), ids], order.astype(np.int32), picked, np.array(ids, np.int32))


def test_the_divergence_is_exact_where_all_ids_are_named_and_never_more_where_not() -> None:
    rng = np.random.default_rng(0)
    ours, ids = rng.normal(size=(50, 40)) * 3, [0] * 50
    theirs = ours + rng.normal(size=(50, 40)) * 0.3
    p = np.exp(ours) / np.exp(ours).sum(axis=1, keepdims=True)
    log_q = theirs - np.log(np.exp(theirs).sum(axis=1, keepdims=True))
    exact = (p * (np.log(p) - log_q)).sum(axis=1)
    whole, mass = divergence(scores(ours, ids, 40), scores(theirs, ids, 40))
    np.testing.assert_allclose(whole, exact, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    some, less = divergence(scores(ours, ids, 12), scores(theirs, ids, 12))
    assert (some <= exact + 1e-5).all() and (less < 1).all() and some.mean() > 0.8 * exact.mean()


def test_distance_of_a_model_from_itself_and_from_a_worse_one() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30, 640).tolist()
    good = rng.normal(size=(640, 30))
    good[np.arange(640), ids] += 2
    bad = good.copy()
    bad[np.arange(640), ids] -= 0.1
    zero = distance(scores(good, ids, 30), scores(good, ids, 30))
    assert (zero.perplexity_change, zero.kl_mean, zero.same_top1) == (0, 0, 1)
    found = distance(scores(good, ids, 30), scores(bad, ids, 30))
    assert 0.03 < found.change_low < found.perplexity_change < found.change_high < 0.1
    ratio = scores(bad, ids, 30).perplexity / scores(good, ids, 30).perplexity
    assert math.isclose(found.perplexity_change, ratio - 1, rel_tol=1e-9)
    with pytest.raises(ValueError, match="the same ids"):
        distance(scores(good, ids, 30), scores(good, [0] * 640, 30))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toy_checkpoint(tmp_path_factory.mktemp("quality") / "toy")
    byte_tokenizer(path)
    return path


def test_scores_are_those_of_one_long_prompt(toy: Path, tmp_path: Path) -> None:
    """Windows of one document that fits into one are the document; the exact perplexity is what /get_ppl's mean gives."""
    file = tmp_path / "a.txt"
    file.write_text("Once upon a time there was a little toy.")
    config = quality.quiet(str(toy), ["engine.device=reference"])
    whole = asyncio.run(quality.measure(config, Text(file, 1024, 512, 1000)))
    pieces = asyncio.run(quality.measure(config, Text(file, 16, 1, 1000)))
    assert len(whole.ids) == len(pieces.ids) == 39
    np.testing.assert_allclose(whole.logprobs[:15], pieces.logprobs[:15], atol=1e-4)
    assert not np.allclose(whole.logprobs[20:], pieces.logprobs[20:], atol=1e-4)  # these have less before them


def test_the_perplexity_is_that_of_get_ppl(toy: Path, tmp_path: Path) -> None:
    """The Python API adds the same logprobs up by another way."""
    text = "Once upon a time there was a little toy."
    file = tmp_path / "a.txt"
    file.write_text(text)
    found = asyncio.run(quality.measure(quality.quiet(str(toy), ["engine.device=reference"]), Text(file)))
    with numbatch.pipeline(str(toy), device="reference") as pipe:
        assert math.exp(pipe.get_ppl(text)[0]) == pytest.approx(found.perplexity, rel=1e-6)
        likeliest = pipe(pipe.tokenizer.encode(text)[:20], numbatch.GenerationConfig(max_new_tokens=1, ignore_eos=True)).token_ids[0]
    assert found.top_ids[19, 0] == likeliest  # what greedy decoding says after twenty of its ids


def test_the_command_on_a_toy(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Once upon a time there was a little toy." * 3)
    words = [
        "--model",
        str(toy),
        "--data",
        str(file),
        "--set",
        "engine.device=reference",
        "--tokens",
        "64",
        "--window",
        "32",
        "--stride",
        "16",
    ]
    assert quality.main([*words, "--against", str(toy), "--json"]) == 0
    printed = capsys.readouterr().out
    out = json.loads(printed.splitlines()[-1])
    assert out["tokens"] == 64 and out["perplexity_change"] == 0 and out["kl_mean"] == 0 and out["same_top1"] == 1
    assert f"{out['perplexity']:.4f}" in printed and "same first choice" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "empty.txt"], "holds nothing to predict"),
        (["--data", "a.txt", "--stride", "99", "--window", "50"], "--stride 1 .. --window; they are 50 and 99"),
        (["--data", "latin.txt"], "latin.txt is not UTF-8"),
        (["--data", "a.txt", "--set", "engine.nothing=1"], "nothing"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert quality.main(["--model", str(toy), "--set", "engine.device=reference", *words]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and not printed.out
