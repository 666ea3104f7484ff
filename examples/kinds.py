"""Sentences of stories and what they do there: `python examples/kinds.py` writes kinds/train.jsonl and heldout.jsonl.

Each line is {"text", "label"} as `maestrale finetune --task classify` takes it. The held-out sentences are worded in
ways and speak of things that stand in no training sentence: whoever tells them apart has not learnt them by heart.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# Of each kind (wordings to learn from, wordings that are held out).
WORDINGS = {
    "opening": (
        (
            "Once upon a time there was a {adj} {a} who lived in a {place}.",
            "There was once a {a} who had a {adj} {b}.",
            "Many hundred years ago a {a} and a {b} lived together in a {place}.",
            "Long, long ago a {adj} {a} kept house with a {b}.",
            "A {a} and a {b} once lived near a {place}.",
        ),
        (
            "In a far country there lived a {adj} {a}.",
            "Years and years ago a {place} belonged to a {a}.",
            "There lived in a {place} a {a} whose name nobody knew.",
        ),
    ),
    "speech": (
        (
            '"Who are you?" asked the {a}.',
            '"I will give you my {b}," said the {a}, "if you help me."',
            '"Do not go into the {place}," cried the {adj} {a}.',
            'The {a} answered, "I have never seen a {b} in my life."',
            '"That is a {adj} {b}!" said the {a} to himself.',
        ),
        (
            '"What a {adj} {place}!" the {a} called out.',
            'Then the {a} said: "Let me in, dear {b}."',
            '"Alas," sighed the {a}, "what shall I do now?"',
        ),
    ),
    "journey": (
        (
            "The {a} set out early and walked until he came to a {place}.",
            "They went on and on through the {place}, and the {b} went with them.",
            "So the {a} took his stick and travelled over the hills to the {place}.",
            "He rode all day with the {b} and reached a {adj} {place} in the evening.",
            "The {a} ran down the road that led to the {place}.",
        ),
        (
            "After three days the {a} arrived at a {adj} {place}.",
            "The {a} climbed over a wall and followed the path to the {place}.",
            "He left the {b} behind and wandered away from the {place}.",
        ),
    ),
    "danger": (
        (
            "The {adj} {a} seized the {b} and tried to eat it.",
            "The {a} fell into the water and was nearly drowned.",
            "All at once the {a} sprang upon the {b} with a terrible roar.",
            "The {a} drew his sword and struck at the {adj} {b}.",
            "The {a} was shut up in a dark {place} and wept bitterly.",
        ),
        (
            "The {b} trembled with fear, for the {adj} {a} was coming to kill it.",
            "Fire broke out in the {place}, and the {a} could not escape.",
            "The {a} bit the {b} so hard that the blood ran down.",
        ),
    ),
    "ending": (
        (
            "So the {a} married the {b}, and they lived happily in the {place}.",
            "And the {adj} {a} never came back to the {place} again.",
            "Then the {a} went home, and that is the end of the story.",
            "They were so glad that they danced with the {b} to the end of their days.",
            "And if the {a} is not dead, he lives in that {place} still.",
        ),
        (
            "From that day on the {a} and the {b} were the best of friends.",
            "So all was well at last, and the {a} had peace ever after.",
            "And the {adj} {a} lived with the {b} until they died.",
        ),
    ),
}
# (words to learn from, words that are held out)
NAMES = ("fox king miller cat prince shepherd wolf tailor goose maiden", "bear queen hunter dog giant")
PLACES = ("forest castle mill garden village cave", "tower meadow palace hut")
ADJECTIVES = ("old poor little wicked clever", "young proud great")


def sentences(count: int, held_out: bool, seed: int) -> list[dict[str, str]]:
    """`count` of each kind, shuffled; the same for the same seed."""
    draw, found = random.Random(seed), []
    names, places, adjectives = (words[held_out].split() for words in (NAMES, PLACES, ADJECTIVES))
    for label, wordings in WORDINGS.items():
        for i in range(count):
            a, b = draw.sample(names, 2)
            wording = wordings[held_out][i % len(wordings[held_out])]
            text = wording.format(a=a, b=b, place=draw.choice(places), adj=draw.choice(adjectives))
            found.append({"text": text.replace(" a old", " an old"), "label": label})
    draw.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kinds"))
    parser.add_argument("--count", type=int, default=60, help="training sentences of each kind; half as many held out")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", chosen.count, False), ("heldout", chosen.count // 2, True)):
        lines = (json.dumps(sentence) + "\n" for sentence in sentences(count, held_out, seed=held_out))
        (chosen.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
