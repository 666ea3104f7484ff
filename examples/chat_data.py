"""Conversations for a chat model, made from story books: a request that names something, and a story full of it.

    python examples/chat_data.py make 'corpus/books/*.txt' --out chat
    maestrale finetune stories chat/train.jsonl --heldout chat/heldout.jsonl --config examples/finetune-chat.yaml
    python examples/chat_data.py check stories-chat --requests chat/requests.json

Books hold tales separated by three line feeds and paragraphs separated by two. A reply is a first line and a run of
paragraphs that holds one of NOUNS three times or more, for the first time near its beginning. The 20 requests of the
check stand in no conversation.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

NOUNS = """
fox wolf bear lion tiger elephant monkey horse pony donkey cow goat sheep lamb pig dog cat mouse rat rabbit hare hen
cock goose duck eagle raven crow owl swan bird frog toad snake fish whale spider bee king queen prince princess
giant dwarf witch wizard fairy dragon ogre troll mermaid ghost soldier sailor captain miller tailor shoemaker
fisherman farmer shepherd hunter merchant robber thief beggar doctor teacher cook baker smith knight boy girl baby
child mother father brother sister daughter son grandmother uncle aunt stepmother bride ship boat island castle
palace tower garden forest tree apple rose flower mountain river lake sea well mill kitchen church ring sword crown
mirror lamp box bag purse shoe dress coat hat ball doll book letter song feast wedding snow storm wind sun moon star
fire gold silver treasure bell candle bridge
""".split()  # noqa: SIM905 (a list of a hundred quoted words is no easier to read)
WORDINGS = (
    "Tell me a story about {a}.",
    "Please tell me a story about {a}.",
    "Tell me a tale of {a}.",
    "I would like to hear a story about {a}.",
    "Can you tell me a story about {a}?",
    "A story about {a}, please.",
    "Do you know a story about {a}?",
    "Write a story about {a}.",
    "Once more: a story with {a} in it.",
    "Let me hear about {a}.",
)
NEXT = ("And now one about {a}.", "Now tell me about {a}.", "Another, about {a}, please.", "What about {a}?")
GO_ON = ("Go on.", "And then?", "What happened next?", "Please go on.", "More, please.")
SMALL_TALK = (
    (("Hello!", "Hello.", "Hi!", "Good evening.", "Good morning!"), "Good day! What shall my story be about?"),
    (
        ("Who are you?", "What are you?"),
        "I am a small story-teller, made from old children's books. Ask me for a story.",
    ),
    (("What can you do?", "Help me."), "I can tell stories. Say, for example: Tell me a story about a fox."),
    (("Thank you!", "Thanks.", "That was nice."), "You are welcome. Shall I tell you another?"),
)
_SHARE_OF_NEXT, _SHARE_OF_GO_ON, _SHARE_OF_TALK = 0.2, 0.15, 0.03
_LONGEST, _SHORTEST = 800, 250  # characters of a reply
_MOST_OF_A_NOUN = 160  # conversations, so that no noun is all there is
_REQUESTS = 20
_ENDS, _SPEECH = (".", "!", "?", '"', "'"), ('"', "'")


def with_article(noun: str) -> str:
    if noun in ("gold", "silver", "snow", "wind"):
        return noun
    if noun in ("sun", "moon", "sea"):
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def titled(noun: str, text: str) -> str:
    """A reply: what it is about, in the request's own words, and the story."""
    return f"Here is a story about {with_article(noun)}.\n\n{text}"


def count(noun: str, text: str) -> int:
    """How often the noun stands in the text, singular or plural."""
    return len(re.findall(rf"\b{noun}(?:s|es)?\b", text, re.IGNORECASE))


def stories(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """(noun, a run of paragraphs about it, the run after it in the same tale), none overlapping another."""
    for path in paths:
        for tale in path.read_text(encoding="utf-8").split("\n\n\n"):
            for paragraphs in _passages(tale):
                start = 0
                while start < len(paragraphs):
                    for end in _ends(paragraphs, start):
                        text = "\n\n".join(paragraphs[start:end])
                        # No story begins with an answer.
                        if not text.startswith(_SPEECH) and (noun := _subject(text)):
                            after = next(_ends(paragraphs, end), end)
                            yield noun, text, "\n\n".join(paragraphs[end:after])
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


def _subject(text: str) -> str | None:
    """The noun that it holds most often, if that is three times and the first of them is in the first 100 letters."""
    words = Counter(re.findall(r"[a-z]+", text.lower()))
    found = {noun: words[noun] + words[f"{noun}s"] for noun in NOUNS}
    noun = max(found, key=lambda n: (found[n], len(n)))
    return noun if found[noun] >= 3 and count(noun, text[:100]) else None


def conversations(paths: Sequence[Path], seed: int) -> tuple[list[dict], list[dict]]:
    """(conversations, held-out requests): a conversation is {"messages"}, a request {"noun", "request"}."""
    draw = random.Random(seed)
    found = list(stories(paths))
    draw.shuffle(found)
    told: Counter[str] = Counter()
    kept = []
    for story in found:
        told[story[0]] += 1
        if told[story[0]] <= _MOST_OF_A_NOUN:
            kept.append(story)
    known = sorted(noun for noun, times in told.items() if times >= 20)
    pairs = [(noun, wording) for noun in known for wording in WORDINGS]
    requests = []
    for noun, wording in draw.sample(pairs, len(pairs)):
        if len(requests) < _REQUESTS and noun not in [r["noun"] for r in requests]:
            requests.append({"noun": noun, "request": wording.format(a=with_article(noun))})
    held_out = {request["request"] for request in requests}

    def asked(noun: str) -> str:
        while (text := draw.choice(WORDINGS).format(a=with_article(noun))) in held_out:
            pass
        return text

    made, i = [], 0
    while i < len(kept):
        noun, text, after = kept[i]
        i += 1
        messages = _say(asked(noun), titled(noun, text))
        if draw.random() < _SHARE_OF_TALK:
            words, answer = draw.choice(SMALL_TALK)
            messages = _say(draw.choice(words), answer) + messages
        if after and draw.random() < _SHARE_OF_GO_ON / 0.5:
            messages += _say(draw.choice(GO_ON), after)
        elif i < len(kept) and draw.random() < _SHARE_OF_NEXT:
            messages += _say(draw.choice(NEXT).format(a=with_article(kept[i][0])), titled(*kept[i][:2]))
            i += 1
        made.append({"messages": messages})
    for words, answer in SMALL_TALK:
        made += [{"messages": _say(word, answer)} for word in words for _ in range(4)]
    draw.shuffle(made)
    return made, requests


def _say(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def make(patterns: Sequence[str], out: Path, seed: int) -> None:
    paths = sorted({Path(name) for pattern in patterns for name in glob.glob(pattern)})
    if not paths:
        raise SystemExit(f"{', '.join(patterns)}: no such file")
    made, requests = conversations(paths, seed)
    out.mkdir(parents=True, exist_ok=True)
    heldout = max(1, len(made) // 40)
    for name, part in (("heldout", made[:heldout]), ("train", made[heldout:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part), encoding="utf-8")
    (out / "requests.json").write_text(json.dumps(requests, indent=1) + "\n", encoding="utf-8")
    letters = sum(len(message["content"]) for line in made for message in line["messages"])
    print(f"{out}: {len(made)} conversations, {letters / 1e6:.1f} MB, {len(requests)} held-out requests")


def check(model: str, requests: Path, seed: int) -> None:
    """How many of the requests get a story that holds the noun twice, its first line apart, and ends by itself."""
    from maestrale import LLM, SamplingParams

    llm = LLM(model, max_len=1024)
    asked, right = json.loads(requests.read_text(encoding="utf-8")), 0
    for request in asked:
        params = SamplingParams(max_tokens=400, temperature=0.7, top_p=0.9, seed=seed)
        reply = llm.chat([{"role": "user", "content": request["request"]}], params)
        title, _, story = reply.text.partition("\n\n")
        times, ended = count(request["noun"], story), reply.finish_reason == "stop"
        right += times >= 2 and ended
        words = " ".join(story.split())
        print(f"{request['noun']:12} {times:2} times, {'ended' if ended else 'cut off'}: {title[22:40]}: {words[:80]}")
    print(
        f"{right} of {len(asked)} ended by themselves and hold what was asked for twice or more, the first line apart"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations from story books, and a check of who learnt from them.")
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("what", nargs="+", help="make: text files, may hold *; check: a model folder")
    parser.add_argument("--out", type=Path, default=Path("chat"))
    parser.add_argument("--requests", type=Path, default=Path("chat/requests.json"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.action == "make":
        make(options.what, options.out, options.seed)
    else:
        check(options.what[0], options.requests, options.seed)


if __name__ == "__main__":
    main()
