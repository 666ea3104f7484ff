import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestrale.sampling.stop import StopStrings


def pieces_of(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def run(stops, pieces):
    """→ (text emitted, whether stopped, how much had been emitted after each piece)."""
    matcher, out, stopped, shown = StopStrings(stops), "", False, []
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        out += safe
        shown.append(len(out))
    return out + matcher.finish(), stopped, shown


def cut_by_find(stops, text):
    """The same from the whole text: the match that is complete first, the longest of those."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(found)[1]], True) if found else (text, False)


def words(length):
    return ["".join(letters) for letters in itertools.product("ab", repeat=length)]


def test_every_short_text_and_stop_string_is_cut_as_find_cuts_it():
    short = [word for length in (1, 2, 3) for word in words(length)]
    pairs = [([a, b], text) for a in short for b in short for text in words(6)]
    singles = [([stop], text) for length in (3, 4, 5) for stop in words(length) for text in words(9)]
    for stops, text in pairs + singles:
        assert run(stops, list(text))[:2] == cut_by_find(stops, text)


letters = st.text("ab", max_size=40)
some_stops = st.lists(st.text("ab", min_size=2, max_size=6), max_size=4)


@given(some_stops, letters, st.lists(st.integers(0, 40), max_size=12))
def test_pieces_give_what_find_gives_on_the_whole_text(stops, text, cuts):
    out, stopped, _ = run(stops, pieces_of(text, cuts))
    assert (out, stopped) == cut_by_find(stops, text)


@given(some_stops, letters)
def test_only_what_may_become_a_stop_string_is_held_back(stops, text):
    _, _, shown = run(stops, list(text))
    for end in range(1, len(text) + 1):
        seen = text[:end]
        if cut_by_find(stops, seen)[1]:
            break
        beginnings = {stop[:i] for stop in stops for i in range(1, len(stop))}
        held = max((len(b) for b in beginnings if seen.endswith(b)), default=0)
        assert shown[end - 1] == end - held


def test_a_stop_string_split_over_three_pieces_stops():
    matcher = StopStrings(["</end>"])
    assert matcher.push("hello <") == ("hello ", False)
    assert matcher.push("/en") == ("", False)
    assert matcher.push("d> more") == ("", True)
    assert matcher.push("later") == ("", True)
    assert matcher.finish() == ""


def test_a_beginning_that_comes_to_nothing_is_passed_on():
    matcher = StopStrings(["</end>"])
    assert matcher.push("a </e") == ("a ", False)
    assert matcher.push("x") == ("</ex", False)
    assert matcher.push("<") == ("", False)
    assert matcher.finish() == "<"
    assert matcher.finish() == ""


def test_the_stop_that_is_complete_first_wins_and_the_longest_of_those():
    assert run(["abcdef", "cd"], ["abcdefg"])[0] == "ab"
    assert run(["cd", "bcd"], ["abcd"])[0] == "a"


def test_without_stop_strings_all_passes_at_once():
    matcher = StopStrings(())
    assert matcher.push("anything") == ("anything", False)
    assert matcher.finish() == ""


@pytest.mark.parametrize("piece", [1, 100_000])
def test_the_cost_is_linear_for_a_text_of_near_matches(piece):
    text = "a" * 100_000
    started = time.process_time()
    out, stopped, _ = run(["a" * 999 + "b"], [text[i : i + piece] for i in range(0, len(text), piece)])
    assert (out, stopped) == (text, False)
    assert time.process_time() - started < 3  # a quadratic search takes minutes
