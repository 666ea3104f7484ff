"""Texts that a model writes itself, greedily, for it to unlearn what it says again (`own` of a training file).

    python examples/own_text.py MODEL 'corpus/books/*.txt' --out own.txt
    python examples/own_text.py MODEL chat/train.jsonl --out own.jsonl

Of text files: beginnings of paragraphs, each followed by what the model says next. Of conversations: their first
requests, each with the model's reply. Nothing is drawn but which of them.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
from collections.abc import Sequence
from pathlib import Path

from maestrale import LLM, SamplingParams

BEGINNING = 40  # tokens


def texts(llm: LLM, paths: Sequence[Path], count: int, tokens: int, draw: random.Random) -> str:
    paragraphs = [p for path in paths for p in path.read_text(encoding="utf-8").split("\n\n") if len(p) > 80]
    prompts = [llm.tokenizer.encode(p)[: draw.randint(8, BEGINNING)] for p in draw.sample(paragraphs, count)]
    found = llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    pairs = zip(prompts, found, strict=True)
    return "\n\n\n".join(
        llm.tokenizer.decode([*ids, *reply.token_ids]).replace("\n\n\n", "\n\n") for ids, reply in pairs
    )


def replies(llm: LLM, path: Path, count: int, tokens: int, draw: random.Random) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["messages"][0] for line in draw.sample(lines, count)]
    prompts = [llm.tokenizer.encode_chat([message]) for message in asked]
    found = llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0))
    made = (
        {"messages": [message, {"role": "assistant", "content": llm.tokenizer.decode(reply.token_ids)}]}
        for message, reply in zip(asked, found, strict=True)
    )
    return "".join(json.dumps(line) + "\n" for line in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source", help="text files, may hold *; or a .jsonl file of conversations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = [Path(name) for name in sorted(glob.glob(options.source))]
    if not paths:
        raise SystemExit(f"{options.source}: no such file")
    llm, draw = LLM(options.model, max_len=512), random.Random(options.seed)
    if paths[0].suffix == ".jsonl":
        made = replies(llm, paths[0], options.count, options.tokens, draw)
    else:
        made = texts(llm, paths, options.count, options.tokens, draw)
    options.out.write_text(made, encoding="utf-8")
    print(f"{options.out}: {options.count} texts")


if __name__ == "__main__":
    main()
