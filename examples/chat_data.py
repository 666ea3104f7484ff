"""Conversations for a chat model, made from story books: a request that names something, and a story full of it.

    python examples/chat_data.py make 'corpus/books/*.txt' --heldout corpus/heldout.txt --out chat
    python examples/chat_data.py check stories-chat --requests chat/requests.json

examples/finetune-chat.yaml says what makes the bundled model of it.

Books hold tales separated by three line feeds and paragraphs separated by two. A reply is a first line and a run of
paragraphs that holds a noun of examples/chat_words.py three times or more, for the first time near its beginning. A
noun that has few such passages is also told of in those of others of its kind, its word in place of theirs: so no noun
is rare, and what a story is about can only be learnt from the request.

The check asks in three ways for what stands in no conversation: a noun in words that it was never asked for in, a noun
in words that nothing was ever asked for in, and a noun that was never asked for.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from chat_words import (
    ADJECTIVES,
    AMBIGUOUS,
    GO_ON,
    IRREGULAR,
    KINDS,
    NEXT,
    NOUNS,
    ONLY_ONE,
    SMALL_TALK,
    UNCOUNTED,
    UNSEEN,
    UNSEEN_WORDINGS,
    WORDINGS,
)

_SHARE_OF_NEXT, _SHARE_OF_GO_ON, _SHARE_OF_TALK = 0.2, 0.15, 0.03
_SHARE_OF_PLURALS, _SHARE_OF_ADJECTIVES, _SHARE_OF_CARELESS = 0.08, 0.1, 0.15
_LONGEST, _SHORTEST = 800, 250  # characters of a reply
_BORROWED = 10  # stories of others at least, so that the passage alone does not tell the noun
_ENDS, _SPEECH = (".", "!", "?", '"', "'"), ('"', "'")


class Story(NamedTuple):
    """A run of paragraphs about a noun, and the run after it in the same tale ("" where there is none)."""

    noun: str
    text: str
    after: str


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeiou" and not word.lower().startswith("uni") else "a"


def with_article(noun: str) -> str:
    if noun in UNCOUNTED:
        return noun
    if noun in ONLY_ONE:
        return f"the {noun}"
    return f"{_article(noun)} {noun}"


def count(noun: str, text: str) -> int:
    """How often the noun stands in the text, singular or plural."""
    return len(re.findall(rf"\b(?:{noun}|{plural(noun)})\b", text, re.IGNORECASE))


def told_of(noun: str, story: Story) -> Story:
    """The same story with another noun in its own noun's place."""
    words = {story.noun: noun, plural(story.noun): plural(noun)}

    def put(found: re.Match[str]) -> str:
        word = words[found[2].lower()]
        word = word.capitalize() if found[2][0].isupper() else word
        article = found[1]
        if article:
            article = article[0] + _article(word)[1:] + " "
        return article + word

    places = re.compile(rf"\b((?:an? )?)({story.noun}|{plural(story.noun)})\b", re.IGNORECASE)
    return Story(noun, places.sub(put, story.text), places.sub(put, story.after))


def stories(paths: Sequence[Path], early: int) -> Iterator[Story]:
    """None overlaps another."""
    for path in paths:
        for tale in path.read_text(encoding="utf-8").split("\n\n\n"):
            for paragraphs in _passages(tale):
                start = 0
                while start < len(paragraphs):
                    for end in _ends(paragraphs, start):
                        text = "\n\n".join(paragraphs[start:end])
                        # No story begins with an answer.
                        if not text.startswith(_SPEECH) and (noun := _subject(text, early)):
                            after = next(_ends(paragraphs, end), end)
                            yield Story(noun, text, "\n\n".join(paragraphs[end:after]))
                            start = end
                            break
                    else:
                        start += 1


def _passages(tale: str) -> Iterator[list[str]]:
    """The paragraphs of a tale, parted where a heading or a verse stands: what does not end as a sentence does."""
    passage: list[str] = []
    for paragraph in tale.strip().split("\n\n"):
        if paragraph[-1:] in (*_ENDS, ":", ",") and "\n" not in paragraph and not paragraph.isupper():
            passage.append(paragraph)
            continue
        yield passage
        passage = []
    yield passage


def _ends(paragraphs: Sequence[str], start: int) -> Iterator[int]:
    """Ends of the runs from `start` on that are as long as a reply and end as a sentence does, the shortest first."""
    size = 0
    for end in range(start + 1, len(paragraphs) + 1):
        size += len(paragraphs[end - 1]) + 2
        if size > _LONGEST + 2:
            return
        if size >= _SHORTEST and paragraphs[end - 1][-1] in _ENDS:
            yield end


def _subject(text: str, early: int) -> str | None:
    """The noun that it holds most often, if that is three times, for the first time in the first `early` letters."""
    words = Counter(re.findall(r"[a-z]+", text.lower()))
    found = {noun: words[noun] + (plural(noun) != noun) * words[plural(noun)] for noun in NOUNS}
    noun = max(found, key=lambda n: (found[n], len(n)))
    return noun if found[noun] >= 3 and count(noun, text[:early]) and noun not in AMBIGUOUS else None


def shared_out(found: Sequence[Story], most: int, least: int, draw: random.Random) -> list[Story]:
    """Each noun's own stories, `most` of them, and some of others of its kind, told of it, so that it has `least`."""
    own = defaultdict(list)
    for story in draw.sample(found, len(found)):
        own[story.noun].append(story)
    shared = []
    for nouns in KINDS.values():
        kind = nouns.split()
        for noun in kind:
            mine = own[noun][:most]
            others = [story for mate in kind if mate != noun for story in own[mate] if not count(noun, story.text)]
            wanted = min(len(others), max(_BORROWED, least - len(mine)))
            shared += mine + [told_of(noun, story) for story in draw.sample(others, wanted)]
    return draw.sample(shared, len(shared))


class Asking:
    """Draws requests, but never one that is held out."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        self.held_out = {noun: draw.choice(WORDINGS[:-1]) for noun in NOUNS}

    def requests(self) -> list[dict]:
        """What to check a model by: {"noun", "request", "new": what about it stands in no conversation}."""
        asked = [("pair of noun and wording", noun, self.held_out[noun]) for noun in NOUNS]
        asked += [("wording", noun, self.draw.choice(UNSEEN_WORDINGS)) for noun in NOUNS]
        asked += [("noun", noun, self.draw.choice(WORDINGS[:-1])) for noun in UNSEEN]
        return [{"noun": n, "request": wording.format(a=with_article(n)), "new": new} for new, n, wording in asked]

    def story(self, story: Story, wordings: Sequence[str] = WORDINGS) -> list[dict]:
        """A request and the story, whose first line says again what was asked for."""
        what = self._what(story.noun)
        wording = self.draw.choice([w for w in wordings if w != self.held_out[story.noun]])
        request = wording.format(a=what)
        if self.draw.random() < _SHARE_OF_CARELESS:
            request = request.lower().rstrip(".?!")
        return _say(request, f"Here is a story about {what}.\n\n{story.text}")

    def _what(self, noun: str) -> str:
        shape = self.draw.random()
        if noun not in (*UNCOUNTED, *ONLY_ONE):
            if shape < _SHARE_OF_PLURALS:
                return plural(noun)
            if shape < _SHARE_OF_PLURALS + _SHARE_OF_ADJECTIVES:
                return with_article(f"{self.draw.choice(ADJECTIVES)} {noun}")
        return with_article(noun)


def conversations(paths: Sequence[Path], early: int, most: int, least: int, asking: Asking) -> list[dict]:
    """{"messages"}, …: stories about all nouns, asked for one after another or gone on with, and small talk."""
    draw = asking.draw
    told, made = iter(shared_out(list(stories(paths, early)), most, least, draw)), []
    for story in told:
        messages = asking.story(story)
        if draw.random() < _SHARE_OF_TALK:
            words, answer = draw.choice(SMALL_TALK)
            messages = _say(draw.choice(words), answer) + messages
        if story.after and draw.random() < _SHARE_OF_GO_ON:
            messages += _say(draw.choice(GO_ON), story.after)
        elif draw.random() < _SHARE_OF_NEXT and (another := next(told, None)):
            messages += asking.story(another, NEXT)
        made.append({"messages": messages})
    for words, answer in SMALL_TALK:
        made += [{"messages": _say(word, answer)} for word in words for _ in range(4)]
    draw.shuffle(made)
    return made


def _say(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def make(patterns: Sequence[str], heldout: str, out: Path, early: int, most: int, least: int, seed: int) -> None:
    asking = Asking(random.Random(seed))
    train = conversations(_files(patterns), early, most, least, asking)
    requests = asking.requests()
    out.mkdir(parents=True, exist_ok=True)
    # Each as it stands in a tale that is not trained on, not even told of another noun.
    tests = [{"messages": asking.story(story)} for story in stories(_files([heldout]), early)] if heldout else []
    for name, lines in (("train", train), ("heldout", tests)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (out / "requests.json").write_text(json.dumps(requests, indent=1) + "\n", encoding="utf-8")
    letters = sum(len(message["content"]) for line in train for message in line["messages"])
    print(
        f"{out}: {len(train)} conversations, {letters / 1e6:.1f} MB, {len(tests)} held-out ones, "
        f"{len(requests)} held-out requests"
    )


def _files(patterns: Sequence[str]) -> list[Path]:
    paths = sorted({Path(name) for pattern in patterns for name in glob.glob(pattern)})
    if not paths:
        raise SystemExit(f"{', '.join(patterns)}: no such file")
    return paths


def check(model: str, requests: Path, seed: int) -> None:
    """How many of the requests get a story that holds the noun twice, its first line apart, and ends by itself."""
    from maestrale import LLM, SamplingParams

    llm = LLM(model, max_len=1024)
    asked, right = Counter[str](), Counter[str]()
    for request in json.loads(requests.read_text(encoding="utf-8")):
        params = SamplingParams(max_tokens=400, temperature=0.7, top_p=0.9, seed=seed)
        reply = llm.chat([{"role": "user", "content": request["request"]}], params)
        title, _, story = reply.text.partition("\n\n")
        times, ended = count(request["noun"], story), reply.finish_reason == "stop"
        new = request.get("new", "request")
        asked[new] += 1
        right[new] += times >= 2 and ended
        words = " ".join(story.split())
        print(f"{request['noun']:12} {times:2} times, {'ended' if ended else 'cut off'}: {title[22:40]}: {words[:80]}")
    for new, times in asked.items():
        print(
            f"{right[new]} of {times} whose {new} is new ended by themselves and hold what was asked for twice or more"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations from story books, and a check of who learnt from them.")
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("what", nargs="+", help="make: text files, may hold *; check: a model folder")
    parser.add_argument("--heldout", default="", help="a text file of other tales, to measure the loss by")
    parser.add_argument("--out", type=Path, default=Path("chat"))
    parser.add_argument("--requests", type=Path, default=Path("chat/requests.json"))
    parser.add_argument(
        "--most", type=int, default=80, help="a noun's own stories at most, so that none is all there is"
    )
    parser.add_argument("--least", type=int, default=40, help="a noun's stories at least, so that none is rare")
    parser.add_argument("--early", type=int, default=100, help="a story names its noun within so many letters")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.action == "make":
        make(options.what, options.heldout, options.out, options.early, options.most, options.least, options.seed)
    else:
        check(options.what[0], options.requests, options.seed)


if __name__ == "__main__":
    main()
