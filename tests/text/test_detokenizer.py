"""Pieces of an answer add up to the whole, and no piece holds half a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from text.detokenizer import Detokenizer
from text.tokenizer import Tokenizer


def cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    """`items` in pieces whose lengths are `cuts`, then one by one."""
    pieces, at = [], 0
    for n in cuts:
        pieces.append(items[at : at + n])
        at += n
    return pieces + [[i] for i in items[at:]]


def streamed(tokenizer: Tokenizer, pieces: list[list[int]], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*[detokenizer.push(piece) for piece in pieces], detokenizer.flush()]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), skip_special=st.booleans(), continuation=st.booleans())
def test_the_sum_is_the_decode(tiny: Tokenizer, data: st.DataObject, skip_special: bool, continuation: bool) -> None:
    """Random ids: mostly invalid UTF-8, with control tokens and ids of the embedding's padding in between."""
    ids = data.draw(st.lists(st.integers(0, tiny.vocab_size + 2), max_size=30))
    pieces = cut(ids, data.draw(st.lists(st.integers(0, 4), max_size=10)))
    options = {"skip_special": skip_special, "continuation": continuation}
    assert "".join(streamed(tiny, pieces, **options)) == tiny.decode(ids, **options)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), data=st.data())
def test_valid_text_never_shows_a_broken_character(tiny: Tokenizer, text: str, data: st.DataObject) -> None:
    text = text.replace("\ufffd", "")
    ids = tiny.encode(text)
    parts = streamed(tiny, cut(ids, data.draw(st.lists(st.integers(1, 3), max_size=10))))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


def test_a_character_over_four_tokens(byte_tokenizer: Tokenizer) -> None:
    assert streamed(byte_tokenizer, [[b] for b in "a\U0001f999b".encode()]) == ["a", "", "", "", "\U0001f999", "b", ""]


def test_an_answer_that_ends_inside_a_character(byte_tokenizer: Tokenizer) -> None:
    assert streamed(byte_tokenizer, [[0xF0], [0x9F]]) == ["", "", "\ufffd"]
    assert streamed(byte_tokenizer, [[0xF0], [0x41]]) == ["", "\ufffdA", ""]


def test_control_tokens_are_skipped_or_shown(byte_tokenizer: Tokenizer) -> None:
    assert streamed(byte_tokenizer, [[104], [259], [105]]) == ["h", "", "i", ""]
    assert streamed(byte_tokenizer, [[104], [259], [105]], skip_special=False) == ["h", "<|im_end|>", "i", ""]


def test_the_first_space_of_sentencepiece(tiny_spm: Tokenizer) -> None:
    ids = tiny_spm.encode("hello", add_special=True)
    assert "".join(streamed(tiny_spm, [[i] for i in ids])) == "hello"
    assert "".join(streamed(tiny_spm, [[i] for i in ids], continuation=True)) == " hello"
