import json
import re

import pytest
from byte_models import byte_ids, byte_text
from tiny import hf_greedy

from maestrale.cli.demo import PROMPTS
from maestrale.cli.generate import SEPARATOR

GREEDY = ("--temperature", 0, "--dtype", "float32", "--backend", "torch", "--ignore-eos")


def expected(model, prompt, count):
    return hf_greedy(model, byte_ids(prompt), count)


@pytest.mark.parametrize("option", ["--max-tokens", "--max_tokens"])
def test_prompts_are_continued_in_order_as_transformers_does(command, models, references, option):
    run = command("generate", models["dense"], "-p", "A", "-p", "Bora", option, 6, *GREEDY)
    texts = [text + byte_text(expected(references["dense"], text, 6)) for text in ("A", "Bora")]
    assert (run.code, run.err) == (0, "")
    assert run.out == "".join(f"{text}\n{SEPARATOR}\n" for text in texts)


def test_one_prompt_is_streamed_without_a_separator(command, models, references):
    run = command("generate", models["dense"], "-p", "Bora", "--max-tokens", 6, *GREEDY)
    assert run.out == "Bora" + byte_text(expected(references["dense"], "Bora", 6)) + "\n"


def test_json_is_an_object_a_line(command, models, references):
    asked = ("--json", "--max-tokens", 3, "--logprobs", 2, "--prompt-logprobs", 0, *GREEDY)
    run = command("generate", models["dense"], "-p", "A", "-p", "é", *asked)
    first, second = map(json.loads, run.out.splitlines())
    assert first["prompt"] == "A"
    assert second["prompt"] == "é"
    assert first["token_ids"] == expected(references["dense"], "A", 3)
    assert first["text"] == byte_text(first["token_ids"])
    assert first["finish_reason"] == "length"
    assert len(first["logprobs"]) == len(first["top_logprobs"]) == 3
    assert len(second["prompt_logprobs"]) == len(byte_ids("é"))


def test_json_has_null_logprobs_where_none_were_asked_for(command, models):
    run = command("generate", models["dense"], "-p", "A", "--json", "--max-tokens", 1, *GREEDY)
    assert json.loads(run.out)["logprobs"] is None


def test_n_continuations_stand_together(command, models):
    run = command("generate", models["dense"], "-p", "A", "-p", "B", "-n", 2, "--json", "--max-tokens", 2, "--seed", 1)
    answers = [json.loads(line) for line in run.out.splitlines()]
    assert [(a["prompt"], a["index"]) for a in answers] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "one\r\n\ntwo\u2028half\n"), ("p.jsonl", '"one"\n{"prompt": "two\\u2028half", "id": 1}\n')],
)
def test_prompts_come_from_a_file_a_line_each(command, models, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    run = command("generate", models["dense"], "--prompts", tmp_path / name, "--json", "--max-tokens", 1)
    assert [json.loads(line)["prompt"] for line in run.out.split("\n")[:-1]] == ["one", "two\u2028half"]


def test_prompts_come_from_standard_input(command, models):
    run = command("generate", models["dense"], "--prompts", "-", "--json", "--max-tokens", 1, stdin="one\ntwo\n")
    assert [json.loads(line)["prompt"] for line in run.out.splitlines()] == ["one", "two"]


@pytest.mark.parametrize("line", ["{", "3", '{"text": "A"}'])
def test_a_bad_line_of_prompts_is_named(command, models, tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    run = command("generate", models["dense"], "--prompts", tmp_path / "p.jsonl")
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert "p.jsonl:2" in run.err


def test_demo_continues_its_three_prompts(command, models, references):
    run = command("demo", models["dense"], "--max-tokens", 3, "--dtype", "float32")
    texts = run.out.split(f"\n{SEPARATOR}\n")
    assert run.code == 0
    assert texts[:-1] == [text + byte_text(expected(references["dense"], text, 3)) for text in PROMPTS]
    assert texts[-1] == ""


# Constraints


def constrained(command, models, *asked):
    return command("generate", models["dense"], "-p", "Bora", "--max-tokens", 60, "--temperature", 1.5, *asked)


def test_a_schema_a_regex_and_a_grammar_are_kept_to(command, models, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [{"wind": "bora"}, ["è", 3]]}')
    (tmp_path / "pair.lark").write_text('start: "(" (start | "x") ")"')
    run = constrained(command, models, "--json-schema", tmp_path / "schema.json", "--json", "--seed", 3)
    assert run.code == 0
    assert json.loads(json.loads(run.out)["text"]) in ({"wind": "bora"}, ["è", 3])
    run = constrained(command, models, "--regex", "[0-9]{3}-(a|é)", "--seed", 3)
    assert re.fullmatch("Bora[0-9]{3}-(a|é)\n", run.out)
    run = constrained(command, models, "--grammar", tmp_path / "pair.lark", "--seed", 3)
    text = run.out.removeprefix("Bora").removesuffix("\n")
    assert text == "(" * text.count("(") + "x" + ")" * text.count("(")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--regex", "["), "--regex: .*unclosed"),
        (("--json-schema", "broken.json"), "broken.json: json_schema: expected JSON: .*line 1"),
        (("--json-schema", "never.json"), "never.json: .*[Uu]nsatisfiable"),
        (("--json-schema", "absent.json"), "absent.json: cannot read"),
        (("--grammar", "nothing.lark"), "nothing.lark: .*no start rule"),
        (("--regex", "a", "--grammar", "nothing.lark"), "at most one of"),
        (("--regex", "a", "--ignore-eos"), "ignore_eos"),
        (("--regex", "a", "--beam-width", "2"), "beam_width"),
    ],
)
def test_a_wrong_constraint_is_one_line_that_names_it(command, models, asked, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"type":')
    (tmp_path / "never.json").write_text('{"type": "string", "minLength": 3, "maxLength": 2}')
    (tmp_path / "nothing.lark").write_text("")
    run = constrained(command, models, *asked)
    assert run.code == 2
    assert re.fullmatch(f"maestrale: .*{message}.*\n", run.err), run.err
    assert run.out == ""
