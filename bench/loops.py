"""How soon text, greedy or drawn, goes round in circles: repeated 4-grams and loops in 200 tokens after 20 openings.

    python bench/loops.py [MODEL …] [--tokens 200] [--backend native] [--chat] [--temperature 0.7]

Per model: rep-4, the share of 4-grams of tokens that stood in the same continuation before (seq-rep-4 of Welleck et
al., arXiv 1908.04319, section 5); how many continuations run into a loop, and after how many tokens half of those have.
A loop is a passage of 8 tokens or more that is followed by itself, letter for letter. --chat asks for stories in
turns instead, and a reply may end by itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

from maestrale import LLM, SamplingParams

OPENINGS = (
    "Once upon a time there was a fisherman who lived with his wife by the sea.",
    "There was once a king who had three sons.",
    "Far away in the north there lived a great white bear.",
    "One morning a little girl found a silver key in the garden.",
    "The old woman lived all alone at the edge of the wood.",
    "A fox and a crow met one day beside the well.",
    "In the middle of the night the soldier heard a knock at the door.",
    "Long ago, when animals could speak,",
    "The ship had been at sea for forty days",
    '"Who are you?" said the giant.',
    "Tom and his sister ran down to the river",
    "The princess looked into the mirror and",
    "There lived in a certain village a poor shoemaker",
    "It was Christmas Eve, and the snow lay deep.",
    "The wolf came to the door of the little house and said:",
    "When the prince woke up, the castle was gone.",
    "A farmer had a donkey that was very old.",
    "Under the hill there lived a dwarf with a long beard.",
    '"Mother," said the boy, "may I go into the forest?"',
    "At last the dragon opened its eyes",
)
ASKED = tuple(
    f"Tell me a story about {what}."
    for what in (
        *(
            "a fox",
            "a bear",
            "a king",
            "a princess",
            "a giant",
            "a dwarf",
            "a witch",
            "a dragon",
            "a soldier",
            "a ship",
        ),
        *("a horse", "a bird", "a dog", "a cat", "a tree", "a castle", "a boy", "a queen", "a fairy", "a tailor"),
    )
)
SHORTEST = 8  # tokens of a passage whose repetition is a loop


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """1 - distinct n-grams / n-grams, 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_loop(ids: Sequence[int]) -> int | None:
    """After how many tokens a passage of SHORTEST or more has been said twice in a row, None where none is."""
    for end in range(2 * SHORTEST, len(ids) + 1):
        for length in range(SHORTEST, end // 2 + 1):
            if ids[end - length : end] == ids[end - 2 * length : end - length]:
                return end
    return None


def measure(name: str, tokens: int, backend: str, chat: bool, temperature: float) -> dict[str, object]:
    llm = LLM(name, backend=backend, max_len=1024)
    if chat:
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=0)
        replies = [llm.chat([{"role": "user", "content": text}], params) for text in ASKED]
    else:
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=0, ignore_eos=True)
        replies = llm.generate(list(OPENINGS), params)
    found = [list(reply.token_ids) for reply in replies]
    loops = [first_loop(ids) for ids in found]
    ends = sorted(end for end in loops if end is not None)
    return {
        "model": name,
        "rep_4": statistics.mean(repeated(ids) for ids in found),
        "looping": len(ends),
        "of": len(found),
        "median_first_loop": statistics.median(ends) if ends else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["stories", "stories-moe"])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: drawn text, seed 0")
    given = parser.parse_args()
    rows = [measure(name, given.tokens, given.backend, given.chat, given.temperature) for name in given.models]
    for row in rows:
        when = "" if row["median_first_loop"] is None else f", half of those by token {row['median_first_loop']:.0f}"
        print(f"{row['model']}: rep-4 {row['rep_4']:.3f}; {row['looping']} of {row['of']} loop{when}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
