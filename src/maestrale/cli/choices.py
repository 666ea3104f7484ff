"""Multiple choice by likelihood: which of the continuations given a model finds likeliest, scored as lm-eval does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestrale.errors import DataError, RequestError, shown
from maestrale.text.vocabulary import require_text

if TYPE_CHECKING:
    from maestrale.llm import LLM
    from maestrale.text.samples import Row

KEYS = ("query", "choices", "gold")  # of a question in lm-eval's own documents


@dataclass(frozen=True)
class Question:
    """gold: the number of the right choice, from 0."""

    line: int
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Segment:
    """Token ids to be read in one go, of which the first `given` are not scored: they are context."""

    ids: list[int]
    given: int


def read_questions(path: Path, keys: Sequence[str] = KEYS) -> list[Question]:
    """The questions of a .jsonl or .parquet file. keys: the names of query, choices and gold there.

    DataError that names every bad line.
    """
    from maestrale.text.samples import read_rows

    questions, faults = [], []
    for row in read_rows(path):
        try:
            questions.append(_question(row, keys))
        except RequestError as error:
            faults.append(f"{path}:{row.line}: {error}")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(f"{len(faults)} bad lines: {'; '.join(faults[:20])}{more}")
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def _question(row: Row, keys: Sequence[str]) -> Question:
    if row.cause:
        raise RequestError(row.cause)
    query, choices, gold = (row.value.get(key) for key in keys)
    if not isinstance(choices, list) or len(choices) < 2:
        raise RequestError(f"{keys[1]}: expected a list of two texts or more, got {shown(choices)}")
    texts = tuple(require_text(choice, keys[1]) for choice in choices)
    if not all(texts):
        raise RequestError(f"{keys[1]}: an empty text is no choice")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise RequestError(f"{keys[2]} = {shown(gold)}: expected a whole number from 0 to {len(texts) - 1}")
    return Question(row.line, require_text(query, keys[0]), texts, gold)


def segments(llm: LLM, path: Path, questions: Sequence[Question], delimiter: str) -> list[Segment]:
    """Each question with each of its choices behind it, in order.

    As lm-eval cuts them: the text is put into tokens as a whole, spaces that end a query belong to the choice, and the
    choice's tokens are those behind as many as the query alone has. DataError for what is longer than the model reads.
    """
    found = []
    for question in questions:
        stem = question.query.rstrip()
        given = len(llm.tokenizer.encode(stem))
        for choice in question.choices:
            ids = llm.tokenizer.encode(question.query + delimiter + choice)
            if len(ids) > llm.max_len:
                raise DataError(f"{path}:{question.line}: {len(ids)} tokens, over the {llm.max_len} read in one go")
            if len(ids) <= given:
                raise DataError(f"{path}:{question.line}: choice {shown(choice)} adds no token to the query")
            found.append(Segment(ids, given))
    return found


def accuracy(questions: Sequence[Question], logprobs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """lm-eval's acc (the likeliest choice is the right one) and acc_norm (the likeliest for each letter), each with the
    standard error of its mean. logprobs: of the scored tokens of each question with each choice, in order."""
    sums = iter([math.fsum(found) for found in logprobs])
    right, right_norm = [], []
    for question in questions:
        scores = [next(sums) for _ in question.choices]
        each = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        right.append(scores.index(max(scores)) == question.gold)
        right_norm.append(each.index(max(each)) == question.gold)
    facts: dict[str, Any] = {"questions": len(questions)}
    for name, hits in (("acc", right), ("acc_norm", right_norm)):
        share = sum(hits) / len(hits)
        facts[name] = share
        facts[f"{name}_stderr"] = math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None
    return facts
