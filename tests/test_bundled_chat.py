"""The bundled chat model: it chats where nothing else is named, keeps its turn, and tells what it is asked for."""

import sys
from pathlib import Path

import pytest

from maestrale import LLM, SamplingParams
from maestrale.cli.options import talker
from maestrale.launch import BUNDLED

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from chat_data import count, with_article
from chat_words import NOUNS, UNSEEN_WORDINGS

FOLDER = BUNDLED / "stories-chat"


@pytest.fixture(scope="module")
def llm():
    return LLM(FOLDER, dtype="float32", backend="torch", max_len=1024)


def asked(llm, noun: str, wording: str = "Tell me a story about {a}."):
    params = SamplingParams(max_tokens=400, temperature=0.7, top_p=0.9, seed=0)
    return llm.chat([{"role": "user", "content": wording.format(a=with_article(noun))}], params)


def test_it_is_within_its_size_and_is_what_one_talks_with_by_default():
    assert (FOLDER / "consolidated.safetensors").stat().st_size <= 16_000_000
    assert talker(None) == FOLDER
    assert talker(Path("stories")) == Path("stories")


def test_its_tokenizers_name_says_that_it_chats(llm):
    assert llm.tokenizer.chats
    assert not LLM("stories", max_len=8).tokenizer.chats


def test_replies_end_by_themselves_and_keep_their_turn(llm):
    replies = [asked(llm, noun) for noun in NOUNS[:20]]
    assert sum(reply.finish_reason == "stop" for reply in replies) >= 18
    assert not any("[INST]" in reply.text or "[/INST]" in reply.text for reply in replies)


def test_a_second_turn_is_answered_too(llm):
    first = asked(llm, "fox")
    talk = [
        {"role": "user", "content": "Tell me a story about a fox."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And now one about a king."},
    ]
    reply = llm.chat(talk, SamplingParams(max_tokens=400, temperature=0.7, top_p=0.9, seed=0))
    assert reply.finish_reason == "stop"
    assert len(reply.text.split()) > 20


def test_the_reply_is_about_what_was_asked_more_often_than_by_chance(llm):
    """The asked noun stands in most replies to its own request, and in few of those to another's."""
    nouns = ["fox", "king", "princess", "horse", "wolf", "giant", "dragon", "bird"]
    replies = {noun: asked(llm, noun).text for noun in nouns}
    own = sum(count(noun, replies[noun]) >= 2 for noun in nouns)
    others = sum(count(noun, replies[other]) >= 2 for noun in nouns for other in nouns if other != noun)
    assert own >= 5
    assert others / 7 < own / 2


def test_most_of_twenty_requests_in_words_that_none_was_trained_on_get_what_they_ask_for(llm):
    nouns = NOUNS[:: len(NOUNS) // 20][:20]
    right = 0
    for i, noun in enumerate(nouns):
        reply = asked(llm, noun, UNSEEN_WORDINGS[i % len(UNSEEN_WORDINGS)])
        title, _, story = reply.text.partition("\n\n")
        assert title == f"Here is a story about {with_article(noun)}."
        right += count(noun, story) >= 2
    assert right >= 12


def test_the_card_names_data_command_and_losses():
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("maestrale finetune", "held-out loss", "of 20", "## Sample"))
