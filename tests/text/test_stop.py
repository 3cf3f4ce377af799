"""Stop strings against a slow and obvious search, for every way to cut the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.stop import StopMatcher

few = "ab\n"  # collisions are the interesting case
stops = st.lists(st.text(few, min_size=1, max_size=5), max_size=4)


def expected(text: str, wanted: list[str], include: bool) -> tuple[str, bool]:
    """Cut where a stop string is first complete; of several complete there, before the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in wanted if text[:end].endswith(s)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


def run(pieces: list[str], wanted: list[str], include: bool) -> tuple[str, bool]:
    matcher = StopMatcher(wanted, include=include)
    out = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            return out, True
    return out + matcher.flush(), False


@settings(max_examples=600, deadline=None, derandomize=True)
@given(text=st.text(few, max_size=24), wanted=stops, cuts=st.sets(st.integers(1, 23)), include=st.booleans())
def test_any_cut_gives_the_same(text: str, wanted: list[str], cuts: set[int], include: bool) -> None:
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert run(pieces, wanted, include) == expected(text, wanted, include)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(few, max_size=24), wanted=stops)
def test_no_more_is_held_back_than_could_begin_a_stop(text: str, wanted: list[str]) -> None:
    if expected(text, wanted, False)[1]:
        return
    matcher = StopMatcher(wanted)
    safe = "".join(matcher.push(c)[0] for c in text)
    held = max((n for n in range(len(text) + 1) for s in wanted if n < len(s) and text.endswith(s[:n])), default=0)
    assert safe == text[: len(text) - held]


def test_a_stop_over_four_pieces() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(p) for p in ["Hi\n", "\nU", "se", "r: x"]] == [("Hi", False), ("", False), ("", False), ("", True)]
    assert matcher.push("more") == ("", True) and matcher.flush() == ""


def test_held_text_comes_back() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a</e") == ("a", False)
    assert matcher.flush() == "</e"


def test_long_stops_and_long_text() -> None:
    stop = "ab" * 5000
    matcher = StopMatcher([stop + "c"])
    out = matcher.push(stop * 20)[0]
    assert len(out) + len(matcher.flush()) == 20 * len(stop)


def test_empty_stops_are_refused() -> None:
    with pytest.raises(ValueError):
        StopMatcher([""])
    with pytest.raises(ValueError):
        StopMatcher("abc")
