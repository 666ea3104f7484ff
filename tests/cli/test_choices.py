"""`eval --choices` against transformers' logits, and files that are wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from byte_models import byte_ids
from tiny import hf_logits

QUESTIONS = [
    {"query": "The wind that blows from the north-west is", "choices": ["the maestrale", "a fish", "no"], "gold": 0},
    {"query": "Cold and dry ", "choices": ["wind", "soup is what it is"], "gold": 1},
    {"query": "", "choices": ["One", "Another, longer"], "gold": 1},
    {"query": "è il re dei", "choices": ["venti", "cani", "gatti neri"], "gold": 2},
]


def logprob(model, ids: list[int], given: int) -> float:
    rows = hf_logits(model, ids).double().log_softmax(-1)
    return sum(rows[i - 1, ids[i]].item() for i in range(given, len(ids)))


def written(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", ["dense", "windowed"])
@pytest.mark.parametrize("delimiter", [" ", ""])
def test_the_chosen_are_those_of_transformers(command, models, references, tmp_path, name, delimiter):
    """lm-eval's rule: a text's tokens are cut where those of the query alone end, spaces at its end not counted."""
    best, best_norm = [], []
    for question in QUESTIONS:
        given = len(byte_ids(question["query"].rstrip()))
        sums = torch.tensor(
            [logprob(references[name], byte_ids(question["query"] + delimiter + c), given) for c in question["choices"]]
        )
        best.append(int(sums.argmax()))
        best_norm.append(int((sums / torch.tensor([len(c) for c in question["choices"]])).argmax()))
    lines = [{**question, "gold": best[0] if i % 2 else best_norm[i]} for i, question in enumerate(QUESTIONS)]
    lines = [{**line, "gold": min(line["gold"], len(line["choices"]) - 1)} for line in lines]
    run = command(
        *("eval", written(tmp_path / "q.jsonl", lines), "--choices", "--delimiter", delimiter),
        *("--model", models[name], "--dtype", "float32", "--json"),
    )
    assert (run.code, run.err) == (0, "")
    found = json.loads(run.out)
    assert found["questions"] == 4
    for key, chosen in (("acc", best), ("acc_norm", best_norm)):
        share = sum(c == line["gold"] for c, line in zip(chosen, lines, strict=True)) / 4
        assert found[key] == share
        assert found[f"{key}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_other_keys_may_be_named(command, models, tmp_path):
    lines = [{"q": question["query"], "c": question["choices"], "a": question["gold"]} for question in QUESTIONS]
    run = command(
        "eval", written(tmp_path / "q.jsonl", lines), "--choices", "--keys", "q,c,a", "--model", models["dense"]
    )
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("4 questions: acc ")
    assert ", acc_norm " in run.out


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ({"query": "a", "choices": ["b"], "gold": 0}, "choices: expected a list of two texts or more, got ['b']"),
        ({"query": "a", "choices": ["b", ""], "gold": 0}, "choices: an empty text is no choice"),
        ({"query": "a", "choices": ["b", 7], "gold": 0}, "choices"),
        ({"query": "a", "choices": ["b", "c"], "gold": 2}, "gold = 2: expected a whole number from 0 to 1"),
        ({"query": "a", "choices": ["b", "c"], "gold": True}, "gold = True"),
        ({"query": 3, "choices": ["b", "c"], "gold": 1}, "query"),
        ({"query": "a" * 600, "choices": ["b", "c"], "gold": 1}, "603 tokens, over the 512 read in one go"),
    ],
)
def test_a_bad_question_is_named_by_its_line(command, models, tmp_path, line, cause):
    path = written(tmp_path / "q.jsonl", [QUESTIONS[0], line])
    run = command("eval", path, "--choices", "--model", models["dense"])
    assert run.code != 0
    assert (run.out, run.err.count("\n")) == ("", 1)
    assert f"{path}:2: " in run.err
    assert cause in run.err


def test_what_makes_no_sense_together_is_a_usage_error(command, models, tmp_path):
    path = written(tmp_path / "q.jsonl", QUESTIONS)
    for args in (["--keys", "a,b"], ["--documents"], ["--stride", 3]):
        run = command("eval", path, "--choices", *args, "--model", models["dense"])
        assert (run.code, run.err.count("\n")) == (2, 1)
    (tmp_path / "none.jsonl").write_text("")
    assert "holds no question" in command("eval", tmp_path / "none.jsonl", "--choices", "--model", models["dense"]).err
