"""The conversations of examples/chat_data.py: what is held out stands in none, and a story is told of another noun."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from chat_data import Asking, Story, conversations, count, make, plural, shared_out, told_of
from chat_words import KINDS, NOUNS, UNSEEN, UNSEEN_WORDINGS

TALE = (
    "A fox and an old owl lived in a wood. The fox was hungry, and foxes eat what they find, said the Fox to himself, "
    "and so he went out to see what there was to be had in the village behind the hill.\n\n"
    "And when the fox came home again in the evening, he had eaten so much that he could not get through his own door."
)


@pytest.fixture
def books(tmp_path):
    """A tale of a fox, and the same of each animal, man and thing that is easily told of so."""
    story = Story("fox", TALE, "")
    nouns = [noun for kind in ("animals", "men", "things") for noun in KINDS[kind].split()]
    texts = [TALE] + [told_of(noun, story).text for noun in nouns if noun != "fox" and not count(noun, TALE)]
    (tmp_path / "books.txt").write_text("\n\n\n".join(texts) + "\n")
    return tmp_path / "books.txt"


def test_a_story_is_told_of_another_noun_by_all_its_forms():
    told = told_of("elephant", Story("fox", TALE, "The fox slept.")).text
    assert told.startswith("An elephant and an old owl")
    assert "elephants eat" in told
    assert "said the Elephant to" in told
    assert count("fox", told) == 0
    assert told_of("unicorn", Story("owl", TALE, "")).text.startswith("A fox and an old unicorn")
    assert told_of("fox", Story("owl", "An owl!", "An owl.")) == Story("fox", "A fox!", "A fox.")


def test_plurals_are_those_of_english():
    words = {"wolf": "wolves", "fox": "foxes", "fairy": "fairies", "donkey": "donkeys", "fisherman": "fishermen"}
    assert {noun: plural(noun) for noun in words} == words


def test_nothing_that_is_held_out_is_asked_for(books):
    asking = Asking(random.Random(3))
    made = conversations([books], 100, 80, 40, asking)
    said = {message["content"] for talk in made for message in talk["messages"] if message["role"] == "user"}
    requests = asking.requests()
    assert len(said) > 500
    assert {one["noun"] for one in requests} == {*NOUNS, *UNSEEN}
    assert not said & {one["request"] for one in requests}
    stems = [wording.partition("{a}")[0] for wording in UNSEEN_WORDINGS]
    assert not any(text.startswith(stem) for text in said for stem in stems)
    assert not any(count(noun, text) for text in said for noun in UNSEEN)


def test_a_noun_that_has_few_stories_gets_those_of_its_kind():
    story = Story("fox", TALE, "")
    found = [story] * 100 + [told_of("wolf", story)] * 3
    shared = shared_out(found, 50, 20, random.Random(0))
    told = {noun: sum(one.noun == noun for one in shared) for noun in ("fox", "wolf", "bear", "owl", "king")}
    assert told == {"fox": 53, "wolf": 20, "bear": 20, "owl": 0, "king": 0}  # owls are in the tale already
    assert all(count(one.noun, one.text) == 5 for one in shared)


def test_held_out_conversations_are_those_of_other_tales(books, tmp_path):
    (tmp_path / "other.txt").write_text(TALE.replace("hungry", "thirsty"))
    make([str(books)], str(tmp_path / "other.txt"), tmp_path / "chat", 100, 80, 40, 0)
    assert "thirsty" in (tmp_path / "chat/heldout.jsonl").read_text()
    assert "thirsty" not in (tmp_path / "chat/train.jsonl").read_text()
    with pytest.raises(SystemExit, match="no such file"):
        make([str(tmp_path / "none*")], "", tmp_path / "chat", 100, 80, 40, 0)
